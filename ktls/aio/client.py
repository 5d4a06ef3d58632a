"""TLS connections on an asyncio loop: new ones, given ones, and plain ones that go over to TLS."""

from __future__ import annotations

import asyncio
import socket
import ssl as ssl_module
from collections.abc import Callable
from typing import Any, TypeVar

from OpenSSL import SSL

from .handshaking import Handshaking, shake_hands
from .settings import STREAM_LIMIT, Settings, WrapOptions, check_given, duplicate, is_tcp
from .transport import Transport

_ProtocolT = TypeVar("_ProtocolT", bound=asyncio.BaseProtocol)


async def create_connection(
    protocol_factory: Callable[[], _ProtocolT],
    host: str | None = None,
    port: int | None = None,
    *,
    ssl: ssl_module.SSLContext | SSL.Context | bool = True,
    sock: socket.socket | None = None,
    server_hostname: str | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    ktls_options: WrapOptions | None = None,
    **connecting: Any,
) -> tuple[Transport, _ProtocolT]:
    """A TLS connection, as ``loop.create_connection`` makes it.

    Args:
        protocol_factory: Called once the handshake is done.
        host: As there.
        port: As there.
        ssl: Its context; True means ``ssl.create_default_context()``.
        sock: A connected TCP socket instead of both, which the connection takes over.
        server_hostname: As there: ``host`` if it is None.
        ssl_handshake_timeout: In seconds, 60 if it is None.
        ssl_shutdown_timeout: How long a close may go without progress, in seconds; None means 30.
            In all it may take 100 times as long.
        ktls_options: As for `ktls.wrap`.
        connecting: The other arguments of ``loop.create_connection``.

    Returns:
        Transport and protocol.

    Raises:
        ssl.SSLError: The handshake failed, with an ``ssl`` context.
        KTLSError: As for `ktls.wrap`.
        ConnectionAbortedError: The handshake took too long.
        ValueError: Arguments that don't go together.
        OSError: As there.
    """
    loop = asyncio.get_running_loop()
    if server_hostname is None:
        if not host:
            raise ValueError("You must set server_hostname when using ssl without a host")
        server_hostname = host
    settings = Settings.checked(
        ssl,
        server_side=False,
        server_hostname=server_hostname,
        handshake_timeout=ssl_handshake_timeout,
        shutdown_timeout=ssl_shutdown_timeout,
        options=ktls_options,
    )
    if sock is None:
        where: Any = (host, port)
        plain, _ = await loop.create_connection(_Paused, *where, **connecting)
        try:
            sock = duplicate(plain.get_extra_info("socket"))
        finally:
            plain.abort()
    else:
        check_given(sock, host, port)
    return await establish(loop, sock, protocol_factory, settings)


class _Paused(asyncio.Protocol):
    """Holds a plain transport that must not read."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Before it could."""
        transport.pause_reading()  # type: ignore[attr-defined]


async def establish(
    loop: asyncio.AbstractEventLoop,
    sock: socket.socket,
    factory: Callable[[], _ProtocolT],
    settings: Settings,
) -> tuple[Transport, _ProtocolT]:
    """Runs TLS over a connected socket, which it owns."""
    tls = settings.wrap(sock)
    await shake_hands(loop, tls, settings.handshake_timeout)
    try:
        protocol = factory()
        transport = settings.transport(loop, tls, protocol)
    except BaseException:
        tls.abandon()
        raise
    transport.begin()
    try:
        await asyncio.sleep(0)  # until after connection_made
    except BaseException:
        transport.close()
        raise
    return transport, protocol


