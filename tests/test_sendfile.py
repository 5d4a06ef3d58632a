"""Socket.sendfile in all four modes: every byte once, and the file's position after it."""

from __future__ import annotations

import errno
import gzip
import io
import os
import random
import signal
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

import ktls
from ktls import RecordType, _ktls, files, offload, wait
from ktls.sending import KernelSender
from ktls.types import MAX_PAYLOAD

from . import conftest
from .conftest import (
    CONTENT,
    SIZE,
    Interrupted,
    InThread,
    MakePair,
    MakeRecordPair,
    Pair,
    fill,
    narrow,
    receive,
    tcp_pair,
)

DATA = RecordType.APPLICATION_DATA
GIB = 1 << 30


def wait_until_full(tls: ktls.Socket, peer: socket.socket) -> None:
    """Returns when the peer's queue, which nobody reads, doesn't grow any more."""
    poll, still, before = threading.Event(), 0, -1
    while still < 10:
        poll.wait(0.01)
        now = (
            len(peer.recv(1 << 22, socket.MSG_PEEK | socket.MSG_DONTWAIT)) if readable(peer) else 0
        )
        still = still + 1 if now == before and now else 0
        before = now


def readable(sock: socket.socket) -> bool:
    """Whether there is anything to read."""
    return wait.until(sock, wait.READABLE, 0)


def test_sizes(make_pair: MakePair, version: str, side: str, mode: str, tmp_path: Path) -> None:
    """Empty, one byte, a full record, one more, many: the count, the bytes, the position."""
    pair = make_pair(version, side, mode)
    path = tmp_path / "file"
    for size in (0, 1, 16384, 16385, 100000):
        path.write_bytes(CONTENT[:size])
        with path.open("rb") as file:
            assert pair.tls.sendfile(file) == size
            assert file.tell() == size
        assert receive(pair.peer, size) == CONTENT[:size]
    pair.tls.close()
    assert pair.peer.recv(1) == b""


def test_offset_and_count(make_pair: MakePair, mode: str, file: IO[bytes]) -> None:
    """The file's own position has no effect; a file shorter than asked ends the count."""
    pair = make_pair("TLSv1.3", "server", mode)
    for offset, count, sent in (
        (0, 1, 1),
        (5, 10, 10),
        (16383, 2, 2),
        (1000, 70000, 70000),
        (SIZE - 3, None, 3),
        (SIZE - 3, 3, 3),
        (SIZE - 3, 1000, 3),
        (SIZE, None, 0),
        (SIZE, 5, 0),
        (SIZE + 100, None, 0),
        (SIZE + 100, 5, 0),
    ):
        file.seek(77)
        assert pair.tls.sendfile(file, offset, count) == sent
        assert file.tell() == offset + sent
        assert receive(pair.peer, sent) == CONTENT[offset : offset + sent]


def test_bad_arguments(make_pair: MakePair, mode: str, file: IO[bytes], tmp_path: Path) -> None:
    """Refused as by ``socket.socket.sendfile``; the file isn't moved, the connection is fine."""
    pair = make_pair("TLSv1.3", "server", mode)
    file.seek(7)
    with open(__file__, encoding="utf-8") as text, pytest.raises(ValueError, match="binary"):
        pair.tls.sendfile(text)  # type: ignore[arg-type]
    for count in (0, -1):
        with pytest.raises(ValueError, match="positive"):
            pair.tls.sendfile(file, 0, count)
    with pytest.raises(ValueError, match="negative"):
        pair.tls.sendfile(file, -1)
    wrong: Any
    for wrong in ("1", 1.5):
        with pytest.raises(TypeError):
            pair.tls.sendfile(file, 0, wrong)
    assert file.tell() == 7
    with (tmp_path / "other").open("wb") as unreadable, pytest.raises(OSError, match=r"."):
        pair.tls.sendfile(unreadable, 0, 5)
    assert pair.tls.sendfile(file, 0, 5) == 5
    assert receive(pair.peer, 5) == CONTENT[:5]


