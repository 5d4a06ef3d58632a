"""The receiving direction, and its records opened by the kernel; `ktls.userspace` is the other way.

Data goes to the caller; everything else is acted upon here, so that no control record ever surfaces
as an error, and none is dropped.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from . import _ktls, offload, wait
from .control import Control
from .errors import (
    AlertReceived,
    DecryptError,
    KTLSError,
    RecordError,
    RekeyUnsupportedError,
    UnreadDataError,
)
from .files import Sink
from .keychain import KeyChain
from .records import MessageReader
from .sending import Sender
from .types import (
    MAX_PAYLOAD,
    Alert,
    AlertLevel,
    HandshakeType,
    KeyUpdateRequest,
    RecordType,
    Version,
)

_log = logging.getLogger("ktls")


class End(enum.Enum):
    """How the stream of data ended."""

    CLOSE_NOTIFY = enum.auto()
    FIN = enum.auto()
    """TCP ended without close_notify: it may be cut short."""


class Receiver(Protocol):
    """One way to receive. `Socket` has one."""

    def recv_into(self, buffer: memoryview, flags: int) -> int | End:
        """Receives data, at least a byte; acts upon every other record on the way.

        Raises:
            AlertReceived: A fatal alert.
            RecordError: The peer broke the protocol, and was told so by an alert.
            RekeyUnsupportedError: A KeyUpdate, which this kernel can't follow.
            OSError: As ``recvmsg``.
        """

    def recv_to_file(self, sink: Sink, limit: int | None) -> int | End:
        """Receives data into a file, at least a byte and at most ``limit``; else as `recv_into`.

        Raises:
            SinkFull: The file doesn't take what was received, which the error has.
        """

    def pending(self) -> int:
        """Bytes of data that are decrypted in this process."""

    def told(self, number: int) -> bool:
        """Takes over an error that somebody read off the socket (SO_ERROR), for the next receive.

        Returns:
            False if it isn't about a record.
        """

    def abort(self) -> None:
        """Tells the peer by internal_error that this end gives up; never waits for that.

        Where OpenSSL does the sending it is by what it can be brought to send: bad_record_mac.
        """


class _Refused(Exception):  # noqa: N818 - never leaves this module
    """OpenSSL refused a message, and has said so to the peer."""

    def __init__(self, error: KTLSError) -> None:
        super().__init__(str(error))
        self.error = error


class Idle:
    """Bounds what a peer can have us do without sending data: only so many records at a time."""

    def __init__(self) -> None:
        """Starts with none."""
        self._records = 0
        self._since = 0.0

    def count(self) -> None:
        """One more.

        Raises:
            RecordError: One too many.
        """
        now = time.monotonic()
        if not self._records or now - self._since > _IDLE_SECONDS:
            self._records, self._since = 0, now
        self._records += 1
        if self._records > _MOST_IDLE:
            raise RecordError("record after record without data", Alert.UNEXPECTED_MESSAGE)

    @property
    def begun(self) -> bool:
        """Whether data would make a difference."""
        return self._records > 0

    def excuse(self) -> None:
        """The last one doesn't count."""
        self._records -= 1

    def end(self) -> None:
        """Here are data."""
        self._records = 0


