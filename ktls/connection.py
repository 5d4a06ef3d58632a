"""`Connection`: what a TLS connection is on a TCP socket, from its handshake to its end.

Theory of operation. The ULP is attached first: without keys it lets everything through, and later a
peer that has closed already would make it impossible. The handshake then runs through memory (see
`ktls.handshake`), the keys are proved and handed over, RX before TX. Each direction is from then on
in the hands of one object, a kernel one or one on OpenSSL, chosen once: `ktls.sending`,
`ktls.receiving`. What is left for this module is types of errors, errors that stay, the descriptor,
and the end. How data goes in and out, as of a Python socket, is `ktls.socket`.
"""

from __future__ import annotations

import copy
import enum
import errno
import logging
import os
import socket
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from cryptography import x509

from . import _ktls, closing, diag, wait
from .engine import Facts
from .errors import (
    ClosedForWritingError,
    ConnectionLostError,
    DetachedError,
    HandshakeCutOffError,
    HandshakeError,
    HandshakeNotDoneError,
    KeyLimitError,
    KTLSError,
    OffloadError,
    RecordError,
    RekeyUnsupportedError,
    StalledError,
    WouldBlockError,
)
from .handover import Directions, Options, hand_over
from .handshake import Handshake
from .receiving import End, KernelReceiver, Receiver
from .sending import KernelSender, Sender
from .types import Mode, Offload, Reason

_log = logging.getLogger("ktls")
_AHEAD = 1 << 13  # of a handshake's bytes that are looked at: all of a usual flight
_STEPS_AT_ONCE = 64  # reads of a non-blocking handshake: nobody holds up an event loop
# Errors of a send or receive that say nothing about the connection; the kernel reports any other
# one once, and takes later data as if nothing had been.
_PASSING = {
    errno.EBADF,
    errno.EFAULT,
    errno.EINVAL,
    errno.EMFILE,
    errno.EMSGSIZE,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.EOPNOTSUPP,
}
OURS_TO_EXPLAIN = RecordError | RekeyUnsupportedError | KeyLimitError  # by a last alert
_OF_A_FILE = {errno.EACCES, errno.EIO, errno.EISDIR, errno.ENXIO, errno.EPERM, errno.ESTALE}


class ClosePending(enum.Enum):
    """What `Socket.try_close` waits for."""

    WRITABLE = enum.auto()
    """Room for what is still to be sent."""
    ACKNOWLEDGED = enum.auto()
    """The peer's acknowledgement, of which no event tells: look again after a while."""