@pytest.mark.parametrize("size", [0, 1, 300000])
def test_bytes_io(make_pair: MakePair, mode: str, size: int) -> None:
    """Anything that reads is sent, by reading it."""
    pair = make_pair("TLSv1.3", "server", mode)
    file = io.BytesIO(CONTENT[:size])
    assert pair.tls.sendfile(file) == size
    assert file.tell() == size
    half = CONTENT[size // 2 : size][: size // 4 + 1]
    assert pair.tls.sendfile(file, size // 2, size // 4 + 1) == len(half)
    expected = CONTENT[:size] + half
    assert receive(pair.peer, len(expected)) == expected


def test_pipe(make_pair: MakePair, in_thread: InThread, mode: str) -> None:
    """A pipe has a descriptor but no position."""
    pair = make_pair("TLSv1.3", "server", mode)
    reading, writing = os.pipe()
    with open(reading, "rb") as source, open(writing, "wb") as sink:
        sink.write(b"through a pipe")
        sink.flush()
        assert pair.tls.sendfile(source, 0, 7) == 7
        sink.close()
        assert pair.tls.sendfile(source) == 7
    assert receive(pair.peer, 14) == b"through a pipe"


@pytest.mark.parametrize("count", [20, None])
def test_size_that_is_not_told(make_pair: MakePair, mode: str, count: int | None) -> None:
    """A file of /proc is empty by its size, and isn't: it is read."""
    pair = make_pair("TLSv1.3", "server", mode)
    with open("/proc/self/limits", "rb") as file:
        content = file.read(count)
        assert pair.tls.sendfile(file, 0, count) == file.tell() == len(content) > 0
    assert receive(pair.peer, len(content)) == content


def test_offset_beyond_2_gib(make_pair: MakePair, mode: str, tmp_path: Path) -> None:
    pair = make_pair("TLSv1.3", "server", mode)
    offset = (1 << 31) + 5
    with (tmp_path / "sparse").open("w+b") as file:
        os.pwrite(file.fileno(), CONTENT[:100000], offset)
        assert pair.tls.sendfile(file, offset, 100000) == 100000
        assert file.tell() == offset + 100000
        assert receive(pair.peer, 100000) == CONTENT[:100000]


@pytest.mark.torture
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "timeout",
    [
        pytest.param(None, marks=pytest.mark.old_kernel, id="blocking"),
        pytest.param(60, marks=pytest.mark.new_kernel, id="timeout"),
    ],
)
def test_pitfall_12_more_than_2_gib(
    make_pair: MakePair, in_thread: InThread, mode: str, tmp_path: Path, timeout: float | None
) -> None:
    """More than one call of sendfile(2) moves: received, counted, and its last byte is right."""
    pair = make_pair("TLSv1.3", "server", mode)
    pair.tls.settimeout(timeout)
    pair.peer.settimeout(120)
    size = (1 << 31) + 1

    def drain() -> tuple[int, int]:
        buffer = bytearray(1 << 18)
        received = last = 0
        while count := pair.peer.recv_into(buffer):
            received += count
            last = buffer[count - 1]
        return received, last

    draining = in_thread(drain)
    with (tmp_path / "sparse").open("w+b") as file:
        os.pwrite(file.fileno(), b"\x55", size - 1)
        assert pair.tls.sendfile(file) == size
        assert file.tell() == size
    pair.tls.close()
    assert draining.result(120) == (size, 0x55)


@pytest.mark.parametrize("timeout", [0, 0.1], ids=["non-blocking", "timeout"])
@pytest.mark.parametrize("kind", ["file", "BytesIO"])
def test_pitfall_12_slow_reader(
    make_pair: MakePair,
    in_thread: InThread,
    version: str,
    mode: str,
    file: IO[bytes],
    kind: str,
    timeout: float,
) -> None:
    """The error tells how much went out; from there on everything arrives exactly once."""
    pair = make_pair(version, "server", mode)
    narrow(pair)
    source = file if kind == "file" else io.BytesIO(CONTENT)
    pair.tls.settimeout(timeout)
    error: Any = ktls.StalledError if timeout else ktls.WouldBlockError
    with pytest.raises(error) as caught:
        pair.tls.sendfile(source)
    sent = caught.value.sent
    assert 0 < sent < SIZE
    assert source.tell() == sent
    reading = in_thread(receive, pair.peer, SIZE)
    while sent < SIZE:
        try:
            sent += pair.tls.sendfile(source, sent)
        except error as again:
            sent += again.sent
        assert source.tell() == sent
        assert wait.until(pair.tls, wait.WRITABLE, 10)
    assert reading.result(20) == CONTENT


def test_timeout_is_of_progress(
    make_pair: MakePair, in_thread: InThread, mode: str, file: IO[bytes]
) -> None:
    """A reader that is slow but reads doesn't stall a file that takes longer than the timeout."""
    pair = make_pair("TLSv1.3", "server", mode)
    narrow(pair)
    pair.tls.settimeout(0.5)
    pace = threading.Event()

    def read_slowly() -> bytes:
        received = b""
        while len(received) < SIZE:
            received += receive(pair.peer, min(300000, SIZE - len(received)))
            pace.wait(0.15)
        return received

    reading = in_thread(read_slowly)
    assert pair.tls.sendfile(file) == SIZE
    assert reading.result(20) == CONTENT


@pytest.mark.kernel
@pytest.mark.timeout(20)
@pytest.mark.parametrize("corked", [0, 1])
@pytest.mark.parametrize("by_lane", [True, False])
@pytest.mark.parametrize("timeout", [None, 5, 0], ids=["blocking", "timeout", "non-blocking"])
def test_small_send_buffer(
    make_pair: MakePair,
    in_thread: InThread,
    file: IO[bytes],
    timeout: float | None,
    by_lane: bool,
    corked: int,
) -> None:
    """A record fills it, which TCP is told is only a part: it goes out, and TCP_CORK stays."""
    pair = make_pair("TLSv1.3")
    pair.tls.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    pair.tls.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, corked)
    pair.tls.settimeout(timeout)
    if not by_lane:
        pair.tls._lane = None
    size = 100_000
    reading = in_thread(receive, pair.peer, size)
    sent = 0
    while sent < size:
        try:
            sent += pair.tls.sendfile(file, sent, size - sent)
        except ktls.WouldBlockError as error:
            sent += error.sent
            assert wait.until(pair.tls, wait.WRITABLE, 5)
    assert reading.result(10) == CONTENT[:size]
    assert pair.tls.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK) == corked


