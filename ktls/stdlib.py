"""All that ktls knows of the ``ssl`` module: a context's key log in memory, and the engine.

Theory of operation. ``ssl`` tells a connection's secrets to nobody but the file that its context's
``keylog_filename`` names. Here that file is memory (memfd_create(2), by its name in /proc/self/fd):
OpenSSL appends lines, ktls takes them out, overwrites them and gives the pages back, so nothing
reaches a disk. (The last lines stay in the C library's buffer of that file until others come.)

All connections of a context write there, at any time and from any thread. Each line bears its
connection's client random, which is also in the ClientHello on the wire: by this a line finds its
connection. Should a server have two with the same, because somebody repeats a hello, the first gets
the lines of both, sees that they differ, and refuses them; the other gets none.

It is no pipe: a full one would stop all handshakes of the process inside OpenSSL's callback. The
price is that the lines of connections that ktls doesn't make stay until it takes them, at its next
handshake with that context, or at the context's end.

The file isn't exchanged by itself, not even after somebody else has set ``keylog_filename``, for
``ssl`` closes the old one without asking whether another thread is writing to it. The context's
connections then stay in userspace, by name, until the caller finds it time to call `prepare`.

A TLS 1.2 handshake that resumes a session logs the master secret like any other, under its own
client random (OpenSSL's ``tls_construct_finished``; seen with 3.0), so no session need be
remembered. Where no line comes, the connection stays in userspace, by name.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import re
import ssl
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass, field

from . import records
from .engine import TLS13_LABELS, Secrets, find_suite
from .errors import (
    AlertReceived,
    DecryptError,
    HandOverError,
    HandshakeError,
    RecordError,
    UnprovenSequenceError,
    UnsupportedConnectionError,
)
from .records import HEADER_SIZE, MessageReader
from .types import MAX_PAYLOAD, Alert, HandshakeType, Reason, RecordType, Version

__all__ = ["Engine", "prepare"]

_log = logging.getLogger("ktls")

_Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
_MASTER_SECRET = "CLIENT_RANDOM"  # noqa: S105 - its label in a key log
_LABELS = {label.encode(): label for label in (_MASTER_SECRET, *TLS13_LABELS)}
_RANDOM = slice(2, 34)  # of either hello, after its version (RFC 5246 section 7.4.1)
_VERSIONS = {str(version): version for version in Version}

# How OpenSSL's text names an alert that it received: "sslv3 alert bad record mac" (in later ones
# "ssl/tls alert ..." or "tls alert ..."), "tlsv1 alert unknown ca", "tlsv13 alert certificate
# required", "tlsv1 unrecognized name".
_RECEIVED = re.compile(r"(?:sslv3|ssl/tls|tls|tlsv1|tlsv13) (?:alert )?(.+)")
_ALERTS = {alert.name.lower().replace("_", " "): alert for alert in Alert}
_ALERTS["user cancelled"] = Alert.USER_CANCELED
# What OpenSSL finds in a record, and the alert that it then sends (SSLfatal in its source).
_SENT = {
    "BAD_RECORD_TYPE": Alert.UNEXPECTED_MESSAGE,
    "CCS_RECEIVED_EARLY": Alert.UNEXPECTED_MESSAGE,
    "DATA_LENGTH_TOO_LONG": Alert.RECORD_OVERFLOW,
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC": Alert.BAD_RECORD_MAC,
    "ENCRYPTED_LENGTH_TOO_LONG": Alert.RECORD_OVERFLOW,
    "INVALID_ALERT": Alert.UNEXPECTED_MESSAGE,
    "LENGTH_MISMATCH": Alert.DECODE_ERROR,
    "MIXED_HANDSHAKE_AND_NON_HANDSHAKE_DATA": Alert.UNEXPECTED_MESSAGE,
    "NOT_ON_RECORD_BOUNDARY": Alert.UNEXPECTED_MESSAGE,
    "PACKET_LENGTH_TOO_LONG": Alert.RECORD_OVERFLOW,
    "RECORD_TOO_SMALL": Alert.UNEXPECTED_MESSAGE,
    "TOO_MANY_WARN_ALERTS": Alert.UNEXPECTED_MESSAGE,
    "UNEXPECTED_MESSAGE": Alert.UNEXPECTED_MESSAGE,
    "UNEXPECTED_RECORD": Alert.UNEXPECTED_MESSAGE,
    "WRONG_VERSION_NUMBER": Alert.PROTOCOL_VERSION,
}


@dataclass
class _Harvest:
    """What the key log has under the client random of one end of a connection.

    Attributes:
        secrets: By their labels.
        disputed: Whether a label came with two secrets. If not, all are this connection's: OpenSSL
            logs its own before its handshake is done.
    """

    secrets: dict[str, bytes] = field(default_factory=dict, repr=False)
    disputed: bool = False

    def take(self, label: bytes, secret: bytes) -> None:
        """Takes a line, unless it is of no use."""
        name = _LABELS.get(label)
        if name is not None:
            with suppress(ValueError):
                value = bytes.fromhex(secret.decode("ascii"))
                if self.secrets.setdefault(name, value) != value:
                    self.disputed = True


class _KeyLog:
    """A context's key log: memory that OpenSSL appends to and `collect` empties.

    As the value of ``keylog_filename`` it is a path, and stays there to be recognised.

    Attributes:
        original: The context's own ``keylog_filename``, which goes on getting every line.
    """

    def __init__(self, original: _Path | None) -> None:
        """Makes an empty one.

        Raises:
            OSError: No memory or no descriptor is left, there is no /proc, or ``original`` can't be
                opened any more.
        """
        self.original = original
        self._taken = 0
        self._copy = -1
        self._memory = os.memfd_create("ktls-keylog", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Cut short, it could not be mapped safely.
            fcntl.fcntl(self._memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
            os.close(os.open(self, _APPEND))  # what `ssl` will do, once it has closed the original
            if original is not None:
                self._copy = os.open(original, _APPEND)
        except OSError:
            self.close()
            raise

    def __fspath__(self) -> str:
        """Where OpenSSL opens it."""
        return f"/proc/self/fd/{self._memory}"

    def __repr__(self) -> str:
        """What it is, and whose file it feeds."""
        return f"<key log in memory for ktls, original={self.original!r}>"

    def serves(self, context: ssl.SSLContext) -> bool:
        """Whether a context's lines come here."""
        path: object = context.keylog_filename
        return path is self

    def collect(self) -> None:
        """Gives each line to the connection that wants it, and all to the context's own key log."""
        text = self._take()
        for line in text.splitlines():
            label, client_random, secret = (*line.split(b" "), b"", b"")[:3]
            for server_side in (False, True):  # both ends may be in this process
                harvest = _wanted.get((client_random, server_side))
                if harvest is not None:
                    harvest.take(label, secret)
        if self._copy >= 0 and text:
            _append(self._copy, text)

    def _take(self) -> bytes:
        """Takes out the whole lines that have come. Meanwhile others may be appended.

        What was taken is overwritten, and its pages are given back; the file only ever grows, by
        holes.
        """
        end = os.fstat(self._memory).st_size if self._memory >= 0 else 0
        if end <= self._taken:
            return b""
        text = os.pread(self._memory, end - self._taken, self._taken)
        text = text[: text.rfind(b"\n") + 1]
        written = 0
        while written < len(text):
            rest = bytes(len(text) - written)
            written += os.pwrite(self._memory, rest, self._taken + written)
        base = self._taken - self._taken % mmap.ALLOCATIONGRANULARITY
        self._taken += len(text)
        pages = self._taken - base - self._taken % mmap.PAGESIZE
        if pages:
            with mmap.mmap(self._memory, pages, offset=base) as view:
                view.madvise(mmap.MADV_REMOVE, 0, pages)
        return text

    def close(self) -> None:
        """Closes it; what is in it stays there until OpenSSL, too, has closed it."""
        for descriptor in (self._memory, self._copy):
            if descriptor >= 0:
                os.close(descriptor)
        self._memory = self._copy = -1


