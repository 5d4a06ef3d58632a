"""ktls.wrap: arguments, refusals, handshakes that fail, and what is on the wire at the end."""

from __future__ import annotations

import errno
import os
import selectors
import socket
import ssl
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import trustme
from OpenSSL import SSL
from typing_extensions import Buffer

import ktls
from ktls import Alert, Mode, Reason, RecordType, records
from ktls.types import AlertLevel

from .conftest import (
    KERNEL_TLS,
    MODES,
    Identity,
    InThread,
    MakePair,
    MakeRecordPair,
    client_context,
    in_kernel,
    issue,
    receive,
    server_context,
    stdlib_context,
    tcp_pair,
)
from .record_peer import RecordPeer


@pytest.fixture
def stranger(tmp_path: Path) -> Identity:
    """An identity for localhost that nobody trusts."""
    return issue(trustme.CA(), tmp_path, "stranger", trustme.KeyType.ECDSA)


def usable(sock: socket.socket, peer: socket.socket) -> bool:
    """Whether a TCP pair still is one, with nothing on its wire."""
    sock.sendall(b"plain")
    peer.settimeout(5)
    return peer.recv(100) == b"plain" and sock.fileno() >= 0


@pytest.mark.parametrize("library", ["pyopenssl", "ssl"])
def test_client_that_can_not_begin(library: str) -> None:
    """A context without a version left: a failed handshake, before its first byte."""
    context: SSL.Context | ssl.SSLContext
    if library == "ssl":
        context = stdlib_client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        stdlib_client.minimum_version = ssl.TLSVersion.TLSv1_3
        stdlib_client.maximum_version = ssl.TLSVersion.TLSv1_2
    else:
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.set_max_proto_version(SSL.TLS1_2_VERSION)
    accepted, connecting = tcp_pair()
    with accepted:
        with pytest.raises(ktls.HandshakeError, match="no protocols available"):
            ktls.wrap(connecting, context, server_hostname="localhost")
        assert connecting.fileno() < 0
        assert accepted.recv(100) == b""


@pytest.mark.skipif(KERNEL_TLS, reason="this kernel has TLS")
def test_pitfall_7_require_without_kernel_tls(identity: Identity) -> None:
    """Refused before anything was sent; the socket is as it was, and usable."""
    accepted, connecting = tcp_pair()
    with accepted, connecting:
        connecting.settimeout(7)
        for tx, rx in ((True, True), (True, False), (False, True)):
            with pytest.raises(ktls.KernelUnavailableError) as caught:
                ktls.wrap(
                    connecting,
                    client_context(identity),
                    server_hostname="localhost",
                    require=True,
                    tx=tx,
                    rx=rx,
                )
            assert caught.value.errno == errno.ENOENT
            assert caught.value.reason is Reason.NO_KERNEL_TLS
            assert "modprobe tls" in str(caught.value)
        assert connecting.gettimeout() == 7
        assert usable(connecting, accepted)


def test_modes_and_reasons(make_pair: MakePair, version: str, side: str, mode: str) -> None:
    """Each direction says where it is and, if not in the kernel, why."""
    tls = make_pair(version, side, mode).tls
    for offload, wanted in ((tls.tx, MODES[mode]["tx"]), (tls.rx, MODES[mode]["rx"])):
        if wanted:
            assert (offload.mode, offload.reason) == (Mode.SOFTWARE, None)
            assert str(offload) == "software"
        else:
            assert (offload.mode, offload.reason) == (Mode.USERSPACE, Reason.NOT_WANTED)
            assert "not asked for" in str(offload)


@pytest.mark.skipif(KERNEL_TLS, reason="this kernel has TLS")
def test_fallback_without_kernel_tls(make_pair: MakePair, version: str, side: str) -> None:
    """It goes on in userspace, and says what to do about it."""
    pair = make_pair(version, side, "kernel", require=False)
    for offload in (pair.tls.tx, pair.tls.rx):
        assert offload.mode is Mode.USERSPACE
        assert offload.reason is Reason.NO_KERNEL_TLS
        assert "setsockopt(TCP_ULP)" in offload.detail
    pair.tls.sendall(b"works")
    assert pair.peer.recv(100) == b"works"


