"""The end of a connection: what was reported as sent arrives, and whatever doesn't is an error."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ktls
from ktls import Alert, RecordType, closing, offload, tcp, wait
from ktls.control import key_update
from ktls.sending import KernelSender
from ktls.types import AlertLevel, HandshakeType, KeyUpdateRequest

from .conftest import (
    Identity,
    InThread,
    MakePair,
    MakeRecordPair,
    Pair,
    assert_all_counted,
    both_libraries,
    client_context,
    fill,
    in_kernel,
    narrow,
    receive,
    server_context,
    soon_full,
    tcp_pair,
)
from .record_peer import RecordPair, RecordPeer

DATA = RecordType.APPLICATION_DATA
CLOSE_NOTIFY = (RecordType.ALERT, bytes([AlertLevel.WARNING, Alert.CLOSE_NOTIFY]))
MIB = os.urandom(1 << 20)


def reset(sock: socket.socket) -> None:
    """Closes with a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def receive_to_end(pair: RecordPair) -> tuple[bytes, list[tuple[int, bytes]]]:
    """All data until close_notify or FIN, and what came after it."""
    data = bytearray()
    while True:
        record = pair.peer.receive_other_than_tickets()
        if record is None or record[0] != DATA:
            break
        data += record[1]
    after = []
    while record is not None:
        after.append(record)
        record = pair.peer.receive()
    return bytes(data), after


def send_for_ever(tls: ktls.Socket) -> None:
    while True:
        tls.send(b"data")


def last_record(peer: RecordPeer) -> tuple[int, bytes] | None:
    """The last record before FIN."""
    last = None
    while (record := peer.receive()) is not None:
        last = record
        if record == key_update(KeyUpdateRequest.NOT_REQUESTED):
            peer.follow_key_update()
    return last


def test_pitfall_21_non_blocking_send_then_close(
    make_record_pair: MakeRecordPair, in_thread: InThread, version: str, side: str, mode: str
) -> None:
    """Every byte that send() reported arrives, however slow the reader, and then close_notify."""
    pair = soon_full(make_record_pair, version, side, mode)
    pair.tls.close_timeout = 20
    sent = fill(pair.tls, MIB)
    received = in_thread(receive_to_end, pair)
    pair.tls.close()
    data, after = received.result(30)
    assert len(data) >= sent
    assert MIB.startswith(data)
    assert after == [CLOSE_NOTIFY]


@pytest.mark.parametrize("how", ["shutdown", "unwrap"])
def test_pitfall_21_before_other_ends(
    make_record_pair: MakeRecordPair, in_thread: InThread, version: str, mode: str, how: str
) -> None:
    """The same for shutdown() and unwrap(), which wait for room although the socket doesn't."""
    pair = soon_full(make_record_pair, version, "server", mode)
    pair.tls.close_timeout = 20
    sent = fill(pair.tls, MIB)
    received = in_thread(receive_to_end, pair)
    if how == "shutdown":
        pair.tls.shutdown(socket.SHUT_WR)
    else:
        with suppress(ktls.WouldBlockError):
            pair.tls.unwrap()
    pair.tls.close()
    data, after = received.result(30)
    assert len(data) >= sent
    assert MIB.startswith(data)
    assert after == [CLOSE_NOTIFY]


@pytest.mark.kernel
@pytest.mark.parametrize("how", ["close", "shutdown", "unwrap", "try_close"])
def test_no_fin_before_all_records_are_with_tcp(
    make_record_pair: MakeRecordPair,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    side: str,
    how: str,
) -> None:
    """Those that a full socket left in net/tls, as test_cpython's test_sendfile has it happen."""
    pair = make_record_pair(version, side, close_timeout=20)
    looks = []

    def held(_: KernelSender) -> int:
        looks.append(wait.until(pair.peer.sock, select.EPOLLRDHUP, 0))
        return max(0, 4 - len(looks))

    monkeypatch.setattr(KernelSender, "held", held)
    pair.tls.setblocking(False)
    pair.tls.send(b"data")
    if how == "close":
        pair.tls.close()
    elif how == "shutdown":
        pair.tls.shutdown(socket.SHUT_WR)
    elif how == "unwrap":
        with suppress(ktls.WouldBlockError):
            pair.tls.unwrap()
    else:
        while pair.tls.try_close() is not None:
            time.sleep(0.001)
    assert looks[:4] == [False] * 4
    pair.tls.close()
    assert receive_to_end(pair) == (b"data", [CLOSE_NOTIFY])


