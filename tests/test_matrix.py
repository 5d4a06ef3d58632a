"""Every combination against OpenSSL in userspace: version, cipher, side, key, and who closes first.

Our side, with a context of either library, is in the kernel, or the test fails. The peer is the
``ssl`` module, in a thread, or where that can't make the case, ktls in userspace.
"""

from __future__ import annotations

import gc
import hashlib
import os
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

import ktls
from ktls import Mode, RecordType

from .conftest import Context, Identity, assert_all_counted, both_libraries, our_context, tcp_pair
from .peers import note_hellos

pytestmark = pytest.mark.kernel

Peer = ssl.SSLSocket | ktls.Socket
CLOSE_NOTIFY = (RecordType.ALERT, b"\x01\x00")
FILE_SIZE = 300_000
SUITES = [
    *(
        pytest.param("TLSv1.2", f"ECDHE-{key.upper()}-{aead}", key, id=f"TLSv1.2-{aead}-{key}")
        for key in ("rsa", "ecdsa")
        for aead in ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305")
    ),
    pytest.param("TLSv1.2", "ECDHE-ECDSA-AES128-CCM", "ecdsa", id="TLSv1.2-AES128-CCM-ecdsa"),
    *(  # without forward secrecy: the key exchange is another, and the client begins nothing
        pytest.param("TLSv1.2", suite, "rsa", id=f"TLSv1.2-RSA-{suite}")
        for suite in ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "AES128-CCM")
    ),
    *(
        pytest.param("TLSv1.3", f"TLS_{aead}", key, id=f"TLSv1.3-{aead}-{key}")
        for key in ("rsa", "ecdsa")
        for aead in (
            "AES_128_GCM_SHA256",
            "AES_256_GCM_SHA384",
            "CHACHA20_POLY1305_SHA256",
            "AES_128_CCM_SHA256",
        )
    ),
]
CCM = "TLS_AES_128_CCM_SHA256"  # which the ssl module doesn't offer
LIBRARY_SUITES = [
    pytest.param(library, *param.values, id=f"{param.id}-{library}")
    for param in SUITES
    for library in ("pyopenssl", "ssl")
    if library != "ssl" or CCM not in param.values
]


class Ends(NamedTuple):
    """Our context and the peer's."""

    ours: Context
    theirs: Context


class Connected(NamedTuple):
    """Both ends of a connection, through their handshake."""

    tls: ktls.Socket
    peer: Peer


class Connector:
    """Connects ends, and closes them all."""

    def __init__(self, in_thread: Callable[..., Future[Any]]) -> None:
        """Takes what runs the peer's handshake."""
        self._in_thread = in_thread
        self._opened: list[Connected] = []

    def __call__(self, ends: Ends, side: str, session: Any = None) -> Connected:  # noqa: ANN401
        """Connects; the session is for whoever is the client."""
        accepted, connecting = tcp_pair()
        accepted.settimeout(30)
        connecting.settimeout(30)
        server: dict[str, Any] = {"server_side": True, "suppress_ragged_eofs": False}
        client = {
            "server_hostname": "localhost",
            "session": session,
            "suppress_ragged_eofs": False,
        }
        if side == "server":
            peer = self._in_thread(_wrap_peer, ends.theirs, connecting, client)
            tls = ktls.wrap(accepted, ends.ours, require=True, **server)
        else:
            peer = self._in_thread(_wrap_peer, ends.theirs, accepted, server)
            tls = ktls.wrap(connecting, ends.ours, require=True, **client)
        assert (tls.tx.mode, tls.rx.mode) == (Mode.SOFTWARE, Mode.SOFTWARE)
        self._opened.append(Connected(tls, peer.result(30)))
        return self._opened[-1]

    def close(self) -> None:
        """Closes and forgets all of them."""
        while self._opened:
            tls, peer = self._opened.pop()
            tls.close()
            peer.close()


@pytest.fixture
def connect(in_thread: Callable[..., Future[Any]]) -> Iterator[Connector]:
    """Connects ends: ``connect(ends, side)``."""
    connector = Connector(in_thread)
    yield connector
    connector.close()


def _wrap_peer(context: Context, sock: Any, arguments: dict[str, Any]) -> Peer:  # noqa: ANN401
    if isinstance(context, SSL.Context):
        return ktls.wrap(sock, context, tx=False, rx=False, **arguments)
    return context.wrap_socket(sock, **arguments)


def make_ends(
    identity: Identity, version: str, side: str, library: str, peer_library: str = "ssl"
) -> Ends:
    """Contexts for a version that leave everything else open."""
    server = side == "server"
    return Ends(
        our_context(library, identity, version, server_side=server),
        our_context(peer_library, identity, version, server_side=not server),
    )


@pytest.fixture
def ends(identity: Identity, version: str, side: str, library: str) -> Ends:
    """Contexts for this version and side."""
    return make_ends(identity, version, side, library)


