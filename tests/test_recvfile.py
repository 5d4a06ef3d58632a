"""Socket.recvfile in all four modes: every byte once, at its place, whatever comes between."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

import ktls
from ktls import RecordType, _ktls, files, offload
from ktls.types import Alert, AlertLevel

from .bad_records import BadRecord, bad_in
from .conftest import Interrupted, InThread, MakePair, MakeRecordPair, in_kernel, version_each
from .record_peer import RecordPeer, notice_nothing

DATA, ALERT = RecordType.APPLICATION_DATA, RecordType.ALERT
CLOSE_NOTIFY = bytes([AlertLevel.WARNING, Alert.CLOSE_NOTIFY])
SIZE = 300_000
CONTENT = os.urandom(SIZE)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[IO[bytes]]:
    """An empty file, open for reading and writing."""
    with (tmp_path / "received").open("w+b") as opened:
        yield opened


def content(file: IO[bytes]) -> bytes:
    """All that is in a file; its position stays."""
    position = file.tell()
    file.seek(0)
    found = file.read()
    file.seek(position)
    return found


def send_all(peer: RecordPeer, data: bytes = CONTENT, size: int = 16384) -> None:
    """Sends data in records of a size."""
    for at in range(0, len(data), size):
        peer.send(DATA, data[at : at + size])


def test_sizes(
    make_pair: MakePair, in_thread: InThread, version: str, side: str, mode: str, file: IO[bytes]
) -> None:
    """One byte, a full record, one more, many: the count, the bytes, the position."""
    pair = make_pair(version, side, mode)
    at = 0
    sizes = (1, 16383, 16384, 16385, 100_000)
    sending = in_thread(pair.peer.sendall, CONTENT[: sum(sizes)])
    for size in sizes:
        assert pair.tls.recvfile(file, size) == size
        at += size
        assert file.tell() == at
    sending.result(20)
    assert content(file) == CONTENT[:at]
    # And into a file that has more: only what is received changes.
    pair.peer.sendall(b"new")
    assert pair.tls.recvfile(file, 3, offset=7) == 3
    assert file.tell() == 10
    assert content(file) == CONTENT[:7] + b"new" + CONTENT[10:at]


def test_until_the_end(
    make_pair: MakePair, in_thread: InThread, version: str, mode: str, file: IO[bytes]
) -> None:
    """Without a count up to close_notify; with one too large, too; then always 0."""
    pair = make_pair(version, "client", mode)

    def send_and_close() -> None:
        pair.peer.sendall(CONTENT)
        pair.peer.unwrap()

    sending = in_thread(send_and_close)
    assert pair.tls.recvfile(file, 1000) == 1000
    assert pair.tls.recvfile(file) == SIZE - 1000
    assert content(file) == CONTENT
    assert pair.tls.recvfile(file) == pair.tls.recvfile(file, 10) == 0
    assert pair.tls.recv(1) == b""
    assert file.tell() == SIZE
    pair.tls.close()
    sending.result(10)


def test_offset_beyond_2_gib(make_record_pair: MakeRecordPair, mode: str, file: IO[bytes]) -> None:
    pair = make_record_pair("TLSv1.3", "client", mode)
    pair.peer.send(DATA, b"far away")
    assert pair.tls.recvfile(file, 8, offset=5 << 30) == 8
    assert os.pread(file.fileno(), 100, 5 << 30) == b"far away"


def test_what_the_file_still_holds_goes_before(
    make_record_pair: MakeRecordPair, mode: str, file: IO[bytes]
) -> None:
    """A buffered file's own writes and ours keep their order."""
    pair = make_record_pair("TLSv1.3", "client", mode)
    pair.peer.send(DATA, b"body")
    file.write(b"head ")
    assert pair.tls.recvfile(file, 4) == 4
    file.write(b" tail")
    assert content(file) == b"head body tail"


