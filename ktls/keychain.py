"""One direction's keys, and those that follow them after each KeyUpdate."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .keyschedule import next_secret, tls13_keys
from .types import Cipher, CryptoInfo, Version

# Most records under one key (RFC 8446 section 5.5; the round number below its 2^24.5 for GCM). CCM
# has a lower bound (RFC 9147 section 4.5.3); ChaCha20-Poly1305's is beyond the sequence number's.
_RECORD_LIMITS = {Cipher.AES_CCM_128: 1 << 23, Cipher.CHACHA20_POLY1305: 1 << 62}
_DEFAULT_LIMIT = 1 << 24


@dataclass(frozen=True)
class KeyChain:
    """A generation of keys.

    Attributes:
        info: The keys.
        hash_name: The cipher suite's hash.
        secret: The traffic secret that they were derived from; empty in TLS 1.2, which has none.
    """

    info: CryptoInfo
    hash_name: str
    secret: bytes = field(default=b"", repr=False)

    @property
    def updatable(self) -> bool:
        """Whether there is a next generation: in TLS 1.3."""
        return self.info.version is Version.TLS_1_3

    @property
    def record_limit(self) -> int:
        """How many records this key may protect."""
        return _RECORD_LIMITS.get(self.info.cipher, _DEFAULT_LIMIT)

    def next(self) -> KeyChain:
        """The generation after a KeyUpdate, from sequence 0 (RFC 8446 section 7.2)."""
        return KeyChain.tls13(
            self.info.cipher, self.hash_name, next_secret(self.hash_name, self.secret)
        )

    @classmethod
    def tls13(cls, cipher: Cipher, hash_name: str, secret: bytes) -> KeyChain:
        """The keys of a TLS 1.3 traffic secret, at sequence 0."""
        key, iv = tls13_keys(hash_name, cipher, secret)
        salt = cipher.salt_size
        info = CryptoInfo(Version.TLS_1_3, cipher, key, iv[salt:], iv[:salt], rec_seq=0)
        return cls(info, hash_name, secret)

    def at(self, info: CryptoInfo) -> KeyChain:
        """The same generation, further on."""
        return replace(self, info=info)
