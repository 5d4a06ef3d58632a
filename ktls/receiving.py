"""The receiving direction: records opened by the kernel, or by OpenSSL.

One is chosen at the hand-over. Data goes to the caller; everything else is acted upon here, so that
no control record ever surfaces as an error, and none is dropped.
"""

from __future__ import annotations

import enum
import errno
import logging
import socket
import threading
from contextlib import suppress
from typing import Protocol

from . import _ktls, offload, wait
from .engine import Engine
from .errors import (
    AlertReceived,
    DecryptError,
    KTLSError,
    RecordError,
    RekeyUnsupportedError,
)
from .keychain import KeyChain
from .records import MessageReader, RecordCipher, RecordReader
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

    def pending(self) -> int:
        """Bytes of data that are decrypted in this process."""


class _Refused(Exception):  # noqa: N818 - never leaves this module
    """The engine refused a message, and has said so to the peer."""

    def __init__(self, error: KTLSError) -> None:
        super().__init__(str(error))
        self.error = error


class KernelReceiver:
    """Records are opened by the kernel (net/tls, ``tls_sw_recvmsg``)."""

    def __init__(
        self,
        sock: socket.socket,
        engine: Engine,
        lock: threading.Lock,
        sender: Sender,
        chain: KeyChain,
    ) -> None:
        """Starts after TLS_RX succeeded.

        Args:
            sock: The socket.
            engine: Is given session tickets.
            lock: Held for every use of the engine.
            sender: Takes answers.
            chain: The keys that the kernel has, and the engine too.
        """
        self._sock = sock
        self._engine = engine
        self._lock = lock
        self._sender = sender
        self._chain = chain
        self._shadow = RecordCipher(chain.info)
        self._version = chain.info.version
        self._idle = 0
        self._control = bytearray()
        self._messages = MessageReader()

    def recv_into(self, buffer: memoryview, flags: int) -> int | End:
        """See `Receiver.recv_into`."""
        deadline = wait.Deadline(self._sock, flags)
        while True:
            count, content_type, whole = self._recv_record(buffer, flags, deadline)
            if content_type == RecordType.APPLICATION_DATA and count and not self._messages.partial:
                self._idle = 0
                return count
            if content_type == _ktls.RECORD_NONE:
                return End.FIN
            if flags & socket.MSG_PEEK:
                buffer[:count] = bytes(count)
                # It is only acted upon once: take it, then peek at what follows.
                scratch = memoryview(bytearray(MAX_PAYLOAD))
                count, content_type, whole = self._recv_record(
                    scratch, flags & ~socket.MSG_PEEK, deadline
                )
                self._control += scratch[:count]
            else:
                self._control += buffer[:count]
                buffer[:count] = bytes(count)
            if whole:
                content = bytes(self._control)
                self._control.clear()
                try:
                    if self._act(content_type, content):
                        return End.CLOSE_NOTIFY
                except _Refused as refused:
                    raise refused.error from None
                except RecordError as error:
                    raise self._answer(error, self._shadow.seal(content_type, content)) from None
                _relay(self._sender)

    def pending(self) -> int:
        """See `Receiver.pending`: the kernel keeps them all."""
        return 0

    def _recv_record(
        self, buffer: memoryview, flags: int, deadline: wait.Deadline
    ) -> tuple[int, int, bool]:
        descriptor = self._sock.fileno()
        try:
            return wait.complete(
                self._sock,
                wait.READABLE,
                lambda: _ktls.recv_record_into(descriptor, buffer, flags | deadline.flags),
                deadline,
            )
        except OSError as error:
            if error.errno == errno.EKEYEXPIRED:
                raise RekeyUnsupportedError from None
            meaning = _record_error(error)
            if meaning is None:
                raise
            # The kernel refuses to send, too, while it has this error to report.
            socket.socket.getsockopt(self._sock, socket.SOL_SOCKET, socket.SO_ERROR)
            raise self._answer(meaning, _PROVOCATIONS[meaning.alert]) from None

    def _answer(self, error: RecordError, record: bytes) -> RecordError:
        """Tells the peer, as far as it can still be reached; returns the error with that alert.

        Where OpenSSL does the sending it is shown a record that it answers with an alert: the
        offending one if possible, else one that is wrong in the same way.
        """
        with suppress(OSError, KTLSError):
            if not self._sender.owe_alert(AlertLevel.FATAL, error.alert):
                self._engine.watch_alerts()
                verdict = self._show_engine(record)
                self._sender.relay()
                if isinstance(verdict, RecordError):
                    return verdict
        return error

    def _show_engine(self, record: bytes) -> KTLSError | None:
        """Lets the engine read a record; returns what it has against it."""
        with self._lock:
            self._engine.incoming(record)
            try:
                self._engine.read_into(memoryview(bytearray(1)))
            except KTLSError as error:
                return error
        return None

    def _act(self, content_type: int, content: bytes) -> bool:
        """Acts upon a record that brings no data; True for close_notify."""
        self._idle += 1
        if self._idle > _MOST_IDLE:
            raise RecordError("record after record without data", Alert.UNEXPECTED_MESSAGE)
        if self._messages.partial and content_type != RecordType.HANDSHAKE:
            # RFC 8446 section 5.1
            raise RecordError("a record within a handshake message", Alert.UNEXPECTED_MESSAGE)
        if content_type == RecordType.APPLICATION_DATA:
            return False  # an empty record
        if content_type == RecordType.ALERT:
            return self._alert(content)
        if content_type != RecordType.HANDSHAKE:
            raise RecordError(f"a record of type {content_type}", Alert.UNEXPECTED_MESSAGE)
        try:
            messages = self._messages.feed(content)
        except ValueError as error:
            raise RecordError(str(error), Alert.ILLEGAL_PARAMETER) from None
        updates = self._messages.partial_type == HandshakeType.KEY_UPDATE or any(
            kind == HandshakeType.KEY_UPDATE for kind, _ in messages
        )
        if updates and (
            len(messages) != 1 or self._messages.partial or len(content) != _UPDATE_SIZE
        ):
            # RFC 8446 section 5.1: the key changes with it, so nothing may share its record.
            raise RecordError("a KeyUpdate that isn't alone", Alert.UNEXPECTED_MESSAGE)
        for kind, body in messages:
            self._handshake_message(kind, body)
        return False

    def _alert(self, content: bytes) -> bool:
        if len(content) != 2:
            raise RecordError(f"an alert of {len(content)} bytes", Alert.DECODE_ERROR)
        level, description = content
        if description == Alert.CLOSE_NOTIFY:
            return True
        # TLS 1.3 has no warnings but these two, whatever their level (RFC 8446 section 6).
        if self._version is Version.TLS_1_3:
            warning = description == Alert.USER_CANCELED
        else:
            warning = level == AlertLevel.WARNING
        if warning:
            _log.info("the peer sent a warning alert: %d", description)
            return False
        known = description in Alert.__members__.values()
        raise AlertReceived(Alert(description) if known else description)

    def _handshake_message(self, kind: int, body: bytes) -> None:
        server = self._engine.server_side
        if self._version is Version.TLS_1_2:
            if kind == (HandshakeType.CLIENT_HELLO if server else HandshakeType.HELLO_REQUEST):
                # RFC 5246 section 7.2.2: renegotiation is refused with a warning.
                if not self._sender.owe_alert(AlertLevel.WARNING, Alert.NO_RENEGOTIATION):
                    self._give_to_engine(kind, body)  # which answers the same
                return
        elif kind == HandshakeType.KEY_UPDATE:
            if body[0] not in tuple(KeyUpdateRequest):
                raise RecordError(f"a KeyUpdate that asks for {body[0]}", Alert.ILLEGAL_PARAMETER)
            self._chain = self._chain.next()
            offload.rekey(self._sock, _ktls.RX, self._chain.info)
            self._give_to_engine(kind, body)  # whose answer, if one is due, goes out next
            self._shadow = RecordCipher(self._chain.info)
            return
        elif kind == HandshakeType.NEW_SESSION_TICKET and not server:
            self._give_to_engine(kind, body)
            return
        raise RecordError(f"a handshake message of type {kind}", Alert.UNEXPECTED_MESSAGE)

    def _give_to_engine(self, kind: int, body: bytes) -> None:
        """Seals a message as the engine's next record, so that it knows of it.

        The engine counts only the records that it is given. Sealing under a nonce that the peer
        used for another record is harmless: what is sealed here never leaves the process.
        """
        message = _message(kind, body)
        for at in range(0, len(message), MAX_PAYLOAD):
            part = message[at : at + MAX_PAYLOAD]
            verdict = self._show_engine(self._shadow.seal(RecordType.HANDSHAKE, part))
            if verdict is not None:
                with suppress(OSError, KTLSError):
                    self._sender.relay()  # its alert
                raise _Refused(verdict)