@pytest.mark.kernel
@pytest.mark.timeout(20)
@pytest.mark.parametrize("timeout", [None, 5], ids=["blocking", "timeout"])
def test_small_window(
    make_pair: MakePair,
    in_thread: InThread,
    monkeypatch: pytest.MonkeyPatch,
    file: IO[bytes],
    timeout: float | None,
) -> None:
    """The rest of a record goes out, too, which net/tls gives to TCP while the sender waits."""
    monkeypatch.setattr(conftest, "tcp_pair", partial(tcp_pair, (2304, 12000)))
    pair = make_pair("TLSv1.3")
    pair.tls.settimeout(timeout)
    reading = in_thread(receive, pair.peer, 50_000)
    assert pair.tls.sendfile(file, 0, 50_000) == 50_000
    assert reading.result(10) == CONTENT[:50_000]


@pytest.mark.kernel
def test_small_buffers_and_a_close(
    make_pair: MakePair, in_thread: InThread, monkeypatch: pytest.MonkeyPatch, file: IO[bytes]
) -> None:
    """In the midst of a file: what was reported arrives, and a clean end."""
    monkeypatch.setattr(conftest, "tcp_pair", partial(tcp_pair, (2304, 12000)))
    pair = make_pair("TLSv1.3")
    pair.tls.setblocking(False)
    with pytest.raises(ktls.WouldBlockError) as caught:
        pair.tls.sendfile(file)
    reading = in_thread(receive_all, pair)
    pair.tls.close_timeout = 10
    pair.tls.close()
    assert reading.result(10) == CONTENT[: caught.value.sent]


@pytest.mark.kernel
def test_send_after_a_part(make_pair: MakePair, in_thread: InThread) -> None:
    """What a record under MSG_MORE fills empties without TCP's timer, of 0.2 s a record."""
    pair = make_pair("TLSv1.3")
    pair.tls.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    pair.tls.settimeout(None)
    reading = in_thread(receive, pair.peer, 500_000)
    start = time.monotonic()
    with pair.tls.cork():
        pair.tls.sendall(CONTENT[:500_000])
    assert time.monotonic() - start < 4
    assert reading.result(10) == CONTENT[:500_000]


