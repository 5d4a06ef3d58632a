"""From a handshake's secrets and its records to traffic keys that are proved.

Theory of operation. A wrong sequence number is a nonce used twice or a dead connection, so neither
it nor the keys are taken on trust: every protected record that crossed the wire is opened, in
order, with keys derived here. What opens the records proves itself, and their number *is* the
sequence.

TLS 1.2 protects with one key per direction, from ChangeCipherSpec on: each direction has at least
its Finished, at sequence 0.

TLS 1.3 has two epochs (early data, which neither library takes here, would make a third). A
direction's records are followed under its handshake traffic key up to its Finished message, and
from there under the application traffic key, from sequence 0 (RFC 8446 sections 5.3 and 7.3). A
server's session tickets are such records. A client has none yet: that every record before is
accounted for, and ends with Finished, proves that its sequence is 0.

Of a TLS 1.3 handshake that just ended, the last record of a direction proves as much as all of them
(`prove_end`). It opens under one key and at one sequence only: either as a ticket, which says how
many records the application traffic key has protected, or as the Finished that all other protected
records came before, which says that it has protected none. What a server received needs no opening:
OpenSSL called the handshake done at a record, not before it, and was given none after it. (It
refuses a Finished with more in its record: keys change at a record's boundary, RFC 8446 section
5.1.)

Nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from .engine import Secrets
from .errors import UnprovenSequenceError
from .keychain import KeyChain
from .keyschedule import tls12_keys
from .records import HEADER_SIZE, InvalidTag, MessageReader, RecordCipher, split
from .types import (
    MAX_PAYLOAD,
    MIN_FRAGMENT,
    CryptoInfo,
    HandshakeType,
    Reason,
    RecordType,
    TrafficKeys,
    Version,
)

_MAX_FRAGMENT_LENGTH, _RECORD_SIZE_LIMIT = 1, 28  # extensions: RFC 6066 section 4, RFC 8449
_FRAGMENT_EXTENSIONS = (b"\0\1\0\1", b"\0\x1c\0\2")  # as they begin: type and size
_USUAL_TICKETS = 2  # what OpenSSL sends after a full handshake; it is 1 after a resumed one


@dataclass(frozen=True)
class HandOver:
    """What the kernel needs to go on where the TLS library stopped.

    Attributes:
        tx: The keys for sending, at the sequence that was proved.
        rx: The same for receiving.
        tx_chain: What follows the keys for sending.
        rx_chain: What follows those for receiving.
        max_fragment: Most plaintext bytes in a record that the peer agreed to take.
    """

    tx: CryptoInfo
    rx: CryptoInfo
    tx_chain: KeyChain
    rx_chain: KeyChain
    max_fragment: int = MAX_PAYLOAD

    @property
    def keys(self) -> TrafficKeys:
        """Both directions' present keys."""
        return TrafficKeys(self.tx, self.rx, max_fragment=self.max_fragment)


def initial_keys(secrets: Secrets) -> HandOver:
    """The keys that protect application data, at the sequence where they come into use.

    That is 0, in TLS 1.2 the Finished's. Its explicit nonce is left zero.
    """
    version, cipher, hash_name = secrets.version, secrets.cipher, secrets.hash_name
    if version is Version.TLS_1_3:
        chains = [_tls13_chain(secrets, side, "TRAFFIC_SECRET_0") for side in ("CLIENT", "SERVER")]
        keys = [chain.keys() for chain in chains]
    else:
        chains = [KeyChain(version, cipher, hash_name)] * 2
        keys = [
            CryptoInfo(
                version,
                cipher,
                key,
                iv=bytes(cipher.iv_size) if cipher.salt_size else nonce,
                salt=nonce if cipher.salt_size else b"",
                rec_seq=0,
            )
            for key, nonce in tls12_keys(hash_name, cipher, *secrets.tls12)
        ]
    tx, rx = (1, 0) if secrets.server_side else (0, 1)
    return HandOver(keys[tx], keys[rx], chains[tx], chains[rx])


def prove_end(secrets: Secrets, flights: Sequence[bytes], received: Sequence[bytes]) -> HandOver:
    """The same as `prove`, from the last record of each direction wherever that is enough.

    Args:
        secrets: What the TLS library tells of the handshake.
        flights: All that it wrote, a server's first tickets included, in parts of whole records.
        received: Every record that it read. The last one made the handshake done; no protected
            record was given to the library together with it.

    Returns:
        As `prove` does.

    Raises:
        UnprovenSequenceError: As `prove` does.
    """
    if secrets.version is Version.TLS_1_3 and flights and received:
        side = _prove_server_end if secrets.server_side else _prove_client_end
        with suppress(InvalidTag):
            found = side(secrets, flights, received)
            if found is not None:
                return found
    return prove(secrets, split(b"".join(flights)), received)


