"""The vocabulary: versions, ciphers, records, alerts, and what a direction's state is called.

Numbers are the protocol's own (RFC 8446, RFC 5246) or the kernel's (``<linux/tls.h>``); sizes come
from the C core's cipher table.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from . import _ktls
from .errors import KeyMaterialError

MAX_PAYLOAD: int = _ktls.MAX_PAYLOAD
"""Most plaintext bytes in one record: 2^14 (RFC 8446 section 5.1)."""


MIN_FRAGMENT = 64
"""What the limit of a record's plaintext may be at the least (RFC 8449 section 4)."""

_REC_SEQ_END = 1 << 8 * _ktls.REC_SEQ_SIZE


class Version(enum.IntEnum):
    """TLS versions that the kernel knows."""

    TLS_1_2 = _ktls.VERSION_1_2
    TLS_1_3 = _ktls.VERSION_1_3

    def __str__(self) -> str:
        """As ``ssl`` and OpenSSL write it: ``TLSv1.3``."""
        return "TLSv1.2" if self is Version.TLS_1_2 else "TLSv1.3"


_ROWS = {row[0]: row for row in _ktls.cipher_table()}


class Cipher(enum.IntEnum):
    """Ciphers that the kernel knows, by the ids of ``<linux/tls.h>``. Sizes are in bytes.

    Attributes:
        key_size: Of the key.
        iv_size: Of the part of the nonce that the kernel calls iv.
        salt_size: Of the part of the nonce that the kernel calls salt.
        tag_size: Of the authentication tag that ends a record.
        versions: The TLS versions in which the kernel takes this cipher.
    """

    key_size: int
    iv_size: int
    salt_size: int
    tag_size: int
    versions: tuple[Version, ...]

    AES_GCM_128 = 51
    AES_GCM_256 = 52
    AES_CCM_128 = 53
    CHACHA20_POLY1305 = 54
    SM4_GCM = 55
    SM4_CCM = 56
    ARIA_GCM_128 = 57
    ARIA_GCM_256 = 58

    def __init__(self, number: int) -> None:
        """Takes what the C core's table says."""
        _, _, self.key_size, self.iv_size, self.salt_size, self.tag_size, *taken = _ROWS[number]
        self.versions = tuple(
            version for version, takes in zip(Version, taken, strict=True) if takes
        )

    def explicit_nonce_size(self, version: Version) -> int:
        """Of the nonce that each record carries: 8 for TLS 1.2 AES and ARIA, else 0."""
        return self.iv_size if version is Version.TLS_1_2 and self.salt_size else 0


class RecordType(enum.IntEnum):
    """Record content types (RFC 8446 section 5.1, RFC 6520 for heartbeat)."""

    CHANGE_CIPHER_SPEC = 20
    ALERT = 21
    HANDSHAKE = 22
    APPLICATION_DATA = 23
    HEARTBEAT = 24


class HandshakeType(enum.IntEnum):
    """Handshake message types that matter here (RFC 8446 section 4)."""

    HELLO_REQUEST = 0
    CLIENT_HELLO = 1
    SERVER_HELLO = 2
    NEW_SESSION_TICKET = 4
    ENCRYPTED_EXTENSIONS = 8
    FINISHED = 20
    KEY_UPDATE = 24


class KeyUpdateRequest(enum.IntEnum):
    """Whether a KeyUpdate asks for another (RFC 8446 section 4.6.3)."""

    NOT_REQUESTED = 0
    REQUESTED = 1


class Alert(enum.IntEnum):
    """Alert descriptions (RFC 8446 section 6, RFC 5246 section 7.2 for the older ones)."""

    CLOSE_NOTIFY = 0
    UNEXPECTED_MESSAGE = 10
    BAD_RECORD_MAC = 20
    DECRYPTION_FAILED = 21
    RECORD_OVERFLOW = 22
    DECOMPRESSION_FAILURE = 30
    HANDSHAKE_FAILURE = 40
    BAD_CERTIFICATE = 42
    UNSUPPORTED_CERTIFICATE = 43
    CERTIFICATE_REVOKED = 44
    CERTIFICATE_EXPIRED = 45
    CERTIFICATE_UNKNOWN = 46
    ILLEGAL_PARAMETER = 47
    UNKNOWN_CA = 48
    ACCESS_DENIED = 49
    DECODE_ERROR = 50
    DECRYPT_ERROR = 51
    PROTOCOL_VERSION = 70
    INSUFFICIENT_SECURITY = 71
    INTERNAL_ERROR = 80
    INAPPROPRIATE_FALLBACK = 86
    USER_CANCELED = 90
    NO_RENEGOTIATION = 100
    MISSING_EXTENSION = 109
    UNSUPPORTED_EXTENSION = 110
    UNRECOGNIZED_NAME = 112
    BAD_CERTIFICATE_STATUS_RESPONSE = 113
    UNKNOWN_PSK_IDENTITY = 115
    CERTIFICATE_REQUIRED = 116
    NO_APPLICATION_PROTOCOL = 120


class AlertLevel(enum.IntEnum):
    """Alert levels (RFC 5246 section 7.2; TLS 1.3 ignores them)."""

    WARNING = 1
    FATAL = 2


class Mode(enum.Enum):
    """Where a direction's records are made or opened."""

    USERSPACE = "userspace"
    """In this process, by OpenSSL."""
    SOFTWARE = "software"
    """In the kernel. Whether a network card does the work, only `Socket.info` tells."""
    DEVICE = "device"
    """In the kernel, by the network card."""


