"""The handshake without I/O: bytes in, bytes out, and at its end an exact hand-over.

Neither `Handshake.wanted` nor `Handshake.share` goes beyond the first record that can end the
handshake, so no byte that belongs to the kernel is ever taken from the socket: application data
that follows the peer's Finished, even in the same TCP segment, stays where the kernel will decrypt
it. All records are kept until the hand-over, which proves the keys by them (see `ktls.proof`).
"""

from __future__ import annotations

from . import records
from .engine import Engine
from .errors import HandshakeCutOffError, HandshakeError, UnprovenSequenceError
from .proof import HandOver, prove, prove_end
from .records import HEADER_SIZE
from .types import Reason, RecordType

# A handshake is some ten records and kilobytes. Beyond this it is an attack on time or memory.
_MOST_RECORDS = 2048
_MOST_BYTES = 1 << 19


class Handshake:
    """Drives one handshake of an `Engine`.

    Use: send `outgoing`; until `done`, read at most `wanted` bytes and `receive` them, and again.
    Where what comes next can be looked at first, so much as `share` says may be read instead.

    Attributes:
        engine: The TLS library's side.
        done: Whether the handshake is complete. `outgoing` may still have its last flight.
    """

    def __init__(self, engine: Engine) -> None:
        """Starts: a client has its first flight ready. A server waits for the client's.

        Raises:
            HandshakeError: The TLS library refuses to begin.
        """
        self.done = False
        self.engine = engine
        self._reader = records.RecordReader()
        self._untaken = b""
        self._sent: list[bytes] = []  # flights
        self._received: list[bytes] = []
        self._size = 0
        self._changed = False
        self._alone = False  # whether the last record was the first that could end the handshake
        if not engine.server_side:
            self._step()

    @property
    def wanted(self) -> int:
        """How many bytes to read next, at the most; 0 when the handshake is done."""
        return 0 if self.done else self._reader.wanted

    @property
    def within_record(self) -> bool:
        """Whether what was read so far ends inside a record."""
        return self._reader.partial

    def share(self, ahead: bytes) -> int:
        """How many of the bytes ahead to read next, between two records; one at the least.

        That is up to the end of the first record that can end the handshake. Hellos, keys and
        certificates in the clear can't, nor can ChangeCipherSpec: Finished comes later.

        Args:
            ahead: What is there already, as far as the caller looked.
        """
        end, changed = 0, self._changed
        while end + HEADER_SIZE <= len(ahead):
            content_type, size = ahead[end], records.size(ahead, end)
            if size == HEADER_SIZE:  # what is no record, or an empty one, comes alone
                return end or size
            if end + size > len(ahead):
                break
            end += size
            if content_type == RecordType.CHANGE_CIPHER_SPEC:
                changed = True
            elif changed or content_type != RecordType.HANDSHAKE:
                break
        return end or len(ahead)

    def receive(self, data: bytes) -> None:
        """Takes bytes from the peer, at most `wanted` or its `share`; none mean the stream's end.

        Raises:
            HandshakeError: It failed. `outgoing` has the alert for the peer, if one is due.
            HandshakeCutOffError: The stream ended.
        """
        if not data:
            raise HandshakeCutOffError("the peer closed the connection during the handshake")
        whole = [] if self._reader.partial else records.split(data)
        if sum(map(len, whole)) != len(data):
            record = self._reader.feed(data)
            if record is None:
                return
            whole, data = [record], record
        self._alone = all(record[0] != RecordType.APPLICATION_DATA for record in whole[:-1])
        for record in whole:
            self._size += len(record)
            if len(self._received) >= _MOST_RECORDS or self._size > _MOST_BYTES:
                raise HandshakeError("the peer's handshake is endless")
            self._received.append(record)
            self._changed |= record[0] == RecordType.CHANGE_CIPHER_SPEC
        self.engine.incoming(data)
        self._step()

    def outgoing(self) -> bytes:
        """Gives the bytes for the peer: whole records, or none."""
        stream, self._untaken = self._untaken + self.engine.outgoing(), b""
        if stream:
            self._sent.append(stream)
        return stream

    def hand_over(self) -> HandOver:
        """Proves the keys and sequence numbers, and forgets records and secrets.

        Raises:
            HandOverError: The kernel can't go on with this connection, or nothing proves the
                keys. The connection itself is fine.
        """
        self._untaken = self.engine.outgoing()
        if self._untaken:
            raise UnprovenSequenceError(
                "outgoing() has records that were not sent yet", Reason.UNPROVEN_SEQUENCE
            )
        try:
            secrets = self.engine.secrets()
            if self._alone:
                return prove_end(secrets, self._sent, self._received)
            return prove(secrets, records.split(b"".join(self._sent)), self._received)
        finally:
            self.forget()

    def forget(self) -> None:
        """Forgets records and secrets, which are no use without a hand-over."""
        self._sent.clear()
        self._received.clear()
        self.engine.forget_secrets()

    def _step(self) -> None:
        self.done = self.engine.handshake()
