"""The sending direction: records made by the kernel, or by OpenSSL. One is chosen at the hand-over.

Both raise plain OSErrors (BlockingIOError, TimeoutError, BrokenPipeError ...); `ktls.socket` gives
them their types. What a method reports as sent is in the kernel's hands.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Protocol

from typing_extensions import Buffer

from . import _ktls, offload, wait
from .control import Control, Record, is_key_update, key_update
from .engine import Engine
from .errors import (
    KeyLimitError,
    KTLSError,
    NotInKernelError,
    RecordError,
    RekeyUnsupportedError,
)
from .keychain import KeyChain
from .types import MAX_PAYLOAD, Alert, AlertLevel, KeyUpdateRequest, RecordType, Version

_log = logging.getLogger("ktls")

DONTWAIT = socket.MSG_DONTWAIT
_WRITE_CHUNK = 1 << 18  # of ciphertext
CLOSE_NOTIFY = bytes([AlertLevel.WARNING, Alert.CLOSE_NOTIFY])

FileProgress = tuple[int, BaseException | None]
"""Bytes sent, and what ended it early: an OSError, or whatever a signal handler raised."""


class _Wait(enum.Enum):
    """Where to wait for room to send."""

    HERE = enum.auto()
    """In `wait.complete`, under the socket's timeout."""
    IN_KERNEL = enum.auto()
    """In the system call, which pushes earlier data out, too: for the end of a connection."""
    NOT = enum.auto()


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

    def finish(self, seconds: float, *, close_notify: bool) -> None:
        """Sends all that is left, and perhaps close_notify, by system calls that wait to send.

        Args:
            seconds: How long to wait for a send of another thread.
            close_notify: False where a fatal alert is the last word.
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
        control: Control,
        chain: KeyChain,
        *,
        used: int,
        record_limit: int | None = None,
        max_fragment: int = MAX_PAYLOAD,
    ) -> None:
        """Starts after TLS_TX succeeded.

        Args:
            sock: The socket.
            control: For what it wants to be sent.
            chain: What follows the keys that the kernel has.
            used: How many records these have protected, at the most.
            record_limit: How many records a key may protect; None means what its cipher allows.
            max_fragment: Most plaintext bytes in a record, as the kernel was told.
        """
        self._sock = sock
        self._control = control
        self._chain = chain
        self._limit = chain.record_limit if record_limit is None else record_limit
        self._max_fragment = max_fragment
        self._used = used
        self._sending = threading.Lock()
        self._owed: deque[Record] = deque()
        self._finished = False

    def send(self, data: Buffer, flags: int) -> int:
        """See `Sender.send`."""
        view = memoryview(data).cast("B")
        with self._sending:
            room = self._room()
            part = view[:room] if len(view) > room else view
            self._count(len(part))  # before: a signal handler may raise as soon as it was sent
            sent = self._send(lambda: socket.socket.send(self._sock, part, flags | DONTWAIT), flags)
        self._pay_leftovers()
        return sent

    def sendmsg(self, buffers: Sequence[Buffer], flags: int) -> int:
        """See `Sender.sendmsg`."""
        with self._sending:
            room = self._room()
            size = sum(len(memoryview(buffer).cast("B")) for buffer in buffers)
            if size > room:
                buffers = [b"".join(buffers)[:room]]
            parts = buffers
            self._count(min(size, room))
            sent = self._send(
                lambda: socket.socket.sendmsg(self._sock, parts, (), flags | DONTWAIT), flags
            )
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
                    with self._non_blocking():
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

    def _send(self, call: Callable[[], int], flags: int) -> int:
        """Makes a sending system call that never waits inside the kernel; waiting is done here.

        Linux before 6.1.183, 6.12.104 and 7.2 aborts the connection when a signal comes to a thread
        that waits there.
        """
        if flags & DONTWAIT:
            return wait.uninterrupted(call)
        return wait.complete(self._sock, wait.WRITABLE, call)

    @contextmanager
    def _non_blocking(self) -> Iterator[None]:
        """The same for sendfile, which has no flag for it."""
        descriptor = self._sock.fileno()
        if self._sock.gettimeout() is not None:
            yield
            return
        os.set_blocking(descriptor, False)
        try:
            yield
        finally:
            os.set_blocking(descriptor, True)

    def send_record(self, content_type: int, data: Buffer) -> int:
        """See `Sender.send_record`."""
        if len(memoryview(data).cast("B")) > self._max_fragment:  # the kernel would make several
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
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

    def finish(self, seconds: float, *, close_notify: bool) -> None:
        """See `Sender.finish`."""
        if not self._sending.acquire(timeout=seconds):
            raise TimeoutError
        try:
            with suppress(KeyLimitError, RekeyUnsupportedError):
                self._pay(_Wait.IN_KERNEL)
            if close_notify:
                self._send_record(RecordType.ALERT, CLOSE_NOTIFY, _Wait.IN_KERNEL)
                self._finished = True
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
            wait.complete(self._sock, wait.WRITABLE, lambda: _ktls.flush(descriptor, DONTWAIT))

    def update_keys(self, request_peer: bool) -> None:
        """See `Sender.update_keys`."""
        with self._sending:
            self._pay()
            self._update_keys(KeyUpdateRequest(request_peer))
        self._pay_leftovers()

    def relay(self) -> None:
        """See `Sender.relay`. What doesn't fit now, or is behind a send, goes before the next."""
        for record in self._control.answers():
            if record[0] == RecordType.HANDSHAKE:
                if not is_key_update(record):
                    raise RecordError("the peer asked for a handshake", Alert.NO_RENEGOTIATION)
                if record in self._owed:
                    continue  # one answers all that were asked meanwhile (RFC 8446 section 4.6.3)
            self._owed.append(record)
        self._pay_leftovers()

    def detach(self) -> tuple[KeyChain, int, int]:
        """Sends what is owed or held back; nothing may be sent by this object afterwards.

        Returns:
            What follows the keys, how many records they have protected at the most, and the most
            bytes in one.
        """
        with self._sending:
            self._pay()
        self.flush()
        return self._chain, self._used, self._max_fragment

    def _pay_leftovers(self) -> None:
        """Sends what is owed, if nobody is sending: who is, comes here afterwards."""
        while self._owed and self._sending.acquire(blocking=False):
            try:
                self._pay(_Wait.NOT)
            except KTLSError:
                raise
            except OSError as error:
                # Not now, or not any more. Then the next send says so: this one is done.
                _log.debug("not sent: %s", error)
                return
            finally:
                self._sending.release()

    def _pay(self, how: _Wait = _Wait.HERE) -> None:
        while self._owed:
            if self._finished:  # RFC 8446 section 6.1: no message follows close_notify
                self._owed.clear()
                return
            content_type, content = self._owed[0]
            if content_type == RecordType.HANDSHAKE:
                try:
                    self._update_keys(KeyUpdateRequest(content[-1]), how)
                except RekeyUnsupportedError:
                    self._owed.popleft()  # an alert that says so is what can still be paid
                    raise
            else:
                self._send_record(content_type, content, how)
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
            self._used = int.from_bytes(rec_seq, "big") + 1  # one may be open, and isn't counted
            if self._used + 1 >= self._limit:
                if not self._chain.updatable:
                    raise KeyLimitError(
                        f"this key has protected as many records as it may ({self._limit}), and "
                        f"{self._chain.obstacle}: connect again"
                    )
                self._update_keys(KeyUpdateRequest.NOT_REQUESTED)
        return max(1, self._limit - self._used - 1) * self._max_fragment

    def _count(self, size: int) -> None:
        """Counts the records that these bytes can make at the most."""
        self._used += size // self._max_fragment + 1

    def _update_keys(self, request: KeyUpdateRequest, how: _Wait = _Wait.HERE) -> None:
        """RFC 8446 section 4.6.3: the record, which ends any open one, is the old key's last."""
        if not self._chain.updatable:
            tls12 = self._chain.version is Version.TLS_1_2
            raise (NotInKernelError if tls12 else RekeyUnsupportedError)(self._chain.obstacle)
        if not offload.can_rekey():
            raise RekeyUnsupportedError
        chain = self._chain.next()
        keys = chain.keys()
        self._send_record(*key_update(request), how)
        # The peer expects the next key from here on: nothing may go out before it is there.
        offload.rekey(self._sock, _ktls.TX, keys)
        self._chain, self._used = chain, 0

    def _send_record(self, content_type: int, data: Buffer, how: _Wait = _Wait.HERE) -> int:
        descriptor = self._sock.fileno()
        flags = 0 if how is _Wait.IN_KERNEL else DONTWAIT
        sent = self._send(
            lambda: _ktls.send_record(descriptor, content_type, data, flags),
            0 if how is _Wait.HERE else DONTWAIT,
        )
        self._used += 1
        return sent


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
        self._sock = sock
        self._engine = engine
        self._lock = lock
        self._max_fragment = max_fragment
        self._pushing = threading.Lock()
        self._wire = bytearray()
        self._written: list[int] = []
        self._stuck = b""

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
                part = bytes(view[: self._max_fragment])
                with self._lock:
                    self._stuck = part[: self._engine.encrypt(memoryview(part))]
                    self._wire += self._engine.outgoing()
            return self._unstick(flags & DONTWAIT)

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
                left = self._max_fragment
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
        with self._lock:
            if close_notify:
                self._engine.close_notify()
            self._wire += self._engine.outgoing()
        if not self._pushing.acquire(timeout=seconds):
            raise TimeoutError
        try:
            self._push(write=partial(os.write, self._sock.fileno()))
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
                    self._push(0)
                finally:
                    self._pushing.release()

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
