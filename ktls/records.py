"""TLS records: framing, and sealing or opening one with a direction's keys. No I/O.

Record protection is that of RFC 5246 section 6.2.3.3 (TLS 1.2 AEAD; nonces of RFC 5288, 6655 and
7905) and of RFC 8446 section 5.2; the AEADs themselves are ``cryptography``'s.
"""

from __future__ import annotations

from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESCCM, AESGCM, ChaCha20Poly1305

from .errors import KeyMaterialError
from .types import MAX_PAYLOAD, Cipher, CryptoInfo, RecordType, Version

__all__ = ["HEADER_SIZE", "InvalidTag", "MessageReader", "RecordCipher", "RecordReader", "split"]

HEADER_SIZE = 5
_MAJOR = 3  # of every TLS version that a record header can name
_MAX_LENGTH = MAX_PAYLOAD + 2048  # RFC 5246 section 6.2.3; TLS 1.3 allows 256 instead
_LONGEST_MESSAGE = 1 << 17  # of one handshake message: more than OpenSSL takes by default


class _AEAD(Protocol):
    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes) -> bytes: ...
    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes) -> bytes: ...


_AEADS = {
    Cipher.AES_GCM_128: AESGCM,
    Cipher.AES_GCM_256: AESGCM,
    Cipher.AES_CCM_128: AESCCM,
    Cipher.CHACHA20_POLY1305: ChaCha20Poly1305,
}


class RecordCipher:
    """One direction's record protection, counting as it goes.

    Attributes:
        rec_seq: Sequence number of the next record.
        iv: Of the next record sealed, where it is an explicit nonce (see `CryptoInfo`).
    """

    def __init__(self, info: CryptoInfo) -> None:
        """Starts at ``info``'s sequence number.

        Raises:
            KeyMaterialError: No AEAD for this cipher outside the kernel.
        """
        if info.cipher not in _AEADS:
            raise KeyMaterialError(f"no implementation of {info.cipher.name} in userspace")
        self._info = info
        self._aead: _AEAD | None = None
        self.iv = info.iv
        self.rec_seq = info.rec_seq

    def open(self, record: bytes) -> tuple[int, bytes]:
        """Opens the next record.

        Args:
            record: Header and all.

        Returns:
            Its content type, and its content.

        Raises:
            InvalidTag: It isn't the next record of these keys. Nothing is counted then.
        """
        aead = self._aead or self._begin()
        begin = HEADER_SIZE + self._explicit
        explicit, sealed = record[HEADER_SIZE:begin], record[begin:]
        size = len(sealed) - self._tag_size
        if size < 0:
            raise InvalidTag
        header = record[:HEADER_SIZE] if self._tls13 else self._aad12(record[0], size)
        content = aead.decrypt(self._nonce(explicit), sealed, header)
        content_type = record[0]
        if self._tls13:
            # TLSInnerPlaintext: content, type, zeros. All zeros is no type at all: 0.
            content = content.rstrip(b"\0")
            content, content_type = content[:-1], content[-1] if content else 0
        if self._explicit:
            self.iv = _next(explicit)
        self.rec_seq += 1
        return content_type, content

    def seal(self, content_type: int, content: bytes) -> bytes:
        """Seals the next record.

        Args:
            content_type: A `RecordType`, or any byte.
            content: At most `MAX_PAYLOAD` bytes.

        Returns:
            The record, header and all.
        """
        aead = self._aead or self._begin()
        explicit = self.iv if self._explicit else b""
        if self._tls13:
            content += bytes([content_type])
            content_type = RecordType.APPLICATION_DATA
        size = len(explicit) + len(content) + self._tag_size
        header = bytes([content_type, 3, 3]) + size.to_bytes(2, "big")
        aad = header if self._tls13 else self._aad12(content_type, len(content))
        sealed = aead.encrypt(self._nonce(explicit), content, aad)
        if explicit:
            self.iv = _next(explicit)
        self.rec_seq += 1
        return header + explicit + sealed

    def _begin(self) -> _AEAD:
        """Gets ready. Many directions never need it: most connections have data records only."""
        info = self._info
        self._tls13 = info.version is Version.TLS_1_3
        self._explicit = info.explicit_nonce_size
        self._salt = info.salt
        self._mask = int.from_bytes(info.salt + info.iv, "big")
        self._tag_size = info.cipher.tag_size
        self._aead = _AEADS[info.cipher](info.key)
        del self._info  # with the key
        return self._aead

    def _nonce(self, explicit: bytes) -> bytes:
        if explicit:
            return self._salt + explicit
        return (self._mask ^ self.rec_seq).to_bytes(12, "big")

    def _aad12(self, content_type: int, size: int) -> bytes:
        sequence = self.rec_seq.to_bytes(8, "big")
        return sequence + bytes([content_type, 3, 3]) + size.to_bytes(2, "big")


