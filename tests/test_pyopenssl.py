"""pyOpenSSL: preparing contexts, extracting keys from connections driven elsewhere, checking names.

`extract_keys` is tried where the sequence can be known and, more often, where it can't: there the
only right answer is an error. What the keys are worth shows when `ktls.enable` puts them into the
kernel and data goes both ways.
"""

from __future__ import annotations

import gc
import os
import select
import socket
import ssl
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from OpenSSL import SSL

import ktls
from ktls import pyopenssl
from ktls.control import EngineControl
from ktls.errors import (
    HandOverError,
    HandshakeError,
    HandshakeNotDoneError,
    UnprovenSequenceError,
    UnsupportedConnectionError,
)
from ktls.records import RecordCipher, split
from ktls.types import KeyUpdateRequest, Mode, Reason, RecordType

from .conftest import (
    Identity,
    InThread,
    Pair,
    client_context,
    server_context,
    stdlib_context,
    tcp_pair,
)
from .test_handshake import SUITES, choose, meeting, openssl_client

TICKETS = {"TLSv1.2": 0, "TLSv1.3": 2}


def our_context(identity: Identity, version: str | None, side: str) -> SSL.Context:
    """An unprepared context for our side."""
    make = server_context if side == "server" else client_context
    return make(identity, version)


# -- prepare --------------------------------------------------------------------------------------


def run_handshake(server: SSL.Context, client: SSL.Context) -> tuple[Memory, Memory]:
    """A handshake over memory BIOs, all of it delivered."""
    ends = Memory.of(server, "server"), Memory.of(client, "client")
    Memory.settle(*ends)
    return ends


@dataclass
class Memory:
    """A pyOpenSSL connection over memory BIOs, which keeps what went over its wire."""

    connection: SSL.Connection
    sent: bytes = b""
    received: bytes = b""
    read: bytearray = field(default_factory=bytearray)

    @classmethod
    def of(cls, context: SSL.Context, side: str) -> Memory:
        """A fresh one."""
        connection = SSL.Connection(context, None)
        if side == "server":
            connection.set_accept_state()
        else:
            connection.set_connect_state()
        return cls(connection)

    def take(self) -> bytes:
        """What it has to send."""
        taken = b""
        with suppress(SSL.WantReadError):
            while True:
                taken += self.connection.bio_read(1 << 16)
        self.sent += taken
        return taken

    def give(self, data: bytes) -> None:
        """What came for it."""
        self.received += data
        if data:
            self.connection.bio_write(data)

    def go(self) -> None:
        """Goes on with the handshake, then reads all there is."""
        with suppress(SSL.WantReadError, SSL.ZeroReturnError):
            self.connection.do_handshake()
            while True:
                self.read += self.connection.recv(1 << 16)

    @staticmethod
    def settle(one: Memory, other: Memory) -> None:
        """Until neither has anything to say."""
        while True:
            one.go()
            other.go()
            there, back = one.take(), other.take()
            if not there and not back:
                return
            other.give(there)
            one.give(back)


def test_prepare_twice(identity: Identity) -> None:
    """The second time does nothing, on a used context too."""
    context = server_context(identity)
    ktls.prepare(context)
    hooks = context._keylog_callback, context._info_callback
    ktls.prepare(context)
    SSL.Connection(context, None)
    ktls.prepare(context)
    assert hooks == (context._keylog_callback, context._info_callback)


def test_prepare_chains(identity: Identity, version: str) -> None:
    """Callbacks set before go on being called, with their own connection."""
    lines: list[tuple[SSL.Connection, bytes]] = []
    events: list[tuple[SSL.Connection, int, int]] = []
    context = server_context(identity, version)
    context.set_keylog_callback(lambda *arguments: lines.append(arguments))
    context.set_info_callback(lambda *arguments: events.append(arguments))
    ktls.prepare(context)
    server, _ = run_handshake(context, client_context(identity, version))
    assert {line.split()[0] for _, line in lines} >= (
        {b"CLIENT_RANDOM"}
        if version == "TLSv1.2"
        else {b"CLIENT_TRAFFIC_SECRET_0", b"SERVER_TRAFFIC_SECRET_0"}
    )
    assert {id(entry[0]) for entry in [*lines, *events]} == {id(server.connection)}
    assert ktls.extract_keys(server.connection, sent=server.sent, received=server.received)


