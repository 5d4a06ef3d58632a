"""asyncio servers that answer requests: files and small messages, by the number of connections."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from ktls.types import RecordType

from .contenders import Server
from .measure import MEGABYTES, REQUESTS, Bench, Contender, Load, Settings, Unit
from .peer import SECONDS, Link, received

_T = TypeVar("_T", bytes, int)

_PEERS = (
    ("asyncio with ktls's loop", "aio-ktls"),
    ("asyncio", "aio-stdlib"),
    ("uvloop", "aio-uvloop"),
    ("aiofastnet", "aio-fastnet"),
    ("aiofastnet, OpenSSL's kTLS", "aio-fastnet-ktls"),
)
_TAG, _HEADER = 17, 5  # what a TLS 1.3 record adds to its content: RFC 8446 section 5.2


def _loads(size: int) -> Callable[[int, Settings], Load]:
    def load(links: int, settings: Settings) -> Load:
        return Load(links, max(2, min(settings.most, settings.batch // size) // links), size)

    return load


class _Client:
    """One connection's requests: each as soon as the answer before is there, which is discarded.

    Attributes:
        seconds: Of each request that is answered.
    """

    def __init__(self, link: Link, request: bytes, load: Load) -> None:
        """Seals all requests beforehand: while it is measured the client has little to do."""
        sealer = link.sealer()
        assert sealer is not None
        data = RecordType.APPLICATION_DATA
        self._requests = iter([sealer.seal(data, request) for _ in range(load.count)])
        self._size = load.size
        self._header = bytearray()
        self._buffer = bytearray(1 << 15)
        self.sock = link.sock
        self.sock.setblocking(False)
        self.seconds: list[float] = []

    def request(self) -> bool:
        """Makes the next one; False if there is none."""
        request = next(self._requests, None)
        if request is None:
            return False
        self._left, self._of_record = self._size, 0
        self._started = time.perf_counter()
        sent = self.sock.send(request)
        assert sent == len(request)  # nothing else is on its way
        return True

    def discard(self) -> bool:
        """Discards what has come; whether that was the rest of the answer."""
        try:
            while self._left or self._of_record:
                if not self._of_record:
                    self._header += self._some(self.sock.recv(_HEADER - len(self._header)))
                    if len(self._header) == _HEADER:
                        self._of_record = int.from_bytes(self._header[3:], "big")
                        self._left -= self._of_record - _TAG
                        self._header.clear()
                while self._of_record:
                    self._of_record -= self._some(
                        self.sock.recv_into(self._buffer, self._of_record, socket.MSG_TRUNC)
                    )
        except BlockingIOError:
            return False
        self.seconds.append(time.perf_counter() - self._started)
        return True

    @staticmethod
    def _some(received: _T) -> _T:
        if not received:
            raise ConnectionError("the server closed the connection")
        return received


def _exchange(
    server: Server, links: Sequence[Link], operation: str, load: Load
) -> tuple[float, Sequence[float]]:
    """A closed loop: on each connection one request is on its way, until all have been made."""
    request = server.request(operation, 1, load.size)
    clients = [_Client(link, request, load) for link in links]
    with select.epoll() as poll:
        for client in clients:
            poll.register(client.sock, select.EPOLLIN)
        by_descriptor = {client.sock.fileno(): client for client in clients}
        started = time.perf_counter()
        busy = sum(client.request() for client in clients)
        while busy:
            for descriptor, _ in poll.poll(SECONDS):
                client = by_descriptor[descriptor]
                if client.discard() and not client.request():
                    busy -= 1
        seconds = time.perf_counter() - started
    return seconds, [each for client in clients for each in client.seconds]


def _check(server: Server, link: Link, operation: str, load: Load) -> bool:
    """That one answer is right, after which this end stops sending and the server closes."""
    link.request(server.request(operation, 1, load.size))
    return received(link, load.size) == (server.directory / str(load.size)).read_bytes()


def _bench(name: str, title: str, operation: str, size: int, unit: Unit) -> Bench:
    return Bench(
        name=name,
        title=f"{title}; by connections at once",
        ours=_PEERS[0][0],
        contenders=[Contender(label, server, operation) for label, server in _PEERS],
        sizes=(1, 50, 200),
        unit=unit,
        load=_loads(size),
        work_on_all=_exchange,
        check=_check,
    )


FILES = _bench("aio-files", "asyncio: requests for files of 256 KiB", "file", 1 << 18, MEGABYTES)
DATA = _bench("aio-data", "asyncio: requests for 1 KiB of memory", "data", 1 << 10, REQUESTS)
