"""Both directions where they aren't in the kernel: OpenSSL makes and opens the records."""

from __future__ import annotations

import copy
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from typing_extensions import Buffer

from . import _ktls, wait
from .engine import Engine
from .errors import AlertReceived, KTLSError, NotInKernelError, RecordError
from .files import Sink
from .receiving import PROVOCATIONS, End, Idle, more_exact, relay
from .records import RecordReader
from .sending import FileProgress, Sender, no_more
from .types import MAX_PAYLOAD, Alert, AlertLevel, RecordType

_WRITE_CHUNK = 1 << 18  # of ciphertext
_MOST_ANSWERS = 1 << 20  # bytes that wait for a peer to read them


class EngineSender:
    """Records are made by OpenSSL and written to the socket as bytes.

    Bytes count as sent when the record that holds them is whole in the socket's buffer. A record
    that stuck on a non-blocking socket is kept, and the caller's next `send` begins with the same
    bytes again, which is then not encrypted twice (as with OpenSSL's own retry rule).
    """

    def __init__(
        self,
        sock: socket.socket,
        engine: Engine,
        lock: threading.Lock,
        max_fragment: int = MAX_PAYLOAD,
    ) -> None:
        """Starts after the handshake.

        Args:
            sock: The socket.
            engine: Makes the records.
            lock: As for `KernelSender`.
            max_fragment: Most plaintext bytes in a record.
        """
        self.max_fragment = max_fragment
        self.asked = 0
        self._sock = sock
        self._engine = engine
        self._lock = lock
        self._closed: KTLSError | None = None
        self._pushing = threading.Lock()
        self._wire = bytearray()
        self._written: list[int] = []
        self._stuck = b""

    def timeout_changed(self) -> None:
        """See `Sender.timeout_changed`: each write sees to that itself."""

    def send(self, data: Buffer, flags: int) -> int:
        """See `Sender.send`: one record. Of the flags only MSG_DONTWAIT has a meaning here.

        Raises:
            ValueError: Other data than that of the record that stuck.
        """
        view = memoryview(data).cast("B")
        with self._pushing:
            if view[: len(self._stuck)] != self._stuck:
                raise ValueError(
                    f"the last send would block: repeat it with its data, {len(self._stuck)} bytes "
                    "at the least"
                )
            if not self._stuck and view:
                part = bytes(view[: self.max_fragment])
                with self._lock:
                    if self._closed is not None:
                        raise copy.copy(self._closed)
                    self._stuck = part[: self._engine.encrypt(memoryview(part))]
                    self._wire += self._engine.outgoing()
            return self._unstick(flags & wait.DONTWAIT)

    def _unstick(self, flags: int) -> int:
        """Writes out what is there; returns how many bytes of the caller's that completes."""
        self._push(flags)
        completed, self._stuck = len(self._stuck), b""
        return completed

    def sendmsg(self, buffers: Sequence[Buffer], flags: int) -> int:
        """See `Sender.sendmsg`."""
        return self.send(b"".join(buffers), flags)

    def sendfile(self, file: int, offset: int, count: int | None) -> FileProgress:
        """See `Sender.sendfile`."""
        sent = 0
        try:
            if self._stuck:
                sent = self.send(self._repeated(file, offset, count), 0)
            while count is None or sent < count:
                left = self.max_fragment
                if count is not None:
                    left = min(left, count - sent)
                chunk = os.pread(file, left, offset + sent)
                if not chunk:
                    break
                sent += self.send(chunk, 0)
        except BaseException as error:  # also what a signal handler raised
            return sent, error
        return sent, None

    def _repeated(self, file: int, offset: int, count: int | None) -> bytes:
        """What the call that this one repeats had read; else what `send` will refuse."""
        again = os.pread(file, len(self._stuck), offset)
        if len(again) < len(self._stuck) and self._stuck.startswith(again):
            return self._stuck  # the file was cut meanwhile
        return again[:count]

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

    def finish(self, seconds: float, *, close_notify: bool) -> None:
        """See `Sender.finish`."""
        deadline = time.monotonic() + seconds
        with self._lock:
            if close_notify:
                self._closed = self._closed or no_more("close_notify")
                self._engine.close_notify()
            self._wire += self._engine.outgoing()
        wait.holding(self._pushing, seconds, partial(self._push_until, deadline))

    def _push_until(self, deadline: float) -> None:
        with wait.non_blocking(self._sock):
            while True:
                try:
                    self._push(write=partial(os.write, self._sock.fileno()))
                except BlockingIOError:
                    left = max(0.0, deadline - time.monotonic())
                    if not wait.until(self._sock, wait.WRITABLE, left):
                        raise TimeoutError from None
                else:
                    return

    def held(self) -> int:
        """See `Sender.held`: what is sent is TCP's."""
        return 0

    def close(self, error: KTLSError) -> None:
        """See `Sender.close`."""
        self._closed = error

    def owe_alert(self, level: AlertLevel, description: Alert) -> bool:
        """See `Sender.owe_alert`. OpenSSL sends alerts when it finds a reason by itself."""
        return False

    def flush(self) -> None:
        """See `Sender.flush`: OpenSSL holds nothing back."""

    def update_keys(self, request_peer: bool) -> None:
        """See `Sender.update_keys`."""
        raise NotInKernelError(
            "Python has no call for OpenSSL's KeyUpdate: only TX in the kernel can update its keys "
            "(OpenSSL answers those of the peer)"
        )

    def relay(self) -> None:
        """See `Sender.relay`. What doesn't fit now goes with the next send."""
        with self._lock:
            self._wire += self._engine.answers()
        self.retry()
        if len(self._wire) > _MOST_ANSWERS:
            raise RecordError("answers asked for and not read", Alert.UNEXPECTED_MESSAGE)

    def retry(self) -> None:
        """See `Sender.retry`."""
        if not self._wire or not wait.until(self._sock, wait.WRITABLE, 0):
            return
        try:
            wait.holding(self._pushing, 0, partial(self._push, 0))
        except BlockingIOError:
            pass
        except TimeoutError as error:  # another thread's turn; but what TCP says, it says once
            if error.errno is not None:
                raise

    def owes(self) -> bool:
        """See `Sender.owes`."""
        return bool(self._wire)

    def _push(self, *flags: int, write: Callable[..., int] | None = None) -> None:
        """Writes out all ciphertext; whoever holds ``_pushing`` takes what comes meanwhile too."""
        write = write or partial(socket.socket.send, self._sock)
        while self._take_off():
            with self._lock:
                chunk = bytes(self._wire[:_WRITE_CHUNK])
            # A signal handler may raise as soon as Python runs again, and then the count would be
            # lost and the bytes be written twice. Here it is kept before that.
            self._written.extend(map(write, (chunk,), *((flag,) for flag in flags)))

    def _take_off(self) -> int:
        """Takes off what was written; returns how much is left."""
        with self._lock:
            while self._written:
                count, self._written[-1] = self._written[-1], 0
                del self._wire[:count]
                self._written.pop()
            return len(self._wire)


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
        self._idle = Idle()

    def recv_into(self, buffer: memoryview, flags: int) -> int | End:
        """See `Receiver.recv_into`."""
        self._sender.retry()
        fed = False
        deadline = wait.Deadline(self._sock, flags)
        while True:
            try:
                with self._lock:
                    count = self._engine.read_into(buffer, peek=bool(flags & wait.PEEK))
            except (AlertReceived, RecordError):
                with suppress(OSError, KTLSError):
                    self._sender.relay()
                raise
            if count is not None:
                self._idle.end()
                return count or End.CLOSE_NOTIFY
            if fed:
                # It was no data. OpenSSL's answer goes before any of the caller's.
                relay(self._sender)
                self._count_idle()
                fed = False
            record = self._recv_record(flags & wait.DONTWAIT, deadline)
            if not record:
                return End.FIN
            with self._lock:
                self._engine.incoming(record)
            fed = True

    def _count_idle(self) -> None:
        if self._sender.asked:
            self._sender.asked -= 1  # perhaps a KeyUpdate that we wanted
            return
        try:
            self._idle.count()
        except RecordError as error:
            raise self._answer(error) from None

    def _answer(self, error: RecordError) -> RecordError:
        """Tells the peer; returns the error with the alert that it was told."""
        verdict = None
        with suppress(OSError, KTLSError):
            if not self._sender.owe_alert(AlertLevel.FATAL, error.alert):
                verdict = self._provoke()
                self._sender.relay()
        return more_exact(verdict, error)

    def _provoke(self) -> KTLSError | None:
        with self._lock:
            self._engine.incoming(PROVOCATIONS[Alert.BAD_RECORD_MAC])
            try:
                self._engine.read_into(memoryview(bytearray(1)))
            except KTLSError as error:
                return copy.copy(error)  # without the frames, which hold their callers' variables
        return None

    def recv_to_file(self, sink: Sink, limit: int | None) -> int | End:
        """See `Receiver.recv_to_file`: a record at a time."""
        buffer = memoryview(bytearray(MAX_PAYLOAD if limit is None else min(limit, MAX_PAYLOAD)))
        outcome = self.recv_into(buffer, 0)
        if isinstance(outcome, int):
            sink.write(buffer[:outcome])
        return outcome

    def pending(self) -> int:
        """See `Receiver.pending`."""
        with self._lock:
            return self._engine.pending()

    def told(self, number: int) -> bool:
        """See `Receiver.told`: TCP has no such errors."""
        return False

    def abort(self) -> None:
        """See `Receiver.abort`. Where OpenSSL does the sending, too, nothing needs it."""
        with suppress(OSError, KTLSError):
            self._sender.owe_alert(AlertLevel.FATAL, Alert.INTERNAL_ERROR)

    def _recv_record(self, flags: int, deadline: wait.Deadline) -> bytes:
        """The next record, in as many parts as it comes in; none at the stream's end."""
        while True:
            data = self._recv_bytes(self._reader.wanted, flags, deadline)
            record = self._reader.feed(data) if data else b""
            if record is not None:
                return record

    def _recv_bytes(self, size: int, flags: int, deadline: wait.Deadline) -> bytes:
        buffer = memoryview(bytearray(size))
        count, *_ = wait.complete(
            self._sock,
            wait.READABLE,
            lambda: _ktls.recv_record_into(self._sock.fileno(), buffer, flags | deadline.flags),
            deadline,
        )
        return bytes(buffer[:count])
