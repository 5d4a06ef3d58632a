"""What `wrap` does only when it is asked: shorter records, no padding expected, zerocopy."""

from __future__ import annotations

import errno
import logging
import os
import socket
from dataclasses import replace
from itertools import starmap
from pathlib import Path
from typing import Any

import pytest

import ktls
from ktls import Mode, Reason, RecordType, Version, _ktls, offload
from ktls.records import RecordCipher
from ktls.types import MAX_PAYLOAD, Alert, AlertLevel

from .conftest import (
    MODES,
    Identity,
    InThread,
    MakeRecordPair,
    client_context,
    in_kernel,
    kernel_has,
    server_context,
    tcp_pair,
)
from .record_peer import RecordPair, RecordPeer
from .test_offload import keys_for, mirrored, plain

DATA = RecordType.APPLICATION_DATA


# -- shorter records -----------------------------------------------------------------------------


def make_limited(
    make_record_pair: MakeRecordPair, version: str, mode: str, fragment: int
) -> RecordPair:
    """A server that sends shorter records: from the kernel, if it can make them."""
    pair = make_record_pair(version, "server", mode, max_send_fragment=fragment, require=False)
    tx, rx = MODES[mode]["tx"], MODES[mode]["rx"]
    refused = tx and fragment < MAX_PAYLOAD and not kernel_has(_ktls.TX_MAX_PAYLOAD_LEN)
    assert in_kernel(pair.tls) == (tx and not refused, rx)
    assert (pair.tls.tx.reason is Reason.FRAGMENT_LIMIT) == refused
    assert (str(fragment) in pair.tls.tx.detail) == refused
    return pair


@pytest.mark.parametrize("fragment", [64, 512, MAX_PAYLOAD - 1, MAX_PAYLOAD])
def test_pitfall_16_every_way_to_send(
    make_record_pair: MakeRecordPair,
    in_thread: InThread,
    tmp_path: Path,
    version: str,
    mode: str,
    fragment: int,
) -> None:
    """No record is longer than was asked for; the kernel fills each but the last."""
    pair = make_limited(make_record_pair, version, mode, fragment)
    tls, ways, last = pair.tls, 5, 50
    content = os.urandom(2 * fragment + last)
    path = tmp_path / "content"
    path.write_bytes(content)
    received = in_thread(pair.peer.receive_records, ways * len(content) + 20)
    tls.sendall(content)
    view = memoryview(content)
    while view:
        view = view[tls.sendmsg([view[:10], view[10:]]) :]
    with path.open("rb") as file:
        tls.sendfile(file)
        with tls.cork():
            for at in range(0, len(content), last):
                tls.sendall(content[at : at + last])
        with tls.cork():
            tls.sendall(content[:10])
            tls.sendfile(file, 10)
    for byte in content[:20]:
        assert tls.send(bytes([byte])) == 1
    records = received.result(30)
    assert b"".join(records) == ways * content + content[:20]
    sizes = [len(record) for record in records]
    assert max(sizes) == fragment
    if in_kernel(tls)[0]:
        assert sizes == ways * [fragment, fragment, last] + 20 * [1]
        assert tls.info().max_send_fragment == fragment


@pytest.mark.kernel
@pytest.mark.parametrize("fragment", [64, 512, MAX_PAYLOAD])
def test_send_record_is_one_record(
    make_record_pair: MakeRecordPair, version: str, fragment: int
) -> None:
    """Of any type; what needs two is refused, and nothing of it sent."""
    pair = make_limited(make_record_pair, version, "kernel", fragment)
    content = bytes(2) + os.urandom(fragment - 1)  # no ticket, whose type the peer leaves out
    if not in_kernel(pair.tls)[0]:
        return  # OpenSSL sends no records of a chosen type
    for content_type in (DATA, RecordType.HANDSHAKE):
        with pytest.raises(OSError, match=os.strerror(errno.EMSGSIZE)) as caught:
            pair.tls.send_record(content_type, content)
        assert caught.value.errno == errno.EMSGSIZE
        assert pair.tls.send_record(content_type, content[1:]) == fragment
        assert pair.peer.receive_other_than_tickets() == (content_type, content[1:])