def choose_suite(context: Context, version: str, suite: str) -> None:
    """Limits a context to a cipher suite; in TLS 1.3 ``ssl`` can't, and takes the other end's."""
    if isinstance(context, ssl.SSLContext):
        if version == "TLSv1.2":
            context.set_ciphers(suite)
    elif version == "TLSv1.2":
        context.set_cipher_list(suite.encode())
    else:
        context.set_tls13_ciphersuites(suite.encode())


def demand_certificate(context: Context, identity: Identity) -> None:
    """Has a server ask its clients for a certificate of this authority."""
    if isinstance(context, ssl.SSLContext):
        context.load_verify_locations(identity.authority)
        context.verify_mode = ssl.CERT_REQUIRED
    else:
        context.load_verify_locations(str(identity.authority))
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)


def give_certificate(context: Context, identity: Identity) -> None:
    """Gives a client a certificate."""
    if isinstance(context, ssl.SSLContext):
        context.load_cert_chain(identity.chain, identity.key)
    else:
        context.use_certificate_chain_file(str(identity.chain))
        context.use_privatekey_file(str(identity.key))


def refuse_tickets(context: Context) -> None:
    """Has a server remember, and in TLS 1.3 send a ticket all the same."""
    if isinstance(context, ssl.SSLContext):
        context.options |= ssl.OP_NO_TICKET
    else:
        context.set_options(SSL.OP_NO_TICKET)


def take_p384_only(context: Context) -> None:
    """A group for which a client's first hello has no key share."""
    if isinstance(context, ssl.SSLContext):
        context.set_ecdh_curve("secp384r1")
    else:
        context.set_tmp_ecdh(ec.SECP384R1())


def speak(context: Context, *protocols: str, server_side: bool) -> None:
    """Offers protocols by ALPN, or accepts the last of them."""
    if isinstance(context, ssl.SSLContext):
        context.set_alpn_protocols(protocols[-1:] if server_side else protocols)
    elif server_side:
        context.set_alpn_select_callback(lambda _connection, _offered: protocols[-1].encode())
    else:
        context.set_alpn_protos([protocol.encode() for protocol in protocols])


@pytest.fixture(scope="session")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for sendfile."""
    path = tmp_path_factory.mktemp("documents") / "document"
    path.write_bytes(os.urandom(FILE_SIZE))
    return path


def certificate(identity: Identity) -> bytes:
    """The first of its chain, DER."""
    first = x509.load_pem_x509_certificate(identity.chain.read_bytes())
    return first.public_bytes(Encoding.DER)


def read_exactly(sock: Peer, size: int) -> bytes:
    """Reads so many bytes; fewer only at the end of the stream."""
    received = bytearray()
    while len(received) < size and (chunk := sock.recv(min(65536, size - len(received)))):
        received += chunk
    return bytes(received)


def echo(sock: Peer, size: int) -> None:
    """Sends back what it receives, after all of it has come."""
    sock.sendall(read_exactly(sock, size))


def data_crosses(pair: Connected, in_thread: Callable[..., Future[Any]], document: Path) -> None:
    """Bytes and a file go there and come back unchanged."""
    data = os.urandom(100_000)
    echoed = in_thread(echo, pair.peer, len(data) + FILE_SIZE)
    pair.tls.sendall(data)
    with document.open("rb") as file:
        assert pair.tls.sendfile(file) == FILE_SIZE
    returned = read_exactly(pair.tls, len(data) + FILE_SIZE)
    echoed.result(30)
    digest = hashlib.sha256(data + document.read_bytes()).hexdigest()
    assert hashlib.sha256(returned).hexdigest() == digest


def close_both(pair: Connected, in_thread: Callable[..., Future[Any]], first: str) -> None:
    """Both ends see the other's close_notify, whoever begins."""
    tls, peer = pair
    if first == "ours":
        closed = in_thread(tls.unwrap)
        assert peer.recv(1) == b""
        peer.unwrap()
        closed.result(30)
        assert tls.recv_record(1) == CLOSE_NOTIFY
    else:
        closed = in_thread(peer.unwrap)
        assert tls.recv_record(1) == CLOSE_NOTIFY
        tls.unwrap()
        closed.result(30)


@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize(("library", "version", "suite", "key"), LIBRARY_SUITES)
def test_suite(
    library: str,
    version: str,
    suite: str,
    key: str,
    side: str,
    first: str,
    identities: dict[str, Identity],
    connect: Connector,
    in_thread: Callable[..., Future[Any]],
    document: Path,
) -> None:
    identity = identities[key]
    choosy = suite == CCM or (library == "ssl" and version == "TLSv1.3")
    ends = make_ends(identity, version, side, library, "pyopenssl" if choosy else "ssl")
    for context in ends:
        choose_suite(context, version, suite)
    pair = connect(ends, side)
    cipher = pair.tls.cipher()
    assert cipher is not None
    assert cipher[0] == suite
    assert cipher == pair.peer.cipher()
    assert pair.tls.version() == pair.peer.version() == version
    client = pair.peer if side == "server" else pair.tls
    assert client.getpeercert(True) == certificate(identity)
    data_crosses(pair, in_thread, document)
    close_both(pair, in_thread, first)
    assert_all_counted(pair.tls)