def test_used_context_falls_back(identity: Identity, in_thread: InThread) -> None:
    """A context that made a connection before delivers no TLS 1.3 secrets: userspace, by name."""
    context = server_context(identity, "TLSv1.3")
    SSL.Connection(context, None)
    accepted, connecting = tcp_pair()
    peer_context = stdlib_context(identity, server_side=False)
    peer = in_thread(peer_context.wrap_socket, connecting, server_hostname="localhost")
    with ktls.wrap(accepted, context, server_side=True) as tls, peer.result(5) as reader:
        if KERNEL_TLS:
            assert tls.tx.mode is Mode.SOFTWARE or tls.tx.reason is Reason.NO_SECRETS
        tls.sendall(b"works")
        assert reader.recv(100) == b"works"


def test_bad_arguments_leave_the_socket_usable(identity: Identity) -> None:
    accepted, connecting = tcp_pair()
    client = client_context(identity)
    with accepted, connecting:
        with pytest.raises(ValueError, match="server_hostname"):
            ktls.wrap(connecting, client)
        with pytest.raises(ktls.UnsupportedConnectionError):
            ktls.wrap(connecting, SSL.Context(SSL.DTLS_METHOD), check_hostname=False)
        connecting.setblocking(False)
        with pytest.raises(ValueError, match="do_handshake_on_connect"):
            ktls.wrap(connecting, client, server_hostname="localhost")
        connecting.settimeout(3)
        assert connecting.gettimeout() == 3
        assert usable(connecting, accepted)


def test_not_a_connected_tcp_socket(identity: Identity) -> None:
    """SocketError, and the socket stays its owner's."""
    context = server_context(identity)
    left, right = socket.socketpair()
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    fresh = socket.socket()
    closed = socket.socket()
    closed.close()
    with left, right, udp, fresh:
        listener = socket.create_server(("127.0.0.1", 0))
        with listener:
            for sock in (left, udp, fresh, closed, listener):
                with pytest.raises(ktls.SocketError):
                    ktls.wrap(sock, context, server_side=True)
            assert -1 not in (sock.fileno() for sock in (left, udp, fresh, listener))


def test_wrapped_socket_is_detached(make_pair: MakePair, identity: Identity) -> None:
    accepted, connecting = tcp_pair()
    accepted.settimeout(12)
    descriptor = accepted.fileno()
    with connecting:
        tls = ktls.wrap(
            accepted, server_context(identity), server_side=True, do_handshake_on_connect=False
        )
        assert accepted.fileno() == -1
        assert (tls.fileno(), tls.gettimeout()) == (descriptor, 12)
        tls.close()


def test_handshake_that_comes_in_pieces(identity: Identity) -> None:
    """What was looked at is taken: the descriptor isn't readable again before more has come.

    Else an event loop, or a blocking read of what was only looked at, would spin.
    """
    hello = ssl.MemoryBIO()
    client = stdlib_context(identity, "TLSv1.3", server_side=False).wrap_bio(
        ssl.MemoryBIO(), hello, server_hostname="localhost"
    )
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    stream = hello.read()
    accepted, connecting = tcp_pair()
    accepted.setblocking(False)
    connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    tls = ktls.wrap(
        accepted, server_context(identity), server_side=True, do_handshake_on_connect=False
    )
    with connecting, tls, selectors.DefaultSelector() as selector:
        selector.register(tls, selectors.EVENT_READ)
        before = 0
        for cut in (1, 2, 4, 5, 6, 7, 100, len(stream) - 1):
            connecting.sendall(stream[before:cut])
            before = cut
            assert selector.select(5)
            with pytest.raises(ktls.WouldBlockError):
                tls.do_handshake()
            assert not tls.handshake_wants_write
            assert not selector.select(0)
        connecting.shutdown(socket.SHUT_WR)
        assert selector.select(5)
        with pytest.raises(ktls.HandshakeCutOffError):
            tls.do_handshake()


