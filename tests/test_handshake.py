"""The handshake without I/O: two of them in memory, every split of their bytes, and garbage."""

from __future__ import annotations

import gc
import itertools
import socket
import ssl
import subprocess
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from OpenSSL import SSL

import ktls
from ktls import _ktls, stdlib
from ktls.errors import (
    HandOverError,
    HandshakeError,
    UnprovenSequenceError,
    UnsupportedConnectionError,
)
from ktls.handshake import Handshake
from ktls.proof import HandOver
from ktls.pyopenssl import Engine
from ktls.records import HEADER_SIZE, RecordCipher, split
from ktls.types import MAX_PAYLOAD, Cipher, Mode, Reason, RecordType

from .conftest import Identity, client_context, kernel_has, server_context, stdlib_context

SUITES = [
    ("TLSv1.2", Cipher.AES_GCM_128, b"ECDHE-ECDSA-AES128-GCM-SHA256"),
    ("TLSv1.2", Cipher.AES_GCM_256, b"ECDHE-ECDSA-AES256-GCM-SHA384"),
    ("TLSv1.2", Cipher.AES_CCM_128, b"ECDHE-ECDSA-AES128-CCM"),
    ("TLSv1.2", Cipher.CHACHA20_POLY1305, b"ECDHE-ECDSA-CHACHA20-POLY1305"),
    ("TLSv1.3", Cipher.AES_GCM_128, b"TLS_AES_128_GCM_SHA256"),
    ("TLSv1.3", Cipher.AES_GCM_256, b"TLS_AES_256_GCM_SHA384"),
    ("TLSv1.3", Cipher.AES_CCM_128, b"TLS_AES_128_CCM_SHA256"),
    ("TLSv1.3", Cipher.CHACHA20_POLY1305, b"TLS_CHACHA20_POLY1305_SHA256"),
]
suites = pytest.mark.parametrize(
    ("version", "cipher", "suite"), SUITES, ids=lambda value: getattr(value, "name", None)
)


def choose(context: SSL.Context, version: str, suite: bytes) -> SSL.Context:
    """Limits a context to one cipher suite."""
    if version == "TLSv1.3":
        context.set_tls13_ciphersuites(suite)  # type: ignore[attr-defined, unused-ignore]
    else:
        context.set_cipher_list(suite + b":@SECLEVEL=0")
    return context


@dataclass
class Meeting:
    """A server's and a client's handshake, and the bytes between them.

    Attributes:
        server: A handshake.
        client: Another.
        to_server: Bytes on their way: after the end, those that the server didn't want.
        to_client: The same for the client.
        size: How many of the wanted bytes to deliver at once.
    """

    server: Handshake
    client: Handshake
    to_server: bytearray = field(default_factory=bytearray)
    to_client: bytearray = field(default_factory=bytearray)
    size: Callable[[int], int] = lambda wanted: wanted

    def run(self) -> Meeting:
        """Until both are done and everything is written."""
        while not (self.server.done and self.client.done):
            moved = self.step(self.server, self.to_server, self.to_client)
            moved |= self.step(self.client, self.to_client, self.to_server)
            assert moved, "neither side has anything to say"
        self.to_client += self.server.outgoing()
        self.to_server += self.client.outgoing()
        return self

    def step(self, end: Handshake, incoming: bytearray, outgoing: bytearray) -> bool:
        """Lets one end write, and read once; False if it could do neither."""
        written = end.outgoing()
        outgoing += written
        count = min(self.size(end.wanted), len(incoming)) if end.wanted else 0
        if count:
            end.receive(bytes(incoming[:count]))
            del incoming[:count]
        return bool(written or count)


def meeting(
    identity: Identity,
    version: str | None = None,
    suite: bytes | None = None,
    session: SSL.Session | None = None,
    contexts: tuple[SSL.Context, SSL.Context] | None = None,
) -> Meeting:
    """Two fresh handshakes."""
    server, client = contexts or (
        server_context(identity, version),
        client_context(identity, version),
    )
    if suite is not None and version is not None and contexts is None:
        choose(server, version, suite)
        choose(client, version, suite)
    return Meeting(
        Handshake(Engine.create(server, server_side=True)),
        Handshake(
            Engine.create(client, server_side=False, server_hostname="localhost", session=session)
        ),
    )


