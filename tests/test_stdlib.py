"""``ssl``'s contexts: their secrets find the right connection, stay in memory, and are all proved.

Most handshakes here are between two engines in memory, and need no kernel: what the hand-over would
give it is compared. tests/test_matrix.py and others run real connections with both libraries.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import socket
import ssl
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

import ktls
from ktls import Alert, RecordType, pyopenssl, stdlib
from ktls.engine import TLS13_LABELS
from ktls.errors import HandOverError, HandshakeError, UnprovenSequenceError
from ktls.handshake import Handshake
from ktls.records import HEADER_SIZE, split
from ktls.types import AlertLevel, HandshakeType, Mode, Reason

from .conftest import (
    MODES,
    Identity,
    InThread,
    MakeRecordPair,
    client_context,
    in_kernel,
    server_context,
    stdlib_context,
    tcp_pair,
)
from .test_handshake import Meeting, check_agreement, choose, feed

Contexts = tuple[ssl.SSLContext, ssl.SSLContext]
SUITES_1_2 = [
    ("ECDHE-ECDSA-AES128-GCM-SHA256", ktls.Cipher.AES_GCM_128),
    ("ECDHE-ECDSA-AES256-GCM-SHA384", ktls.Cipher.AES_GCM_256),
    ("ECDHE-ECDSA-AES128-CCM", ktls.Cipher.AES_CCM_128),
    ("ECDHE-ECDSA-CHACHA20-POLY1305", ktls.Cipher.CHACHA20_POLY1305),
]
SECRETS_1_3 = 5  # lines of a key log: two epochs each way, and the exporter's


@pytest.fixture
def contexts(identity: Identity, version: str) -> Contexts:
    """A server's and a client's."""
    return make_contexts(identity, version)


def make_contexts(identity: Identity, version: str | None = None) -> Contexts:
    """The same."""
    return (
        stdlib_context(identity, version, server_side=True),
        stdlib_context(identity, version, server_side=False),
    )


def engine(
    context: ssl.SSLContext, *, server_side: bool, session: ssl.SSLSession | None = None
) -> stdlib.Engine:
    """One that wants its secrets."""
    made = stdlib.Engine.create(
        context,
        server_side=server_side,
        server_hostname=None if server_side else "localhost",
        session=session,
    )
    made.want_secrets()
    return made


def meeting(contexts: Contexts, session: ssl.SSLSession | None = None) -> Meeting:
    """Two fresh handshakes."""
    server, client = contexts
    return Meeting(
        Handshake(engine(server, server_side=True)),
        Handshake(engine(client, server_side=False, session=session)),
    )


def server_alone(context: ssl.SSLContext, identity: Identity) -> Meeting:
    """A server of ours, and a client of pyOpenSSL's, whose key log isn't ours to read."""
    client = pyopenssl.Engine.create(
        client_context(identity), server_side=False, server_hostname="localhost"
    )
    return Meeting(Handshake(engine(context, server_side=True)), Handshake(client))


def check(pair: Meeting) -> None:
    """Hands both over, and compares."""
    check_agreement(pair.server.hand_over(), pair.client.hand_over(), bytes(pair.to_client))


def engine_of(end: Handshake) -> stdlib.Engine:
    """What drives it."""
    assert isinstance(end.engine, stdlib.Engine)
    return end.engine


def plain_handshake(contexts: Contexts) -> None:
    """A connection of ``ssl`` alone, in memory, with the same contexts."""
    memory = [ssl.MemoryBIO() for _ in range(4)]
    server = contexts[0].wrap_bio(memory[0], memory[1], server_side=True)
    client = contexts[1].wrap_bio(memory[2], memory[3], server_hostname="localhost")
    done = 0
    while done < 2:
        done = 0
        for end in (client, server):
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
                done += 1
            memory[0].write(memory[3].read())
            memory[2].write(memory[1].read())


# -- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suite", "cipher"), SUITES_1_2)
def test_suites_of_tls12(identity: Identity, suite: str, cipher: ktls.Cipher) -> None:
    contexts = make_contexts(identity, "TLSv1.2")
    for context in contexts:
        context.set_ciphers(suite)
    pair = meeting(contexts).run()
    server, client = pair.server.hand_over(), pair.client.hand_over()
    assert (server.keys.tx.cipher, server.keys.tx.rec_seq) == (cipher, 1)
    check_agreement(server, client, b"")


@pytest.mark.parametrize("side", ["server", "client"])
@pytest.mark.parametrize(
    ("suite", "cipher"),
    [
        (b"TLS_AES_128_GCM_SHA256", ktls.Cipher.AES_GCM_128),
        (b"TLS_AES_256_GCM_SHA384", ktls.Cipher.AES_GCM_256),
        (b"TLS_CHACHA20_POLY1305_SHA256", ktls.Cipher.CHACHA20_POLY1305),
    ],
)
def test_suites_of_tls13(identity: Identity, suite: bytes, cipher: ktls.Cipher, side: str) -> None:
    """``ssl`` can't choose among them: pyOpenSSL, at the other end, does."""
    if side == "server":
        other = pyopenssl.Engine.create(
            choose(client_context(identity), "TLSv1.3", suite),
            server_side=False,
            server_hostname="localhost",
        )
        ours = engine(stdlib_context(identity, server_side=True), server_side=True)
        pair = Meeting(Handshake(ours), Handshake(other))
    else:
        other = pyopenssl.Engine.create(
            choose(server_context(identity), "TLSv1.3", suite), server_side=True
        )
        ours = engine(stdlib_context(identity, server_side=False), server_side=False)
        pair = Meeting(Handshake(other), Handshake(ours))
    pair.run()
    server, client = pair.server.hand_over(), pair.client.hand_over()
    assert (server.keys.tx.cipher, server.keys.tx.rec_seq) == (cipher, 2)
    check_agreement(server, client, bytes(pair.to_client))