@pytest.mark.kernel
def test_no_fin_before_the_last_alert_is_with_tcp(
    make_record_pair: MakeRecordPair, side: str
) -> None:
    """After a key's limit, too, where the alert is the last word and no close_notify follows."""
    pair = make_record_pair("TLSv1.2", side, record_limit=8)
    with pytest.raises(ktls.KeyLimitError):
        send_for_ever(pair.tls)
    pair.tls.shutdown(socket.SHUT_WR)
    assert isinstance(pair.tls._sender, KernelSender)
    assert pair.tls._sender._end == tcp.written(pair.tls) - 1  # the FIN


@pytest.mark.kernel
def test_nothing_is_held_after_fin(make_record_pair: MakeRecordPair, version: str) -> None:
    """What is in net/tls then doesn't go out any more: there is nothing to wait for."""
    pair = make_record_pair(version)
    pair.tls.send_alert(Alert.CLOSE_NOTIFY)
    sender = pair.tls._sender
    assert isinstance(sender, KernelSender)
    assert sender._end is not None
    sender._end += 100
    assert sender.held() == 100
    socket.socket.shutdown(pair.tls, socket.SHUT_WR)
    assert sender.held() == 0


def test_receiving_does_not_wait_for_another_end(
    make_record_pair: MakeRecordPair, side: str, mode: str
) -> None:
    """TLS 1.2's answer to close_notify is sent at once or by who is at it already."""
    pair = make_record_pair("TLSv1.2", side, mode)
    pair.peer.send(*CLOSE_NOTIFY)
    pair.tls.setblocking(False)
    with pair.tls._closing:  # as of a thread in shutdown()
        assert wait.until(pair.tls, wait.READABLE, 5)
        assert pair.tls.recv(1) == b""
    pair.tls.close()
    assert pair.peer.receive() == CLOSE_NOTIFY


@pytest.mark.kernel
def test_where_the_records_end(
    make_record_pair: MakeRecordPair,
    in_thread: InThread,
    version: str,
    side: str,
    tmp_path: Path,
) -> None:
    """It is known to the byte, whatever was sent, and in the process that takes over."""
    pair = make_record_pair(version, side)
    received = in_thread(last_record, pair.peer)
    file = tmp_path / "file"
    file.write_bytes(MIB)
    pair.tls.sendall(MIB[:20000])
    with pair.tls.cork():
        for size in range(100):
            pair.tls.send(bytes(size))
    with file.open("rb") as source:
        pair.tls.sendfile(source)
        pair.tls.sendfile(source, 5, 40000)
    pair.tls.sendmsg([b"a", b"bc" * 10000])
    if version == "TLSv1.3" and offload.can_rekey():
        pair.tls.send(b"open", socket.MSG_MORE)
        pair.tls.update_keys()
        pair.tls.send(b"under the next key")
    pair.tls.send_record(RecordType.APPLICATION_DATA, b"a record")
    tls = ktls.Socket.from_state(os.dup(pair.tls.fileno()), pair.tls.detach_state())
    with tls:
        tls.sendall(MIB[:50000], socket.MSG_MORE)
        tls.send_alert(Alert.CLOSE_NOTIFY)
        assert_all_counted(tls)
    assert received.result(30) == CLOSE_NOTIFY