def test_prepare_with_keylog(identity: Identity) -> None:
    """The argument takes the place of a callback set before."""
    earlier: list[bytes] = []
    lines: list[bytes] = []
    context = server_context(identity, "TLSv1.3")
    context.set_keylog_callback(lambda _, line: earlier.append(line))
    ktls.prepare(context, keylog=lambda _, line: lines.append(line))
    run_handshake(context, client_context(identity))
    assert lines
    assert not earlier


def test_keylog_of_a_second_prepare(identity: Identity) -> None:
    """As after a ``wrap`` that hooked the context by itself: called, or refused."""
    lines: list[bytes] = []
    context = server_context(identity, "TLSv1.3")
    ktls.prepare(context)
    with suppress(ValueError):
        ktls.prepare(context, keylog=lambda _, line: lines.append(line))
        run_handshake(context, client_context(identity))
        assert lines


def test_prepare_again_after_a_callback(identity: Identity) -> None:
    """What the error advises: prepare after set_keylog_callback."""
    context = server_context(identity, "TLSv1.3")
    ktls.prepare(context)
    context.set_keylog_callback(lambda _, __: None)
    ktls.prepare(context)
    server, _ = run_handshake(context, client_context(identity))
    assert ktls.extract_keys(server.connection, sent=server.sent, received=server.received)


def test_prepare_too_late(identity: Identity) -> None:
    context = server_context(identity)
    SSL.Connection(context, None)
    with pytest.raises(ValueError, match="already been used"):
        ktls.prepare(context)


@pytest.mark.kernel
def test_wrap_unprepared(identity: Identity, version: str, in_thread: InThread) -> None:
    """TLS 1.3 without secrets falls back by name, TLS 1.2 needs none; data flows in both."""
    context = server_context(identity, version)
    SSL.Connection(context, None)
    accepted, connecting = tcp_pair()
    for sock in (accepted, connecting):
        sock.settimeout(30)
    peer = in_thread(
        stdlib_context(identity, version, server_side=False).wrap_socket,
        connecting,
        server_hostname="localhost",
    )
    with ktls.wrap(accepted, context, server_side=True) as tls, peer.result(30) as client:
        for offload in (tls.tx, tls.rx):
            if version == "TLSv1.2":
                assert offload.mode is Mode.SOFTWARE
            else:
                assert (offload.mode, offload.reason) == (Mode.USERSPACE, Reason.NO_SECRETS)
        tls.sendall(b"ping")
        assert client.recv(10) == b"ping"
        client.sendall(b"pong")
        assert tls.recv(10) == b"pong"


def test_servername_switches_contexts(identity: Identity, version: str) -> None:
    """A server that changes the context by name: the secrets come by the new context's callback."""
    contexts = [server_context(identity, version) for _ in range(2)]
    for context in contexts:
        ktls.prepare(context)
    contexts[0].set_tlsext_servername_callback(lambda conn: conn.set_context(contexts[1]))
    pair = meeting(identity, contexts=(contexts[0], client_context(identity, version))).run()
    assert pair.server.hand_over().keys.tx.rec_seq == TICKETS[version] or 1


# -- secrets don't outlive their use --------------------------------------------------------------


def test_secrets_are_dropped(identity: Identity, version: str) -> None:
    """After the hand-over none is kept. TLS 1.2's isn't even before: OpenSSL is asked for it."""
    pair = meeting(identity, version).run()
    for end in (pair.server, pair.client):
        assert len(pyopenssl._watch(end.engine.connection).lines) == 4 * (version == "TLSv1.3")
        end.hand_over()
        assert not pyopenssl._watch(end.engine.connection).lines


def test_next_secrets_are_not_kept(identity: Identity) -> None:
    """OpenSSL logs those of each KeyUpdate, too, of which there may be many."""
    pair = meeting(identity, "TLSv1.3").run()
    keys = pair.server.hand_over()
    control = EngineControl(pair.server.engine, threading.Lock(), keys)
    for _ in range(3):
        assert control.tell_key_update(KeyUpdateRequest.REQUESTED) is None
        assert len(control.answers()) == 1
    assert not pyopenssl._watch(pair.server.engine.connection).lines


