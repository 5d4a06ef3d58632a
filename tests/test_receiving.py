"""What a peer can send, record by record, and what comes of it in each mode.

The peer is in the tests' own hands: after its handshake they seal and open its records themselves.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import ktls
from ktls import Alert, RecordType, _ktls, offload, receiving, wait
from ktls.control import EngineControl
from ktls.types import AlertLevel, HandshakeType

from .conftest import (
    Identity,
    Interrupted,
    InThread,
    MakeRecordPair,
    both_libraries,
    in_kernel,
    our_context,
    server_context,
)
from .record_peer import RecordPair, notice_nothing

pytestmark = both_libraries

FATAL, WARNING = AlertLevel.FATAL, AlertLevel.WARNING
DATA = RecordType.APPLICATION_DATA


def _alerts(version: str) -> list[Alert]:
    """Those that are fatal when they say so."""
    harmless = {Alert.CLOSE_NOTIFY} | ({Alert.USER_CANCELED} if version == "TLSv1.3" else set())
    return [alert for alert in Alert if alert not in harmless]


@pytest.mark.parametrize("mode", ["userspace", pytest.param("kernel", marks=pytest.mark.kernel)])
def test_every_fatal_alert(make_record_pair: MakeRecordPair, version: str, mode: str) -> None:
    """AlertReceived tells which, and so do all later calls."""
    got: dict[Alert, object] = {}
    for alert in _alerts(version):
        pair = make_record_pair(version, "server", mode)
        pair.peer.send(DATA, b"before")
        pair.peer.send(RecordType.ALERT, bytes([FATAL, alert]))
        assert pair.tls.recv(100) == b"before"
        for call in (partial(pair.tls.recv, 1), partial(pair.tls.send, b"x")):
            try:
                call()
                got[alert] = "nothing"
            except ktls.KTLSError as error:
                got[alert] = getattr(error, "description", repr(error))
        pair.peer.sock.close()
        pair.tls.close()
    assert got == {alert: alert for alert in _alerts(version)}


def test_unknown_fatal_alert(make_record_pair: MakeRecordPair, version: str, mode: str) -> None:
    pair = make_record_pair(version, "server", mode)
    pair.peer.send(RecordType.ALERT, bytes([FATAL, 199]))
    with pytest.raises(ktls.KTLSError) as caught:
        pair.tls.recv(1)
    assert isinstance(caught.value, ktls.AlertReceived | ktls.RecordError)
    if in_kernel(pair.tls)[1]:
        assert isinstance(caught.value, ktls.AlertReceived)
        assert caught.value.description == 199


def test_warning_alerts(make_record_pair: MakeRecordPair, mode: str) -> None:
    """TLS 1.2 goes on after a warning."""
    pair = make_record_pair("TLSv1.2", "client", mode)
    for alert in (Alert.UNRECOGNIZED_NAME, Alert.USER_CANCELED, Alert.CERTIFICATE_EXPIRED):
        pair.peer.send(RecordType.ALERT, bytes([WARNING, alert]))
    pair.peer.send(DATA, b"after")
    assert pair.tls.recv(100) == b"after"


def test_user_canceled(make_record_pair: MakeRecordPair, mode: str) -> None:
    """TLS 1.3 ignores one alert, whatever its level (RFC 8446 section 6.1)."""
    pair = make_record_pair("TLSv1.3", "client", mode)
    pair.peer.send(RecordType.ALERT, bytes([WARNING, Alert.USER_CANCELED]))
    pair.peer.send(DATA, b"after")
    assert pair.tls.recv(100) == b"after"
    pair.peer.send(RecordType.ALERT, bytes([WARNING, Alert.CLOSE_NOTIFY]))
    assert pair.tls.recv(100) == b""


def test_pitfall_25_empty_records(
    make_record_pair: MakeRecordPair, version: str, mode: str
) -> None:
    """An empty data record is no end of the stream."""
    pair = make_record_pair(version, "server", mode)
    for _ in range(3):
        pair.peer.send(DATA, b"")
    pair.peer.send(DATA, b"one")
    pair.peer.send(DATA, b"")
    assert pair.tls.recv(100) == b"one"
    pair.peer.send(DATA, b"two")
    assert pair.tls.recv(100, socket.MSG_PEEK) == b"two"
    assert pair.tls.recv(100) == b"two"
    pair.peer.send(DATA, b"")
    pair.peer.send(RecordType.ALERT, bytes([WARNING, Alert.CLOSE_NOTIFY]))
    assert pair.tls.recv(100) == b""


@pytest.mark.parametrize("requested", [False, True], ids=["not-requested", "requested"])
def test_pitfall_4_key_update(
    make_record_pair: MakeRecordPair, side: str, mode: str, *, requested: bool
) -> None:
    """Followed, and answered if asked for; a kernel that can't says so by name, for good."""
    pair = make_record_pair("TLSv1.3", side, mode)
    pair.tls.settimeout(5)
    pair.peer.send(DATA, b"before")
    pair.peer.update_keys(requested=requested)
    pair.peer.send(DATA, b"after")
    assert pair.tls.recv(100) == b"before"
    tx, rx = in_kernel(pair.tls)
    if (rx or (tx and requested)) and not offload.can_rekey():
        for _ in range(2):
            with pytest.raises(ktls.RekeyUnsupportedError):
                pair.tls.recv(100)
            with pytest.raises(ktls.RekeyUnsupportedError):
                pair.tls.send(b"x")
        # An end of our own making; where OpenSSL sends, it must be brought to end things.
        alert = Alert.INTERNAL_ERROR if tx else Alert.BAD_RECORD_MAC
        answer = pair.peer.receive_other_than_tickets()
        assert answer == (RecordType.ALERT, bytes([FATAL, alert]))
        return
    assert pair.tls.recv(100) == b"after"
    pair.tls.sendall(b"still here")
    if requested:
        answer = pair.peer.receive_other_than_tickets()
        assert answer == (RecordType.HANDSHAKE, bytes([HandshakeType.KEY_UPDATE, 0, 0, 1, 0]))
        pair.peer.follow_key_update()
    assert pair.peer.receive_data(10) == b"still here"