def wire_alert(sock: socket.socket) -> tuple[int, int] | None:
    """The first alert in the clear of what is on a wire, until its end."""
    stream = b""
    with suppress(ConnectionResetError):
        while chunk := sock.recv(1 << 16):
            stream += chunk
    for record in records.split(stream):
        if record[0] == RecordType.ALERT:
            return record[5], record[6]
    return None


def test_untrusted_certificate(
    identity: Identity, stranger: Identity, in_thread: InThread, version: str
) -> None:
    """The client says HandshakeError, its peer gets the alert unknown_ca, the socket is closed."""
    accepted, connecting = tcp_pair()
    context = stdlib_context(stranger, version, server_side=True)
    peer = in_thread(stdlib_handshake, context, accepted)
    connecting.settimeout(5)
    with pytest.raises(ktls.HandshakeError, match=r"(?i)certificate verify failed"):
        ktls.wrap(connecting, client_context(identity, version), server_hostname="localhost")
    assert connecting.fileno() == -1
    assert "unknown ca" in str(peer.result(5)).lower().replace("_", " ")


def stdlib_handshake(context: ssl.SSLContext, sock: socket.socket) -> Exception | None:
    """A server's handshake, and what came of it."""
    sock.settimeout(5)
    try:
        with context.wrap_socket(sock, server_side=True) as tls:
            tls.recv(1)
    except OSError as error:
        return error
    return None


def test_client_does_not_trust_us(
    identity: Identity, stranger: Identity, in_thread: InThread, version: str
) -> None:
    """A server learns of the refusal by its client's alert, at the latest while it reads."""
    accepted, connecting = tcp_pair()
    accepted.settimeout(5)
    context = stdlib_context(identity, version, server_side=False)

    def connect() -> None:
        with connecting, pytest.raises(ssl.SSLCertVerificationError):
            context.wrap_socket(connecting, server_hostname="localhost")

    connect_done = in_thread(connect)
    with pytest.raises(ktls.HandshakeError, match=r"(?i)unknown ca"):
        ktls.wrap(accepted, server_context(stranger, version), server_side=True).recv(1)
    connect_done.result(5)
    assert accepted.fileno() == -1


def test_wrong_host(identity: Identity, in_thread: InThread, version: str) -> None:
    """A certificate for somebody else."""
    accepted, connecting = tcp_pair()
    peer = in_thread(
        stdlib_handshake, stdlib_context(identity, version, server_side=True), accepted
    )
    connecting.settimeout(5)
    with pytest.raises(ktls.HandshakeError, match=r"example\.org|hostname"):
        ktls.wrap(connecting, client_context(identity, version), server_hostname="example.org")
    assert connecting.fileno() == -1
    peer.result(5)