def _append(descriptor: int, text: bytes) -> None:
    """Appends lines to a context's own key log, without the one that only introduces it."""
    lines = b"".join(line for line in text.splitlines(True) if not line.startswith(b"#"))
    try:
        while lines:
            lines = lines[os.write(descriptor, lines) :]
    except OSError as error:
        _log.warning("the context's own key log misses lines: %s", error)


# Guards all key logs. It can be taken again, by a context's end while it is held.
_lock = threading.RLock()
_logs: weakref.WeakKeyDictionary[ssl.SSLContext, _KeyLog] = weakref.WeakKeyDictionary()
_wanted: weakref.WeakValueDictionary[tuple[bytes, bool], _Harvest] = weakref.WeakValueDictionary()


def prepare(context: ssl.SSLContext) -> None:
    """Puts a context's key log into memory; see `ktls.prepare`.

    Raises:
        OSError: As for `_KeyLog`. The context is as it was.
    """
    with _lock:
        log = _logs.get(context)
        if log is None or not log.serves(context):
            _install(context, context.keylog_filename)


def _hook(context: ssl.SSLContext) -> None:
    """The same, but what was set after ktls stays."""
    with _lock:
        if context not in _logs:
            _install(context, context.keylog_filename)


def _install(context: ssl.SSLContext, original: _Path | None) -> None:
    if isinstance(original, _KeyLog):  # copied from another context
        original = original.original
    log = _KeyLog(original)
    context.keylog_filename = log  # type: ignore[assignment]  # any path will do
    earlier, _logs[context] = _logs.get(context), log
    if earlier is not None:
        _finish(earlier)
    weakref.finalize(context, _finish, log)