def test_suite_that_the_kernel_lacks(identity: Identity) -> None:
    contexts = make_contexts(identity, "TLSv1.2")
    contexts[0].set_ciphers("ECDHE-ECDSA-AES128-SHA256")
    pair = meeting(contexts).run()
    for end in (pair.server, pair.client):
        with pytest.raises(ktls.UnsupportedConnectionError, match="AES128-SHA256") as caught:
            end.hand_over()
        assert caught.value.reason is Reason.CIPHER_SUITE


@pytest.mark.filterwarnings("ignore:.*TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
def test_old_version(identity: Identity) -> None:
    contexts = make_contexts(identity)
    for context in contexts:
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
    pair = meeting(contexts).run()
    for end in (pair.server, pair.client):
        with pytest.raises(ktls.UnsupportedConnectionError, match=r"TLSv1\.1") as caught:
            end.hand_over()
        assert caught.value.reason is Reason.VERSION


@pytest.mark.parametrize("tickets", [True, False], ids=["ticket", "session-id"])
def test_resumption(contexts: Contexts, tickets: bool) -> None:
    """A resumed connection is handed over as any other: in TLS 1.2, too, OpenSSL logs a line."""
    if not tickets:
        contexts[0].options |= ssl.OP_NO_TICKET
    session = None
    for reused in (False, True, True):
        pair = meeting(contexts, session).run()
        server, client = engine_of(pair.server), engine_of(pair.client)
        assert server.session_reused() is client.session_reused() is reused
        check(pair)
        for record in split(bytes(pair.to_client)):  # TLS 1.3's tickets
            client.incoming(record)
            assert client.read_into(memoryview(bytearray(1))) is None
        session = client.session()
        for each in (server, client):
            each.keep_session()
        del pair, server, client, each


@pytest.mark.parametrize("size", [1, 7, 20, 37, 38, 39])
def test_hello_in_pieces(contexts: Contexts, size: int) -> None:
    """A ClientHello may be cut into records anywhere (RFC 8446 section 5.1), its random too."""
    pair = meeting(contexts)
    hello = pair.client.outgoing()
    message = hello[HEADER_SIZE:]
    for at in range(0, len(message), size):
        part = message[at : at + size]
        feed(pair.server, hello[:3] + len(part).to_bytes(2, "big") + part)
    check(pair.run())


@pytest.mark.parametrize("first", ["original", "repeated"])
def test_repeated_hello(identity: Identity, version: str, first: str) -> None:
    """Somebody sends a hello again: the true connection uses its own secrets, or none, by name."""
    context = stdlib_context(identity, version, server_side=True)
    pair = server_alone(context, identity)
    hello = pair.client.outgoing()
    repeated = Handshake(engine(context, server_side=True))
    if first == "original":
        feed(pair.server, hello)
        feed(repeated, hello)
    else:
        feed(repeated, hello)
        feed(pair.server, hello)
    pair.run()
    if first == "original" and version == "TLSv1.2":
        check(pair)  # the other hasn't got as far as to log anything
        return
    with pytest.raises(HandOverError) as caught:
        pair.server.hand_over()
    wanted = Reason.UNPROVEN_SEQUENCE if first == "original" else Reason.NO_SECRETS
    assert caught.value.reason is wanted


def test_repeated_hello_later(identity: Identity, version: str) -> None:
    """After the hand-over nobody waits for lines any more, and the next may have them."""
    context = stdlib_context(identity, version, server_side=True)
    pair = server_alone(context, identity)
    hello = pair.client.outgoing()
    feed(pair.server, hello)
    check(pair.run())
    later = engine(context, server_side=True)
    feed(Handshake(later), hello)
    assert later._harvest is not None
    assert len(later._harvest.secrets) == (3 if version == "TLSv1.3" else 0)
    assert not later._harvest.disputed


def test_wrong_secret(contexts: Contexts) -> None:
    """Whatever a key log says is proved by the last records that there are."""
    cases = [
        ("server", "SERVER_TRAFFIC_SECRET_0"),  # no client has used its own yet
        ("client", "CLIENT_HANDSHAKE_TRAFFIC_SECRET"),
        ("client", "SERVER_HANDSHAKE_TRAFFIC_SECRET"),
    ]
    if contexts[0].minimum_version is ssl.TLSVersion.TLSv1_2:
        cases = [("server", "CLIENT_RANDOM"), ("client", "CLIENT_RANDOM")]
    for side, label in cases:
        end = getattr(meeting(contexts).run(), side)
        harvest = engine_of(end)._harvest
        assert harvest is not None
        harvest.secrets[label] = bytes(len(harvest.secrets[label]))
        with pytest.raises(UnprovenSequenceError):
            end.hand_over()


@pytest.mark.parametrize("label", sorted(TLS13_LABELS))
def test_disputed_secret(identity: Identity, label: str) -> None:
    """Two secrets under one label and client random: neither is used, proved or not."""
    contexts = make_contexts(identity, "TLSv1.3")
    pair = meeting(contexts).run()
    server = engine_of(pair.server)
    with open(contexts[0].keylog_filename, "a", encoding="ascii") as log:
        log.write(f"{label} {server._client_hello.random.hex()} {'00' * 48}\n")
    stdlib._collect(contexts[0])
    with pytest.raises(UnprovenSequenceError, match="same client random"):
        pair.server.hand_over()


def test_many_at_once(identity: Identity) -> None:
    """50 threads on one pair of contexts, all in their handshakes at the same time: no mix-ups."""
    contexts = make_contexts(identity)
    start = threading.Barrier(50, timeout=20)

    def connect(number: int) -> int:
        start.wait()
        for _ in range(4):
            pair = meeting(contexts)
            if number % 5 == 0:
                plain_handshake(contexts)
            check(pair.run())
        return number

    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(connect, range(50))) == list(range(50))
    gc.collect()
    assert not stdlib._wanted


