"""A Python server under test: `python -m benchmarks.server CONTENDER LISTENING_FD DIRECTORY`.

Each connection gets a thread and makes one request, ``OPERATION COUNT SIZE`` in 64 bytes, after the
handshake and a line that says that it is over. The operations are those of reference.c, by what the
contender has for them.
"""

from __future__ import annotations

import functools
import mmap
import os
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from OpenSSL import SSL

import ktls
from ktls.types import MAX_PAYLOAD

from .parts import PARTS, ready
from .peer import READY, REQUEST_SIZE, RIGHT

OP_ENABLE_KTLS = 8  # SSL_OP_ENABLE_KTLS; Python has a name for it from 3.12 on


class Connection(Protocol):
    """One connection, with what `ktls.Socket` and `ssl.SSLSocket` both have."""

    def recv(self, size: int, /) -> bytes: ...
    def recv_into(self, buffer: bytearray, /) -> int: ...
    def sendall(self, data: memoryview | bytes, /) -> object: ...
    def close(self) -> None: ...


Accept = Callable[[socket.socket], Connection]


def accept_ktls(directory: Path, in_kernel: bool = True) -> Accept:
    """The library."""
    context = pyopenssl_context(directory)
    return lambda sock: ktls.wrap(sock, context, server_side=True, tx=in_kernel, rx=in_kernel)


def accept_pyopenssl(directory: Path) -> Accept:
    """PyOpenSSL on the socket itself."""
    context = pyopenssl_context(directory)

    def accept(sock: socket.socket) -> Connection:
        connection = SSL.Connection(context, sock)
        connection.set_accept_state()
        connection.do_handshake()
        return connection

    return accept


def accept_stdlib(directory: Path, options: int = 0) -> Accept:
    """The ``ssl`` module."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "chain.pem", directory / "key.pem")
    context.options |= options
    return lambda sock: context.wrap_socket(sock, server_side=True)


def accept_stdlib_ktls(directory: Path) -> Accept:
    """The same with OpenSSL's own kernel TLS, where that was built with it."""
    return accept_stdlib(directory, OP_ENABLE_KTLS)


CONTENDERS: dict[str, Callable[[Path], Accept]] = {
    "ktls": accept_ktls,
    "ktls-released": accept_ktls,  # a heap of its own: what others keep would lie in between
    "ktls-userspace": functools.partial(accept_ktls, in_kernel=False),
    "pyopenssl": accept_pyopenssl,
    "stdlib": accept_stdlib,
    "stdlib-ktls": accept_stdlib_ktls,
}


def pyopenssl_context(directory: Path) -> SSL.Context:
    """A server's context."""
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.use_certificate_chain_file(str(directory / "chain.pem"))
    context.use_privatekey_file(str(directory / "key.pem"))
    return context


def send_files(connection: Any, file: BinaryIO, count: int, size: int) -> None:  # noqa: ANN401
    """By the contender's ``sendfile``, with the size that an HTTP server has announced."""
    sendfile = connection.sendfile
    if isinstance(connection, ssl.SSLSocket):
        for _ in range(count):
            file.seek(0)  # it doesn't seek to offset 0
            sendfile(file, 0, size)
        return
    for _ in range(count):
        sendfile(file, 0, size)


def send_whole_files(connection: Any, file: BinaryIO, count: int, size: int) -> None:  # noqa: ANN401
    """The same, and the contender finds out how long the file is."""
    sendfile = connection.sendfile
    for _ in range(count):
        sendfile(file)


@functools.cache
def in_memory(name: str, size: int) -> memoryview:
    """A file's content; it is mapped before the first measurement, which is a verification."""
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    with open(name, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), size, flags=flags, prot=mmap.PROT_READ))


def send_buffers(connection: Connection, file: BinaryIO, count: int, size: int) -> None:
    """By ``sendall`` of data that are in memory."""
    data = in_memory(file.name, size)
    sendall = connection.sendall
    for _ in range(count):
        sendall(data)