@pytest.fixture(scope="session")
def long_identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """A chain of 45 KB, three records: a certificate with very many names, and two above it.

    A TLS 1.3 server's ticket has the client's certificate in it, and so takes three records too.
    """
    root = trustme.CA()
    authority = root.create_child_ca().create_child_ca()
    issued = authority.issue_cert("localhost", *(f"host{n:04}.localdomain" for n in range(2000)))
    directory = tmp_path_factory.mktemp("long")
    identity = Identity(*(directory / f"{part}.pem" for part in ("chain", "key", "ca")))
    identity.chain.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    identity.key.write_bytes(issued.private_key_pem.bytes())
    identity.authority.write_bytes(root.cert_pem.bytes())
    return identity


@both_libraries
@pytest.mark.parametrize("chain", ["short-chain", "long-chain"])
def test_client_certificate(
    library: str,
    version: str,
    side: str,
    chain: str,
    identity: Identity,
    long_identity: Identity,
    connect: Connector,
    in_thread: Callable[..., Future[Any]],
    document: Path,
) -> None:
    both = long_identity if chain == "long-chain" else identity
    ends = make_ends(both, version, side, library)
    server, client = ends if side == "server" else ends[::-1]
    demand_certificate(server, both)
    give_certificate(client, both)
    pair = connect(ends, side)
    assert pair.tls.getpeercert(True) == pair.peer.getpeercert(True) == certificate(both)
    data_crosses(pair, in_thread, document)
    close_both(pair, in_thread, "ours")


@both_libraries
@pytest.mark.parametrize("state", ["ticket", "session-id"])
def test_resumption(
    version: str,
    side: str,
    state: str,
    ends: Ends,
    connect: Connector,
    in_thread: Callable[..., Future[Any]],
    document: Path,
) -> None:
    if state == "session-id":
        for context in ends:
            refuse_tickets(context)
    session = None
    for reused in (False, True, True):
        pair = connect(ends, side, session)
        assert pair.tls.session_reused is pair.peer.session_reused is reused
        data_crosses(pair, in_thread, document)  # a TLS 1.3 client gets its tickets on the way
        client = pair.peer if side == "server" else pair.tls
        session = client.session if isinstance(client, ssl.SSLSocket) else client.get_session()
        close_both(pair, in_thread, "ours")
        # OpenSSL forgets the session of a connection that is freed without a close_notify.
        del pair, client
        connect.close()
        gc.collect()


@both_libraries
def test_hello_retry_request(
    library: str,
    side: str,
    identity: Identity,
    connect: Connector,
    in_thread: Callable[..., Future[Any]],
    document: Path,
) -> None:
    """The server takes a group only for which the client's first hello has no key share."""
    ends = make_ends(identity, "TLSv1.3", side, library, "pyopenssl" if library == "ssl" else "ssl")
    hellos = note_hellos(next(each for each in ends if isinstance(each, SSL.Context)))
    take_p384_only(ends.ours if side == "server" else ends.theirs)
    pair = connect(ends, side)
    assert len(hellos) == 2
    data_crosses(pair, in_thread, document)
    close_both(pair, in_thread, "ours")


@both_libraries
def test_alpn(
    side: str, ends: Ends, connect: Connector, in_thread: Callable[..., Future[Any]], document: Path
) -> None:
    speak(ends.ours, "first", "second", server_side=side == "server")
    speak(ends.theirs, "first", "second", server_side=side != "server")
    pair = connect(ends, side)
    assert pair.tls.selected_alpn_protocol() == "second"
    assert isinstance(pair.peer, ssl.SSLSocket)
    assert pair.peer.selected_alpn_protocol() == "second"
    data_crosses(pair, in_thread, document)
    close_both(pair, in_thread, "theirs")


@both_libraries
def test_many_records(
    ends: Ends, side: str, connect: Connector, in_thread: Callable[..., Future[Any]]
) -> None:
    """More than 256 records each way: the sequence carries into its next byte."""
    messages = [os.urandom(size) for size in range(1, 400)]
    pair = connect(ends, side)

    def exchange(sock: Peer) -> bytes:
        received = b""
        for message in messages:
            sock.sendall(message)
            received += read_exactly(sock, len(message))
        return received

    theirs = in_thread(exchange, pair.peer)
    assert exchange(pair.tls) == theirs.result(30) == b"".join(messages)
    close_both(pair, in_thread, "theirs")
