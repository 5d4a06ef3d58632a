"""Fixtures: certificates, contexts, connected pairs, the four modes, and what must not leak.

Tests marked ``kernel`` need kernel TLS. ``make test`` runs them in the lab; where there is none
they are skipped, and with KTLS_REQUIRE_KERNEL set such a skip is a failure.
"""

from __future__ import annotations

import errno
import functools
import gc
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, TypeVar

import pytest
import trustme
from OpenSSL import SSL

import ktls
from ktls import Cipher, CryptoInfo, TrafficKeys, Version, _ktls, offload, tcp, wait
from ktls.sending import KernelSender

from .record_peer import RecordPair, RecordPeer

_T = TypeVar("_T")

InThread = Callable[..., Future[Any]]

MODES: dict[str, dict[str, Any]] = {
    "kernel": {"tx": True, "rx": True},
    "tx-only": {"tx": True, "rx": False},
    "rx-only": {"tx": False, "rx": True},
    "userspace": {"tx": False, "rx": False},
}


def has_kernel_tls() -> bool:
    """Whether this machine's kernel lets us attach the ULP, tried on a loopback pair."""
    left, right = tcp_pair()
    with left, right:
        try:
            _ktls.attach(left.fileno())
        except OSError:
            return False
    return True


@functools.cache
def kernel_has(option: int) -> bool:
    """Whether this kernel has an option of TLS connections, tried on a loopback pair."""
    keys = CryptoInfo(
        Version.TLS_1_3, Cipher.AES_GCM_128, key=bytes(16), iv=bytes(8), salt=bytes(4), rec_seq=0
    )
    left, right = tcp_pair()
    with left, right:
        ktls.enable(left, TrafficKeys(keys, keys))
        try:
            _ktls.set_option(
                left.fileno(), option, 512 if option == _ktls.TX_MAX_PAYLOAD_LEN else 1
            )
        except OSError as error:
            assert error.errno == errno.ENOPROTOOPT  # noqa: PT017
            return False
    return True


def tcp_pair(buffers: tuple[int, int] | None = None) -> tuple[socket.socket, socket.socket]:
    """A connected TCP pair on loopback: the accepted end, then the connecting one.

    Args:
        buffers: SO_SNDBUF of the accepted end and SO_RCVBUF of the other, if they are to be small.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as failed:
        connecting = failed.enter_context(socket.socket())
        if buffers is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers[0])
            connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers[1])
        connecting.connect(listener.getsockname())
        failed.pop_all()
        accepted, _ = listener.accept()
    return accepted, connecting


KERNEL_TLS = has_kernel_tls()

ONE_KERNEL_EACH = (pytest.mark.old_kernel, pytest.mark.new_kernel)
version_each = pytest.mark.parametrize(
    "version",
    [
        pytest.param(version, marks=kernel)
        for version, kernel in zip(("TLSv1.2", "TLSv1.3"), ONE_KERNEL_EACH, strict=True)
    ],
)


def pytest_configure(config: pytest.Config) -> None:
    """Declares the markers."""
    config.addinivalue_line("markers", "kernel: needs kernel TLS (the lab has it)")
    config.addinivalue_line("markers", "torture: long; run by `make torture`")
    for name in ("tx_only", "rx_only"):
        config.addinivalue_line("markers", f"{name}: in that mode; one kernel's are torture's")
    for name in ("old_kernel", "new_kernel"):
        config.addinivalue_line(
            "markers", f"{name}: so long that the lab runs it on that one alone"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need kernel TLS fail without it where it is required, else they are skipped."""
    for item in items:
        mode = getattr(item, "callspec", None) and item.callspec.params.get("mode")  # type: ignore[attr-defined]
        if mode in ("tx-only", "rx-only"):
            item.add_marker(mode.replace("-", "_"))
    if KERNEL_TLS:
        return
    if os.environ.get("KTLS_REQUIRE_KERNEL"):
        raise pytest.UsageError("KTLS_REQUIRE_KERNEL is set, and this kernel has no TLS")
    for item in items:
        if item.get_closest_marker("kernel"):
            item.add_marker(pytest.mark.skip("this kernel has no TLS: run `make test`"))


def pytest_collection_finish() -> None:
    """What is there before the first test stays: each test's own collection is quick then."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _unknown_kernel() -> None:
    """No test knows from another that the kernel has no TLS."""
    offload._absent.clear()


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    """No test leaves a descriptor or a thread behind."""
    descriptors, threads = _open_descriptors(), set(threading.enumerate())
    yield
    gc.collect()
    assert _open_descriptors() == descriptors, "leaked descriptors"
    assert set(threading.enumerate()) <= threads, "leaked threads"


def _open_descriptors() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # listdir's own
            continue
    return {name: link for name, link in found.items() if not link.startswith("/")}


@dataclass(frozen=True)
class Identity:
    """A certificate for localhost, its key, and the authority that issued it: PEM files."""

    chain: Path
    key: Path
    authority: Path


@pytest.fixture(scope="session", params=["ecdsa"])
def identity(request: pytest.FixtureRequest, identities: dict[str, Identity]) -> Identity:
    """The server's identity; ECDSA unless a test parametrizes it."""
    return identities[request.param]