def check_agreement(server: HandOver, client: HandOver, tickets: bytes) -> None:
    """One end's sending is the other's receiving, apart from what is still on its way."""
    left = list(split(tickets))
    assert same_keys(server.keys.rx, client.keys.tx)
    assert same_keys(server.keys.tx, client.keys.rx)
    assert server.keys.rx.rec_seq == client.keys.tx.rec_seq
    assert server.keys.tx.rec_seq == client.keys.rx.rec_seq + len(left)
    reader = RecordCipher(client.keys.rx)
    for record in left:
        assert reader.open(record)[0] == RecordType.HANDSHAKE
    for sender, receiver in (
        (RecordCipher(server.keys.tx), reader),
        (RecordCipher(client.keys.tx), RecordCipher(server.keys.rx)),
    ):
        for text in (b"first", b"second"):
            assert receiver.open(sender.seal(RecordType.APPLICATION_DATA, text)) == (23, text)


def same_keys(one: ktls.CryptoInfo, other: ktls.CryptoInfo) -> bool:
    """But for the sequence, and the explicit nonce that only the sender knows."""
    iv = other.iv if one.explicit_nonce_size else one.iv
    return replace(one, rec_seq=0, iv=iv) == replace(other, rec_seq=0)


@suites
def test_every_suite(identity: Identity, version: str, cipher: Cipher, suite: bytes) -> None:
    """Keys agree, sequences are exact, and OpenSSL itself goes on from there."""
    pair = meeting(identity, version, suite).run()
    server, client = pair.server.hand_over(), pair.client.hand_over()
    assert (str(server.keys.tx.version), server.keys.tx.cipher) == (version, cipher)
    expected = (2, 0) if version == "TLSv1.3" else (1, 1)  # tickets; both Finished
    assert (server.keys.tx.rec_seq, client.keys.tx.rec_seq) == expected
    assert server.max_fragment == client.max_fragment == MAX_PAYLOAD
    assert not pair.to_server
    check_agreement(server, client, bytes(pair.to_client))


@suites
def test_openssl_goes_on(identity: Identity, version: str, cipher: Cipher, suite: bytes) -> None:
    """What OpenSSL seals next, in both directions, is our next record, its explicit nonce too."""
    pair = meeting(identity, version, suite).run()
    ends = (pair.server, pair.client), (pair.client, pair.server)
    keys = {id(end): end.hand_over().keys for pairs in ends for end in pairs[:1]}
    for sender, _ in ends:
        shadow = RecordCipher(keys[id(sender)].tx)
        for text in (b"one", b"two", bytes(MAX_PAYLOAD)):
            sender.engine.encrypt(memoryview(text))
            assert sender.engine.outgoing() == shadow.seal(RecordType.APPLICATION_DATA, text)


@pytest.mark.parametrize("suite", [row for row in SUITES if row[1] is not Cipher.AES_CCM_128][::2])
def test_resumption(identity: Identity, suite: tuple[str, Cipher, bytes]) -> None:
    """A resumed TLS 1.3 server sends one ticket; TLS 1.2 changes who finishes first."""
    version, _, name = suite
    contexts = tuple(
        choose(make(identity, version), version, name) for make in (server_context, client_context)
    )
    first = meeting(identity, contexts=contexts).run()  # type: ignore[arg-type]
    engine = first.client.engine
    for record in split(bytes(first.to_client)):
        engine.incoming(record)
    assert engine.read_into(memoryview(bytearray(1))) is None
    session = engine.session()
    second = meeting(identity, contexts=contexts, session=session).run()  # type: ignore[arg-type]
    assert second.client.engine.session_reused()
    server, client = second.server.hand_over(), second.client.hand_over()
    assert server.keys.tx.rec_seq == 1
    check_agreement(server, client, bytes(second.to_client))