def test_client_with_unread_tickets(
    make_record_pair: MakeRecordPair, in_thread: InThread, mode: str
) -> None:
    """Tickets that nobody read would make close() reset the connection."""
    pair = make_record_pair("TLSv1.3", "client", mode, close_timeout=20)
    received = in_thread(receive_to_end, pair)
    for ticket in pair.peer.tickets:
        pair.peer.send(RecordType.HANDSHAKE, ticket)
    pair.tls.sendall(MIB)
    pair.tls.close()
    assert received.result(30) == (MIB, [CLOSE_NOTIFY])


def test_client_closes_before_tickets_come(
    make_record_pair: MakeRecordPair, in_thread: InThread, mode: str
) -> None:
    """Tickets on their way while the client closes don't cut its data either."""
    pair = make_record_pair("TLSv1.3", "client", mode, close_timeout=20)
    pair.tls.sendall(MIB[:100000])
    closing = in_thread(pair.tls.close)
    for ticket in pair.peer.tickets:
        pair.peer.send(RecordType.HANDSHAKE, ticket)
    assert receive_to_end(pair) == (MIB[:100000], [CLOSE_NOTIFY])
    closing.result(20)


def test_unread_data_does_not_cut_what_was_sent(
    make_record_pair: MakeRecordPair, in_thread: InThread, version: str, side: str, mode: str
) -> None:
    """Nor does data that came and that nobody read."""
    pair = make_record_pair(version, side, mode, close_timeout=20)
    pair.peer.send(DATA, b"never read" * 1000)
    received = in_thread(receive_to_end, pair)
    pair.tls.sendall(MIB)
    pair.tls.close()
    assert received.result(30) == (MIB, [CLOSE_NOTIFY])


def test_late_data_does_not_cut_what_was_sent(
    make_record_pair: MakeRecordPair, in_thread: InThread, version: str, side: str, mode: str
) -> None:
    """Nor does data that comes after close() has begun: an upload that was answered early."""
    pair = make_record_pair(version, side, mode, close_timeout=20)
    pair.peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    content = MIB[: 200 << 10]
    pair.tls.sendall(content)
    closing = in_thread(pair.tls.close)
    assert wait.until(pair.peer.sock, wait.READABLE, 10)
    pair.peer.send(DATA, b"too late")
    assert receive_to_end(pair) == (content, [CLOSE_NOTIFY])
    closing.result(20)


@pytest.mark.parametrize("what", ["key-update", "bad-record"])
def test_unreadable_records_do_not_cut_what_was_sent(
    make_record_pair: MakeRecordPair, in_thread: InThread, side: str, mode: str, what: str
) -> None:
    """Nor do records that can't be discarded by decrypting them."""
    pair = make_record_pair("TLSv1.3", side, mode, close_timeout=20)
    if what == "key-update":
        pair.peer.update_keys(requested=False)
    else:
        pair.peer.sock.sendall(bytes([DATA, 3, 3, 0, 100]) + bytes(100))
    for _ in range(10):
        pair.peer.send(DATA, bytes(10000))
    received = in_thread(receive_to_end, pair)
    pair.tls.sendall(MIB)
    pair.tls.close()
    assert received.result(30) == (MIB, [CLOSE_NOTIFY])


@both_libraries
def test_unwrap_again_with_a_record_half_read(
    make_record_pair: MakeRecordPair, in_thread: InThread, version: str, mode: str
) -> None:
    """A stalled unwrap() that is called again costs no data that came meanwhile."""
    pair = soon_full(make_record_pair, version, "server", mode)
    fill(pair.tls, MIB)
    with pytest.raises(ktls.StalledError):
        pair.tls.unwrap()
    pair.peer.send(DATA, b"0123456789")
    pair.tls.settimeout(5)
    assert pair.tls.recv(1) == b"0"
    received = in_thread(receive_to_end, pair)
    pair.tls.close_timeout = 20
    for _ in range(2):
        with pytest.raises(ktls.UnreadDataError):
            pair.tls.unwrap()
    assert pair.tls.recv(100) == b"123456789"
    pair.tls.close()
    assert received.result(20)[1] == [CLOSE_NOTIFY]