def _next(explicit: bytes) -> bytes:
    """An explicit nonce plus one, as OpenSSL and the kernel count them."""
    return ((int.from_bytes(explicit, "big") + 1) % (1 << 64)).to_bytes(8, "big")


class RecordReader:
    """Cuts a byte stream into records, and never asks for a byte of the one after."""

    def __init__(self) -> None:
        """Starts at a record boundary."""
        self._buffer = bytearray()

    @property
    def wanted(self) -> int:
        """How many bytes are missing: of the header first, then of the record it announces."""
        return size(self._buffer) - len(self._buffer)

    @property
    def partial(self) -> bool:
        """Whether the stream so far ends inside a record."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> bytes | None:
        """Takes at most `wanted` bytes.

        Returns:
            A record, when it is complete. Where the header can't be a record's, just that: the
            TLS library, given it, knows what to answer.
        """
        self._buffer += data
        if len(self._buffer) < HEADER_SIZE or self.wanted > 0:
            return None
        record = bytes(self._buffer)
        self._buffer.clear()
        return record


def size(stream: bytes | bytearray, at: int = 0) -> int:
    """How long the record that begins there is, header and all.

    Of its header only, if that isn't whole; or if it can't be a record's: the TLS library, given
    just that, knows what to answer.
    """
    if len(stream) < at + HEADER_SIZE or stream[at + 1] != _MAJOR:
        return HEADER_SIZE
    length = stream[at + 3] << 8 | stream[at + 4]
    return HEADER_SIZE + length if HEADER_SIZE + length <= _MAX_LENGTH else HEADER_SIZE


def split(stream: bytes) -> list[bytes]:
    """Cuts what a TLS library wrote into its records; a last, incomplete one is left out."""
    found, at, length = [], 0, len(stream)
    while at + HEADER_SIZE <= length:
        end = at + HEADER_SIZE + (stream[at + 3] << 8 | stream[at + 4])
        if end > length:
            break
        found.append(stream[at:end])
        at = end
    return found


class MessageReader:
    """Puts handshake messages together from the records that carry them (RFC 8446 section 5.1)."""

    def __init__(self, part: bytes = b"") -> None:
        """Starts at a message boundary, or after the `part` that another reader had."""
        self._buffer = bytearray(part)

    @property
    def part(self) -> bytes:
        """What the records so far have of an incomplete message."""
        return bytes(self._buffer)

    @property
    def partial(self) -> bool:
        """Whether the records so far end inside a message."""
        return bool(self._buffer)

    @property
    def partial_type(self) -> int | None:
        """The type of the message that they end in."""
        return self._buffer[0] if self._buffer else None

    def feed(self, content: bytes) -> list[tuple[int, bytes]]:
        """Takes the content of one handshake record.

        Returns:
            (type, body) of every message that it completes.

        Raises:
            ValueError: A message claims to be longer than any that TLS has.
        """
        self._buffer += content
        messages = []
        while len(self._buffer) >= 4:
            size = int.from_bytes(self._buffer[1:4], "big")
            if size > _LONGEST_MESSAGE:
                raise ValueError(f"a handshake message of {size} bytes")
            if len(self._buffer) < 4 + size:
                break
            messages.append((self._buffer[0], bytes(self._buffer[4 : 4 + size])))
            del self._buffer[: 4 + size]
        return messages
