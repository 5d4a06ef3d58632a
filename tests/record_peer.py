"""A peer in the tests' own hands: after its handshake they seal and open its records themselves."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from OpenSSL import SSL

import ktls
from ktls import RecordType
from ktls.handshake import Handshake
from ktls.keyschedule import next_secret, tls13_keys
from ktls.pyopenssl import Engine, _watch
from ktls.records import RecordCipher, RecordReader, split
from ktls.tcp import unacknowledged
from ktls.types import MAX_PAYLOAD, HandshakeType

_CHUNK = 1 << 18


class RecordPeer:
    """The other side of a connection, at the level of records.

    Attributes:
        sock: The plain TCP socket.
        tx: Seals the next record.
        rx: Opens the next record.
        keys: Those that the handshake ended with.
        tickets: A TLS 1.3 server's NewSessionTicket messages, which it hasn't sent.
    """

    def __init__(self, sock: socket.socket, context: SSL.Context, *, server_side: bool) -> None:
        """Does the handshake; blocks."""
        self.sock = sock
        self.tickets: list[bytes] = []
        self._reader = RecordReader()
        self._engine = Engine.create(
            context, server_side=server_side, server_hostname="localhost", check_hostname=False
        )
        handshake = Handshake(self._engine)
        while True:
            flight = handshake.outgoing()
            tls13 = self._engine.version() == "TLSv1.3"
            if handshake.done and server_side and tls13:
                break
            sock.sendall(flight)
            if handshake.done:
                break
            data = sock.recv(handshake.wanted)
            if not data:
                raise ConnectionError("the other side ended the handshake")
            handshake.receive(data)
        self._secrets = _watch(self._engine.connection).secrets()
        self.keys = handshake.hand_over().keys
        if server_side and tls13:
            # The tickets are kept, and the sequence is set back to before them.
            self.keys = replace(self.keys, tx=replace(self.keys.tx, rec_seq=0))
            opener = RecordCipher(self.keys.tx)
            self.tickets = [opener.open(record)[1] for record in split(flight)]
        self.tx, self.rx = RecordCipher(self.keys.tx), RecordCipher(self.keys.rx)
        sides = ("SERVER", "CLIENT") if server_side else ("CLIENT", "SERVER")
        self._labels = [f"{side}_TRAFFIC_SECRET_0" for side in sides]

    def send(self, content_type: int, content: bytes) -> None:
        """Sends one record of any type."""
        self.sock.sendall(self.tx.seal(content_type, content))

    def send_data(self, data: bytes) -> None:
        """Sends data in records as long as may be, and as few system calls."""
        parts = (data[at : at + MAX_PAYLOAD] for at in range(0, len(data), MAX_PAYLOAD))
        self.sock.sendall(
            b"".join(self.tx.seal(RecordType.APPLICATION_DATA, each) for each in parts)
        )

    def reset(self) -> None:
        """Ends the connection with a RST, once all that was sent has arrived."""
        while unacknowledged(self.sock):
            time.sleep(0.001)  # no event tells
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def receive(self) -> tuple[int, bytes] | None:
        """Receives one record; None at the end of the stream."""
        while True:
            data = self.sock.recv(self._reader.wanted)
            if not data:
                assert not self._reader.partial, "the stream was cut inside a record"
                return None
            record = self._reader.feed(data)
            if record is not None:
                return self.rx.open(record)

    def receive_all(self) -> Iterator[tuple[int, bytes]]:
        """Receives all records up to the end of the stream, in as few system calls as may be.

        Only this may receive from then on.
        """
        received = b""
        while data := self.sock.recv(_CHUNK):
            received += data
            end = 0
            for record in split(received):
                end += len(record)
                yield self.rx.open(record)
            received = received[end:]
        assert not received, "the stream was cut inside a record"

    def receive_other_than_tickets(self) -> tuple[int, bytes] | None:
        """The same, without a server's session tickets."""
        while True:
            record = self.receive()
            ticket = bytes([HandshakeType.NEW_SESSION_TICKET])
            if record is None or record[0] != RecordType.HANDSHAKE or record[1][:1] != ticket:
                return record

    def receive_data(self, size: int) -> bytes:
        """Receives data records until there are so many bytes."""
        return b"".join(self.receive_records(size))

    def receive_records(self, size: int) -> list[bytes]:
        """The same, each record by itself."""
        received: list[bytes] = []
        while size > 0:
            record = self.receive_other_than_tickets()
            assert record is not None
            assert record[0] == RecordType.APPLICATION_DATA
            received.append(record[1])
            size -= len(record[1])
        return received

    def update_keys(self, *, requested: bool) -> None:
        """Sends a KeyUpdate, and seals with the next keys from then on."""
        self.sock.sendall(self.seal_key_update(requested=requested))

    def seal_key_update(self, *, requested: bool) -> bytes:
        """The same, but the record isn't sent yet."""
        message = bytes([HandshakeType.KEY_UPDATE, 0, 0, 1, requested])
        record = self.tx.seal(RecordType.HANDSHAKE, message)
        self.tx = RecordCipher(self._next(self._labels[0]))
        return record

    def follow_key_update(self) -> None:
        """Opens with the next keys from then on."""
        self.rx = RecordCipher(self._next(self._labels[1]))

    def _next(self, label: str) -> ktls.CryptoInfo:
        hash_name = "sha256" if len(self._secrets[label]) == 32 else "sha384"
        secret = self._secrets[label] = next_secret(hash_name, self._secrets[label])
        info = self.keys.tx  # either direction's: version and cipher are the same
        key, iv = tls13_keys(hash_name, info.cipher, secret)
        salt = info.cipher.salt_size
        return replace(info, key=key, iv=iv[salt:], salt=iv[:salt], rec_seq=0)


def notice_nothing(sock: socket.socket) -> None:
    """The kernel's TLS looks at no record by itself from now on; it is busy elsewhere, as it were.

    TCP doesn't tell it of data below the low-water mark. What comes is found by receiving.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1 << 18)


@dataclass
class RecordPair:
    """A ktls socket and a peer in the tests' hands."""

    tls: ktls.Socket
    peer: RecordPeer