class KernelReceiver:
    """Records are opened by the kernel (net/tls, ``tls_sw_recvmsg``).

    Most receives go by the `intake`, in C, which takes those that there is nothing to think about:
    data, no handshake message in parts, no error that was told, nothing that the receiver owes an
    answer to. Whatever changes that sets its ``attention``. The methods here do all the others, and
    begin with what it kept because it wasn't plain data.
    """

    def __init__(
        self,
        sock: socket.socket,
        control: Control,
        sender: Sender,
        chain: KeyChain,
        parts: tuple[bytes, bytes] = (b"", b""),
    ) -> None:
        """Starts after TLS_RX succeeded.

        Args:
            sock: The socket.
            control: Is given session tickets and KeyUpdates.
            sender: Takes answers.
            chain: What follows the keys that the kernel has.
            parts: What has come of an incomplete handshake message, and of a record.
        """
        self._sock = sock
        self._control = control
        self._sender = sender
        self._chain = chain
        self._idle = Idle()
        self._renegotiations = 0
        self._acting = False
        self._told = 0
        self._reset: tuple[int | None, str | None] | None = None  # not the error: it has frames
        self._messages = MessageReader(parts[0])
        self._record = bytearray(parts[1])
        self.intake = _ktls.Intake(sock.fileno())
        self._look()

    def _look(self) -> None:
        """Opens the intake if there is nothing to think about, and shuts it otherwise."""
        try:
            self.intake.attention = False  # before looking: what comes meanwhile sets it again
            if (
                self.intake.kept
                or self._acting
                or self._told
                or self._reset is not None
                or self._record
                or self._messages.partial
                or self._idle.begun
                or self._sender.owes()
            ):
                self.intake.attention = True
        except BaseException:
            self.intake.attention = True
            raise

    def recv_into(self, buffer: memoryview, flags: int) -> int | End:
        """See `Receiver.recv_into`."""
        self._sender.retry()
        deadline = wait.Deadline(self._sock, flags)
        try:
            while True:
                outcome = self._recv_one(buffer, flags, deadline)
                if outcome is not None:
                    return outcome
        finally:
            self._look()

    def recv_to_file(self, sink: Sink, limit: int | None) -> int | End:
        """See `Receiver.recv_to_file`. Around other records, data pass through this process."""
        self._sender.retry()
        deadline = wait.Deadline(self._sock)
        size = MAX_PAYLOAD if sink.splices else _READ_CHUNK
        try:
            while True:
                if sink.splices and not self._messages.partial and not self.intake.kept:
                    moved = self._splice(sink, limit, deadline)
                    if moved:
                        return moved
                buffer = memoryview(bytearray(size if limit is None else min(size, limit)))
                outcome = self._recv_one(buffer, 0, deadline)
                if isinstance(outcome, int):
                    sink.write(buffer[:outcome])
                if outcome is not None:
                    return outcome
        finally:
            self._look()

    def pending(self) -> int:
        """See `Receiver.pending`: the kernel keeps them, but for what two threads received."""
        return sum(len(kept[0]) for kept in self.intake.kept if not isinstance(kept, int))

    def told(self, number: int) -> bool:
        """See `Receiver.told`."""
        if number in _RECORD_ERRORS:
            self._told = number
            self.intake.attention = True
        return number in _RECORD_ERRORS

    def detach(self) -> tuple[KeyChain, tuple[bytes, bytes]]:
        """Ends this object's part; returns its last two arguments for another one.

        Raises:
            UnreadDataError: The next receive has something to tell first.
        """
        if self._told or self._reset is not None or self.intake.kept:
            raise UnreadDataError("there is an error to be told: recv() first")
        self.intake.fd = -1
        return self._chain, (self._messages.part, bytes(self._record))

    def abort(self) -> None:
        """See `Receiver.abort`."""
        record = PROVOCATIONS[Alert.INTERNAL_ERROR]
        self._alert_peer(Alert.INTERNAL_ERROR, lambda: self._control.provoke(record))
        self.intake.attention = True  # until it is sent

    def _recv_one(
        self, buffer: memoryview, flags: int, deadline: wait.Deadline
    ) -> int | End | None:
        """Receives some data, or the end, or any other record, which is acted upon."""
        if self._acting:
            raise self._answer(
                RecordError("a record was acted upon in part", Alert.INTERNAL_ERROR), *_UNKNOWN
            )
        count, content_type, whole = self._recv_record(buffer, flags, deadline)
        if content_type == _ktls.RECORD_NONE:
            return End.FIN
        if content_type == RecordType.APPLICATION_DATA and count:
            if self._messages.partial:
                raise self._answer(_interleaved(), content_type, bytes(buffer[:count]))
            self._idle.end()
            return count
        self.intake.attention = True
        if flags & wait.PEEK:
            buffer[:count] = bytes(count)
            # It is only acted upon once: take it, then peek at what follows.
            buffer = memoryview(bytearray(MAX_PAYLOAD))
            count, content_type, whole = self._recv_record(buffer, flags & ~wait.PEEK, deadline)
        self._record += buffer[:count]
        buffer[:count] = bytes(count)
        if not whole:
            return None
        content = bytes(self._record)
        self._record.clear()
        # Should a signal handler raise before this is through, half of it would be done.
        self._acting = True
        try:
            if self._act(content_type, content):
                return End.CLOSE_NOTIFY
            relay(self._sender)
        except _Refused as refused:
            raise refused.error from None
        except RecordError as error:
            raise self._answer(error, content_type, content) from None
        self._acting = False
        return None

    def _recv_record(
        self, buffer: memoryview, flags: int, deadline: wait.Deadline
    ) -> tuple[int, int, bool]:
        try:
            return self._recvmsg(buffer, flags, deadline)
        except OSError as error:
            raise self._meaning(error) from None

    def _meaning(self, error: OSError) -> OSError:
        """What an error of the kernel's is to the caller; the peer is told if it is about a record.

        It is raised elsewhere: an error in a variable of the frame that raises it is in a cycle.
        """
        if error.errno == errno.EKEYEXPIRED:
            return RekeyUnsupportedError()
        meaning = _record_error(error)
        if meaning is None:
            return error
        # The kernel refuses to send, too, while it has this error to report.
        socket.socket.getsockopt(self._sock, socket.SOL_SOCKET, socket.SO_ERROR)
        record = PROVOCATIONS[meaning.alert]
        verdict = self._alert_peer(meaning.alert, lambda: self._control.provoke(record))
        return more_exact(verdict, meaning)

    def _recvmsg(
        self, buffer: memoryview, flags: int, deadline: wait.Deadline
    ) -> tuple[int, int, bool]:
        """One recvmsg, unless the kernel has told an error already, which it does but once."""

        def recvmsg() -> tuple[int, int, bool]:
            kept = self.intake.kept
            if kept:
                with suppress(IndexError):  # another thread took it
                    return _take(kept, kept.pop(0), buffer, flags)
            return _ktls.recv_record_into(self._sock.fileno(), buffer, flags | deadline.flags)

        if self._reset is None and not self._told:
            try:
                return wait.complete(self._sock, wait.READABLE, recvmsg, deadline)
            except ConnectionError as error:
                self._reset = error.errno, error.strerror
        if self._reset is not None:
            # Told once, and before the data that had come before it (tls_rx_rec_wait).
            flags |= wait.DONTWAIT
            with suppress(BlockingIOError, ConnectionError):
                received = wait.uninterrupted(recvmsg)
                if received[1] != _ktls.RECORD_NONE:
                    return received
            raise OSError(*self._reset)
        told, self._told = OSError(self._told, f"splice: {os.strerror(self._told)}"), 0
        if told.errno == errno.EINVAL:
            # Either a record of a wrong version, or one that isn't data: then it is still there.
            flags |= wait.DONTWAIT
            with suppress(BlockingIOError):
                return wait.uninterrupted(recvmsg)
        raise told

    def _splice(self, sink: Sink, limit: int | None, deadline: wait.Deadline) -> int:
        """Moves data into a file; 0 where recvmsg has to look at what comes next."""

        def splice() -> int:
            try:
                moved = sink.splice(self._sock, limit)
            finally:
                if sink.told in _RESETS:
                    self._reset = sink.told, f"splice: {os.strerror(sink.told)}"
                elif sink.told != errno.EAGAIN:
                    self._told = sink.told
            if not moved and sink.told == errno.EAGAIN:
                raise BlockingIOError(errno.EAGAIN, "splice: would block")
            return moved

        moved = 0 if self._told else wait.complete(self._sock, wait.READABLE, splice, deadline)
        if moved:
            self._idle.end()
        return moved

    def _answer(self, error: RecordError, content_type: int, content: bytes) -> RecordError:
        """Tells the peer what is wrong with a record; returns the error with that alert."""

        def show() -> KTLSError | None:
            # What is wrong may be where it stands: then OpenSSL finds nothing wrong with it.
            wrong = error.alert is not Alert.UNEXPECTED_MESSAGE and self._control.tell(
                content_type, content[:MAX_PAYLOAD]
            )
            return wrong or self._control.tell(*_UNKNOWN)

        return more_exact(self._alert_peer(error.alert, show), error)

    def _alert_peer(self, alert: Alert, show: Callable[[], KTLSError | None]) -> KTLSError | None:
        """Sends an alert, as far as the peer can still be reached.

        Where OpenSSL does the sending it is shown a record that it answers with an alert: the
        offending one if possible, else one that is wrong in the same way. Returns its verdict.
        """
        verdict = None
        with suppress(OSError, KTLSError):
            if not self._sender.owe_alert(AlertLevel.FATAL, alert):
                verdict = show()
                self._sender.relay()
        return verdict

    def _act(self, content_type: int, content: bytes) -> bool:
        """Acts upon a record that brings no data; True for close_notify."""
        self._idle.count()
        if content_type == RecordType.APPLICATION_DATA:
            if self._messages.partial:
                raise _interleaved()
            return False  # an empty record
        if not content:  # RFC 8446 section 5.4, RFC 5246 section 6.2.1
            raise RecordError(f"an empty record of type {content_type}", Alert.UNEXPECTED_MESSAGE)
        if content_type == RecordType.ALERT:
            return self._alert(content)
        if content_type != RecordType.HANDSHAKE:
            raise RecordError(f"a record of type {content_type}", Alert.UNEXPECTED_MESSAGE)
        if self._messages.partial and content[0] == _KEY_UPDATE:
            self._resume()
        try:
            messages = self._messages.feed(content)
        except ValueError as error:
            raise RecordError(str(error), Alert.ILLEGAL_PARAMETER) from None
        updates = self._messages.partial_type == HandshakeType.KEY_UPDATE or any(
            kind == HandshakeType.KEY_UPDATE for kind, _ in messages
        )
        if updates and (len(messages) != 1 or self._messages.partial or content[0] != _KEY_UPDATE):
            # RFC 8446 section 5.1: the key changes with it, so nothing may share its record.
            raise RecordError("a KeyUpdate that isn't alone", Alert.UNEXPECTED_MESSAGE)
        for kind, body in messages:
            self._handshake_message(kind, body)
        return False

    def _alert(self, content: bytes) -> bool:
        if len(content) != 2:
            raise RecordError(f"an alert of {len(content)} bytes", Alert.DECODE_ERROR)
        level, description = content
        fatal = level == AlertLevel.FATAL and description != Alert.CLOSE_NOTIFY
        if self._messages.partial and not fatal:
            raise _interleaved()
        if description == Alert.CLOSE_NOTIFY:
            return True
        # TLS 1.3 has no warnings but these two, whatever their level (RFC 8446 section 6).
        if self._chain.version is Version.TLS_1_3:
            warning = description == Alert.USER_CANCELED
        else:
            warning = level == AlertLevel.WARNING
        if warning:
            _log.info("the peer sent a warning alert: %d", description)
            return False
        known = description in Alert.__members__.values()
        raise AlertReceived(Alert(description) if known else description)

    def _handshake_message(self, kind: int, body: bytes) -> None:
        server = self._control.server_side
        if self._chain.version is Version.TLS_1_2:
            if kind == (HandshakeType.CLIENT_HELLO if server else HandshakeType.HELLO_REQUEST):
                # RFC 5246 section 7.2.2: renegotiation is refused with a warning.
                self._renegotiations += 1
                if self._renegotiations > _MOST_RENEGOTIATIONS:
                    raise RecordError("renegotiation, again and again", Alert.UNEXPECTED_MESSAGE)
                if not self._sender.owe_alert(AlertLevel.WARNING, Alert.NO_RENEGOTIATION):
                    self._tell(kind, body)  # OpenSSL, which answers the same
                return
        elif kind == HandshakeType.KEY_UPDATE:
            if len(body) != 1:
                raise RecordError(f"a KeyUpdate of {len(body)} bytes", Alert.DECODE_ERROR)
            self._update_keys(body[0])
            return
        elif kind == HandshakeType.NEW_SESSION_TICKET and not server:
            self._tell(kind, body)
            return
        raise RecordError(f"a handshake message of type {kind}", Alert.UNEXPECTED_MESSAGE)

    def _update_keys(self, request: int) -> None:
        if request not in tuple(KeyUpdateRequest):
            raise RecordError(f"a KeyUpdate that asks for {request}", Alert.ILLEGAL_PARAMETER)
        if not self._chain.updatable:
            raise RekeyUnsupportedError(self._chain.obstacle)
        self._chain = self._chain.next()
        offload.rekey(self._sock, _ktls.RX, self._chain.keys())
        if self._sender.asked and request == KeyUpdateRequest.NOT_REQUESTED:
            self._sender.asked -= 1
            self._idle.excuse()  # we wanted it
        # Its answer, if one is due, goes out next.
        self._accept(self._control.tell_key_update(KeyUpdateRequest(request)))

    def _resume(self) -> None:
        """Goes on after a record that only looks like a KeyUpdate: the rest of another message.

        A kernel that can rekey looks at a handshake record's first byte, and then waits for keys
        (``tls_check_pending_rekey``): it gets those that it has.
        """
        if self._chain.updatable and offload.can_rekey():
            *_, rec_seq = _ktls.query(self._sock.fileno(), _ktls.RX)
            keys = replace(self._chain.keys(), rec_seq=int.from_bytes(rec_seq, "big"))
            offload.rekey(self._sock, _ktls.RX, keys)

    def _tell(self, kind: int, body: bytes) -> None:
        """Lets OpenSSL read a message, in as many records as it takes."""
        message = bytes([kind]) + len(body).to_bytes(3, "big") + body
        for at in range(0, len(message), MAX_PAYLOAD):
            part = message[at : at + MAX_PAYLOAD]
            self._accept(self._control.tell(RecordType.HANDSHAKE, part))

    def _accept(self, verdict: KTLSError | None) -> None:
        if verdict is not None:
            with suppress(OSError, KTLSError):
                self._sender.relay()  # its alert
            raise _Refused(verdict)


