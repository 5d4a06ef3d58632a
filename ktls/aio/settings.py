"""How a connection's TLS is to be, and what all ways to a connection share."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl as ssl_module
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypedDict

from OpenSSL import SSL

from ..socket import Socket
from ..types import Offload, Reason
from ..wrapping import wrap
from .transport import Transport

_log = logging.getLogger("ktls")

Factory = Callable[[], asyncio.BaseProtocol]
STREAM_LIMIT = 1 << 16  # bytes in a stream reader; this and the next as in asyncio
_HANDSHAKE_TIMEOUT = 60.0  # seconds
_SHUTDOWN_TIMEOUT = 30.0
_told: set[Reason] = set()


class WrapOptions(TypedDict, total=False):
    """Arguments of `ktls.wrap`."""

    tx: bool
    rx: bool
    require: bool
    check_hostname: bool | None
    suppress_ragged_eofs: bool
    record_limit: int | None
    max_send_fragment: int
    expect_no_pad: bool
    zerocopy: bool


@dataclass(frozen=True)
class Settings:
    """How a connection's TLS is to be, whichever way it came about."""

    context: Any
    server_side: bool
    server_hostname: str | None = None
    handshake_timeout: float = _HANDSHAKE_TIMEOUT
    shutdown_timeout: float = _SHUTDOWN_TIMEOUT
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def checked(
        cls,
        context: object,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        handshake_timeout: float | None,
        shutdown_timeout: float | None,
        options: Mapping[str, Any] | None,
    ) -> Settings:
        """Makes the settings of asyncio's arguments.

        Raises:
            TypeError: No context.
            ValueError: A timeout that isn't positive.
        """
        if context is True and not server_side:
            context = ssl_module.create_default_context()
        if not isinstance(context, ssl_module.SSLContext | SSL.Context):
            raise TypeError(f"ssl argument must be an SSLContext or a Context, not {context!r}")
        for name, value in (("handshake", handshake_timeout), ("shutdown", shutdown_timeout)):
            if value is not None and value <= 0:
                raise ValueError(f"ssl_{name}_timeout should be a positive number, got {value}")
        return cls(
            context,
            server_side,
            server_hostname or None,
            handshake_timeout or _HANDSHAKE_TIMEOUT,
            shutdown_timeout or _SHUTDOWN_TIMEOUT,
            dict(options or {}),
        )

    def wrap(self, sock: socket.socket) -> Socket:
        """Begins TLS on a connected socket, which is closed if that fails."""
        try:
            sock.setblocking(False)
            with suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return wrap(
                sock,
                self.context,
                server_side=self.server_side,
                server_hostname=self.server_hostname,
                do_handshake_on_connect=False,
                **self.options,
            )
        except BaseException:
            sock.close()
            raise

    def transport(
        self,
        loop: asyncio.AbstractEventLoop,
        tls: Socket,
        protocol: asyncio.BaseProtocol,
        peername: object = None,
        on_lost: Callable[[Transport], object] | None = None,
    ) -> Transport:
        """Makes a transport of a socket whose handshake is done."""
        for direction in (tls.tx, tls.rx):
            _tell_once(direction)
        return Transport(
            loop,
            tls,
            protocol,
            self.context,
            shutdown_timeout=self.shutdown_timeout,
            peername=peername,
            on_lost=on_lost,
        )


def _tell_once(direction: Offload) -> None:
    """What isn't in the kernel, and was to be, is in the log; each reason once a process."""
    reason = direction.reason
    if reason is not None and reason is not Reason.NOT_WANTED and reason not in _told:
        _told.add(reason)
        _log.warning("kernel TLS isn't used, for one connection at least: %s", direction)


def check_given(sock: socket.socket, host: object, port: object) -> None:
    """Refuses what ``create_server`` and ``create_connection`` don't take as ``sock``.

    Raises:
        ValueError: Which it is not.
    """
    if host is not None or port is not None:
        raise ValueError("host/port and sock can not be specified at the same time")
    if sock.type != socket.SOCK_STREAM:
        raise ValueError(f"A Stream Socket was expected, got {sock!r}")


def duplicate(sock: Any) -> socket.socket:
    """A socket of our own for the same connection."""
    own = socket.socket(fileno=os.dup(sock.fileno()))
    own.setblocking(False)
    return own


def is_tcp(sock: Any) -> bool:
    """Whether what a loop calls a socket is one that the kernel has TLS for."""
    return sock is not None and (
        sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
    )