def test_no_common_version(identity: Identity, in_thread: InThread) -> None:
    accepted, connecting = tcp_pair()
    accepted.settimeout(5)
    context = stdlib_context(identity, "TLSv1.2", server_side=False)

    def connect() -> str:
        with connecting, pytest.raises(ssl.SSLError) as caught:
            context.wrap_socket(connecting, server_hostname="localhost")
        return str(caught.value).lower().replace("_", " ")

    peer = in_thread(connect)
    with pytest.raises(ktls.HandshakeError):
        ktls.wrap(accepted, server_context(identity, "TLSv1.3"), server_side=True)
    assert accepted.fileno() == -1
    assert "protocol version" in peer.result(5)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x00\x05hello",
        b"\x17\x03\x03\x00\x05hello",
        b"\x80\x2e\x01\x00\x02" + bytes(41),
        b"\x16\x03\x01\xff\xff" + bytes(70000),
        bytes(100),
        b"SSH-2.0-OpenSSH_9.2\r\n",
    ],
    ids=["http", "bad-hello", "data", "sslv2", "too-long", "zeros", "ssh"],
)
@pytest.mark.parametrize("side", ["server", "client"])
def test_garbage(identity: Identity, in_thread: InThread, side: str, garbage: bytes) -> None:
    """HandshakeError at once, the socket closed; what goes back is at most an alert."""
    accepted, connecting = tcp_pair()
    server = side == "server"
    ours, theirs = (accepted, connecting) if server else (connecting, accepted)
    ours.settimeout(5)
    theirs.settimeout(5)

    def send() -> tuple[int, int] | None:
        with theirs:
            if not server:
                theirs.recv(1 << 16)
            with suppress(OSError):
                theirs.sendall(garbage)
            return wire_alert(theirs)

    peer = in_thread(send)
    started = time.monotonic()
    with pytest.raises(ktls.HandshakeError):
        ktls.wrap(
            ours,
            server_context(identity) if server else client_context(identity),
            server_side=server,
            server_hostname="localhost",
        )
    assert time.monotonic() - started < 3
    assert ours.fileno() == -1
    alert = peer.result(5)
    assert alert is None or alert[0] == AlertLevel.FATAL


@pytest.mark.parametrize("side", ["server", "client"])
@pytest.mark.parametrize("how", ["fin", "reset"])
def test_peer_closes_during_the_handshake(identity: Identity, side: str, how: str) -> None:
    accepted, connecting = tcp_pair()
    server = side == "server"
    ours, theirs = (accepted, connecting) if server else (connecting, accepted)
    ours.settimeout(5)
    if how == "reset":
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        theirs.close()
    else:
        theirs.shutdown(socket.SHUT_WR)
    # After a reset there may be no peer any more to have a name.
    with pytest.raises((ktls.HandshakeCutOffError, ktls.SocketError)) as caught:
        ktls.wrap(
            ours,
            server_context(identity) if server else client_context(identity),
            server_side=server,
            server_hostname="localhost",
        )
    if isinstance(caught.value, ktls.SocketError):
        ours.close()
    assert ours.fileno() == -1
    theirs.close()


@pytest.mark.parametrize("side", ["server", "client"])
def test_silent_peer_times_out(identity: Identity, side: str) -> None:
    accepted, connecting = tcp_pair()
    server = side == "server"
    ours, theirs = (accepted, connecting) if server else (connecting, accepted)
    ours.settimeout(0.1)
    with theirs, pytest.raises(ktls.StalledError):
        ktls.wrap(
            ours,
            server_context(identity) if server else client_context(identity),
            server_side=server,
            server_hostname="localhost",
        )
    assert ours.fileno() == -1


def test_dribbling_peer_times_out(identity: Identity, in_thread: InThread) -> None:
    """The timeout bounds the whole handshake, though a byte comes every now and then."""
    accepted, connecting = tcp_pair()
    accepted.settimeout(0.3)
    enough = threading.Event()

    def dribble() -> None:
        with connecting, suppress(OSError):
            for byte in b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500):
                connecting.sendall(bytes([byte]))
                if enough.wait(0.02):
                    return

    in_thread(dribble)
    started = time.monotonic()
    try:
        with pytest.raises(ktls.StalledError):
            ktls.wrap(accepted, server_context(identity), server_side=True)
        assert time.monotonic() - started < 2
    finally:
        enough.set()
    assert accepted.fileno() == -1


def test_endless_hello(identity: Identity, in_thread: InThread) -> None:
    """A hello in records of a byte each may not take time and memory as it likes."""
    accepted, connecting = tcp_pair()
    accepted.settimeout(20)
    hello = b"\1\1\xff\xff" + bytes(1 << 16)

    def flood() -> None:
        with connecting, suppress(OSError):
            connecting.sendall(b"".join(b"\x16\3\1\0\1" + bytes([byte]) for byte in hello))

    flooding = in_thread(flood)
    with pytest.raises(ktls.HandshakeError, match="endless"):
        ktls.wrap(accepted, server_context(identity), server_side=True)
    flooding.result(20)


