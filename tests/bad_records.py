"""Records that a peer must not send, and the alerts that answer them.

Whoever seals records can make them: the tests' own peer, and an independent TLS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ktls import Alert, RecordType
from ktls.types import AlertLevel, HandshakeType

DATA, HANDSHAKE = RecordType.APPLICATION_DATA, RecordType.HANDSHAKE


class Sealer(Protocol):
    """Seals one record after the other with a connection's keys."""

    def seal(self, content_type: int, content: bytes, /) -> bytes:
        """The next record, header and all."""


@dataclass(frozen=True)
class Answer:
    """The alert that answers a record, by who opens it and who writes the alert.

    Attributes:
        kernel: The kernel opens it, and makes the alert's record: ktls chooses.
        mixed: The kernel opens it, and OpenSSL, shown something like it, chooses.
        openssl: OpenSSL opens it.
    """

    kernel: Alert
    mixed: Alert
    openssl: Alert

    def of(self, mode: str) -> Alert:
        """The alert in one of conftest's modes."""
        return {"kernel": self.kernel, "rx-only": self.mixed}.get(mode, self.openssl)


@dataclass(frozen=True)
class BadRecord:
    """One kind of them. It may be two records, the first of which is good.

    Attributes:
        make: Makes it.
        tls12: What answers it in TLS 1.2; None where it isn't bad.
        tls13: What answers it in TLS 1.3.
    """

    make: Callable[[Sealer], bytes]
    tls12: Answer | None
    tls13: Answer | None

    @property
    def name(self) -> str:
        """For the test's id."""
        return self.make.__name__.strip("_")

    def answer(self, version: str, mode: str) -> Alert:
        """The alert that answers it."""
        answer = self.tls12 if version == "TLSv1.2" else self.tls13
        assert answer is not None
        return answer.of(mode)


def _corrupted(sealer: Sealer) -> bytes:
    record = bytearray(sealer.seal(DATA, b"to be changed"))
    record[-1] ^= 1
    return bytes(record)


def _replayed(sealer: Sealer) -> bytes:
    return sealer.seal(DATA, b"twice") * 2


def _too_long(sealer: Sealer) -> bytes:
    return sealer.seal(DATA, bytes(16385))


def _longer_than_tls13_allows(_sealer: Sealer) -> bytes:
    return _unsealed(DATA, 2**14 + 257)


def _longer_than_tls12_allows(_sealer: Sealer) -> bytes:
    return _unsealed(DATA, 2**14 + 2049)


def _unsealed(content_type: int, size: int) -> bytes:
    return bytes([content_type, 3, 3]) + size.to_bytes(2, "big") + bytes(size)


def _wrong_version(sealer: Sealer) -> bytes:
    record = bytearray(sealer.seal(DATA, b"data"))
    record[1:3] = b"\x05\x05"
    return bytes(record)


def _too_short(sealer: Sealer) -> bytes:
    # Linux looks at nothing before it has a header and an explicit nonce: more must follow.
    return bytes([DATA, 3, 3, 0, 3]) + b"abc" + sealer.seal(DATA, b"more")


def _plain_http(_sealer: Sealer) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def _clear_alert(sealer: Sealer) -> bytes:
    alert = bytes([AlertLevel.FATAL, Alert.HANDSHAKE_FAILURE])
    return bytes([RecordType.ALERT, 3, 3, 0, 2]) + alert + sealer.seal(DATA, b"more")


def _clear_handshake(sealer: Sealer) -> bytes:
    return _unsealed(HANDSHAKE, 20) + sealer.seal(DATA, b"more")


def _nothing_but_padding(sealer: Sealer) -> bytes:
    return sealer.seal(0, bytes(20))


def _heartbeat(sealer: Sealer) -> bytes:
    return sealer.seal(RecordType.HEARTBEAT, b"\1\0\3abc" + bytes(16))


def _unknown_type(sealer: Sealer) -> bytes:
    return sealer.seal(99, b"what?")


def _change_cipher_spec(sealer: Sealer) -> bytes:
    return sealer.seal(RecordType.CHANGE_CIPHER_SPEC, b"\1")


def _empty_alert(sealer: Sealer) -> bytes:
    return sealer.seal(RecordType.ALERT, b"")


def _short_alert(sealer: Sealer) -> bytes:
    return sealer.seal(RecordType.ALERT, b"\2")


def _long_alert(sealer: Sealer) -> bytes:
    return sealer.seal(RecordType.ALERT, b"\1\0\1")


def _empty_handshake(sealer: Sealer) -> bytes:
    return sealer.seal(HANDSHAKE, b"")


def _finished(sealer: Sealer) -> bytes:
    return sealer.seal(HANDSHAKE, bytes([HandshakeType.FINISHED, 0, 0, 32]) + bytes(32))


def _server_hello(sealer: Sealer) -> bytes:
    return sealer.seal(HANDSHAKE, bytes([HandshakeType.SERVER_HELLO, 0, 0, 40]) + bytes(40))


def _certificate_request(sealer: Sealer) -> bytes:
    extensions = b"\0\x0d\0\4\0\2\4\3"
    return sealer.seal(HANDSHAKE, b"\x0d\0\0\x0b\0\0\x08" + extensions)


def _endless_message(sealer: Sealer) -> bytes:
    return sealer.seal(HANDSHAKE, bytes([HandshakeType.FINISHED]) + b"\xff\xff\xff" + bytes(100))


def _endless_message_in_parts(sealer: Sealer) -> bytes:
    parts = bytes([HandshakeType.FINISHED]), b"\xff\xff", b"\xff" + bytes(100)
    return b"".join(sealer.seal(HANDSHAKE, part) for part in parts)


