"""What ktls asks of a TLS library: the handshake, its secrets, and a record at a time.

`ktls.pyopenssl.Engine` and `ktls.stdlib.Engine` are the two. Nothing above this line of the layers
knows which library it is, and both are OpenSSL: what its suites and secrets are called is here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Protocol

from .types import Cipher, Version

TLS13_LABELS = {
    f"{side}_{epoch}"
    for side in ("CLIENT", "SERVER")
    for epoch in ("HANDSHAKE_TRAFFIC_SECRET", "TRAFFIC_SECRET_0")
}
"""The key-log labels of the secrets that a TLS 1.3 hand-over needs."""

# OpenSSL's suite names by how they end: "ECDHE-RSA-AES128-GCM-SHA256", "TLS_AES_128_GCM_SHA256".
_SUITES = (
    ("AES128-GCM-SHA256", Cipher.AES_GCM_128, "sha256"),
    ("AES256-GCM-SHA384", Cipher.AES_GCM_256, "sha384"),
    ("AES128-CCM", Cipher.AES_CCM_128, "sha256"),
    ("CHACHA20-POLY1305", Cipher.CHACHA20_POLY1305, "sha256"),
    ("TLS_AES_128_GCM_SHA256", Cipher.AES_GCM_128, "sha256"),
    ("TLS_AES_256_GCM_SHA384", Cipher.AES_GCM_256, "sha384"),
    ("TLS_AES_128_CCM_SHA256", Cipher.AES_CCM_128, "sha256"),
    ("TLS_CHACHA20_POLY1305_SHA256", Cipher.CHACHA20_POLY1305, "sha256"),
)


@functools.cache
def find_suite(name: str) -> tuple[Cipher, str] | None:
    """The AEAD and the hash of a suite by OpenSSL's name; None if kernel TLS doesn't have it."""
    for ending, cipher, hash_name in _SUITES:
        if name.endswith(ending):
            return cipher, hash_name
    return None


@dataclass(frozen=True)
class Secrets:
    """What a finished handshake agreed on.

    Attributes:
        version: The TLS version.
        cipher: The cipher suite's AEAD.
        hash_name: The cipher suite's hash, ``"sha256"`` or ``"sha384"``.
        server_side: Whether this end is the server.
        tls12: TLS 1.2: master secret, client random, server random.
        tls13: TLS 1.3: the secrets by their key-log labels, such as ``CLIENT_TRAFFIC_SECRET_0``.
    """

    version: Version
    cipher: Cipher
    hash_name: str
    server_side: bool
    tls12: tuple[bytes, bytes, bytes] = field(default=(b"", b"", b""), repr=False)
    tls13: dict[str, bytes] = field(default_factory=dict, repr=False)


class Facts(Protocol):
    """What a handshake agreed on, and what a TLS library remembers of it.

    Attributes:
        server_side: Whether this end is the server.
    """

    server_side: bool

    @property
    def connection(self) -> Any:  # noqa: ANN401 - the library's own type
        """The library's connection; None where there is no library."""

    def version(self) -> str:
        """The protocol version's name, such as ``TLSv1.3``."""

    def cipher(self) -> tuple[str, str, int] | None:
        """Cipher suite, the protocol that defines it, and secret bits, as ``ssl`` tells them."""

    def peer_certificate(self) -> bytes | None:
        """The peer's certificate, DER."""

    def verifies(self) -> bool:
        """Whether the context has it verified."""

    def alpn(self) -> str | None:
        """The protocol that ALPN selected."""

    def session(self) -> Any:  # noqa: ANN401 - the library's own type
        """The session, for resumption with the same library."""

    def keep_session(self) -> None:
        """Makes the session outlive a connection whose closing the engine didn't see."""

    def session_reused(self) -> bool:
        """Whether the handshake resumed a session."""


class Engine(Facts, Protocol):
    """One TLS connection in a library's hands, moving bytes through memory."""

    def want_secrets(self) -> None:
        """Has the library deliver what `secrets` is made from; before the handshake."""

    def handshake(self) -> bool:
        """Goes on with the handshake; True when it is done.

        Raises:
            HandshakeError: It failed. `outgoing` may have an alert for the peer.
        """

    def incoming(self, stream: bytes) -> None:
        """Takes bytes from the peer: whole records."""

    def outgoing(self) -> bytes:
        """Gives the bytes for the peer, which may be none."""

    def answers(self) -> bytes:
        """Gives the bytes for the peer that reading calls for, such as a KeyUpdate's answer."""

    def secrets(self) -> Secrets:
        """Tells what the handshake agreed on.

        Raises:
            HandOverError: Nothing that the kernel could use.
        """

    def forget_secrets(self) -> None:
        """Drops what `secrets` was made from."""

    def encrypt(self, data: memoryview) -> int:
        """Takes plaintext for `outgoing`; returns how many bytes of it.

        Raises:
            ClosedForWritingError: The connection is over in this direction.
        """

    def read_into(self, buffer: memoryview, *, peek: bool = False) -> int | None:
        """Gives plaintext: a count, 0 after close_notify, None when it needs another record.

        Raises:
            AlertReceived: A fatal alert came.
            RecordError: The peer broke the protocol; `outgoing` has the alert that says so.
        """

    def pending(self) -> int:
        """How many plaintext bytes are ready, of the last record."""

    def close_notify(self) -> None:
        """Makes a close_notify for `outgoing`."""