def test_contexts_are_forgotten(identity: Identity) -> None:
    context = server_context(identity)
    ktls.prepare(context)
    gone = weakref.ref(context)
    del context
    gc.collect()
    assert gone() is None


def test_contexts_with_callbacks_are_forgotten(identity: Identity) -> None:
    """Such as a server's own method as the callback: server, context, callback, server."""

    def forget() -> weakref.ref[SSL.Context]:
        context = server_context(identity)

        def callback(_connection: SSL.Connection, _where: int, _result: int) -> None:
            context.get_timeout()

        context.set_info_callback(callback)
        ktls.prepare(context)
        return weakref.ref(context)

    gone = forget()
    gc.collect()
    assert gone() is None


# -- extract_keys over memory BIOs ----------------------------------------------------------------


def keys_of(end: Memory) -> ktls.TrafficKeys:
    """By all that went over the wire."""
    return ktls.extract_keys(end.connection, sent=end.sent, received=end.received)


def memory_pair(identity: Identity, version: str, suite: bytes | None = None) -> list[Memory]:
    """A server and a client, prepared, through their handshake; tickets delivered."""
    contexts = [make(identity, version) for make in (server_context, client_context)]
    for context in contexts:
        ktls.prepare(context)
        if suite is not None:
            choose(context, version, suite)
    return list(run_handshake(*contexts))


@pytest.mark.parametrize("suite", SUITES, ids=lambda row: f"{row[0]}-{row[1].name}")
@pytest.mark.parametrize("rounds", [0, 3])
def test_memory(identity: Identity, suite: tuple[str, ktls.Cipher, bytes], rounds: int) -> None:
    """Before and after data, at both ends: OpenSSL's next records are ours."""
    version, cipher, name = suite
    ends = memory_pair(identity, version, name)
    for number in range(rounds):
        for end in ends:
            end.connection.sendall(b"x" * (1 + 20000 * number))
            Memory.settle(*ends)
    keys = [keys_of(end) for end in ends]
    # 1 + 2 + 3 records each way.
    data = 0 if not rounds else 6
    first = 1 if version == "TLSv1.2" else 0
    assert keys[0].tx.rec_seq == keys[1].rx.rec_seq == first + TICKETS[version] + data
    assert keys[1].tx.rec_seq == keys[0].rx.rec_seq == first + data
    for end, its_keys, others_keys in zip(ends, keys, reversed(keys), strict=True):
        assert its_keys.tx.cipher is cipher
        end.connection.send(b"and on")
        record = end.take()
        assert RecordCipher(others_keys.rx).open(record) == (RecordType.APPLICATION_DATA, b"and on")
        assert RecordCipher(its_keys.tx).seal(RecordType.APPLICATION_DATA, b"and on") == record


def test_memory_without_the_wire(identity: Identity, version: str) -> None:
    server, _ = memory_pair(identity, version)
    for keywords in ({}, {"sent": server.sent}, {"received": server.received}):
        with pytest.raises(UnprovenSequenceError, match="sent= and"):
            ktls.extract_keys(server.connection, **keywords)


def test_memory_with_the_wrong_wire(identity: Identity, version: str) -> None:
    """Another connection's bytes, both swapped, or with a beginning or a middle missing."""
    for _ in range(3):
        server, _ = memory_pair(identity, version)
        other, _ = memory_pair(identity, version)
        records = list(split(server.sent))
        for sent, received in (
            (other.sent, other.received),
            (server.received, server.sent),
            (b"".join(records[:-3]), server.received),
            (server.sent, other.received),
        ):
            with pytest.raises((UnprovenSequenceError, HandOverError)):
                ktls.extract_keys(server.connection, sent=sent, received=received)
            # The secrets are used up by an attempt: the next one needs its own connection.
            server, _ = memory_pair(identity, version)
            records = list(split(server.sent))