def test_client_certificate(identity: Identity) -> None:
    """The client's certificate flight is in the handshake epoch: its sequence is 0 all the same."""
    for version in ("TLSv1.2", "TLSv1.3"):
        server, client = server_context(identity, version), client_context(identity, version)
        server.load_verify_locations(str(identity.authority))
        server.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
        client.use_certificate_chain_file(str(identity.chain))
        client.use_privatekey_file(str(identity.key))
        pair = meeting(identity, contexts=(server, client)).run()
        over = pair.server.hand_over(), pair.client.hand_over()
        assert over[1].keys.tx.rec_seq == (0 if version == "TLSv1.3" else 1)
        check_agreement(*over, bytes(pair.to_client))


def test_hello_retry(identity: Identity) -> None:
    """A HelloRetryRequest: two ClientHellos, the sequence is right all the same."""
    server_side = stdlib_context(identity, "TLSv1.3", server_side=True)
    server_side.set_ecdh_curve("secp521r1")  # pyOpenSSL's client guesses another group first
    client = Handshake(
        Engine.create(
            client_context(identity, "TLSv1.3"), server_side=False, server_hostname="localhost"
        )
    )
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_side.wrap_bio(incoming, outgoing, server_side=True)
    sent = bytearray()
    while not client.done:
        written = client.outgoing()
        sent += written
        incoming.write(written)
        with pytest.raises(ssl.SSLWantReadError):
            server.do_handshake()
        while not client.done and outgoing.pending:
            client.receive(outgoing.read(client.wanted))
    incoming.write(client.outgoing())
    server.do_handshake()
    hellos = [record for record in split(bytes(sent)) if record[5] == 1 and record[0] == 22]
    assert len(hellos) == 2
    keys = client.hand_over().keys
    server.write(b"after the tickets")
    reader = RecordCipher(keys.rx)
    opened = [reader.open(record) for record in split(outgoing.read())]
    assert [kind for kind, _ in opened] == [22, 22, 23]
    assert opened[-1][1] == b"after the tickets"


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_byte_by_byte(identity: Identity, version: str) -> None:
    pair = meeting(identity, version)
    pair.size = lambda _: 1
    pair.run()
    check_agreement(pair.server.hand_over(), pair.client.hand_over(), bytes(pair.to_client))


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(sizes=st.lists(st.integers(1, 800), min_size=1, max_size=12))
def test_any_split(identity: Identity, version: str, sizes: list[int]) -> None:
    pair = meeting(identity, version)
    turns = itertools.cycle(sizes)
    pair.size = lambda wanted: min(wanted, next(turns))
    pair.run()
    check_agreement(pair.server.hand_over(), pair.client.hand_over(), bytes(pair.to_client))


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
@pytest.mark.parametrize(
    "boundaries",
    [range(1, 600, 30), pytest.param(range(600), marks=pytest.mark.torture)],
    ids=["some", "every"],
)
def test_split_once(identity: Identity, version: str, boundaries: range) -> None:
    """Both sides' streams, cut at each byte of their first 600."""
    contexts = server_context(identity, version), client_context(identity, version)
    for boundary in boundaries:
        pair = meeting(identity, contexts=contexts)
        for end, other in ((pair.client, pair.server), (pair.server, pair.client)):
            flight = end.outgoing()
            feed(other, flight[:boundary])
            feed(other, flight[boundary:])
        pair.run()
        check_agreement(pair.server.hand_over(), pair.client.hand_over(), bytes(pair.to_client))


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
@pytest.mark.parametrize("side", ["server", "client"])
def test_wants_nothing_after_finished(identity: Identity, version: str, side: str) -> None:
    """Of data that follows the peer's Finished in the same segment, not a byte is asked for."""
    pair = meeting(identity, version).run()
    end = getattr(pair, side)
    assert end.done
    assert end.wanted == 0


def test_end_of_stream(identity: Identity) -> None:
    """At whatever point: a typed error."""
    pair = meeting(identity, "TLSv1.3")
    flight = pair.client.outgoing()
    for taken in (0, 1, 5, 6, len(flight) - 1):
        server = Handshake(Engine.create(server_context(identity), server_side=True))
        feed(server, flight[:taken])
        with pytest.raises(ktls.HandshakeCutOffError, match="closed the connection"):
            server.receive(b"")