def _prove_server_end(
    secrets: Secrets, flights: Sequence[bytes], received: Sequence[bytes]
) -> HandOver | None:
    if _may_limit_fragments(received):
        return None
    tx = _tls13_chain(secrets, "SERVER", "TRAFFIC_SECRET_0")
    rx = _tls13_chain(secrets, "CLIENT", "TRAFFIC_SECRET_0")
    return HandOver(_after_tickets(tx, flights[-1]), rx.keys(), tx, rx)


def _prove_client_end(
    secrets: Secrets, flights: Sequence[bytes], received: Sequence[bytes]
) -> HandOver | None:
    sent = split(b"".join(flights))
    if _may_limit_fragments(sent):
        return None
    _check_finished(secrets, "CLIENT", sent)
    _check_finished(secrets, "SERVER", received)
    tx = _tls13_chain(secrets, "CLIENT", "TRAFFIC_SECRET_0")
    rx = _tls13_chain(secrets, "SERVER", "TRAFFIC_SECRET_0")
    return HandOver(tx.keys(), rx.keys(), tx, rx)


def _may_limit_fragments(records: Iterable[bytes]) -> bool:
    """Whether a client's hello may have one of the extensions that `_max_fragment` is about.

    A hello within another (ECH) isn't looked into: neither library has it.
    """
    clear = [record[HEADER_SIZE:] for record in records if record[0] == RecordType.HANDSHAKE]
    hello = b"".join(clear)
    return any(extension in hello for extension in _FRAGMENT_EXTENSIONS)


def _after_tickets(chain: KeyChain, flight: bytes) -> CryptoInfo:
    """A server's keys for sending, after the session tickets that it ended its handshake with.

    Raises:
        InvalidTag: There is none, or more than is usual.
    """
    info = chain.keys(_USUAL_TICKETS)
    cipher = RecordCipher(info)
    *_, last = split(flight) or [b""]
    for number in (_USUAL_TICKETS, 1):
        cipher.rec_seq = number - 1
        with suppress(InvalidTag):
            if _is_message(cipher.open(last), HandshakeType.NEW_SESSION_TICKET):
                return info if number == _USUAL_TICKETS else replace(info, rec_seq=number)
    raise InvalidTag


def _check_finished(secrets: Secrets, side: str, records: Sequence[bytes]) -> None:
    """Looks for a Finished in the last record, which all other protected ones came before.

    Raises:
        InvalidTag: It is something else.
    """
    protected = sum(record[0] == RecordType.APPLICATION_DATA for record in records)
    if not protected:
        raise InvalidTag
    chain = _tls13_chain(secrets, side, "HANDSHAKE_TRAFFIC_SECRET")
    cipher = RecordCipher(chain.keys(protected - 1))
    if not _is_message(cipher.open(records[-1]), HandshakeType.FINISHED):
        raise InvalidTag


def _is_message(record: tuple[int, bytes], kind: HandshakeType) -> bool:
    """Whether an opened record is one whole handshake message of a type."""
    content_type, content = record
    whole = len(content) == 4 + int.from_bytes(content[1:4], "big")
    return content_type == RecordType.HANDSHAKE and whole and content[0] == kind


def prove(secrets: Secrets, sent: Iterable[bytes], received: Iterable[bytes]) -> HandOver:
    """Follows a connection's records from its first to its last.

    Args:
        secrets: What the TLS library tells of the handshake.
        sent: Every record that it wrote.
        received: Every record that it read.

    Returns:
        The keys, at the sequence after those records.

    Raises:
        UnprovenSequenceError: A record didn't open, or the handshake's end isn't among them.
    """
    start = initial_keys(secrets)
    follow = _follow_tls13 if secrets.version is Version.TLS_1_3 else _follow_tls12
    names = ("SERVER", "CLIENT") if secrets.server_side else ("CLIENT", "SERVER")
    try:
        tx, sent_messages = follow(secrets, names[0], start.tx, sent)
        rx, received_messages = follow(secrets, names[1], start.rx, received)
    except InvalidTag:
        raise _unproven("a record did not open with the derived keys") from None
    except ValueError:
        raise _unproven("a handshake record makes no sense") from None
    by_server = sent_messages if secrets.server_side else received_messages
    max_fragment = _max_fragment(secrets, by_server)
    return HandOver(tx, rx, start.tx_chain, start.rx_chain, max_fragment)