@pytest.mark.kernel
def test_many_at_once_in_the_kernel(identity: Identity) -> None:
    """The same with sockets: each byte comes back from the connection that it was sent on."""
    contexts = make_contexts(identity)
    start = threading.Barrier(50, timeout=40)

    def serve(sock: socket.socket) -> None:
        with ktls.wrap(sock, contexts[0], server_side=True, require=True) as tls:
            tls.sendall(tls.recv(100))

    def connect(number: int) -> None:
        accepted, connecting = tcp_pair()
        for sock in (accepted, connecting):
            sock.settimeout(40)
        server = threading.Thread(target=serve, args=(accepted,))
        start.wait()
        server.start()
        arguments: dict[str, Any] = {"server_hostname": "localhost", "require": True}
        with ktls.wrap(connecting, contexts[1], **arguments) as tls:
            tls.sendall(b"%d" % number)
            assert tls.recv(100) == b"%d" % number
        server.join()

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(connect, range(50)))


# -- the key log ----------------------------------------------------------------------------------


def test_nothing_on_disk(contexts: Contexts, tmp_path: Path, monkeypatch: Any) -> None:  # noqa: ANN401
    """The key log has no name in any directory, and no file is made."""
    monkeypatch.chdir(tmp_path)
    check(meeting(contexts).run())
    for context in contexts:
        path = os.fspath(context.keylog_filename)
        assert re.fullmatch(r"/proc/self/fd/\d+", path)
        assert os.readlink(path) == "/memfd:ktls-keylog (deleted)"
        assert not os.get_inheritable(int(path.rpartition("/")[2]))
    assert list(tmp_path.iterdir()) == []


def test_wiped_and_given_back(contexts: Contexts) -> None:
    """What was taken out is zeros, and its pages are free: the memory doesn't grow."""
    for _ in range(40):
        check(meeting(contexts).run())
    for context in contexts:
        with open(context.keylog_filename, "rb") as file:
            assert not file.read().strip(b"\0")
            status = os.fstat(file.fileno())
            assert status.st_size > 40 * 150
            assert status.st_blocks * 512 <= 2 * os.sysconf("SC_PAGESIZE")


def test_failed_handshake_leaves_nothing(identity: Identity) -> None:
    """Secrets of a handshake that fails halfway are wiped, too, and nobody waits for them."""
    contexts = make_contexts(identity, "TLSv1.3")
    pair = meeting(contexts)
    feed(pair.server, pair.client.outgoing())
    flight = bytearray(pair.server.outgoing())
    flight[-1] ^= 1
    with pytest.raises(HandshakeError):
        feed(pair.client, bytes(flight))
    del pair
    gc.collect()
    assert not stdlib._wanted
    for context in contexts:
        with open(context.keylog_filename, "rb") as file:
            assert not file.read().strip(b"\0")


