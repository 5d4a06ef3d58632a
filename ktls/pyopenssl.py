"""All that ktls knows of pyOpenSSL: the secrets, the engine, and connections driven elsewhere.

Secrets come from OpenSSL's key-log callback and stay in memory, attached to their connection and
dropped when they have been used. pyOpenSSL has no way to ask for a callback that is already set, so
chaining one reads a private attribute of ``Context``; without it the caller's callback can be given
to `prepare`.
"""

from __future__ import annotations

import binascii
import ipaddress
import os
import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from OpenSSL import SSL, crypto
from OpenSSL._util import ffi as _ffi
from OpenSSL._util import lib as _lib

from . import records, tcp
from .engine import TLS13_LABELS, Secrets, find_suite
from .errors import (
    AlertReceived,
    ClosedForWritingError,
    DecryptError,
    HandOverError,
    HandshakeError,
    HandshakeNotDoneError,
    RecordError,
    UnprovenSequenceError,
    UnsupportedConnectionError,
)
from .proof import initial_keys, prove
from .types import Alert, AlertLevel, HandshakeType, Reason, TrafficKeys, Version

__all__ = ["Engine", "extract_keys", "prepare"]

_KeyLog = Callable[[SSL.Connection, bytes], None]

# Attributes of a context: our own callbacks, to see whether they are still those that are called.
_INFO_MARK, _KEYLOG_MARK = "_ktls_info_callback", "_ktls_keylog_callback"
_WATCH = "_ktls_watch"  # a connection's