@pytest.mark.kernel
def test_pitfall_16_required(identity: Identity, in_thread: InThread, version: str) -> None:
    """A kernel that makes full records only is an error with ``require``, by name."""
    accepted, connecting = tcp_pair()
    context, peer_context = server_context(identity, version), client_context(identity, version)
    arguments: dict[str, Any] = {"server_side": True, "require": True, "max_send_fragment": 512}
    with accepted, connecting:
        peer = in_thread(RecordPeer, connecting, peer_context, server_side=False)
        if kernel_has(_ktls.TX_MAX_PAYLOAD_LEN):
            with ktls.wrap(accepted, context, **arguments) as tls:
                assert in_kernel(tls) == (True, True)
        else:
            with pytest.raises(ktls.OffloadError, match="512") as caught:
                ktls.wrap(accepted, context, **arguments)
            assert caught.value.reason is Reason.FRAGMENT_LIMIT
        peer.result(10)


@pytest.mark.parametrize("mode", ["userspace", pytest.param("rx-only", marks=pytest.mark.kernel)])
def test_what_openssl_is_held_to(make_record_pair: MakeRecordPair, version: str, mode: str) -> None:
    """Where OpenSSL sends, info() tells its limit, of which the kernel knows nothing."""
    pair = make_record_pair(version, "server", mode, max_send_fragment=512)
    assert pair.tls.info().max_send_fragment == 512
    pair.tls.sendall(bytes(1300))
    assert [len(part) for part in pair.peer.receive_records(1300)] == [512, 512, 276]


@pytest.mark.parametrize("limit", [-1, 0, 1, 7])
def test_limit_that_leaves_nothing(identity: Identity, limit: int) -> None:
    """A key must have room for a KeyUpdate, an alert and some data: nothing is begun."""
    accepted, connecting = tcp_pair()
    with accepted, connecting:
        with pytest.raises(ValueError, match="record_limit must be 8"):
            ktls.wrap(accepted, server_context(identity), server_side=True, record_limit=limit)
        accepted.sendall(b"still plain")
        assert connecting.recv(100) == b"still plain"


@pytest.mark.parametrize("fragment", [-1, 0, 63, MAX_PAYLOAD + 1, 1 << 16])
def test_length_that_no_record_has(identity: Identity, fragment: int) -> None:
    accepted, connecting = tcp_pair()
    with accepted, connecting:
        with pytest.raises(ValueError, match="64 to 16384"):
            ktls.wrap(
                accepted, server_context(identity), server_side=True, max_send_fragment=fragment
            )
        plain(accepted, connecting)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("version", "fragment"),
    [
        (Version.TLS_1_2, 64),
        (Version.TLS_1_2, 512),
        (Version.TLS_1_3, 63),  # RFC 8449: of 64 in TLS 1.3 one is the record's type
        (Version.TLS_1_3, 512),
    ],
)
def test_pitfall_16_enable(version: Version, fragment: int) -> None:
    """Keys know how long their records may be; where the kernel doesn't, sending stays plain."""
    keys = replace(keys_for(version), max_fragment=fragment)
    left, right = tcp_pair()
    with left, right:
        if not kernel_has(_ktls.TX_MAX_PAYLOAD_LEN):
            with pytest.raises(ktls.OffloadError, match=str(fragment)) as caught:
                ktls.enable(left, keys)
            assert caught.value.reason is Reason.FRAGMENT_LIMIT
            assert ktls.info(left).tx is Mode.USERSPACE
            left.sendall(b"as before")
            assert right.recv(100) == b"as before"
            return
        ktls.enable(left, keys)
        content = os.urandom(3 * fragment - 1)
        left.sendall(content)
        shadow = RecordCipher(keys.tx)
        for at in range(0, len(content), fragment):
            record = shadow.seal(DATA, content[at : at + fragment])
            assert right.recv(len(record), socket.MSG_WAITALL) == record


# -- no padding expected -------------------------------------------------------------------------


def padded(content_type: int, content: bytes, zeros: int) -> tuple[int, bytes]:
    """What is sealed as a padded record: type and zeros go before a "type" that is a zero, too."""
    return 0, content + bytes([content_type]) + bytes(zeros - 1)


