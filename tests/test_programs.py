"""Against the programs that are out there: curl, openssl's s_client and s_server, and GnuTLS's.

They are other implementations of TLS, or other versions of OpenSSL; we are in the kernel.
"""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL

import ktls
from ktls import Mode, Reason, _ktls

from .conftest import (
    Identity,
    InThread,
    client_context,
    kernel_has,
    server_context,
    tcp_pair,
)
from .peers import CIPHERS, SECONDS, Suite, client, note_hellos, run, server

pytestmark = pytest.mark.kernel

REQUEST = b"GET /document HTTP/1.0\r\nHost: localhost\r\n\r\n"
# What they fetch, in bytes: gnutls-cli prints it with a system call for each.
CLIENTS = {"curl": 1 << 20, "s_client": 1 << 20, "gnutls-cli": 20_000}
SERVERS = ["s_server", "gnutls-serv"]
LINE = 1024

matrix = pytest.mark.parametrize(
    "suite",
    [
        pytest.param(
            Suite(version, cipher, key),
            id=f"{version}-{cipher}-{key}",
            marks=[pytest.mark.torture] if key == "rsa" else [],  # a handshake of another size
        )
        for version in ("TLSv1.2", "TLSv1.3")
        for cipher in CIPHERS
        for key in ("rsa", "ecdsa")
    ],
)


@pytest.fixture(scope="session")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 1 MiB; lines of text, which servers can echo."""
    path = tmp_path_factory.mktemp("documents") / "document"
    lines = (os.urandom(LINE).hex()[: LINE - 1].encode() + b"\n" for _ in range(1024))
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Where we serve."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(SECONDS)
        yield listening


def accept(listener: socket.socket, context: SSL.Context, **arguments: Any) -> ktls.Socket:  # noqa: ANN401
    """The next connection, through its handshake."""
    sock, _ = listener.accept()
    sock.settimeout(SECONDS)
    return ktls.wrap(sock, context, server_side=True, **arguments)


def connect(port: int, context: SSL.Context, session: Any = None) -> ktls.Socket:  # noqa: ANN401
    """A connection to a program."""
    return ktls.wrap(
        socket.create_connection(("127.0.0.1", port), timeout=SECONDS),
        context,
        server_hostname="localhost",
        session=session,
        require=True,
        suppress_ragged_eofs=False,
    )


def read_request(tls: ktls.Socket) -> bytes:
    """Reads up to the empty line that ends a request."""
    request = b""
    while b"\r\n\r\n" not in request:
        chunk = tls.recv(4096)
        assert chunk, request
        request += chunk
    return request


def answer(tls: ktls.Socket, document: Path, size: int) -> None:
    """Serves so many bytes of the document to whatever asks."""
    assert read_request(tls).startswith(b"GET /")
    header = f"HTTP/1.0 200 OK\r\nContent-Length: {size}\r\n\r\n"
    tls.sendall(header.encode(), socket.MSG_MORE)
    with document.open("rb") as file:
        assert tls.sendfile(file, count=size) == size


def body(printed: bytes) -> bytes:
    """The answer's content, behind its header."""
    header, _, content = printed.partition(b"\r\n\r\n")
    assert b"HTTP/1.0 200 " in header
    return content


def read_all(tls: ktls.Socket) -> bytes:
    """Reads to the peer's close_notify; an end without it raises."""
    received = bytearray()
    while chunk := tls.recv(65536):
        received += chunk
    return bytes(received)


def read_exactly(tls: ktls.Socket, size: int) -> bytes:
    """Reads so many bytes."""
    return tls.recv(size, socket.MSG_WAITALL)


def assert_as_agreed(tls: ktls.Socket, suite: Suite) -> None:
    """Both directions are in the kernel, with that suite."""
    assert (tls.tx.mode, tls.rx.mode) == (Mode.SOFTWARE, Mode.SOFTWARE), (tls.tx, tls.rx)
    assert tls.version() == suite.version
    cipher = tls.cipher()
    assert cipher is not None
    assert cipher[0] == suite.name