def test_memory_not_drained(identity: Identity) -> None:
    """Tickets that wait in the BIO have used nonces: without them, there must be no keys."""
    contexts = [make(identity, "TLSv1.3") for make in (server_context, client_context)]
    for context in contexts:
        ktls.prepare(context)
    server, client = Memory.of(contexts[0], "server"), Memory.of(contexts[1], "client")
    client.go()
    server.give(client.take())
    server.go()
    client.give(server.take())
    client.go()
    server.give(client.take())
    server.go()
    with pytest.raises(UnprovenSequenceError):
        keys_of(server)


def test_memory_with_part_of_a_record(identity: Identity, version: str) -> None:
    """Its first bytes are in OpenSSL, the rest would go to the kernel."""
    server, client = memory_pair(identity, version)
    client.connection.send(b"cut in two")
    server.give(client.take()[:7])
    with pytest.raises(UnprovenSequenceError):
        keys_of(server)


def test_memory_with_hardly_any_wire(identity: Identity, version: str) -> None:
    server, _ = memory_pair(identity, version)
    with pytest.raises(UnprovenSequenceError):
        ktls.extract_keys(server.connection, sent=b"\x16\3\3", received=b"\x16")


@pytest.mark.parametrize("number", [SSL.TLS1_VERSION, SSL.TLS1_1_VERSION])
def test_memory_old_version(identity: Identity, number: int) -> None:
    contexts = server_context(identity), client_context(identity)
    for context in contexts:
        ktls.prepare(context)
        context.set_min_proto_version(number)
        context.set_max_proto_version(number)
        context.set_cipher_list(b"ALL:@SECLEVEL=0")
    for end in run_handshake(*contexts):
        with pytest.raises(UnsupportedConnectionError, match="TLSv1") as caught:
            keys_of(end)
        assert caught.value.reason is Reason.VERSION


def test_dtls(identity: Identity) -> None:
    """Refused by its version; as a context for ``wrap`` too, before anything is sent."""
    contexts = SSL.Context(SSL.DTLS_SERVER_METHOD), SSL.Context(SSL.DTLS_CLIENT_METHOD)
    contexts[0].use_certificate_chain_file(str(identity.chain))
    contexts[0].use_privatekey_file(str(identity.key))
    for context in contexts:
        context.set_options(SSL.OP_NO_QUERY_MTU)
    ends = Memory.of(contexts[0], "server"), Memory.of(contexts[1], "client")
    for end in ends:
        end.connection.set_ciphertext_mtu(1400)
    Memory.settle(*ends)
    for end in ends:
        with pytest.raises(UnsupportedConnectionError) as caught:
            keys_of(end)
        assert caught.value.reason is Reason.VERSION
    left, right = tcp_pair()
    with left, right:
        with pytest.raises(UnsupportedConnectionError):
            ktls.wrap(left, contexts[0], server_side=True)
        left.sendall(b"as before")
        assert right.recv(100) == b"as before"


def test_handshake_not_done(identity: Identity, version: str) -> None:
    """Before and in the middle of it, over memory and over a socket."""
    context = client_context(identity, version)
    end = Memory.of(context, "client")
    for _ in range(2):
        with pytest.raises(HandshakeNotDoneError) as caught:
            keys_of(end)
        assert caught.value.reason is Reason.HANDSHAKE_NOT_DONE
        end.go()
        end.take()
    left, right = tcp_pair()
    with left, right:
        connection = SSL.Connection(context, left)
        connection.set_connect_state()
        with pytest.raises(HandshakeNotDoneError):
            ktls.extract_keys(connection)


# -- extract_keys from connections on a socket ----------------------------------------------------


@dataclass
class Driven:
    """A pyOpenSSL connection on a socket, and its peer of the ``ssl`` module."""

    connection: SSL.Connection
    sock: socket.socket
    peer: ssl.SSLSocket


