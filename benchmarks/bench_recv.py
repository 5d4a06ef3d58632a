"""Receiving full records, by the size of the reader's buffer; and into a file."""

from __future__ import annotations

from ktls.types import MAX_PAYLOAD

from .contenders import Server
from .measure import Bench, Contender, Load, Settings
from .peer import Link, feed


def _load(size: int, settings: Settings) -> Load:
    return Load(1, max(1, settings.batch // size), size)


def _receive(server: Server, link: Link, operation: str, load: Load) -> float:
    request = server.request(operation, load.count, load.size)
    pattern = (server.directory / str(MAX_PAYLOAD)).read_bytes()
    seconds, _ = feed(link, request, load.count * load.size, pattern)
    return seconds


def _check(server: Server, link: Link, operation: str, load: Load) -> bool:
    count = min(load.count, max(1, (4 << 20) // load.size))
    request = server.request(operation.replace("recv", "check"), count, load.size)
    pattern = (server.directory / str(MAX_PAYLOAD)).read_bytes()
    _, right = feed(link, request, count * load.size, pattern)
    return right


BENCH = Bench(
    name="recv",
    title="Receiving full records, by the reader's buffer",
    ours="Socket.recv_into",
    contenders=(
        Contender("C reference, recvmsg", "reference", "recv"),
        Contender("Socket.recv_into", "ktls", "recv"),
        Contender("SSLSocket.recv_into", "stdlib", "recv"),
        Contender("SSLSocket.recv_into, OpenSSL's kTLS", "stdlib-ktls", "recv"),
        Contender("pyOpenSSL recv_into", "pyopenssl", "recv"),
        Contender("C reference, splice to a file", "reference", "recvfile"),
        Contender("Socket.recvfile", "ktls", "recvfile"),
        Contender("SSLSocket.recv_into, write to a file", "stdlib", "recvfile"),
        Contender("pyOpenSSL recv_into, write to a file", "pyopenssl", "recvfile"),
    ),
    sizes=(1 << 12, 1 << 14, 1 << 16, 1 << 18),
    load=_load,
    work=_receive,
    check=_check,
)