@pytest.mark.parametrize("program", CLIENTS)
@matrix
def test_client(
    program: str,
    suite: Suite,
    identities: dict[str, Identity],
    listener: socket.socket,
    document: Path,
    in_thread: InThread,
) -> None:
    identity = identities[suite.key]
    context = server_context(identity, suite.version)
    suite.limit(context)
    words = client(program, listener.getsockname()[1], suite, identity)
    printed = in_thread(run, words, REQUEST)
    with accept(listener, context, require=True) as tls:
        assert_as_agreed(tls, suite)
        answer(tls, document, CLIENTS[program])
    assert body(printed.result(SECONDS)) == document.read_bytes()[: CLIENTS[program]]


@pytest.mark.parametrize("program", SERVERS)
@matrix
def test_server_sends_file(
    program: str, suite: Suite, identities: dict[str, Identity], document: Path
) -> None:
    identity = identities[suite.key]
    context = client_context(identity, suite.version)
    suite.limit(context)
    with (
        server(program, "file", suite, identity, document) as port,
        connect(port, context) as tls,
    ):
        assert_as_agreed(tls, suite)
        tls.sendall(REQUEST)
        assert body(read_all(tls)) == document.read_bytes()


@pytest.mark.parametrize("program", SERVERS)
@matrix
def test_server_echoes_file(
    program: str,
    suite: Suite,
    identities: dict[str, Identity],
    document: Path,
    in_thread: InThread,
) -> None:
    identity = identities[suite.key]
    context = client_context(identity, suite.version)
    suite.limit(context)
    size = 128 * LINE
    with (
        server(program, "echo", suite, identity, document) as port,
        connect(port, context) as tls,
        document.open("rb") as file,
    ):
        assert_as_agreed(tls, suite)
        echoed = in_thread(read_exactly, tls, size)
        assert tls.sendfile(file, count=size) == size
        expected = document.read_bytes()[:size]
        if program == "s_server":
            expected = b"".join(line[-2::-1] + b"\n" for line in expected.splitlines(True))
        assert echoed.result(SECONDS) == expected
        tls.unwrap()


@pytest.mark.parametrize("program", [*CLIENTS, *SERVERS])
def test_client_certificate(
    program: str,
    version: str,
    identity: Identity,
    listener: socket.socket,
    document: Path,
    in_thread: InThread,
) -> None:
    suite = Suite(version)
    if program in CLIENTS:
        context = server_context(identity, version)
        context.load_verify_locations(str(identity.authority))
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
        port = listener.getsockname()[1]
        printed = in_thread(run, client(program, port, suite, identity, certificate=True), REQUEST)
        with accept(listener, context, require=True) as tls:
            assert tls.getpeercert() is not None
            answer(tls, document, CLIENTS[program])
        assert body(printed.result(SECONDS)) == document.read_bytes()[: CLIENTS[program]]
    else:
        context = client_context(identity, version)
        context.use_certificate_chain_file(str(identity.chain))
        context.use_privatekey_file(str(identity.key))
        with (
            server(program, "file", suite, identity, document, certificate=True) as port,
            connect(port, context) as tls,
        ):
            tls.sendall(REQUEST)
            assert body(read_all(tls)) == document.read_bytes()


@pytest.mark.parametrize("program", [*CLIENTS, *SERVERS])
def test_hello_retry_request(
    program: str,
    identity: Identity,
    listener: socket.socket,
    document: Path,
    in_thread: InThread,
) -> None:
    if program in CLIENTS:
        suite = Suite("TLSv1.3", groups=("P-256", "P-384"))
        context = server_context(identity, "TLSv1.3")
        context.set_tmp_ecdh(ec.SECP384R1())
        hellos = note_hellos(context)
        port = listener.getsockname()[1]
        printed = in_thread(run, client(program, port, suite, identity), REQUEST)
        with accept(listener, context, require=True) as tls:
            answer(tls, document, CLIENTS[program])
        assert body(printed.result(SECONDS)) == document.read_bytes()[: CLIENTS[program]]
    else:
        suite = Suite("TLSv1.3", groups=("P-384",))
        context = client_context(identity, "TLSv1.3")
        hellos = note_hellos(context)
        with (
            server(program, "file", suite, identity, document) as port,
            connect(port, context) as tls,
        ):
            tls.sendall(REQUEST)
            assert body(read_all(tls)) == document.read_bytes()
    assert len(hellos) == 2


