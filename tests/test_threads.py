"""Several threads on one connection: what one of them ends, no other goes on with."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import ktls
from ktls import Alert, RecordType, _ktls, tcp, wait
from ktls.types import AlertLevel

from .conftest import InThread, MakeRecordPair, tcp_pair
from .record_peer import RecordPair

DATA = RecordType.APPLICATION_DATA
CLOSE_NOTIFY = (RecordType.ALERT, bytes([AlertLevel.WARNING, Alert.CLOSE_NOTIFY]))
CONTENT = os.urandom(3 << 20)


def narrow_pair(make_record_pair: MakeRecordPair, version: str, mode: str) -> RecordPair:
    """A pair whose queues hold far less than `CONTENT`; it has time to close."""
    pair = make_record_pair(version, "server", mode, close_timeout=20)
    pair.tls.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
    pair.peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
    pair.tls.settimeout(20)
    pair.peer.sock.settimeout(20)
    return pair


def send_all(tls: ktls.Socket, path: Path | None) -> tuple[int, ktls.KTLSError | None]:
    """Sends `CONTENT`, perhaps from a file; how much of it went out, and what stopped it."""
    if path is None:
        try:
            tls.sendall(CONTENT)
        except ktls.KTLSError as error:
            return error.sent, error
        return len(CONTENT), None
    with path.open("rb") as file:
        try:
            assert tls.sendfile(file) == file.tell()
        except ktls.KTLSError as error:
            assert error.sent == file.tell()  # noqa: PT017
            return error.sent, error
        return file.tell(), None


def start_sending(
    pair: RecordPair, in_thread: InThread, tmp_path: Path, way: str
) -> Future[tuple[int, ktls.KTLSError | None]]:
    """A thread that sends, and by now waits for room."""
    path = None
    if way == "sendfile":
        path = tmp_path / "file"
        path.write_bytes(CONTENT)
    sending: Future[Any] = in_thread(send_all, pair.tls, path)
    wait_until_full(pair.tls)
    return sending


def wait_until_full(tls: ktls.Socket) -> None:
    """Returns when the send queue has something in it, and doesn't change any more."""
    pause, still, before = threading.Event(), 0, 0
    while still < 5:
        pause.wait(0.01)
        now = tcp.unacknowledged(tls)
        still = still + 1 if now == before and now else 0
        before = now


def receive_to_end(pair: RecordPair) -> tuple[bytes, list[tuple[int, bytes]]]:
    """All data up to the first other record, and what came from that on."""
    data, after = bytearray(), list[tuple[int, bytes]]()
    try:
        while (record := pair.peer.receive_other_than_tickets()) is not None:
            if after or record[0] != DATA:
                after.append(record)
            else:
                data += record[1]
    except ConnectionResetError:
        assert after  # the end of the connection, not of what was to be read
    return bytes(data), after


ENDS = [
    ("TLSv1.2", "shutdown"),
    ("TLSv1.3", "shutdown"),
    ("TLSv1.2", "close"),
    ("TLSv1.3", "close"),
    ("TLSv1.2", "answer"),
]


@pytest.mark.parametrize(("version", "end"), ENDS, ids=["-".join(each) for each in ENDS])
@pytest.mark.parametrize("way", ["sendall", "sendfile"])
def test_end_during_a_send(
    make_record_pair: MakeRecordPair,
    in_thread: InThread,
    tmp_path: Path,
    version: str,
    mode: str,
    way: str,
    end: str,
) -> None:
    """What was reported as sent arrives, and then close_notify; nothing follows that."""
    pair = narrow_pair(make_record_pair, version, mode)
    sending = start_sending(pair, in_thread, tmp_path, way)
    ending = in_thread(END[end], pair)
    data, after = receive_to_end(pair)
    ending.result(20)
    sent, error = sending.result(20)
    assert isinstance(error, ktls.ClosedForWritingError) or sent == len(CONTENT)
    assert sent <= len(data)
    assert data == CONTENT[: len(data)]
    assert after == [CLOSE_NOTIFY]


def _answer(pair: RecordPair) -> None:
    """The peer closes, which TLS 1.2 answers; the rest, if it must wait, is for close()."""
    pair.peer.send(*CLOSE_NOTIFY)
    assert pair.tls.recv(1) == b""
    pair.tls.close()


END: dict[str, Callable[[RecordPair], object]] = {
    "shutdown": lambda pair: pair.tls.shutdown(socket.SHUT_WR),
    "close": lambda pair: pair.tls.close(),
    "answer": _answer,
}