def feed(handshake: Handshake, data: bytes) -> bytes:
    """Gives it as much as it wants; returns the rest."""
    while data and handshake.wanted:
        count = handshake.wanted
        handshake.receive(data[:count])
        data = data[count:]
    return data


@pytest.fixture(scope="module")
def flights(identity: Identity) -> dict[str, bytes]:
    """A client's first flight and a server's answer, to begin garbage with."""
    pair = meeting(identity, "TLSv1.3")
    hello = pair.client.outgoing()
    feed(pair.server, hello)
    return {"server": hello, "client": pair.server.outgoing()}


@pytest.mark.parametrize("side", ["server", "client"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(garbage=st.binary(min_size=1, max_size=600), data=st.data())
def test_garbage(
    identity: Identity, flights: dict[str, bytes], side: str, garbage: bytes, data: st.DataObject
) -> None:
    """Alone, after a good beginning, or in place of a byte: HandshakeError or waiting for more."""
    start = data.draw(st.integers(0, len(flights[side])))
    kind = data.draw(st.sampled_from(["alone", "after", "within", "record"]))
    stream = {
        "alone": garbage,
        "after": flights[side][:start] + garbage,
        "within": flights[side][:start] + garbage + flights[side][start + len(garbage) :],
        "record": bytes([20 + len(garbage) % 5, 3, 3, 0, len(garbage) % 256]) + garbage,
    }[kind]
    context = server_context(identity) if side == "server" else client_context(identity)
    engine = Engine.create(
        context,
        server_side=side == "server",
        server_hostname=None if side == "server" else "localhost",
    )
    end = Handshake(engine)
    try:
        rest = feed(end, stream)
    except HandshakeError:
        end.outgoing()
    else:
        assert not rest
        assert not end.done
        assert end.wanted > 0


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_forged_handshake(identity: Identity, version: str) -> None:
    """A bit changed anywhere in the server's first flight is never accepted."""
    pair = meeting(identity, version)
    hello = pair.client.outgoing()
    feed(pair.server, hello)
    flight = pair.server.outgoing()
    for at in range(5, len(flight), max(1, len(flight) // 40)):
        pair = meeting(identity, version)
        feed(pair.server, pair.client.outgoing())
        changed = bytearray(pair.server.outgoing())
        if at >= len(changed):
            continue
        changed[at] ^= 0x10
        failed = False
        try:
            feed(pair.client, bytes(changed))
            answer = pair.client.outgoing()
            if answer:
                feed(pair.server, answer)
                feed(pair.client, pair.server.outgoing())
        except HandshakeError:
            failed = True
        assert failed or not (pair.server.done and pair.client.done)


def test_plain_http(identity: Identity) -> None:
    """Told at the fifth byte, in OpenSSL's words."""
    server = Handshake(Engine.create(server_context(identity), server_side=True))
    with pytest.raises(HandshakeError, match="http request"):
        feed(server, b"GET / HTTP/1.1\r\n\r\n")


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_records_are_forgotten(identity: Identity, version: str) -> None:
    """A hand-over happens once: the second has neither records nor secrets."""
    pair = meeting(identity, version).run()
    pair.server.hand_over()
    with pytest.raises(HandOverError) as caught:
        pair.server.hand_over()
    assert caught.value.reason in (Reason.UNPROVEN_SEQUENCE, Reason.NO_SECRETS)


def test_nothing_keeps_a_connection(identity: Identity) -> None:
    pair = meeting(identity, "TLSv1.3").run()
    pair.server.hand_over()
    engine = pair.server.engine
    assert isinstance(engine, Engine)
    gone = weakref.ref(engine.connection)
    del pair, engine
    gc.collect()
    assert gone() is None


def test_no_secrets(identity: Identity) -> None:
    """A context that made a connection before anyone listened to its key log."""
    contexts = server_context(identity, "TLSv1.3"), client_context(identity, "TLSv1.3")
    for context in contexts:
        SSL.Connection(context, None)
    pair = meeting(identity, contexts=contexts).run()
    for end in (pair.server, pair.client):
        with pytest.raises(HandOverError) as caught:
            end.hand_over()
        assert caught.value.reason is Reason.NO_SECRETS
        assert "ktls.prepare" in str(caught.value)


def test_tls12_needs_no_key_log(identity: Identity) -> None:
    contexts = server_context(identity, "TLSv1.2"), client_context(identity, "TLSv1.2")
    for context in contexts:
        SSL.Connection(context, None)
    pair = meeting(identity, contexts=contexts).run()
    check_agreement(pair.server.hand_over(), pair.client.hand_over(), b"")


@pytest.mark.parametrize(
    "suite", [b"ECDHE-ECDSA-AES128-SHA256", b"ECDHE-ECDSA-AES256-CCM", b"ECDHE-ECDSA-AES128-CCM8"]
)
def test_suites_that_the_kernel_lacks(identity: Identity, suite: bytes) -> None:
    """CBC, a CCM with 256 bit keys and one with short tags: refused by name."""
    pair = meeting(identity, "TLSv1.2", suite).run()
    for end in (pair.server, pair.client):
        with pytest.raises(UnsupportedConnectionError, match=suite.decode()) as caught:
            end.hand_over()
        assert caught.value.reason is Reason.CIPHER_SUITE


@pytest.mark.parametrize("number", [SSL.TLS1_VERSION, SSL.TLS1_1_VERSION])
def test_old_versions(identity: Identity, number: int) -> None:
    contexts = server_context(identity), client_context(identity)
    for context in contexts:
        context.set_min_proto_version(number)
        context.set_max_proto_version(number)
        context.set_cipher_list(b"ALL:@SECLEVEL=0")
    pair = meeting(identity, contexts=contexts).run()
    for end in (pair.server, pair.client):
        with pytest.raises(UnsupportedConnectionError, match=r"TLSv1") as caught:
            end.hand_over()
        assert caught.value.reason is Reason.VERSION


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
@pytest.mark.parametrize("limit", [512, 4096])
def test_max_fragment_length(
    identity: Identity, version: str, limit: int, in_thread: Callable[..., Future[Any]]
) -> None:
    """RFC 6066 section 4, asked for by the ``openssl`` command."""
    accepted, client = openssl_client(identity, version, "-maxfraglen", str(limit))
    with accepted, client:
        accepted.settimeout(30)
        server = Handshake(Engine.create(server_context(identity, version), server_side=True))
        while not server.done:
            accepted.sendall(server.outgoing())
            server.receive(accepted.recv(server.wanted))
        accepted.sendall(server.outgoing())
        assert server.hand_over().max_fragment == limit
        client.terminate()


@pytest.mark.kernel
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
@pytest.mark.parametrize(("wanted", "limit"), [(MAX_PAYLOAD, 512), (513, 512), (100, 100)])
def test_pitfall_16_smaller_limit_counts(
    identity: Identity, version: str, wanted: int, limit: int
) -> None:
    """The peer's or ours; a kernel that can't keep to it gets RX only, and data flow all the same.

    This peer ends the connection when a record is longer than its own limit.
    """
    accepted, client = openssl_client(identity, version, "-maxfraglen", "512", "-quiet")
    context = server_context(identity, version)
    with client:
        accepted.settimeout(30)
        with ktls.wrap(accepted, context, server_side=True, max_send_fragment=wanted) as tls:
            if kernel_has(_ktls.TX_MAX_PAYLOAD_LEN):
                assert tls.tx.mode is Mode.SOFTWARE
                assert tls.info().max_send_fragment == limit
            else:
                assert tls.tx.mode is Mode.USERSPACE
                assert tls.tx.reason is Reason.FRAGMENT_LIMIT
                assert str(limit) in tls.tx.detail
            assert tls.rx.mode is Mode.SOFTWARE
            tls.sendall(b"d" * 2000)
            assert client.stdin is not None
            assert client.stdout is not None
            assert client.stdout.read(2000) == b"d" * 2000
            client.stdin.write(b"up\n")
            client.stdin.flush()
            assert tls.recv(100) == b"up\n"
            client.stdin.close()
        client.terminate()


def openssl_client(
    identity: Identity, version: str, *options: str
) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """``openssl s_client``, connected to the socket returned."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        client = subprocess.Popen(
            [
                *("openssl", "s_client", "-connect", f"127.0.0.1:{port}"),
                *("-" + version.lower().replace("v", "").replace(".", "_"), "-CAfile"),
                *(str(identity.authority), *options),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        listener.settimeout(30)
        accepted, _ = listener.accept()
    return accepted, client


DATA = b"\x17\3\3\0\x04data"


@dataclass
class Looking(Meeting):
    """Both ends look at so much of what is there, and read their share of it.

    Each sends data right behind its Finished.
    """

    look: int = 0
    reads: int = 0

    def step(self, end: Handshake, incoming: bytearray, outgoing: bytearray) -> bool:
        """See `Meeting.step`."""
        written = end.outgoing()
        outgoing += written + DATA * (end.done and bool(written))
        if end.done or not incoming:
            return bool(written)
        ahead = bytes(incoming[: self.look])
        count = min(end.wanted, len(ahead)) if end.within_record else end.share(ahead)
        assert 1 <= count <= len(ahead)
        end.receive(ahead[:count])
        del incoming[:count]
        self.reads += 1
        return True


@pytest.mark.parametrize("library", [Engine, stdlib.Engine])
@pytest.mark.parametrize(
    ("version", "resumed"), [("TLSv1.2", False), ("TLSv1.2", True), ("TLSv1.3", False)]
)
def test_share(identity: Identity, library: Any, version: str, resumed: bool) -> None:  # noqa: ANN401
    """Whole flights at once, and not a byte of what follows Finished, whoever speaks last."""
    contexts: tuple[Any, Any] = server_context(identity, version), client_context(identity, version)
    if library is stdlib.Engine:
        server, client = (stdlib_context(identity, version, server_side=s) for s in (True, False))
        contexts = server, client
    session = None
    for look in [1 << 16, *range(1, 12), 64, 300, 1000, 1 << 16]:
        engines = (
            library.create(contexts[0], server_side=True),
            library.create(
                contexts[1], server_side=False, server_hostname="localhost", session=session
            ),
        )
        for engine in engines:
            engine.want_secrets()
        pair = Looking(Handshake(engines[0]), Handshake(engines[1]), look=look)
        pair.run()
        assert engines[1].session_reused() == (session is not None)
        client_last = version == "TLSv1.3" or session is not None
        assert pair.to_server == (DATA if client_last else b"")
        assert (DATA in pair.to_client) == (not client_last)
        assert pair.server.hand_over().rx.rec_seq == (version == "TLSv1.2")
        assert pair.client.hand_over().tx.rec_seq == (version == "TLSv1.2")
        if version == "TLSv1.2" and look == 1 << 16:
            assert pair.reads == 3 + (session is None)
        if resumed and session is None:
            session = engines[1].session()
        engines[1].keep_session()


def test_share_of_what_is_no_record(identity: Identity) -> None:
    """The header alone, as `Handshake.wanted` has it; and never behind a good record."""
    pair = meeting(identity, "TLSv1.3")
    hello = pair.client.outgoing()
    for junk in (b"GET / HTTP/1.0", b"\x16\3\1\xff\xff" + bytes(70000), b"\x16\3\1\0\0" + hello):
        assert pair.server.share(junk) == HEADER_SIZE
        assert pair.server.share(hello + junk) == len(hello)
    assert pair.server.share(hello + hello) == 2 * len(hello)
    assert pair.server.share(hello + b"\x15\3\3\0\2\2\x28" + hello) == len(hello) + 7
    assert pair.server.share(hello + hello[:-1]) == len(hello)
    assert pair.server.share(hello[:-1]) == len(hello) - 1


def test_hand_over_before_the_last_flight_is_sent(identity: Identity) -> None:
    """Unsent tickets would be missing from the count: refused, not miscounted."""
    pair = meeting(identity, "TLSv1.3")
    feed(pair.server, pair.client.outgoing())
    feed(pair.client, pair.server.outgoing())
    feed(pair.server, pair.client.outgoing())
    assert pair.server.done
    with pytest.raises(UnprovenSequenceError):
        pair.server.hand_over()