@pytest.mark.parametrize("kind", ["file", "BytesIO"])
def test_peer_gone_in_the_middle(
    make_pair: MakePair, in_thread: InThread, version: str, mode: str, file: IO[bytes], kind: str
) -> None:
    """A typed error with what was sent; later calls go on raising."""
    pair = make_pair(version, "server", mode)
    narrow(pair)
    source = file if kind == "file" else io.BytesIO(CONTENT)

    def read_some_and_reset() -> None:
        receive(pair.peer, 50000)
        pair.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        pair.peer.close()

    reading = in_thread(read_some_and_reset)
    with pytest.raises(ktls.ConnectionLostError) as caught:
        pair.tls.sendfile(source)
    reading.result(5)
    assert 50000 <= caught.value.sent < SIZE
    assert source.tell() == caught.value.sent
    for call in (
        lambda: pair.tls.sendfile(source),
        lambda: pair.tls.sendfile(io.BytesIO(b"x")),
        lambda: pair.tls.send(b"x"),
        lambda: pair.tls.recv(1),
    ):
        with pytest.raises(ktls.ConnectionLostError):
            call()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("timeout", [None, 10], ids=["blocking", "timeout"])
@pytest.mark.parametrize("kind", ["file", "BytesIO"])
def test_signal_in_the_middle(
    make_record_pair: MakeRecordPair,
    in_thread: InThread,
    interrupting: Callable[[], None],
    mode: str,
    file: IO[bytes],
    kind: str,
    timeout: float | None,
) -> None:
    """Ctrl-C comes through, the file's position is right, and the connection goes on from there."""
    pair = make_record_pair("TLSv1.3", "server", mode)
    pair.tls.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
    pair.peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
    pair.tls.settimeout(timeout)
    source = file if kind == "file" else io.BytesIO(CONTENT)

    def interrupt() -> None:
        wait_until_full(pair.tls, pair.peer.sock)
        interrupting()

    stopping = in_thread(interrupt)
    with pytest.raises(Interrupted):
        pair.tls.sendfile(source)
    stopping.result(5)
    sent = source.tell()
    assert 0 < sent < SIZE
    reading = in_thread(pair.peer.receive_data, SIZE)
    assert pair.tls.sendfile(source, sent) == SIZE - sent
    assert reading.result(20) == CONTENT


def test_signal_that_does_not_raise(
    make_record_pair: MakeRecordPair, in_thread: InThread, mode: str, file: IO[bytes]
) -> None:
    """A handler that returns doesn't even show."""
    pair = make_record_pair("TLSv1.3", "server", mode)
    pair.tls.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
    pair.peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
    pair.tls.settimeout(None)
    seen: list[int] = []
    main = threading.get_ident()

    def interrupt_and_read() -> bytes:
        wait_until_full(pair.tls, pair.peer.sock)
        signal.pthread_kill(main, signal.SIGUSR1)
        return pair.peer.receive_data(SIZE)

    earlier = signal.signal(signal.SIGUSR1, lambda number, _frame: seen.append(number))
    try:
        reading = in_thread(interrupt_and_read)
        assert pair.tls.sendfile(file) == SIZE
        assert reading.result(20) == CONTENT
    finally:
        signal.signal(signal.SIGUSR1, earlier)
    assert seen == [signal.SIGUSR1]


def test_two_threads(
    make_record_pair: MakeRecordPair, in_thread: InThread, version: str, mode: str, file: IO[bytes]
) -> None:
    """One sends a file while the other receives."""
    pair = make_record_pair(version, "server", mode)
    half = SIZE // 2

    def send_records() -> None:
        for at in range(0, half, 8192):
            pair.peer.send(DATA, CONTENT[at : min(at + 8192, half)])

    futures = [
        in_thread(pair.tls.sendfile, file),
        in_thread(receive, pair.tls, half),
        in_thread(send_records),
    ]
    assert pair.peer.receive_data(SIZE) == CONTENT
    assert futures[1].result(20) == CONTENT[:half]
    assert futures[0].result(5) == SIZE


