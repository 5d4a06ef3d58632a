"""TLS servers on an asyncio loop."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl as ssl_module
from asyncio import trsock
from collections.abc import Callable, Iterable
from typing import Any

from OpenSSL import SSL

from .. import offload
from ..errors import HandOverError, KTLSError, OffloadError
from ..socket import Socket
from ..types import Reason
from .handshaking import Handshaking
from .settings import STREAM_LIMIT, Factory, Settings, WrapOptions, check_given, duplicate
from .transport import Transport

_log = logging.getLogger("ktls")

MAX_HANDSHAKES = 1000
_ACCEPT_AGAIN = 1.0  # seconds, when there are no more descriptors
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Server(asyncio.AbstractServer):
    """Listening sockets and their TLS connections; made by `create_server`.

    As asyncio's own of Python 3.13, on every version: ``wait_closed`` waits for the connections,
    too; `close_clients` and `abort_clients` end them.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sockets: Iterable[socket.socket],
        factory: Factory,
        settings: Settings,
        *,
        backlog: int,
        max_handshakes: int,
    ) -> None:
        """Takes over bound sockets; `start_serving` listens."""
        self._loop = loop
        self._listeners: list[socket.socket] | None = list(sockets)
        self._factory = factory
        self._settings = settings
        self._backlog = backlog
        self._max_handshakes = max_handshakes
        self._handshakes: dict[Handshaking, None] = {}
        self._transports: set[Transport] = set()
        self._serving = False
        self._retries: dict[socket.socket, asyncio.TimerHandle] = {}
        self._waiters: list[asyncio.Future[None]] = []
        self._forever: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        """Its sockets."""
        return f"<{type(self).__name__} sockets={self.sockets!r}>"

    def __del__(self) -> None:
        """Nobody closed it: its sockets are."""
        for listener in self._listeners or ():
            listener.close()

    @property
    def sockets(self) -> tuple[trsock.TransportSocket, ...]:
        """The listening sockets; none once it is closed."""
        return tuple(map(trsock.TransportSocket, self._listeners or ()))

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The loop that it runs on."""
        return self._loop

    def is_serving(self) -> bool:
        """Whether connections are accepted."""
        return self._serving

    async def start_serving(self) -> None:
        """Listens and accepts."""
        self._begin()
        await asyncio.sleep(0)

    def _begin(self) -> None:
        if self._listeners is None:
            raise RuntimeError(f"server {self!r} is closed")
        if not self._serving:
            self._serving = True
            for listener in self._listeners:
                listener.listen(self._backlog)
                self._loop.add_reader(listener.fileno(), self._accept, listener)

    async def serve_forever(self) -> None:
        """Serves until it is cancelled, and then closes."""
        if self._forever is not None:
            raise RuntimeError(f"server {self!r} is already being awaited on serve_forever()")
        self._begin()
        self._forever = self._loop.create_future()
        try:
            await self._forever
        except asyncio.CancelledError:
            self.close()
            await self.wait_closed()
            raise
        finally:
            self._forever = None

    def close(self) -> None:
        """Stops listening. Connections go on, and handshakes."""
        if self._listeners is None:
            return
        listeners, self._listeners = self._listeners, None
        for retry in self._retries.values():
            retry.cancel()
        for listener in listeners:
            if self._serving:
                self._loop.remove_reader(listener.fileno())
            listener.close()
        self._serving = False
        if self._forever is not None and not self._forever.done():
            self._forever.cancel()
        self._wake_up()

    def close_clients(self) -> None:
        """Closes all connections, as ``transport.close()``."""
        self._end_handshakes()
        for transport in list(self._transports):
            transport.close()

    def abort_clients(self) -> None:
        """Aborts all connections, as ``transport.abort()``."""
        self._end_handshakes()
        for transport in list(self._transports):
            transport.abort()

    def _end_handshakes(self) -> None:
        for handshaking in list(self._handshakes):
            handshaking.fail(ConnectionAbortedError("the server ends its connections"))

    async def wait_closed(self) -> None:
        """Waits until it is closed, and all its connections."""
        if self._listeners is not None or self._transports or self._handshakes:
            waiter = self._loop.create_future()
            self._waiters.append(waiter)
            await waiter

    def _wake_up(self) -> None:
        if self._listeners is None and not self._transports and not self._handshakes:
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._waiters.clear()

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(self._backlog + 1):  # the kernel's queue has one more, too
            try:
                sock, peername = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _OUT_OF_RESOURCES:
                    raise
                self._pause(listener, error)
                return
            try:
                tls = self._settings.wrap(sock)
            except Exception as error:
                self._report_drop(error)
                continue
            self._shake_hands(tls, peername)

    def _pause(self, listener: socket.socket, error: OSError) -> None:
        """The kernel goes on saying that the listener is readable: ask again in a while."""
        self._loop.call_exception_handler(
            {
                "message": "socket.accept() out of system resource",
                "exception": error,
                "socket": trsock.TransportSocket(listener),
            }
        )
        self._loop.remove_reader(listener.fileno())
        self._retries[listener] = self._loop.call_later(_ACCEPT_AGAIN, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        del self._retries[listener]
        if self._serving:
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _shake_hands(self, tls: Socket, peername: object) -> None:
        if len(self._handshakes) >= self._max_handshakes:
            oldest = next(iter(self._handshakes))
            oldest.fail(ConnectionAbortedError("more handshakes than max_handshakes: the oldest"))

        def done(error: BaseException | None) -> None:
            del self._handshakes[handshaking]
            try:
                if error is None:
                    self._connected(tls, peername)
                else:
                    self._report_drop(error)
            finally:
                self._wake_up()

        handshaking = Handshaking(self._loop, tls, self._settings.handshake_timeout, done)
        self._handshakes[handshaking] = None

    def _connected(self, tls: Socket, peername: object) -> None:
        try:
            transport = self._settings.transport(
                self._loop, tls, self._factory(), peername, self._lost
            )
        except BaseException:
            tls.abandon()
            raise  # for the loop's exception handler
        self._transports.add(transport)
        transport.begin()

    def _report_drop(self, error: BaseException) -> None:
        """A client that can't shake hands is its own problem; all else is ours."""
        if not isinstance(error, KTLSError | OSError):  # such as what a context's callback raised
            self._loop.call_exception_handler(
                {"message": "SSL handshake failed", "exception": error}
            )
            return
        refused = (
            isinstance(error, OffloadError | HandOverError)
            and error.reason is not Reason.NOT_ESTABLISHED  # it has gone away already
        )
        _log.log(logging.WARNING if refused else logging.DEBUG, "connection dropped: %s", error)

    def _lost(self, transport: Transport) -> None:
        self._transports.discard(transport)
        self._wake_up()


