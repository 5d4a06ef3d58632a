"""What TCP tells of a connection."""

from __future__ import annotations

import array
import fcntl
import socket
import struct
import termios

_CLOSE = 7  # tcpi_state after a reset
_OPEN = {1, 8}  # ESTABLISHED; CLOSE_WAIT, after the peer's FIN
_COUNTERS = struct.Struct("=QQ")
_COUNTERS_AT = 120  # tcpi_bytes_acked, tcpi_bytes_received of struct tcp_info (Linux 4.1)


def is_gone(sock: socket.socket) -> bool:
    """Whether TCP has no connection any more; if this side has sent no FIN, after a reset."""
    return bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _CLOSE)


def can_send(sock: socket.socket) -> bool:
    """Whether TCP takes more: before this side's FIN, and no reset."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in _OPEN


def unacknowledged(sock: socket.socket) -> int:
    """Bytes in the send queue (SIOCOUTQ), FIN included; 0 once the connection is no more."""
    return 0 if is_gone(sock) else _queued(sock, termios.TIOCOUTQ)


def acknowledged(sock: socket.socket) -> int:
    """Bytes that the peer has acknowledged since the connection began."""
    return _counters(sock)[0]


def written(sock: socket.socket) -> int:
    """Bytes written since the connection began, acknowledged or not."""
    while True:
        before = acknowledged(sock)
        queued = _queued(sock, termios.TIOCOUTQ)
        if before == acknowledged(sock):  # what comes in meanwhile doesn't matter, and may be much
            return before + queued


def positions(sock: socket.socket) -> tuple[int, int]:
    """Bytes written and bytes read since the connection began, both at one moment."""
    while True:
        before = _counters(sock)
        queued = _queued(sock, termios.TIOCOUTQ), _queued(sock, termios.FIONREAD)
        if before == _counters(sock):
            return before[0] + queued[0], before[1] - queued[1]


def _counters(sock: socket.socket) -> tuple[int, int]:
    size = _COUNTERS_AT + _COUNTERS.size
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
    acked, received = _COUNTERS.unpack_from(info.ljust(size, b"\0"), _COUNTERS_AT)
    return acked, received


def _queued(sock: socket.socket, request: int) -> int:
    answer = array.array("i", [0])
    fcntl.ioctl(sock, request, answer)
    return answer[0]