def _take(
    kept: list[tuple[bytes, int, bool] | int],
    first: tuple[bytes, int, bool] | int,
    buffer: memoryview,
    flags: int,
) -> tuple[int, int, bool]:
    """What the intake kept first, as recvmsg would give it."""
    if isinstance(first, int):
        raise OSError(first, f"recvmsg: {os.strerror(first)}")
    content, content_type, whole = first
    count = min(len(content), len(buffer))
    buffer[:count] = content[:count]
    if flags & wait.PEEK:
        kept.insert(0, first)
    elif count < len(content):
        kept.insert(0, (content[count:], content_type, whole))
    return count, content_type, whole and count == len(content)


def _interleaved() -> RecordError:
    """RFC 8446 section 5.1: a handshake message's records have nothing between them."""
    return RecordError("a record within a handshake message", Alert.UNEXPECTED_MESSAGE)


def more_exact(verdict: KTLSError | None, error: RecordError) -> RecordError:
    """Our error, with the alert that OpenSSL sent if that is another."""
    if isinstance(verdict, RecordError) and verdict.alert is not error.alert:
        return verdict
    return error


_READ_CHUNK = 1 << 18  # of data for a file that splice can't fill
_KEY_UPDATE = HandshakeType.KEY_UPDATE
_MOST_IDLE = 128  # records in a row, without data between them ...
_IDLE_SECONDS = 10.0  # ... or a pause; a server's tickets are a handful
_MOST_RENEGOTIATIONS = 1000  # refused on one connection
_UNKNOWN = (99, b"?")  # a record of no known type: unexpected_message

