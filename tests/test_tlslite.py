"""An independent TLS on the other side, which tells what it received: tlslite-ng.

It has its own record layer, key schedule and ciphers, in Python. What it sees are the alerts that
really left.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from OpenSSL import SSL
from tlslite import recordlayer
from tlslite.api import SessionCache
from tlslite.constants import AlertDescription
from tlslite.messages import Alert as AlertMessage

import ktls
from ktls import Alert, RecordType, offload
from ktls.types import AlertLevel, HandshakeType, KeyUpdateRequest

from .bad_records import bad_in
from .conftest import (
    MODES,
    Identity,
    InThread,
    client_context,
    in_kernel,
    server_context,
    tcp_pair,
)
from .tlslite_peer import FastAESGCM, TlslitePeer

FATAL, WARNING = AlertLevel.FATAL, AlertLevel.WARNING
DATA, HANDSHAKE = RecordType.APPLICATION_DATA, RecordType.HANDSHAKE
ERROR_ALERTS = [
    Alert.UNEXPECTED_MESSAGE,
    Alert.BAD_RECORD_MAC,
    Alert.RECORD_OVERFLOW,
    Alert.HANDSHAKE_FAILURE,
    Alert.BAD_CERTIFICATE,
    Alert.UNSUPPORTED_CERTIFICATE,
    Alert.CERTIFICATE_REVOKED,
    Alert.CERTIFICATE_EXPIRED,
    Alert.CERTIFICATE_UNKNOWN,
    Alert.ILLEGAL_PARAMETER,
    Alert.UNKNOWN_CA,
    Alert.ACCESS_DENIED,
    Alert.DECODE_ERROR,
    Alert.DECRYPT_ERROR,
    Alert.PROTOCOL_VERSION,
    Alert.INSUFFICIENT_SECURITY,
    Alert.INTERNAL_ERROR,
    Alert.INAPPROPRIATE_FALLBACK,
    Alert.MISSING_EXTENSION,
    Alert.UNSUPPORTED_EXTENSION,
    Alert.UNRECOGNIZED_NAME,
    Alert.BAD_CERTIFICATE_STATUS_RESPONSE,
    Alert.UNKNOWN_PSK_IDENTITY,
    Alert.CERTIFICATE_REQUIRED,
    Alert.NO_APPLICATION_PROTOCOL,
]
"""RFC 8446 section 6.2."""


@dataclass
class TlslitePair:
    """A ktls socket and its peer, through their handshake."""

    tls: ktls.Socket
    peer: TlslitePeer

    def close(self) -> None:
        """Closes both, whatever has become of them."""
        self.peer.sock.close()
        with suppress(ktls.KTLSError):
            self.tls.close()


MakeTlslitePair = Callable[..., TlslitePair]


@pytest.fixture
def make_tlslite_pair(identity: Identity, in_thread: InThread) -> Iterator[MakeTlslitePair]:
    """Makes connected pairs: ``make_tlslite_pair(version, side, mode, ...)``."""
    pairs: list[TlslitePair] = []

    def make(
        version: str,
        side: str,
        mode: str,
        *,
        context: SSL.Context | None = None,
        session: SSL.Session | None = None,
        **of_the_peer: Any,  # noqa: ANN401
    ) -> TlslitePair:
        accepted, connecting = tcp_pair()
        server = side == "server"
        ours, theirs = (accepted, connecting) if server else (connecting, accepted)
        for sock in (ours, theirs):
            sock.settimeout(20)
        peer = in_thread(
            TlslitePeer, theirs, identity, version, server_side=not server, **of_the_peer
        )
        make_context = server_context if server else client_context
        tls = ktls.wrap(
            ours,
            context or make_context(identity, version),
            server_side=server,
            server_hostname=None if server else "localhost",
            session=session,
            require=mode == "kernel",
            **MODES[mode],
        )
        pairs.append(TlslitePair(tls, peer.result(20)))
        assert in_kernel(tls) == tuple(MODES[mode].values())
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


@pytest.mark.parametrize("first", ["ktls closes", "tlslite closes"])
def test_data_and_close_notify(
    make_tlslite_pair: MakeTlslitePair,
    in_thread: InThread,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    version: str,
    side: str,
    mode: str,
    first: str,
) -> None:
    """A MiB each way, half of ours by sendfile; then both see close_notify, whoever begins."""
    monkeypatch.setattr(recordlayer, "createAESGCM", FastAESGCM)
    pair = make_tlslite_pair(version, side, mode)
    content = os.urandom(1 << 20)
    half = len(content) // 2
    path = tmp_path / "half"
    path.write_bytes(content[half:])
    received = in_thread(pair.peer.receive, len(content))
    pair.tls.sendall(content[:half])
    with path.open("rb") as file:
        assert pair.tls.sendfile(file) == half
    assert received.result(20) == content
    sending = in_thread(pair.peer.connection.write, content)
    assert pair.tls.recv(len(content), socket.MSG_WAITALL) == content
    sending.result(20)
    if first == "ktls closes":
        unwrapping = in_thread(pair.tls.unwrap)
        assert pair.peer.receive(1) == b""  # close_notify, which it answers
        assert pair.peer.connection.closed
        unwrapping.result(20)
    else:
        closing = in_thread(pair.peer.connection.close)  # returns when it has ours
        assert pair.tls.recv(1) == b""
        pair.tls.unwrap()
        closing.result(20)
        assert pair.peer.connection.closed
    assert pair.tls.recv(1) == b""


@pytest.mark.parametrize("cipher", ["aes256gcm", "aes128ccm", "chacha20-poly1305"])
def test_other_ciphers(
    make_tlslite_pair: MakeTlslitePair,
    identity: Identity,
    version: str,
    side: str,
    mode: str,
    cipher: str,
) -> None:
    """The ciphers of tlslite itself open and seal what the kernel's seal and open."""
    context = (server_context if side == "server" else client_context)(identity, version)
    context.set_cipher_list(b"ECDHE+AESGCM:ECDHE+AESCCM:ECDHE+CHACHA20")
    context.set_tls13_ciphersuites(
        b"TLS_AES_256_GCM_SHA384:TLS_AES_128_CCM_SHA256:TLS_CHACHA20_POLY1305_SHA256"
    )
    pair = make_tlslite_pair(version, side, mode, cipher=cipher, context=context)
    assert pair.peer.connection.getCipherName() == cipher
    content = os.urandom(1000)
    for _ in range(3):
        pair.tls.sendall(content)
        assert pair.peer.receive(len(content)) == content
        pair.peer.connection.write(content)
        assert pair.tls.recv(len(content), socket.MSG_WAITALL) == content


