"""The control plane of a connection whose records are the kernel's.

OpenSSL made the handshake and stays in charge of what isn't data: it keeps the sessions, answers
KeyUpdates, finds the alert for what is wrong. But the records no longer pass through it. So what
the kernel opened is sealed again, as the next record that OpenSSL expects, and what OpenSSL writes
is opened, to be sent as a record of the kernel's. What is sealed here never leaves the process: a
nonce that the peer used for another record does no harm.
"""

from __future__ import annotations

import copy
import threading
from typing import Protocol

from . import records
from .engine import Engine
from .errors import KTLSError
from .keychain import KeyChain
from .proof import HandOver
from .records import RecordCipher
from .types import HandshakeType, KeyUpdateRequest, RecordType

Record = tuple[int, bytes]
"""Content type and content."""


def key_update(request: KeyUpdateRequest) -> Record:
    """A KeyUpdate (RFC 8446 section 4.6.3)."""
    return RecordType.HANDSHAKE, bytes([HandshakeType.KEY_UPDATE, 0, 0, 1, request])


def is_key_update(record: Record) -> bool:
    """Whether a record that begins a handshake message is a KeyUpdate, which is alone in it."""
    content_type, content = record
    return content_type == RecordType.HANDSHAKE and content[0] == HandshakeType.KEY_UPDATE


class Control(Protocol):
    """What decides about records that aren't data."""

    server_side: bool

    def tell(self, content_type: int, content: bytes) -> KTLSError | None:
        """Lets it read a record that the kernel opened; returns what it has against it."""

    def tell_key_update(self, request: KeyUpdateRequest) -> KTLSError | None:
        """The same for a KeyUpdate: what it reads next is under the next key."""

    def provoke(self, record: bytes) -> KTLSError | None:
        """Lets it read a record that is wrong, which it answers with an alert."""

    def answers(self) -> list[Record]:
        """Takes the records that it wants to be sent."""


class EngineControl:
    """OpenSSL decides."""

    def __init__(self, engine: Engine, lock: threading.Lock, keys: HandOver) -> None:
        """Starts with the hand-over.

        Args:
            engine: Knows of all records so far.
            lock: Held for every use of the engine, which two threads may not use at once.
            keys: Those that the engine has, too.
        """
        self.server_side = engine.server_side
        self._engine = engine
        self._lock = lock
        self._reads, self._reads_chain = RecordCipher(keys.rx), keys.rx_chain
        self._writes, self._writes_chain = RecordCipher(keys.tx), keys.tx_chain

    def tell(self, content_type: int, content: bytes) -> KTLSError | None:
        """See `Control.tell`."""
        with self._lock:
            return self._show(self._reads.seal(content_type, content))

    def tell_key_update(self, request: KeyUpdateRequest) -> KTLSError | None:
        """See `Control.tell_key_update`."""
        with self._lock:
            verdict = self._show(self._reads.seal(*key_update(request)))
            self._reads, self._reads_chain = _next(self._reads_chain)
        return verdict

    def provoke(self, record: bytes) -> KTLSError | None:
        """See `Control.provoke`."""
        with self._lock:
            return self._show(record)

    def answers(self) -> list[Record]:
        """See `Control.answers`."""
        found = []
        with self._lock:
            for record in records.split(self._engine.answers()):
                found.append(self._writes.open(record))
                if is_key_update(found[-1]):
                    self._writes, self._writes_chain = _next(self._writes_chain)
        return found

    def _show(self, record: bytes) -> KTLSError | None:
        self._engine.incoming(record)
        try:
            self._engine.read_into(memoryview(bytearray(1)))
        except KTLSError as error:
            return copy.copy(error)  # without the frames, which hold their callers' variables
        return None


def _next(chain: KeyChain) -> tuple[RecordCipher, KeyChain]:
    chain = chain.next()
    return RecordCipher(chain.keys()), chain


class DetachedControl:
    """Nobody but this: OpenSSL stayed in the process that made the handshake.

    Session tickets, which only OpenSSL could use, are dropped; KeyUpdates are answered.
    """

    def __init__(self, *, server_side: bool) -> None:
        """Starts with nothing to say."""
        self.server_side = server_side
        self._answers: list[Record] = []

    def tell(self, content_type: int, content: bytes) -> KTLSError | None:
        """See `Control.tell`: nobody listens."""
        return None

    def tell_key_update(self, request: KeyUpdateRequest) -> KTLSError | None:
        """See `Control.tell_key_update`."""
        if request is KeyUpdateRequest.REQUESTED:
            self._answers.append(key_update(KeyUpdateRequest.NOT_REQUESTED))
        return None

    def provoke(self, record: bytes) -> KTLSError | None:
        """See `Control.provoke`: the sender makes its alerts itself."""
        return None

    def answers(self) -> list[Record]:
        """See `Control.answers`."""
        found, self._answers = self._answers, []
        return found