@both_libraries
def test_unwrap(make_record_pair: MakeRecordPair, version: str, side: str, mode: str) -> None:
    """We close first: the peer sees it, unwrap() waits for the peer's; again is harmless."""
    pair = make_record_pair(version, side, mode)
    pair.tls.settimeout(0.05)
    with pytest.raises(ktls.StalledError):
        pair.tls.unwrap()
    assert pair.peer.receive_other_than_tickets() == CLOSE_NOTIFY
    assert pair.tls.gettimeout() == 0.05
    pair.tls.settimeout(5)
    pair.peer.send(*CLOSE_NOTIFY)
    pair.tls.unwrap()
    pair.tls.unwrap()
    assert pair.tls.recv(1) == b""
    pair.tls.close()
    assert pair.peer.receive() is None


@both_libraries
def test_unwrap_with_unread_data(make_record_pair: MakeRecordPair, version: str, mode: str) -> None:
    """UnreadDataError, and the data is still there."""
    pair = make_record_pair(version, "server", mode)
    pair.peer.send(DATA, b"unread")
    for _ in range(2):
        with pytest.raises(ktls.UnreadDataError):
            pair.tls.unwrap()
    assert pair.tls.recv(100) == b"unread"
    pair.peer.send(*CLOSE_NOTIFY)
    pair.tls.unwrap()


@pytest.mark.parametrize("again", ["unwrap", "shutdown", "close"])
@both_libraries
def test_stalled_close_notify_goes_out_later(
    make_record_pair: MakeRecordPair, in_thread: InThread, mode: str, again: str
) -> None:
    """After StalledError the same, or close(), finishes the job; nothing is cut in silence."""
    pair = soon_full(make_record_pair, "TLSv1.3", "server", mode)
    sent = fill(pair.tls, MIB)
    first = pair.tls.unwrap if again == "unwrap" else lambda: pair.tls.shutdown(socket.SHUT_WR)
    with pytest.raises(ktls.StalledError):
        first()
    received = in_thread(receive_to_end, pair)
    pair.tls.close_timeout = 20
    if again == "unwrap":
        with suppress(ktls.WouldBlockError):
            pair.tls.unwrap()
    elif again == "shutdown":
        pair.tls.shutdown(socket.SHUT_WR)
    pair.tls.close()
    data, after = received.result(20)
    assert len(data) >= sent
    assert MIB.startswith(data)
    assert after == [CLOSE_NOTIFY]


@both_libraries
def test_half_close(make_record_pair: MakeRecordPair, side: str, mode: str) -> None:
    """TLS 1.3: after SHUT_WR we go on reading (RFC 8446 section 6.1)."""
    pair = make_record_pair("TLSv1.3", side, mode)
    pair.tls.sendall(b"question")
    pair.tls.shutdown(socket.SHUT_WR)
    assert receive_to_end(pair) == (b"question", [CLOSE_NOTIFY])
    pair.peer.send(DATA, b"answer")
    pair.peer.send(*CLOSE_NOTIFY)
    assert pair.tls.recv(100) == b"answer"
    assert pair.tls.recv(100) == b""


def test_nothing_follows_close_notify(
    make_record_pair: MakeRecordPair, version: str, mode: str
) -> None:
    """What else would be answered isn't any more (RFC 8446 section 6.1)."""
    pair = make_record_pair(version, "client", mode)
    pair.tls.send_alert(Alert.CLOSE_NOTIFY)
    if version == "TLSv1.3":
        pair.peer.update_keys(requested=True)
    else:
        pair.peer.send(RecordType.HANDSHAKE, bytes([HandshakeType.HELLO_REQUEST, 0, 0, 0]))
    pair.peer.send(DATA, b"after")
    if version == "TLSv1.3" and in_kernel(pair.tls)[1] and not offload.can_rekey():
        with pytest.raises(ktls.RekeyUnsupportedError):
            pair.tls.recv(100)
        return
    assert pair.tls.recv(100) == b"after"
    pair.tls.close()
    assert receive_to_end(pair) == (b"", [CLOSE_NOTIFY])


