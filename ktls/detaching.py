"""A connection that goes on in another process: all that it needs there, and no key.

Records are made and opened by the kernel, and its keys belong to the socket. Whoever gets the
descriptor (SCM_RIGHTS, fork, spawn) can go on with data and close_notify, given only some numbers
and names. What needs more is the next key of a KeyUpdate: it comes from a secret, which is handed
over only if that is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .keychain import KeyChain


@dataclass(frozen=True)
class ConnectionState:
    """A connection without its descriptor, from `Socket.detach_state`. It can be pickled.

    Attributes:
        tx_chain: Sending: version, cipher and perhaps the traffic secret.
        rx_chain: The same for receiving.
        server_side: Whether this end is the server.
        cipher_suite: As `Socket.cipher` tells it.
        alpn: What ALPN selected.
        certificate: The peer's certificate, DER.
        verifies: Whether it was verified.
        session_reused: Whether the handshake resumed a session.
        records_sent: How many records the sending key has protected, at the most.
        stream_end: Where in TCP's stream the last record ends, in bytes since it began.
        record_limit: How many records a key may protect; None means what its cipher allows.
        max_fragment: Most plaintext bytes in a record sent.
        suppress_ragged_eofs: As for `ktls.wrap`.
        close_timeout: As for `ktls.wrap`.
        finished_sending: Whether nothing may be sent any more, but perhaps close_notify.
        close_notify_sent: Whether that was sent.
        end: How the peer's data ended, by the name of an `End`; None if it goes on.
        handshake_part: What has come of a handshake message that is still incomplete.
        record_part: The same of a record.
    """

    tx_chain: KeyChain
    rx_chain: KeyChain
    server_side: bool
    cipher_suite: tuple[str, str, int] | None
    alpn: str | None
    certificate: bytes | None = field(repr=False)
    verifies: bool
    session_reused: bool
    records_sent: int
    stream_end: int
    record_limit: int | None
    max_fragment: int
    suppress_ragged_eofs: bool
    close_timeout: float
    finished_sending: bool
    close_notify_sent: bool
    end: str | None
    handshake_part: bytes = field(repr=False)
    record_part: bytes = field(repr=False)

    @property
    def can_update_keys(self) -> bool:
        """Whether the receiver of this can follow and make KeyUpdates: it has the secrets.

        Without them it can send and receive data, alerts and close_notify.
        """
        return self.tx_chain.updatable and self.rx_chain.updatable


class DetachedFacts:
    """What is known of a handshake that another process made; see `ktls.engine.Facts`."""

    connection = None

    def __init__(self, state: ConnectionState) -> None:
        """Takes what that process told."""
        self._state = state
        self.server_side = state.server_side

    def version(self) -> str:
        """See `ktls.engine.Facts.version`."""
        return str(self._state.tx_chain.version)

    def cipher(self) -> tuple[str, str, int] | None:
        """See `ktls.engine.Facts.cipher`."""
        return self._state.cipher_suite

    def peer_certificate(self) -> bytes | None:
        """See `ktls.engine.Facts.peer_certificate`."""
        return self._state.certificate

    def verifies(self) -> bool:
        """See `ktls.engine.Facts.verifies`."""
        return self._state.verifies

    def alpn(self) -> str | None:
        """See `ktls.engine.Facts.alpn`."""
        return self._state.alpn

    def session(self) -> None:
        """See `ktls.engine.Facts.session`: it stayed with OpenSSL in the other process."""

    def keep_session(self) -> None:
        """See `ktls.engine.Facts.keep_session`."""

    def session_reused(self) -> bool:
        """See `ktls.engine.Facts.session_reused`."""
        return self._state.session_reused