def test_every_alert_comes_out_by_name(
    make_tlslite_pair: MakeTlslitePair, version: str, mode: str
) -> None:
    """AlertReceived, with the name that the RFC gives it."""
    got = {}
    for alert, side in zip(ERROR_ALERTS, itertools.cycle(["server", "client"])):
        pair = make_tlslite_pair(version, side, mode)
        pair.peer.send_alert(FATAL, alert)
        with pytest.raises(ktls.AlertReceived) as caught:
            pair.tls.recv(100)
        got[AlertDescription.toStr(alert)] = (caught.value.description, str(caught.value))
        pair.close()
    assert got == {
        alert.name.lower(): (alert, f"the peer sent a fatal alert: {alert.name.lower()}")
        for alert in ERROR_ALERTS
    }


def test_every_error_path_sends_its_alert(
    make_tlslite_pair: MakeTlslitePair, version: str, mode: str
) -> None:
    """What tlslite receives is the alert that the table says and the error tells.

    Of a server: `test_hostile_records` has the client.
    """
    got = {}
    for bad in bad_in(version):
        pair = make_tlslite_pair(version, "server", mode)
        pair.peer.sock.sendall(bad.make(pair.peer))
        error = None
        while error is None:
            try:
                assert pair.tls.recv(100), bad.name
            except ktls.RecordError as raised:
                error = raised
        got[bad.name] = (error.alert, pair.peer.receive_alert())
        pair.close()
    expected = {bad.name: bad.answer(version, mode) for bad in bad_in(version)}
    assert got == {name: (alert, (FATAL, alert)) for name, alert in expected.items()}


def test_renegotiation_is_refused_by_a_warning(
    make_tlslite_pair: MakeTlslitePair, side: str, mode: str
) -> None:
    """TLS 1.2: no_renegotiation, and the connection goes on."""
    pair = make_tlslite_pair("TLSv1.2", side, mode)
    if side == "client":
        message = bytes([HandshakeType.HELLO_REQUEST, 0, 0, 0])
    else:
        hello = b"\3\3" + os.urandom(32) + b"\0" + b"\0\2\xc0\x2b" + b"\1\0"
        message = bytes([HandshakeType.CLIENT_HELLO]) + len(hello).to_bytes(3, "big") + hello
    for _ in range(2):
        pair.peer.send(HANDSHAKE, message)
        pair.peer.connection.write(b"after")
        assert pair.tls.recv(100) == b"after"
        warning = pair.peer.receive_message()
        assert isinstance(warning, AlertMessage)
        assert (warning.level, warning.description) == (WARNING, Alert.NO_RENEGOTIATION)
    pair.tls.sendall(b"answer")
    assert pair.peer.receive(6) == b"answer"