def test_bad_arguments(make_record_pair: MakeRecordPair, mode: str, file: IO[bytes]) -> None:
    """Nothing is received then."""
    pair = make_record_pair("TLSv1.3", "client", mode)
    pair.peer.send(DATA, b"data")
    path = Path(str(file.name))
    wrong: list[dict[str, int]] = [{"count": 0}, {"count": -1}, {"count": 1, "offset": -1}]
    for arguments in wrong:
        with pytest.raises(ValueError, match="must"):
            pair.tls.recvfile(file, **arguments)
    with pytest.raises(TypeError):
        pair.tls.recvfile(file, 1.5)  # type: ignore[arg-type]
    with path.open("w") as text, pytest.raises(ValueError, match="binary"):
        pair.tls.recvfile(text)  # type: ignore[arg-type]
    with path.open("rb") as reading, pytest.raises(ValueError, match="open for writing"):
        pair.tls.recvfile(reading)
    assert pair.tls.recv(4) == b"data"


class _Stream(io.RawIOBase):
    """A file that can't seek and takes little at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.content = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:  # noqa: ANN401 - a buffer
        part = bytes(data[:1000])
        self.content += part
        return len(part)


def test_anything_with_write(make_record_pair: MakeRecordPair, mode: str, tmp_path: Path) -> None:
    """BytesIO, a stream, a file open for appending."""
    pair = make_record_pair("TLSv1.3", "client", mode)
    send_all(pair.peer, CONTENT[:30_000])
    memory, stream = io.BytesIO(b"...."), _Stream()
    assert pair.tls.recvfile(memory, 10_000, offset=4) == 10_000
    assert memory.getvalue() == b"...." + CONTENT[:10_000]
    assert pair.tls.recvfile(stream, 10_000) == 10_000
    assert stream.content == CONTENT[10_000:20_000]
    with pytest.raises(ValueError, match="seek"):
        pair.tls.recvfile(stream, 1, offset=5)
    path = tmp_path / "log"
    path.write_bytes(b"before")
    with path.open("ab") as appending:
        assert pair.tls.recvfile(appending, 10_000) == 10_000
    assert path.read_bytes() == b"before" + CONTENT[20_000:30_000]


def test_other_records_between(
    make_record_pair: MakeRecordPair, in_thread: InThread, version: str, mode: str, file: IO[bytes]
) -> None:
    """Tickets, KeyUpdates, warnings, empty records: each acted upon, none in the file."""
    pair = make_record_pair(version, "client", mode)
    tls13 = version == "TLSv1.3"
    rekeys = tls13 and (offload.can_rekey() or not any(in_kernel(pair.tls)))

    def send() -> None:
        for number, at in enumerate(range(0, SIZE, 9000)):
            pair.peer.send(DATA, CONTENT[at : at + 9000])
            kind = number % 4
            if kind == 0:
                pair.peer.send(DATA, b"")
            elif kind == 1 and tls13:
                for ticket in pair.peer.tickets:
                    pair.peer.send(RecordType.HANDSHAKE, ticket)
            elif kind == 2 and rekeys:
                pair.peer.update_keys(requested=False)
            elif kind == 3:
                warning = Alert.USER_CANCELED if tls13 else Alert.UNRECOGNIZED_NAME
                pair.peer.send(ALERT, bytes([AlertLevel.WARNING, warning]))
        pair.peer.send(ALERT, CLOSE_NOTIFY)

    sending = in_thread(send)
    assert pair.tls.recvfile(file) == SIZE
    assert content(file) == CONTENT
    assert not tls13 or pair.tls.get_session() is not None
    sending.result(10)


@pytest.mark.kernel
def test_splice_does_the_work(
    make_record_pair: MakeRecordPair,
    in_thread: InThread,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    file: IO[bytes],
) -> None:
    """No byte of data comes into this process."""
    pair = make_record_pair(version, "client")
    copied: list[int] = []
    received = _ktls.recv_record_into

    def counting(*arguments: Any) -> tuple[int, int, bool]:  # noqa: ANN401
        outcome = received(*arguments)
        copied.append(outcome[0] if outcome[1] == DATA else 0)
        return outcome

    monkeypatch.setattr(_ktls, "recv_record_into", counting)
    sending = in_thread(send_all, pair.peer)
    assert pair.tls.recvfile(file, SIZE) == SIZE
    sending.result(10)
    assert content(file) == CONTENT
    assert sum(copied) == 0


@pytest.mark.parametrize("size", [4096, 65536, 1 << 18])
def test_small_pipe(
    make_record_pair: MakeRecordPair,
    in_thread: InThread,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    file: IO[bytes],
    size: int,
) -> None:
    """Linux 6.1 loses what finds no room in a pipe: one that may be too small isn't used."""
    monkeypatch.setattr(files, "_PIPE_SIZES", (size,))
    pair = make_record_pair("TLSv1.3", "client", mode)
    sending = in_thread(send_all, pair.peer)
    assert pair.tls.recvfile(file, SIZE) == SIZE
    sending.result(10)
    assert content(file) == CONTENT


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may grow beyond a size: EFBIG, which is as good as ENOSPC."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_file_that_is_full(
    make_record_pair: MakeRecordPair, in_thread: InThread, version: str, mode: str, file: IO[bytes]
) -> None:
    """The file's own error; what it didn't take is the next that is received."""
    pair = make_record_pair(version, "client", mode)
    sending = in_thread(send_all, pair.peer)
    with largest_file(100_000), pytest.raises(OSError, match="File too large") as caught:
        pair.tls.recvfile(file)
    assert caught.value.errno == errno.EFBIG
    assert not isinstance(caught.value, ktls.KTLSError)
    assert file.tell() == 100_000
    assert content(file) == CONTENT[:100_000]
    # Again: still full, still nothing lost.
    with largest_file(100_000), pytest.raises(OSError, match="File too large"):
        pair.tls.recvfile(file, 10)
    assert pair.tls.recv(10, socket.MSG_PEEK) == CONTENT[100_000:100_010]
    if pair.tls.pending():
        with pytest.raises(ktls.KTLSError):
            pair.tls.detach_state()
    received = b""
    while len(received) < 1000:
        received += pair.tls.recv(1000 - len(received))
    assert received == CONTENT[100_000:101_000]
    memory = io.BytesIO()
    assert pair.tls.recvfile(memory, SIZE - 101_000) == SIZE - 101_000
    assert memory.getvalue() == CONTENT[101_000:]
    sending.result(10)
    assert pair.tls.pending() == 0


