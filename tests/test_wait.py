"""wait.complete and wait.until, on plain sockets and below a connection."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from types import FrameType
from typing import Any

import pytest

import ktls
from ktls import RecordType, wait

from .conftest import InThread, MakeRecordPair, fill, in_kernel, tcp_pair


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connected TCP pair."""
    left, right = tcp_pair()
    with left, right:
        yield left, right


def test_blocking_call_is_made_once(pair: tuple[socket.socket, socket.socket]) -> None:
    """On a blocking socket the system call itself waits."""
    left, right = pair
    right.sendall(b"x")
    assert wait.complete(left, wait.READABLE, lambda: os.read(left.fileno(), 10)) == b"x"


def test_blocking_socket_with_dontwait(pair: tuple[socket.socket, socket.socket]) -> None:
    """MSG_DONTWAIT is one call's O_NONBLOCK: no wait follows."""
    left, _ = pair
    deadline = wait.Deadline(left, socket.MSG_DONTWAIT)
    calls = []

    def call() -> bytes:
        calls.append(1)
        return left.recv(10, socket.MSG_DONTWAIT)

    with pytest.raises(BlockingIOError):
        wait.complete(left, wait.READABLE, call, deadline)
    assert len(calls) == 1


def test_non_blocking_does_not_wait(pair: tuple[socket.socket, socket.socket]) -> None:
    left, _ = pair
    left.setblocking(False)
    calls = []

    def call() -> bytes:
        calls.append(1)
        return os.read(left.fileno(), 10)

    with pytest.raises(BlockingIOError):
        wait.complete(left, wait.READABLE, call)
    assert len(calls) == 1


def test_times_out(pair: tuple[socket.socket, socket.socket]) -> None:
    """After the socket's timeout, and not much before or after; two attempts are enough."""
    left, _ = pair
    left.settimeout(0.1)
    calls = []

    def call() -> bytes:
        calls.append(1)
        return os.read(left.fileno(), 10)

    started = time.monotonic()
    with pytest.raises(TimeoutError):
        wait.complete(left, wait.READABLE, call)
    assert 0.09 < time.monotonic() - started < 1
    assert len(calls) <= 3


def test_waits_for_data(
    pair: tuple[socket.socket, socket.socket], in_thread: Callable[..., Future[Any]]
) -> None:
    left, right = pair
    left.settimeout(10)
    calling = threading.Event()

    def call() -> bytes:
        calling.set()
        return os.read(left.fileno(), 10)

    def send() -> None:
        calling.wait(5)
        right.sendall(b"late")

    in_thread(send)
    assert wait.complete(left, wait.READABLE, call) == b"late"


def test_waits_for_room(
    pair: tuple[socket.socket, socket.socket], in_thread: Callable[..., Future[Any]]
) -> None:
    left, right = pair
    left.settimeout(10)
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    right.settimeout(5)
    total = 16 << 20
    received: list[int] = []

    def drain() -> None:
        while sum(received) < total:
            received.append(len(right.recv(1 << 20)))

    draining = in_thread(drain)
    sent = 0
    while sent < total:
        block = bytes(min(1 << 20, total - sent))
        sent += wait.complete(left, wait.WRITABLE, partial(os.write, left.fileno(), block))
    draining.result(10)
    assert sum(received) == total


def test_wait_is_edge_triggered(pair: tuple[socket.socket, socket.socket]) -> None:
    """Linux 6.1 calls a socket readable that has half a record: the wait doesn't spin on it."""
    left, right = pair
    left.settimeout(0.2)
    right.sendall(b"half")
    calls = []

    def call() -> bytes:
        calls.append(1)
        raise BlockingIOError

    with pytest.raises(TimeoutError):
        wait.complete(left, wait.READABLE, call)
    assert len(calls) <= 5


def test_edges_are_not_missed(
    pair: tuple[socket.socket, socket.socket], in_thread: Callable[..., Future[Any]]
) -> None:
    """Data that comes between the call and the wait ends the wait."""
    left, right = pair
    left.settimeout(10)
    right.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    expected = 200
    held = bytearray()

    def call() -> int:
        """Wants it all, and leaves nothing in the socket: each byte is an edge of its own."""
        held.extend(os.read(left.fileno(), 1))
        if len(held) < expected:
            right.sendall(b".")
            raise BlockingIOError
        return len(held)

    right.sendall(b".")
    assert wait.complete(left, wait.READABLE, call) == expected


def test_end_of_stream_wakes(
    pair: tuple[socket.socket, socket.socket], in_thread: Callable[..., Future[Any]]
) -> None:
    left, right = pair
    left.settimeout(10)
    in_thread(right.shutdown, socket.SHUT_WR)
    assert wait.complete(left, wait.READABLE, lambda: os.read(left.fileno(), 1)) == b""


def test_reset_wakes(
    pair: tuple[socket.socket, socket.socket], in_thread: Callable[..., Future[Any]]
) -> None:
    left, right = pair
    left.settimeout(10)
    right.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    in_thread(right.close)
    with pytest.raises(ConnectionResetError):
        wait.complete(left, wait.READABLE, lambda: os.read(left.fileno(), 1))


