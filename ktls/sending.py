"""The sending direction, and its records made by the kernel; `ktls.userspace` is the other way.

Both raise plain OSErrors (BlockingIOError, TimeoutError, BrokenPipeError ...); `ktls.connection`
gives them their types. What a method reports as sent is in the kernel's hands.
"""

from __future__ import annotations

import copy
import errno
import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol, TypeVar

from typing_extensions import Buffer

from . import _ktls, offload, tcp, wait
from .control import Control, Record, is_key_update
from .errors import (
    ClosedForWritingError,
    KeyLimitError,
    KTLSError,
    NotInKernelError,
    RecordError,
    RekeyUnsupportedError,
)
from .keychain import KeyChain
from .tally import Tally
from .types import MAX_PAYLOAD, Alert, AlertLevel, KeyUpdateRequest, RecordType, Version

_log = logging.getLogger("ktls")
_T = TypeVar("_T")

_KEY_UPDATE_SIZE = 5  # its type, a length of 24 bits, the request (RFC 8446 section 4.6.3)
CLOSE_NOTIFY = bytes([AlertLevel.WARNING, Alert.CLOSE_NOTIFY])

FileProgress = tuple[int, BaseException | None]
"""Bytes sent, and what ended it early: an OSError, or whatever a signal handler raised."""


class Sender(Protocol):
    """One way to send. `Socket` has one.

    Attributes:
        max_fragment: Most plaintext bytes in a record.
        asked: How many KeyUpdates the peer still owes for those that asked for one.
    """

    max_fragment: int
    asked: int

    def timeout_changed(self) -> None:
        """The socket's timeout was set, and with it whether its descriptor blocks."""

    def send(self, data: Buffer, flags: int) -> int:
        """Sends what fits; everything, on a blocking socket."""

    def sendmsg(self, buffers: Sequence[Buffer], flags: int) -> int:
        """The same for many buffers."""

    def sendfile(self, file: int, offset: int, count: int | None) -> FileProgress:
        """Sends from a file until its end or ``count`` bytes, as far as it goes without waiting.

        In userspace each record may wait, as in `send`: on a blocking socket that is all of it.
        """

    def send_record(self, content_type: int, data: Buffer) -> int:
        """Sends one record of a type, after all data before it."""

    def alert(self, level: AlertLevel, description: Alert) -> None:
        """Sends an alert, after all data before it."""

    def finish(self, seconds: float, *, close_notify: bool) -> None:
        """Sends all that is owed, and perhaps close_notify: nothing follows.

        Args:
            seconds: How long to wait for room, and for a send of another thread.
            close_notify: False where a fatal alert is the last word.
        """

    def held(self) -> int:
        """Bytes on their way to TCP, which SHUT_WR would cut off; known after `finish`."""

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

    def retry(self) -> None:
        """Sends what is owed, if it fits by now."""

    def owes(self) -> bool:
        """Whether `retry` has something to send."""

    def close(self, error: KTLSError) -> None:
        """From now on every send of data raises a copy of this, also one that is under way."""