_Messages = list[tuple[int, bytes]]


def _follow_tls12(
    _secrets: Secrets, _side: str, info: CryptoInfo, records: Iterable[bytes]
) -> tuple[CryptoInfo, _Messages]:
    """Opens what came after ChangeCipherSpec, which the Finished leads."""
    cipher, clear, protected = RecordCipher(info), MessageReader(), MessageReader()
    messages: _Messages = []
    changed = False
    for record in records:
        if changed:
            content_type, content = cipher.open(record)
            if content_type == RecordType.HANDSHAKE:
                messages += protected.feed(content)
        elif record[0] == RecordType.CHANGE_CIPHER_SPEC:
            changed = True
        elif record[0] == RecordType.HANDSHAKE:
            messages += clear.feed(record[HEADER_SIZE:])
    _ended_with_finished(messages, protected)
    return replace(info, iv=cipher.iv, rec_seq=cipher.rec_seq), messages


def _follow_tls13(
    secrets: Secrets, side: str, info: CryptoInfo, records: Iterable[bytes]
) -> tuple[CryptoInfo, _Messages]:
    """Opens the handshake epoch's records, then those of the application epoch."""
    handshake = RecordCipher(_tls13_chain(secrets, side, "HANDSHAKE_TRAFFIC_SECRET").keys())
    application = RecordCipher(info)
    reader = MessageReader()
    messages: _Messages = []
    finished = False
    for record in records:
        if record[0] != RecordType.APPLICATION_DATA:
            if finished:
                raise _unproven("an unprotected record after Finished")
            continue  # hellos, and the ChangeCipherSpec that means nothing (appendix D.4)
        if finished:
            content_type, content = application.open(record)
            if content_type == RecordType.HANDSHAKE and any(
                message == HandshakeType.KEY_UPDATE for message, _ in reader.feed(content)
            ):
                raise _unproven("the keys were updated already")
        else:
            content_type, content = handshake.open(record)
            if content_type == RecordType.HANDSHAKE:
                messages += reader.feed(content)
                finished = bool(messages) and messages[-1][0] == HandshakeType.FINISHED
    _ended_with_finished(messages, reader)
    return replace(info, rec_seq=application.rec_seq) if application.rec_seq else info, messages


def _ended_with_finished(messages: _Messages, reader: MessageReader) -> None:
    if reader.partial or not messages or messages[-1][0] != HandshakeType.FINISHED:
        raise _unproven("the records don't end with a whole Finished")


def _tls13_chain(secrets: Secrets, side: str, epoch: str) -> KeyChain:
    secret = secrets.tls13[f"{side}_{epoch}"]
    return KeyChain(secrets.version, secrets.cipher, secrets.hash_name, secret)


def _max_fragment(secrets: Secrets, messages: _Messages) -> int:
    """What the server's answer to the client's extensions says about record sizes."""
    for kind, body in messages:
        if kind == HandshakeType.ENCRYPTED_EXTENSIONS:
            extensions = body
        elif kind == HandshakeType.SERVER_HELLO:
            # version, random, session id, cipher suite, compression method
            extensions = body[2 + 32 + 1 + body[34] + 2 + 1 :] if len(body) > 34 else b""
        else:
            continue
        at = 2
        while at + 4 <= len(extensions):
            code = int.from_bytes(extensions[at : at + 2], "big")
            size = int.from_bytes(extensions[at + 2 : at + 4], "big")
            value = int.from_bytes(extensions[at + 4 : at + 4 + size], "big")
            if code == _MAX_FRAGMENT_LENGTH:
                return 256 << value
            if code == _RECORD_SIZE_LIMIT:
                # The server's own limit. The client's is in its hello: unknown here, so the least.
                padding = secrets.version is Version.TLS_1_3
                limit = MIN_FRAGMENT if secrets.server_side else value - padding
                return min(limit, MAX_PAYLOAD)
            at += 4 + size
    return MAX_PAYLOAD


def _unproven(text: str) -> UnprovenSequenceError:
    return UnprovenSequenceError(
        f"{text}: the connection stays with the TLS library", Reason.UNPROVEN_SEQUENCE
    )