class _Failing(io.BytesIO):
    """A file whose first write raises."""

    failed = False

    def write(self, data: Any) -> int:  # noqa: ANN401 - a buffer
        if not self.failed:
            self.failed = True
            raise ZeroDivisionError
        return super().write(data)


def test_write_that_raises(make_record_pair: MakeRecordPair, mode: str) -> None:
    pair = make_record_pair("TLSv1.3", "client", mode)
    pair.peer.send(DATA, b"data")
    memory = _Failing()
    with pytest.raises(ZeroDivisionError):
        pair.tls.recvfile(memory, 4)
    assert pair.tls.recvfile(memory, 4) == 4
    assert memory.getvalue() == b"data"


@pytest.mark.parametrize("timeout", [0, 0.1], ids=["non-blocking", "timeout"])
def test_nothing_there(
    make_record_pair: MakeRecordPair, version: str, mode: str, file: IO[bytes], timeout: float
) -> None:
    """The error tells how much is in the file; from there it goes on."""
    pair = make_record_pair(version, "client", mode)
    error: Any = ktls.StalledError if timeout else ktls.WouldBlockError
    pair.peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    send_all(pair.peer, CONTENT[:20_000])
    record = pair.peer.tx.seal(DATA, CONTENT[20_000:30_000])
    pair.peer.sock.sendall(record[:5000])
    pair.tls.settimeout(5)
    assert pair.tls.recvfile(file, 15_000) == 15_000
    pair.tls.settimeout(timeout)
    cpu = time.thread_time()
    with pytest.raises(error) as caught:
        pair.tls.recvfile(file)
    assert time.thread_time() - cpu < 0.1
    assert caught.value.received == 5000
    assert caught.value.sent == 0
    assert file.tell() == 20_000
    pair.peer.sock.sendall(record[5000:])
    pair.peer.send(ALERT, CLOSE_NOTIFY)
    pair.tls.settimeout(5)
    assert pair.tls.recvfile(file) == 10_000
    assert content(file) == CONTENT[:30_000]


