"""The whole life of a connection: 200 MiB both ways at once, and all that TLS does meanwhile.

Our side is in the kernel both ways, and sends by whatever call comes up, in sizes that are random.
The peer is the tests' own. In TLS 1.3 a server sends tickets, and where the kernel can replace keys
both sides update theirs hundreds of times, asking the other for the same every second time. At the
end every byte has arrived, and the kernel's counters have exactly what both did.
"""

from __future__ import annotations

import hashlib
import os
import random
import socket
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

import pytest

import ktls
from ktls import RecordType, offload
from ktls.types import HandshakeType, KeyUpdateRequest

from .conftest import Identity, InThread, MakeRecordPair, client_context, in_kernel, server_context
from .peers import CIPHERS, Suite
from .record_peer import RecordPair, RecordPeer

pytestmark = [pytest.mark.kernel, pytest.mark.torture]

SIZE = 200 << 20  # each way
UPDATES = 500  # of keys, by each side of its own accord
TICKETS = 20
MOST_MEMORY = 30 << 20  # that the run may add to this process, which has both ends in it
SECONDS = 60  # without progress
CLOSE_NOTIFY = (RecordType.ALERT, b"\x01\x00")


@dataclass(frozen=True)
class Document:
    """What is sent: by us from its first byte on, by the peer from its second.

    Attributes:
        path: The file.
        ours: SHA-256 of what we send.
        theirs: SHA-256 of what the peer sends.
    """

    path: Path
    ours: bytes
    theirs: bytes


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Document:
    """One of random bytes."""
    path = tmp_path_factory.mktemp("life") / "document"
    with path.open("wb") as file:
        for _ in range(SIZE >> 20):
            file.write(os.urandom(1 << 20))
        file.write(b"!")
    return Document(path, _sha256(path, 0), _sha256(path, 1))


def _sha256(path: Path, offset: int) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        for _ in range(SIZE >> 20):
            digest.update(file.read(1 << 20))
    return digest.digest()


class Agenda:
    """What is to be done at random moments while a document is sent."""

    def __init__(self, dice: random.Random, acts: list[Callable[[], object]]) -> None:
        """Spreads the acts over the document."""
        dice.shuffle(acts)
        moments = sorted(dice.randrange(SIZE) for _ in acts)
        self._left = deque(zip(moments, acts, strict=True))

    def do(self, sent: int) -> None:
        """Does what was due before so many bytes were sent."""
        while self._left and self._left[0][0] < sent:
            self._left.popleft()[1]()


def some_size(dice: random.Random, sent: int) -> int:
    """A byte to a mebibyte, small sizes as often as large ones, but not beyond the end."""
    return min(int(2 ** dice.uniform(0, 20)), SIZE - sent)


def send(tls: ktls.Socket, document: Document, dice: random.Random, agenda: Agenda) -> None:
    """Sends our part, and does what is on the agenda."""
    sent = 0
    with document.path.open("rb") as file:
        while sent < SIZE:
            sent += send_some(tls, file, sent, dice)
            agenda.do(sent)


def send_some(tls: ktls.Socket, file: BinaryIO, offset: int, dice: random.Random) -> int:
    """Sends from the file by one call or another; returns how many bytes."""
    size = some_size(dice, offset)
    way = dice.choice(["send", "sendall", "more", "sendmsg", "sendfile"])
    if way == "sendfile":
        assert tls.sendfile(file, offset, size) == size
        return size
    data = os.pread(file.fileno(), size, offset)
    if way == "send":
        return tls.send(data)
    if way == "sendmsg":
        first, second = sorted(dice.randrange(size + 1) for _ in range(2))
        return tls.sendmsg([data[:first], data[first:second], data[second:]])
    more = way == "more" and offset + size < SIZE  # else the peer waits for the rest of a record
    tls.sendall(data, socket.MSG_MORE if more else 0)
    return size


def receive(tls: ktls.Socket, dice: random.Random) -> bytes:
    """Receives the peer's part; returns its SHA-256."""
    digest, left = hashlib.sha256(), SIZE
    buffer = memoryview(bytearray(1 << 18))
    while left:
        count = tls.recv_into(buffer, int(2 ** dice.uniform(8, 18)))
        assert count, f"it ended {left} bytes too early"
        digest.update(buffer[:count])
        left -= count
    return digest.digest()