def test_key_update_after_shutdown(make_record_pair: MakeRecordPair) -> None:
    """A KeyUpdate that asks for an answer reaches a half that can't give one any more."""
    pair = make_record_pair("TLSv1.3", "server", "userspace")
    pair.tls.shutdown(socket.SHUT_WR)
    pair.peer.update_keys(requested=True)
    pair.peer.send(DATA, b"after")
    assert pair.tls.recv(100) == b"after"


def test_pitfall_1_tickets_at_any_time(make_record_pair: MakeRecordPair, mode: str) -> None:
    """A client's tickets never show, though its buffer is smaller than they are."""
    pair = make_record_pair("TLSv1.3", "client", mode)
    first, second = pair.peer.tickets
    pair.peer.send(RecordType.HANDSHAKE, first)
    pair.peer.send(DATA, b"abc")
    pair.peer.send(RecordType.HANDSHAKE, second)
    pair.peer.send(DATA, b"de")
    assert [pair.tls.recv(1) for _ in range(5)] == [b"a", b"b", b"c", b"d", b"e"]
    assert pair.tls.get_session() is not None


def test_split_and_joined_tickets(make_record_pair: MakeRecordPair, mode: str) -> None:
    """A ticket may be cut into records, and two may share one (RFC 8446 section 5.1)."""
    pair = make_record_pair("TLSv1.3", "client", mode)
    joined = b"".join(pair.peer.tickets)
    cut = 50
    for part in (joined[:3], joined[3:cut], joined[cut:]):
        pair.peer.send(RecordType.HANDSHAKE, part)
    pair.peer.send(DATA, b"data")
    assert pair.tls.recv(100) == b"data"