def test_eintr_is_no_error(pair: tuple[socket.socket, socket.socket]) -> None:
    """PEP 475: the call is made again, on every kind of socket."""
    left, _ = pair
    for timeout in (None, 0, 5):
        left.settimeout(timeout)
        answers: list[type[OSError] | int] = [InterruptedError, InterruptedError, 7]

        def call(answers: list[type[OSError] | int] = answers) -> int:
            answer = answers.pop(0)
            if isinstance(answer, int):
                return answer
            raise answer

        assert wait.complete(left, wait.READABLE, call) == 7


def test_other_errors_come_through(pair: tuple[socket.socket, socket.socket]) -> None:
    left, _ = pair
    left.settimeout(5)

    def call() -> int:
        raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        wait.complete(left, wait.READABLE, call)


class _Interrupted(Exception):  # noqa: N818 - what a signal handler raises
    pass


def test_signal_handler_may_raise(
    pair: tuple[socket.socket, socket.socket], in_thread: Callable[..., Future[Any]]
) -> None:
    """A handler that returns doesn't disturb the wait, one that raises ends it."""
    left, right = pair
    left.settimeout(10)
    seen = []
    waiting = threading.Event()
    main = threading.get_ident()

    def handler(_signal: int, _frame: FrameType | None) -> None:
        seen.append(1)
        if len(seen) == 3:
            raise _Interrupted

    def interrupt() -> None:
        for count in range(3):
            waiting.wait(5)
            signal.pthread_kill(main, signal.SIGUSR1)
            while len(seen) <= count:
                right.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def call() -> bytes:
        waiting.set()
        return os.read(left.fileno(), 1)

    earlier = signal.signal(signal.SIGUSR1, handler)
    try:
        interrupting = in_thread(interrupt)
        with pytest.raises(_Interrupted):
            wait.complete(left, wait.READABLE, call)
        interrupting.result(5)
    finally:
        signal.signal(signal.SIGUSR1, earlier)
    right.sendall(b"x")
    assert wait.complete(left, wait.READABLE, lambda: os.read(left.fileno(), 1)) == b"x"


@pytest.mark.parametrize("timeout", [None, 30], ids=["blocking", "timeout"])
def test_again_without_an_event(
    pair: tuple[socket.socket, socket.socket], timeout: float | None
) -> None:
    """For what changes in silence."""
    left, _ = pair
    left.settimeout(timeout)
    answers = iter([BlockingIOError, BlockingIOError, BlockingIOError, None])

    def call() -> int:
        if (error := next(answers)) is not None:
            raise error
        return 7

    assert wait.complete(left, wait.READABLE, call, again=0.01) == 7


def test_until(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    assert not wait.until(left, wait.READABLE, 0)
    assert not wait.until(left, wait.READABLE, 0.01)
    assert wait.until(left, wait.WRITABLE, None)
    right.sendall(b"x")
    assert wait.until(left, wait.READABLE, 5)
    assert wait.until(left, wait.READABLE, None)


def test_until_an_error(pair: tuple[socket.socket, socket.socket]) -> None:
    """A dead connection is as good as ready: the next call tells."""
    left, right = pair
    right.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    right.close()
    assert wait.until(left, wait.WRITABLE, 5)
    assert wait.until(left, wait.READABLE, 5)


def test_no_descriptor_stays_open(pair: tuple[socket.socket, socket.socket]) -> None:
    """Also when the wait ends by an error."""
    left, _ = pair
    before = set(os.listdir("/proc/self/fd"))
    left.settimeout(0.01)
    for _ in range(20):
        with pytest.raises(TimeoutError):
            wait.complete(left, wait.READABLE, lambda: os.read(left.fileno(), 1))
    assert set(os.listdir("/proc/self/fd")) == before


def test_no_descriptor_for_the_wait(
    make_record_pair: MakeRecordPair,
    in_thread: InThread,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    """The one call fails, by EMFILE; the connection goes on. The first wait needs none."""
    pair = make_record_pair("TLSv1.3", "server", mode)

    def none_left(_size: int) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as limited:
        limited.setattr(select, "epoll", none_left)
        limited.setattr(wait, "until", lambda *_: True)  # as by half a record
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            pair.tls.recv(1)
    pair.peer.send(RecordType.APPLICATION_DATA, b"data")
    assert pair.tls.recv(10) == b"data"
    pair.tls.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
    pair.tls.setblocking(False)
    content = bytes(4 << 20)
    sent = fill(pair.tls, content)
    pair.tls.setblocking(True)
    if in_kernel(pair.tls)[0]:  # OpenSSL's bytes are sent by a blocking call
        with monkeypatch.context() as limited:
            limited.setattr(select, "epoll", none_left)
            limited.setattr(wait, "until", lambda *_: True)
            with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
                pair.tls.send(content[sent:])
    receiving = in_thread(pair.peer.receive_data, len(content))
    pair.tls.sendall(content[sent:])
    assert receiving.result(20) == content


def test_dontwait_under_a_timeout(make_record_pair: MakeRecordPair, mode: str) -> None:
    """MSG_DONTWAIT is stronger than the socket's timeout."""
    pair = make_record_pair("TLSv1.3", "server", mode)
    pair.tls.settimeout(20)
    started = time.monotonic()
    for flags in (socket.MSG_DONTWAIT, socket.MSG_DONTWAIT | socket.MSG_PEEK):
        with pytest.raises(ktls.WouldBlockError):
            pair.tls.recv(1, flags)
    assert time.monotonic() - started < 5