@pytest.mark.parametrize("end", ["shutdown", "close"])
def test_end_cuts_a_send_short(
    make_record_pair: MakeRecordPair,
    in_thread: InThread,
    tmp_path: Path,
    version: str,
    mode: str,
    end: str,
) -> None:
    """Whoever closes needn't wait for all that another thread would still send."""
    pair = narrow_pair(make_record_pair, version, mode)
    sending = start_sending(pair, in_thread, tmp_path, "sendall")
    ending = in_thread(END[end], pair)
    closed = threading.Event()
    while pair.tls._sender is not None and pair.tls._sender._closed is None:  # type: ignore[attr-defined]
        closed.wait(0.001)
    data, after = receive_to_end(pair)
    ending.result(20)
    sent, error = sending.result(20)
    assert isinstance(error, ktls.ClosedForWritingError)
    assert sent <= len(data) < len(CONTENT)
    assert after == [CLOSE_NOTIFY]


@pytest.mark.parametrize("way", ["sendall", "sendfile"])
def test_fatal_alert_during_a_send(
    make_record_pair: MakeRecordPair,
    in_thread: InThread,
    tmp_path: Path,
    version: str,
    mode: str,
    way: str,
) -> None:
    """A reader meets a bad record: of what another thread is sending nothing follows the alert."""
    pair = narrow_pair(make_record_pair, version, mode)
    sending = start_sending(pair, in_thread, tmp_path, way)
    pair.peer.send(99, b"what?")
    with pytest.raises(ktls.RecordError) as caught:
        pair.tls.recv(1)
    received = in_thread(receive_to_end, pair)
    sent, error = sending.result(20)
    assert isinstance(error, ktls.RecordError | ktls.ClosedForWritingError)
    pair.tls.close()
    data, after = received.result(20)
    assert sent <= len(data) < len(CONTENT)
    assert data == CONTENT[: len(data)]
    assert after == [(RecordType.ALERT, bytes([AlertLevel.FATAL, caught.value.alert]))]


def test_shutdown_ends_a_send_that_is_stuck(
    make_record_pair: MakeRecordPair, in_thread: InThread, tmp_path: Path, version: str, mode: str
) -> None:
    """SHUT_RDWR is how one thread frees another: a blocking send to a peer that never reads."""
    pair = narrow_pair(make_record_pair, version, mode)
    pair.tls.settimeout(None)
    sending = start_sending(pair, in_thread, tmp_path, "sendall")
    pair.tls.close_timeout = 0.1
    with pytest.raises(ktls.StalledError):
        pair.tls.shutdown(socket.SHUT_RDWR)
    sent, error = sending.result(5)
    assert 0 < sent < len(CONTENT)
    assert isinstance(error, BrokenPipeError | ConnectionResetError)


@pytest.mark.parametrize("when", ["before the wait", "after it"])
def test_number_of_a_closed_socket_is_used_again(
    make_record_pair: MakeRecordPair,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    mode: str,
    when: str,
) -> None:
    """A receive that outlives its socket doesn't read from what has the number now."""
    pair = make_record_pair(version, "server", mode)
    number, real = pair.tls.fileno(), _ktls.recv_record_into
    ours, theirs = tcp_pair()
    calls: list[int] = []

    def close_meanwhile(descriptor: int, buffer: memoryview, flags: int) -> tuple[int, int, bool]:
        calls.append(descriptor)
        if len(calls) == (1 if when == "before the wait" else 2):
            pair.tls.close()  # as another thread would
            os.dup2(ours.fileno(), number)
            raise BlockingIOError
        if len(calls) == 1:
            raise BlockingIOError
        return real(descriptor, buffer, flags)

    with ours, theirs:
        theirs.sendall(b"somebody else's")
        monkeypatch.setattr(_ktls, "recv_record_into", close_meanwhile)
        pair.tls.settimeout(0.2)
        with pytest.raises(OSError, match=r".") as caught:
            pair.tls.recv(100)
        assert caught.value.errno == errno.EBADF or isinstance(caught.value, ktls.StalledError)
        assert ours.recv(100, socket.MSG_DONTWAIT) == b"somebody else's"
        os.close(number)


def test_wait_on_a_closed_socket() -> None:
    """An OSError as for any system call on it."""
    left, right = tcp_pair()
    with left, right:
        left.settimeout(1)

        def closed_meanwhile() -> None:
            left.close()
            raise BlockingIOError

        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            wait.complete(left, wait.READABLE, closed_meanwhile)
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            wait.until(left, wait.READABLE, 1)