@pytest.fixture(scope="session")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    """An RSA and an ECDSA identity."""
    directory = tmp_path_factory.mktemp("identities")
    made = {}
    for name, key_type in (("rsa", trustme.KeyType.RSA), ("ecdsa", trustme.KeyType.ECDSA)):
        authority = trustme.CA(key_type=key_type)
        made[name] = issue(authority, directory, name, key_type)
    return made


def issue(authority: trustme.CA, directory: Path, name: str, key_type: trustme.KeyType) -> Identity:
    """Issues a certificate for localhost and 127.0.0.1, and writes it with its chain."""
    issued = authority.issue_cert("localhost", "127.0.0.1", key_type=key_type)
    identity = Identity(*(directory / f"{name}-{part}.pem" for part in ("chain", "key", "ca")))
    for number, pem in enumerate(issued.cert_chain_pems):
        pem.write_to_path(str(identity.chain), append=number > 0)
    issued.private_key_pem.write_to_path(str(identity.key))
    authority.cert_pem.write_to_path(str(identity.authority))
    return identity


VERSIONS = {"TLSv1.2": SSL.TLS1_2_VERSION, "TLSv1.3": SSL.TLS1_3_VERSION}
STDLIB_VERSIONS = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}


def server_context(identity: Identity, version: str | None = None) -> SSL.Context:
    """A pyOpenSSL server context."""
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.use_certificate_chain_file(str(identity.chain))
    context.use_privatekey_file(str(identity.key))
    context.set_session_id(b"ktls tests")
    _limit(context, version)
    return context


def client_context(identity: Identity, version: str | None = None) -> SSL.Context:
    """A pyOpenSSL client context that verifies."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.load_verify_locations(str(identity.authority))
    context.set_verify(SSL.VERIFY_PEER)
    _limit(context, version)
    return context


def _limit(context: SSL.Context, version: str | None) -> None:
    if version is not None:
        context.set_min_proto_version(VERSIONS[version])
        context.set_max_proto_version(VERSIONS[version])


def stdlib_context(
    identity: Identity, version: str | None = None, *, server_side: bool
) -> ssl.SSLContext:
    """The other side's context, of the ``ssl`` module."""
    if server_side:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(identity.chain, identity.key)
    else:
        context = ssl.create_default_context(cafile=str(identity.authority))
    if version is not None:
        context.minimum_version = context.maximum_version = STDLIB_VERSIONS[version]
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


Context = SSL.Context | ssl.SSLContext


def our_context(
    library: str, identity: Identity, version: str | None = None, *, server_side: bool
) -> Context:
    """A context for our side, of ``pyopenssl`` or ``ssl``."""
    if library == "ssl":
        return stdlib_context(identity, version, server_side=server_side)
    return (server_context if server_side else client_context)(identity, version)


@pytest.fixture(params=["pyopenssl"])
def library(request: pytest.FixtureRequest) -> str:
    """Which library our side's context is of; pyOpenSSL unless a test takes `both_libraries`."""
    return str(request.param)


both_libraries = pytest.mark.parametrize("library", ["pyopenssl", "ssl"], indirect=True)


@pytest.fixture
def in_thread() -> Iterator[Callable[..., Future[Any]]]:
    """Runs a function in a thread; its errors come out of the future, or fail the test."""
    futures: list[Future[Any]] = []
    with ThreadPoolExecutor() as pool:

        def submit(function: Callable[..., _T], *args: Any, **keywords: Any) -> Future[_T]:  # noqa: ANN401
            futures.append(pool.submit(function, *args, **keywords))
            return futures[-1]

        yield submit
    for future in futures:
        future.result(0)


SIZE = 3 << 19
CONTENT = os.urandom(SIZE)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[IO[bytes]]:
    """A file of `CONTENT`."""
    path = tmp_path / "content"
    path.write_bytes(CONTENT)
    with path.open("rb") as opened:
        yield opened


class Interrupted(Exception):  # noqa: N818 - it is no error
    """What a signal's handler raises in a test."""


@pytest.fixture
def interrupting() -> Iterator[Callable[[], None]]:
    """A function that has a signal's handler raise `Interrupted` in the main thread."""

    def handler(_signal: int, _frame: FrameType | None) -> None:
        raise Interrupted

    main = threading.get_ident()
    earlier = signal.signal(signal.SIGUSR1, handler)
    yield lambda: signal.pthread_kill(main, signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, earlier)


@dataclass
class Pair:
    """A ktls socket and its peer of the ``ssl`` module, connected and through their handshake."""

    tls: ktls.Socket
    peer: ssl.SSLSocket


MakePair = Callable[..., Pair]
MakeRecordPair = Callable[..., RecordPair]


@pytest.fixture(params=["TLSv1.2", "TLSv1.3"])
def version(request: pytest.FixtureRequest) -> str:
    """The TLS version."""
    return str(request.param)