@both_libraries
def test_answers_close_notify(
    make_record_pair: MakeRecordPair, version: str, side: str, mode: str
) -> None:
    """TLS 1.2 answers at once and is closed; TLS 1.3 may go on sending."""
    pair = make_record_pair(version, side, mode)
    pair.peer.send(*CLOSE_NOTIFY)
    assert pair.tls.recv(1) == b""
    if version == "TLSv1.2":
        assert pair.peer.receive() == CLOSE_NOTIFY
        with pytest.raises(ktls.ClosedForWritingError):
            pair.tls.send(b"late")
    else:
        pair.tls.sendall(b"more")
        assert pair.peer.receive_data(4) == b"more"


def test_answer_does_not_block_a_reader(make_record_pair: MakeRecordPair, mode: str) -> None:
    """A non-blocking recv() that meets close_notify returns at once, though nothing fits."""
    pair = soon_full(make_record_pair, "TLSv1.2", "server", mode)
    pair.tls.close_timeout = 3
    fill(pair.tls, MIB)
    pair.peer.send(*CLOSE_NOTIFY)
    assert wait.until(pair.tls, wait.READABLE, 5)
    started = time.monotonic()
    assert pair.tls.recv(1) == b""
    assert time.monotonic() - started < 1
    pair.tls.close_timeout = 0.1


@pytest.mark.parametrize("how", ["shutdown", "shutdown-both", "unwrap", "close"])
def test_pitfall_13_and_23_write_after_end(
    make_record_pair: MakeRecordPair, mode: str, how: str
) -> None:
    """A write after the end is an error, each time and by each method; the kernel says success."""
    pair = make_record_pair("TLSv1.3", "server", mode)
    if how == "unwrap":
        pair.peer.send(*CLOSE_NOTIFY)
        pair.tls.unwrap()
    elif how == "close":
        pair.tls.close()
    else:
        pair.tls.shutdown(socket.SHUT_WR if how == "shutdown" else socket.SHUT_RDWR)
    with open(__file__, "rb") as file:
        for call in (
            lambda: pair.tls.send(b"x"),
            lambda: pair.tls.sendall(b"x"),
            lambda: pair.tls.sendmsg([b"x"]),
            lambda: pair.tls.sendfile(file),
            lambda: pair.tls.send_record(DATA, b"x"),
        ):
            with pytest.raises(ktls.ClosedForWritingError) as caught:
                call()
            assert isinstance(caught.value, BrokenPipeError)
    pair.tls.close()
    assert receive_to_end(pair) == (b"", [CLOSE_NOTIFY])


@pytest.mark.parametrize("by", ["recv", "send", "SO_ERROR"])
def test_pitfall_23_and_24_reset_stays(
    make_record_pair: MakeRecordPair, version: str, mode: str, by: str
) -> None:
    """ConnectionLostError, again and again, whoever took the kernel's one report of it."""
    pair = make_record_pair(version, "server", mode)
    reset(pair.peer.sock)
    poll = select.poll()
    poll.register(pair.tls, select.POLLIN)
    assert poll.poll(5000)
    if by == "SO_ERROR":
        assert pair.tls.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    elif by == "recv":
        with pytest.raises(ktls.ConnectionLostError):
            pair.tls.recv(1)
        pair.tls.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    with open(__file__, "rb") as file:
        for call in (
            lambda: pair.tls.send(b"x"),
            lambda: pair.tls.sendall(b"x"),
            lambda: pair.tls.sendfile(file),
            lambda: pair.tls.send_record(DATA, b"x"),
            lambda: pair.tls.recv(1),
        ):
            with pytest.raises(ktls.ConnectionLostError) as caught:
                call()
            assert isinstance(caught.value, ConnectionResetError)
            assert caught.value.sent == 0
    pair.tls.close()


