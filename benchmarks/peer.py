"""The other end of every measurement: a client that costs the server as little as it can.

It discards without decrypting (MSG_TRUNC), or sends records that were sealed beforehand: so what is
measured is the server. Another client takes everything apart and compares it, to say of each row
whether the bytes were right.
"""

from __future__ import annotations

import functools
import mmap
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from OpenSSL import SSL

import ktls
from ktls import Cipher, CryptoInfo, Version
from ktls.records import RecordCipher, RecordReader, split
from ktls.types import RecordType

READY, RIGHT = b"ready\n", b"right\n"
REQUEST_SIZE = 64  # in bytes, always: what follows it in the stream isn't to be read with it
SECONDS = 600.0  # for anything: beyond this it hangs
_CHUNK = 1 << 20

# As reference.c has them.
FIXED_KEYS = CryptoInfo(
    Version.TLS_1_3, Cipher.AES_GCM_256, key=bytes(32), iv=bytes(8), salt=bytes(4), rec_seq=0
)


class Link(Protocol):
    """A connection to a server under test.

    Attributes:
        sock: The TCP socket.
    """

    sock: socket.socket

    def request(self, text: bytes) -> None:
        """Sends what the server waits for."""

    def opener(self) -> RecordCipher | None:
        """Opens the records that come next; None if they are none, but plain bytes."""

    def sealer(self) -> RecordCipher | None:
        """Seals records that the server takes next."""


class PlainLink:
    """To a server that makes no handshake: one direction has fixed keys from the request on."""

    def __init__(self, port: int, *, opens: bool, seals: bool) -> None:
        """Connects; tells which."""
        self.sock = _connect(port)
        self._opens, self._seals = opens, seals

    def request(self, text: bytes) -> None:
        """See `Link.request`."""
        self.sock.sendall(text)

    def opener(self) -> RecordCipher | None:
        """See `Link.opener`."""
        return RecordCipher(FIXED_KEYS) if self._opens else None

    def sealer(self) -> RecordCipher | None:
        """See `Link.sealer`."""
        return RecordCipher(FIXED_KEYS) if self._seals else None


class TLSLink:
    """To a TLS server. The handshake runs through memory, so that its keys can be known."""

    def __init__(
        self, port: int, greet: bytes = b"", greeted: Callable[[bytes], bool] = READY.__eq__
    ) -> None:
        """Connects, makes the handshake, and waits until the server is through with its own part.

        Args:
            port: Where it listens.
            greet: What to send first.
            greeted: Whether all that was received so far is the server's whole answer.
        """
        self.sock = _connect(port)
        self._sent = self._received = b""
        self._reader = RecordReader()
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        ktls.prepare(context)
        self._tls = SSL.Connection(context, None)
        self._tls.set_connect_state()
        self._until(self._tls.do_handshake)
        if greet:
            self.request(greet)
        answer = b""
        while not greeted(answer):
            answer += self._until(lambda: self._tls.recv(_CHUNK))

    def request(self, text: bytes) -> None:
        """See `Link.request`."""
        self._tls.sendall(text)
        self._flush()

    def opener(self) -> RecordCipher | None:
        """See `Link.opener`."""
        return RecordCipher(self._keys.rx)

    def sealer(self) -> RecordCipher | None:
        """See `Link.sealer`."""
        return RecordCipher(self._keys.tx)

    @functools.cached_property
    def _keys(self) -> ktls.TrafficKeys:
        return ktls.extract_keys(self._tls, sent=self._sent, received=self._received)

    def _until(self, call: Callable[[], bytes | None]) -> bytes:
        """Repeats a call to OpenSSL, a record at a time: not a byte is read too early."""
        while True:
            try:
                result = call()
            except SSL.WantReadError:
                self._flush()
                self._feed()
            else:
                self._flush()
                return result or b""

    def _flush(self) -> None:
        try:
            while True:
                data = self._tls.bio_read(_CHUNK)
                self._sent += data
                self.sock.sendall(data)
        except SSL.WantReadError:
            pass

    def _feed(self) -> None:
        record = None
        while record is None:
            data = self.sock.recv(self._reader.wanted)
            if not data:
                raise ConnectionError("the server closed the connection")
            record = self._reader.feed(data)
        self._received += record
        self._tls.bio_write(record)


def _connect(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def discard(link: Link, request: bytes) -> float:
    """Makes a request, and discards all that comes up to the end of the connection.

    Returns:
        How long that took, in seconds.
    """
    buffer = bytearray(_CHUNK)
    # It wakes up for much at once, and leaves the CPUs to the server.
    link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _CHUNK // 2)
    started = time.perf_counter()
    link.request(request)
    while link.sock.recv_into(buffer, _CHUNK, socket.MSG_TRUNC):
        pass
    return time.perf_counter() - started


def verify(link: Link, request: bytes, file: Path, count: int) -> bool:
    """Makes a request, decrypts what comes, and compares it.

    Args:
        link: A fresh one.
        request: What to ask for.
        file: What is to come; a header of HTTP before it is skipped.
        count: How often it is to come.
    """
    link.request(request)
    with file.open("rb") as opened:
        expected = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    total, at = count * len(expected), 0
    for content in _bodies(contents(link)):
        while content:
            start = at % len(expected)
            part = content[: len(expected) - start]
            if part != expected[start : start + len(part)]:
                return False
            at += len(part)
            content = content[len(part) :]  # noqa: PLW2901 - the rest of it
    return at == total


def _bodies(contents: Iterator[bytes]) -> Iterator[bytes]:
    """Leaves out a header of HTTP that comes first."""
    head = b""
    for content in contents:
        head += content
        if not b"HTTP/1.1 200".startswith(head[:12]):
            yield head
            break
        if b"\r\n\r\n" in head:
            yield head.partition(b"\r\n\r\n")[2]
            break
    yield from contents


def contents(link: Link) -> Iterator[bytes]:
    """The payload of everything that comes, up to the end of the connection."""
    opener = link.opener()
    rest = b""
    while data := link.sock.recv(_CHUNK):
        if opener is None:
            yield data
            continue
        stream, at = rest + data, 0
        for record in split(stream):
            at += len(record)
            content_type, content = opener.open(record)
            if content_type == RecordType.APPLICATION_DATA:
                yield content
        rest = stream[at:]


def received(link: Link, size: int) -> bytes:
    """So many bytes of payload; the connection goes on."""
    content = b""
    for part in contents(link):
        content += part
        if len(content) >= size:
            break
    return content


def feed(link: Link, request: bytes, size: int, pattern: bytes) -> tuple[float, bool]:
    """Makes a request to receive, sends records that were sealed before, and waits for the end.

    Args:
        link: A fresh one.
        request: What to ask for.
        size: How many bytes to send, by full records.
        pattern: Their content, again and again.

    Returns:
        How long that took, in seconds, and whether the server found it right, if asked.
    """
    link.request(request)
    file = _seal(link, size, pattern)
    try:
        started = time.perf_counter()
        with open(file, "rb", closefd=False) as sealed:
            link.sock.sendfile(sealed)
        answer = b"".join(contents(link))
        return time.perf_counter() - started, answer == RIGHT
    finally:
        os.close(file)


def _seal(link: Link, size: int, pattern: bytes) -> int:
    """A file in memory with records that carry so many bytes."""
    sealer = link.sealer()
    file = os.memfd_create("sealed")
    with open(file, "wb", closefd=False) as writer:
        for at in range(0, size, len(pattern)):
            part = pattern[: size - at]
            writer.write(part if sealer is None else sealer.seal(RecordType.APPLICATION_DATA, part))
    return file