@pytest.fixture(
    params=[
        pytest.param(name, marks=() if name == "userspace" else pytest.mark.kernel)
        for name in MODES
    ]
)
def mode(request: pytest.FixtureRequest) -> str:
    """Which directions go to the kernel."""
    return str(request.param)


@pytest.fixture(params=["server", "client"])
def side(request: pytest.FixtureRequest) -> str:
    """Which side ktls is."""
    return str(request.param)


@pytest.fixture
def make_pair(
    identity: Identity, library: str, in_thread: Callable[..., Future[Any]]
) -> Iterator[Callable[..., Pair]]:
    """Makes connected pairs: ``make_pair(version, side, mode, **arguments_of_wrap)``."""
    pairs: list[Pair] = []

    def make(version: str, side: str = "server", mode: str = "kernel", **keywords: Any) -> Pair:  # noqa: ANN401
        accepted, connecting = tcp_pair()
        server = side == "server"
        ours, theirs = (accepted, connecting) if server else (connecting, accepted)
        for sock in (ours, theirs):
            sock.settimeout(30)
        context = our_context(library, identity, version, server_side=server)
        peer_context = stdlib_context(identity, version, server_side=not server)
        peer = in_thread(
            peer_context.wrap_socket,
            theirs,
            server_side=not server,
            server_hostname="localhost" if server else None,
        )
        keywords.setdefault("require", mode == "kernel")
        if not server:
            keywords.setdefault("server_hostname", "localhost")
        tls = ktls.wrap(ours, context, server_side=server, **MODES[mode], **keywords)
        pairs.append(Pair(tls, peer.result(30)))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.peer.close()
        pair.tls.close()


@pytest.fixture
def make_record_pair(
    identity: Identity, library: str, in_thread: Callable[..., Future[Any]]
) -> Iterator[MakeRecordPair]:
    """Makes connected pairs: ``make_record_pair(version, side, mode, **arguments_of_wrap)``."""
    pairs: list[RecordPair] = []

    def make(
        version: str,
        side: str = "server",
        mode: str = "kernel",
        contexts: tuple[Context, Context] | None = None,
        **keywords: Any,  # noqa: ANN401
    ) -> RecordPair:
        accepted, connecting = tcp_pair()
        server = side == "server"
        ours, theirs = (accepted, connecting) if server else (connecting, accepted)
        for sock in (ours, theirs):
            sock.settimeout(5)
        if contexts is None:
            context = our_context(library, identity, version, server_side=server)
            peer_context = our_context("pyopenssl", identity, version, server_side=not server)
        else:
            context, peer_context = contexts if server else contexts[::-1]
        peer = in_thread(RecordPeer, theirs, peer_context, server_side=not server)
        keywords.setdefault("require", mode == "kernel")
        if not server:
            keywords.setdefault("server_hostname", "localhost")
        tls = ktls.wrap(ours, context, server_side=server, **MODES[mode], **keywords)
        pairs.append(RecordPair(tls, peer.result(20)))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.peer.sock.close()
        with suppress(ktls.KTLSError, AttributeError):  # a test may have dropped its socket
            pair.tls.close()


def assert_all_counted(tls: ktls.Socket) -> None:
    """What the kernel was given to send is known to the byte, after close_notify and before FIN."""
    sender = tls._sender
    if isinstance(sender, KernelSender):
        deadline = time.monotonic() + 5
        while sender.held():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert sender._end == tcp.written(tls)


def in_kernel(tls: ktls.Socket) -> tuple[bool, bool]:
    """Whether sending, and receiving, are in the kernel."""
    return tls.tx.mode is ktls.Mode.SOFTWARE, tls.rx.mode is ktls.Mode.SOFTWARE


def receive(peer: socket.socket, size: int) -> bytes:
    """Receives so many bytes, or fewer at the end of the stream."""
    received = bytearray()
    while len(received) < size:
        chunk = peer.recv(min(size - len(received), 1 << 16))
        if not chunk:
            break
        received += chunk
    return bytes(received)


def narrow(pair: Pair) -> None:
    """Makes the buffers between the two so small that some 700 KB fill them.

    No smaller: a window of less than loopback's 64 KB segments opens by a timer only.
    """
    pair.tls.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
    pair.peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)


def soon_full(make: MakeRecordPair, version: str, side: str, mode: str) -> RecordPair:
    """A non-blocking pair with small buffers, for `fill`."""
    pair = make(version, side, mode, close_timeout=0.15)
    pair.tls.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
    pair.peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
    pair.tls.setblocking(False)
    return pair


def fill(tls: ktls.Socket, data: bytes) -> int:
    """Sends until nothing fits any more, and goes on not to fit; the socket is non-blocking."""
    sent = tried = 0
    while tried < 6:
        try:
            sent += tls.send(memoryview(data)[sent:])
            tried = 0
        except ktls.WouldBlockError:
            tried += 1
            wait.until(tls, wait.WRITABLE, 0.06)  # a delayed acknowledgement takes 40 ms
    assert 0 < sent < len(data)
    return sent
