"""The end of a connection: nothing that was reported as sent may get lost on the way out.

Three ways in which Linux would lose it, and what is done here instead:

* Records that a non-blocking send left half-written inside the kernel are cut by ``close``. The
  close_notify is therefore sent by a blocking call, which pushes them out first, in bounded time.
* ``close`` with unread data in the receive queue, a TLS 1.3 client's session tickets for one,
  resets the connection and throws the send queue away. The receive queue is emptied first.
* Data that arrives after ``close`` has the same effect. Where it must be expected, ``close`` waits
  until the peer has acknowledged everything.
"""

from __future__ import annotations

import array
import fcntl
import logging
import socket
import termios
import time

from .errors import StalledError
from .sending import Sender

_log = logging.getLogger("ktls")
_LONGEST = 1e6  # seconds: what a timeval and a lock take, and nobody waits for
_TCP_CLOSE = 7  # tcpi_state after a reset


def finish(sender: Sender, seconds: float, *, close_notify: bool = True) -> None:
    """Sends all that is left, and close_notify after it; best effort where the peer is gone.

    Args:
        sender: Of a socket, whatever its timeout.
        seconds: How long that may take.
        close_notify: False after a fatal alert, which is the last word.

    Raises:
        StalledError: Data reported as sent, or the close_notify, didn't fit in that time. Calling
            it again goes on.
    """
    try:
        sender.finish(min(seconds, _LONGEST), close_notify=close_notify)
    except (BlockingIOError, TimeoutError):
        raise StalledError("close_notify") from None
    except OSError as error:
        _log.debug("not all sent before the end: %s", error)


def send_queue_empty(sock: socket.socket) -> bool:
    """Whether a small record surely fits, whole, without waiting."""
    return not _unacknowledged(sock)


def linger(sock: socket.socket, seconds: float, *, expect_data: bool) -> None:
    """Makes ``close`` safe for the send queue; the socket's data is discarded.

    Args:
        sock: After its close_notify went out.
        seconds: How long to wait for the peer's acknowledgements.
        expect_data: Whether the peer may still send something by itself.

    Raises:
        StalledError: The peer hasn't acknowledged everything in that time.
    """
    deadline = time.monotonic() + seconds
    pause = 0.001
    try:
        sock.settimeout(0)
        if not (_discard(sock, deadline) or expect_data):
            return
        socket.socket.shutdown(sock, socket.SHUT_WR)
        while _unacknowledged(sock) and time.monotonic() < deadline:
            time.sleep(pause)  # no event tells of an acknowledgement
            pause = min(2 * pause, 0.005)
            _discard(sock, deadline)
        late = _unacknowledged(sock) > 0
    except OSError as error:
        _log.debug("the peer is gone, nothing to wait for: %s", error)
        return
    if late:
        raise StalledError("close")


def _discard(sock: socket.socket, deadline: float) -> bool:
    """Empties the receive queue of whatever it holds; True if there was anything."""
    found = False
    try:
        # An empty record gives no data but ancillary data; the end of the stream neither.
        while time.monotonic() < deadline and any(
            socket.socket.recvmsg(sock, 1 << 16, socket.CMSG_SPACE(1))[:2]
        ):
            found = True
    except BlockingIOError:
        return found
    except OSError:
        return True  # a record that nobody can read stays in the queue
    return found


def _unacknowledged(sock: socket.socket) -> int:
    """Bytes in the send queue (SIOCOUTQ), FIN included; 0 once the connection is no more."""
    if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE:
        return 0
    queued = array.array("i", [0])
    fcntl.ioctl(sock, termios.TIOCOUTQ, queued)
    return queued[0]