@pytest.mark.parametrize("rest", [1, 20], ids=["byte", "bytes"])
def test_what_looks_like_a_key_update(
    make_record_pair: MakeRecordPair, mode: str, rest: int
) -> None:
    """The rest of a ticket begins with a 24, at which a kernel that can rekey waits for keys."""
    pair = make_record_pair("TLSv1.3", "client", mode)
    body = bytes(8) + b"\1\0" + (100).to_bytes(2, "big") + bytes([24]) * 100 + bytes(2)
    ticket = bytes([HandshakeType.NEW_SESSION_TICKET]) + len(body).to_bytes(3, "big") + body
    cut = 20
    for _ in range(2):
        pair.peer.send(RecordType.HANDSHAKE, ticket[:cut])
        pair.peer.send(RecordType.HANDSHAKE, ticket[cut : cut + rest])
        pair.peer.send(RecordType.HANDSHAKE, ticket[cut + rest :])
        pair.peer.send(DATA, b"data")
        assert pair.tls.recv(100) == b"data"
    pair.tls.sendall(b"back")
    assert pair.peer.receive_data(4) == b"back"


def test_peek_over_a_ticket(make_record_pair: MakeRecordPair, mode: str) -> None:
    """MSG_PEEK takes the ticket away, once, and leaves the data."""
    pair = make_record_pair("TLSv1.3", "client", mode)
    for ticket in pair.peer.tickets:
        pair.peer.send(RecordType.HANDSHAKE, ticket)
    pair.peer.send(DATA, b"data")
    assert pair.tls.recv(2, socket.MSG_PEEK) == b"da"
    assert pair.tls.recv(100, socket.MSG_PEEK) == b"data"
    assert pair.tls.recv(100) == b"data"


def test_ticket_then_nothing_would_block(make_record_pair: MakeRecordPair, mode: str) -> None:
    """A non-blocking socket that is readable for a ticket alone says that it would block."""
    pair = make_record_pair("TLSv1.3", "client", mode)
    for ticket in pair.peer.tickets:
        pair.peer.send(RecordType.HANDSHAKE, ticket)
    assert wait.until(pair.tls, wait.READABLE, 5)
    pair.tls.setblocking(False)
    with pytest.raises(ktls.WouldBlockError):
        pair.tls.recv(100)


@pytest.mark.parametrize("read_size", [1, 1000])
def test_session_resumes(
    make_record_pair: MakeRecordPair,
    identity: Identity,
    library: str,
    version: str,
    mode: str,
    read_size: int,
) -> None:
    """A ticket that the kernel received makes a session that OpenSSL resumes."""
    contexts = (
        server_context(identity, version),
        our_context(library, identity, version, server_side=False),
    )
    first = make_record_pair(version, "client", mode, contexts)
    for ticket in first.peer.tickets:
        first.peer.send(RecordType.HANDSHAKE, ticket)
    first.peer.send(DATA, b"x")
    assert first.tls.recv(read_size) == b"x"
    assert not first.tls.session_reused
    session = first.tls.get_session()
    second = make_record_pair(version, "client", mode, contexts, session=session)
    assert second.tls.session_reused
    second.peer.send(DATA, b"y")
    assert second.tls.recv(1) == b"y"
    second.tls.sendall(b"z")
    assert second.peer.receive_data(1) == b"z"


def test_bad_ticket(make_record_pair: MakeRecordPair, mode: str) -> None:
    """A ticket that makes no sense is an error with OpenSSL's alert, in all modes."""
    pair = make_record_pair("TLSv1.3", "client", mode)
    body = pair.peer.tickets[0][4:-3]
    pair.peer.send(RecordType.HANDSHAKE, b"\4" + len(body).to_bytes(3, "big") + body)
    with pytest.raises(ktls.RecordError) as caught:
        pair.tls.recv(1)
    pair.tls.close()
    answer = pair.peer.receive()
    assert answer == (RecordType.ALERT, bytes([FATAL, caught.value.alert]))


def test_ticket_to_a_server(make_record_pair: MakeRecordPair, mode: str) -> None:
    pair = make_record_pair("TLSv1.3", "server", mode)
    pair.peer.send(RecordType.HANDSHAKE, b"\4\0\0\4abcd")
    with pytest.raises(ktls.RecordError):
        pair.tls.recv(1)


