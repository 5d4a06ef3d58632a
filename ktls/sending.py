"""The sending direction: records made by the kernel, or by OpenSSL. One is chosen at the hand-over.

Both raise plain OSErrors (BlockingIOError, TimeoutError, BrokenPipeError ...); `ktls.socket` gives
them their types. What a method reports as sent is in the kernel's hands.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from typing_extensions import Buffer

from . import _ktls, records, wait
from .engine import Engine
from .errors import NotInKernelError, UnsupportedRecordError
from .records import RecordCipher
from .types import MAX_PAYLOAD, Alert, AlertLevel, RecordType

_READ_CHUNK = 1 << 18  # of a file that userspace encrypts
CLOSE_NOTIFY = bytes([AlertLevel.WARNING, Alert.CLOSE_NOTIFY])

FileProgress = tuple[int, BaseException | None]
"""Bytes sent, and what ended it early: an OSError, or whatever a signal handler raised."""


class Sender(Protocol):
    """One way to send. `Socket` has one."""

    def send(self, data: Buffer, flags: int) -> int:
        """Sends what fits; everything, on a blocking socket."""

    def sendmsg(self, buffers: Sequence[Buffer], flags: int) -> int:
        """The same for many buffers."""

    def sendfile(self, file: int, offset: int, count: int | None) -> FileProgress:
        """Sends from a file until its end or ``count`` bytes, as far as it goes without waiting.

        On a blocking socket that is all.
        """

    def send_record(self, content_type: int, data: Buffer) -> int:
        """Sends one record of a type, after all data before it."""

    def alert(self, level: AlertLevel, description: Alert) -> None:
        """Sends an alert, after all data before it."""

    def relay(self) -> None:
        """Sends what the engine wrote on its own account."""


class KernelSender:
    """Records are made by the kernel (net/tls, ``tls_sw_sendmsg``)."""

    def __init__(
        self, sock: socket.socket, engine: Engine, lock: threading.Lock, shadow: RecordCipher
    ) -> None:
        """Starts after TLS_TX succeeded.

        Args:
            sock: The socket.
            engine: For what it may still write, as long as it does the receiving.
            lock: Held for every use of the engine, which two threads may not use at once.
            shadow: The engine's own write protection, to open what it writes.
        """
        self._sock = sock
        self._engine = engine
        self._lock = lock
        self._shadow = shadow
        self._unsent: deque[tuple[int, bytes]] = deque()

    def send(self, data: Buffer, flags: int) -> int:
        """See `Sender.send`."""
        return socket.socket.send(self._sock, data, flags)

    def sendmsg(self, buffers: Sequence[Buffer], flags: int) -> int:
        """See `Sender.sendmsg`."""
        return socket.socket.sendmsg(self._sock, buffers, (), flags)

    def sendfile(self, file: int, offset: int, count: int | None) -> FileProgress:
        """See `Sender.sendfile`."""
        sent, number, raised = _ktls.sendfile(self._sock.fileno(), file, offset, count)
        if number and raised is None:
            raised = OSError(number, f"sendfile: {os.strerror(number)}")
        return sent, raised

    def send_record(self, content_type: int, data: Buffer) -> int:
        """See `Sender.send_record`."""
        return wait.complete(
            self._sock,
            wait.WRITABLE,
            lambda: _ktls.send_record(self._sock.fileno(), content_type, data),
        )

    def alert(self, level: AlertLevel, description: Alert) -> None:
        """See `Sender.alert`."""
        self.send_record(RecordType.ALERT, bytes([level, description]))

    def relay(self) -> None:
        """See `Sender.relay`. What doesn't fit now goes with the next call.

        Raises:
            UnsupportedRecordError: OpenSSL answers a KeyUpdate or renegotiates: the kernel's key
                would be the old one.
        """
        with self._lock:
            stream = self._engine.outgoing()
        for record in records.split(stream):
            content_type, content = self._shadow.open(record)
            if content_type == RecordType.HANDSHAKE:
                raise UnsupportedRecordError(
                    "the peer asks for a handshake (KeyUpdate or renegotiation): this release "
                    "can't follow in the kernel"
                )
            self._unsent.append((content_type, content))
        while self._unsent:
            try:
                _ktls.send_record(self._sock.fileno(), *self._unsent[0])
            except BlockingIOError:
                return
            self._unsent.popleft()


class EngineSender:
    """Records are made by OpenSSL and written to the socket as bytes.

    Bytes count as sent when the record that holds them is whole in the socket's buffer. A record
    that stuck on a non-blocking socket is kept, and the caller's next `send` begins with the same
    bytes again, which is then not encrypted twice (as with OpenSSL's own retry rule).
    """

    def __init__(self, sock: socket.socket, engine: Engine, lock: threading.Lock) -> None:
        """Starts after the handshake.

        Args:
            sock: The socket.
            engine: Makes the records.
            lock: As for `KernelSender`.
        """
        self._sock = sock
        self._engine = engine
        self._lock = lock
        self._pushing = threading.Lock()
        self._wire = bytearray()
        self._stuck = 0

    def send(self, data: Buffer, flags: int) -> int:
        """See `Sender.send`. Flags have no meaning here.

        Raises:
            ValueError: Fewer bytes than those of the record that stuck.
        """
        view = memoryview(data).cast("B")
        with self._pushing:
            if len(view) < self._stuck:
                raise ValueError(
                    f"repeat the send that would block with its data: {self._stuck} bytes or more"
                )
            sent = 0
            while True:
                try:
                    self._push()
                except OSError:
                    if sent:
                        return sent  # the next call meets the error again
                    raise
                sent += self._stuck
                self._stuck = 0
                if sent == len(view):
                    return sent
                with self._lock:
                    self._stuck = self._engine.encrypt(view[sent : sent + MAX_PAYLOAD])
                    self._wire += self._engine.outgoing()

    def sendmsg(self, buffers: Sequence[Buffer], flags: int) -> int:
        """See `Sender.sendmsg`."""
        return self.send(b"".join(buffers), flags)

    def sendfile(self, file: int, offset: int, count: int | None) -> FileProgress:
        """See `Sender.sendfile`."""
        sent = 0
        while count is None or sent < count:
            left = _READ_CHUNK if count is None else min(_READ_CHUNK, count - sent)
            chunk = os.pread(file, left, offset + sent)
            if not chunk:
                break
            try:
                sent += self.send(chunk, 0)
            except OSError as error:
                return sent, error
        return sent, None

    def send_record(self, content_type: int, data: Buffer) -> int:
        """See `Sender.send_record`. OpenSSL makes data records, alone.

        Raises:
            NotInKernelError: Any other type.
        """
        if content_type == RecordType.APPLICATION_DATA:
            return self.send(data, 0)
        raise NotInKernelError("OpenSSL sends no records of a chosen type: TX isn't in the kernel")

    def alert(self, level: AlertLevel, description: Alert) -> None:
        """See `Sender.alert`. OpenSSL sends close_notify when told, and others by itself."""
        with self._lock:
            if description is Alert.CLOSE_NOTIFY:
                self._engine.close_notify()
            self._wire += self._engine.outgoing()
        with self._pushing:
            self._push()

    def relay(self) -> None:
        """See `Sender.relay`. What doesn't fit now goes with the next send."""
        with self._lock:
            self._wire += self._engine.outgoing()
        if self._wire and wait.until(self._sock, wait.WRITABLE, 0) and self._pushing.acquire(False):
            with suppress(BlockingIOError):
                try:
                    self._push()
                finally:
                    self._pushing.release()

    def _push(self) -> None:
        """Writes out all ciphertext; whoever holds ``_pushing`` takes what comes meanwhile too."""
        while self._wire:
            with self._lock:
                chunk = bytes(self._wire[:_READ_CHUNK])
            sent = socket.socket.send(self._sock, chunk)
            with self._lock:
                del self._wire[:sent]
