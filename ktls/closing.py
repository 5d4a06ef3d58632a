"""The end of a connection: nothing that was reported as sent may get lost on the way out.

Three ways in which Linux would lose it, and what is done here instead:

* Records that a full socket left inside net/tls are cut off by SHUT_WR and ``close``, and nothing
  tells of them: `ktls.tally` does. Neither comes before all of them have gone to TCP.
* ``close`` with unread data in the receive queue, a TLS 1.3 client's session tickets for one,
  resets the connection and throws the send queue away. The receive queue is emptied first.
* Data that arrives after ``close`` has the same effect. Where it must be expected, ``close`` waits
  until the peer has acknowledged everything.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from . import tcp
from .errors import StalledError
from .sending import Sender

_log = logging.getLogger("ktls")
LONGEST = 1e6  # seconds: what a lock takes, and nobody waits for
_MOST_DISCARDED = 64  # records, or 64 KiB of them, at a look
_PAUSES = (0.001, 0.05)  # seconds between two looks at the least, and at the most


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
        sender.finish(min(seconds, LONGEST), close_notify=close_notify)
    except (BlockingIOError, TimeoutError):
        raise StalledError("close_notify") from None
    except OSError as error:
        _log.debug("not all sent before the end: %s", error)


def push(sock: socket.socket, sender: Sender, seconds: float) -> None:
    """Waits until TCP has all that was sent, after `finish`: then SHUT_WR is safe.

    Raises:
        StalledError: It hasn't after so many seconds.
    """
    with suppress(OSError):  # the peer is gone
        _wait_until(sock, lambda: not sender.held(), seconds, "close_notify")


def linger(sock: socket.socket, sender: Sender, seconds: float, *, expect_data: bool) -> None:
    """Waits until ``close`` is safe for the send queue; the socket's data is discarded.

    Args:
        sock: After its close_notify went out.
        sender: Sent it.
        seconds: How long to wait for the peer's acknowledgements.
        expect_data: As for `Linger`.

    Raises:
        StalledError: The peer hasn't acknowledged everything in that time.
    """
    _wait_until(sock, Linger(sock, sender, expect_data=expect_data).settled, seconds, "close")


def _wait_until(sock: socket.socket, done: Callable[[], bool], seconds: float, name: str) -> None:
    deadline, pause = time.monotonic() + seconds, 0.0
    while not done():
        left = deadline - time.monotonic()
        if left <= 0:
            raise StalledError(name)
        pause = next_pause(sock, pause)
        time.sleep(min(pause, left))


def next_pause(sock: socket.socket, last: float) -> float:
    """Seconds until looking again for the peer's acknowledgement, of which no event tells.

    It takes a round trip; 40 ms more, if the peer delays it.

    Args:
        sock: The socket.
        last: What this said before the last look; 0 the first time.
    """
    least, most = _PAUSES
    if not last:
        with suppress(OSError):  # closed meanwhile: the next look sees that
            return min(max(least, 1.25 * tcp.round_trip(sock)), most)
    return min(max(least, 2 * last), most)


class Linger:
    """Makes ``close`` safe for the send queue, one look at a time; no look waits."""

    def __init__(self, sock: socket.socket, sender: Sender | None, *, expect_data: bool) -> None:
        """Begins.

        Args:
            sock: After its close_notify went out.
            sender: Sent it; None before the hand-over.
            expect_data: Whether the peer may still send something by itself.
        """
        self._sock = sock
        self._sender = sender
        self._expect_data = expect_data
        self._shut_down = False

    def settled(self) -> bool:
        """Discards what has come; True once ``close`` loses nothing, or the peer is gone."""
        try:
            if self._sock.gettimeout() != 0:
                self._sock.settimeout(0)
            self._expect_data |= _discard(self._sock)
            if not self._shut_down:
                if self._sender is not None and self._sender.held():
                    return False
                if not self._expect_data:
                    return True
                socket.socket.shutdown(self._sock, socket.SHUT_WR)
                self._shut_down = True
            return not tcp.unacknowledged(self._sock)
        except OSError as error:
            _log.debug("the peer is gone, nothing to wait for: %s", error)
            return True


def _discard(sock: socket.socket) -> bool:
    """Empties the receive queue of whatever it holds, within bounds; True if there was anything."""
    found = False
    try:
        for _ in range(_MOST_DISCARDED):
            # An empty record gives no data but ancillary data; the end of the stream neither.
            if not any(socket.socket.recvmsg(sock, 1 << 16, socket.CMSG_SPACE(1))[:2]):
                break
            found = True
    except BlockingIOError:
        return found
    except OSError:
        return True  # a record that nobody can read stays in the queue
    return found