def test_renegotiation_is_refused(make_record_pair: MakeRecordPair, side: str, mode: str) -> None:
    """TLS 1.2: a warning goes back, and the connection goes on."""
    pair = make_record_pair("TLSv1.2", side, mode)
    pair.tls.settimeout(5)
    if side == "client":
        message = bytes([HandshakeType.HELLO_REQUEST, 0, 0, 0])
    else:
        hello = b"\3\3" + os.urandom(32) + b"\0" + b"\0\2\xc0\x2b" + b"\1\0"
        message = bytes([HandshakeType.CLIENT_HELLO]) + len(hello).to_bytes(3, "big") + hello
    pair.peer.send(RecordType.HANDSHAKE, message)
    pair.peer.send(DATA, b"after")
    assert pair.tls.recv(100) == b"after"
    assert pair.peer.receive() == (RecordType.ALERT, bytes([WARNING, Alert.NO_RENEGOTIATION]))
    pair.tls.sendall(b"answer")
    assert pair.peer.receive() == (DATA, b"answer")


@pytest.mark.parametrize("have", [1, 6, -1], ids=["byte", "header+1", "all-but-1"])
def test_partial_record_times_out_idly(
    make_record_pair: MakeRecordPair, version: str, mode: str, have: int
) -> None:
    """A part of a record, then silence: the timeout holds, and the wait uses no CPU."""
    pair = make_record_pair(version, "server", mode)
    record = pair.peer.tx.seal(DATA, b"x" * 5000)
    pair.peer.sock.sendall(record[:have])
    pair.tls.settimeout(0.15)
    started, cpu = time.monotonic(), time.thread_time()
    with pytest.raises(ktls.StalledError):
        pair.tls.recv(100)
    assert time.monotonic() - started >= 0.14
    assert time.thread_time() - cpu < 0.12  # a tick is 0.01
    pair.tls.setblocking(False)
    with pytest.raises(ktls.WouldBlockError):
        pair.tls.recv(100)
    pair.tls.settimeout(10)
    pair.peer.sock.sendall(record[have:])
    received = b""
    while len(received) < 5000:
        received += pair.tls.recv(5000)
    assert received == b"x" * 5000


def test_dribbled_record_times_out(
    make_record_pair: MakeRecordPair, in_thread: Callable[..., Future[Any]], mode: str
) -> None:
    """The timeout bounds all of recv(), not each byte that the peer deigns to send."""
    pair = make_record_pair("TLSv1.3", "server", mode)
    record = pair.peer.tx.seal(DATA, b"x" * 500)
    enough = threading.Event()

    def dribble() -> None:
        for byte in record:
            pair.peer.sock.sendall(bytes([byte]))
            enough.wait(0.02)

    dribbling = in_thread(dribble)
    pair.tls.settimeout(0.3)
    started = time.monotonic()
    try:
        with pytest.raises(ktls.StalledError):
            pair.tls.recv(100)
        assert time.monotonic() - started < 3
    finally:
        enough.set()
        dribbling.result(20)
    pair.tls.settimeout(10)
    assert pair.tls.recv(500) == b"x" * 500


def test_record_split_at_every_byte(
    make_record_pair: MakeRecordPair, version: str, mode: str
) -> None:
    """Non-blocking reads meet every cut of a record, and give its data once."""
    pair = make_record_pair(version, "server", mode)
    pair.peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    pair.tls.setblocking(False)
    record = pair.peer.tx.seal(DATA, b"data")
    for byte in record[:-1]:
        pair.peer.sock.sendall(bytes([byte]))
        with pytest.raises(ktls.WouldBlockError):
            pair.tls.recv(100)
    pair.peer.sock.sendall(record[-1:])
    pair.tls.settimeout(5)
    assert pair.tls.recv(100) == b"data"


def test_one_record_of_every_size_class(
    make_record_pair: MakeRecordPair, version: str, mode: str
) -> None:
    """Also the longest there is, and in TLS 1.3 padded ones."""
    pair = make_record_pair(version, "server", mode)
    for size in (1, 2, 1000, 16383, 16384):
        content = os.urandom(size - 1) + b"x"
        pair.peer.send(DATA, content)
        received = pair.tls.recv(size, socket.MSG_WAITALL)
        assert received == content
    if version == "TLSv1.3":
        # content, type, zeros: sealing "type 0" after type and some zeros makes padding.
        pair.peer.send(0, b"padded" + bytes([DATA]) + bytes(100))
        assert pair.tls.recv(100) == b"padded"