@pytest.mark.parametrize("left", [0, 5000, 400000])
def test_file_truncated_meanwhile(
    make_pair: MakePair, in_thread: InThread, mode: str, tmp_path: Path, left: int
) -> None:
    """The count says what was sent, what comes next arrives whole, and nothing twice."""
    pair = make_pair("TLSv1.3", "server", mode)
    narrow(pair)
    pair.tls.setblocking(False)
    path = tmp_path / "shrinking"
    path.write_bytes(CONTENT)
    with path.open("r+b") as file:
        with pytest.raises(ktls.WouldBlockError) as caught:
            pair.tls.sendfile(file)
        sent = caught.value.sent
        file.truncate(sent + left if left < SIZE - sent else SIZE - 1)
        end = os.fstat(file.fileno()).st_size
        reading = in_thread(receive_all, pair)
        pair.tls.settimeout(10)
        sent += pair.tls.sendfile(file, sent)
        assert file.tell() == sent
    # In userspace the record that stuck was read from the file before it was cut.
    assert sent == end or (
        pair.tls.tx.mode is not ktls.Mode.SOFTWARE and end <= sent <= end + 16384
    )
    pair.tls.sendall(b"and more after it" * 1000)
    pair.tls.close_timeout = 10
    pair.tls.close()
    assert reading.result(20) == CONTENT[:sent] + b"and more after it" * 1000


@pytest.mark.parametrize("more", [1, None])
def test_never_waits_at_the_end_of_a_file(
    make_pair: MakePair, version: str, mode: str, tmp_path: Path, more: int | None
) -> None:
    """However full the socket is there, and however much more was asked for.

    A kernel that meets the file's end (Linux 6.5 and later) sends its last record and waits for
    room, non-blocking or not. It takes a socket that lets in 16000 bytes, but not a record.
    """
    pair = make_pair(version, "server", mode)
    narrow(pair)
    pair.tls.setblocking(False)
    pair.peer.setblocking(False)
    path = tmp_path / "file"
    path.write_bytes(bytes(16000))
    count = None if more is None else 16000 + more

    def too_long(*_: object) -> None:
        raise TimeoutError("waits in the kernel")

    earlier = signal.signal(signal.SIGALRM, too_long)
    try:
        with path.open("rb") as file:
            for step in range(500):
                signal.setitimer(signal.ITIMER_REAL, 5)
                with suppress(ktls.WouldBlockError):
                    pair.tls.sendfile(file, 0, count)
                signal.setitimer(signal.ITIMER_REAL, 0)
                with suppress(ssl.SSLWantReadError):
                    pair.peer.recv((1000, 4096, 16384)[step % 3])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def receive_all(pair: Pair) -> bytes:
    """Everything until the end of the stream."""
    return receive(pair.peer, 1 << 40)


@pytest.mark.parametrize("kind", ["file", "BytesIO"])
@pytest.mark.parametrize("size", [0, 100, 20000])
def test_corked_header(
    make_record_pair: MakeRecordPair,
    version: str,
    mode: str,
    tmp_path: Path,
    kind: str,
    size: int,
) -> None:
    """A header sent with MSG_MORE shares the file's first record in the kernel; nothing sticks."""
    pair = make_record_pair(version, "server", mode)
    path = tmp_path / "body"
    path.write_bytes(CONTENT[:size])
    with path.open("rb") as opened:
        source = opened if kind == "file" else io.BytesIO(CONTENT[:size])
        pair.tls.sendall(b"header", socket.MSG_MORE)
        assert pair.tls.sendfile(source) == size
    expected = b"header" + CONTENT[:size]
    if pair.tls.tx.mode is ktls.Mode.SOFTWARE:
        record = pair.peer.receive_other_than_tickets()
        assert record == (DATA, expected[: ktls.MAX_PAYLOAD])
        expected = expected[ktls.MAX_PAYLOAD :]
    assert pair.peer.receive_data(len(expected)) == expected


def test_completed_sendfile_ends_its_record(
    make_record_pair: MakeRecordPair, mode: str, file: IO[bytes]
) -> None:
    """The peer needn't wait for the next call: four counts, four records."""
    pair = make_record_pair("TLSv1.3", "server", mode)
    for at in range(4):
        assert pair.tls.sendfile(file, at * 1000, 1000) == 1000
        record = pair.peer.receive_other_than_tickets()
        assert record == (DATA, CONTENT[at * 1000 : at * 1000 + 1000])


def test_position_when_reading_fails(make_pair: MakePair, mode: str) -> None:
    """The reader's own error comes through; what went out before it is counted."""
    pair = make_pair("TLSv1.3", "server", mode)

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise ZeroDivisionError
            return super().read(min(size, 1000) if size else 1000)

    file = Failing(CONTENT)
    with pytest.raises(ZeroDivisionError):
        pair.tls.sendfile(file)
    assert file.tell() == 1000
    assert receive(pair.peer, 1000) == CONTENT[:1000]