async def start_tls(
    transport: asyncio.WriteTransport,
    protocol: asyncio.BaseProtocol,
    sslcontext: ssl_module.SSLContext | SSL.Context,
    *,
    server_side: bool = False,
    server_hostname: str | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    ktls_options: WrapOptions | None = None,
) -> Transport:
    """Goes over to TLS on a plain TCP transport, as ``loop.start_tls``.

    Args:
        transport: Of a TCP connection, of any loop. It stays open, unused, until the new one is
            closed, and when it is closed so is that.
        protocol: For the new transport. If the handshake fails its ``connection_lost`` is called.
        sslcontext: The context.
        server_side: Accept the handshake.
        server_hostname: A server's name.
        ssl_handshake_timeout: In seconds, 60 if it is None; what was written before must be sent
            within it, too.
        ssl_shutdown_timeout: How long a close may go without progress, in seconds; None means 30.
            In all it may take 100 times as long.
        ktls_options: As for `ktls.wrap`.

    Returns:
        The transport to use from now on.

    Raises:
        TypeError: No such transport, or no context.
        KTLSError: And others, as for `create_connection`.
    """
    loop = asyncio.get_running_loop()
    settings = Settings.checked(
        sslcontext,
        server_side=server_side,
        server_hostname=server_hostname,
        handshake_timeout=ssl_handshake_timeout,
        shutdown_timeout=ssl_shutdown_timeout,
        options=ktls_options,
    )
    if not can_start_tls(transport):
        raise TypeError(f"transport {transport!r} is not supported by start_tls()")
    deadline = loop.time() + settings.handshake_timeout
    below = _Below(loop)
    transport.pause_reading()  # type: ignore[attr-defined]
    transport.set_protocol(below)
    try:
        await below.drain(transport, settings.handshake_timeout)
        tls = settings.wrap(duplicate(transport.get_extra_info("socket")))
        await shake_hands(loop, tls, max(0.0, deadline - loop.time()), below.attend)
        if below.lost:
            tls.abandon()
            raise ConnectionAbortedError("the connection was closed during the handshake")
        upper = settings.transport(
            loop,
            tls,
            protocol,
            transport.get_extra_info("peername"),
            lambda _: transport.abort(),
        )
    except BaseException as error:
        transport.abort()
        reason = error if isinstance(error, Exception) else None  # a cancellation is none
        loop.call_soon(protocol.connection_lost, reason)
        raise
    below.upper = upper
    reader = getattr(protocol, "_stream_reader", None)
    if isinstance(reader, asyncio.StreamReader):  # it pauses and resumes its transport by itself
        reader._transport = upper  # type: ignore[attr-defined]
    upper.begin(call_connection_made=False)
    return upper


def can_start_tls(transport: Any) -> bool:
    """Whether it is the plain transport of a TCP connection."""
    ask = getattr(transport, "get_extra_info", None)
    return ask is not None and is_tcp(ask("socket")) and ask("sslcontext") is None


class _Below(asyncio.Protocol):
    """The protocol of a plain transport whose connection has TLS on another descriptor."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._drained: asyncio.Future[None] | None = None
        self._handshaking: Handshaking | None = None
        self.lost = False
        self.upper: Transport | None = None

    def attend(self, handshaking: Handshaking) -> None:
        """The handshake that a loss of the connection ends."""
        self._handshaking = handshaking

    async def drain(self, transport: asyncio.WriteTransport, timeout: float) -> None:
        """Waits until all that was written to the transport has been sent."""
        self._drained = self._loop.create_future()
        transport.set_write_buffer_limits(0)
        if transport.get_write_buffer_size():
            done, _ = await asyncio.wait([self._drained], timeout=timeout)
            if not done:
                raise ConnectionAbortedError(f"nothing was sent for {timeout} seconds")
            self._drained.result()
        if self.lost or transport.is_closing():
            raise ConnectionAbortedError("the connection was closed before its handshake")

    def resume_writing(self) -> None:
        """All is sent."""
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """Somebody closed the plain transport: a server that closes its clients, for one."""
        self.lost = True
        self.resume_writing()
        if self.upper is not None:
            if error is None:
                self.upper.close()
            else:
                self.upper.abort()
        elif self._handshaking is not None:
            self._handshaking.fail(
                error or ConnectionAbortedError("the connection was closed during the handshake")
            )


async def open_connection(
    host: str | None = None,
    port: int | None = None,
    *,
    limit: int = STREAM_LIMIT,
    **arguments: Any,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A TLS connection as a pair of streams, as ``asyncio.open_connection``.

    Args:
        host: As for `create_connection`.
        port: As for `create_connection`.
        limit: As there: of the reader's buffer.
        arguments: As for `create_connection`.

    Returns:
        Reader and writer.

    Raises:
        OSError: And others, as for `create_connection`.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await create_connection(lambda: protocol, host, port, **arguments)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