class Connection(socket.socket):
    """A TLS connection's life; `ktls.Socket` is one, with all that sends and receives.

    Attributes:
        tx: Where sent records are made and, if not in the kernel, why. Final after the handshake.
        rx: The same for received records.
        close_timeout: How long `close`, `shutdown` and `unwrap` may take, in seconds, to get out
            what was sent before them.
    """

    tx: Offload
    rx: Offload
    close_timeout: float

    def __init__(
        self,
        sock: socket.socket,
        facts: Facts,
        handshake: Handshake | None,
        *,
        tx: Offload,
        rx: Offload,
        require: bool,
        suppress_ragged_eofs: bool,
        close_timeout: float,
        options: Options,
    ) -> None:
        """Takes over a connected socket. Use `ktls.wrap`, or `from_state`.

        Args:
            sock: It is detached: this object owns the descriptor now.
            facts: What the handshake agrees on.
            handshake: Is still to come; None if it was another process's.
            tx: What is known of sending so far: in the kernel, if all goes well, or why not.
            rx: The same of receiving.
            require: Whether a direction that fails to go to the kernel is an error.
            suppress_ragged_eofs: Whether a FIN without close_notify reads as an end.
            close_timeout: In seconds.
            options: For the hand-over.
        """
        timeout = sock.gettimeout()
        super().__init__(fileno=sock.detach())  # which kind it is the kernel tells
        super().settimeout(timeout)
        self.tx, self.rx, self.close_timeout = tx, rx, close_timeout
        self._require = require
        self._options = options
        self._suppress_ragged_eofs = suppress_ragged_eofs
        self._facts = facts
        self._flight = b""
        self._sender: Sender | None = None
        self._lane: _ktls.Lane | None = None
        self._receiver: Receiver | None = None
        self._intake: _ktls.Intake | None = None
        self._unread = bytearray()
        self._end: End | None = None
        self._send_fatal: Exception | None = None
        self._recv_fatal: Exception | None = None
        self._finished_sending = False
        self._close_notify_sent = False
        self._closing = threading.Lock()
        self._corked = 0
        self._handshake = handshake
        self._detached = False
        self._linger: closing.Linger | None = None

    # -- the handshake -----------------------------------------------------------------------------

    def do_handshake(self) -> None:
        """Completes the handshake and the hand-over; does nothing when they are done.

        The socket's timeout bounds the whole handshake.

        Raises:
            HandshakeError: It failed. OpenSSL's alert was sent.
            WouldBlockError: The socket is non-blocking: call again when it is writable if
                `handshake_wants_write`, else when it is readable. It may be so at once: this call
                takes only so many records at a time.
            StalledError: The timeout ran out.
            OffloadError: ``require`` was set and the kernel refused.
            HandOverError: ``require`` was set and the connection can't be handed over.
        """
        if self._handshake is None:
            return
        if self._recv_fatal is not None:
            raise copy.copy(self._recv_fatal)
        timeout = self.gettimeout()
        deadline = time.monotonic() + timeout if timeout else None
        steps = 0
        try:
            while self._handshake_step(self._handshake):
                steps += 1
                if deadline is not None:
                    self._let_expire(deadline)
                elif timeout == 0 and steps == _STEPS_AT_ONCE:
                    raise BlockingIOError
        except BlockingIOError:
            raise WouldBlockError("do_handshake") from None
        except TimeoutError:
            raise StalledError("do_handshake") from None
        except HandshakeError as error:
            self._send_last_alert(self._handshake)
            self._recv_fatal = self._send_fatal = copy.copy(error)
            raise
        except OSError as error:
            raise HandshakeCutOffError(
                f"the connection broke during the handshake: {error}"
            ) from error
        finally:
            if self.gettimeout() != timeout:  # by a deadline, or a last alert
                self.settimeout(timeout)
        handshake, self._handshake = self._handshake, None
        self._hand_over(handshake)

    @property
    def handshake_wants_write(self) -> bool:
        """Whether an unfinished handshake waits to write rather than to read."""
        return bool(self._flight)

    def _handshake_step(self, handshake: Handshake) -> bool:
        """Writes what is to be written, then reads what is wanted; False when there is neither."""
        self._flight += handshake.outgoing()
        while self._flight:
            self._flight = self._flight[super().send(self._flight) :]
        if handshake.done:
            return False
        wanted = handshake.wanted
        if not handshake.within_record:
            # Looking first needs one call more for whole flights, not one for each record.
            wanted = handshake.share(super().recv(_AHEAD, wait.PEEK)) or 1
        handshake.receive(super().recv(wanted))
        return True

    def _let_expire(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.settimeout(left)

    def _send_last_alert(self, handshake: Handshake) -> None:
        try:
            super().send(self._flight + handshake.outgoing())
        except OSError as error:
            _log.debug("alert not sent: %s", error)
        # What the peer sent meanwhile would make close() a reset, which takes the alert with it.
        closing.Linger(self, None, expect_data=True).settled()

    def _hand_over(self, handshake: Handshake) -> None:
        directions = hand_over(self, handshake, self.tx, self.rx, self._options)
        self._set_out(directions)
        if self._require and directions.failure is not None:
            raise directions.failure

    def _set_out(self, directions: Directions) -> None:
        self.tx, self.rx = directions.tx, directions.rx
        self._sender, self._receiver = directions.sender, directions.receiver
        if isinstance(self._sender, KernelSender):
            self._lane = self._sender.lane
            if isinstance(self._receiver, KernelReceiver):
                self._intake = self._receiver.intake
        if _log.isEnabledFor(logging.INFO):
            _log.info("%s: tx %s; rx %s", self.cipher(), self.tx, self.rx)

    # -- errors, and those that stay ---------------------------------------------------------------

    def _not_ready(self) -> NoReturn:
        if self.fileno() < 0:
            raise OSError(errno.EBADF, "the socket is closed")
        if self._detached:
            raise DetachedError("the connection goes on where its state went: close this one")
        raise HandshakeNotDoneError("do_handshake() comes first", Reason.HANDSHAKE_NOT_DONE)

    def _open_sender(self) -> Sender:
        """The sender, if anything may still be sent."""
        if self._send_fatal is not None:
            raise copy.copy(self._send_fatal)
        if self._finished_sending:
            raise ClosedForWritingError("nothing can be sent after close_notify")
        if self._sender is None:
            self._not_ready()
        return self._sender

    def _send_error(self, call: str, error: OSError, sent: int = 0) -> OSError:
        """The typed error for a failed send; what is final stays."""
        if isinstance(error, RekeyUnsupportedError | KeyLimitError | OffloadError):
            self._give_up(error)
        if isinstance(error, KTLSError):
            error.sent = sent
            return error
        if isinstance(error, BlockingIOError):
            return WouldBlockError(call, sent)
        if isinstance(error, TimeoutError) and error.errno is None:
            return StalledError(call, sent)
        return self._lost(call, error, sent)

    def _give_up(self, error: KTLSError) -> None:
        """The connection can't go on for a reason of ours, which the peer is told."""
        self._latch_sending(error)
        if self._receiver is not None:
            self._receiver.abort()

    def _latch_sending(self, error: KTLSError) -> None:
        self._send_fatal = copy.copy(error)
        if self._sender is not None:
            self._sender.close(self._send_fatal)

    def _lost(
        self, call: str, error: OSError, sent: int = 0, *, receiving: bool = False
    ) -> OSError:
        """Latches what the kernel says only once. What has arrived can still be received."""
        if error.errno is None or error.errno in _PASSING:
            return error
        if call == "sendfile" and error.errno in _OF_A_FILE:
            return error
        self._latch_sending(ConnectionLostError(error.errno, f"{call}: {error.strerror}"))
        if receiving:
            self._drop_intake()
            self._recv_fatal = self._send_fatal
        return ConnectionLostError(error.errno, f"{call}: {error.strerror}", sent)

    def getsockopt(self, level: int, optname: int, *size: int) -> Any:  # noqa: ANN401
        """As ``socket.socket.getsockopt``; an SO_ERROR that is read here isn't forgotten."""
        value = super().getsockopt(level, optname, *size)
        if (level, optname) == (socket.SOL_SOCKET, socket.SO_ERROR):
            number = value if isinstance(value, int) else int.from_bytes(value, sys.byteorder)
            if number and not (self._receiver is not None and self._receiver.told(number)):
                self._lost("getsockopt(SO_ERROR)", OSError(number, os.strerror(number)))
        return value

    # -- the descriptor ----------------------------------------------------------------------------

    def settimeout(self, value: float | None) -> None:
        """As ``socket.socket.settimeout``."""
        super().settimeout(value)
        if self._sender is not None:
            self._sender.timeout_changed()

    def setblocking(self, flag: bool) -> None:
        """As ``socket.socket.setblocking``."""
        self.settimeout(None if flag else 0.0)

    def detach(self) -> int:
        """As ``socket.socket.detach``: the descriptor goes on without this object.

        It blocks or not as `gettimeout` says, which after a `sendfile` it didn't.
        """
        self._drop_lane()
        self._drop_intake()
        self._block_as_told()
        return super().detach()

    def _block_as_told(self) -> None:
        """For who goes on with the descriptor, if a `sendfile` here has made it non-blocking."""
        sender = self._sender
        if isinstance(sender, KernelSender) and sender.lane.nonblocking:
            sender.lane.nonblocking = False
            os.set_blocking(self.fileno(), self.gettimeout() is None)

    def _drop_lane(self) -> None:
        """Nothing goes by it any more, also where another thread has it in hand."""
        lane, self._lane = self._lane, None
        if lane is not None:
            lane.fd = -1

    def _drop_intake(self) -> None:
        """The same of receiving."""
        intake, self._intake = self._intake, None
        if intake is not None:
            intake.fd = -1

    # -- the end -----------------------------------------------------------------------------------

    def shutdown(self, how: int) -> None:
        """Ends a direction; for sending, close_notify goes before the FIN.

        Args:
            how: SHUT_RD, SHUT_WR or SHUT_RDWR.

        Raises:
            StalledError: Data or close_notify didn't go out within ``close_timeout``. With
                SHUT_RDWR the TCP connection is shut down all the same; else calling it again goes
                on.
            DetachedError: The connection is another process's now.
            OSError: As ``shutdown(2)``.
        """
        if self._detached:
            self._not_ready()
        try:
            if how in (socket.SHUT_WR, socket.SHUT_RDWR) and self._sender is not None:
                self._finish_for_good(self._sender)
        except StalledError:
            if how == socket.SHUT_RDWR:  # what another thread waits for ends here
                super().shutdown(how)
            raise
        super().shutdown(how)

    def _end_sending(self) -> None:
        """From now on nothing is sent but what is owed, and close_notify."""
        self._finished_sending = True
        self._drop_lane()

    def _finish_sending(self, seconds: float | None = None) -> None:
        """Sends close_notify once; after a StalledError the next call tries again."""
        seconds = min(self.close_timeout if seconds is None else seconds, closing.LONGEST)
        finish = partial(self._finish_in_turn, time.monotonic() + seconds)
        try:
            wait.holding(self._closing, seconds, finish)
        except TimeoutError:  # another thread waits for room, or this one did
            raise StalledError("close_notify") from None

    def _finish_in_turn(self, deadline: float) -> None:
        if self._close_notify_sent or self._sender is None:
            return
        left = max(0.0, deadline - time.monotonic())
        if self._send_fatal is None:
            self._end_sending()
            closing.finish(self._sender, left)
            self._close_notify_sent = True
        elif isinstance(self._send_fatal, OURS_TO_EXPLAIN):
            closing.finish(self._sender, left, close_notify=False)

    def _finish_for_good(self, sender: Sender) -> None:
        """The same, until nothing is left that a FIN would cut off."""
        deadline = time.monotonic() + self.close_timeout
        self._finish_sending()
        closing.push(self, sender, deadline - time.monotonic())

    def try_close(self) -> ClosePending | None:
        """`close`, in steps that don't wait for the peer: for event loops.

        It is up to the caller how often he tries; `abandon` gives up.

        Returns:
            What to wait for before calling it again; None once the socket is closed.
        """
        if self._linger is None and self._sender is not None and self.fileno() >= 0:
            try:
                self._linger = self._say_last(self._sender)
            except StalledError:
                return ClosePending.WRITABLE
        if self._linger is not None and self.fileno() >= 0 and not self._linger.settled():
            return ClosePending.ACKNOWLEDGED
        self.abandon()
        return None

    def _say_last(self, sender: Sender) -> closing.Linger | None:
        if self._send_fatal is None:
            self._finish_sending(0)
            self._facts.keep_session()
            return closing.Linger(self, sender, expect_data=self._end is None)
        if isinstance(self._send_fatal, OURS_TO_EXPLAIN):
            closing.finish(sender, 0, close_notify=False)
            return closing.Linger(self, sender, expect_data=False)
        return None

    def abandon(self) -> None:
        """Closes the descriptor, and does nothing else: without close_notify, without waiting.

        To the peer the connection looks cut, unless another process goes on with it. What was sent
        but not yet acknowledged may get lost.
        """
        self._drop_lane()
        self._drop_intake()
        self._sender = self._receiver = self._linger = None
        self.close()

    def _real_close(self) -> None:
        """What ``close()`` does when no ``makefile()`` is left.

        Raises:
            StalledError: Something that was reported as sent didn't go out within
                ``close_timeout``. The socket is closed all the same.
        """
        try:
            if self.fileno() < 0 or self._sender is None:
                return
            deadline = time.monotonic() + self.close_timeout
            if self._send_fatal is None:
                self._finish_sending()
                self._facts.keep_session()
                # A server's tickets, a client's next request: who hasn't ended may send something.
                open_ended = self._end is None
                left = deadline - time.monotonic()
                closing.linger(self, self._sender, left, expect_data=open_ended)
            elif isinstance(self._send_fatal, OURS_TO_EXPLAIN):
                self._deliver_last_alert(self._sender, deadline)
        finally:
            self._drop_lane()
            self._drop_intake()
            self._sender = self._receiver = None
            super()._real_close()  # type: ignore[misc]

    def _deliver_last_alert(self, sender: Sender, deadline: float) -> None:
        """What has come and nobody read may not take the alert with it that says why."""
        try:
            closing.finish(sender, max(0.0, deadline - time.monotonic()), close_notify=False)
            closing.linger(self, sender, deadline - time.monotonic(), expect_data=False)
        except StalledError:
            _log.info("the peer didn't take the last alert")

    # -- what the handshake agreed on --------------------------------------------------------------

    def version(self) -> str:
        """The protocol's name, such as ``"TLSv1.3"``."""
        return self._facts.version()

    def cipher(self) -> tuple[str, str, int] | None:
        """Cipher suite, the protocol that defines it, and its secret bits."""
        return self._facts.cipher()

    def getpeercert(self, binary_form: bool = False) -> x509.Certificate | bytes | None:
        """The peer's certificate, if it sent one.

        Args:
            binary_form: As DER bytes, whether it was verified or not. Otherwise it is a
                ``cryptography`` object, not the dictionary that ``ssl`` makes; and None, as that
                is empty, if the context doesn't verify the peer.
        """
        certificate = self._facts.peer_certificate()
        if certificate is None or binary_form:
            return certificate
        return x509.load_der_x509_certificate(certificate) if self._facts.verifies() else None

    def selected_alpn_protocol(self) -> str | None:
        """What ALPN selected, if anything."""
        return self._facts.alpn()

    def get_session(self) -> Any:  # noqa: ANN401 - the library's own type
        """A client's session, to resume it by ``ktls.wrap(..., session=)`` with the same context.

        In TLS 1.3 it is of use once a ticket has come, which happens while receiving.
        """
        return self._facts.session()

    @property
    def ssl_object(self) -> Any:  # noqa: ANN401 - the library's own type
        """The library's connection, an ``ssl.SSLObject`` or an ``OpenSSL.SSL.Connection``.

        For what it can tell. It moves no data of this connection; in another process it is None.
        """
        return self._facts.connection

    def info(self) -> diag.ConnectionInfo:
        """What the kernel tells of this connection: modes, options, sequence numbers.

        Raises:
            OSError: It is closed.
        """
        told = diag.info(self)
        if self._sender is None or told.tx is not Mode.USERSPACE:
            return told
        return replace(told, max_send_fragment=self._sender.max_fragment)

    @property
    def session_reused(self) -> bool:
        """Whether the handshake resumed a session."""
        return self._facts.session_reused()