@pytest.mark.parametrize("program", ["s_client", "gnutls-cli"])
def test_client_resumes(
    program: str,
    version: str,
    identity: Identity,
    listener: socket.socket,
    document: Path,
    in_thread: InThread,
    tmp_path: Path,
) -> None:
    context = server_context(identity, version)
    words = client(program, listener.getsockname()[1], Suite(version), identity)
    session = str(tmp_path / "session")
    if program == "s_client":
        first, second = [*words, "-sess_out", session], [*words, "-sess_in", session]
        printed = in_thread(run, first, REQUEST)
        with accept(listener, context, require=True) as tls:
            answer(tls, document, 1)
        assert body(printed.result(SECONDS)) == document.read_bytes()[:1]
        printed = in_thread(run, second, REQUEST)
    else:
        printed = in_thread(run, [*words, "--resume", "--waitresumption"], REQUEST)
        with accept(listener, context, require=True) as tls:
            assert tls.recv(1) == b""
    with accept(listener, context, require=True) as tls:
        assert tls.session_reused
        answer(tls, document, CLIENTS[program])
    assert body(printed.result(SECONDS)) == document.read_bytes()[: CLIENTS[program]]


@pytest.mark.parametrize("program", SERVERS)
def test_server_resumes(program: str, version: str, identity: Identity, document: Path) -> None:
    context = client_context(identity, version)
    session = None
    with server(program, "file", Suite(version), identity, document) as port:
        for reused in (False, True, True):
            with connect(port, context, session) as tls:
                assert tls.session_reused is reused
                tls.sendall(REQUEST)
                assert body(read_all(tls)) == document.read_bytes()
                session = tls.get_session()
            del tls
            gc.collect()  # the session must outlive its connection


@pytest.mark.parametrize(
    ("version", "modifier"),
    [
        ("TLSv1.2", "%NO_SESSION_HASH"),  # no extended master secret
        ("TLSv1.2", "%NO_TICKETS"),
        ("TLSv1.3", "%NO_TICKETS"),
        ("TLSv1.3", "%DISABLE_TLS13_COMPAT_MODE"),  # no ChangeCipherSpec
    ],
)
def test_gnutls_varieties(
    version: str,
    modifier: str,
    identity: Identity,
    listener: socket.socket,
    document: Path,
    in_thread: InThread,
) -> None:
    suite = Suite(version, modifier=modifier)
    words = client("gnutls-cli", listener.getsockname()[1], suite, identity)
    printed = in_thread(run, words, REQUEST)
    with accept(listener, server_context(identity, version), require=True) as tls:
        answer(tls, document, CLIENTS["gnutls-cli"])
    assert body(printed.result(SECONDS)) == document.read_bytes()[: CLIENTS["gnutls-cli"]]
    with (
        server("gnutls-serv", "file", suite, identity, document) as port,
        connect(port, client_context(identity, version)) as tls,
    ):
        tls.sendall(REQUEST)
        assert body(read_all(tls)) == document.read_bytes()