def _finish(log: _KeyLog) -> None:
    """Takes the last lines of a key log, and closes it."""
    with _lock:
        log.collect()
        log.close()


def _collect(context: ssl.SSLContext) -> None:
    with _lock:
        log = _logs.get(context)
        if log is not None:
            log.collect()


def _renew() -> None:
    """After a fork the child gets memory of its own, or each would take the other's lines."""
    global _lock  # noqa: PLW0603 - another thread may have held it
    _lock = threading.RLock()
    for context, log in list(_logs.items()):
        log.close()
        if log.serves(context):
            del _logs[context]
            with suppress(OSError):
                _install(context, log.original)


os.register_at_fork(after_in_child=_renew)


class _Hello:
    """Finds the random of one side's hello, among the records that it sends in the clear."""

    def __init__(self, kind: HandshakeType) -> None:
        """Takes the message's type."""
        self.random = b""
        self._kind = kind
        self._reader = MessageReader()

    def look_at(self, record: bytes) -> None:
        """Looks at that side's next record."""
        if self.random or record[0] != RecordType.HANDSHAKE:
            return
        with suppress(ValueError):  # no hello; OpenSSL will say so
            for kind, body in self._reader.feed(record[HEADER_SIZE:]):
                if kind == self._kind:
                    self.random = body[_RANDOM]
                    return