_DONE = b"SSL negotiation finished successfully"
_WRITE_TICKET = b"write session ticket"
_INFO_LOOP, _INFO_EXIT = 0x01, 0x02  # SSL_CB_LOOP, SSL_CB_EXIT of SSL_CTX_set_info_callback(3)
_INFO_ACCEPT = 0x2000  # SSL_ST_ACCEPT
_INFO_ALERT, _INFO_READ = 0x4000, 0x04  # SSL_CB_ALERT, SSL_CB_READ
_HOST_NAME = re.compile(rb"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
_LABELS = {label.encode(): label for label in TLS13_LABELS}
# How their lines begin; not those of the next secrets (..._SECRET_N, one for each KeyUpdate).
_WANTED = tuple(label + b" " for label in _LABELS)
_KNOWN_ALERTS = frozenset(Alert)
_TLS_MAJOR = 3  # the high byte of a TLS version; DTLS has 0xfe


class _Watch:
    """What the callbacks saw of one connection, whose attribute it is."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.server_side = False
        self.tickets = 0
        self.moved: tuple[int, int] | None = None

    def secrets(self) -> dict[str, bytes]:
        """Those that were logged, by their labels."""
        found = {}
        for line in self.lines:
            label, _, secret = line.split(b" ")
            found[_LABELS[label]] = binascii.unhexlify(secret)
        return found


_lock = threading.Lock()


def prepare(context: SSL.Context, keylog: _KeyLog | None = None) -> None:
    """Installs a key-log callback and an info callback; see `ktls.prepare`.

    Raises:
        ValueError: pyOpenSSL: the context made a connection already and can't be changed.
    """
    _hook_keylog(context, keylog)
    with _lock:
        earlier = getattr(context, "_info_callback", None)
        if earlier is not None and earlier is getattr(context, _INFO_MARK, None):
            return

        def callback(connection: SSL.Connection, where: int, result: int) -> None:
            _note_progress(connection, where, result)
            if earlier is not None:
                earlier(connection._ssl, where, result)

        context.set_info_callback(callback)
        setattr(context, _INFO_MARK, getattr(context, "_info_callback", None))


def _is_hooked(context: SSL.Context) -> bool:
    ours = getattr(context, _KEYLOG_MARK, None)
    return ours is not None and getattr(context, "_keylog_callback", None) is ours


def _hook_keylog(context: SSL.Context, keylog: _KeyLog | None = None) -> None:
    with _lock:
        if keylog is None and _is_hooked(context):
            return
        earlier = getattr(context, "_keylog_callback", None)

        def callback(connection: SSL.Connection, line: bytes) -> None:
            if line.startswith(_WANTED):
                _watch(connection).lines.append(line)
            if keylog is not None:
                keylog(connection, line)
            elif earlier is not None:
                earlier(connection._ssl, line)

        context.set_keylog_callback(callback)
        setattr(context, _KEYLOG_MARK, getattr(context, "_keylog_callback", None))


def _watch(connection: SSL.Connection) -> _Watch:
    attributes = vars(connection)
    watch: _Watch = attributes.get(_WATCH) or attributes.setdefault(_WATCH, _Watch())
    return watch


def _note_progress(connection: SSL.Connection, where: int, result: int) -> None:
    """Counts tickets, and at the handshake's end the bytes on the wire.

    OpenSSL's state machine ends again after every ticket and KeyUpdate: only the first end counts.
    """
    if where & _INFO_LOOP and _WRITE_TICKET in connection.get_state_string():
        _watch(connection).tickets += 1
    elif where & _INFO_EXIT and result == 1 and hasattr(connection, "fileno"):
        watch = _watch(connection)
        if watch.moved is None:
            watch.server_side = bool(where & _INFO_ACCEPT)
            watch.moved = _bytes_moved(connection)


def _bytes_moved(connection: SSL.Connection) -> tuple[int, int] | None:
    """Bytes that a socket's owner has written and read, from the kernel's own counters.

    Only differences mean something. None where the kernel doesn't tell, or the socket is gone.
    """
    with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as sock:
        return tcp.positions(sock)
    return None


def extract_keys(
    connection: SSL.Connection, *, sent: bytes | None = None, received: bytes | None = None
) -> TrafficKeys:
    """Takes the traffic keys of a connection whose handshake the caller drove himself.

    A connection over memory BIOs: give the bytes that went over the wire, all of them from the
    ClientHello on. The keys are proved by opening those records, whatever came after the
    handshake.

    A connection on a socket: its records can't be seen, so the sequence must be known otherwise. It
    is, before any application data was read or written: the kernel's byte counters must stand where
    they stood when the handshake ended, and a TLS 1.3 server's tickets were counted. For
    this the context must have been through `prepare`. In TLS 1.2 with AES, OpenSSL's explicit nonce
    can't be seen either: it began at a random 64-bit value and one record was sent, so ours begins
    at another random value, and in N records the chance that one repeats is at most N/2^64.
    `ktls.wrap` has no such chance: it is the better way. Nor can it be seen here that the
    peer negotiated small records (``max_fragment``).

    Args:
        connection: With its handshake done. Don't use it for data afterwards: its sequence and the
            kernel's would part.
        sent: Memory BIOs only: every byte taken from ``bio_read``.
        received: Memory BIOs only: every byte given to ``bio_write``.

    Returns:
        The keys for `ktls.enable`.

    Raises:
        HandshakeNotDoneError: Finish the handshake first.
        UnsupportedConnectionError: DTLS, TLS 1.1 or older, or a suite that kernel TLS doesn't have.
        UnprovenSequenceError: The sequence can't be known; the text says why.
    """
    if connection.get_state_string() != _DONE:
        raise HandshakeNotDoneError(
            "finish do_handshake() first: the keys are not agreed yet", Reason.HANDSHAKE_NOT_DONE
        )
    if connection.get_protocol_version() >> 8 != _TLS_MAJOR:
        raise _unsupported(Reason.VERSION, "this connection is DTLS")
    if hasattr(connection, "fileno"):
        return _keys_at_handshake_end(connection)
    if not sent or not received:
        raise _unproven(
            "a connection over memory BIOs doesn't tell how many records it moved: pass sent= and "
            "received=, the bytes from bio_read and to bio_write, or use ktls.wrap"
        )
    if _lib.BIO_get_mem_data(connection._from_ssl, _ffi.NULL) > 0:
        raise _unproven("bytes wait in bio_read(): send them, and have them in sent= too")
    sent_records, received_records = records.split(sent), records.split(received)
    if len(b"".join(sent_records + received_records)) != len(sent) + len(received):
        raise _unproven("sent= or received= don't end with a whole record")
    server_side = sent_records[0][records.HEADER_SIZE] != HandshakeType.CLIENT_HELLO
    engine = Engine(connection, server_side=server_side)
    keys = prove(engine.secrets(), sent_records, received_records).keys
    engine.forget_secrets()
    return keys


def _keys_at_handshake_end(connection: SSL.Connection) -> TrafficKeys:
    watch = _watch(connection)
    engine = Engine(connection, server_side=watch.server_side)
    secrets = engine.secrets()
    if watch.moved is None or watch.moved != _bytes_moved(connection) or connection.pending():
        raise _unproven(
            "the sequence is not known: data went over this connection after its handshake, or its "
            "context wasn't given to ktls.prepare() before the handshake"
        )
    keys = initial_keys(secrets).keys
    engine.forget_secrets()
    if secrets.version is Version.TLS_1_3:
        return TrafficKeys(replace(keys.tx, rec_seq=watch.tickets), keys.rx)
    tx, rx = replace(keys.tx, rec_seq=1), replace(keys.rx, rec_seq=1)  # after Finished
    return TrafficKeys(replace(tx, iv=os.urandom(len(tx.iv))) if tx.salt else tx, rx)


class Engine:
    """A pyOpenSSL connection over memory BIOs, as `ktls.engine.Engine` asks for it.

    Attributes:
        connection: The connection itself.
        server_side: Whether this end is the server.
    """

    def __init__(
        self, connection: SSL.Connection, *, server_side: bool, host: str | None = None
    ) -> None:
        """Takes a connection, whoever made it, and the server's name for error texts."""
        self.connection = connection
        self._host = host
        self.server_side = server_side
        self._read_alert: Alert | int | None = None
        self._wrote_alert: Alert | None = None
        self._watches_alerts = False

    @classmethod
    def create(
        cls,
        context: SSL.Context,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        check_hostname: bool | None = None,
        session: SSL.Session | None = None,
    ) -> Engine:
        """Makes a connection ready for its handshake.

        Args:
            context: Hooked, as far as it still can be.
            server_side: Accept rather than connect.
            server_hostname: For the server_name extension, where an IP address doesn't go.
            check_hostname: Check it if the context verifies at all; None means so, too.
            session: A client's session to resume, of the same context.

        Raises:
            ValueError: No name to check, or none that can be right.
            UnsupportedConnectionError: The context is for DTLS.
        """
        check_hostname = check_hostname is not False
        nameless = server_hostname is None and check_hostname and not server_side
        if nameless and context.get_verify_mode() != SSL.VERIFY_NONE:
            raise ValueError("check_hostname needs server_hostname (or pass check_hostname=False)")
        name = None if server_hostname is None else _ascii(server_hostname)
        if not _is_hooked(context):
            with suppress(ValueError):  # used already: TLS 1.3 will be refused for want of secrets
                _hook_keylog(context)
        connection = SSL.Connection(context, None)
        if connection.get_protocol_version() >> 8 != _TLS_MAJOR:
            raise UnsupportedConnectionError(Reason.VERSION.value, Reason.VERSION)
        # Wherever records are made, renegotiation gets its warning alert and nothing more.
        _lib.SSL_set_options(connection._ssl, SSL.OP_NO_RENEGOTIATION)
        if server_side:
            connection.set_accept_state()
        else:
            connection.set_connect_state()
            if name is not None:
                _expect_host(connection, name, check=check_hostname)
            if session is not None:
                connection.set_session(session)
        return cls(connection, server_side=server_side, host=server_hostname)

    def want_secrets(self) -> None:
        """See `ktls.engine.Engine.want_secrets`. `create` did it: here it would be too late."""

    def handshake(self) -> bool:
        """See `ktls.engine.Engine.handshake`."""
        try:
            self.connection.do_handshake()
        except SSL.WantReadError:
            return False
        except SSL.Error as error:
            raise HandshakeError(f"the TLS handshake failed: {self._why(error)}") from error
        return True

    def _why(self, error: SSL.Error) -> str:
        """OpenSSL's reason, and what exactly it had against a certificate."""
        verdict = _lib.SSL_get_verify_result(self.connection._ssl)
        if not verdict:
            return _text(error)
        words: bytes = _ffi.string(_lib.X509_verify_cert_error_string(verdict))
        name = f" (expected {self._host})" if self._host else ""
        return f"{_text(error)}: {words.decode()}{name}"

    def incoming(self, stream: bytes) -> None:
        """See `ktls.engine.Engine.incoming`."""
        self.connection.bio_write(stream)

    def answers(self) -> bytes:
        """See `ktls.engine.Engine.answers`."""
        # OpenSSL answers a KeyUpdate when it next writes. No bytes make no record, but that answer.
        if not self.connection.get_shutdown() & SSL.SENT_SHUTDOWN:
            with suppress(SSL.Error):
                self.connection.send(b"")
        return self.outgoing()

    def outgoing(self) -> bytes:
        """See `ktls.engine.Engine.outgoing`."""
        size = _lib.BIO_get_mem_data(self.connection._from_ssl, _ffi.NULL)
        return self.connection.bio_read(size) if size > 0 else b""

    def secrets(self) -> Secrets:
        """See `ktls.engine.Engine.secrets`."""
        connection = self.connection
        try:
            version = Version(connection.get_protocol_version())
        except ValueError:
            name = connection.get_protocol_version_name()
            raise _unsupported(Reason.VERSION, f"this connection is {name}") from None
        suite = connection.get_cipher_name() or "none"
        known = find_suite(suite)
        if known is None:
            raise _unsupported(Reason.CIPHER_SUITE, f"this connection has {suite}")
        cipher, hash_name = known
        if version is Version.TLS_1_2:
            tls12 = (
                connection.master_key() or b"",
                connection.client_random() or b"",
                connection.server_random() or b"",
            )
            return Secrets(version, cipher, hash_name, self.server_side, tls12=tls12)
        tls13 = _watch(connection).secrets()
        if not tls13.keys() >= TLS13_LABELS:
            raise HandOverError(
                f"{Reason.NO_SECRETS.value}: call ktls.prepare(context) before the context's first "
                "connection, and after set_keylog_callback",
                Reason.NO_SECRETS,
            )
        return Secrets(version, cipher, hash_name, self.server_side, tls13=tls13)

    def forget_secrets(self) -> None:
        """See `ktls.engine.Engine.forget_secrets`."""
        _watch(self.connection).lines.clear()

    def encrypt(self, data: memoryview) -> int:
        """See `ktls.engine.Engine.encrypt`."""
        try:
            return self.connection.send(data)
        except SSL.Error as error:
            raise ClosedForWritingError(f"OpenSSL sends no more: {_text(error)}") from error

    def read_into(self, buffer: memoryview, *, peek: bool = False) -> int | None:
        """See `ktls.engine.Engine.read_into`."""
        if not self._watches_alerts:
            self._watch_alerts()
        try:
            flags = socket.MSG_PEEK if peek else None
            return self.connection.recv_into(buffer, flags=flags)
        except SSL.ZeroReturnError:
            return 0
        except SSL.WantReadError:
            return None
        except SSL.Error as error:
            alerts = (self._read_alert, self._wrote_alert)
            if self.connection.get_shutdown() & SSL.RECEIVED_SHUTDOWN and alerts == (None, None):
                return 0  # OpenSSL takes a user_canceled before the close_notify amiss
            raise self._record_error(error) from error

    def _watch_alerts(self) -> None:
        """Makes OpenSSL tell which alerts it reads and writes, from its first read on.

        Not before: a connection in the kernel, where its reads are rare, may never need it.
        """
        self._watches_alerts = True
        context = self.connection.get_context()
        earlier = getattr(context, "_info_callback", None)

        def callback(connection: SSL.Connection, where: int, result: int) -> None:
            level, number = divmod(result, 256)
            if where & _INFO_ALERT and level == AlertLevel.FATAL:
                if where & _INFO_READ:
                    self._read_alert = Alert(number) if number in _KNOWN_ALERTS else number
                elif self._wrote_alert is None:
                    self._wrote_alert = Alert(number)
            if earlier is not None:
                earlier(connection._ssl, where, result)

        self.connection.set_info_callback(callback)

    def _record_error(self, error: SSL.Error) -> AlertReceived | RecordError:
        """What ended the connection: the alert that was read, or the one that was written."""
        if self._read_alert is not None:
            return AlertReceived(self._read_alert)
        alert = self._wrote_alert or Alert.INTERNAL_ERROR
        kind = DecryptError if alert is Alert.BAD_RECORD_MAC else RecordError
        return kind(f"the peer broke the protocol: {_text(error)}", alert)

    def pending(self) -> int:
        """See `ktls.engine.Engine.pending`."""
        return self.connection.pending()

    def close_notify(self) -> None:
        """See `ktls.engine.Engine.close_notify`. A second SSL_shutdown would read, and fail."""
        if not self.connection.get_shutdown() & SSL.SENT_SHUTDOWN:
            with suppress(SSL.Error):
                self.connection.shutdown()

    def version(self) -> str:
        """See `ktls.engine.Engine.version`."""
        return self.connection.get_protocol_version_name()

    def cipher(self) -> tuple[str, str, int] | None:
        """See `ktls.engine.Engine.cipher`."""
        name = self.connection.get_cipher_name()
        version, bits = self.connection.get_cipher_version(), self.connection.get_cipher_bits()
        return None if name is None else (name, version or "", bits or 0)

    def peer_certificate(self) -> bytes | None:
        """See `ktls.engine.Engine.peer_certificate`."""
        certificate = self.connection.get_peer_certificate()
        if certificate is None:
            return None
        return crypto.dump_certificate(crypto.FILETYPE_ASN1, certificate)

    def verifies(self) -> bool:
        """See `ktls.engine.Facts.verifies`."""
        return self.connection.get_verify_mode() != SSL.VERIFY_NONE

    def alpn(self) -> str | None:
        """See `ktls.engine.Engine.alpn`."""
        return self.connection.get_alpn_proto_negotiated().decode() or None

    def session(self) -> SSL.Session | None:
        """See `ktls.engine.Engine.session`."""
        return self.connection.get_session()

    def keep_session(self) -> None:
        """See `ktls.engine.Engine.keep_session`."""
        self.connection.set_shutdown(self.connection.get_shutdown() | SSL.SENT_SHUTDOWN)

    def session_reused(self) -> bool:
        """See `ktls.engine.Engine.session_reused`. pyOpenSSL has no public name for it."""
        return bool(_lib.SSL_session_reused(self.connection._ssl))


def _unproven(text: str) -> UnprovenSequenceError:
    return UnprovenSequenceError(text, Reason.UNPROVEN_SEQUENCE)


def _unsupported(reason: Reason, found: str) -> UnsupportedConnectionError:
    return UnsupportedConnectionError(f"{found}; {reason.value}", reason)


def _ascii(host: str) -> bytes:
    """A host name as it stands in certificates (RFC 5890), or an IP address."""
    if _is_ip_address(host):
        return host.encode("ascii")
    name = host.encode("idna")
    if not _HOST_NAME.fullmatch(name):
        raise ValueError(f"not a host name: {host!r}")
    return name


def _expect_host(connection: SSL.Connection, host: bytes, *, check: bool) -> None:
    """Names the server, and has OpenSSL check its certificate for that name (RFC 9525).

    pyOpenSSL has no public name for the check; `ssl` does the same.
    """
    address = host.decode("ascii")
    is_address = _is_ip_address(address)
    if not is_address:
        connection.set_tlsext_host_name(host)
    if not check:
        return
    parameters = _lib.SSL_get0_param(connection._ssl)
    _lib.X509_VERIFY_PARAM_set_hostflags(
        parameters,
        _lib.X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS | _lib.X509_CHECK_FLAG_NEVER_CHECK_SUBJECT,
    )
    if is_address:
        packed = ipaddress.ip_address(address).packed
        done = _lib.X509_VERIFY_PARAM_set1_ip(parameters, packed, len(packed))
    else:
        done = _lib.X509_VERIFY_PARAM_set1_host(parameters, host, len(host))
    if done != 1:
        raise ValueError(f"OpenSSL can't check the name {address!r}")


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _text(error: SSL.Error) -> str:
    """What OpenSSL's error queue says, without its file and function names."""
    queue = error.args[0] if error.args else ()
    if isinstance(queue, list | tuple):
        return "; ".join(str(entry[-1]) for entry in queue) or "no reason given"
    return str(error)