class Peer:
    """The other end: sends and receives, follows KeyUpdates and answers them.

    Attributes:
        sent: How many KeyUpdates it sent that ask, and that don't.
        received: The same of those that it received.
    """

    def __init__(self, peer: RecordPeer) -> None:
        """Takes over the connection."""
        self.sent: Counter[int] = Counter()
        self.received: Counter[int] = Counter()
        self._peer = peer
        self._records = peer.receive_all()
        self._asked = Event()

    def send(self, document: Document, dice: random.Random, agenda: Agenda) -> None:
        """Sends its part, and does what is on the agenda."""
        sent = 0
        with document.path.open("rb") as file:
            while sent < SIZE:
                data = os.pread(file.fileno(), some_size(dice, sent), 1 + sent)
                self._peer.send_data(data)
                sent += len(data)
                agenda.do(sent)
                self._answer()

    def send_ticket(self, number: int) -> None:
        """Sends one of its session tickets, which a server may at any time."""
        ticket = self._peer.tickets[number % len(self._peer.tickets)]
        self._peer.send(RecordType.HANDSHAKE, ticket)

    def update_keys(self, request: int) -> None:
        """Sends a KeyUpdate."""
        self._peer.update_keys(requested=bool(request))
        self.sent[request] += 1

    def _answer(self) -> None:
        """Answers all that have asked meanwhile, by one KeyUpdate (RFC 8446 section 4.6.3)."""
        if self._asked.is_set():
            self._asked.clear()
            self.update_keys(KeyUpdateRequest.NOT_REQUESTED)

    def receive(self) -> bytes:
        """Receives our part; returns its SHA-256."""
        digest, left = hashlib.sha256(), SIZE
        while left:
            content_type, content = next(self._records)
            if content_type == RecordType.APPLICATION_DATA:
                digest.update(content)
                left -= len(content)
            else:
                self._act(content_type, content)
        return digest.digest()

    def _act(self, content_type: int, message: bytes) -> None:
        assert content_type == RecordType.HANDSHAKE
        if message[0] == HandshakeType.NEW_SESSION_TICKET:
            return
        assert message[:-1] == bytes([HandshakeType.KEY_UPDATE, 0, 0, 1])
        self._peer.follow_key_update()
        self.received[message[-1]] += 1
        if message[-1] == KeyUpdateRequest.REQUESTED:
            self._asked.set()

    def close(self) -> None:
        """Receives close_notify; answers what is left to answer, and sends one, too."""
        while (record := next(self._records)) != CLOSE_NOTIFY:
            self._act(*record)
        self._answer()
        self._peer.send(*CLOSE_NOTIFY)

    def ended(self) -> bool:
        """Whether the stream ended, with nothing after close_notify."""
        return next(self._records, None) is None


def results(pair: RecordPair, *futures: Future[Any]) -> list[Any]:
    """What they return. If one fails the connection is cut, which ends the others."""
    wait(futures, return_when=FIRST_EXCEPTION)
    failed = [future for future in futures if future.done() and future.exception() is not None]
    if failed:
        pair.peer.sock.shutdown(socket.SHUT_RDWR)
        failed[0].result()
    return [future.result() for future in futures]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("cipher", CIPHERS)
def test_life(
    make_record_pair: MakeRecordPair,
    in_thread: InThread,
    identity: Identity,
    document: Document,
    version: str,
    cipher: str,
    side: str,
) -> None:
    """Both ends' bytes, keys and counters are right, and memory doesn't grow."""
    seed = os.environ.get("KTLS_SEED") or str(random.randrange(1 << 32))  # noqa: S311
    print(f"KTLS_SEED={seed} makes the same choices again")
    ours, theirs, reading = (random.Random(f"{seed} {end}") for end in range(3))  # noqa: S311
    asks = [0, 1] * (UPDATES // 2) if version == "TLSv1.3" and offload.can_rekey() else []
    tickets = range(TICKETS) if (version, side) == ("TLSv1.3", "client") else []
    suite = Suite(version, cipher)
    contexts = server_context(identity, version), client_context(identity, version)
    for context in contexts:
        suite.limit(context)
    before = Counter(ktls.stats())
    pair = make_record_pair(version, side, contexts=contexts)
    assert in_kernel(pair.tls) == (True, True)
    agreed = pair.tls.cipher()
    assert agreed is not None
    assert agreed[0] == suite.name
    for sock in (pair.tls, pair.peer.sock):
        sock.settimeout(SECONDS)
    peer = Peer(pair.peer)
    our_agenda = Agenda(ours, [partial(pair.tls.update_keys, bool(ask)) for ask in asks])
    their_updates = [partial(peer.update_keys, ask) for ask in asks]
    their_agenda = Agenda(
        theirs, [*their_updates, *(partial(peer.send_ticket, number) for number in tickets)]
    )
    memory = reset_peak_memory()

    received, read, *_ = results(
        pair,
        in_thread(peer.receive),
        in_thread(receive, pair.tls, reading),
        in_thread(peer.send, document, theirs, their_agenda),
        in_thread(send, pair.tls, document, ours, our_agenda),
    )
    assert (received, read) == (document.ours, document.theirs)
    closed = in_thread(pair.tls.unwrap)
    peer.close()
    closed.result(SECONDS)
    assert peak_memory() - memory <= MOST_MEMORY
    pair.tls.close()
    assert peer.ended()

    # One answer may be for several that asked, but at least one is due.
    answers = peer.received.total() - len(asks)
    assert min(1, len(asks)) <= answers <= sum(asks)
    assert peer.received[KeyUpdateRequest.REQUESTED] == sum(asks)
    assert Counter(ktls.stats()) - before == Counter(
        TlsTxSw=1,
        TlsRxSw=1,
        TlsTxRekeyOk=peer.received.total(),
        TlsRxRekeyOk=peer.sent.total(),
        TlsRxRekeyReceived=peer.sent.total(),
    )
    if tickets:
        session = pair.tls.get_session()
        assert make_record_pair(
            version, side, contexts=contexts, session=session
        ).tls.session_reused


def reset_peak_memory() -> int:
    """Begins to measure anew; returns how many bytes of memory this process has (VmRSS)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_memory()


def peak_memory() -> int:
    """The most that it had since then (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in status)
    return int(fields["VmHWM"].split()[0]) << 10