def test_reset_is_an_error_that_stays(
    make_record_pair: MakeRecordPair, version: str, mode: str
) -> None:
    """ECONNRESET comes from the kernel once, from us each time (pitfall 23)."""
    pair = make_record_pair(version, "server", mode)
    pair.peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    pair.peer.sock.close()
    for _ in range(3):
        with pytest.raises(ktls.ConnectionLostError):
            pair.tls.recv(1)
        with pytest.raises(ktls.ConnectionLostError):
            pair.tls.send(b"x")


def test_data_before_a_reset(make_record_pair: MakeRecordPair, version: str, mode: str) -> None:
    """They come first, though the kernel tells the reset first, and once."""
    pair = make_record_pair(version, "server", mode)
    notice_nothing(pair.tls)
    for part in (b"one", b"two"):
        pair.peer.send(DATA, part)
    pair.peer.reset()
    assert pair.tls.recv(2) == b"on"
    assert pair.tls.recv(100, socket.MSG_PEEK)[:1] == b"e"
    assert pair.tls.recv(4, socket.MSG_WAITALL) == b"etwo"
    for _ in range(2):
        with pytest.raises(ktls.ConnectionLostError):
            pair.tls.recv(1)


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["kernel", "rx-only"])
def test_fatal_alert_within_a_handshake_message(
    make_record_pair: MakeRecordPair, version: str, mode: str
) -> None:
    """Why the peer gives up is what it says, not that it broke off a message to say so."""
    pair = make_record_pair(version, "client", mode)
    pair.peer.send(RecordType.HANDSHAKE, b"\4\0\0\x50abc")
    pair.peer.send(RecordType.ALERT, bytes([FATAL, Alert.INTERNAL_ERROR]))
    with pytest.raises(ktls.AlertReceived) as caught:
        pair.tls.recv(1)
    assert caught.value.description is Alert.INTERNAL_ERROR


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["kernel", "rx-only"])
@pytest.mark.parametrize("size", [10, 1 << 17], ids=["small", "big"])
@pytest.mark.parametrize(
    "parts",
    [
        [(RecordType.HANDSHAKE, b"\4\0\0\x50abc"), (DATA, b"d" * 5000)],
        [(RecordType.HANDSHAKE, b"\4\0\0\x50abc"), *[(DATA, b"d" * 16384)] * 5],
        [(RecordType.HANDSHAKE, b"\4\0\0\x50abc"), (RecordType.ALERT, b"\1\x5a")],
    ],
    ids=["data", "much", "warning"],
)
def test_interleaved(
    make_record_pair: MakeRecordPair, mode: str, size: int, parts: list[tuple[int, bytes]]
) -> None:
    """A record within a handshake message: an alert goes out, whatever the buffer's size."""
    pair = make_record_pair("TLSv1.3", "client", mode)
    pair.peer.sock.sendall(b"".join(pair.peer.tx.seal(*part) for part in parts))
    with pytest.raises(ktls.RecordError) as caught:
        pair.tls.recv(size)
    pair.tls.close()
    answer = pair.peer.receive_other_than_tickets()
    assert answer == (RecordType.ALERT, bytes([FATAL, caught.value.alert]))
    assert caught.value.alert is Alert.UNEXPECTED_MESSAGE


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["kernel", "rx-only"])
def test_signal_while_a_record_is_acted_upon(
    make_record_pair: MakeRecordPair, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Half of it is done and it is gone from the socket: the connection ends, by its name."""
    pair = make_record_pair("TLSv1.3", "client", mode)

    def interrupted(*_args: object) -> None:
        raise Interrupted

    monkeypatch.setattr(EngineControl, "tell", interrupted)
    pair.peer.send(RecordType.HANDSHAKE, pair.peer.tickets[0])
    pair.peer.send(DATA, b"data")
    with pytest.raises(Interrupted):
        pair.tls.recv(10)
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(ktls.RecordError) as caught:
            pair.tls.recv(10)
        assert "in part" in str(caught.value) or mode == "rx-only"
    pair.tls.close()
    answer = pair.peer.receive_other_than_tickets()
    assert answer == (RecordType.ALERT, bytes([FATAL, caught.value.alert]))
    if mode == "kernel":
        assert caught.value.alert is Alert.INTERNAL_ERROR


@pytest.mark.kernel
def test_answers_that_we_asked_for_are_no_flood(make_record_pair: MakeRecordPair) -> None:
    """Each of our KeyUpdates may ask for one of the peer's, without any data between them."""
    pair = make_record_pair("TLSv1.3", "server")
    if not offload.can_rekey():
        return  # test_update_keys has what happens there
    pair.tls.setblocking(False)
    for _ in range(200):
        pair.tls.update_keys(request_peer=True)
        update = pair.peer.receive_other_than_tickets()
        assert update == (RecordType.HANDSHAKE, b"\x18\0\0\1\1")
        pair.peer.follow_key_update()
        pair.peer.update_keys(requested=False)
        assert wait.until(pair.tls, wait.READABLE, 5)
        with pytest.raises(ktls.WouldBlockError):
            pair.tls.recv(1)
    pair.peer.send(DATA, b"data")
    assert wait.until(pair.tls, wait.READABLE, 5)
    assert pair.tls.recv(10) == b"data"


def test_idle_records_are_forgotten_after_a_pause(
    make_record_pair: MakeRecordPair, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """A server may send a ticket a minute for days, to a client that it has no data for."""
    pair = make_record_pair("TLSv1.3", "client", mode)
    pair.tls.setblocking(False)
    now = time.monotonic()
    for number in range(150):
        monkeypatch.setattr(receiving, "time", _Clock(now + 60 * number))
        pair.peer.send(RecordType.HANDSHAKE, pair.peer.tickets[0])
        assert wait.until(pair.tls, wait.READABLE, 5)
        with pytest.raises(ktls.WouldBlockError):
            pair.tls.recv(1)


def _intake(pair: RecordPair) -> _ktls.Intake:
    """With data for it that have come."""
    assert pair.tls._intake is not None
    assert wait.until(pair.tls, wait.READABLE, 5)
    return pair.tls._intake


@pytest.mark.kernel
def test_the_intake_gives_data(make_record_pair: MakeRecordPair, version: str) -> None:
    """And of a call that there is something to think about nothing, for now."""
    pair = make_record_pair(version)
    pair.peer.send(DATA, b"0123456789")
    intake, buffer = _intake(pair), array.array("i", [-1])
    assert intake.recv(3, 0) == b"012"
    assert intake.recv_into(buffer, 0) == 4
    assert buffer.tobytes() == b"3456"
    for nothing in (0, -1, True, 1.0):
        assert intake.recv(nothing, 0) is None  # type: ignore[arg-type]
    for wrong in (bytearray(), b"read-only", memoryview(bytearray(8))[::2], None):
        assert intake.recv_into(wrong, 0) is None  # type: ignore[arg-type]
    calls: tuple[Callable[..., object], ...]
    calls = (partial(intake.recv, 9), partial(intake.recv_into, bytearray(9)))
    for call in calls:
        for flags in ((), ("0",), (0, 0)):
            with pytest.raises(TypeError):
                call(*flags)
        intake.attention = True
        assert call(0) is None
        intake.attention = False
    assert pair.tls.recv(100) == b"789"
    assert intake.recv(100, socket.MSG_DONTWAIT) is None
    assert not intake.attention
    pair.tls.close()
    assert intake.fd == -1
    assert intake.recv(100, 0) is None
    assert intake.kept == []


@pytest.mark.kernel
def test_the_intake_keeps_what_is_no_data(make_record_pair: MakeRecordPair, version: str) -> None:
    """Whatever happens before Python looks; then it is open again."""
    pair = make_record_pair(version)
    warning = bytes([WARNING, Alert.USER_CANCELED])
    pair.peer.send(RecordType.ALERT, warning)
    assert _intake(pair).recv(100, 0) is None
    pair.peer.send(DATA, b"after")
    intake = _intake(pair)
    assert intake.kept == [(warning, RecordType.ALERT, True)]
    assert intake.recv(100, 0) is None
    with pytest.raises(ktls.UnreadDataError):
        pair.tls.detach_state()
    assert pair.tls.recv(2, socket.MSG_PEEK) == b"af"
    assert pair.tls.recv(3) == b"aft"
    assert not intake.attention
    assert intake.recv(100, 0) == b"er"
    pair.peer.send(RecordType.ALERT, bytes([WARNING, Alert.CLOSE_NOTIFY]))
    pair.peer.send(DATA, b"too late")
    assert _intake(pair).recv_into(bytearray(1), 0) is None
    assert pair.tls.recv(100) == b""
    assert (intake.fd, pair.tls._intake) == (-1, None)
    assert pair.tls.recv(100) == b""


@pytest.mark.kernel
def test_what_the_intake_kept_is_received_as_from_the_kernel(
    make_record_pair: MakeRecordPair, tmp_path: Path
) -> None:
    """Also data, which come there if another thread has found a thing to think about meanwhile."""
    pair = make_record_pair("TLSv1.3")
    pair.peer.send(DATA, b"789")
    intake = _intake(pair)
    intake.attention = True
    intake.kept.extend([(b"", DATA, True), (b"0123", DATA, False), (b"456", DATA, True)])
    assert pair.tls.pending() == 7
    assert pair.tls.recv(1, socket.MSG_PEEK) == b"0"
    assert pair.tls.recv(3) == b"012"
    with (tmp_path / "file").open("w+b") as file:
        assert pair.tls.recvfile(file, 6) == 6
        file.seek(0)
        assert file.read() == b"345678"
    assert not intake.attention
    assert pair.tls.recv(100) == b"9"


@pytest.mark.kernel
def test_data_behind_something_to_think_about(
    make_record_pair: MakeRecordPair, in_thread: InThread
) -> None:
    """They aren't passed on by a receive that began before another thread found it."""
    pair = make_record_pair("TLSv1.3")
    intake = pair.tls._intake
    assert intake is not None
    pair.tls.settimeout(None)
    received = in_thread(intake.recv, 100, 0)
    blocked = f"/proc/self/task/{_other_thread()}/stat"
    while Path(blocked).read_text().rpartition(")")[2].split()[0] != "S":
        time.sleep(0.001)
    intake.attention = True
    pair.peer.send(DATA, b"data")
    assert received.result(10) is None
    assert intake.kept == [(b"data", DATA, True)]
    assert pair.tls.recv(100) == b"data"


def _other_thread() -> int:
    (thread,) = (t for t in threading.enumerate() if t is not threading.current_thread())
    assert thread.native_id is not None
    return thread.native_id


@pytest.mark.kernel
@pytest.mark.parametrize("by", ["recv", "recv_into"])
def test_the_intake_keeps_an_error(make_record_pair: MakeRecordPair, by: str) -> None:
    """The kernel tells it once."""
    pair = make_record_pair("TLSv1.3")
    pair.peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    pair.peer.sock.close()
    intake = _intake(pair)
    assert getattr(intake, by)(1 if by == "recv" else bytearray(1), 0) is None
    assert intake.kept == [errno.ECONNRESET]
    for _ in range(2):
        with pytest.raises(ktls.ConnectionLostError, match="recv: recvmsg: "):
            pair.tls.recv(1)


@pytest.mark.kernel
def test_interrupted_while_the_intake_is_opened(
    make_record_pair: MakeRecordPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays shut when a signal's handler raises just then."""
    pair = make_record_pair("TLSv1.3")
    pair.peer.send(DATA, b"0123")
    intake = _intake(pair)
    intake.attention = True

    def interrupted() -> bool:
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(pair.tls._sender, "owes", interrupted)
        with pytest.raises(Interrupted):
            pair.tls.recv(1, socket.MSG_PEEK)
    assert intake.attention
    assert pair.tls.recv(100) == b"0123"
    assert not intake.attention


class _Clock:
    """Stands still."""

    def __init__(self, now: float) -> None:
        self._now = now

    def monotonic(self) -> float:
        return self._now
