"""The proof: right records give right keys, and wrong ones are refused, never believed.

"Wrong" is tried for every record of both directions, in both versions, from both ends. The promise
is not that every change is noticed (nobody proves a ClientHello here) but that no change gives
other keys or another sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktls import stdlib
from ktls.engine import Secrets
from ktls.errors import HandshakeError, UnprovenSequenceError
from ktls.handshake import Handshake
from ktls.keychain import KeyChain
from ktls.proof import HandOver, initial_keys, prove, prove_end
from ktls.records import HEADER_SIZE, RecordCipher, split
from ktls.types import MAX_PAYLOAD, Cipher, HandshakeType, Reason, RecordType, Version

from .conftest import Identity, stdlib_context
from .test_handshake import SUITES, Meeting, meeting
from .test_keyschedule import RFC8448_KEYS, unhex
from .test_records import (
    CLIENT_CLOSE,
    CLIENT_DATA,
    CLIENT_FINISHED,
    SERVER_CLOSE,
    SERVER_DATA,
    SERVER_FLIGHT,
    SERVER_HELLO,
    TICKET,
)


@dataclass(frozen=True)
class Case:
    """What one end knows at its hand-over."""

    secrets: Secrets
    sent: list[bytes]
    received: list[bytes]

    def prove(self) -> HandOver:
        """With everything as it was."""
        return prove(self.secrets, self.sent, self.received)


def capture(identity: Identity, version: str, side: str, suite: bytes | None = None) -> Case:
    """A real handshake's records and secrets."""
    pair = meeting(identity, version, suite).run()
    end = getattr(pair, side)
    return Case(end.engine.secrets(), split(b"".join(end._sent)), list(end._received))


@pytest.fixture(scope="module", params=["TLSv1.2", "TLSv1.3"])
def tls(request: pytest.FixtureRequest) -> str:
    """The TLS version."""
    return str(request.param)


@pytest.fixture(scope="module", params=["server", "client"])
def case(request: pytest.FixtureRequest, identity: Identity, tls: str) -> Case:
    """One end of a handshake."""
    return capture(identity, tls, request.param)


# RFC 8448 section 3 as a case: its ClientHello isn't needed, because nothing protects it.
RFC8448_SECRETS = Secrets(
    Version.TLS_1_3,
    Cipher.AES_GCM_128,
    "sha256",
    server_side=True,
    tls13={label: unhex(row[0]) for label, row in RFC8448_KEYS.items()},
)


def test_rfc8448() -> None:
    """The RFC's own connection, at its end and before its data, from both ends.

    Its server negotiated record_size_limit 16385 (RFC 8449): the kernel's records fit.
    """
    server = [SERVER_HELLO, SERVER_FLIGHT, TICKET, SERVER_DATA, SERVER_CLOSE]
    client = [CLIENT_FINISHED, CLIENT_DATA, CLIENT_CLOSE]
    for sent in range(2, 6):
        for received in range(1, 4):
            over = prove(RFC8448_SECRETS, server[:sent], client[:received])
            assert (over.keys.tx.rec_seq, over.keys.rx.rec_seq) == (sent - 2, received - 1)
            mirrored = replace(RFC8448_SECRETS, server_side=False)
            other = prove(mirrored, client[:received], server[:sent])
            assert (other.keys.tx, other.keys.rx) == (over.keys.rx, over.keys.tx)
            assert other.max_fragment == MAX_PAYLOAD
            assert over.max_fragment == 64  # the client's own limit is in its hello
    key, iv = (unhex(text) for text in RFC8448_KEYS["SERVER_TRAFFIC_SECRET_0"][1:])
    assert (over.keys.tx.key, over.keys.tx.salt + over.keys.tx.iv) == (key, iv)


def test_explicit_nonce_goes_on(identity: Identity) -> None:
    """OpenSSL's last one on the wire plus one; receiving, the same holds for the peer's."""
    for side in ("server", "client"):
        case = capture(identity, "TLSv1.2", side, b"ECDHE-ECDSA-AES128-GCM-SHA256")
        keys = case.prove().keys
        for info, records in ((keys.tx, case.sent), (keys.rx, case.received)):
            last = int.from_bytes(records[-1][HEADER_SIZE : HEADER_SIZE + 8], "big")
            assert int.from_bytes(info.iv, "big") == (last + 1) % (1 << 64)
            assert info.rec_seq == 1


