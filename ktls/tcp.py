"""What TCP tells of a connection."""

from __future__ import annotations

import array
import fcntl
import socket
import struct
import termios

from . import _ktls

_CLOSE = 7  # tcpi_state after a reset
_OPEN = {1, 8}  # ESTABLISHED; CLOSE_WAIT, after the peer's FIN
_UP_TO_RTT = struct.Struct("=68xI")  # tcpi_rtt of struct tcp_info: microseconds


def is_gone(sock: socket.socket) -> bool:
    """Whether TCP has no connection any more; if this side has sent no FIN, after a reset."""
    state, *_ = _ktls.stream(sock.fileno())
    return state == _CLOSE


def unacknowledged(sock: socket.socket) -> int:
    """Bytes in the send queue (SIOCOUTQ), FIN included; 0 once the connection is no more."""
    state, _, queued, _ = _ktls.stream(sock.fileno())
    return 0 if state == _CLOSE else queued


def acknowledged(sock: socket.socket) -> int:
    """Bytes that the peer has acknowledged since the connection began."""
    _, acked, *_ = _ktls.stream(sock.fileno())
    return acked


def written(sock: socket.socket) -> int:
    """Bytes written since the connection began, acknowledged or not."""
    _, acked, queued, _ = _ktls.stream(sock.fileno())
    return acked + queued


def to_come(sock: socket.socket, end: int) -> int:
    """Bytes up to that end of the stream which TCP hasn't yet; 0 if it would take no more.

    It takes more before this side's FIN, and before a reset.
    """
    state, acked, queued, _ = _ktls.stream(sock.fileno())
    return max(0, end - acked - queued) if state in _OPEN else 0


def round_trip(sock: socket.socket) -> float:
    """Seconds from a packet to its acknowledgement, as TCP estimates them (``tcpi_rtt``)."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _UP_TO_RTT.size)
    return int(_UP_TO_RTT.unpack(info)[0]) / 1e6


def positions(sock: socket.socket) -> tuple[int, int]:
    """Bytes written and bytes read since the connection began, both at one moment."""
    while True:
        before = _ktls.stream(sock.fileno())
        unread = array.array("i", [0])
        fcntl.ioctl(sock, termios.FIONREAD, unread)
        if before == _ktls.stream(sock.fileno()):
            _, acked, queued, received = before
            return acked + queued, received - unread[0]