class Reason(enum.Enum):
    """Why a direction is not in the kernel; the value is the sentence for the user."""

    NOT_WANTED = "not asked for"
    NO_KERNEL_TLS = (
        "this kernel has no TLS, or this process may not load it: as root run `modprobe tls` (once "
        "per boot; /etc/modules-load.d/tls.conf keeps it), or use a kernel with CONFIG_TLS"
    )
    NO_ALGORITHM = (
        "the kernel has TLS but no implementation of this cipher: load the crypto module "
        "(`modprobe gcm`, `ccm` or `chacha20poly1305`), or build it in"
    )
    CIPHER_NOT_IN_KERNEL = (
        "this kernel's TLS doesn't take this cipher, version or direction: a newer kernel may, or "
        "negotiate AES-GCM"
    )
    CIPHER_SUITE = (
        "kernel TLS has no such cipher suite: negotiate AES-GCM or ChaCha20-Poly1305 in TLS 1.2 or "
        "1.3"
    )
    VERSION = "kernel TLS speaks TLS 1.2 and 1.3 only"
    NOT_ESTABLISHED = "the TCP connection was not established, or the peer had closed it already"
    NOT_TCP = "kernel TLS needs a TCP socket (not MPTCP, AF_UNIX or UDP)"
    OTHER_ULP = "the socket already has keys, or an upper layer protocol other than TLS"
    NO_SECRETS = "the TLS library didn't deliver this connection's secrets"
    HANDSHAKE_NOT_DONE = "the handshake is not complete"
    UNPROVEN_SEQUENCE = "no record proves these keys and sequence numbers"
    FRAGMENT_LIMIT = (
        "smaller records are wanted than this kernel makes: a newer one (with "
        "TLS_TX_MAX_PAYLOAD_LEN) can"
    )
    KERNEL_REFUSED = "the kernel refused with an error of its own"


@dataclass(frozen=True)
class Offload:
    """What became of one direction.

    Attributes:
        mode: Where its records are made or opened.
        reason: Why not in the kernel; None where it is.
        detail: What exactly happened, such as the system call and its errno; may be empty.
    """

    mode: Mode
    reason: Reason | None = None
    detail: str = ""

    def __str__(self) -> str:
        """One line for a log."""
        if self.reason is None:
            return self.mode.value
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.mode.value}: {self.reason.value}{detail}"


@dataclass(frozen=True, repr=False)
class CryptoInfo:
    """One direction's keys, as the kernel wants them; never shown by ``repr``.

    Attributes:
        version: The TLS version.
        cipher: The cipher, which fixes the sizes below.
        key: ``cipher.key_size`` bytes.
        iv: ``cipher.iv_size`` bytes. TLS 1.2 AES: the explicit nonce of the next record sent.
            TLS 1.3: the write IV without its first 4 bytes. ChaCha20-Poly1305: all of the IV.
        salt: ``cipher.salt_size`` bytes: the rest of the nonce.
        rec_seq: Sequence number of the next record, 0 to 2^64 - 1.

    Raises:
        KeyMaterialError: A size is wrong, or the cipher isn't one of that version's.
    """

    version: Version
    cipher: Cipher
    key: bytes
    iv: bytes
    salt: bytes
    rec_seq: int

    def __post_init__(self) -> None:
        """Checks what the kernel would answer with a bare EINVAL."""
        version, cipher = self.version, self.cipher
        if type(version) is not Version or type(cipher) is not Cipher:
            try:
                version, cipher = Version(version), Cipher(cipher)
            except ValueError:  # its text has the value, which may be a key in the wrong place
                raise KeyMaterialError("kernel TLS has no such version or cipher") from None
            object.__setattr__(self, "version", version)
            object.__setattr__(self, "cipher", cipher)
        if version not in cipher.versions:
            raise KeyMaterialError(f"the kernel has no {cipher.name} in {version}")
        self._check_size("key", self.key, cipher.key_size)
        self._check_size("iv", self.iv, cipher.iv_size)
        self._check_size("salt", self.salt, cipher.salt_size)
        if not isinstance(self.rec_seq, int) or not 0 <= self.rec_seq < _REC_SEQ_END:
            raise KeyMaterialError("rec_seq must be 0 to 2^64 - 1")

    def _check_size(self, name: str, value: bytes, wanted: int) -> None:
        if not isinstance(value, bytes) or len(value) != wanted:
            raise KeyMaterialError(f"{self.cipher.name} wants {wanted} bytes of {name}")

    @property
    def explicit_nonce_size(self) -> int:
        """Bytes of nonce that each record carries."""
        return self.cipher.explicit_nonce_size(self.version)

    def __repr__(self) -> str:
        """Version, cipher and sequence; nothing secret."""
        return f"<CryptoInfo {self.version} {self.cipher.name} rec_seq={self.rec_seq}>"


@dataclass(frozen=True)
class TrafficKeys:
    """Both directions' keys of one connection, as this end sees them.

    Attributes:
        tx: For records that this end sends.
        rx: For records that it receives.
        max_fragment: Most plaintext bytes in a record that the peer agreed to take.

    Raises:
        KeyMaterialError: The directions differ in version or cipher, or no record is that small.
    """

    tx: CryptoInfo
    rx: CryptoInfo
    max_fragment: int = field(default=MAX_PAYLOAD, kw_only=True)

    def __post_init__(self) -> None:
        """The kernel wants the same version and cipher in both directions."""
        if not MIN_FRAGMENT - 1 <= self.max_fragment <= MAX_PAYLOAD:
            raise KeyMaterialError(
                f"records hold {MIN_FRAGMENT} to {MAX_PAYLOAD} bytes at the most"
            )
        if (self.tx.version, self.tx.cipher) != (self.rx.version, self.rx.cipher):
            raise KeyMaterialError("both directions must have the same version and cipher")