async def create_server(
    protocol_factory: Factory,
    host: Any = None,
    port: int | None = None,
    *,
    ssl: ssl_module.SSLContext | SSL.Context,
    sock: socket.socket | None = None,
    backlog: int = 100,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    start_serving: bool = True,
    max_handshakes: int = MAX_HANDSHAKES,
    ktls_options: WrapOptions | None = None,
    **binding: Any,
) -> Server:
    """A TLS server, as ``loop.create_server`` makes it.

    Args:
        protocol_factory: Called for each connection, once its handshake is done.
        host: As there.
        port: As there.
        ssl: Its context.
        sock: A bound TCP socket instead of both; the server closes it.
        backlog: As there.
        ssl_handshake_timeout: In seconds, 60 if it is None.
        ssl_shutdown_timeout: How long a close may go without progress, in seconds; None means 30.
            In all it may take 100 times as long.
        start_serving: As there.
        max_handshakes: When there are so many the oldest gives way.
        ktls_options: As for `ktls.wrap`. With ``require`` connections that can't go to the kernel
            are dropped, with a warning in the log.
        binding: The other arguments of ``loop.create_server``.

    Returns:
        The server.

    Raises:
        KernelUnavailableError: ``require`` is set and there is no kernel TLS.
        ValueError: Arguments that don't go together.
        OSError: As there.
    """
    loop = asyncio.get_running_loop()
    if max_handshakes < 1:
        raise ValueError(f"max_handshakes should be a positive number, got {max_handshakes}")
    settings = Settings.checked(
        ssl,
        server_side=True,
        handshake_timeout=ssl_handshake_timeout,
        shutdown_timeout=ssl_shutdown_timeout,
        options=ktls_options,
    )
    if settings.options.get("require"):
        with offload.loopback_pair() as ends:
            offload.attach(ends[0])
    if sock is None:
        bound = await loop.create_server(
            asyncio.Protocol, host, port, start_serving=False, **binding
        )
        sockets: list[socket.socket] = []
        try:
            sockets.extend(map(duplicate, bound.sockets))
        except BaseException:
            for each in sockets:
                each.close()
            raise
        finally:
            bound.close()
    else:
        check_given(sock, host, port)
        sock.setblocking(False)
        sockets = [sock]
    server = Server(
        loop, sockets, protocol_factory, settings, backlog=backlog, max_handshakes=max_handshakes
    )
    if start_serving:
        await server.start_serving()
    return server


async def start_server(
    client_connected_cb: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any],
    host: Any = None,
    port: int | None = None,
    *,
    limit: int = STREAM_LIMIT,
    **arguments: Any,
) -> Server:
    """A TLS server whose connections are pairs of streams, as ``asyncio.start_server``.

    Args:
        client_connected_cb: As there: called with reader and writer.
        host: As for `create_server`.
        port: As for `create_server`.
        limit: As there: of a reader's buffer.
        arguments: As for `create_server`.

    Returns:
        The server.

    Raises:
        OSError: And others, as for `create_server`.
    """
    loop = asyncio.get_running_loop()

    def factory() -> asyncio.StreamReaderProtocol:
        reader = asyncio.StreamReader(limit=limit, loop=loop)
        return asyncio.StreamReaderProtocol(reader, client_connected_cb, loop=loop)

    return await create_server(factory, host, port, **arguments)