class KernelSender:
    """Records are made by the kernel (net/tls, ``tls_sw_sendmsg``).

    Most sends go by the `lane`, in C, which takes those that there is nothing to think about:
    nothing is owed, nobody else is sending, the key may protect more, no error stays. Whatever
    changes that sets its ``attention``. The methods here do all the others.

    Keys change only between two sends: whoever sends holds the lock, but not while he waits for
    room, and before any data come the records that are owed, such as the answer to a KeyUpdate. A
    reader that owes one never waits for a send that is under way: the sender finds it afterwards.

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
        position: int | None = None,
    ) -> None:
        """Starts after TLS_TX succeeded.

        Args:
            sock: The socket.
            control: For what it wants to be sent.
            chain: What follows the keys that the kernel has.
            used: How many records these have protected, at the most.
            record_limit: How many records a key may protect; None means what its cipher allows.
            max_fragment: Most plaintext bytes in a record, as the kernel was told.
            position: As for `Tally`; None where ``used`` is exact, too.
        """
        self.max_fragment = max_fragment
        self.asked = 0
        self._sock = sock
        self._control = control
        self._chain = self._following = chain
        self._limit = chain.record_limit if record_limit is None else record_limit
        self.lane = _ktls.Lane(sock.fileno(), max_fragment, used, self._limit)
        self._sending = self.lane  # which is the lock of all sends, too
        self._owed: deque[Record] = deque()
        self._tally = Tally(sock, chain, used if position is None else None, position)
        self._end = position  # known for good after `finish`
        self._taken: list[int] = []
        self._updates: list[int] = []
        self._closed: KTLSError | None = None
        self._last_was_said = False

    def timeout_changed(self) -> None:
        """See `Sender.timeout_changed`."""
        self.lane.nonblocking = False

    @property
    def _used(self) -> int:
        """How many records the key has protected, at the most."""
        return self.lane.used

    @_used.setter
    def _used(self, records: int) -> None:
        self.lane.used = records

    def send(self, data: Buffer, flags: int) -> int:
        """See `Sender.send`."""
        view = memoryview(data).cast("B")

        def send() -> int:
            room = self._room()
            part = view[:room] if len(view) > room else view
            self._count(len(part))  # before: a signal handler may raise as soon as it was sent
            return self._take(partial(socket.socket.send, self._sock, part), flags)

        return self._in_turn(send, flags)

    def sendmsg(self, buffers: Sequence[Buffer], flags: int) -> int:
        """See `Sender.sendmsg`."""
        size = sum(len(memoryview(buffer).cast("B")) for buffer in buffers)

        def send() -> int:
            room = self._room()
            parts = buffers if size <= room else [b"".join(buffers)[:room]]
            self._count(min(size, room))
            return self._take(partial(socket.socket.sendmsg, self._sock, parts, ()), flags)

        return self._in_turn(send, flags)

    def sendfile(self, file: int, offset: int, count: int | None) -> FileProgress:
        """See `Sender.sendfile`."""
        parts = [(offset, 0)]
        try:
            while True:
                at = parts[-1][0]
                sent = at - offset
                left = min(sys.maxsize, sys.maxsize if count is None else count - sent)
                with self._sending:
                    part = min(self._room(), left)
                    self._never_wait()
                    call = partial(self.lane.send_part, self._sock.fileno(), file, at)
                    # As in `_take`; the lane has counted it for itself.
                    parts.extend(map(call, (part,)))
                self.retry()
                end, number = parts[-1]
                if number == errno.EINTR:  # signal handlers have run by now
                    continue
                if number:
                    return end - offset, file_error(number)
                if end - at < part or part == left:
                    return end - offset, None
        except BaseException as error:  # also what a signal handler raised
            return parts[-1][0] - offset, error

    def _in_turn(self, call: Callable[[], _T], flags: int = 0) -> _T:
        """Does what never waits, again and again until there is room; then what came to be owed.

        Who waits doesn't have the lock: others get in between, a signal's handler too.

        Args:
            call: Does it, for who has the lock; or nothing of it, where there is no room.
            flags: Of the caller's.
        """

        def attempt() -> _T:
            with self._sending:
                return call()

        done = self._when_writable(attempt, wait.Deadline(self._sock, flags))
        self.retry()
        return done

    def _when_writable(self, attempt: Callable[[], _T], deadline: wait.Deadline) -> _T:
        return wait.complete(self._sock, wait.WRITABLE, attempt, deadline, again=wait.PUSH_AGAIN)

    def _take(self, call: Callable[[int], int], flags: int = 0) -> int:
        """Makes a sending system call that never waits inside the kernel; waiting is done here.

        Linux before 6.1.183, 6.12.104 and 7.2 aborts the connection when a signal comes to a thread
        that waits there.

        Args:
            call: Makes it, given its flags, and returns how many bytes the kernel took. It is C.
            flags: Of the caller's.
        """
        taken = self._taken

        def send() -> int:
            # A signal handler may raise as soon as Python runs again: by then the count is kept.
            taken.extend(map(call, (flags | wait.DONTWAIT,)))
            return taken[-1]

        return self._push_if_full(send)

    def _push_if_full(self, call: Callable[[], _T]) -> _T:
        """Makes a sending system call; if there is no room, TCP is told to send what it has."""
        try:
            return call()
        except BlockingIOError:
            _ktls.push(self._sock.fileno())
            raise

    def _never_wait(self) -> None:
        """As `_take`, for sendfile, which has no flag for it: the descriptor stays non-blocking.

        What the socket's timeout says is seen to by `wait`, here and in receiving.
        """
        if not self.lane.nonblocking:
            self.lane.nonblocking = True  # before: who makes it block takes it away
            os.set_blocking(self._sock.fileno(), False)

    def send_record(self, content_type: int, data: Buffer) -> int:
        """See `Sender.send_record`."""
        if len(memoryview(data).cast("B")) > self.max_fragment:  # the kernel would make several
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))

        def send() -> int:
            self._room()
            return self._send_record(content_type, data)

        return self._in_turn(send)

    def alert(self, level: AlertLevel, description: Alert) -> None:
        """See `Sender.alert`."""

        def send() -> None:
            with suppress(KeyLimitError):  # an alert is due even then; nothing follows it
                self._room()
            self._send_alert(bytes([level, description]))

        self._in_turn(send)

    def finish(self, seconds: float, *, close_notify: bool) -> None:
        """See `Sender.finish`."""
        if close_notify:
            # Or a big send goes on and on.
            self.close(self._closed or no_more("close_notify"))

        def send() -> None:
            try:
                with suppress(KeyLimitError, RekeyUnsupportedError):
                    self._pay()
                if close_notify and not self._last_was_said:
                    self._send_alert(CLOSE_NOTIFY)
            finally:
                self._settle()
                self._end = self._tally.end(self.lane.sent)

        attempt = partial(wait.holding, self._sending, seconds, send)
        self._when_writable(attempt, wait.Deadline.within(seconds))

    def held(self) -> int:
        """See `Sender.held`."""
        return 0 if self._end is None else tcp.to_come(self._sock, self._end)

    def owe_alert(self, level: AlertLevel, description: Alert) -> bool:
        """See `Sender.owe_alert`. One that is owed already isn't owed twice."""
        self._owe((RecordType.ALERT, bytes([level, description])))
        self.retry()
        return True

    def _owe(self, record: Record) -> None:
        if record not in self._owed:
            self._owed.append(record)
        self.lane.attention = True  # after it is there: whoever sees it finds the record

    def close(self, error: KTLSError) -> None:
        """See `Sender.close`. What is owed can still be paid."""
        self._closed = error
        self.lane.attention = True

    def flush(self) -> None:
        """See `Sender.flush`."""

        def flush() -> None:
            self._check()
            self._flush()

        self._in_turn(flush)

    def _flush(self) -> None:
        self._push_if_full(partial(_ktls.flush, self._sock.fileno(), wait.DONTWAIT))

    def update_keys(self, request_peer: bool) -> None:
        """See `Sender.update_keys`."""

        def update() -> None:
            self._check()
            self._pay()
            self._update_keys(KeyUpdateRequest(request_peer))
            self.asked += request_peer

        self._in_turn(update)

    def relay(self) -> None:
        """See `Sender.relay`. What doesn't fit now, or is behind a send, goes before the next."""
        for record in self._control.answers():
            if record[0] == RecordType.HANDSHAKE and not is_key_update(record):
                raise RecordError("the peer asked for a handshake", Alert.NO_RENEGOTIATION)
            # One answers all that were asked meanwhile (RFC 8446 section 4.6.3), or refuses them.
            self._owe(record)
        self.retry()

    def detach(self) -> tuple[KeyChain, int, int]:
        """Sends what is owed or held back; nothing may be sent by this object afterwards.

        Returns:
            What follows the keys, how many records they have protected at the most, and where in
            TCP's stream the last one ends.
        """

        def end() -> tuple[KeyChain, int, int]:
            self._pay()
            if not self._last_was_said:
                self._flush()
            self._settle()
            self.lane.fd = -1
            return self._chain, self._used, self._tally.end(self.lane.sent)

        return self._in_turn(end)

    def retry(self) -> None:
        """See `Sender.retry`. If somebody is sending he does it, when he is done."""
        while self._owed:
            try:
                wait.holding(self._sending, 0, self._pay)
            except KTLSError:
                raise
            except OSError as error:
                # Not now, or not any more. Then the next send says so: this one is done.
                _log.debug("not sent: %s", error)
                return

    def owes(self) -> bool:
        """See `Sender.owes`."""
        return bool(self._owed)

    def _pay(self) -> None:
        """Sends what is owed, up to what there is no room for now."""
        self._settle()
        while self._owed:
            if self._last_was_said:
                self._owed.clear()
                return
            content_type, content = self._owed[0]
            if content_type == RecordType.HANDSHAKE:
                try:
                    self._update_keys(KeyUpdateRequest(content[-1]))
                except RekeyUnsupportedError:
                    self._owed.popleft()  # an alert that says so is what can still be paid
                    raise
            else:
                self._send_alert(content)
            if self._owed:
                self._owed.popleft()

    def _check(self) -> None:
        """Nothing may follow close_notify or a fatal alert (RFC 8446 section 6)."""
        self._settle()
        if self._closed is not None:
            raise copy.copy(self._closed)

    def _room(self) -> int:
        """Pays what is owed, and tells how many bytes this key may still protect.

        Raises:
            BlockingIOError: There is no room for what is owed.
            KeyLimitError: None, and there is no next key.
            KTLSError: Nothing may be sent any more.
        """
        try:
            self.lane.attention = False  # before looking: what comes meanwhile sets it again
            if self._owed:
                self._pay()
            self._check()
        except BaseException:
            self.lane.attention = True
            raise
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
        return max(1, self._limit - self._used - 1) * self.max_fragment

    def _count(self, size: int) -> None:
        """Counts the records that these bytes can make at the most."""
        self._used += size // self.max_fragment + 1

    def _update_keys(self, request: KeyUpdateRequest) -> None:
        """RFC 8446 section 4.6.3: the record is the old key's last."""
        if not self._chain.updatable:
            tls12 = self._chain.version is Version.TLS_1_2
            raise (NotInKernelError if tls12 else RekeyUnsupportedError)(self._chain.obstacle)
        if not offload.can_rekey():
            raise RekeyUnsupportedError
        self._following = self._chain.next()
        keys = self._following.keys()
        self.lane.attention = True  # until it is known what became of it
        self._flush()
        self._tally.before_update()
        update = offload.key_update(self._sock, keys, request)

        # A signal handler may raise as soon as Python runs again: by then the outcome is kept.
        self._push_if_full(lambda: self._updates.extend(map(update, (wait.DONTWAIT,))))
        self._settle()
        if self._last_was_said and self._closed is not None:
            raise copy.copy(self._closed)

    def _settle(self) -> None:
        """Counts what the last calls sent; goes on with the next keys, if it was a KeyUpdate."""
        self.lane.sent += sum(self._taken)
        self._taken.clear()
        if self._updates:
            if self._updates[-1]:
                # The peer expects a key that the kernel doesn't have.
                self.close(offload.not_replaced(self._updates[-1]))
                self._last_was_said = True
            else:
                self._chain, self._used = self._following, 0
                self._tally.updated()
            self.lane.sent += _KEY_UPDATE_SIZE  # nothing between these two can be interrupted
            self._updates.clear()

    def _send_alert(self, content: bytes) -> None:
        """After close_notify or a fatal alert nothing goes out any more (RFC 8446 section 6)."""
        self._flush()  # older kernels make data of an alert that an open record stops
        self._send_record(RecordType.ALERT, content)
        level, description = content
        if description == Alert.CLOSE_NOTIFY or level == AlertLevel.FATAL:
            self._last_was_said = True
            name = "close_notify" if description == Alert.CLOSE_NOTIFY else "a fatal alert"
            self.close(self._closed or no_more(name))

    def _send_record(self, content_type: int, data: Buffer) -> int:
        call = partial(_ktls.send_record, self._sock.fileno(), content_type, data)
        sent = self._take(call)
        self._used += 1
        return sent


def file_error(number: int) -> OSError:
    """For the errno of a sendfile."""
    return OSError(number, f"sendfile: {os.strerror(number)}")


def no_more(last: str) -> ClosedForWritingError:
    """For sends after what was the last word."""
    return ClosedForWritingError(f"nothing can be sent after {last}")