def test_handshake_error_without_wrap_closing(identity: Identity) -> None:
    """do_handshake() by the caller: HandshakeError says that the socket is closed."""
    accepted, connecting = tcp_pair()
    tls = ktls.wrap(
        accepted, server_context(identity), server_side=True, do_handshake_on_connect=False
    )
    with connecting, tls:
        connecting.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(ktls.HandshakeError):
            tls.do_handshake()
        with pytest.raises(OSError, match=r"."):
            tls.do_handshake()
        with pytest.raises((OSError, ktls.HandshakeNotDoneError)):
            tls.send(b"x")


def test_non_blocking_handshake(
    identity: Identity, in_thread: InThread, version: str, side: str, mode: str
) -> None:
    """Driven by a selector, with both flights cut into small pieces."""
    accepted, connecting = tcp_pair()
    server = side == "server"
    ours, theirs = (accepted, connecting) if server else (connecting, accepted)
    theirs.settimeout(5)
    peer_context = (
        client_context(identity, version) if server else server_context(identity, version)
    )
    peer = in_thread(RecordPeer, theirs, peer_context, server_side=not server)
    ours.setblocking(False)
    tls = ktls.wrap(
        ours,
        server_context(identity, version) if server else client_context(identity, version),
        server_side=server,
        server_hostname="localhost",
        do_handshake_on_connect=False,
        **MODES[mode],
    )
    rounds = 0
    with tls, selectors.DefaultSelector() as selector:
        selector.register(tls, selectors.EVENT_READ)
        while True:
            try:
                tls.do_handshake()
                break
            except ktls.WouldBlockError:
                rounds += 1
                assert rounds < 100
                assert selector.select(5)
        tls.do_handshake()
        assert in_kernel(tls) == (MODES[mode]["tx"], MODES[mode]["rx"])
        assert tls.gettimeout() == 0
        tls.settimeout(5)
        tls.sendall(b"done")
        other = peer.result(5)
        assert other.receive_data(4) == b"done"
        other.sock.close()


@pytest.mark.parametrize("host", ["::1", "localhost"])
def test_ipv6(identity: Identity, in_thread: InThread, version: str, mode: str, host: str) -> None:
    """Over IPv6, which has a TCP of its own in the kernel."""
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 loopback here")
    with listener:
        connecting = socket.create_connection(listener.getsockname()[:2])
        accepted, _ = listener.accept()
    context = stdlib_context(identity, version, server_side=True)
    accepted.settimeout(5)
    peer = in_thread(context.wrap_socket, accepted, server_side=True)
    tls = ktls.wrap(
        connecting,
        client_context(identity, version),
        server_hostname=host,
        check_hostname=host == "localhost",
        **MODES[mode],
    )
    with tls, peer.result(5) as other:
        assert tls.family is socket.AF_INET6
        assert in_kernel(tls) == (MODES[mode]["tx"], MODES[mode]["rx"])
        tls.sendall(b"six")
        assert other.recv(100) == b"six"
        other.sendall(b"seven")
        assert tls.recv(100) == b"seven"