def test_wrong_secrets(case: Case) -> None:
    """Any of the secrets, a bit off: refused."""
    secrets = case.secrets
    wrong = [
        replace(secrets, tls13={**secrets.tls13, label: flipped(value)})
        for label, value in secrets.tls13.items()
        if not label.startswith(("EXPORTER", "CLIENT_TRAFFIC", "SERVER_TRAFFIC"))
    ]
    if secrets.version is Version.TLS_1_2:
        one, two, three = secrets.tls12
        wrong = [
            replace(secrets, tls12=(flipped(one), two, three)),
            replace(secrets, tls12=(one, flipped(two), three)),
            replace(secrets, tls12=(one, two, flipped(three))),
        ]
    assert len(wrong) == 3 if secrets.version is Version.TLS_1_2 else 2
    for each in wrong:
        refused(each, case.sent, case.received)


def test_wrong_application_secret(identity: Identity) -> None:
    """Where a ticket is there to prove it."""
    case = capture(identity, "TLSv1.3", "server")
    tls13 = case.secrets.tls13
    label = "SERVER_TRAFFIC_SECRET_0"
    wrong = replace(case.secrets, tls13={**tls13, label: flipped(tls13[label])})
    refused(wrong, case.sent, case.received)


def test_wrong_side(case: Case) -> None:
    other = replace(case.secrets, server_side=not case.secrets.server_side)
    refused(other, case.sent, case.received)


def test_wrong_hash_or_cipher(case: Case) -> None:
    """Such as a suite's name misread."""
    name = {"sha256": "sha384", "sha384": "sha256"}[case.secrets.hash_name]
    refused(replace(case.secrets, hash_name=name), case.sent, case.received)
    for cipher in (Cipher.AES_GCM_128, Cipher.AES_CCM_128, Cipher.CHACHA20_POLY1305):
        if cipher is not case.secrets.cipher:
            refused(replace(case.secrets, cipher=cipher), case.sent, case.received)


def test_no_records(case: Case) -> None:
    for sent, received in (([], []), (case.sent, []), ([], case.received)):
        refused(case.secrets, sent, received)