def test_timeout_is_of_progress(
    make_record_pair: MakeRecordPair, in_thread: InThread, mode: str, file: IO[bytes]
) -> None:
    """A sender that is slow but sends doesn't stall a file that takes longer than the timeout."""
    pair = make_record_pair("TLSv1.3", "client", mode)
    pair.tls.settimeout(0.5)
    pace = threading.Event()

    def send_slowly() -> None:
        for at in range(0, 40_000, 4000):
            pair.peer.send(DATA, CONTENT[at : at + 4000])
            pace.wait(0.1)

    sending = in_thread(send_slowly)
    assert pair.tls.recvfile(file, 40_000) == 40_000
    sending.result(10)
    assert content(file) == CONTENT[:40_000]


def test_pitfall_25_truncation(
    make_record_pair: MakeRecordPair, version: str, mode: str, file: IO[bytes]
) -> None:
    """A FIN without close_notify is an end, or an error if wanted; what came is in the file."""
    for suppress in (True, False):
        pair = make_record_pair(version, "client", mode, suppress_ragged_eofs=suppress)
        pair.peer.send(DATA, CONTENT[:5000])
        pair.peer.sock.sendall(pair.peer.tx.seal(DATA, b"cut")[:-1])
        pair.peer.sock.shutdown(socket.SHUT_WR)
        file.seek(0)
        if suppress:
            assert pair.tls.recvfile(file) == 5000
        else:
            with pytest.raises(ktls.TruncationError):
                pair.tls.recvfile(file)
        assert file.tell() == 5000
    assert content(file) == CONTENT[:5000]


# Those that end a connection by themselves, in either version.
BAD = ("corrupted", "too_long", "wrong_version", "too_short", "unknown_type")


@pytest.mark.parametrize(
    "bad", [bad for bad in bad_in("TLSv1.3") if bad.name in BAD], ids=lambda bad: bad.name
)
@pytest.mark.parametrize("together", [False, True], ids=["alone", "behind-data"])
def test_pitfall_27_bad_record(
    make_record_pair: MakeRecordPair,
    version: str,
    mode: str,
    file: IO[bytes],
    bad: BadRecord,
    together: bool,
) -> None:
    """What came before is in the file; the kernel tells the error once, we always."""
    pair = make_record_pair(version, "client", mode)
    before = pair.peer.tx.seal(DATA, CONTENT[:5000])
    wrong = bad.make(pair.peer.tx)
    if not together:
        pair.peer.sock.sendall(before)
        assert pair.tls.recvfile(file, 5000) == 5000
        before = b""
    pair.peer.sock.sendall(before + wrong)
    for _ in range(2):
        with pytest.raises(ktls.RecordError):
            pair.tls.recvfile(file)
    with pytest.raises(ktls.RecordError):
        pair.tls.recv(1)
    assert content(file) == CONTENT[:5000]
    assert file.tell() == 5000


def test_reset_in_the_middle(
    make_record_pair: MakeRecordPair, version: str, mode: str, file: IO[bytes]
) -> None:
    pair = make_record_pair(version, "client", mode)
    pair.peer.send(DATA, CONTENT[:5000])
    assert pair.tls.recvfile(file, 5000) == 5000
    pair.peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    pair.peer.sock.close()
    for _ in range(2):
        with pytest.raises(ktls.ConnectionLostError):
            pair.tls.recvfile(file)
    assert file.tell() == 5000


def test_data_before_a_reset(
    make_record_pair: MakeRecordPair, version: str, mode: str, file: IO[bytes]
) -> None:
    """They are in the file, though the kernel tells the reset first."""
    pair = make_record_pair(version, "client", mode)
    notice_nothing(pair.tls)
    send_all(pair.peer, CONTENT[:40_000])
    pair.peer.reset()
    assert pair.tls.recvfile(file, 5000) == 5000
    for _ in range(2):
        with pytest.raises(ktls.ConnectionLostError):
            pair.tls.recvfile(file)
    assert file.tell() == 40_000
    assert content(file) == CONTENT[:40_000]