def test_pitfall_26_request_and_fin_with_finished(
    identity: Identity, in_thread: InThread, version: str, mode: str
) -> None:
    """The client's Finished, its request, close_notify and FIN come in one go."""
    accepted, connecting = tcp_pair()
    accepted.settimeout(5)

    class Held(socket.socket):
        """From the client's second flight on, keeps everything back until it is released."""

        flights = 0
        held = b""

        def sendall(self, data: Buffer, flags: int = 0, /) -> None:
            self.flights += bool(data)
            if self.flights < 2 or (version == "TLSv1.2" and self.flights == 2):
                super().sendall(data)
            else:
                self.held += bytes(data)

    sock = Held(fileno=connecting.detach())
    sock.settimeout(5)
    asking = in_thread(RecordPeer, sock, client_context(identity, version), server_side=False)

    def ask() -> RecordPeer:
        peer: RecordPeer = asking.result(5)
        peer.send(RecordType.APPLICATION_DATA, b"request")
        peer.send(RecordType.ALERT, bytes([AlertLevel.WARNING, Alert.CLOSE_NOTIFY]))
        socket.socket.sendall(sock, sock.held)
        sock.shutdown(socket.SHUT_WR)
        return peer

    asked = in_thread(ask)
    tls = ktls.wrap(accepted, server_context(identity, version), server_side=True, **MODES[mode])
    with tls, sock:
        assert in_kernel(tls) == (MODES[mode]["tx"], MODES[mode]["rx"])
        assert tls.recv(100) == b"request"
        if version == "TLSv1.3":
            assert tls.recv(100) == b""
        tls.sendall(b"answer")
        assert asked.result(5).receive_data(6) == b"answer"


def test_nothing_is_sent_twice(
    make_record_pair: MakeRecordPair, version: str, side: str, mode: str
) -> None:
    """The wire ends with the handshake: the next bytes are the next record, and open."""
    pair = make_record_pair(version, side, mode)
    for number in range(3):
        pair.tls.sendall(b"%d" % number)
        assert pair.peer.receive_data(1) == b"%d" % number
    pair.tls.close()
    assert pair.peer.receive_other_than_tickets() == (RecordType.ALERT, b"\x01\x00")
    assert pair.peer.receive() is None


@pytest.mark.kernel
def test_wrapped_twice(make_pair: MakePair, identity: Identity) -> None:
    """A socket that has keys is refused by name before anything goes out in clear."""
    pair = make_pair("TLSv1.3", "server", "kernel")
    second = socket.socket(fileno=os.dup(pair.tls.fileno()))
    with second, pytest.raises(ktls.AlreadyEnabledError):
        ktls.enable(second, _some_keys())
    pair.tls.sendall(b"still fine")
    assert receive(pair.peer, 10) == b"still fine"


def _some_keys() -> ktls.TrafficKeys:
    info = ktls.CryptoInfo(
        ktls.Version.TLS_1_3, ktls.Cipher.AES_GCM_128, bytes(16), bytes(8), bytes(4), 0
    )
    return ktls.TrafficKeys(info, info)


def test_tls_in_tls(make_pair: MakePair, identity: Identity, mode: str) -> None:
    """A socket that has TLS already, by whomever, is refused; it and the context are as before."""
    pair = make_pair("TLSv1.3", "server", mode)
    plain = socket.socket(fileno=os.dup(pair.tls.fileno()))
    with plain:
        tls = (pair.tls, pair.peer) + ((plain,) if mode == "kernel" else ())
        for sock in tls:
            context = stdlib_context(identity, server_side=True)
            for each in (server_context(identity), context):
                with pytest.raises(ktls.SocketError, match="TLS already"):
                    ktls.wrap(sock, each, server_side=True)
            assert context.keylog_filename is None
    pair.tls.sendall(b"as before")
    assert receive(pair.peer, 9) == b"as before"


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_failed_handshake_leaves_the_timeout(identity: Identity, timeout: float | None) -> None:
    """Also where a last alert had to be sent without waiting."""
    ours, peer = tcp_pair()
    with peer:
        peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        context = client_context(identity)
        with ktls.wrap(
            ours, context, server_hostname="localhost", do_handshake_on_connect=False
        ) as tls:
            tls.settimeout(timeout)
            with pytest.raises(ktls.HandshakeError):
                tls.do_handshake()
            assert tls.gettimeout() == timeout
            assert os.get_blocking(tls.fileno()) == (timeout is None)
