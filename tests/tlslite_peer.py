"""A peer on tlslite-ng: a TLS of its own, in Python, that tells exactly what it received.

It shares no code with ktls or OpenSSL: not the record layer, the key schedule, nor the ciphers.
(`FastAESGCM` is there for bulk data: tlslite's own makes some 600 KB a second.)
"""

from __future__ import annotations

import socket
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from tlslite.api import HandshakeSettings, SessionCache, TLSConnection, X509CertChain
from tlslite.constants import ContentType, HandshakeType
from tlslite.errors import TLSRemoteAlert
from tlslite.messages import Alert, Message
from tlslite.utils.keyfactory import parsePEMKey

from .conftest import Identity

_VERSIONS = {"TLSv1.2": (3, 3), "TLSv1.3": (3, 4)}


class FastAESGCM:
    """What ``tlslite.recordlayer.createAESGCM`` makes, on ``cryptography``."""

    isBlockCipher, isAEAD = False, True  # noqa: N815 - tlslite's names
    nonceLength, tagLength = 12, 16  # noqa: N815
    implementation = "cryptography"

    def __init__(self, key: bytearray, _implementations: object = None) -> None:
        """Takes the key."""
        self.name = f"aes{len(key) * 8}gcm"
        self._aead = AESGCM(bytes(key))

    def seal(self, nonce: bytearray, plaintext: bytearray, data: bytearray) -> bytearray:
        """Encrypts; the tag is at the end."""
        return bytearray(self._aead.encrypt(bytes(nonce), bytes(plaintext), bytes(data)))

    def open(self, nonce: bytearray, ciphertext: bytearray, data: bytearray) -> bytearray | None:
        """Decrypts, or gives None."""
        try:
            return bytearray(self._aead.decrypt(bytes(nonce), bytes(ciphertext), bytes(data)))
        except InvalidTag:
            return None


class TlslitePeer:
    """The other side of a connection, through its handshake.

    Attributes:
        sock: The plain TCP socket.
        connection: tlslite's object. It never closes the socket.
        key_updates: How many KeyUpdates it received.
    """

    def __init__(
        self,
        sock: socket.socket,
        identity: Identity,
        version: str,
        *,
        server_side: bool,
        cipher: str = "aes128gcm",
        ticket_key: bytes = b"",
        cache: SessionCache | None = None,
    ) -> None:
        """Does the handshake; blocks.

        Args:
            sock: Connected.
            identity: A server's.
            version: Such as ``TLSv1.3``, and no other.
            server_side: Accept rather than connect.
            cipher: By tlslite's name.
            ticket_key: A server's, 32 bytes: it sends tickets then, and takes them.
            cache: A TLS 1.2 server's, of sessions to be resumed by their id.
        """
        self.sock = sock
        settings = HandshakeSettings()
        settings.minVersion = settings.maxVersion = _VERSIONS[version]
        settings.versions = [_VERSIONS[version]]
        settings.eccCurves = settings.keyShares = ["secp256r1"]
        settings.cipherNames = [cipher]
        settings.ticketKeys = [bytearray(ticket_key)] if ticket_key else []
        self.connection: Any = TLSConnection(sock)
        self.connection.closeSocket = False
        self.key_updates = 0
        self._count_key_updates()
        if not server_side:
            self.connection.handshakeClientCert(settings=settings, serverName="localhost")
            return
        chain = X509CertChain()
        chain.parsePemList(identity.chain.read_text())
        self.connection.handshakeServer(
            certChain=chain,
            privateKey=parsePEMKey(identity.key.read_text(), private=True),
            sessionCache=cache,
            settings=settings,
        )

    def _count_key_updates(self) -> None:
        handle = self.connection._handle_keyupdate_request

        def count(message: object) -> Any:  # noqa: ANN401
            self.key_updates += 1
            return handle(message)

        self.connection._handle_keyupdate_request = count

    def seal(self, content_type: int, content: bytes, /) -> bytes:
        """Makes the next record, and doesn't send it."""
        layer, buffered = self.connection._recordLayer, self.connection.sock
        if content_type == ContentType.change_cipher_spec and layer.version > (3, 3):
            # tlslite never protects it.
            sealed = layer._encryptThenSeal(
                bytearray(content) + bytes([content_type]), ContentType.application_data
            )
            header = bytes([ContentType.application_data, 3, 3]) + len(sealed).to_bytes(2, "big")
            return header + bytes(sealed)
        buffered.buffer_writes = True
        self.send(content_type, content)
        buffered.buffer_writes = False
        record = b"".join(buffered._write_queue)
        buffered._write_queue.clear()
        return record

    def send(self, content_type: int, content: bytes) -> None:
        """Sends one record of any type and size."""
        _run(self.connection._recordLayer.sendRecord(Message(content_type, bytearray(content))))

    def send_alert(self, level: int, description: int) -> None:
        """Sends an alert, and goes on."""
        _run(self.connection._sendMsg(Alert().create(description, level)))

    def update_keys(self, request: int) -> None:
        """Sends a KeyUpdate, and seals with the next keys from then on."""
        _run(self.connection.send_keyupdate_request(request))

    def receive(self, size: int) -> bytes:
        """Receives so many bytes of data, or fewer if the connection ends."""
        data: bytes = self.connection.read(size, size)
        return data

    def receive_alert(self) -> tuple[int, int]:
        """Receives an alert other than close_notify: level, description."""
        try:
            data = self.connection.read()
        except TLSRemoteAlert as alert:
            return alert.level, alert.description
        raise AssertionError(f"no alert, but {data!r}")

    def receive_message(self) -> Any:  # noqa: ANN401 - one of tlslite's classes
        """Receives an alert, data or a handshake message; tlslite doesn't act upon it."""
        types = (ContentType.alert, ContentType.application_data, ContentType.handshake)
        kinds = (HandshakeType.new_session_ticket, HandshakeType.key_update)
        return _run(self.connection._getMsg(types, kinds))


def _run(steps: Any) -> Any:  # noqa: ANN401
    """Runs one of tlslite's generators to its result; 0 and 1 mean that it waited."""
    for step in steps:
        if step not in (0, 1):
            return step
    return None