def test_send_alert(make_tlslite_pair: MakeTlslitePair, version: str, side: str, mode: str) -> None:
    """Every description arrives by its number; OpenSSL sends none on command."""
    pair = make_tlslite_pair(version, side, mode)
    if not in_kernel(pair.tls)[0]:
        with pytest.raises(ktls.NotInKernelError):
            pair.tls.send_alert(Alert.INTERNAL_ERROR)
        pair.tls.sendall(b"as before")
        assert pair.peer.receive(9) == b"as before"
        return
    pair.tls.sendall(b"before")
    assert pair.peer.receive(6) == b"before"  # and a server's tickets
    for alert in (alert for alert in Alert if alert is not Alert.CLOSE_NOTIFY):
        pair.tls.send_alert(alert, WARNING)
        got = pair.peer.receive_message()
        assert isinstance(got, AlertMessage)
        assert (got.level, got.description) == (WARNING, alert)
    pair.tls.send_alert(Alert.ACCESS_DENIED)
    got = pair.peer.receive_message()
    assert (got.level, got.description) == (FATAL, Alert.ACCESS_DENIED)
    for call in (lambda: pair.tls.send(b"x"), lambda: pair.tls.send_alert(Alert.INTERNAL_ERROR)):
        with pytest.raises(ktls.ClosedForWritingError, match="fatal alert"):
            call()


def test_send_close_notify_as_an_alert(
    make_tlslite_pair: MakeTlslitePair, version: str, side: str, mode: str
) -> None:
    """In all modes, and as `unwrap` sends it: nothing can be sent afterwards."""
    pair = make_tlslite_pair(version, side, mode)
    pair.tls.sendall(b"last")
    pair.tls.send_alert(Alert.CLOSE_NOTIFY)
    assert pair.peer.receive(100) == b"last"
    assert pair.peer.connection.closed
    with pytest.raises(ktls.ClosedForWritingError):
        pair.tls.send(b"late")


@pytest.mark.parametrize("request_", list(KeyUpdateRequest), ids=lambda each: each.name.lower())
def test_pitfall_4_key_updates_of_the_peer(
    make_tlslite_pair: MakeTlslitePair, side: str, mode: str, request_: KeyUpdateRequest
) -> None:
    """Followed by a kernel that can, and answered if asked for; else the error says so by name."""
    pair = make_tlslite_pair("TLSv1.3", side, mode)
    tx, rx = in_kernel(pair.tls)
    for number in range(3):
        data = b"after %d" % number
        pair.peer.update_keys(request_)
        pair.peer.connection.write(data)
        if (rx or (tx and request_)) and not offload.can_rekey():
            for _ in range(2):
                with pytest.raises(ktls.RekeyUnsupportedError):
                    pair.tls.recv(100)
            return
        assert pair.tls.recv(100) == data
        pair.tls.sendall(data)
        assert pair.peer.receive(len(data)) == data
    assert pair.peer.key_updates == (3 if request_ else 0)


@pytest.mark.parametrize("request_peer", [False, True], ids=["", "requested"])
def test_key_updates_of_ours(
    make_tlslite_pair: MakeTlslitePair, side: str, mode: str, *, request_peer: bool
) -> None:
    """Tlslite follows, and answers if asked for; where we can't, nothing is sent."""
    pair = make_tlslite_pair("TLSv1.3", side, mode)
    tx, _ = in_kernel(pair.tls)
    if not (tx and offload.can_rekey()):
        wanted = ktls.RekeyUnsupportedError if tx else ktls.NotInKernelError
        with pytest.raises(wanted):
            pair.tls.update_keys(request_peer)
        pair.tls.sendall(b"as before")
        assert pair.peer.receive(9) == b"as before"
        return
    for number in range(3):
        data = b"after %d" % number
        pair.tls.update_keys(request_peer)
        pair.tls.sendall(data)
        assert pair.peer.receive(len(data)) == data
        pair.peer.connection.write(data)
        assert pair.tls.recv(100) == data
    assert pair.peer.key_updates == 3


@pytest.mark.parametrize("kind", ["ticket", "session id"])
def test_resumption(
    make_tlslite_pair: MakeTlslitePair, identity: Identity, version: str, mode: str, kind: str
) -> None:
    """A session from tlslite resumes, more than once, and the kernel has those connections too."""
    context = client_context(identity, version)
    of_the_server = (
        {"ticket_key": os.urandom(32)} if kind == "ticket" else {"cache": SessionCache()}
    )
    session = None
    for number in range(3):
        pair = make_tlslite_pair(
            version, "client", mode, context=context, session=session, **of_the_server
        )
        # TLS 1.3 has no session ids: it makes a new session each time.
        resumed = number > 0 and (version == "TLSv1.2" or kind == "ticket")
        assert pair.tls.session_reused is resumed
        if version == "TLSv1.2":  # tlslite doesn't say so of TLS 1.3
            assert pair.peer.connection.resumed is resumed
        pair.tls.sendall(b"question")
        assert pair.peer.receive(8) == b"question"
        pair.peer.connection.write(b"answer")
        assert pair.tls.recv(100) == b"answer"
        session = pair.tls.get_session()
        pair.tls.close()
        assert pair.peer.receive(1) == b""  # a session that ends otherwise isn't resumed