def test_lost_count_is_of_that_call(
    make_record_pair: MakeRecordPair, in_thread: InThread, mode: str
) -> None:
    """``sent`` tells of the call that raises: the next one sent nothing."""
    pair = soon_full(make_record_pair, "TLSv1.3", "server", mode)
    pair.tls.settimeout(10)

    def read_some_and_reset() -> None:
        pair.peer.receive_data(100000)
        reset(pair.peer.sock)

    reading = in_thread(read_some_and_reset)
    with pytest.raises(ktls.ConnectionLostError) as caught:
        pair.tls.sendall(MIB * 4)
    assert caught.value.sent >= 100000
    reading.result(5)
    with pytest.raises(ktls.ConnectionLostError) as again:
        pair.tls.sendall(b"x")
    assert again.value.sent == 0


@pytest.mark.parametrize("part", [b"", b"\x17", b"\x17\x03\x03\x00\x50abc"])
def test_fin_without_close_notify(
    make_record_pair: MakeRecordPair, version: str, mode: str, part: bytes
) -> None:
    """b"" as with ``ssl``, or TruncationError if asked for; in the middle of a record too."""
    for suppress_ragged_eofs in (True, False):
        pair = make_record_pair(version, "server", mode, suppress_ragged_eofs=suppress_ragged_eofs)
        pair.peer.send(DATA, b"data")
        pair.peer.sock.sendall(part)
        pair.peer.sock.shutdown(socket.SHUT_WR)
        assert pair.tls.recv(100) == b"data"
        for _ in range(2):
            if suppress_ragged_eofs:
                assert pair.tls.recv(100) == b""
            else:
                with pytest.raises(ktls.TruncationError):
                    pair.tls.recv(100)
        pair.tls.sendall(b"we may still answer")
        assert pair.peer.receive_data(19) == b"we may still answer"


@both_libraries
def test_close_notify_is_no_truncation(
    make_record_pair: MakeRecordPair, version: str, mode: str
) -> None:
    pair = make_record_pair(version, "server", mode, suppress_ragged_eofs=False)
    pair.peer.send(DATA, b"data")
    pair.peer.send(*CLOSE_NOTIFY)
    pair.peer.sock.shutdown(socket.SHUT_WR)
    assert pair.tls.recv(100) == b"data"
    assert pair.tls.recv(100) == b""


@pytest.mark.parametrize("how", ["close", "shutdown", "unwrap"])
def test_pitfall_22_corked_data(
    make_record_pair: MakeRecordPair, version: str, mode: str, how: str
) -> None:
    """What MSG_MORE kept back goes out before close_notify."""
    pair = make_record_pair(version, "server", mode)
    pair.tls.sendall(b"corked", socket.MSG_MORE)
    if how == "close":
        pair.tls.close()
    elif how == "shutdown":
        pair.tls.shutdown(socket.SHUT_WR)
    else:
        pair.peer.send(*CLOSE_NOTIFY)
        pair.tls.unwrap()
        pair.tls.close()
    assert receive_to_end(pair) == (b"corked", [CLOSE_NOTIFY])


def test_corked_data_before_the_answer(make_record_pair: MakeRecordPair, mode: str) -> None:
    """Also where TLS 1.2 answers the peer's close_notify by itself."""
    pair = make_record_pair("TLSv1.2", "server", mode)
    pair.tls.sendall(b"corked", socket.MSG_MORE)
    pair.peer.send(*CLOSE_NOTIFY)
    assert pair.tls.recv(1) == b""
    pair.tls.close()
    assert receive_to_end(pair) == (b"corked", [CLOSE_NOTIFY])


def test_reader_that_never_reads(make_record_pair: MakeRecordPair, side: str, mode: str) -> None:
    """close() says so within close_timeout, and the descriptor is closed all the same."""
    pair = soon_full(make_record_pair, "TLSv1.3", side, mode)
    fill(pair.tls, MIB)
    started = time.monotonic()
    with pytest.raises(ktls.StalledError):
        pair.tls.close()
    assert time.monotonic() - started < 1.5
    assert pair.tls.fileno() == -1
    pair.tls.close()