def test_secrets_are_dropped(contexts: Contexts) -> None:
    pair = meeting(contexts).run()
    harvests = [engine_of(end)._harvest for end in (pair.server, pair.client)]
    check(pair)
    assert [harvest.secrets for harvest in harvests if harvest] == [{}, {}]
    del harvests
    gc.collect()
    assert not stdlib._wanted
    with pytest.raises(HandOverError):
        pair.server.hand_over()


def test_everything_ends_with_the_context(identity: Identity, tmp_path: Path) -> None:
    """Two descriptors, three with a key log of its own, which has the last lines, too."""
    before = len(os.listdir("/proc/self/fd"))
    own = tmp_path / "keys"
    contexts = make_contexts(identity, "TLSv1.3")
    contexts[0].keylog_filename = str(own)
    check(meeting(contexts).run())
    assert len(os.listdir("/proc/self/fd")) == before + 5
    plain_handshake(contexts)
    gone = [weakref.ref(context) for context in contexts]
    del contexts
    gc.collect()
    assert [each() for each in gone] == [None, None]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(lines_of(own)) == 2 * SECRETS_1_3


def lines_of(path: Path) -> list[bytes]:
    """A key log without comments, in some order."""
    return sorted(line for line in path.read_bytes().splitlines() if not line.startswith(b"#"))


def test_own_key_log(contexts: Contexts, tmp_path: Path) -> None:
    """It gets every line, of whatever connection: the same as the other end's, without ktls."""
    own, other = tmp_path / "own", tmp_path / "other"
    contexts[0].keylog_filename, contexts[1].keylog_filename = str(own), str(other)
    plain_handshake(contexts)
    for _ in range(3):
        server = Handshake(engine(contexts[0], server_side=True))
        client = stdlib.Engine.create(contexts[1], server_side=False, server_hostname="localhost")
        Meeting(server, Handshake(client)).run()
        server.hand_over()
    assert contexts[1].keylog_filename == str(other)
    assert "keys" not in repr(contexts[0].keylog_filename)
    assert str(own) in repr(contexts[0].keylog_filename)
    assert lines_of(own) == lines_of(other)
    assert len(set(lines_of(own))) == (
        4 * SECRETS_1_3 if contexts[0].minimum_version is ssl.TLSVersion.TLSv1_3 else 4
    )
    assert own.read_bytes().count(b"#") == 1
    plain_handshake(contexts)  # comes over with the next of ours, or with prepare
    Meeting(
        Handshake(engine(contexts[0], server_side=True)),
        Handshake(
            stdlib.Engine.create(contexts[1], server_side=False, server_hostname="localhost")
        ),
    ).run()
    assert lines_of(own) == lines_of(other)


def test_own_key_log_of_many(identity: Identity, tmp_path: Path) -> None:
    """Two contexts that name the same file, as by SSLKEYLOGFILE, and 20 threads."""
    own = tmp_path / "keys"
    contexts = make_contexts(identity, "TLSv1.3")
    for context in contexts:
        context.keylog_filename = str(own)
        ktls.prepare(context)
    with ThreadPoolExecutor(20) as pool:
        for done in [pool.submit(lambda: check(meeting(contexts).run())) for _ in range(60)]:
            done.result(30)
    lines = lines_of(own)
    assert len(lines) == 2 * 60 * SECRETS_1_3
    assert lines[::2] == lines[1::2]
    assert all(re.fullmatch(rb"[A-Z_0-9]+ [0-9a-f]{64} [0-9a-f]{96}", line) for line in lines)


