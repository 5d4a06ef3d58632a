"""What a peer must not send, or not so much of: an error that stays, no hang and no busy loop."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import ktls
from ktls import Alert, RecordType, offload, wait
from ktls.types import AlertLevel, HandshakeType

from .bad_records import BadRecord, bad_in
from .conftest import STDLIB_VERSIONS, InThread, MakeRecordPair, fill, in_kernel
from .record_peer import RecordPair, RecordPeer

FATAL, WARNING = AlertLevel.FATAL, AlertLevel.WARNING
DATA, HANDSHAKE = RecordType.APPLICATION_DATA, RecordType.HANDSHAKE
FLOOD = 10_000  # records
SHORT_FLOOD = 1000  # where each of them is acted upon
OPENSSL_EMPTY = 32  # records without data in a row that OpenSSL takes, and alerts
OPENSSL_WARNINGS = 4
OURS = 128  # and those of any kind that ktls takes

CASES = [
    pytest.param(version, bad, id=f"{bad.name}-{version}")
    for version in STDLIB_VERSIONS
    for bad in bad_in(version)
]


def later_calls(tls: ktls.Socket) -> dict[str, Callable[[], object]]:
    """Every way to use a connection."""
    return {
        "recv": partial(tls.recv, 100),
        "recv_into": partial(tls.recv_into, bytearray(100)),
        "recv_record": tls.recv_record,
        "send": partial(tls.send, b"x"),
        "sendall": partial(tls.sendall, b"x"),
        "sendfile": partial(_sendfile, tls),
        "update_keys": tls.update_keys,
        "unwrap": tls.unwrap,
    }


def _sendfile(tls: ktls.Socket) -> int:
    with Path(__file__).open("rb") as file:
        return tls.sendfile(file)


def assert_stays(tls: ktls.Socket, first: BaseException) -> None:
    """Every later call raises the same error, whoever reads SO_ERROR meanwhile (pitfall 24)."""
    for _ in range(2):
        for name, call in later_calls(tls).items():
            with pytest.raises(type(first)) as again:
                call()
            assert (name, str(again.value)) == (name, str(first))
            assert again.value is not first
            tls.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def read_on(tls: ktls.Socket) -> None:
    """Receives data up to the end, or to the error."""
    while tls.recv(100):
        pass


@contextmanager
def little_cpu(most: float) -> Iterator[None]:
    """What is done within takes this thread no more than so many seconds of CPU time."""
    before = time.thread_time()
    yield
    assert time.thread_time() - before <= most


def receive_alert(peer: RecordPeer) -> Alert:
    """Receives a fatal alert, after whatever else."""
    while True:
        record = peer.receive()
        assert record is not None, "no alert"
        if record[0] == RecordType.ALERT and record[1][0] == FATAL:
            return Alert(record[1][1])
        if record[0] == HANDSHAKE and record[1][0] == HandshakeType.KEY_UPDATE:
            peer.follow_key_update()


@pytest.mark.parametrize(("version", "bad"), CASES)
def test_pitfall_24_and_27_bad_record(
    make_record_pair: MakeRecordPair, version: str, mode: str, bad: BadRecord
) -> None:
    """The first error is typed, answered by its alert, and stays; what came before is delivered.

    Of a client: `test_tlslite` has the server.
    """
    pair = make_record_pair(version, "client", mode)
    pair.peer.send(DATA, b"before")
    assert pair.tls.recv(100) == b"before"
    pair.peer.sock.sendall(bad.make(pair.peer.tx))
    with little_cpu(0.5), pytest.raises(ktls.RecordError) as caught:
        read_on(pair.tls)
    assert caught.value.alert == bad.answer(version, mode)
    assert isinstance(caught.value, ktls.DecryptError) == (
        caught.value.alert is Alert.BAD_RECORD_MAC
    )
    assert_stays(pair.tls, caught.value)
    pair.tls.close()
    assert receive_alert(pair.peer) == caught.value.alert


@pytest.mark.parametrize(
    "name", ["wrong_version", "longer_than_tls12_allows", "too_short", "corrupted"]
)
def test_pitfall_24_error_is_read_before_the_record(
    make_record_pair: MakeRecordPair, version: str, mode: str, name: str
) -> None:
    """An event loop reads SO_ERROR first, and the kernel tells no more: recv() still knows."""
    pair = make_record_pair(version, "server", mode)
    bad = next(bad for bad in bad_in(version) if bad.name == name)
    pair.peer.sock.sendall(bad.make(pair.peer.tx))
    assert wait.until(pair.tls, wait.READABLE, 5)
    number = pair.tls.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    assert bool(number) == (name != "corrupted" and in_kernel(pair.tls)[1])
    with pytest.raises(ktls.RecordError) as caught:
        pair.tls.recv(100)
    assert caught.value.alert == bad.answer(version, mode)
    assert_stays(pair.tls, caught.value)
    pair.tls.close()
    assert receive_alert(pair.peer) == caught.value.alert


@pytest.mark.parametrize("side", ["client", "server"])
def test_pitfall_5_renegotiations_in_one_record(
    make_record_pair: MakeRecordPair, mode: str, side: str
) -> None:
    """Thousands of requests, from a peer that reads no answer: no thousands wait to be sent."""
    pair = make_record_pair("TLSv1.2", side, mode, close_timeout=0.1)
    pair.tls.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
    pair.peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
    pair.tls.setblocking(False)
    fill(pair.tls, bytes(1 << 20))
    kind = HandshakeType.HELLO_REQUEST if side == "client" else HandshakeType.CLIENT_HELLO
    for _ in range(10 if mode == "userspace" else 1):
        pair.peer.send(HANDSHAKE, bytes([kind, 0, 0, 0]) * 4096)
    assert wait.until(pair.tls, wait.READABLE, 5)
    # OpenSSL has no limit of its own: there it is that of what waits to be sent.
    goes_on = mode == "tx-only"
    with little_cpu(2), pytest.raises(ktls.WouldBlockError if goes_on else ktls.RecordError) as end:
        read_on(pair.tls)
    if not goes_on:
        assert_stays(pair.tls, end.value)
    assert len(getattr(pair.tls._sender, "_owed", ())) <= 2
    assert len(getattr(pair.tls._sender, "_wire", b"")) <= 5 << 18


def test_replay_delivers_once(make_record_pair: MakeRecordPair, version: str, mode: str) -> None:
    """The second of two equal records is no data."""
    pair = make_record_pair(version, "client", mode)
    pair.peer.sock.sendall(pair.peer.tx.seal(DATA, b"once") * 2 + pair.peer.tx.seal(DATA, b"more"))
    assert pair.tls.recv(4) == b"once"
    with pytest.raises(ktls.DecryptError) as caught:
        pair.tls.recv(100)
    assert_stays(pair.tls, caught.value)


def test_alert_survives_unread_data(
    make_record_pair: MakeRecordPair, version: str, mode: str
) -> None:
    """The peer learns what was wrong though it had sent more."""
    pair = make_record_pair(version, "server", mode)
    corrupted = bytearray(pair.peer.tx.seal(DATA, b"to be changed"))
    corrupted[-1] ^= 1
    pair.peer.sock.sendall(corrupted + pair.peer.tx.seal(DATA, bytes(10000)))
    with pytest.raises(ktls.DecryptError):
        pair.tls.recv(100)
    pair.tls.close()
    answer = pair.peer.receive_other_than_tickets()
    assert answer == (RecordType.ALERT, bytes([FATAL, Alert.BAD_RECORD_MAC]))


def test_change_cipher_spec_in_the_clear(
    make_record_pair: MakeRecordPair, version: str, side: str, mode: str
) -> None:
    """An error where the kernel reads it; OpenSSL's client drops it, its TLS 1.3 server doesn't.

    RFC 8446 section 5 lets it come until the peer's Finished, and wants unexpected_message then.
    """
    pair = make_record_pair(version, side, mode)
    pair.peer.sock.sendall(bytes([RecordType.CHANGE_CIPHER_SPEC, 3, 3, 0, 1, 1]))
    pair.peer.send(DATA, b"data")
    if version == "TLSv1.3" and side == "client" and not in_kernel(pair.tls)[1]:
        assert pair.tls.recv(100) == b"data"
        return
    with pytest.raises(ktls.RecordError) as caught:
        pair.tls.recv(100)
    expected = Alert.BAD_RECORD_MAC
    if version == "TLSv1.3" and not in_kernel(pair.tls)[1]:
        expected = Alert.UNEXPECTED_MESSAGE
    assert caught.value.alert == expected
    assert_stays(pair.tls, caught.value)
    pair.tls.close()
    assert receive_alert(pair.peer) == expected


@pytest.mark.parametrize("have", [1, 6, -1], ids=["byte", "header+1", "all-but-1"])
def test_pitfall_25_truncated_record(
    make_record_pair: MakeRecordPair, version: str, mode: str, have: int
) -> None:
    """A FIN within a record: b"", or TruncationError if asked for, and of the record nothing."""
    for ragged in (True, False):
        pair = make_record_pair(version, "server", mode, suppress_ragged_eofs=ragged)
        pair.peer.sock.sendall(pair.peer.tx.seal(DATA, b"never whole")[:have])
        pair.peer.sock.shutdown(socket.SHUT_WR)
        with little_cpu(0.5):
            for call in 2 * (
                partial(pair.tls.recv, 100),
                partial(pair.tls.recv, 100, socket.MSG_PEEK),
                partial(pair.tls.recv_into, bytearray(100)),
            ):
                with ended(ragged):
                    assert not call()
                pair.tls.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        # The other direction is whole.
        pair.tls.sendall(b"answer")
        assert pair.peer.receive_data(6) == b"answer"
        with ended(ragged):
            pair.tls.unwrap()
        assert pair.peer.receive() == (RecordType.ALERT, bytes([WARNING, Alert.CLOSE_NOTIFY]))


def ended(ragged: bool) -> AbstractContextManager[object]:
    """What is done within raises TruncationError, unless such ends are suppressed."""
    return nullcontext() if ragged else pytest.raises(ktls.TruncationError)


# -- records that are harmless one by one ------------------------------------------------------


def _empty(peer: RecordPeer) -> bytes:
    return peer.tx.seal(DATA, b"")


def _warning(peer: RecordPeer) -> bytes:
    return peer.tx.seal(RecordType.ALERT, bytes([WARNING, Alert.USER_CANCELED]))


def _hello_request(peer: RecordPeer) -> bytes:
    return peer.tx.seal(HANDSHAKE, bytes([HandshakeType.HELLO_REQUEST, 0, 0, 0]))


def _ticket(peer: RecordPeer) -> bytes:
    return peer.tx.seal(HANDSHAKE, peer.tickets[0])


def _key_update(peer: RecordPeer) -> bytes:
    return peer.seal_key_update(requested=False)


def _asking_key_update(peer: RecordPeer) -> bytes:
    return peer.seal_key_update(requested=True)


Make = Callable[[RecordPeer], bytes]
TLS12, TLS13 = "TLSv1.2", "TLSv1.3"
NOISE: list[tuple[str, Make]] = [
    *((TLS12, make) for make in (_empty, _warning, _hello_request)),
    *((TLS13, make) for make in (_empty, _warning, _ticket, _key_update, _asking_key_update)),
]
"""Records that bring no data to a client."""

noise = pytest.mark.parametrize(
    ("version", "make"),
    [pytest.param(version, make, id=f"{make.__name__[1:]}-{version}") for version, make in NOISE],
)


def needs_rekey(tls: ktls.Socket, make: Make) -> bool:
    """Whether the kernel has to replace keys for that."""
    tx, rx = in_kernel(tls)
    return (make in {_key_update, _asking_key_update} and rx) or (make is _asking_key_update and tx)


OPENSSL: dict[Make, int] = {_empty: OPENSSL_EMPTY, _warning: OPENSSL_WARNINGS}
"""What OpenSSL limits by itself."""


def answer_to_noise(tls: ktls.Socket, make: Make) -> Alert:
    """The alert; OpenSSL, which has nothing against the record, must be brought to send one."""
    if not any(in_kernel(tls)) and make not in OPENSSL:
        return Alert.BAD_RECORD_MAC
    return Alert.UNEXPECTED_MESSAGE


def most(tls: ktls.Socket, make: Make) -> int | None:
    """How many in a row are taken; None is no limit."""
    if in_kernel(tls)[1]:
        # The kernel passes over empty records within one recvmsg.
        return None if make is _empty else OURS
    return OPENSSL.get(make, OURS)


@noise
def test_pitfall_5_as_many_as_are_taken(
    make_record_pair: MakeRecordPair, version: str, mode: str, make: Make
) -> None:
    """So many in a row wake a reader, which waits idly; data ends the row; one more is too many."""
    pair = make_record_pair(version, "client", mode)
    if needs_rekey(pair.tls, make) and not offload.can_rekey():
        pair.peer.sock.sendall(make(pair.peer))
        with pytest.raises(ktls.RekeyUnsupportedError) as caught:
            pair.tls.recv(100)
        assert_stays(pair.tls, caught.value)
        return
    for data in (b"one", b"two"):
        for _ in range(most(pair.tls, make) or OURS):
            pair.peer.sock.sendall(make(pair.peer))
        pair.tls.setblocking(False)
        with pytest.raises(ktls.WouldBlockError):
            pair.tls.recv(100)
        if data == b"one":
            pair.tls.settimeout(0.6)
            started = time.monotonic()
            with little_cpu(0.4), pytest.raises(ktls.StalledError):
                pair.tls.recv(100)
            assert time.monotonic() - started >= 0.59
        pair.peer.send(DATA, data)
        pair.tls.settimeout(5)
        assert pair.tls.recv(100) == data
    limit = most(pair.tls, make)
    if limit is None:
        return
    for _ in range(limit + 1):
        pair.peer.sock.sendall(make(pair.peer))
    with pytest.raises(ktls.RecordError) as refused:
        pair.tls.recv(100)
    assert refused.value.alert is answer_to_noise(pair.tls, make)
    pair.tls.close()
    assert receive_alert(pair.peer) is answer_to_noise(pair.tls, make)


@noise
def test_pitfall_5_flood(
    make_record_pair: MakeRecordPair, in_thread: InThread, version: str, mode: str, make: Make
) -> None:
    """Thousands in a row: an error that stays, or where there is no limit the data after them."""
    pair = make_record_pair(version, "client", mode)
    if needs_rekey(pair.tls, make) and not offload.can_rekey():
        return  # the first one ends it: see above
    endless = most(pair.tls, make) is None
    flooding = in_thread(send_many, pair, make, FLOOD)
    if endless:
        assert pair.tls.recv(100) == b"at last"
        flooding.result(20)
        return
    with little_cpu(2), pytest.raises(ktls.RecordError) as caught:
        pair.tls.recv(100)
    assert caught.value.alert is answer_to_noise(pair.tls, make)
    assert_stays(pair.tls, caught.value)
    pair.tls.close()
    flooding.result(20)


def send_many(pair: RecordPair, make: Make, count: int) -> None:
    """Sends a flood and then data, as far as they are taken; and reads what is answered."""
    pair.peer.sock.setblocking(True)
    with suppress(OSError):
        for _ in range(count // 100):
            pair.peer.sock.sendall(b"".join(make(pair.peer) for _ in range(100)))
            discard(pair.peer.sock)
        pair.peer.send(DATA, b"at last")


def discard(sock: socket.socket) -> None:
    """Empties the receive queue."""
    with suppress(BlockingIOError):
        while sock.recv(1 << 16, socket.MSG_DONTWAIT):
            pass


def test_pitfall_25_data_between_empty_records(
    make_record_pair: MakeRecordPair, in_thread: InThread, version: str, mode: str
) -> None:
    """A byte, nothing, a byte, nothing, thousands of times: every byte arrives."""
    pair = make_record_pair(version, "server", mode)
    pair.tls.settimeout(20)
    content = bytes(range(250)) * (2 * SHORT_FLOOD // 250)

    def send() -> None:
        seal = pair.peer.tx.seal
        for at in range(0, len(content), 250):
            records = (
                seal(DATA, b"") + seal(DATA, bytes([byte])) for byte in content[at : at + 250]
            )
            pair.peer.sock.sendall(b"".join(records))

    sending = in_thread(send)
    received = b""
    while len(received) < len(content):
        data = pair.tls.recv(1000)
        assert data
        received += data
    assert received == content
    sending.result(20)


@pytest.mark.parametrize("kind", ["empty", "warning"])
def test_flood_of_nothing_times_out(
    make_record_pair: MakeRecordPair,
    in_thread: Callable[..., Future[Any]],
    mode: str,
    kind: str,
) -> None:
    """A peer that sends only records without data can't hold recv() beyond its timeout."""
    pair = make_record_pair("TLSv1.2", "server", mode)
    content = (DATA, b"") if kind == "empty" else (RecordType.ALERT, bytes([WARNING, 112]))
    pair.tls.settimeout(0.6)
    stop = threading.Event()

    def flood() -> None:
        with suppress(OSError):
            while not stop.is_set():
                pair.peer.send(*content)

    flooding = in_thread(flood)
    limit = threading.Timer(6, stop.set)
    limit.start()
    try:
        with pytest.raises((ktls.StalledError, ktls.RecordError)):
            pair.tls.recv(1)
        assert not stop.is_set()
    finally:
        stop.set()
        limit.cancel()
        limit.join()
        pair.tls.close()
        flooding.result(20)