@pytest.fixture
def drive(identity: Identity, in_thread: InThread) -> Iterator[Callable[..., Driven]]:
    """Makes connections: ``drive(version, side)``, or with a context of one's own."""
    made: list[Driven] = []

    def make(
        version: str, side: str, context: SSL.Context | None = None, suite: bytes | None = None
    ) -> Driven:
        ours, theirs = tcp_pair()[:: 1 if side == "server" else -1]
        theirs.settimeout(30)
        if context is None:
            context = our_context(identity, version, side)
            ktls.prepare(context)
        if suite is not None:
            choose(context, version, suite)
        peer = in_thread(
            stdlib_context(identity, version, server_side=side == "client").wrap_socket,
            theirs,
            server_side=side == "client",
            server_hostname=None if side == "client" else "localhost",
        )
        connection = SSL.Connection(context, ours)
        if side == "server":
            connection.set_accept_state()
        else:
            connection.set_connect_state()
        connection.do_handshake()
        made.append(Driven(connection, ours, peer.result(30)))
        return made[-1]

    yield make
    for each in made:
        each.sock.close()
        each.peer.close()


def test_socket(drive: Callable[..., Driven], version: str, side: str) -> None:
    """Right after the handshake: OpenSSL's next record, and the peer's, open with these keys."""
    driven = drive(version, side)
    keys = ktls.extract_keys(driven.connection)
    first = 1 if version == "TLSv1.2" else 0
    assert keys.tx.rec_seq == first + (TICKETS[version] if side == "server" else 0)
    assert keys.rx.rec_seq == first
    assert str(keys.tx.version) == version


@pytest.mark.kernel
@pytest.mark.parametrize(
    "suite",
    [row for row in SUITES if row[1] is not ktls.Cipher.AES_CCM_128],  # the ssl module has none
    ids=lambda row: f"{row[0]}-{row[1].name}",
)
def test_socket_to_kernel(
    drive: Callable[..., Driven],
    side: str,
    suite: tuple[str, ktls.Cipher, bytes],
    tmp_path: Path,
) -> None:
    """`extract_keys`, `enable`, and then plain system calls: data both ways, a file too."""
    version, cipher, name = suite
    driven = drive(version, side, suite=name)
    keys = ktls.extract_keys(driven.connection)
    assert keys.tx.cipher is cipher
    ktls.enable(driven.sock, keys)
    content = os.urandom(100_000)
    (tmp_path / "file").write_bytes(content)
    driven.sock.settimeout(30)
    with (tmp_path / "file").open("rb") as file:
        assert driven.sock.send(b"head") == 4
        sent = 0
        while sent < len(content):
            sent += os.sendfile(driven.sock.fileno(), file.fileno(), sent, len(content) - sent)
    received = b""
    while len(received) < 4 + len(content):
        received += driven.peer.recv(1 << 16)
    assert received == b"head" + content
    driven.peer.sendall(b"answer")
    assert read_data(driven.sock) == b"answer"


def read_data(sock: socket.socket) -> bytes:
    """The next application data, past the tickets."""
    while True:
        data, control, _, _ = sock.recvmsg(1 << 16, socket.CMSG_SPACE(1))
        if not control or control[0][2] == b"\x17":
            return data


@pytest.mark.kernel
@pytest.mark.parametrize("suite", SUITES, ids=lambda row: f"{row[0]}-{row[1].name}")
@pytest.mark.parametrize("rounds", [0, 2])
def test_memory_to_kernel(
    identity: Identity, side: str, suite: tuple[str, ktls.Cipher, bytes], rounds: int
) -> None:
    """Keys of a memory BIO connection whose bytes went over a socket, after data too."""
    ours, theirs = tcp_pair()
    with ours, theirs:
        ends = memory_pair(identity, suite[0], suite[2])
        end, peer = ends if side == "server" else ends[::-1]
        for _ in range(rounds):
            for one in ends:
                one.connection.send(b"data")
                Memory.settle(*ends)
        ktls.enable(ours, keys_of(end))
        ours.sendall(b"from the kernel" * 5000)
        while len(peer.read) < 4 * rounds + 75000:
            peer.give(theirs.recv(1 << 16))
            peer.go()
        assert peer.read[4 * rounds :] == b"from the kernel" * 5000
        peer.connection.send(b"to the kernel")
        theirs.sendall(peer.take())
        assert read_data(ours) == b"to the kernel"