def test_non_blocking_sendfile_then_close(
    make_pair: MakePair, in_thread: InThread, version: str, mode: str, file: IO[bytes]
) -> None:
    """Pitfall 21 for files: what was reported arrives, and a clean end."""
    pair = make_pair(version, "server", mode)
    narrow(pair)
    pair.tls.setblocking(False)
    with pytest.raises(ktls.WouldBlockError) as caught:
        pair.tls.sendfile(file)
    reading = in_thread(receive_all, pair)
    pair.tls.close_timeout = 10
    with suppress(ktls.WouldBlockError):
        pair.tls.close()
    received = reading.result(20)
    assert len(received) >= caught.value.sent
    assert CONTENT.startswith(received)


def test_another_send_was_stuck(
    make_pair: MakePair, in_thread: InThread, mode: str, tmp_path: Path
) -> None:
    """A file isn't taken for the repetition of a send that would block: refused, or sent whole."""
    pair = make_pair("TLSv1.3", "server", mode)
    narrow(pair)
    pair.tls.setblocking(False)
    sent = fill(pair.tls, CONTENT)
    another = b"another file" * 5000
    with (tmp_path / "another").open("w+b") as file:
        file.write(another)
        file.flush()
        reading = in_thread(receive_all, pair)
        pair.tls.settimeout(10)
        try:
            assert pair.tls.sendfile(file) == 60000
            expected = CONTENT[:sent] + another
        except ValueError:
            assert pair.tls.tx.mode is ktls.Mode.USERSPACE
            expected = CONTENT
            pair.tls.sendall(CONTENT[sent:])
        pair.tls.close_timeout = 10
        pair.tls.close()
        assert reading.result(20) == expected


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["kernel", "tx-only"])
def test_signal_while_a_key_update_waits(
    make_record_pair: MakeRecordPair,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    file: IO[bytes],
) -> None:
    """What its handler raises comes through; the file's position tells what had gone out."""
    pair = make_record_pair("TLSv1.3", "server", mode, record_limit=8)

    def interrupted(*_args: object, **_keywords: object) -> int:
        raise Interrupted

    monkeypatch.setattr(offload, "can_rekey", lambda: True)
    monkeypatch.setattr(_ktls, "update_key", interrupted)
    with pytest.raises(Interrupted):
        pair.tls.sendfile(file, 10)
    assert file.tell() > 10
    assert pair.peer.receive_data(file.tell() - 10) == CONTENT[10 : file.tell()]