_RESETS = {errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED}  # as ConnectionError
_RECORD_ERRORS = {
    errno.EBADMSG: (DecryptError, "a record that doesn't decrypt", Alert.BAD_RECORD_MAC),
    errno.EMSGSIZE: (RecordError, "a record that is too long", Alert.RECORD_OVERFLOW),
    errno.EINVAL: (RecordError, "a record of another version", Alert.PROTOCOL_VERSION),
    errno.EPROTO: (RecordError, "a record that the kernel gave no type", Alert.INTERNAL_ERROR),
}
# Records that OpenSSL answers with an alert.
PROVOCATIONS = {
    Alert.BAD_RECORD_MAC: bytes([RecordType.APPLICATION_DATA, 3, 3, 0, 64]) + bytes(64),
    Alert.RECORD_OVERFLOW: bytes([RecordType.APPLICATION_DATA, 3, 3, 0x7F, 0xFF]),
    Alert.PROTOCOL_VERSION: bytes([RecordType.APPLICATION_DATA, 2, 0, 0, 64]),
    Alert.INTERNAL_ERROR: bytes([RecordType.APPLICATION_DATA, 3, 3, 0, 64]) + bytes(64),
}


def _record_error(error: OSError) -> RecordError | None:
    """What the kernel's receiving errors mean (``tls_rx_msg_size``, ``tls_decrypt_sw``)."""
    if error.errno not in _RECORD_ERRORS:
        return None
    kind, text, alert = _RECORD_ERRORS[error.errno]
    return kind(f"the peer sent {text}", alert)


def relay(sender: Sender) -> None:
    """Sends answers; that the peer doesn't take them any more is no reason to stop reading."""
    try:
        sender.relay()
    except KTLSError:
        raise
    except OSError as error:
        _log.debug("answer not sent: %s", error)