def changes(records: list[bytes]) -> Iterator[tuple[str, list[bytes]]]:
    """Every record dropped, doubled, swapped with the next, cut short, and with each byte changed.

    Long records are changed in a few places only.
    """
    for at, record in enumerate(records):
        before, after = records[:at], records[at + 1 :]
        yield f"{at} dropped", [*before, *after]
        yield f"{at} doubled", [*before, record, record, *after]
        if after:
            yield f"{at} swapped", [*before, after[0], record, *after[1:]]
        yield f"{at} cut", [*before, record[:-1], *after]
        yield f"{at} longer", [*before, record + b"\0", *after]
        yield f"{at} empty", [*before, record[:HEADER_SIZE], *after]
        for offset in {*range(0, len(record), max(1, len(record) // 60)), len(record) - 1}:
            changed = bytearray(record)
            changed[offset] ^= 1 << offset % 8
            yield f"{at} changed at {offset}", [*before, bytes(changed), *after]


def test_changed_records(case: Case, tls: str) -> None:
    """Each change of one record of either direction: refused, or no different from the truth.

    One thing is beyond any proof: that the last records of a direction are missing or that a whole
    one was never given, for then the sequence *is* lower. `Handshake` keeps them all.
    """
    truth = case.prove().keys
    count = 0
    for direction in ("sent", "received"):
        records: list[bytes] = getattr(case, direction)
        for what, changed in changes(records):
            given_records = {"sent": case.sent, "received": case.received, direction: changed}
            try:
                keys = prove(case.secrets, given_records["sent"], given_records["received"]).keys
            except UnprovenSequenceError as error:
                count += 1
                assert error.reason is Reason.UNPROVEN_SEQUENCE  # noqa: PT017
                continue
            if tls == "TLSv1.3" and protected(changed) < protected(records):
                continue  # the server's last ticket is missing
            assert keys == truth, f"{direction} {what}"
    assert count > 100


def protected(records: list[bytes]) -> int:
    """How many of a TLS 1.3 connection's records are protected."""
    return sum(record[0] == RecordType.APPLICATION_DATA for record in records)


@pytest.mark.parametrize("content_type", [20, 21, 22, 24, 55])
def test_unprotected_record_after_finished(identity: Identity, content_type: int) -> None:
    """TLS 1.3 has no unprotected records there: neither peer can have sent one."""
    case = capture(identity, "TLSv1.3", "server")
    ticket = bytes([content_type]) + case.sent[-1][1:]
    refused(case.secrets, [*case.sent[:-1], ticket], case.received)


def test_protected_records_changed(case: Case, tls: str) -> None:
    """Of a protected record, no change at all is tolerated (but a TLS 1.2 header's)."""
    start = 1 if tls == "TLSv1.3" else HEADER_SIZE
    for direction in ("sent", "received"):
        records: list[bytes] = getattr(case, direction)
        for at, record in enumerate(records):
            before = {each[0] for each in records[:at]}
            if record[0] != RecordType.APPLICATION_DATA and (
                tls == "TLSv1.3" or RecordType.CHANGE_CIPHER_SPEC not in before
            ):
                continue
            for offset in range(start, len(record), max(1, len(record) // 100)):
                changed = bytearray(record)
                changed[offset] ^= 0x40
                wrong = [*records[:at], bytes(changed), *records[at + 1 :]]
                both = {"sent": case.sent, "received": case.received, direction: wrong}
                refused(case.secrets, both["sent"], both["received"])


@given(st.data())
def test_shuffled(data: st.DataObject) -> None:
    """RFC 8448's records in any wrong order."""
    server = [SERVER_FLIGHT, TICKET, SERVER_DATA, SERVER_CLOSE]
    order = data.draw(st.permutations(server))
    if order == server:
        return
    refused(RFC8448_SECRETS, [SERVER_HELLO, *order], [CLIENT_FINISHED])


@pytest.mark.parametrize(
    "garbage", [b"\x17\3\3\0\0", b"\x17\3\3\0\1\0", b"\x17\3\3\0\x20" + b"\0" * 32]
)
def test_garbage_record(case: Case, garbage: bytes) -> None:
    """A record too many, that nobody sealed."""
    refused(case.secrets, [*case.sent, garbage], case.received)
    refused(case.secrets, case.sent, [*case.received, garbage])


@pytest.mark.parametrize("suite", SUITES, ids=lambda row: f"{row[0]}-{row[1].name}")
def test_application_data_counts(identity: Identity, suite: tuple[str, Cipher, bytes]) -> None:
    """Data and close_notify after the handshake are counted in both directions."""
    for side in ("server", "client"):
        version, _, name = suite
        case = capture(identity, version, side, name)
        keys = case.prove().keys
        tx, rx = RecordCipher(keys.tx), RecordCipher(keys.rx)
        sent = [tx.seal(RecordType.APPLICATION_DATA, bytes(size)) for size in (1, 0, MAX_PAYLOAD)]
        received = [rx.seal(RecordType.APPLICATION_DATA, b"a"), rx.seal(RecordType.ALERT, b"\1\0")]
        later = prove(case.secrets, case.sent + sent, case.received + received).keys
        assert later.tx.rec_seq == keys.tx.rec_seq + 3
        assert later.rx.rec_seq == keys.rx.rec_seq + 2
        assert (later.tx.iv, later.rx.iv) == (tx.iv, rx.iv)


def test_key_update_is_refused(identity: Identity) -> None:
    """By either end: the keys proved would be the old ones. Also when it comes in two records."""
    case = capture(identity, "TLSv1.3", "server")
    update = bytes([HandshakeType.KEY_UPDATE]) + b"\0\0\1\0"
    for parts in ([update], [update[:2], update[2:]]):
        keys = case.prove().keys
        tx, rx = RecordCipher(keys.tx), RecordCipher(keys.rx)
        sent = [tx.seal(RecordType.HANDSHAKE, part) for part in parts]
        received = [rx.seal(RecordType.HANDSHAKE, part) for part in parts]
        refused(case.secrets, case.sent + sent, case.received)
        refused(case.secrets, case.sent, case.received + received)


def test_half_a_message(identity: Identity) -> None:
    """A ticket begun in one record and to be ended in the next: the kernel couldn't tell."""
    case = capture(identity, "TLSv1.3", "client")
    rx = RecordCipher(case.prove().keys.rx)
    half = rx.seal(RecordType.HANDSHAKE, bytes([HandshakeType.NEW_SESSION_TICKET]) + b"\0\0\x40abc")
    refused(case.secrets, case.sent, [*case.received, half])


def test_renegotiation_is_refused(identity: Identity) -> None:
    """TLS 1.2: a protected ClientHello or HelloRequest means that other keys may follow."""
    case = capture(identity, "TLSv1.2", "server")
    keys = case.prove().keys
    request = RecordCipher(keys.tx).seal(RecordType.HANDSHAKE, bytes(4))
    hello = RecordCipher(keys.rx).seal(RecordType.HANDSHAKE, b"\1\0\0\1\0")
    refused(case.secrets, [*case.sent, request], case.received)
    refused(case.secrets, case.sent, [*case.received, hello])


@pytest.mark.parametrize("code", range(1, 5))
def test_max_fragment(code: int) -> None:
    """RFC 6066 section 4, in a TLS 1.3 server's EncryptedExtensions and a TLS 1.2 ServerHello."""
    extension = b"\0\1\0\1" + bytes([code])
    over = prove(RFC8448_SECRETS, server_flight(extension), [CLIENT_FINISHED])
    assert over.max_fragment == 2 ** (8 + code)


def test_record_size_limit() -> None:
    """RFC 8449 section 4: TLS 1.3's limit includes the type byte; 64 is the least."""
    extension = b"\0\x1c\0\2" + (0x1000).to_bytes(2, "big")
    mirrored = replace(RFC8448_SECRETS, server_side=False)
    over = prove(mirrored, [CLIENT_FINISHED], server_flight(extension))
    assert over.max_fragment in (0xFFF, 0x1000)


def server_flight(extension: bytes) -> list[bytes]:
    """A TLS 1.3 server's records with one extension, under RFC 8448's keys."""
    keys = initial_keys(
        replace(
            RFC8448_SECRETS,
            tls13={
                f"{side}_TRAFFIC_SECRET_0": unhex(
                    RFC8448_KEYS[f"{side}_HANDSHAKE_TRAFFIC_SECRET"][0]
                )
                for side in ("CLIENT", "SERVER")
            },
        )
    )
    body = len(extension).to_bytes(2, "big") + extension
    content = b"\x08" + len(body).to_bytes(3, "big") + body + b"\x14\0\0\x20" + bytes(32)
    return [SERVER_HELLO, RecordCipher(keys.tx).seal(RecordType.HANDSHAKE, content)]


# -- the end of a handshake: `Handshake.hand_over`, by `prove_end` --------------------------------


@pytest.fixture
def only_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening all records isn't to be had."""
    monkeypatch.setattr("ktls.proof.prove", lambda *_: pytest.fail("all records were opened"))


@pytest.mark.parametrize("suite", SUITES, ids=lambda row: f"{row[0]}-{row[1].name}")
def test_end_says_the_same(identity: Identity, suite: tuple[str, Cipher, bytes]) -> None:
    version, _, name = suite
    pair = meeting(identity, version, name).run()
    for end in (pair.server, pair.client):
        sent, received = split(b"".join(end._sent)), list(end._received)
        assert prove(end.engine.secrets(), sent, received) == end.hand_over()


@pytest.mark.usefixtures("only_ends")
def test_end_is_enough(identity: Identity) -> None:
    pair = meeting(identity, "TLSv1.3").run()
    assert pair.server.hand_over().tx.rec_seq == 2
    assert pair.client.hand_over().rx.rec_seq == 0


@pytest.mark.parametrize("tickets", range(5))
def test_tickets(identity: Identity, tickets: int) -> None:
    """As many as the server was told to send; one after a session was resumed."""
    contexts = tuple(
        stdlib_context(identity, "TLSv1.3", server_side=side) for side in (True, False)
    )
    contexts[0].num_tickets = tickets
    session = None
    for _ in range(2 if tickets else 1):
        server = stdlib.Engine.create(contexts[0], server_side=True)
        client = stdlib.Engine.create(
            contexts[1], server_side=False, server_hostname="localhost", session=session
        )
        for engine in (server, client):
            engine.want_secrets()
        pair = Meeting(Handshake(server), Handshake(client)).run()
        assert client.session_reused() == (session is not None)
        expected = tickets if session is None else 1
        assert pair.server.hand_over().tx.rec_seq == expected
        client.incoming(bytes(pair.to_client))
        client.read_into(memoryview(bytearray(1)))
        session = client.session()


def test_end_changed(identity: Identity) -> None:
    """The last records, and how many protected ones came before a Finished."""
    for side in ("server", "client"):
        case = capture(identity, "TLSv1.3", side)
        flights = [[*case.sent[:-1], wrong] for wrong in changes_of(case.sent[-1])]
        if side == "client":
            flights.append([case.sent[-1], *case.sent])
        for sent in flights:
            with pytest.raises(UnprovenSequenceError):
                prove_end(case.secrets, sent, case.received)
    for received in [[case.received[-1], *case.received], case.received[:-1], []]:
        with pytest.raises(UnprovenSequenceError):
            prove_end(case.secrets, case.sent, received)


def changes_of(record: bytes) -> Iterator[bytes]:
    """One bit of each byte, but for those of its length."""
    for at in {*range(len(record))} - {3, 4}:
        yield record[:at] + bytes([record[at] ^ 1]) + record[at + 1 :]


def test_more_than_the_finished(identity: Identity) -> None:
    """A record of data that OpenSSL was given together with it: the sequence isn't 0 for sure."""
    pair = meeting(identity, "TLSv1.3")
    while not pair.client.done:
        pair.step(pair.client, pair.to_client, pair.to_server)
        if not pair.client.done:
            pair.step(pair.server, pair.to_server, pair.to_client)
    engine = pair.client.engine
    pair.to_server += pair.client.outgoing()
    engine.encrypt(memoryview(b"data"))
    pair.server.receive(bytes(pair.to_server) + engine.outgoing())
    assert pair.server.done
    pair.server.outgoing()
    assert pair.server.hand_over().rx.rec_seq == 1


def at_finished(identity: Identity) -> tuple[Handshake, bytes, RecordCipher]:
    """A server that only waits for Finished: the message, and what seals its record."""
    pair = meeting(identity, "TLSv1.3")
    while not pair.client.done:
        pair.step(pair.server, pair.to_server, pair.to_client)
        pair.step(pair.client, pair.to_client, pair.to_server)
    *before, record = split(bytes(pair.to_server) + pair.client.outgoing())
    for each in before:
        pair.server.receive(each)
    secrets = pair.client.engine.secrets()
    secret = secrets.tls13["CLIENT_HANDSHAKE_TRAFFIC_SECRET"]
    keys = KeyChain(secrets.version, secrets.cipher, secrets.hash_name, secret).keys()
    return pair.server, RecordCipher(keys).open(record)[1], RecordCipher(keys)


@pytest.mark.parametrize("more", [b"\0", b"\x18", b"\x18\0\0\1\1", b"\4\0\0\1\0"], ids=bytes.hex)
def test_openssl_refuses_more_in_the_finished_record(identity: Identity, more: bytes) -> None:
    """What is sure of a server's receiving rests on it."""
    server, finished, cipher = at_finished(identity)
    with pytest.raises(HandshakeError):
        server.receive(cipher.seal(RecordType.HANDSHAKE, finished + more))


@pytest.mark.parametrize("cut", [1, 4, 7])
def test_finished_in_two_records(identity: Identity, cut: int) -> None:
    server, finished, cipher = at_finished(identity)
    for part in (finished[:cut], finished[cut:]):
        assert not server.done
        server.receive(cipher.seal(RecordType.HANDSHAKE, part))
    assert server.done
    server.outgoing()
    assert server.hand_over().rx.rec_seq == 0


def flipped(secret: bytes) -> bytes:
    """The same but for one bit."""
    return bytes([secret[0] ^ 1]) + secret[1:]


def refused(secrets: Secrets, sent: list[bytes], received: list[bytes]) -> None:
    """The proof must fail, by its own error."""
    with pytest.raises(UnprovenSequenceError) as caught:
        prove(secrets, sent, received)
    assert caught.value.reason is Reason.UNPROVEN_SEQUENCE
