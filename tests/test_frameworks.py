"""aiohttp, uvicorn and hypercorn, unmodified, on `ktls.aio.EventLoop`: the examples."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import runpy
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import BinaryIO

import h11
import pytest

import ktls

from .conftest import Identity
from .servers import CLIENTS, Running, curl, running

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CROWD, CROWD_SIZE = 20, 256 << 20
SIZE = 3_000_000  # more than the buffers of a connection take

every_framework = pytest.mark.parametrize("framework", ["aiohttp", "uvicorn", "hypercorn"])


def example(framework: str, identity: Identity) -> list[str | Path]:
    """The words after ``python``."""
    return [EXAMPLES / f"{framework}_server.py", "0", identity.chain, identity.key]


@pytest.fixture
def document(tmp_path: Path) -> Path:
    """A file to be served, from a directory of its own."""
    path = tmp_path / "served" / "document"
    path.parent.mkdir()
    path.write_bytes(os.urandom(SIZE))
    return path


def fetch_by_all(server: Running, document: Path, identity: Identity) -> None:
    """Every client gets the right bytes, one after the other."""
    expected = hashlib.sha256(document.read_bytes()).hexdigest()
    for name, client in CLIENTS.items():
        assert client(f"{server.url}/{document.name}", identity) == expected, name


@every_framework
def test_files(framework: str, document: Path, identity: Identity) -> None:
    with running(example(framework, identity), document.parent) as server:
        fetch_by_all(server, document, identity)
    assert "Traceback" not in "".join(server.lines)


@every_framework
@pytest.mark.kernel
def test_files_by_the_kernel(framework: str, document: Path, identity: Identity) -> None:
    before = ktls.stats()["TlsTxSw"]
    with running(example(framework, identity), document.parent) as server:
        fetch_by_all(server, document, identity)
    assert ktls.stats()["TlsTxSw"] == before + len(CLIENTS)
    assert "Traceback" not in "".join(server.lines)


@pytest.mark.kernel
@pytest.mark.parametrize("framework", ["aiohttp", "uvicorn"])
def test_files_are_sent_by_sendfile(
    framework: str, document: Path, identity: Identity, tmp_path: Path
) -> None:
    """The whole file goes by sendfile(2) to the connection, and nothing reads it."""
    log = tmp_path / "strace.log"
    with running(example(framework, identity), document.parent, trace=log) as server:
        fetch_by_all(server, document, identity)
    assert sent_by_sendfile(log, document) == SIZE * len(CLIENTS)


@pytest.mark.parametrize("change", [-1000, 0, 1000])
def test_a_file_that_changes_under_uvicorn(
    document: Path, monkeypatch: pytest.MonkeyPatch, change: int
) -> None:
    """What was announced is sent and no more; if there is less, the connection ends."""
    promised, sent, aborted = [], bytearray(), []

    class Connection:
        def __init__(self) -> None:
            self.conn = self.transport = self

        def send_with_data_passthrough(self, data: h11.Data) -> None:
            promised.append(len(data.data))
            os.truncate(document, SIZE + change)

        def abort(self) -> None:
            aborted.append(self)

        async def send(self, event: dict[str, object]) -> None:
            """As uvicorn's."""

    async def sendfile(_transport: object, file: BinaryIO, offset: int, count: int) -> int:
        sent.extend(os.pread(file.fileno(), count, offset))
        return len(sent)

    async def main() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "sendfile", sendfile)
        await example["with_pathsend"]({"type": "http"}, None, Connection().send)

    async def app(_scope: object, _receive: object, send: Callable[..., Awaitable[None]]) -> None:
        await send({"type": "http.response.pathsend", "path": str(document)})

    example = runpy.run_path(str(EXAMPLES / "uvicorn_server.py"))
    example["with_pathsend"].__globals__["app"] = app
    asyncio.run(main())
    assert promised == [SIZE]
    assert len(sent) == min(SIZE, SIZE + change)
    assert bool(aborted) == (change < 0)


@pytest.mark.parametrize(
    "framework",
    [
        pytest.param("aiohttp", marks=pytest.mark.new_kernel),
        pytest.param("uvicorn", marks=pytest.mark.old_kernel),
    ],
)
@pytest.mark.kernel
@pytest.mark.torture
@pytest.mark.timeout(900)
def test_twenty_clients(framework: str, document: Path, identity: Identity, tmp_path: Path) -> None:
    """All at once, a big file: each gets every byte, by the kernel; the server reads none."""
    digest = hashlib.sha256()
    with document.open("wb") as file:
        for _ in range(CROWD_SIZE >> 20):
            part = os.urandom(1 << 20)
            digest.update(part)
            file.write(part)
    log = tmp_path / "strace.log"
    before = ktls.stats()["TlsTxSw"]
    with (
        running(example(framework, identity), document.parent, trace=log) as server,
        ThreadPoolExecutor(CROWD) as pool,
    ):
        clients = islice(cycle(CLIENTS.values()), CROWD)
        url = f"{server.url}/{document.name}"
        fetching = [pool.submit(client, url, identity, seconds=800) for client in clients]
        assert {each.result() for each in fetching} == {digest.hexdigest()}
    assert ktls.stats()["TlsTxSw"] == before + CROWD
    assert sent_by_sendfile(log, document) == CROWD * CROWD_SIZE


def sent_by_sendfile(log: Path, document: Path) -> int:
    """How many bytes of a file sendfile sent, by strace's log; no other call may take it."""
    text = log.read_text()
    calls = re.findall(rf"^\d+ +(\w+)\(.*<{re.escape(str(document))}>", text, re.MULTILINE)
    assert set(calls) == {"sendfile"}
    sent = re.findall(
        r"^\d+ +(?:sendfile\(|<\.\.\. sendfile resumed>).* = (\d+)$", text, re.MULTILINE
    )
    return sum(map(int, sent))


@pytest.mark.parametrize("where", ["userspace", pytest.param("kernel", marks=pytest.mark.kernel)])
def test_hypercorn_speaks_http2(
    where: str, document: Path, identity: Identity, tmp_path: Path
) -> None:
    """ALPN works through ktls, whose answer the framework asks of ``ssl_object``."""
    expected = hashlib.sha256(document.read_bytes()).hexdigest()
    headers = tmp_path / "headers"
    before = ktls.stats()["TlsTxSw"] if where == "kernel" else 0
    with running(example("hypercorn", identity), document.parent) as server:
        options = ["--http2", "--dump-header", str(headers)]
        assert curl(f"{server.url}/{document.name}", identity, *options) == expected
    assert headers.read_text().startswith("HTTP/2 200")
    if where == "kernel":
        assert ktls.stats()["TlsTxSw"] == before + 1
