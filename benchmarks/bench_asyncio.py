"""asyncio servers that answer requests: files and small messages, by the number of connections."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from .contenders import Server
from .measure import MICROSECONDS, Bench, Contender, Load, Settings
from .peer import Link, received

_PEERS = (
    ("asyncio with ktls's loop", "aio-ktls"),
    ("asyncio", "aio-stdlib"),
    ("uvloop", "aio-uvloop"),
    ("aiofastnet", "aio-fastnet"),
    ("aiofastnet, OpenSSL's kTLS", "aio-fastnet-ktls"),
)
_TAG, _HEADER = 17, 5  # what a TLS 1.3 record adds to its content: RFC 8446 section 5.2


def _loads(size: int) -> Callable[[int, Settings], Load]:
    return lambda links, settings: Load(links, max(2, min(settings.most, 400) // links), size)


def _exchange(server: Server, link: Link, operation: str, load: Load) -> float:
    """Requests, each as soon as the answer before is there, which is counted and discarded."""
    request = server.request(operation, 1, load.size)
    buffer = bytearray(1 << 15)
    started = time.perf_counter()
    for _ in range(load.count):
        link.request(request)
        left = load.size
        while left:
            left -= _discard_record(link, buffer)
    return time.perf_counter() - started


def _discard_record(link: Link, buffer: bytearray) -> int:
    header = link.sock.recv(_HEADER, socket.MSG_WAITALL)
    size = int.from_bytes(header[3:], "big")
    at = 0
    while at < size:
        at += link.sock.recv_into(buffer, size - at, socket.MSG_TRUNC)
    return size - _TAG


def _check(server: Server, link: Link, operation: str, load: Load) -> bool:
    """That one answer is right, after which this end stops sending and the server closes."""
    link.request(server.request(operation, 1, load.size))
    return received(link, load.size) == (server.directory / str(load.size)).read_bytes()


def _bench(name: str, title: str, operation: str, size: int) -> Bench:
    return Bench(
        name=name,
        title=f"{title}; by connections at once",
        ours=_PEERS[0][0],
        contenders=[Contender(label, server, operation) for label, server in _PEERS],
        sizes=(1, 50, 200),
        unit=MICROSECONDS,
        load=_loads(size),
        work=_exchange,
        check=_check,
    )


FILES = _bench("aio-files", "asyncio: requests for files of 256 KiB", "file", 1 << 18)
DATA = _bench("aio-data", "asyncio: requests for 1 KiB that is in memory", "data", 1 << 10)