@pytest.mark.parametrize(
    ("program", "option"),
    [("s_client", ["-maxfraglen", "1024"]), ("gnutls-cli", ["--recordsize=1024"])],
)
def test_pitfall_16_client_wants_small_records(
    program: str,
    option: list[str],
    version: str,
    identity: Identity,
    listener: socket.socket,
    document: Path,
    in_thread: InThread,
) -> None:
    """RFC 6066 section 4: the kernel keeps to it, or sending stays in userspace."""
    words = client(program, listener.getsockname()[1], Suite(version), identity)
    printed = in_thread(run, [*words, *option], REQUEST)
    with accept(listener, server_context(identity, version)) as tls:
        assert tls.rx.mode is Mode.SOFTWARE
        if kernel_has(_ktls.TX_MAX_PAYLOAD_LEN):
            assert tls.tx.mode is Mode.SOFTWARE
            assert tls.info().max_send_fragment == 1024
        else:
            assert tls.tx.reason is Reason.FRAGMENT_LIMIT
        answer(tls, document, CLIENTS[program])
    assert body(printed.result(SECONDS)) == document.read_bytes()[: CLIENTS[program]]


class HastyClient:
    """A client that sends its last flight, its request and its FIN in one go.

    pyOpenSSL over memory BIOs, so that the test decides what goes over the wire when. Loopback
    delivers at once: nobody waits for anything but the answer.
    """

    def __init__(self, context: SSL.Context, sock: socket.socket, session: Any = None) -> None:  # noqa: ANN401
        """Takes a connected socket, and a session to resume."""
        self.connection = SSL.Connection(context, None)
        self.connection.set_connect_state()
        if session is not None:
            self.connection.set_session(session)
        self._sock = sock

    def ask(self, tls: ktls.Socket, *, close_notify: bool) -> None:
        """Handshakes with a non-blocking server; its last step is still to come."""
        self._sock.setblocking(False)
        while not self._handshake():
            self._sock.sendall(self._outgoing())
            with suppress(ktls.WouldBlockError):
                tls.do_handshake()
            with suppress(BlockingIOError):
                while flight := self._sock.recv(65536):
                    self.connection.bio_write(flight)
        self.connection.send(REQUEST)
        if close_notify:
            self.connection.shutdown()
        self._sock.sendall(self._outgoing())
        self._sock.shutdown(socket.SHUT_WR)

    def read_all(self) -> bytes:
        """Reads to the server's close_notify."""
        self._sock.settimeout(SECONDS)
        received = bytearray()
        while True:
            try:
                received += self.connection.recv(65536)
            except SSL.WantReadError:
                self.connection.bio_write(self._sock.recv(65536))
            except SSL.ZeroReturnError:
                return bytes(received)

    def _handshake(self) -> bool:
        try:
            self.connection.do_handshake()
        except SSL.WantReadError:
            return False
        return True

    def _outgoing(self) -> bytes:
        return self.connection.bio_read(1 << 16)


@pytest.mark.parametrize("close_notify", [False, True], ids=["fin", "close-notify"])
@pytest.mark.parametrize("handshake", ["full", "resumed"])
def test_request_and_fin_in_one_go(
    version: str,
    handshake: str,
    close_notify: bool,
    identity: Identity,
    document: Path,
    in_thread: InThread,
) -> None:
    """The FIN is there before the server is through its handshake (TLS 1.2: if it is resumed)."""
    ours, theirs = server_context(identity, version), client_context(identity, version)
    session = None
    for reused in (False, True) if handshake == "resumed" else (False,):
        accepted, connecting = tcp_pair()
        accepted.setblocking(False)
        with (
            connecting,
            ktls.wrap(
                accepted, ours, server_side=True, require=True, do_handshake_on_connect=False
            ) as tls,
        ):
            hasty = HastyClient(theirs, connecting, session)
            hasty.ask(tls, close_notify=close_notify)
            tls.do_handshake()
            assert (tls.tx.mode, tls.rx.mode) == (Mode.SOFTWARE, Mode.SOFTWARE)
            assert tls.session_reused is reused
            tls.settimeout(SECONDS)
            received = in_thread(hasty.read_all)
            answer(tls, document, 1 << 20)
            assert tls.recv(1) == b""
            tls.shutdown(socket.SHUT_WR)
            assert body(received.result(SECONDS)) == document.read_bytes()
            session = hasty.connection.get_session()
            hasty.connection.set_shutdown(SSL.SENT_SHUTDOWN | SSL.RECEIVED_SHUTDOWN)