@pytest.mark.parametrize("direction", ["sent", "received", "both"])
def test_socket_after_data(
    drive: Callable[..., Driven], version: str, side: str, direction: str
) -> None:
    driven = drive(version, side)
    if direction != "received":
        driven.connection.sendall(b"data")
        assert driven.peer.recv(10) == b"data"
    if direction != "sent":
        driven.peer.sendall(b"data")
        assert driven.connection.recv(10) == b"data"
    unproven(driven)


def test_socket_with_data_inside(drive: Callable[..., Driven], version: str, side: str) -> None:
    """A record half read: the rest of its plaintext is in OpenSSL."""
    driven = drive(version, side)
    driven.peer.sendall(b"data")
    assert driven.connection.recv(1) == b"d"
    assert driven.connection.pending() == 3
    unproven(driven)


def test_socket_with_data_waiting(drive: Callable[..., Driven], version: str, side: str) -> None:
    """What arrived but wasn't read is the kernel's to decrypt."""
    driven = drive(version, side)
    driven.peer.sendall(b"data")
    assert select.select([driven.sock], [], [], 30)[0]
    assert ktls.extract_keys(driven.connection).rx.rec_seq == (1 if version == "TLSv1.2" else 0)


def unproven(driven: Driven) -> None:
    """There must be no keys."""
    with pytest.raises(UnprovenSequenceError) as caught:
        ktls.extract_keys(driven.connection)
    assert caught.value.reason is Reason.UNPROVEN_SEQUENCE


def read_tickets(driven: Driven) -> None:
    """Reads until there is nothing; no data comes out."""
    assert select.select([driven.sock], [], [], 30)[0]
    driven.sock.setblocking(False)
    with pytest.raises(SSL.WantReadError):
        driven.connection.recv(1)


@pytest.mark.parametrize("data", [b"", b"request"])
def test_socket_after_tickets(drive: Callable[..., Driven], data: bytes) -> None:
    """A TLS 1.3 client that read its tickets: its read sequence isn't 0 any more.

    With data sent before, its write sequence isn't either, and 0 would use a nonce twice.
    """
    driven = drive("TLSv1.3", "client")
    if data:
        driven.connection.sendall(data)
        assert driven.peer.recv(100) == data
    read_tickets(driven)
    unproven(driven)


def test_socket_after_key_update(identity: Identity) -> None:
    """A TLS 1.3 server that sent data, then read a KeyUpdate: its sequence isn't the tickets'."""
    accepted, client = openssl_client(identity, "TLSv1.3")
    with accepted, client:
        context = server_context(identity, "TLSv1.3")
        ktls.prepare(context)
        connection = SSL.Connection(context, accepted)
        connection.set_accept_state()
        connection.do_handshake()
        connection.sendall(b"data")
        assert client.stdin is not None
        client.stdin.write(b"k\n")  # s_client's command: KeyUpdate
        client.stdin.flush()
        assert select.select([accepted], [], [], 30)[0]
        accepted.setblocking(False)
        try:
            with pytest.raises(SSL.WantReadError):
                connection.recv(1)
            with pytest.raises(UnprovenSequenceError):
                ktls.extract_keys(connection)
        finally:
            client.terminate()


def test_socket_unprepared(
    drive: Callable[..., Driven], identity: Identity, version: str, side: str
) -> None:
    """Nobody watched the handshake: no keys, in TLS 1.2 neither."""
    driven = drive(version, side, our_context(identity, version, side))
    with pytest.raises(HandOverError, match=r"ktls\.prepare") as caught:
        ktls.extract_keys(driven.connection)
    assert caught.value.reason in (Reason.UNPROVEN_SEQUENCE, Reason.NO_SECRETS)


