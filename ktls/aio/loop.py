"""An event loop to drop in."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, TypeVar

from .. import files, wait
from ..errors import WouldBlockError
from ..socket import Socket
from .client import can_start_tls, create_connection, establish, start_tls
from .server import MAX_HANDSHAKES, create_server
from .settings import Factory, Settings, WrapOptions, is_tcp
from .transport import Transport

_ProtocolT = TypeVar("_ProtocolT", bound=asyncio.BaseProtocol)
_READ_SIZE = 1 << 18


class EventLoop(asyncio.SelectorEventLoop):
    """asyncio's selector event loop, in which every ``ssl=`` over TCP goes through ktls.

    ``asyncio.Runner(loop_factory=EventLoop)``, or ``asyncio.run(main(), loop_factory=EventLoop)``
    from Python 3.12 on. `sendfile` sends by the kernel where the connection is there. What has no
    kernel TLS, such as UNIX sockets and TLS within TLS, is asyncio's as before.
    """

    def __init__(
        self,
        selector: Any = None,
        *,
        max_handshakes: int = MAX_HANDSHAKES,
        ktls_options: WrapOptions | None = None,
    ) -> None:
        """Makes a loop.

        Args:
            selector: As for asyncio's.
            max_handshakes: Of each server, as for `create_server`.
            ktls_options: For all its connections, as for `ktls.wrap`.
        """
        super().__init__(selector)
        self._max_handshakes = max_handshakes
        self._ktls_options = ktls_options

    async def create_server(
        self,
        protocol_factory: Factory,
        host: Any = None,
        port: int | None = None,
        *,
        ssl: Any = None,
        **arguments: Any,
    ) -> Any:
        """As asyncio's, and with TLS as `ktls.aio.create_server`."""
        if ssl is None or ("sock" in arguments and _is_foreign(arguments["sock"])):
            return await super().create_server(protocol_factory, host, port, ssl=ssl, **arguments)
        arguments.setdefault("max_handshakes", self._max_handshakes)
        arguments.setdefault("ktls_options", self._ktls_options)
        return await create_server(protocol_factory, host, port, ssl=ssl, **arguments)

    async def create_connection(
        self,
        protocol_factory: Callable[[], _ProtocolT],
        host: Any = None,
        port: Any = None,
        *,
        ssl: Any = None,
        **arguments: Any,
    ) -> Any:
        """As asyncio's, and with TLS as `ktls.aio.create_connection`."""
        if not ssl or ("sock" in arguments and _is_foreign(arguments["sock"])):
            return await super().create_connection(
                protocol_factory, host, port, ssl=ssl, **arguments
            )
        arguments.setdefault("ktls_options", self._ktls_options)
        return await create_connection(protocol_factory, host, port, ssl=ssl, **arguments)

    async def connect_accepted_socket(
        self,
        protocol_factory: Callable[[], _ProtocolT],
        sock: socket.socket,
        *,
        ssl: Any = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        ktls_options: WrapOptions | None = None,
    ) -> Any:
        """As asyncio's, and with TLS through ktls."""
        if not ssl or _is_foreign(sock):
            timeouts = {
                "ssl_handshake_timeout": ssl_handshake_timeout,
                "ssl_shutdown_timeout": ssl_shutdown_timeout,
            }
            return await super().connect_accepted_socket(
                protocol_factory, sock, ssl=ssl, **timeouts
            )
        settings = Settings.checked(
            ssl,
            server_side=True,
            handshake_timeout=ssl_handshake_timeout,
            shutdown_timeout=ssl_shutdown_timeout,
            options=ktls_options or self._ktls_options,
        )
        return await establish(self, sock, protocol_factory, settings)

    async def start_tls(
        self,
        transport: Any,
        protocol: asyncio.BaseProtocol,
        sslcontext: Any,
        **arguments: Any,
    ) -> Any:
        """As asyncio's, through ktls if the transport is a TCP connection."""
        if not can_start_tls(transport):
            return await super().start_tls(transport, protocol, sslcontext, **arguments)
        arguments.setdefault("ktls_options", self._ktls_options)
        return await start_tls(transport, protocol, sslcontext, **arguments)

    async def sendfile(
        self,
        transport: Any,
        file: Any,
        offset: int = 0,
        count: int | None = None,
        *,
        fallback: bool = True,
    ) -> int:
        """As asyncio's; by the kernel if the connection's sending is there."""
        if isinstance(transport, Transport):
            try:
                return await transport.sendfile(file, offset, count)
            except asyncio.SendfileNotAvailableError:
                if not fallback:
                    raise
        return await super().sendfile(transport, file, offset, count, fallback=fallback)

    async def sock_sendfile(
        self,
        sock: socket.socket,
        file: Any,
        offset: int = 0,
        count: int | None = None,
        *,
        fallback: bool | None = True,
    ) -> int:
        """As asyncio's; of a `ktls.Socket` never by its bare descriptor."""
        if not isinstance(sock, Socket):
            return await super().sock_sendfile(sock, file, offset, count, fallback=fallback)
        files.check_range(file, offset, count)
        if sock.gettimeout() != 0:
            raise ValueError("the socket must be non-blocking")
        if files.regular(file)[0] is not None:
            return await self._sock_send_regular(sock, file, offset, count)
        if not fallback:
            raise asyncio.SendfileNotAvailableError("not a regular file")
        return await self._sock_send_by_reading(sock, file, offset, count)

    async def _sock_send_regular(
        self,
        sock: Socket,
        file: Any,
        offset: int,
        count: int | None,
    ) -> int:
        sent = 0
        while True:
            try:
                left = None if count is None else count - sent
                return sent + sock.sendfile(file, offset + sent, left)
            except WouldBlockError as error:
                sent += error.sent
            writable = self.create_future()
            descriptor = sock.fileno()
            self.add_writer(descriptor, _set, writable)
            again = self.call_later(wait.PUSH_AGAIN, _set, writable)
            try:
                await writable
            finally:
                again.cancel()
                self.remove_writer(descriptor)

    async def _sock_send_by_reading(
        self,
        sock: Socket,
        file: Any,
        offset: int,
        count: int | None,
    ) -> int:
        seek = getattr(file, "seek", lambda _: None)
        seek(offset)
        sent = 0
        try:
            while count is None or sent < count:
                size = _READ_SIZE if count is None else min(_READ_SIZE, count - sent)
                data = await self.run_in_executor(None, file.read, size)
                if not data:
                    break
                await self.sock_sendall(sock, data)
                sent += len(data)
        finally:
            seek(offset + sent)
        return sent


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _is_foreign(sock: socket.socket | None) -> bool:
    """Whether it is a stream socket for which the kernel has no TLS, such as a UNIX one."""
    return sock is not None and sock.type == socket.SOCK_STREAM and not is_tcp(sock)
