"""The way of sends in C (`_ktls.Lane`, `_ktls.by_lane`), by itself and as `Socket` uses it."""

from __future__ import annotations

import copy
import errno
import functools
import gc
import inspect
import os
import pickle
import signal
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

import ktls
from ktls import _ktls
from ktls.files import SendableFile

from .conftest import CONTENT, SIZE, Interrupted, InThread, MakePair, narrow, receive

LIMIT = 100


def test_lane_of_nothing() -> None:
    """Records of no bytes are refused, also of one that was made already."""
    with open(os.devnull) as file:
        lane = _ktls.Lane(file.fileno(), 512, 0, LIMIT)
        with pytest.raises(ValueError, match="max_fragment"):
            lane.__init__(file.fileno(), 0, 0, LIMIT)
        assert lane.send(b"data", 0) == -errno.ENOTSOCK
    assert lane.acquire(blocking=False)


def test_lane_is_a_lock(in_thread: InThread, interrupting: Callable[[], None]) -> None:
    """As one of threading: for one at a time, perhaps with a timeout, and given back once."""
    lane = _ktls.Lane(-1, 512, 0, LIMIT)
    with lane:
        assert not lane.acquire(blocking=False)
        assert not lane.acquire(timeout=0.01)
        with pytest.raises(RuntimeError, match="handler"):
            lane.acquire()
        waiting = in_thread(lane.acquire, timeout=10)
    assert waiting.result(10)
    threading.Timer(0.1, interrupting).start()
    with pytest.raises(Interrupted):
        lane.acquire()
    lane.release()
    with pytest.raises(RuntimeError, match="unlocked"):
        lane.release()
    with pytest.raises(TypeError):
        lane.acquire(timeout="1")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12, of forking
def test_lock_of_a_thread_that_a_fork_left_behind(in_thread: InThread) -> None:
    """In the child nobody gives it back: who would wait for ever is told; its own lock it has."""
    lane, own = (_ktls.Lane(-1, 512, 0, LIMIT) for _ in range(2))
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with lane:
            held.set()
            assert forked.wait(20)

    def child() -> bool:
        own.release()
        try:
            lane.acquire()
        except RuntimeError as error:
            return "forked" in str(error) and own.acquire() and not lane.acquire(timeout=0)
        return False

    holding = in_thread(hold)
    assert held.wait(10)
    own.acquire()
    process = os.fork()
    if not process:
        signal.alarm(10)
        os._exit(0 if child() else 1)
    own.release()
    status = os.waitpid(process, 0)[1]
    forked.set()
    holding.result(10)
    assert status == 0
    with lane:
        pass


def test_lane_without_its_arguments() -> None:
    """It has nothing to send by, and nothing to crash on."""
    lane = _ktls.Lane.__new__(_ktls.Lane)
    with lane:
        pass
    with open(os.devnull, "rb", buffering=0) as file:
        assert lane.send(b"data", 0) is None
        assert lane.sendfile(None, file, 0, 1) is None
        with pytest.raises(TypeError):
            lane.sendfile(file, 0, 1)  # type: ignore[call-arg]


def test_sendfile_looks_like_a_function() -> None:
    """To documentation, to signatures and to whoever wraps it; its calls go by the lane."""
    method = ktls.Socket.sendfile
    assert list(inspect.signature(method).parameters) == ["self", "file", "offset", "count"]
    assert (method.__name__, method.__qualname__) == ("sendfile", "Socket.sendfile")
    assert (inspect.getdoc(method) or "").startswith("Sends a file; in the kernel")
    assert inspect.isroutine(method)
    assert functools.update_wrapper(functools.partial(method), method).__doc__ == method.__doc__
    assert gc.is_tracked(method)
    assert copy.copy(method) is copy.deepcopy([method])[0] is method
    assert pickle.loads(pickle.dumps(method)) is method  # noqa: S301 - our own
    assert weakref.ref(method)() is method
    made: Any = _ktls.by_lane(lambda _self, _file: 5)
    gone = weakref.ref(made)
    made.itself = made
    assert made(SimpleNamespace(_lane=None), None) == 5
    del made
    gc.collect()
    assert gone() is None


def test_ways_to_call_sendfile(make_pair: MakePair, mode: str, file: IO[bytes]) -> None:
    """By position, by name, on the class; what is no call of it is refused as a function does."""
    tls = (pair := make_pair("TLSv1.3", "server", mode)).tls
    assert tls.sendfile(file, 3, 5) == 5
    assert tls.sendfile(file, count=5, offset=3) == 5
    assert tls.sendfile(file=file, offset=3, count=5) == 5
    assert tls.sendfile(file, 3, count=5) == 5
    assert ktls.Socket.sendfile(tls, file, 3, 5) == 5
    assert functools.partial(tls.sendfile, file)(3, 5) == file.tell() - 3 == 5
    assert receive(pair.peer, 30) == 6 * CONTENT[3:8]
    for wrong in ((), (file, 3, 5, 7)):
        with pytest.raises(TypeError, match=r"sendfile\(\)"):
            tls.sendfile(*wrong)
    with pytest.raises(TypeError, match="unexpected keyword"):
        tls.sendfile(file, size=5)  # type: ignore[call-arg]
    with pytest.raises(AttributeError, match="_lane"):
        ktls.Socket.sendfile(object(), file)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="self"):
        ktls.Socket.sendfile()  # type: ignore[call-arg]