def test_socket_resumed(drive: Callable[..., Driven], identity: Identity) -> None:
    """A resumed TLS 1.3 server sends one ticket."""
    context = server_context(identity, "TLSv1.3")
    ktls.prepare(context)
    client = client_context(identity, "TLSv1.3")
    session = None
    peers = []  # freed without its close_notify, one would take its session with it
    for tickets in (2, 1):
        ours, theirs = tcp_pair()
        with ours, theirs:
            server = SSL.Connection(context, ours)
            server.set_accept_state()
            ours.setblocking(False)
            peer = Memory.of(client, "client")
            peers.append(peer)
            if session is not None:
                peer.connection.set_session(session)
            peer.go()
            theirs.sendall(peer.take())
            with pytest.raises(SSL.WantReadError):
                server.do_handshake()
            peer.give(theirs.recv(1 << 16))
            peer.go()
            theirs.sendall(peer.take())
            server.do_handshake()
            assert ktls.extract_keys(server).tx.rec_seq == tickets
            peer.give(theirs.recv(1 << 16))
            peer.go()
            session = peer.connection.get_session()


@pytest.mark.parametrize("number", [SSL.TLS1_VERSION, SSL.TLS1_1_VERSION])
def test_socket_old_version(identity: Identity, number: int, in_thread: InThread) -> None:
    contexts = server_context(identity), client_context(identity)
    for context in contexts:
        ktls.prepare(context)
        context.set_min_proto_version(number)
        context.set_max_proto_version(number)
        context.set_cipher_list(b"ALL:@SECLEVEL=0")
    ours, theirs = tcp_pair()
    with ours, theirs:
        server, client = (
            SSL.Connection(*pair) for pair in zip(contexts, (ours, theirs), strict=True)
        )
        server.set_accept_state()
        client.set_connect_state()
        done = in_thread(server.do_handshake)
        client.do_handshake()
        done.result(30)
        for end in (server, client):
            with pytest.raises(UnsupportedConnectionError) as caught:
                ktls.extract_keys(end)
            assert caught.value.reason is Reason.VERSION


def test_cbc_on_a_socket(drive: Callable[..., Driven], side: str) -> None:
    driven = drive("TLSv1.2", side, suite=b"ECDHE-ECDSA-AES128-SHA256")
    with pytest.raises(UnsupportedConnectionError, match="AES128-SHA256") as caught:
        ktls.extract_keys(driven.connection)
    assert caught.value.reason is Reason.CIPHER_SUITE


def test_explicit_nonce_is_random(drive: Callable[..., Driven], side: str) -> None:
    """TLS 1.2 on a socket: OpenSSL's own can't be seen, so ours begins anywhere."""
    driven = drive("TLSv1.2", side, suite=b"ECDHE-ECDSA-AES128-GCM-SHA256")
    ivs = {ktls.extract_keys(driven.connection).tx.iv for _ in range(4)}
    assert len(ivs) == 4


@pytest.mark.parametrize(
    "where",
    [
        "userspace",
        pytest.param("kernel", marks=pytest.mark.kernel),
    ],
)
def test_session_outlives_its_connection(
    identity: Identity, version: str, where: str, in_thread: InThread
) -> None:
    """A session taken from a connection that was closed properly can be resumed after it."""
    server = stdlib_context(identity, version, server_side=True)
    client = client_context(identity, version)

    def serve(sock: socket.socket) -> None:
        with server.wrap_socket(sock, server_side=True) as peer:
            peer.sendall(b"x")
            peer.recv(1)

    def connect(session: SSL.Session | None) -> tuple[SSL.Session, bool]:
        accepted, connecting = tcp_pair()
        served = in_thread(serve, accepted)
        kernel = where == "kernel"
        with ktls.wrap(
            connecting,
            client,
            server_hostname="localhost",
            session=session,
            tx=kernel,
            rx=kernel,
            require=kernel,
        ) as tls:
            assert tls.recv(1) == b"x"
            answer = tls.get_session(), tls.session_reused
        served.result(30)
        return answer

    session, _ = connect(None)
    gc.collect()  # the first connection is gone now
    assert connect(session)[1]


# -- the server's name ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "127.0.0.1"])
def test_right_name(make_pair: Callable[..., Pair], version: str, name: str) -> None:
    pair = make_pair(version, "client", "userspace", server_hostname=name)
    assert pair.tls.version() == version


@dataclass
class Refusal:
    """A client's attempt, and what the server made of it."""

    error: BaseException
    ours: socket.socket
    server_done: bool
    server_error: str