def _data_within_a_message(sealer: Sealer) -> bytes:
    return sealer.seal(HANDSHAKE, b"\4\0\0\x50abc") + sealer.seal(DATA, b"data")


def _update_asks_for_2(sealer: Sealer) -> bytes:
    return sealer.seal(HANDSHAKE, b"\x18\0\0\1\2")


def _update_is_empty(sealer: Sealer) -> bytes:
    return sealer.seal(HANDSHAKE, b"\x18\0\0\0")


def _update_is_long(sealer: Sealer) -> bytes:
    return sealer.seal(HANDSHAKE, b"\x18\0\0\2\0\0")


def _update_then_another(sealer: Sealer) -> bytes:
    return sealer.seal(HANDSHAKE, b"\x18\0\0\1\0" * 2)


def _update_then_a_part(sealer: Sealer) -> bytes:
    return sealer.seal(HANDSHAKE, b"\x18\0\0\1\0\4")


def _all(alert: Alert) -> Answer:
    return Answer(alert, alert, alert)


_MAC = _all(Alert.BAD_RECORD_MAC)
_OVERFLOW = _all(Alert.RECORD_OVERFLOW)
_UNEXPECTED = _all(Alert.UNEXPECTED_MESSAGE)
_VERSION = _all(Alert.PROTOCOL_VERSION)
_ALERT_SIZE = Answer(Alert.DECODE_ERROR, Alert.UNEXPECTED_MESSAGE, Alert.UNEXPECTED_MESSAGE)
_ENDLESS = Answer(Alert.ILLEGAL_PARAMETER, Alert.UNEXPECTED_MESSAGE, Alert.UNEXPECTED_MESSAGE)
# The RFCs want unexpected_message. The kernel says EBADMSG, as for a wrong tag.
_UNSAID = Answer(Alert.BAD_RECORD_MAC, Alert.BAD_RECORD_MAC, Alert.UNEXPECTED_MESSAGE)

BAD_RECORDS = [
    # The record's protection and framing.
    BadRecord(_corrupted, _MAC, _MAC),
    BadRecord(_replayed, _MAC, _MAC),
    BadRecord(_too_short, _MAC, _MAC),
    BadRecord(_too_long, _OVERFLOW, _OVERFLOW),
    # TLS 1.2 allows 2048 bytes of expansion; the kernel knows that its ciphers have less.
    BadRecord(
        _longer_than_tls13_allows,
        Answer(Alert.RECORD_OVERFLOW, Alert.RECORD_OVERFLOW, Alert.BAD_RECORD_MAC),
        _OVERFLOW,
    ),
    BadRecord(_longer_than_tls12_allows, _OVERFLOW, _OVERFLOW),
    BadRecord(
        _wrong_version,
        _VERSION,
        Answer(Alert.PROTOCOL_VERSION, Alert.DECODE_ERROR, Alert.DECODE_ERROR),
    ),
    BadRecord(
        _plain_http,
        _VERSION,
        Answer(Alert.PROTOCOL_VERSION, Alert.DECODE_ERROR, Alert.UNEXPECTED_MESSAGE),
    ),
    BadRecord(_clear_alert, _MAC, _UNSAID),
    BadRecord(_clear_handshake, _MAC, _UNSAID),
    BadRecord(_nothing_but_padding, _UNSAID, _UNSAID),
    # Types that aren't due.
    BadRecord(_heartbeat, _UNEXPECTED, _UNEXPECTED),
    BadRecord(_unknown_type, _UNEXPECTED, _UNEXPECTED),
    BadRecord(_change_cipher_spec, _UNEXPECTED, _UNEXPECTED),
    # Alerts and handshake messages; RFC 8446 section 5.4 for the empty ones.
    BadRecord(_empty_alert, _UNEXPECTED, _UNEXPECTED),
    BadRecord(_short_alert, _ALERT_SIZE, _ALERT_SIZE),
    BadRecord(_long_alert, _ALERT_SIZE, _ALERT_SIZE),
    BadRecord(_empty_handshake, None, _UNEXPECTED),
    BadRecord(_finished, _UNEXPECTED, _UNEXPECTED),
    BadRecord(_server_hello, _UNEXPECTED, _UNEXPECTED),
    BadRecord(_certificate_request, _UNEXPECTED, _UNEXPECTED),
    BadRecord(_endless_message, _ENDLESS, _ENDLESS),
    BadRecord(_endless_message_in_parts, _ENDLESS, _ENDLESS),
    BadRecord(_data_within_a_message, _UNEXPECTED, _UNEXPECTED),
    # KeyUpdates, which TLS 1.2 doesn't have.
    BadRecord(_update_asks_for_2, _UNEXPECTED, _all(Alert.ILLEGAL_PARAMETER)),
    BadRecord(_update_is_empty, _UNEXPECTED, _all(Alert.DECODE_ERROR)),
    BadRecord(
        _update_is_long,
        _UNEXPECTED,
        Answer(Alert.DECODE_ERROR, Alert.ILLEGAL_PARAMETER, Alert.ILLEGAL_PARAMETER),
    ),
    BadRecord(_update_then_another, _UNEXPECTED, _UNEXPECTED),
    BadRecord(_update_then_a_part, _UNEXPECTED, _UNEXPECTED),
]


def bad_in(version: str) -> list[BadRecord]:
    """Those that are bad in that version."""
    return [
        bad for bad in BAD_RECORDS if (bad.tls12 if version == "TLSv1.2" else bad.tls13) is not None
    ]