def _message(kind: int, body: bytes) -> bytes:
    """A handshake message as it stood in its records."""
    return bytes([kind]) + len(body).to_bytes(3, "big") + body


_UPDATE_SIZE = 5  # of a KeyUpdate: type, length, request
_MOST_IDLE = 128  # records in a row without data; a server's tickets are a handful

_RECORD_ERRORS = {
    errno.EBADMSG: (DecryptError, "a record that doesn't decrypt", Alert.BAD_RECORD_MAC),
    errno.EMSGSIZE: (RecordError, "a record that is too long", Alert.RECORD_OVERFLOW),
    errno.EINVAL: (RecordError, "a record of another version", Alert.PROTOCOL_VERSION),
    errno.EPROTO: (RecordError, "a record that the kernel gave no type", Alert.INTERNAL_ERROR),
}
# Records that OpenSSL answers with an alert.
_PROVOCATIONS = {
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


def _relay(sender: Sender) -> None:
    """Sends answers; that the peer doesn't take them any more is no reason to stop reading."""
    try:
        sender.relay()
    except KTLSError:
        raise
    except OSError as error:
        _log.debug("answer not sent: %s", error)


class EngineReceiver:
    """Records are read from the socket one at a time and opened by OpenSSL.

    One at a time, so that never more than one record's plaintext waits in this process while the
    socket itself isn't readable: see `Receiver.pending`.
    """

    def __init__(
        self, sock: socket.socket, engine: Engine, lock: threading.Lock, sender: Sender
    ) -> None:
        """Starts after the handshake; arguments as for `KernelReceiver`."""
        self._sock = sock
        self._engine = engine
        self._lock = lock
        self._sender = sender
        self._reader = RecordReader()
        engine.watch_alerts()

    def recv_into(self, buffer: memoryview, flags: int) -> int | End:
        """See `Receiver.recv_into`."""
        fed = False
        deadline = wait.Deadline(self._sock, flags)
        while True:
            try:
                with self._lock:
                    count = self._engine.read_into(buffer, peek=bool(flags & socket.MSG_PEEK))
            except (AlertReceived, RecordError):
                with suppress(OSError, KTLSError):
                    self._sender.relay()
                raise
            if count is not None:
                return count or End.CLOSE_NOTIFY
            if fed:
                # It was no data. OpenSSL's answer goes before any of the caller's.
                _relay(self._sender)
                fed = False
            data = self._recv_bytes(self._reader.wanted, flags & socket.MSG_DONTWAIT, deadline)
            if not data:
                return End.FIN
            record = self._reader.feed(data)
            if record is not None:
                with self._lock:
                    self._engine.incoming(record)
                fed = True

    def pending(self) -> int:
        """See `Receiver.pending`."""
        with self._lock:
            return self._engine.pending()

    def _recv_bytes(self, size: int, flags: int, deadline: wait.Deadline) -> bytes:
        descriptor, buffer = self._sock.fileno(), memoryview(bytearray(size))
        count, *_ = wait.complete(
            self._sock,
            wait.READABLE,
            lambda: _ktls.recv_record_into(descriptor, buffer, flags | deadline.flags),
            deadline,
        )
        return bytes(buffer[:count])