@pytest.fixture
def signals() -> Iterator[list[int]]:
    """A signal every 20 ms, whose handler returns; a list of those that came."""
    came: list[int] = []
    earlier = signal.signal(signal.SIGALRM, lambda number, _frame: came.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    yield came
    signal.setitimer(signal.ITIMER_REAL, 0)
    time.sleep(0.02)  # the last one may have come to another thread, which hasn't run since
    signal.signal(signal.SIGALRM, earlier)


@pytest.mark.parametrize("how", ["close", "unwrap", "shutdown"])
def test_signals_do_not_hold_an_end(
    make_record_pair: MakeRecordPair, request: pytest.FixtureRequest, mode: str, how: str
) -> None:
    """``close_timeout`` is all that it takes, though each signal interrupts the system call."""
    pair = soon_full(make_record_pair, "TLSv1.3", "server", mode)
    pair.tls.close_timeout = 0.3
    sent, full_for = fill(pair.tls, MIB), 0
    while full_for < 2:  # a probe of the peer's window, after 0.2 s, makes a little room
        wait.until(pair.tls, wait.WRITABLE, 0.25)
        try:
            sent += pair.tls.send(memoryview(MIB)[sent:])
            full_for = 0
        except ktls.WouldBlockError:
            full_for += 1
    signals: list[int] = request.getfixturevalue("signals")
    calls: dict[str, Callable[[], None]] = {
        "close": pair.tls.close,
        "unwrap": pair.tls.unwrap,
        "shutdown": lambda: pair.tls.shutdown(socket.SHUT_WR),
    }
    started = time.monotonic()
    with pytest.raises(ktls.StalledError):
        calls[how]()
    assert time.monotonic() - started < 1
    assert len(signals) > 2


def test_flood_does_not_hold_close(
    make_record_pair: MakeRecordPair, in_thread: InThread, mode: str
) -> None:
    """A peer that sends faster than we discard can't hold close() beyond its time."""
    pair = make_record_pair("TLSv1.3", "server", mode, close_timeout=0.3)
    block = b"".join(pair.peer.tx.seal(DATA, bytes(16384)) for _ in range(600))
    pair.peer.sock.settimeout(8)
    flooded = threading.Event()

    def flood() -> None:
        with suppress(OSError):
            for _ in range(200 if not in_kernel(pair.tls)[1] else 1):
                pair.peer.sock.sendall(block)
        flooded.set()

    flooding = in_thread(flood)
    assert wait.until(pair.tls, wait.READABLE, 5)
    started = time.monotonic()
    with suppress(ktls.StalledError):
        pair.tls.close()
    assert time.monotonic() - started < 2.5
    flooding.result(20)


@pytest.mark.parametrize("timeout", [0, 7.5, None])
def test_timeouts_are_restored(
    make_record_pair: MakeRecordPair, mode: str, timeout: float | None
) -> None:
    """shutdown() blocks for a while; the socket is what it was afterwards."""
    pair = make_record_pair("TLSv1.3", "server", mode)
    wanted = struct.pack("@ll", 3, 0)
    pair.tls.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wanted)
    pair.tls.settimeout(timeout)
    pair.tls.shutdown(socket.SHUT_WR)
    assert pair.tls.gettimeout() == timeout
    assert os.get_blocking(pair.tls.fileno()) is (timeout is None)
    kept = pair.tls.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, len(wanted))
    assert struct.unpack("@ll", kept)[0] == 3
    if timeout == 0:
        with pytest.raises(ktls.WouldBlockError):
            pair.tls.recv(1)


