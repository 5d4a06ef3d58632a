"""What follows one direction's keys after each KeyUpdate, and how much a key may protect."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .keyschedule import next_secret, tls13_keys
from .records import HEADER_SIZE
from .types import Cipher, CryptoInfo, Version

# Most records under one key (RFC 8446 section 5.5; the round number below its 2^24.5 for GCM). CCM
# has a lower bound (RFC 9147 section 4.5.3); ChaCha20-Poly1305's is beyond the sequence number's.
_RECORD_LIMITS = {Cipher.AES_CCM_128: 1 << 23, Cipher.CHACHA20_POLY1305: 1 << 62}
_DEFAULT_LIMIT = 1 << 24


@dataclass(frozen=True)
class KeyChain:
    """A generation of a direction's keys: not the keys themselves, but what they come from.

    Attributes:
        version: The TLS version.
        cipher: The cipher.
        hash_name: The cipher suite's hash.
        secret: The traffic secret. TLS 1.2 has none; and it is empty where this process must not
            have it, because the handshake was another's.
    """

    version: Version
    cipher: Cipher
    hash_name: str
    secret: bytes = field(default=b"", repr=False)

    @property
    def updatable(self) -> bool:
        """Whether the next generation can be derived."""
        return bool(self.secret)

    @property
    def obstacle(self) -> str:
        """Why it can't."""
        if self.version is Version.TLS_1_2:
            return "TLS 1.2 has no KeyUpdate"
        return (
            "the secret that the next key comes from stayed in the process that made the handshake "
            "(Socket.detach_state(key_updates=True) hands it over)"
        )

    @property
    def record_limit(self) -> int:
        """How many records a key may protect."""
        return _RECORD_LIMITS.get(self.cipher, _DEFAULT_LIMIT)

    @property
    def overhead(self) -> int:
        """Bytes that a record without padding has beside its payload."""
        content_type = self.version is Version.TLS_1_3  # within (RFC 8446 section 5.2)
        nonce = self.cipher.explicit_nonce_size(self.version)
        return HEADER_SIZE + nonce + content_type + self.cipher.tag_size

    def keys(self, rec_seq: int = 0) -> CryptoInfo:
        """This generation's keys (RFC 8446 section 7.3), for the record with that sequence."""
        key, iv = tls13_keys(self.hash_name, self.cipher, self.secret)
        salt = self.cipher.salt_size
        return CryptoInfo(self.version, self.cipher, key, iv[salt:], iv[:salt], rec_seq)

    def next(self) -> KeyChain:
        """The generation after a KeyUpdate (RFC 8446 section 7.2)."""
        return replace(self, secret=next_secret(self.hash_name, self.secret))

    def without_secret(self) -> KeyChain:
        """The same for a process that must not derive keys."""
        return replace(self, secret=b"")
