"""Not one byte lost or doubled where the handshake's bytes end and the data's begin.

The peer's last flight of the handshake and its first data are sent as one segment, or cut in two
at each of their first 600 bytes; the first part is read, and acted upon, before the second is sent.
Whatever follows Finished in it belongs to the kernel, or in userspace mode to OpenSSL. The peer is
an endpoint of the ``ssl`` module in memory, so a test decides what goes into which segment.

Who speaks last in a handshake, and so can append data to it:

* a TLS 1.3 client, and a TLS 1.2 client that resumes (with ktls as the server),
* a TLS 1.2 server (ktls as the client),
* a TLS 1.3 server after its flight: its tickets and data come while ktls hands over.
"""

from __future__ import annotations

import hashlib
import random
import select
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest
from OpenSSL import SSL

import ktls
from ktls.types import Mode

from .conftest import MODES, Identity, client_context, server_context, stdlib_context, tcp_pair

FIRST_BYTES = 600
SOME = (0, 1, 4, 5, 6, 10, 11, 45, 63, 64, 69, 80, 90, 200, 599)


@dataclass
class Peer:
    """An endpoint of the ``ssl`` module whose bytes go where the test says."""

    sock: socket.socket
    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO
    tls: ssl.SSLObject

    @classmethod
    def on(
        cls,
        sock: socket.socket,
        context: ssl.SSLContext,
        server_side: bool,
        session: ssl.SSLSession | None,
    ) -> Peer:
        """A fresh one."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(
            incoming,
            outgoing,
            server_side=server_side,
            server_hostname=None if server_side else "localhost",
            session=session,
        )
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        return cls(sock, incoming, outgoing, tls)

    def handshake(self) -> bool:
        """One step with what has arrived; True when it is done."""
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def receive(self) -> None:
        """Takes what is there, at least a byte."""
        arrived = self.sock.recv(1 << 20)
        assert arrived, "the connection ended"
        self.incoming.write(arrived)

    def read_exactly(self, size: int) -> bytes:
        """So much plaintext, and no more than that is there."""
        data = b""
        while len(data) < size:
            try:
                data += self.tls.read(1 << 20)
            except ssl.SSLWantReadError:
                self.receive()
        with suppress(ssl.SSLWantReadError):
            data += self.tls.read(1)
        return data


@dataclass
class Scene:
    """What all connections of a test have in common."""

    version: str
    side: str
    mode: str
    ours: SSL.Context
    theirs: ssl.SSLContext
    session: ssl.SSLSession | None = None

    @property
    def peer_speaks_last(self) -> bool:
        """Whether the peer's flight with the data also ends the handshake."""
        if self.version == "TLSv1.3":
            return self.side == "server"
        return (self.side == "client") != (self.session is not None)

    @contextmanager
    def connection(self) -> Iterator[tuple[ktls.Socket, Peer]]:
        """Both ends, nothing sent yet; ours doesn't block."""
        server = self.side == "server"
        accepted, connecting = tcp_pair()
        mine, other = (accepted, connecting) if server else (connecting, accepted)
        with other:
            other.settimeout(30)
            mine.setblocking(False)
            peer = Peer.on(other, self.theirs, not server, self.session)
            tls = ktls.wrap(
                mine,
                self.ours,
                server_side=server,
                server_hostname=None if server else "localhost",
                do_handshake_on_connect=False,
                require=self.mode == "kernel",
                **MODES[self.mode],  # type: ignore[arg-type, unused-ignore]
            )
            with tls:
                yield tls, peer

    def run(self, cut: int | None, size: int) -> ssl.SSLSession | None:
        """One connection.

        Args:
            cut: How many bytes of the last flight to send first; None: all in one segment.
            size: How much data follows the handshake.
        """
        data = random.Random(f"{cut} {size}").randbytes(size)  # noqa: S311 - reproducible
        with self.connection() as (tls, peer):
            flight = self.last_flight(tls, peer, data)
            assert (tls._handshake is not None) == self.peer_speaks_last
            for part in (flight,) if cut is None else (flight[:cut], flight[cut:]):
                if part:
                    peer.sock.sendall(part)
                    self.act(tls)
            tls.settimeout(30)
            tls.do_handshake()
            assert tls.tx.mode is tls.rx.mode
            assert tls.tx.mode is (Mode.SOFTWARE if self.mode == "kernel" else Mode.USERSPACE)
            received = b""
            while len(received) < size:
                more = tls.recv(1 << 17)
                assert more, f"ended after {len(received)} of {size} bytes"
                received += more
            assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()
            tls.sendall(data[:20000] + b"!")
            assert peer.read_exactly(min(size, 20000) + 1) == data[:20000] + b"!"
            tls.setblocking(False)
            with pytest.raises(ktls.WouldBlockError):
                tls.recv(1)
            return peer.tls.session

    def last_flight(self, tls: ktls.Socket, peer: Peer, data: bytes) -> bytes:
        """Runs the handshake up to the peer's last bytes of it, which it returns with the data.

        Of a TLS 1.3 server the last flight needs our Finished: what it returns are its tickets.
        """
        with suppress(ktls.WouldBlockError):
            tls.do_handshake()
        if self.side == "client":
            peer.receive()
        while not peer.handshake():
            peer.sock.sendall(peer.outgoing.read())
            self.act(tls)
            peer.receive()
        assert peer.tls.session_reused == (self.session is not None)
        peer.tls.write(data)
        return peer.outgoing.read()

    @staticmethod
    def act(tls: ktls.Socket) -> None:
        """Lets ktls read all that was sent, unless its handshake ends before."""
        if tls._handshake is not None:
            assert select.select([tls], [], [], 30)[0]
        with suppress(ktls.WouldBlockError):
            tls.do_handshake()


KINDS = [
    ("TLSv1.2", "server", False),
    ("TLSv1.2", "server", True),
    ("TLSv1.2", "client", False),
    ("TLSv1.3", "server", False),
    ("TLSv1.3", "client", False),
]


@pytest.fixture(params=["userspace", pytest.param("kernel", marks=pytest.mark.kernel)])
def where(request: pytest.FixtureRequest) -> str:
    """Where the data goes."""
    return str(request.param)


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}" + "-resumed" * kind[2])
def scene(request: pytest.FixtureRequest, identity: Identity, where: str) -> Scene:
    """Contexts for many connections."""
    version, side, resumed = request.param
    server = side == "server"
    make = server_context if server else client_context
    scene = Scene(
        version,
        side,
        where,
        make(identity, version),
        stdlib_context(identity, version, server_side=not server),
    )
    if resumed:
        scene.session = scene.run(None, 1)
        assert scene.session is not None
    return scene


@pytest.mark.parametrize("size", [1, 1 << 10, 16385, 1 << 16])
def test_one_segment(scene: Scene, size: int) -> None:
    """Finished and data together."""
    scene.run(None, size)


def test_some_cuts(scene: Scene) -> None:
    """At the places where headers and records begin and end, or nearly."""
    for cut in SOME:
        scene.run(cut, 1 + 97 * cut)


@pytest.mark.torture
@pytest.mark.timeout(600)
def test_every_cut(scene: Scene) -> None:
    """2,000 connections and more in all: 600 of each kind, with 1 byte to 64 KiB of data."""
    sizes = random.Random(8446)  # noqa: S311 - reproducible
    for cut in range(FIRST_BYTES):
        scene.run(cut, sizes.randint(1, 1 << 16))