def send_corked(connection: Any, file: BinaryIO, count: int, size: int) -> None:  # noqa: ANN401
    """The same within a cork; without one it is what a program does instead: it joins them."""
    data = in_memory(file.name, size)
    if hasattr(connection, "cork"):
        sendall = connection.sendall
        with connection.cork():
            for _ in range(count):
                sendall(data)
        return
    joined = bytearray()
    for _ in range(count):
        joined += data
        if len(joined) >= MAX_PAYLOAD:
            connection.sendall(memoryview(joined)[:MAX_PAYLOAD])
            joined = joined[MAX_PAYLOAD:]
    if joined:
        connection.sendall(bytes(joined))


SEND = {
    "sendfile": send_files,
    "unbuffered": send_files,
    "contract": send_whole_files,
    "send": send_buffers,
    "corked": send_corked,
}


def receive(connection: Connection, total: int, size: int) -> int:
    """By ``recv_into`` of one buffer."""
    buffer = bytearray(size)
    recv_into = connection.recv_into
    received = 0
    while received < total:
        received += recv_into(buffer)
    return received


def receive_to_file(connection: Any, total: int, size: int) -> BinaryIO:  # noqa: ANN401
    """By ``recvfile``, or by ``recv_into`` and ``write``."""
    file = open(os.memfd_create("received"), "w+b", buffering=0)  # noqa: SIM115 - the caller's
    if hasattr(connection, "recvfile"):
        connection.recvfile(file, total)
        return file
    buffer = bytearray(size)
    view = memoryview(buffer)
    received = 0
    while received < total:
        count = connection.recv_into(buffer)
        file.write(view[:count])
        received += count
    return file


def is_right(connection: Connection, total: int, size: int, pattern: bytes, to_file: bool) -> bool:
    """Whether what is received is the pattern, again and again."""
    if to_file:
        with receive_to_file(connection, total, size) as file:
            file.seek(0)
            content = file.read()
    else:
        content = b""
        while len(content) < total:
            buffer = bytearray(size)
            content += buffer[: connection.recv_into(buffer)]
    return content == (pattern * (total // len(pattern) + 1))[:total]


_idle: list[Connection] = []  # put away, without a thread


@functools.cache
def _part(operation: str, directory: Path) -> Callable[[], object]:
    return ready(operation, pyopenssl_context(directory))


def serve(connection: Connection, directory: Path) -> None:
    """Says that the handshake is over, and does what the peer asks for."""
    connection.sendall(READY)
    line = b""
    while len(line) < REQUEST_SIZE:  # and not a byte more: the kernel joins records
        part = connection.recv(REQUEST_SIZE - len(line))
        if not part:
            return
        line += part
    words = line.decode().split()
    operation, count, size = words[0], int(words[1]), int(words[2])
    if operation in SEND:
        buffering = 0 if operation == "unbuffered" else -1
        with (directory / str(size)).open("rb", buffering=buffering) as file:
            SEND[operation](connection, file, count, size)
    elif operation.startswith("check"):
        pattern = (directory / str(MAX_PAYLOAD)).read_bytes()
        to_file = operation == "checkfile"
        if is_right(connection, count * size, size, pattern, to_file):
            connection.sendall(RIGHT)
    elif operation == "recv":
        receive(connection, count * size, size)
    elif operation == "recvfile":
        receive_to_file(connection, count * size, size).close()
    elif operation in ("idle", "released"):
        _idle.append(connection)
        if operation == "released":
            assert isinstance(connection, ktls.Socket)
            with suppress(ktls.NotInKernelError):  # the table has where the records are
                connection.release()
        connection.sendall(RIGHT)
    elif operation in PARTS:
        repeated = _part(operation, directory)
        for _ in range(count):
            repeated()
        connection.sendall(RIGHT)


def handle(accept: Accept, sock: socket.socket, directory: Path) -> None:
    """One connection, from its handshake to its end."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not sock.recv(1, socket.MSG_PEEK):
        return  # it only looked whether somebody listens
    connection = accept(sock)
    try:
        serve(connection, directory)
    finally:
        if connection not in _idle:
            if isinstance(connection, SSL.Connection):
                connection.shutdown()
            connection.close()


def main(contender: str, listening: str, directory: str) -> None:
    """Accepts until the listening socket is gone."""
    listener = socket.socket(fileno=int(listening))
    accept = CONTENDERS[contender](Path(directory))
    while True:
        sock, _ = listener.accept()
        arguments = (accept, sock, Path(directory))
        threading.Thread(target=handle, args=arguments, daemon=True).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