class Engine:
    """An ``ssl.SSLObject``, as `ktls.engine.Engine` asks for it.

    Attributes:
        connection: The connection itself.
        server_side: Whether this end is the server.
    """

    def __init__(
        self,
        connection: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
    ) -> None:
        """Takes a connection and its memory. Use `create`."""
        self.connection = connection
        self.server_side = connection.server_side
        self._incoming = incoming
        self._outgoing = outgoing
        hellos = _Hello(HandshakeType.CLIENT_HELLO), _Hello(HandshakeType.SERVER_HELLO)
        self._client_hello, self._server_hello = hellos
        self._own_hello, self._other_hello = hellos[:: -1 if self.server_side else 1]
        self._harvest: _Harvest | None = None
        self._no_harvest = ""
        self._done = False
        self._plain = bytearray()
        self._lock = threading.Lock()  # a closing thread's keep_session comes without the caller's
        self._shut_down = False

    @classmethod
    def create(
        cls,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        check_hostname: bool | None = None,
        session: ssl.SSLSession | None = None,
    ) -> Engine:
        """Makes a connection ready for its handshake.

        Args:
            context: For this side.
            server_side: Accept rather than connect.
            server_hostname: A client's only.
            check_hostname: None, or what the context says.
            session: A client's only: to resume, of the same context.

        Raises:
            ValueError: Arguments that don't go together, or with the context.
        """
        if check_hostname is not None and check_hostname != context.check_hostname:
            raise ValueError(
                "an ssl context says itself whether host names are checked: set its check_hostname"
            )
        if server_side and not (server_hostname is None and session is None):
            raise ValueError("server_hostname and session are for a client")
        if context.check_hostname and not server_side and not server_hostname:
            # `wrap_bio` doesn't ask: it would check nothing.
            raise ValueError("the context's check_hostname needs server_hostname")
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        try:
            connection = context.wrap_bio(
                incoming,
                outgoing,
                server_side=server_side,
                server_hostname=server_hostname,
                session=session,
            )
        except ssl.SSLError as error:
            raise ValueError(_text(error)) from error  # such as a context for the other side
        return cls(connection, incoming, outgoing)

    def want_secrets(self) -> None:
        """See `ktls.engine.Engine.want_secrets`."""
        try:
            _hook(self.connection.context)
        except OSError as error:
            self._no_harvest = f"no memory for the context's key log: {error}"
        else:
            self._harvest = _Harvest()

    def handshake(self) -> bool:
        """See `ktls.engine.Engine.handshake`."""
        try:
            self.connection.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except OSError as error:
            raise HandshakeError(f"the TLS handshake failed: {_text(error)}") from error
        finally:
            _collect(self.connection.context)  # a server's sni_callback may have exchanged it
        self._done = True
        return True

    def incoming(self, stream: bytes) -> None:
        """See `ktls.engine.Engine.incoming`."""
        if not self._done:
            for record in records.split(stream):
                self._look_at(self._other_hello, record)
        self._incoming.write(stream)

    def outgoing(self) -> bytes:
        """See `ktls.engine.Engine.outgoing`."""
        stream = self._outgoing.read()
        if not self._done:
            for record in records.split(stream):
                self._look_at(self._own_hello, record)
        return stream

    def _look_at(self, hello: _Hello, record: bytes) -> None:
        """Asks for the secrets before there can be any: as soon as the client's hello is known."""
        if hello.random:
            return
        hello.look_at(record)
        client_random = self._client_hello.random.hex().encode()
        if self._harvest is not None and client_random:
            with _lock:
                _wanted.setdefault((client_random, self.server_side), self._harvest)

    def answers(self) -> bytes:
        """See `ktls.engine.Engine.answers`."""
        with self._lock:
            # OpenSSL answers a KeyUpdate when it next writes. No bytes make no record.
            if not self._shut_down:
                with suppress(ssl.SSLError):
                    self.connection.write(b"")
            return self._outgoing.read()

    def secrets(self) -> Secrets:
        """See `ktls.engine.Engine.secrets`."""
        name, (suite, *_) = self.connection.version(), self.connection.cipher() or ("none",)
        version = _VERSIONS.get(name or "")
        if version is None:
            text = f"this connection is {name}; {Reason.VERSION.value}"
            raise UnsupportedConnectionError(text, Reason.VERSION)
        known = find_suite(suite)
        if known is None:
            text = f"this connection has {suite}; {Reason.CIPHER_SUITE.value}"
            raise UnsupportedConnectionError(text, Reason.CIPHER_SUITE)
        harvest = self._harvest or _Harvest()
        if harvest.disputed:
            raise UnprovenSequenceError(
                "another connection came with the same client random: nothing tells whose secrets "
                "are whose",
                Reason.UNPROVEN_SEQUENCE,
            )
        log = _logs.get(self.connection.context)
        # Else what came isn't this end's: the other may be in this process, too.
        found = harvest.secrets if log is not None and log.serves(self.connection.context) else {}
        if version is Version.TLS_1_2 and _MASTER_SECRET in found:
            randoms = self._client_hello.random, self._server_hello.random
            return Secrets(version, *known, self.server_side, (found[_MASTER_SECRET], *randoms))
        if version is Version.TLS_1_3 and found.keys() >= TLS13_LABELS:
            return Secrets(version, *known, self.server_side, tls13=dict(found))
        raise HandOverError(f"{Reason.NO_SECRETS.value}: {self._why_none()}", Reason.NO_SECRETS)

    def _why_none(self) -> str:
        context = self.connection.context
        if self._no_harvest:
            return self._no_harvest
        if context not in _logs:
            return "its sni_callback chose a context that ktls.prepare(context) never saw"
        if not _logs[context].serves(context):
            return (
                "the context's keylog_filename was set after ktls came: call ktls.prepare(context) "
                "next, and both have their lines"
            )
        return "OpenSSL logged none"

    def forget_secrets(self) -> None:
        """See `ktls.engine.Engine.forget_secrets`."""
        if self._harvest is not None:
            self._harvest.secrets.clear()
            self._harvest = None

    def encrypt(self, data: memoryview) -> int:
        """See `ktls.engine.Engine.encrypt`."""
        try:
            return self.connection.write(data)
        except ssl.SSLWantReadError as error:
            raise RecordError(
                "the peer began a renegotiation (OP_NO_RENEGOTIATION forbids it)",
                Alert.NO_RENEGOTIATION,
            ) from error
        except ssl.SSLError as error:
            raise self._record_error(error) from error

    def read_into(self, buffer: memoryview, *, peek: bool = False) -> int | None:
        """See `ktls.engine.Engine.read_into`.

        A record is taken from OpenSSL as a whole, and what the caller doesn't take of it is kept:
        ``ssl`` can't peek, and OpenSSL can't be closed in the middle of a record.
        """
        with self._lock:
            if not self._plain:
                if not peek and len(buffer) >= MAX_PAYLOAD:
                    return self._read(buffer[:MAX_PAYLOAD])
                record = bytearray(MAX_PAYLOAD)
                count = self._read(memoryview(record))
                if not count:
                    return count
                self._plain = record[:count]
            count = min(len(buffer), len(self._plain))
            buffer[:count] = self._plain[:count]
            if not peek:
                del self._plain[:count]
            return count

    def _read(self, buffer: memoryview) -> int | None:
        try:
            return self.connection.read(len(buffer), buffer)  # type: ignore[return-value, unused-ignore]
        except ssl.SSLZeroReturnError:
            return 0
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLError as error:
            raise self._record_error(error) from error

    def _record_error(self, error: ssl.SSLError) -> AlertReceived | RecordError:
        """What ended the connection: the alert that was read, or what was wrong with a record."""
        text = _text(error)
        received = _RECEIVED.fullmatch(text)
        if received is not None and received[1] in _ALERTS:
            return AlertReceived(_ALERTS[received[1]])
        alert = _SENT.get(error.reason or "", Alert.INTERNAL_ERROR)
        kind = DecryptError if alert is Alert.BAD_RECORD_MAC else RecordError
        return kind(f"the peer broke the protocol: {text}", alert)

    def pending(self) -> int:
        """See `ktls.engine.Engine.pending`."""
        return len(self._plain)

    def close_notify(self) -> None:
        """See `ktls.engine.Engine.close_notify`. ``ssl`` then waits for the peer's, by an error."""
        if not self._shut_down:
            self._shut_down = True
            with suppress(ssl.SSLError):
                self.connection.unwrap()

    def version(self) -> str:
        """See `ktls.engine.Engine.version`."""
        return self.connection.version() or "unknown"

    def cipher(self) -> tuple[str, str, int] | None:
        """See `ktls.engine.Engine.cipher`."""
        return self.connection.cipher()

    def peer_certificate(self) -> bytes | None:
        """See `ktls.engine.Engine.peer_certificate`."""
        with suppress(ValueError):  # no handshake yet
            return self.connection.getpeercert(binary_form=True)
        return None

    def verifies(self) -> bool:
        """See `ktls.engine.Facts.verifies`."""
        return self.connection.context.verify_mode is not ssl.CERT_NONE

    def alpn(self) -> str | None:
        """See `ktls.engine.Engine.alpn`."""
        return self.connection.selected_alpn_protocol()

    def session(self) -> ssl.SSLSession | None:
        """See `ktls.engine.Engine.session`."""
        return self.connection.session

    def keep_session(self) -> None:
        """See `ktls.engine.Engine.keep_session`.

        OpenSSL forgets the session of a connection that it never closed. The close_notify by which
        it remembers never leaves the process.
        """
        with self._lock:
            if not self._shut_down:
                self.close_notify()
                self._outgoing.read()

    def session_reused(self) -> bool:
        """See `ktls.engine.Engine.session_reused`."""
        return bool(self.connection.session_reused)


def _text(error: OSError) -> str:
    """What OpenSSL says, without its codes and file names."""
    return re.sub(r"^\[[^]]*\] | \(_ssl\.c:\d+\)$", "", error.strerror or str(error))