MIXED_DATA = b"".join(bytes([number]) * (10 * number) for number in range(1, 6))
MIXED = [
    padded(DATA, MIXED_DATA[:10], 1),
    (DATA, MIXED_DATA[10:30]),
    padded(DATA, b"", 100),
    padded(DATA, MIXED_DATA[30:60], 1000),
    padded(DATA, MIXED_DATA[60:100], 13),
    (DATA, MIXED_DATA[100:]),
    padded(RecordType.ALERT, bytes([AlertLevel.WARNING, Alert.CLOSE_NOTIFY]), 10),
]
"""Records with and without padding, as one recv may meet them."""


def test_expect_no_pad(make_record_pair: MakeRecordPair, version: str, mode: str) -> None:
    """In effect for TLS 1.3 in the kernel; padding costs a second try there, and is right."""
    pair = make_record_pair(version, "server", mode, expect_no_pad=True)
    expected = version == "TLSv1.3" and in_kernel(pair.tls)[1] and offload.survives_padding()
    assert pair.tls.info().expect_no_pad is expected
    before = ktls.stats()
    for size in (1, 1000, MAX_PAYLOAD):
        content = os.urandom(size)
        pair.peer.send(DATA, content)
        assert pair.tls.recv(MAX_PAYLOAD) == content
    assert ktls.stats() == before
    if version == "TLSv1.2":
        return  # has no padding
    pair.peer.sock.sendall(b"".join(starmap(pair.peer.tx.seal, MIXED)))
    assert b"".join(iter(lambda: pair.tls.recv(MAX_PAYLOAD), b"")) == MIXED_DATA
    count = "TlsRxNoPadViolation"
    assert (ktls.stats().get(count, 0) > before.get(count, 0)) == expected


@pytest.mark.kernel
def test_survives_padding() -> None:
    """With the option set regardless, all is as well as the probe says."""
    keys = keys_for(Version.TLS_1_3)
    left, right = tcp_pair()
    with left, right:
        ktls.enable(right, mirrored(keys))
        _ktls.set_option(right.fileno(), _ktls.RX_EXPECT_NO_PAD, 1)
        left.sendall(b"".join(starmap(RecordCipher(keys.tx).seal, MIXED)))
        right.settimeout(5)
        received = b""
        while len(received) < len(MIXED_DATA):
            received += right.recvmsg(MAX_PAYLOAD, 64)[0]
        assert (received == MIXED_DATA) == offload.survives_padding()


# -- zerocopy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{}, {"zerocopy": True}], ids=["", "asked"])
def test_pitfall_19_zerocopy_is_asked_for(
    make_record_pair: MakeRecordPair,
    in_thread: InThread,
    tmp_path: Path,
    version: str,
    mode: str,
    asked: dict[str, bool],
) -> None:
    """By name, or it is off; the file arrives with it and without."""
    pair = make_record_pair(version, "server", mode, **asked)
    expected = bool(asked) and in_kernel(pair.tls)[0] and kernel_has(_ktls.TX_ZEROCOPY_RO)
    assert pair.tls.info().zerocopy is expected
    content = os.urandom(100_000)
    path = tmp_path / "content"
    path.write_bytes(content)
    received = in_thread(pair.peer.receive_data, len(content))
    with path.open("rb") as file:
        assert pair.tls.sendfile(file) == len(content)
    assert received.result(30) == content


# -- advice that the kernel doesn't take ---------------------------------------------------------


@pytest.mark.kernel
def test_kernel_without_them(
    make_record_pair: MakeRecordPair,
    version: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What changes nothing but speed is done without, said in the log, and no error."""

    def refuse(_fd: int, _option: int, _value: int) -> None:
        raise OSError(errno.ENOPROTOOPT, f"setsockopt: {os.strerror(errno.ENOPROTOOPT)}")

    offload.survives_padding()  # is tried once only, and not with that
    monkeypatch.setattr(_ktls, "set_option", refuse)
    caplog.set_level(logging.INFO)
    pair = make_record_pair(version, expect_no_pad=True, zerocopy=True)
    info = pair.tls.info()
    assert (info.tx, info.rx) == (Mode.SOFTWARE, Mode.SOFTWARE)
    assert (info.expect_no_pad, info.zerocopy) == (False, False)
    assert "option 3 is not to be had" in caplog.text
    pair.tls.sendall(b"all the same")
    assert pair.peer.receive_data(12) == b"all the same"