def test_error_of_the_file(
    make_record_pair: MakeRecordPair,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    file: IO[bytes],
) -> None:
    """A disk that can't be read is no connection that is lost."""
    pair = make_record_pair("TLSv1.3", "server", mode)

    def failing_read(*_args: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if pair.tls._lane is not None:
        lane = SimpleNamespace(
            sendfile=lambda owner, *what: owner._after_file(*what, 0, errno.EIO, None),
            send_part=lambda *_: (0, errno.EIO),
            nonblocking=True,
            sent=0,
            used=0,
        )
        monkeypatch.setattr(pair.tls, "_lane", lane)
        monkeypatch.setattr(pair.tls._sender, "lane", lane)
    monkeypatch.setattr(os, "pread", failing_read)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
        pair.tls.sendfile(file)
    assert not isinstance(caught.value, ktls.KTLSError)
    monkeypatch.undo()
    assert pair.tls.sendfile(file, 0, 1000) == 1000
    assert pair.peer.receive_data(1000) == CONTENT[:1000]


def test_compressed_file(make_pair: MakePair, mode: str, tmp_path: Path) -> None:
    """What it reads as is sent, not the bytes that its descriptor has."""
    pair = make_pair("TLSv1.3", "server", mode)
    with gzip.open(tmp_path / "file.gz", "wb") as file:
        file.write(b"plain" * 1000)
    with gzip.open(tmp_path / "file.gz") as file:
        assert pair.tls.sendfile(file) == 5000
    assert receive(pair.peer, 5000) == b"plain" * 1000


@pytest.mark.parametrize("buffering", [-1, 0], ids=["buffered", "unbuffered"])
def test_temporary_file(make_pair: MakePair, mode: str, buffering: int) -> None:
    """The wrapper that tempfile puts around a file doesn't hide its descriptor."""
    pair = make_pair("TLSv1.3", "server", mode)
    with tempfile.NamedTemporaryFile(buffering=buffering) as file:
        file.write(CONTENT[:50_000])
        file.flush()
        assert files.regular(file) == (file.fileno(), 50_000)
        assert pair.tls.sendfile(file) == file.tell() == 50_000
    assert receive(pair.peer, 50_000) == CONTENT[:50_000]


@pytest.mark.kernel
def test_the_descriptor_does_not_block_afterwards(
    make_pair: MakePair, in_thread: InThread, file: IO[bytes]
) -> None:
    """Receiving still waits; a timeout that is set, and detach, say what the descriptor does."""
    pair = make_pair("TLSv1.3", "server", "kernel")
    pair.tls.settimeout(None)
    assert pair.tls.sendfile(file, 0, 5) == 5
    assert receive(pair.peer, 5) == CONTENT[:5]
    assert not os.get_blocking(pair.tls.fileno())
    assert pair.tls.gettimeout() is None
    received = in_thread(pair.tls.recv, 4)
    pair.peer.sendall(b"late")  # before or after it waits: either is right
    assert received.result(10) == b"late"
    pair.tls.settimeout(5)
    pair.tls.settimeout(None)
    assert os.get_blocking(pair.tls.fileno())
    assert pair.tls.sendfile(file, 0, 5) == 5
    with socket.socket(fileno=pair.tls.detach()) as sock:
        assert os.get_blocking(sock.fileno())


@pytest.mark.kernel
def test_what_is_owed_goes_before_the_next_file(make_pair: MakePair, file: IO[bytes]) -> None:
    """The lane is shut while there is something to think about, and open again after it."""
    pair = make_pair("TLSv1.3", "server", "kernel")
    lane = pair.tls._lane
    assert lane is not None
    lane.attention = True
    assert lane.sendfile(pair.tls, file, 0, 5) is None
    assert lane.send(b"data", 0) is None
    assert pair.tls.sendfile(file, 0, 5) == 5
    assert not lane.attention
    used = lane.used
    assert lane.sendfile(pair.tls, file, 0, 5) == 5
    assert lane.send(b"data", 0) == 4
    assert lane.used == used + 2
    for wrong in (io.BytesIO(CONTENT), None):
        assert lane.sendfile(pair.tls, wrong, 0, 5) is None
    for offset, count in ((-1, 5), (0, 0), (0, -1), (SIZE, None)):
        assert lane.sendfile(pair.tls, file, offset, count) is None
    lane.used = lane.limit - 2
    assert lane.sendfile(pair.tls, file, 0, 5) is None
    assert lane.send(b"data", 0) is None
    for left in range(4):
        lane.used = lane.limit - left
        assert lane.sendfile(pair.tls, file, 0, None) is None
    lane.used = lane.limit - 4
    assert lane.sendfile(pair.tls, file, SIZE - 5, None) == 5
    assert lane.used == lane.limit - 3
    lane.used = used
    assert receive(pair.peer, 19) == 2 * CONTENT[:5] + b"data" + CONTENT[-5:]


@pytest.mark.kernel
def test_up_to_the_limit_of_a_key(make_pair: MakePair, file: IO[bytes]) -> None:
    """The lane sends so many full records as are left, and Python what is behind them."""
    pair = make_pair("TLSv1.3", "server", "kernel")
    tls, lane, stopped = pair.tls, pair.tls._lane, []
    assert lane is not None
    lane.used = lane.limit - 13
    owner = SimpleNamespace(_after_file=lambda *where: stopped.append(where[3:5]))
    lane.sendfile(owner, file, 0, None)
    assert stopped == [(10 * MAX_PAYLOAD, errno.EINTR)]
    assert file.tell() == 10 * MAX_PAYLOAD
    assert lane.used <= lane.limit - 2
    lane.used = 0
    assert tls.sendfile(file, file.tell(), 5) == 5
    assert receive(pair.peer, file.tell()) == CONTENT[: file.tell()]
    pair.tls.close()
    assert lane.fd == -1
    assert lane.send(b"data", 0) is None


def test_at_once_or_not_at_all(make_pair: MakePair, mode: str, file: IO[bytes]) -> None:
    """Nothing is read for it, neither a pipe nor anything that has no descriptor."""
    pair = make_pair("TLSv1.3", "server", mode)
    reading, writing = os.pipe()
    with (
        open(reading, "rb") as pipe,
        open(writing, "wb") as end,
        open("/proc/version", "rb") as proc,
    ):
        end.write(b"from the pipe")
        end.flush()
        for other in (io.BytesIO(CONTENT), pipe, proc):
            assert pair.tls.sendfile_at_once(other) is None
            assert pair.tls.sendfile_at_once(other, 0, 13) is None
        assert pipe.read(13) == b"from the pipe"
    if pair.tls._lane is None:
        assert pair.tls.sendfile_at_once(file, 0, 5) is None
    else:
        assert pair.tls.sendfile_at_once(file, 0, 5) == file.tell() == 5
        assert pair.tls.sendfile_at_once(file, SIZE - 5) == 5
        assert file.tell() == SIZE
        assert receive(pair.peer, 10) == CONTENT[:5] + CONTENT[-5:]


@pytest.mark.kernel
def test_timeout_set_during_a_sendfile(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch, file: IO[bytes]
) -> None:
    """By another thread: the next one doesn't take the descriptor for non-blocking."""
    pair = make_pair("TLSv1.3", "server", "kernel")
    pair.tls.settimeout(None)
    lane = pair.tls._lane
    assert lane is not None
    set_blocking = os.set_blocking

    def and_back(descriptor: int, blocking: bool) -> None:
        set_blocking(descriptor, blocking)
        pair.tls.settimeout(None)

    lane.attention = True
    with monkeypatch.context() as patched:
        patched.setattr(os, "set_blocking", and_back)
        assert pair.tls.sendfile(file, 0, 5) == 5
    assert os.get_blocking(pair.tls.fileno())
    assert not lane.nonblocking


@pytest.mark.kernel
def test_interrupted_after_the_system_call(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch, file: IO[bytes]
) -> None:
    """What a signal's handler raises then doesn't hide what was sent."""
    pair = make_pair("TLSv1.3", "server", "kernel")
    assert pair.tls._lane is not None

    def interrupted() -> None:
        raise Interrupted

    pair.tls._lane.attention = True
    with monkeypatch.context() as patched:
        patched.setattr(pair.tls._sender, "retry", interrupted)
        with pytest.raises(Interrupted):
            pair.tls.sendfile(file, 10, 5)
    assert file.tell() == 15
    assert pair.tls.sendfile(file, 15, 5) == 5
    assert receive(pair.peer, 10) == CONTENT[10:20]


@pytest.mark.kernel
@pytest.mark.parametrize("by_lane", [True, False])
def test_interrupted_at_any_time(
    make_pair: MakePair, in_thread: InThread, file: IO[bytes], by_lane: bool
) -> None:
    """The file's position tells what was sent, whenever a signal's handler raises."""
    pair = make_pair("TLSv1.3")
    sender = pair.tls._sender
    assert isinstance(sender, KernelSender)
    if not by_lane:
        pair.tls._lane = None
    reading = in_thread(receive_all, pair)
    chance = random.Random(0)  # noqa: S311 - no secret
    expected, interrupted, longest = b"", 0, 0.001

    def raising(_signal: int, _frame: object) -> None:
        raise Interrupted

    earlier = signal.signal(signal.SIGALRM, raising)
    try:
        for _ in range(100):
            begin = chance.randrange(SIZE)
            file.seek(begin)
            started = time.monotonic()
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, longest))
                pair.tls.sendfile(file, begin, 40_000)
                signal.setitimer(signal.ITIMER_REAL, 0)
                longest = time.monotonic() - started
            except Interrupted:
                interrupted += 1
            expected += CONTENT[begin : file.tell()]
            assert sender.lane.sent == len(expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    assert interrupted > 10
    pair.tls.close()
    assert reading.result(10) == expected


@pytest.mark.kernel
def test_a_file_that_is_empty_afterwards(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was sent of it before somebody cut it, and the socket was full, counts."""
    pair = make_pair("TLSv1.3", "server", "kernel")
    path = tmp_path / "cut"
    path.write_bytes(b"")
    lane = SimpleNamespace(
        sendfile=lambda owner, *what: owner._after_file(*what, 5, errno.EAGAIN, None)
    )
    with path.open("rb") as file, monkeypatch.context() as patched:
        patched.setattr(pair.tls, "_lane", lane)
        assert pair.tls.sendfile(file) == file.tell() == 5