def test_overridden_sendfile(make_pair: MakePair, mode: str, file: IO[bytes]) -> None:
    """A subclass may have its own, and call the one that it is instead of."""

    class Mine(ktls.Socket):
        def sendfile(self, file: SendableFile, offset: int = 0, count: int | None = None) -> int:
            return 100 + super().sendfile(file, offset, count)

    pair = make_pair("TLSv1.3", "server", mode)
    pair.tls.__class__ = Mine
    assert pair.tls.sendfile(file, 0, 5) == 105
    assert receive(pair.peer, 5) == CONTENT[:5]


@pytest.mark.kernel
def test_unbuffered_file(make_pair: MakePair, tmp_path: Path, in_thread: InThread) -> None:
    """Its position is its descriptor's, which is moved; unless it was closed meanwhile."""
    pair = make_pair("TLSv1.3", "server", "kernel")
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    with path.open("rb", buffering=0) as file:
        assert pair.tls.sendfile(file, 3, 5) == 5
        assert file.tell() == os.lseek(file.fileno(), 0, os.SEEK_CUR) == 8
        assert file.read(4) == CONTENT[8:12]
        received = in_thread(receive, pair.peer, 5 + SIZE)
        assert pair.tls.sendfile(file) == file.tell() == SIZE
        assert received.result(60) == CONTENT[3:8] + CONTENT
    file = path.open("rb", buffering=0)
    owner = SimpleNamespace(gettimeout=file.close)  # which returns None, like that of who waits
    lane = pair.tls._lane
    assert lane is not None
    with pytest.raises(ValueError, match="closed file"):
        all(iter(lambda: lane.sendfile(owner, file, 0, None), None))


@pytest.mark.kernel
def test_wait_of_a_sendfile(make_pair: MakePair, file: IO[bytes]) -> None:
    """In C: what ended it, and how much of the timeout is left; an error of that comes through."""
    pair = make_pair("TLSv1.3", "server", "kernel")
    lane = pair.tls._lane
    assert lane is not None
    narrow(pair)
    owner = SimpleNamespace(_after_file=lambda _file, _offset, _count, _sent, *ended: ended)

    def fill(timeout: float) -> object:
        owner.gettimeout = lambda: timeout
        while isinstance(done := lane.sendfile(owner, file, 0, None), int):
            assert done == SIZE
        return done

    assert fill(0.0) in (None, (errno.EAGAIN, 0.0))
    assert fill(0.3) == (errno.EAGAIN, 0.0)
    assert file.tell() < SIZE
    for wrong, kind in ((lambda: 1 / 0, ZeroDivisionError), (lambda: "1", TypeError)):
        owner.gettimeout = wrong
        with pytest.raises(kind):
            lane.sendfile(owner, file, 0, None)

    def think() -> float:
        lane.attention = True
        return 10.0

    owner.gettimeout = think
    number, left = lane.sendfile(owner, file, 0, None)  # type: ignore[misc]
    assert number == errno.EINTR
    assert 0 < left < 10


def stopped(tls: ktls.Socket, file: IO[bytes]) -> ktls.KTLSError | None:
    """What ends a sendfile."""
    try:
        tls.sendfile(file)
    except ktls.KTLSError as error:
        return error
    return None


@pytest.mark.kernel
@pytest.mark.parametrize("timeout", [0.0, 0.1])
def test_timeout_set_while_a_sendfile_waits(
    make_pair: MakePair, in_thread: InThread, tmp_path: Path, timeout: float
) -> None:
    """By another thread: it counts from then on."""
    pair = make_pair("TLSv1.3", "server", "kernel")
    narrow(pair)
    pair.tls.settimeout(None)
    assert pair.tls._lane is not None
    path = tmp_path / "big"
    path.write_bytes(4 * CONTENT)
    with path.open("rb") as big:
        sending = in_thread(stopped, pair.tls, big)
        before = -1
        while pair.tls._lane.sent != before:
            before = pair.tls._lane.sent
            threading.Event().wait(0.3)
        pair.tls.settimeout(timeout)
        error = sending.result(10)
        assert isinstance(error, ktls.StalledError if timeout else ktls.WouldBlockError)
        assert error.sent == big.tell() > 0


@pytest.mark.kernel
def test_short_calls_without_waiting(make_pair: MakePair, file: IO[bytes]) -> None:
    """What a signal cuts short, or a file that has less than it says, isn't a full socket."""
    pair = make_pair("TLSv1.3", "server", "kernel")
    pair.tls.settimeout(0)
    signals: list[int] = []
    earlier = signal.signal(signal.SIGALRM, lambda number, _frame: signals.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for _ in range(20):
            assert pair.tls.sendfile(file, 0, 50_000) == 50_000
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    assert signals
    assert receive(pair.peer, 1_000_000) == 20 * CONTENT[:50_000]
    with open("/sys/kernel/uevent_seqnum", "rb") as number:
        said = number.read()
        assert os.fstat(number.fileno()).st_size > len(said)
        assert pair.tls.sendfile(number) == len(said)
    assert receive(pair.peer, len(said)) == said


@pytest.mark.kernel
def test_handler_that_sends(make_pair: MakePair, in_thread: InThread, file: IO[bytes]) -> None:
    """A signal's handler that sends on the same socket gets its turn between two system calls."""
    pair = make_pair("TLSv1.3", "server", "kernel")
    sent: list[int] = []
    received = in_thread(receive, pair.peer, 20 * SIZE)
    earlier = signal.signal(signal.SIGALRM, lambda *_: sent.append(pair.tls.send(b"1234")))
    try:
        for _ in range(20):
            signal.setitimer(signal.ITIMER_REAL, 0.003)
            assert pair.tls.sendfile(file) == SIZE
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, earlier)
    assert sent
    rest = receive(pair.peer, 4 * len(sent)) if received.result(60) else b""
    assert len(rest) == 4 * len(sent)