def attempt(identity: Identity, in_thread: InThread, **keywords: Any) -> Refusal:  # noqa: ANN401
    """Wraps a client that must fail against a server that would not."""
    accepted, connecting = tcp_pair()
    with accepted, connecting:
        accepted.settimeout(30)
        connecting.settimeout(30)

        def serve() -> tuple[bool, str]:
            context = stdlib_context(identity, keywords.pop("version", None), server_side=True)
            context.num_tickets = 0
            done = False
            try:
                with context.wrap_socket(accepted, server_side=True) as tls:
                    done = True
                    tls.recv(1)
            except OSError as error:
                return done, str(error)
            return done, ""

        context = keywords.pop("context", None) or client_context(identity)
        server = in_thread(serve)
        with pytest.raises(Exception) as caught:  # noqa: PT011 - which, is for the test to say
            ktls.wrap(connecting, context, tx=False, rx=False, **keywords)
        if connecting.fileno() >= 0:
            connecting.shutdown(socket.SHUT_RDWR)
        return Refusal(caught.value, connecting, *server.result(30))


@pytest.mark.parametrize("name", ["wrong.example", "sub.localhost", "127.0.0.2", "::1", "1.2.3"])
def test_wrong_name(identity: Identity, in_thread: InThread, name: str) -> None:
    """The handshake fails by name, and the socket is closed."""
    refusal = attempt(identity, in_thread, server_hostname=name)
    assert isinstance(refusal.error, HandshakeError)
    assert name in str(refusal.error)
    assert refusal.ours.fileno() == -1


def test_wrong_name_tells_nothing(identity: Identity, in_thread: InThread) -> None:
    """An impostor gets an alert (RFC 8446 section 4.4.2.4) rather than a client's Finished."""
    context = client_context(identity, "TLSv1.3")
    context.use_certificate_chain_file(str(identity.chain))
    context.use_privatekey_file(str(identity.key))
    refusal = attempt(identity, in_thread, context=context, server_hostname="wrong.example")
    assert not refusal.server_done
    assert "alert" in refusal.server_error.lower()


@pytest.mark.parametrize(
    "name",
    [
        "x" * 64,
        "",
        "a b",
        "*.x",
    ],
)
def test_impossible_name(identity: Identity, name: str) -> None:
    """An argument that can't be right is refused before anything is sent."""
    left, right = tcp_pair()
    with left, right:
        right.shutdown(socket.SHUT_WR)
        with pytest.raises(ValueError):  # noqa: PT011 - of the codec or of service-identity
            ktls.wrap(left, client_context(identity), server_hostname=name, tx=False, rx=False)
        left.sendall(b"as before")
        assert right.recv(100) == b"as before"


def test_no_name(identity: Identity) -> None:
    left, right = tcp_pair()
    with left, right:
        with pytest.raises(ValueError, match="server_hostname"):
            ktls.wrap(left, client_context(identity))
        left.sendall(b"as before")
        assert right.recv(100) == b"as before"


@pytest.mark.parametrize("name", [None, "wrong.example", "127.0.0.2"])
def test_unchecked_name(make_pair: Callable[..., Pair], name: str | None) -> None:
    """With check_hostname=False any name goes."""
    pair = make_pair("TLSv1.3", "client", "userspace", server_hostname=name, check_hostname=False)
    pair.tls.sendall(b"x")
    assert pair.peer.recv(1) == b"x"


def test_untrusted_authority(identity: Identity, in_thread: InThread) -> None:
    """OpenSSL's own refusal, with its alert."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_verify(SSL.VERIFY_PEER)
    refusal = attempt(identity, in_thread, context=context, server_hostname="localhost")
    assert isinstance(refusal.error, HandshakeError)
    assert "certificate verify failed" in str(refusal.error)
    assert "UNKNOWN_CA" in refusal.server_error


def test_no_verification_no_check(identity: Identity, in_thread: InThread) -> None:
    """A context that verifies nothing: a name would prove nothing."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    accepted, connecting = tcp_pair()
    server = in_thread(
        stdlib_context(identity, server_side=True).wrap_socket, accepted, server_side=True
    )
    with ktls.wrap(connecting, context, tx=False, rx=False), server.result(30):
        pass
