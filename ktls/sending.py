"""The sending direction: records made by the kernel, or by OpenSSL. One is chosen at the hand-over.

Both raise plain OSErrors (BlockingIOError, TimeoutError, BrokenPipeError ...); `ktls.socket` gives
them their types. What a method reports as sent is in the kernel's hands.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from typing_extensions import Buffer

from . import _ktls, offload, records, wait
from .engine import Engine
from .errors import (
    KeyLimitError,
    KTLSError,
    NotInKernelError,
    RecordError,
    RekeyUnsupportedError,
)
from .keychain import KeyChain
from .records import RecordCipher
from .types import MAX_PAYLOAD, Alert, AlertLevel, HandshakeType, KeyUpdateRequest, RecordType

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

    def finish(self, seconds: float) -> None:
        """Sends all that is left, and close_notify, by system calls that wait to send.

        Args:
            seconds: How long to wait for a send of another thread.
        """

    def owe_alert(self, level: AlertLevel, description: Alert) -> bool:
        """Sends an alert as soon as that needs no waiting, for a reader that has to answer.

        Returns:
            False if only the engine can send it.
        """

    def flush(self) -> None:
        """Sends out data that MSG_MORE held back."""

    def update_keys(self, request_peer: bool) -> None:
        """Goes on with the next key, and asks the peer to do the same if wanted.

        Raises:
            NotInKernelError: Not in the kernel, or TLS 1.2.
            RekeyUnsupportedError: This kernel can't. Nothing was sent.
        """

    def relay(self) -> None:
        """Sends what the engine wrote on its own account."""


class KernelSender:
    """Records are made by the kernel (net/tls, ``tls_sw_sendmsg``).

    Keys change only between two sends: whoever sends holds the lock, and before any data come the
    records that are owed, such as the answer to a KeyUpdate. A reader that owes one never waits for
    a send that is under way: the sender finds it afterwards.

    The kernel enforces no limit on what a key may protect, so records are counted here: an upper
    bound, which is corrected from the kernel's own sequence number when it reaches the limit.
    """

    def __init__(
        self,
        sock: socket.socket,
        engine: Engine,
        engine_lock: threading.Lock,
        chain: KeyChain,
        record_limit: int | None = None,
    ) -> None:
        """Starts after TLS_TX succeeded.

        Args:
            sock: The socket.
            engine: For what it may still write.
            engine_lock: Held for every use of the engine, which two threads may not use at once.
            chain: The keys that the kernel has, and the engine too.
            record_limit: How many records a key may protect; None means what its cipher allows.
        """
        self._sock = sock
        self._engine = engine
        self._engine_lock = engine_lock
        self._chain = self._shadow_chain = chain
        self._shadow = RecordCipher(chain.info)
        self._limit = chain.record_limit if record_limit is None else record_limit
        self._used = chain.info.rec_seq
        self._sending = threading.Lock()
        self._owed: deque[tuple[int, bytes]] = deque()

    def send(self, data: Buffer, flags: int) -> int:
        """See `Sender.send`."""
        view = memoryview(data).cast("B")
        with self._sending:
            room = self._room()
            sent = socket.socket.send(self._sock, view[:room] if len(view) > room else view, flags)
            self._count(sent)
        self._pay_leftovers()
        return sent

    def sendmsg(self, buffers: Sequence[Buffer], flags: int) -> int:
        """See `Sender.sendmsg`."""
        with self._sending:
            room = self._room()
            if sum(len(memoryview(buffer).cast("B")) for buffer in buffers) > room:
                buffers = [b"".join(buffers)[:room]]
            sent = socket.socket.sendmsg(self._sock, buffers, (), flags)
            self._count(sent)
        self._pay_leftovers()
        return sent

    def sendfile(self, file: int, offset: int, count: int | None) -> FileProgress:
        """See `Sender.sendfile`."""
        sent = 0
        while True:
            left = None if count is None else count - sent
            try:
                with self._sending:
                    room = self._room()
                    part = room if left is None else min(room, left)
                    progress, number, raised = _ktls.sendfile(
                        self._sock.fileno(), file, offset + sent, part
                    )
                    self._count(progress)
            except (KTLSError, OSError) as error:
                return sent, error
            self._pay_leftovers()
            sent += progress
            if raised is not None:
                return sent, raised
            if number:
                return sent, OSError(number, f"sendfile: {os.strerror(number)}")
            if progress < part or part == left:
                return sent, None

    def send_record(self, content_type: int, data: Buffer) -> int:
        """See `Sender.send_record`."""
        with self._sending:
            self._room()
            sent = self._send_record(content_type, data)
        self._pay_leftovers()
        return sent

    def alert(self, level: AlertLevel, description: Alert) -> None:
        """See `Sender.alert`."""
        with self._sending:
            with suppress(KeyLimitError):  # an alert is due even then; nothing follows it
                self._room()
            self._send_record(RecordType.ALERT, bytes([level, description]))

    def finish(self, seconds: float) -> None:
        """See `Sender.finish`."""
        if not self._sending.acquire(timeout=seconds):
            raise TimeoutError
        try:
            with suppress(KeyLimitError):
                self._room()
            wait.uninterrupted(
                lambda: _ktls.send_record(self._sock.fileno(), RecordType.ALERT, CLOSE_NOTIFY)
            )
        finally:
            self._sending.release()

    def owe_alert(self, level: AlertLevel, description: Alert) -> bool:
        """See `Sender.owe_alert`."""
        self._owed.append((RecordType.ALERT, bytes([level, description])))
        self._pay_leftovers()
        return True

    def flush(self) -> None:
        """See `Sender.flush`."""
        descriptor = self._sock.fileno()
        with self._sending:
            wait.complete(self._sock, wait.WRITABLE, lambda: _ktls.flush(descriptor))

    def update_keys(self, request_peer: bool) -> None:
        """See `Sender.update_keys`."""
        with self._sending:
            self._pay()
            self._update_keys(KeyUpdateRequest(request_peer))
        self._pay_leftovers()

    def relay(self) -> None:
        """See `Sender.relay`. What doesn't fit now, or is behind a send, goes before the next."""
        with self._engine_lock:
            for record in records.split(self._engine.answers()):
                self._owe(*self._shadow.open(record))
        self._pay_leftovers()

    def _owe(self, content_type: int, content: bytes) -> None:
        """Takes over a record that the engine sealed with its own keys."""
        if content_type == RecordType.HANDSHAKE:
            if content[0] != HandshakeType.KEY_UPDATE:
                raise RecordError("the peer asked for a handshake", Alert.NO_RENEGOTIATION)
            self._shadow_chain = self._shadow_chain.next()
            self._shadow = RecordCipher(self._shadow_chain.info)
            if (content_type, content) in self._owed:
                return  # one answers all that were asked meanwhile (RFC 8446 section 4.6.3)
        self._owed.append((content_type, content))

    def _pay_leftovers(self) -> None:
        """Sends what is owed, if nobody is sending: who is, comes here afterwards."""
        while self._owed and self._sending.acquire(blocking=False):
            try:
                self._pay(socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            finally:
                self._sending.release()

    def _pay(self, flags: int = 0) -> None:
        while self._owed:
            content_type, content = self._owed[0]
            if content_type == RecordType.HANDSHAKE:
                self._update_keys(KeyUpdateRequest(content[-1]), flags)
            else:
                self._send_record(content_type, content, flags)
            self._owed.popleft()

    def _room(self) -> int:
        """Pays what is owed, and tells how many bytes this key may still protect.

        Raises:
            KeyLimitError: None, and there is no next key.
        """
        if self._owed:
            self._pay()
        if self._used + 1 >= self._limit:
            *_, rec_seq = _ktls.query(self._sock.fileno(), _ktls.TX)
            self._used = int.from_bytes(rec_seq, "big")
            if self._used + 1 >= self._limit:
                if not self._chain.updatable:
                    raise KeyLimitError(
                        f"this key has protected {self._used} records, as many as it may, and TLS "
                        "1.2 has no KeyUpdate: connect again"
                    )
                self._update_keys(KeyUpdateRequest.NOT_REQUESTED)
        return max(1, self._limit - self._used - 1) * MAX_PAYLOAD

    def _count(self, sent: int) -> None:
        """Counts the records that these bytes can have made at the most."""
        self._used += sent // MAX_PAYLOAD + 1

    def _update_keys(self, request: KeyUpdateRequest, flags: int = 0) -> None:
        """RFC 8446 section 4.6.3: the record, which ends any open one, is the old key's last."""
        if not self._chain.updatable:
            raise NotInKernelError("TLS 1.2 has no KeyUpdate")
        if not offload.can_rekey():
            raise RekeyUnsupportedError
        chain = self._chain.next()
        message = bytes([HandshakeType.KEY_UPDATE, 0, 0, 1, request])
        self._send_record(RecordType.HANDSHAKE, message, flags)
        # The peer expects the next key from here on: nothing may go out before it is there.
        offload.rekey(self._sock, _ktls.TX, chain.info)
        self._chain, self._used = chain, 0

    def _send_record(self, content_type: int, data: Buffer, flags: int = 0) -> int:
        descriptor = self._sock.fileno()
        if flags & socket.MSG_DONTWAIT:
            sent = _ktls.send_record(descriptor, content_type, data, flags)
        else:
            sent = wait.complete(
                self._sock,
                wait.WRITABLE,
                lambda: _ktls.send_record(descriptor, content_type, data, flags),
            )
        self._used += 1
        return sent


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
        """See `Sender.send`. Of the flags only MSG_DONTWAIT has a meaning here.

        Raises:
            ValueError: Fewer bytes than those of the record that stuck.
        """
        view = memoryview(data).cast("B")
        flags &= socket.MSG_DONTWAIT
        with self._pushing:
            if len(view) < self._stuck:
                raise ValueError(
                    f"repeat the send that would block with its data: {self._stuck} bytes or more"
                )
            sent = 0
            while True:
                try:
                    self._push(lambda chunk: socket.socket.send(self._sock, chunk, flags))
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
            except BaseException as error:
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
        """See `Sender.alert`."""
        raise NotInKernelError("OpenSSL sends alerts of its own accord: TX isn't in the kernel")

    def finish(self, seconds: float) -> None:
        """See `Sender.finish`."""
        with self._lock:
            self._engine.close_notify()
            self._wire += self._engine.outgoing()
        if not self._pushing.acquire(timeout=seconds):
            raise TimeoutError
        try:
            self._push(lambda chunk: os.write(self._sock.fileno(), chunk))
        finally:
            self._pushing.release()

    def owe_alert(self, level: AlertLevel, description: Alert) -> bool:
        """See `Sender.owe_alert`. OpenSSL sends alerts when it finds a reason by itself."""
        return False

    def flush(self) -> None:
        """See `Sender.flush`: OpenSSL holds nothing back."""

    def update_keys(self, request_peer: bool) -> None:
        """See `Sender.update_keys`."""
        raise NotInKernelError(
            "pyOpenSSL has no call for a KeyUpdate: only TX in the kernel can update its keys "
            "(OpenSSL answers those of the peer)"
        )

    def relay(self) -> None:
        """See `Sender.relay`. What doesn't fit now goes with the next send."""
        with self._lock:
            self._wire += self._engine.answers()
        if self._wire and wait.until(self._sock, wait.WRITABLE, 0) and self._pushing.acquire(False):
            with suppress(BlockingIOError):
                try:
                    self._push(lambda chunk: socket.socket.send(self._sock, chunk))
                finally:
                    self._pushing.release()

    def _push(self, write: Callable[[bytes], int]) -> None:
        """Writes out all ciphertext; whoever holds ``_pushing`` takes what comes meanwhile too."""
        while self._wire:
            with self._lock:
                chunk = bytes(self._wire[:_READ_CHUNK])
            sent = write(chunk)
            with self._lock:
                del self._wire[:sent]
