"""What a peer can send, record by record, and what comes of it in each mode.

The peer is in the tests' own hands: after its handshake they seal and open its records themselves.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

import ktls
from ktls import Alert, RecordType, offload, wait
from ktls.types import AlertLevel, HandshakeType

from .conftest import (
    Identity,
    MakeRecordPair,
    client_context,
    in_kernel,
    server_context,
)
from .record_peer import RecordPeer

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


def _corrupted(peer: RecordPeer) -> bytes:
    record = bytearray(peer.tx.seal(DATA, b"to be changed"))
    record[-1] ^= 1
    return bytes(record)


def _too_long(peer: RecordPeer) -> bytes:
    return peer.tx.seal(DATA, bytes(16385))


def _much_too_long(peer: RecordPeer) -> bytes:
    return bytes([DATA, 3, 3]) + (16384 + 2049).to_bytes(2, "big") + bytes(16384 + 2049)


def _wrong_version(peer: RecordPeer) -> bytes:
    record = bytearray(peer.tx.seal(DATA, b"data"))
    record[1:3] = b"\x05\x05"
    return bytes(record)


def _too_short(peer: RecordPeer) -> bytes:
    # Linux looks at nothing before it has a header and an explicit nonce: more must follow.
    return bytes([DATA, 3, 3, 0, 3]) + b"abc" + peer.tx.seal(DATA, b"more")


def _heartbeat(peer: RecordPeer) -> bytes:
    return peer.tx.seal(RecordType.HEARTBEAT, b"\1\0\3abc" + bytes(16))


def _unknown_type(peer: RecordPeer) -> bytes:
    return peer.tx.seal(99, b"what?")


def _sealed_ccs(peer: RecordPeer) -> bytes:
    return peer.tx.seal(RecordType.CHANGE_CIPHER_SPEC, b"\1")


def _clear_ccs(peer: RecordPeer) -> bytes:
    return bytes([RecordType.CHANGE_CIPHER_SPEC, 3, 3, 0, 1, 1]) + peer.tx.seal(DATA, b"more")


def _short_alert(peer: RecordPeer) -> bytes:
    return peer.tx.seal(RecordType.ALERT, b"\2")


def _long_alert(peer: RecordPeer) -> bytes:
    return peer.tx.seal(RecordType.ALERT, b"\1\0\1")


def _unexpected_message(peer: RecordPeer) -> bytes:
    return peer.tx.seal(RecordType.HANDSHAKE, bytes([HandshakeType.FINISHED, 0, 0, 32]) + bytes(32))


def _endless_message(peer: RecordPeer) -> bytes:
    return peer.tx.seal(RecordType.HANDSHAKE, b"\4\xff\xff\xff" + bytes(100))


def _plain_http(peer: RecordPeer) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


BAD_RECORDS: dict[Callable[[RecordPeer], bytes], Alert | None] = {
    _corrupted: Alert.BAD_RECORD_MAC,
    _too_long: Alert.RECORD_OVERFLOW,
    _much_too_long: Alert.RECORD_OVERFLOW,
    _wrong_version: None,
    _too_short: None,
    _heartbeat: Alert.UNEXPECTED_MESSAGE,
    _unknown_type: Alert.UNEXPECTED_MESSAGE,
    _sealed_ccs: None,
    _clear_ccs: None,
    _short_alert: None,
    _long_alert: None,
    _unexpected_message: None,
    _endless_message: None,
    _plain_http: None,
}
"""What a peer may not send, and the alert that answers it where all agree on one."""


@pytest.mark.parametrize("make_bad", BAD_RECORDS, ids=lambda make: make.__name__[1:])
def test_pitfall_27_bad_record(
    make_record_pair: MakeRecordPair,
    version: str,
    mode: str,
    make_bad: Callable[[RecordPeer], bytes],
) -> None:
    """The first error is typed, answered by its alert, and stays; what came before is delivered."""
    pair = make_record_pair(version, "server", mode)
    pair.tls.settimeout(5)
    pair.peer.send(DATA, b"before")
    assert pair.tls.recv(100) == b"before"
    pair.peer.sock.sendall(make_bad(pair.peer))
    with pytest.raises(ktls.RecordError) as caught:
        pair.tls.recv(100)
    wanted = BAD_RECORDS[make_bad]
    if wanted is not None and all(in_kernel(pair.tls)):
        assert caught.value.alert == wanted  # elsewhere OpenSSL decides; see below
    if make_bad is _corrupted:
        assert isinstance(caught.value, ktls.DecryptError)
    # Latched, also when an event loop takes the socket's error away (pitfall 24).
    pair.tls.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    for call in (
        lambda: pair.tls.recv(1),
        lambda: pair.tls.send(b"x"),
        pair.tls.unwrap,
        lambda: pair.tls.sendall(b"x"),
    ):
        with pytest.raises(type(caught.value)) as again:
            call()
        assert again.value.alert == caught.value.alert
    pair.tls.close()
    answer = pair.peer.receive_other_than_tickets()
    assert answer is not None
    assert (answer[0], answer[1][0]) == (RecordType.ALERT, FATAL)
    if mode != "rx-only":  # where OpenSSL has an opinion of its own
        assert answer[1][1] == caught.value.alert


def test_alert_survives_unread_data(
    make_record_pair: MakeRecordPair, version: str, mode: str
) -> None:
    """The peer learns what was wrong though it had sent more."""
    pair = make_record_pair(version, "server", mode)
    pair.peer.sock.sendall(_corrupted(pair.peer) + pair.peer.tx.seal(DATA, bytes(10000)))
    with pytest.raises(ktls.DecryptError):
        pair.tls.recv(100)
    pair.tls.close()
    answer = pair.peer.receive_other_than_tickets()
    assert answer == (RecordType.ALERT, bytes([FATAL, Alert.BAD_RECORD_MAC]))


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
    pair.tls.settimeout(0.3)
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
    # Kernels that can rekey take any record that begins with a 24 for a KeyUpdate.
    cut = next(at for at in range(50, 100) if joined[at] != HandshakeType.KEY_UPDATE)
    for part in (joined[:3], joined[3:cut], joined[cut:]):
        pair.peer.send(RecordType.HANDSHAKE, part)
    pair.peer.send(DATA, b"data")
    assert pair.tls.recv(100) == b"data"


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
    make_record_pair: MakeRecordPair, identity: Identity, version: str, mode: str, read_size: int
) -> None:
    """A ticket that the kernel received makes a session that OpenSSL resumes."""
    contexts = server_context(identity, version), client_context(identity, version)
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
    assert time.thread_time() - cpu < 0.1
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