def test_own_key_log_fails(
    identity: Identity, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that takes no more is told of in the log; the connection doesn't suffer."""
    contexts = make_contexts(identity)
    contexts[0].keylog_filename = "/dev/full"
    caplog.set_level(logging.WARNING, logger="ktls")
    check(meeting(contexts).run())
    assert "key log misses lines" in caplog.text
    assert str(tmp_path) not in caplog.text


def test_own_key_log_is_gone(identity: Identity, tmp_path: Path) -> None:
    """One that can't be opened again stays with the context: no secrets, by name."""
    own = tmp_path / "keys"
    contexts = make_contexts(identity)
    contexts[0].keylog_filename = str(own)
    moved = own.rename(tmp_path / "moved")
    pair = meeting(contexts).run()
    with pytest.raises(HandOverError, match="no memory for the context's key log") as caught:
        pair.server.hand_over()
    assert caught.value.reason is Reason.NO_SECRETS
    assert contexts[0].keylog_filename == str(own)
    assert lines_of(moved)
    with pytest.raises(FileNotFoundError):
        ktls.prepare(contexts[0])


@pytest.mark.parametrize("to", ["file", "nothing"])
def test_key_log_taken_away(identity: Identity, version: str, tmp_path: Path, to: str) -> None:
    """Set after ktls came, it stays: the reason says what to do, and that helps."""
    server = stdlib_context(identity, version, server_side=True)
    check(server_alone(server, identity).run())
    own = str(tmp_path / "keys") if to == "file" else None
    server.keylog_filename = own  # type: ignore[assignment]
    for _ in range(2):
        pair = server_alone(server, identity).run()
        with pytest.raises(HandOverError, match=r"call ktls\.prepare\(context\)") as caught:
            pair.server.hand_over()
        assert caught.value.reason is Reason.NO_SECRETS
    assert server.keylog_filename == own
    ktls.prepare(server)
    check(server_alone(server, identity).run())
    if own is not None:
        assert len({line.split()[1] for line in lines_of(Path(own))}) == 3


def test_lines_of_the_other_end(contexts: Contexts) -> None:
    """They have the same secrets, but an end without a key log of its own takes none."""
    check(meeting(contexts).run())
    contexts[0].keylog_filename = None  # type: ignore[assignment]
    pair = meeting(contexts).run()
    pair.client.hand_over()
    with pytest.raises(HandOverError) as caught:
        pair.server.hand_over()
    assert caught.value.reason is Reason.NO_SECRETS


TEXTS = {
    "[SSL: SSLV3_ALERT_BAD_CERTIFICATE] sslv3 alert bad certificate (_ssl.c:2580)": (
        Alert.BAD_CERTIFICATE
    ),
    "[SSL] ssl/tls alert bad certificate (_ssl.c:2580)": Alert.BAD_CERTIFICATE,  # OpenSSL 3.2
    "[SSL] tls alert bad certificate (_ssl.c:2580)": Alert.BAD_CERTIFICATE,  # OpenSSL 4.0
    "[SSL] tlsv1 alert no application protocol (_ssl.c:2580)": Alert.NO_APPLICATION_PROTOCOL,
    "[SSL: TLSV1_UNRECOGNIZED_NAME] tlsv1 unrecognized name (_ssl.c:2580)": Alert.UNRECOGNIZED_NAME,
}


@pytest.mark.parametrize("text", TEXTS)
def test_names_of_alerts(identity: Identity, text: str) -> None:
    """Each way in which OpenSSL names them; tests/test_receiving.py has all of this one's."""
    server = engine(stdlib_context(identity, server_side=True), server_side=True)
    error = server._record_error(ssl.SSLError(1, text))
    assert isinstance(error, ktls.AlertReceived)
    assert error.description is TEXTS[text]


def test_prepare_twice(identity: Identity) -> None:
    context = make_contexts(identity)[0]
    ktls.prepare(context)
    path = context.keylog_filename
    ktls.prepare(context)
    assert context.keylog_filename is path


def test_key_log_of_another_context(identity: Identity, tmp_path: Path) -> None:
    """Copied from one to the other: the file that the first had is the second's, too."""
    contexts = make_contexts(identity, "TLSv1.2")
    contexts[0].keylog_filename = str(tmp_path / "keys")
    ktls.prepare(contexts[0])
    contexts[1].keylog_filename = contexts[0].keylog_filename
    check(meeting(contexts).run())
    assert contexts[0].keylog_filename is not contexts[1].keylog_filename
    lines = lines_of(tmp_path / "keys")
    assert len(lines) == 2
    assert len(set(lines)) == 1
    with pytest.raises(PermissionError):  # truncated, it would be a trap for who maps it
        Path(contexts[0].keylog_filename).write_bytes(b"")


def test_context_used_before(contexts: Contexts) -> None:
    """A context of ``ssl`` can change its key log at any time."""
    plain_handshake(contexts)
    check(meeting(contexts).run())


def test_no_memory(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor left, or no /proc: the handshake goes on, the context is as it was."""

    def fail(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", fail)
    pair = meeting(contexts).run()
    with pytest.raises(HandOverError, match="Too many open files") as caught:
        pair.server.hand_over()
    assert caught.value.reason is Reason.NO_SECRETS
    assert contexts[0].keylog_filename is None
    monkeypatch.undo()
    monkeypatch.setattr(stdlib._KeyLog, "__fspath__", lambda _: "/nowhere/fd/1")
    with pytest.raises(HandOverError, match="/nowhere/fd/1"):
        meeting(contexts).run().server.hand_over()
    assert contexts[0].keylog_filename is None


def test_a_library_that_logs_nothing(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some do for a resumed TLS 1.2 session: refused by name."""
    monkeypatch.setattr(
        stdlib, "_LABELS", {b"SERVER_HANDSHAKE_TRAFFIC_SECRET": "SERVER_HANDSHAKE_TRAFFIC_SECRET"}
    )
    pair = meeting(contexts).run()
    for end in (pair.server, pair.client):
        with pytest.raises(HandOverError, match="OpenSSL logged none") as caught:
            end.hand_over()
        assert caught.value.reason is Reason.NO_SECRETS


@pytest.mark.parametrize("prepared", [True, False])
def test_server_name_chooses_a_context(identity: Identity, prepared: bool) -> None:
    """What an sni_callback switches to delivers the secrets, if it was prepared."""
    context, other = (stdlib_context(identity, server_side=True) for _ in range(2))
    if prepared:
        ktls.prepare(other)

    def choose_other(connection: ssl.SSLObject, *_: object) -> None:
        connection.context = other

    context.sni_callback = choose_other
    pair = server_alone(context, identity).run()
    assert engine_of(pair.server).connection.context is other
    if prepared:
        check(pair)
    else:
        with pytest.raises(HandOverError, match="sni_callback"):
            pair.server.hand_over()


@pytest.mark.parametrize("own", [True, False], ids=["own-key-log", "none"])
def test_fork(contexts: Contexts, tmp_path: Path, own: bool) -> None:
    """A child has memory of its own: neither takes the other's lines, at the same time or later."""
    logs = tmp_path / "server", tmp_path / "client"
    if own:
        for context, log in zip(contexts, logs, strict=True):
            context.keylog_filename = str(log)
    begun = meeting(contexts)
    check(meeting(contexts).run())
    ours, childs = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for _ in range(20):
                check(meeting(contexts).run())
            check(begun.run())
            os.write(childs, b".")
            status = 0
        finally:
            os._exit(status)
    os.close(childs)
    for _ in range(20):
        check(meeting(contexts).run())
    check(begun.run())
    assert os.read(ours, 1) == b"."
    os.close(ours)
    assert os.waitpid(child, 0)[1] == 0
    check(meeting(contexts).run())
    if own:
        assert lines_of(logs[0]) == lines_of(logs[1])
        randoms = {line.split()[1] for line in lines_of(logs[0])}
        assert len(randoms) == 1 + 20 + 20 + 1 + 1  # both went on with the one that was begun


# -- secrets are never shown ----------------------------------------------------------------------


def test_secrets_are_not_shown(
    contexts: Contexts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not by any repr, text of an error or line of the log."""
    caplog.set_level(0)
    own = tmp_path / "keys"
    contexts[0].keylog_filename = str(own)
    pair = meeting(contexts).run()
    server = engine_of(pair.server)
    shown = [repr(server), repr(vars(server)), repr(server.secrets()), str(server.secrets())]
    shown += [repr(log) for log in stdlib._logs.values()]
    assert server._harvest is not None
    server._harvest.secrets.popitem()
    with suppress(HandOverError):
        pair.server.hand_over()
    with pytest.raises(HandOverError) as caught:
        pair.server.hand_over()
    shown += [repr(caught.value), str(caught.value), repr(vars(caught.value)), caplog.text]
    secrets = {line.split()[2] for line in lines_of(own)}
    assert secrets
    for text in shown:
        for secret in secrets:
            assert secret.decode() not in text
            assert repr(bytes.fromhex(secret.decode()))[2:-1] not in text


# -- arguments ------------------------------------------------------------------------------------


def test_refused_arguments(identity: Identity) -> None:
    """ValueError or TypeError; the socket and the context are as they were."""
    server, client = make_contexts(identity)
    lax = stdlib_context(identity, server_side=False)
    lax.check_hostname = False
    session = a_session(identity)
    accepted, connecting = tcp_pair()
    with accepted, connecting:
        refused: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
            (ValueError, "check_hostname", client, {}),
            (ValueError, "check_hostname", client, {"server_hostname": ""}),
            (ValueError, "check_hostname", client, client_side(check_hostname=False)),
            (ValueError, "check_hostname", lax, client_side(check_hostname=True)),
            (ValueError, "Cannot create a server", client, {"server_side": True}),
            (ValueError, "Cannot create a client", server, client_side()),
            (ValueError, "for a client", server, server_side(server_hostname="localhost")),
            (ValueError, "for a client", server, server_side(session=session)),
            (ValueError, "different SSLContext", client, client_side(session=session)),
            (TypeError, "SSLSession", client, client_side(session="no session")),
            (TypeError, r"neither .* nor .*: str", "context", {}),
        ]
        for kind, text, context, arguments in refused:
            with pytest.raises(kind, match=text):
                ktls.wrap(connecting, context, **arguments)
        connecting.sendall(b"usable")
        assert accepted.recv(100) == b"usable"
    for context in (server, client, lax):
        assert context.keylog_filename is None
    with pytest.raises(ValueError, match="keylog_filename"):
        ktls.prepare(server, keylog=lambda _connection, _line: None)
    with pytest.raises(TypeError, match="neither"):
        ktls.prepare("context")  # type: ignore[arg-type]


def client_side(**arguments: Any) -> dict[str, Any]:  # noqa: ANN401
    """Arguments of wrap."""
    return {"server_hostname": "localhost", **arguments}


def server_side(**arguments: Any) -> dict[str, Any]:  # noqa: ANN401
    """The same."""
    return {"server_side": True, **arguments}


def a_session(identity: Identity) -> ssl.SSLSession:
    """Of a context that is gone."""
    pair = meeting(make_contexts(identity, "TLSv1.2")).run()
    session = engine_of(pair.client).session()
    assert session is not None
    return session


def test_agreeing_check_hostname(identity: Identity) -> None:
    context = stdlib_context(identity, server_side=False)
    stdlib.Engine.create(
        context, server_side=False, server_hostname="localhost", check_hostname=True
    )
    context.check_hostname = False
    stdlib.Engine.create(context, server_side=False, check_hostname=False)


# -- sockets --------------------------------------------------------------------------------------


def run_client(
    in_thread: InThread,
    server: ssl.SSLContext,
    client: ssl.SSLContext,
    **arguments: Any,  # noqa: ANN401
) -> tuple[ktls.Socket, ssl.SSLSocket]:
    """Connects ktls to a server of ``ssl`` alone."""
    accepted, connecting = tcp_pair()
    for sock in (accepted, connecting):
        sock.settimeout(20)
    peer = in_thread(server.wrap_socket, accepted, server_side=True)
    tls = ktls.wrap(connecting, client, server_hostname="localhost", **arguments)
    return tls, peer.result(20)


def test_userspace_needs_no_key_log(contexts: Contexts, in_thread: InThread) -> None:
    """The context of a connection that isn't for the kernel isn't touched."""
    tls, peer = run_client(in_thread, *contexts, tx=False, rx=False)
    with tls, peer:
        assert tls.tx.reason is tls.rx.reason is Reason.NOT_WANTED
        tls.sendall(b"ping")
        assert peer.recv(100) == b"ping"
    assert contexts[1].keylog_filename is None


@pytest.mark.parametrize("context_of", ["prepared", "fresh"])
def test_userspace_collects(
    identity: Identity, in_thread: InThread, context_of: str, tmp_path: Path
) -> None:
    """But the lines that it writes all the same are taken away."""
    contexts = make_contexts(identity)
    contexts[1].keylog_filename = str(tmp_path / "keys")
    if context_of == "prepared":
        ktls.prepare(contexts[1])
    tls, peer = run_client(in_thread, *contexts, tx=False, rx=False)
    with tls, peer:
        assert len(lines_of(tmp_path / "keys")) == SECRETS_1_3


@pytest.mark.kernel
def test_no_secrets_means_userspace(
    contexts: Contexts, in_thread: InThread, tmp_path: Path
) -> None:
    """By name, and data flows; with require=True it is the error."""
    ktls.prepare(contexts[1])
    contexts[1].keylog_filename = str(tmp_path / "keys")
    tls, peer = run_client(in_thread, *contexts)
    with tls, peer:
        for offload in (tls.tx, tls.rx):
            assert (offload.mode, offload.reason) == (Mode.USERSPACE, Reason.NO_SECRETS)
            assert "keylog_filename was set after ktls came" in offload.detail
        tls.sendall(b"ping")
        assert peer.recv(100) == b"ping"
        peer.sendall(b"pong")
        assert tls.recv(100) == b"pong"

    def serve(sock: socket.socket) -> None:
        with suppress(OSError), contexts[0].wrap_socket(sock, server_side=True) as peer:
            peer.recv(1)

    accepted, connecting = tcp_pair()
    accepted.settimeout(20)
    in_thread(serve, accepted)
    with pytest.raises(HandOverError, match="keylog_filename"):
        ktls.wrap(connecting, contexts[1], server_hostname="localhost", require=True)
    assert connecting.fileno() == -1


@pytest.mark.parametrize("fault", ["host", "authority"])
def test_verification(
    identity: Identity, tmp_path: Path, version: str, in_thread: InThread, fault: str
) -> None:
    """HandshakeError because of SSLCertVerificationError; the peer is told."""
    server, client = make_contexts(identity, version)
    if fault == "authority":
        client = ssl.create_default_context()
    accepted, connecting = tcp_pair()
    for sock in (accepted, connecting):
        sock.settimeout(20)

    def serve() -> Exception | None:
        try:
            with server.wrap_socket(accepted, server_side=True) as tls:
                tls.recv(1)
        except OSError as error:
            return error
        return None

    peer = in_thread(serve)
    host = "example.org" if fault == "host" else "localhost"
    with pytest.raises(HandshakeError) as caught:
        ktls.wrap(connecting, client, server_hostname=host)
    cause = caught.value.__cause__
    assert isinstance(cause, ssl.SSLCertVerificationError)
    assert cause.verify_message in str(caught.value)
    assert not re.search(r"_ssl\.c|\[SSL", str(caught.value))
    assert connecting.fileno() == -1
    wanted = "bad certificate" if fault == "host" else "unknown ca"
    assert wanted in str(peer.result(20))


def test_certificate_is_the_same_object(contexts: Contexts, in_thread: InThread) -> None:
    """getpeercert() doesn't depend on the library."""
    tls, peer = run_client(in_thread, *contexts, tx=False, rx=False)
    with tls, peer:
        certificate = tls.getpeercert()
        assert isinstance(certificate, x509.Certificate)
        assert certificate.public_bytes(Encoding.DER) == tls.getpeercert(True)


def test_lax_context(identity: Identity, in_thread: InThread) -> None:
    """One that verifies nothing verifies nothing; no name need be given."""
    server, client = make_contexts(identity)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    accepted, connecting = tcp_pair()
    peer = in_thread(server.wrap_socket, accepted, server_side=True)
    with ktls.wrap(connecting, client, tx=False, rx=False) as tls, peer.result(20):
        assert tls.getpeercert(True)


RENEGOTIATION = {
    "kernel": "refused",
    "tx-only": "an error",
    "rx-only": "an error",
    "userspace": "OpenSSL's business",
}


def test_renegotiation_without_the_option(
    identity: Identity, make_record_pair: MakeRecordPair, mode: str
) -> None:
    """A server asks a client whose context allows it: nothing is ever lost silently.

    With OP_NO_RENEGOTIATION all modes refuse it: tests/test_receiving.py.
    """
    client = stdlib_context(identity, "TLSv1.2", server_side=False)
    client.options &= ~ssl.OP_NO_RENEGOTIATION
    contexts = server_context(identity, "TLSv1.2"), client
    pair = make_record_pair("TLSv1.2", "client", mode, contexts)
    pair.peer.send(RecordType.HANDSHAKE, bytes([HandshakeType.HELLO_REQUEST, 0, 0, 0]))
    pair.peer.send(RecordType.APPLICATION_DATA, b"after")
    outcome = RENEGOTIATION[mode]
    if mode == "tx-only":
        with pytest.raises(ktls.RecordError) as caught:
            pair.tls.recv(100)
        assert caught.value.alert is Alert.NO_RENEGOTIATION
        return
    assert pair.tls.recv(100) == b"after"
    answer = pair.peer.receive()
    assert answer is not None
    if outcome == "refused":
        assert answer == (
            RecordType.ALERT,
            bytes([AlertLevel.WARNING, Alert.NO_RENEGOTIATION]),
        )
        pair.tls.sendall(b"goes on")
        assert pair.peer.receive() == (RecordType.APPLICATION_DATA, b"goes on")
        return
    assert answer[0] == RecordType.HANDSHAKE
    assert answer[1][0] == HandshakeType.CLIENT_HELLO
    with pytest.raises(ktls.RecordError) as caught:
        pair.tls.sendall(b"in between")
    assert caught.value.alert is Alert.NO_RENEGOTIATION
    if outcome == "an error":
        pair.peer.send(RecordType.HANDSHAKE, bytes([HandshakeType.SERVER_HELLO, 0, 0, 0]))
        with pytest.raises(ktls.RecordError):
            pair.tls.recv(100)


def test_modes(identity: Identity, in_thread: InThread, version: str, side: str, mode: str) -> None:
    """Both ends are ktls with ``ssl`` contexts, one in each mode."""
    contexts = make_contexts(identity, version)
    accepted, connecting = tcp_pair()
    for sock in (accepted, connecting):
        sock.settimeout(20)
    modes = [MODES[mode], MODES["userspace"]]
    server_mode, client_mode = modes if side == "server" else modes[::-1]
    other = in_thread(ktls.wrap, accepted, contexts[0], server_side=True, **server_mode)
    with (
        ktls.wrap(connecting, contexts[1], server_hostname="localhost", **client_mode) as client,
        other.result(20) as server,
    ):
        ours, theirs = (server, client) if side == "server" else (client, server)
        assert in_kernel(ours) == (MODES[mode]["tx"], MODES[mode]["rx"])
        for sender, receiver in ((ours, theirs), (theirs, ours)):
            sender.sendall(b"x" * 20000)
            assert receiver.recv(3, socket.MSG_PEEK) == b"xxx"
            assert receiver.recv(20000, socket.MSG_WAITALL) == b"x" * 20000
        theirs.sendall(b"abcdef")
        assert ours.recv(1) == b"a"
        assert ours.pending() == (0 if in_kernel(ours)[1] else 5)
        assert ours.recv(100) == b"bcdef"