@pytest.mark.parametrize("timeout", [None, 10], ids=["blocking", "timeout"])
def test_signal_in_the_middle(
    make_record_pair: MakeRecordPair,
    in_thread: InThread,
    interrupting: Callable[[], None],
    mode: str,
    file: IO[bytes],
    timeout: float | None,
) -> None:
    """Ctrl-C comes through, the file's position is right, and it goes on from there."""
    pair = make_record_pair("TLSv1.3", "client", mode)
    pair.tls.settimeout(timeout)
    send_all(pair.peer, CONTENT[:20_000])
    path = Path(str(file.name))

    def interrupt() -> None:
        pace = threading.Event()
        while path.stat().st_size < 20_000:
            pace.wait(0.01)
        interrupting()

    stopping = in_thread(interrupt)
    with pytest.raises(Interrupted):
        pair.tls.recvfile(file)
    stopping.result(5)
    assert file.tell() == 20_000
    send_all(pair.peer, CONTENT[20_000:30_000])
    assert pair.tls.recvfile(file, 10_000) == 10_000
    assert content(file) == CONTENT[:30_000]


def test_signal_that_does_not_raise(
    make_record_pair: MakeRecordPair, in_thread: InThread, mode: str, file: IO[bytes]
) -> None:
    """A handler that returns doesn't even show."""
    pair = make_record_pair("TLSv1.3", "client", mode)
    pair.tls.settimeout(None)
    seen: list[int] = []
    main = threading.get_ident()

    def interrupt_and_send() -> None:
        for at in range(0, SIZE, 30_000):
            signal.pthread_kill(main, signal.SIGUSR1)
            send_all(pair.peer, CONTENT[at : at + 30_000])

    earlier = signal.signal(signal.SIGUSR1, lambda number, _frame: seen.append(number))
    try:
        sending = in_thread(interrupt_and_send)
        assert pair.tls.recvfile(file, SIZE) == SIZE
        sending.result(20)
    finally:
        signal.signal(signal.SIGUSR1, earlier)
    assert content(file) == CONTENT
    assert set(seen) == {signal.SIGUSR1}


def test_both_directions_at_once(
    make_record_pair: MakeRecordPair, in_thread: InThread, version: str, mode: str, file: IO[bytes]
) -> None:
    """One thread sends a file, another receives one."""
    pair = make_record_pair(version, "client", mode)
    sending = in_thread(pair.tls.sendfile, io.BytesIO(CONTENT))
    peer_sending = in_thread(send_all, pair.peer)
    peer_receiving = in_thread(pair.peer.receive_data, SIZE)
    assert pair.tls.recvfile(file, SIZE) == SIZE
    assert sending.result(20) == SIZE
    assert peer_receiving.result(20) == CONTENT
    peer_sending.result(20)
    assert content(file) == CONTENT


# Goes on with a connection whose other end sends a file; strace looks on.
RECEIVER = """
import pickle, socket, sys
import ktls
channel = socket.socket(fileno=int(sys.argv[1]))
message, (descriptor,), *_ = socket.recv_fds(channel, 1 << 16, 1)
tls = ktls.Socket.from_state(descriptor, pickle.loads(message))
with open(sys.argv[2], "wb") as file:
    channel.sendall(b"%d" % tls.recvfile(file))
tls.close()
"""


