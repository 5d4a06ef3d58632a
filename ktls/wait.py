"""Waiting: with a system call under a Python socket's timeout, or for a lock."""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

_T = TypeVar("_T")

# Flags of send(2) and recv(2) as plain numbers: those of `socket` are an enum's, and joining two of
# an enum's takes longer than many a system call.
DONTWAIT, MORE = int(socket.MSG_DONTWAIT), int(socket.MSG_MORE)
PEEK, WAITALL = int(socket.MSG_PEEK), int(socket.MSG_WAITALL)

READABLE = select.EPOLLIN | select.EPOLLRDHUP
WRITABLE = select.EPOLLOUT
PUSH_AGAIN = 0.2
"""Seconds to wait for room, at most, before TCP is told once more to send what it has.

When an acknowledgement makes room, ``tx_work_handler`` of net/tls gives TCP the rest of a record
with the flags that the record came with (see ``ktls_push`` in src/ktls.c). With a small SO_SNDBUF
and a small window that may be all there is: no acknowledgement is due then, and no event. It is as
long as TCP holds back what MSG_MORE says is only a part.
"""


class Deadline:
    """When the timeout of an operation that takes several system calls runs out.

    Attributes:
        timeout: The socket's, in seconds: None is blocking, 0 non-blocking.
        flags: MSG_DONTWAIT unless it is blocking: O_NONBLOCK alone isn't relied on, because another
            thread that sends or closes may be setting it, or setting it back.
    """

    def __init__(self, sock: socket.socket, flags: int = 0) -> None:
        """Starts now, with the socket's timeout; MSG_DONTWAIT means 0."""
        self.timeout = sock.gettimeout()
        if flags & DONTWAIT:
            self.timeout = 0.0
        self.flags = 0 if self.timeout is None else DONTWAIT
        self._end = time.monotonic() + self.timeout if self.timeout else 0.0

    @classmethod
    def within(cls, seconds: float) -> Deadline:
        """In so many seconds, whatever the socket's timeout."""
        self = cls.__new__(cls)
        self.timeout, self.flags = seconds, DONTWAIT
        self._end = time.monotonic() + seconds
        return self

    def left(self, most: float | None = None) -> float | None:
        """Seconds left, or ``most`` if that is less; None on a blocking socket, for ever.

        Raises:
            TimeoutError: There are none.
        """
        if self.timeout is None:
            return most
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left if most is None else min(left, most)


def complete(
    sock: socket.socket,
    events: int,
    call: Callable[[], _T],
    deadline: Deadline | None = None,
    *,
    again: float | None = None,
) -> _T:
    """Repeats a system call until it says neither EAGAIN nor EINTR, within the socket's timeout.

    Most often one wait is enough, which ``poll`` does at the least expense. All further ones are
    edge-triggered: Linux 6.1 reports a kernel TLS socket readable while only a part of a record is
    there, and a level-triggered wait would spin until the rest comes.

    Args:
        sock: Its ``gettimeout()`` bounds all waiting together.
        events: What to wait for: `READABLE` or `WRITABLE`.
        call: Makes the system call on the socket's descriptor.
        deadline: Of the operation that this is a part of; None starts a new one.
        again: Seconds after which it is repeated though there was no event.

    Returns:
        What the call returns.

    Raises:
        BlockingIOError: EAGAIN, and the operation is non-blocking.
        TimeoutError: The timeout ran out.
    """
    deadline = deadline or Deadline(sock)
    try:
        return uninterrupted(call)
    except BlockingIOError:
        if deadline.timeout == 0:
            raise
    until(sock, events, deadline.left(again))
    try:
        return uninterrupted(call)
    except BlockingIOError:
        deadline.left()
    with select.epoll(1) as poll:
        poll.register(_descriptor(sock), events | select.EPOLLET)
        while True:
            try:
                return uninterrupted(call)
            except BlockingIOError:
                poll.poll(deadline.left(again))


def until(sock: socket.socket, events: int, timeout: float | None) -> bool:
    """Waits until the socket is ready or has an error; False if it wasn't in time (in seconds)."""
    poll = select.poll()
    poll.register(_descriptor(sock), events)
    return bool(poll.poll(None if timeout is None else timeout * 1000))


def _descriptor(sock: socket.socket) -> int:
    """Of a socket that another thread may have closed: an OSError then, as of a system call."""
    if sock.fileno() < 0:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return sock.fileno()


def uninterrupted(call: Callable[[], _T]) -> _T:
    """EINTR is no error: the signal's Python handler has run, and may have raised (PEP 475)."""
    while True:
        try:
            return call()
        except InterruptedError:
            continue


class Lock(Protocol):
    """One of threading's, or a ``_ktls.Lane``."""

    def acquire(self, blocking: bool, timeout: float, /) -> bool:
        """Takes it, if it is to be had in that time."""

    def release(self) -> None:
        """Gives it back."""


def holding(lock: Lock, seconds: float, call: Callable[[], _T]) -> _T:
    """Makes a call with a lock, where `with` would wait for it without a limit.

    Raises:
        TimeoutError: It is not to be had within so many seconds.
    """
    taken: list[bool] = []
    try:
        # In C: a signal handler may raise as soon as Python runs again.
        taken.extend(map(lock.acquire, (True,), (seconds,)))
        if not taken[0]:
            raise TimeoutError
        return call()
    finally:
        if True in taken:
            lock.release()


@contextmanager
def non_blocking(sock: socket.socket) -> Iterator[None]:
    """System calls on this socket don't wait; its ``gettimeout()`` stays as it is."""
    blocking = os.get_blocking(sock.fileno())
    os.set_blocking(sock.fileno(), False)
    try:
        yield
    finally:
        os.set_blocking(sock.fileno(), blocking)