@pytest.mark.parametrize(
    ("round_trip", "pauses"),
    [
        (20, [0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.05, 0.05]),
        (20_000, [0.025, 0.05, 0.05]),
        (90_000, [0.05, 0.05]),
    ],
)
def test_looks_for_acknowledgements(round_trip: int, pauses: list[float]) -> None:
    """The first after a round trip, which TCP tells in microseconds."""
    left, right = tcp_pair()
    with right:
        with left:
            assert 0 < tcp.round_trip(left) < 1
            info = bytes(68) + round_trip.to_bytes(4, sys.byteorder)
            with_info = SimpleNamespace(getsockopt=lambda *_: info)
            last = 0.0
            for pause in pauses:
                last = closing.next_pause(with_info, last)  # type: ignore[arg-type]
                assert last == pytest.approx(pause)
        assert closing.next_pause(left, 0) == 0.001  # it is closed


def test_peer_gone_before_close(make_record_pair: MakeRecordPair, version: str, mode: str) -> None:
    """close_notify is best effort then: no error from close(), shutdown() or unwrap() alone."""
    pair = make_record_pair(version, "client", mode)
    pair.tls.sendall(b"x")
    reset(pair.peer.sock)
    poll = select.poll()
    poll.register(pair.tls, 0)
    assert poll.poll(5000)
    started = time.monotonic()
    pair.tls.close()
    assert time.monotonic() - started < 2


def test_close_in_an_exception(make_pair: MakePair, mode: str) -> None:
    """``with`` closes, and the exception comes through."""
    pair: Pair = make_pair("TLSv1.3", "server", mode)
    with pytest.raises(ZeroDivisionError), pair.tls:
        raise ZeroDivisionError
    assert pair.tls.fileno() == -1
    assert pair.peer.recv(1) == b""


def test_detach(make_pair: MakePair, mode: str) -> None:
    """Gives the descriptor away; nothing is sent, nothing is closed."""
    pair = make_pair("TLSv1.3", "server", mode)
    descriptor = pair.tls.detach()
    pair.tls.close()
    os.fstat(descriptor)
    os.close(descriptor)
    assert receive(pair.peer, 1) == b""


@pytest.fixture(params=["server", "client"])
def unshaken(
    request: pytest.FixtureRequest, identity: Identity
) -> Iterator[tuple[ktls.Socket, socket.socket]]:
    """A socket whose handshake hasn't begun, and the other end, which is silent."""
    accepted, connecting = tcp_pair()
    server = request.param == "server"
    ours, theirs = (accepted, connecting) if server else (connecting, accepted)
    tls = ktls.wrap(
        ours,
        server_context(identity) if server else client_context(identity),
        server_side=server,
        server_hostname=None if server else "localhost",
        do_handshake_on_connect=False,
    )
    theirs.settimeout(5)
    with theirs:
        yield tls, theirs


def test_close_before_the_handshake(unshaken: tuple[ktls.Socket, socket.socket]) -> None:
    tls, theirs = unshaken
    tls.close()
    assert tls.fileno() == -1
    assert theirs.recv(100) == b""


def test_close_during_the_handshake(unshaken: tuple[ktls.Socket, socket.socket]) -> None:
    tls, theirs = unshaken
    tls.setblocking(False)
    for _ in range(2):
        with pytest.raises(ktls.WouldBlockError):
            tls.do_handshake()
    tls.close()
    tls.close()
    assert tls.fileno() == -1
    with pytest.raises(OSError, match=r"."):
        tls.do_handshake()
    hello = theirs.recv(1 << 16)
    assert hello == b"" or hello[0] == RecordType.HANDSHAKE


def test_narrow_stdlib_reader(
    make_pair: MakePair, in_thread: InThread, version: str, mode: str
) -> None:
    """The ``ssl`` module sees whole data and a clean end, too."""
    pair = make_pair(version, "server", mode, close_timeout=20)
    narrow(pair)
    pair.tls.setblocking(False)
    sent = fill(pair.tls, MIB)
    reading: Future[Any] = in_thread(receive, pair.peer, len(MIB))
    pair.tls.close()
    data = reading.result(20)
    assert sent <= len(data) <= sent + ktls.MAX_PAYLOAD
    assert MIB.startswith(data)