@version_each
@pytest.mark.kernel
@pytest.mark.torture
@pytest.mark.timeout(600)
def test_gibibyte_with_a_thousand_other_records(
    make_record_pair: MakeRecordPair, in_thread: InThread, version: str, tmp_path: Path
) -> None:
    """Splice moves all of it, but a little around the other records; the hash is right."""
    pair = make_record_pair(version, "client")
    pair.peer.sock.settimeout(120)
    path, log = tmp_path / "received", tmp_path / "strace.log"
    ours, theirs = socket.socketpair()
    words = ["strace", "-f", "--seccomp-bpf", "-e", "trace=splice,recvmsg,recvfrom", "-o", str(log)]
    words += [sys.executable, "-c", RECEIVER, str(theirs.fileno()), str(path)]
    with ours, subprocess.Popen(words, pass_fds=[theirs.fileno()]) as receiver:
        theirs.close()
        state = pair.tls.detach_state(key_updates=True)
        socket.send_fds(ours, [pickle.dumps(state)], [pair.tls.fileno()])
        pair.tls.close()
        sending = in_thread(send_gibibyte, pair.peer, version == "TLSv1.3")
        ours.settimeout(500)
        assert int(ours.recv(100)) == 1 << 30
        assert receiver.wait(60) == 0
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    assert digest.digest() == sending.result(10)
    path.unlink()  # the next one needs the room
    calls = log.read_text(encoding="ascii").splitlines()
    socket_reads = [call for call in calls if "recvmsg(" in call or "recvfrom(" in call]
    copied = sum(max(0, int(call.rpartition("= ")[2].split()[0])) for call in socket_reads)
    assert copied < OTHERS * (16384 + 1000)
    assert sum(" splice(" in call for call in calls) > 1 << 16


OTHERS = 1000


def send_gibibyte(peer: RecordPeer, tls13: bool) -> bytes:
    """Sends 1 GiB with other records sprinkled in, and close_notify; returns the hash."""
    digest, block = hashlib.sha256(), os.urandom(1 << 20)
    others: list[tuple[int, bytes]] = [(DATA, b"")]
    if tls13:
        others += [(RecordType.HANDSHAKE, ticket) for ticket in peer.tickets]
        others += [(ALERT, bytes([AlertLevel.WARNING, Alert.USER_CANCELED]))]
    else:
        others += [(ALERT, bytes([AlertLevel.WARNING, Alert.UNRECOGNIZED_NAME]))]
    rekeys = tls13 and offload.can_rekey()
    for number in range(1024):
        digest.update(block)
        send_all(peer, block)
        if number >= OTHERS:
            continue
        if rekeys and number % 4 == 0:
            peer.update_keys(requested=False)
        else:
            peer.send(*others[number % len(others)])
    peer.send(ALERT, CLOSE_NOTIFY)
    return digest.digest()


def test_compressed_file(make_record_pair: MakeRecordPair, mode: str, tmp_path: Path) -> None:
    """It is written by its ``write``: what it has a descriptor of isn't what it takes."""
    pair = make_record_pair("TLSv1.3", "client", mode)
    send_all(pair.peer, CONTENT[:50_000])
    path = tmp_path / "received.gz"
    with gzip.open(path, "wb") as compressing:
        assert pair.tls.recvfile(compressing, 50_000) == 50_000
    with gzip.open(path) as reading:
        assert reading.read() == CONTENT[:50_000]


@pytest.mark.parametrize("buffering", [-1, 0], ids=["buffered", "unbuffered"])
def test_temporary_file(make_record_pair: MakeRecordPair, mode: str, buffering: int) -> None:
    """The wrapper that tempfile puts around a file doesn't hide its descriptor."""
    pair = make_record_pair("TLSv1.3", "client", mode)
    send_all(pair.peer, CONTENT[:50_000])
    with tempfile.NamedTemporaryFile(buffering=buffering) as temporary:
        assert files.regular(temporary)[0] == temporary.fileno()
        assert pair.tls.recvfile(temporary, 50_000) == 50_000
        assert os.pread(temporary.fileno(), SIZE, 0) == CONTENT[:50_000]


def test_write_that_takes_nothing(make_record_pair: MakeRecordPair, mode: str) -> None:
    """A ``write`` that returns 0 would block: no spinning, and no byte is lost."""
    pair = make_record_pair("TLSv1.3", "client", mode)
    pair.peer.send(DATA, b"0123456789")
    taken: list[int] = []

    class Stubborn(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:  # noqa: ANN401 - a buffer
            taken.append(min(4, len(data)) if not taken else 0)
            return taken[-1]

    with pytest.raises(BlockingIOError):
        pair.tls.recvfile(Stubborn(), 10)
    assert taken == [4, 0]
    assert pair.tls.recv(10) == b"456789"
