"""HTTPS servers in processes of their own, and clients that fetch what they serve."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from .conftest import Identity

SECONDS = 50  # for a whole transfer; a test that takes more gives its own
_PIECE = 1 << 18
_URL = re.compile(r"https://\S+:\d+/?")


@dataclass
class Running:
    """A server.

    Attributes:
        process: With -D, strace's is another.
        url: Of its root.
        lines: What it has printed so far; all of it once the process is over.
    """

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends it by a signal; returns its exit status."""
        self.process.send_signal(number)
        return self.process.wait(SECONDS)


@contextmanager
def running(
    words: Sequence[str | Path], directory: Path, trace: Path | None = None
) -> Iterator[Running]:
    """Runs a server until the end of the block; it says its URL when it is ready.

    Args:
        words: Python's arguments.
        directory: Where.
        trace: Where to log its system calls that read files or send them; None means not.
    """
    tracing: list[str] = []
    if trace is not None:
        calls = "trace=sendfile,splice,read,readv,pread64,preadv,preadv2,mmap"
        tracing = ["strace", "-D", "-f", "--seccomp-bpf", "-yy", "-e", calls, "-o", str(trace)]
    with subprocess.Popen(
        [*tracing, sys.executable, *words],
        cwd=directory,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        server = Running(process)
        ready = threading.Event()
        reader = threading.Thread(target=_read, args=(server, ready))
        reader.start()
        try:
            assert ready.wait(SECONDS), f"{words} doesn't start: {server.lines}"
            assert server.url, f"{words} ended: {server.lines}"
            yield server
            if process.poll() is None:
                server.stop()
        finally:
            process.kill()
            reader.join()


def _read(server: Running, ready: threading.Event) -> None:
    """Reads what a server prints up to its end, and that of its tracer and its workers."""
    assert server.process.stdout is not None
    for line in server.process.stdout:
        server.lines.append(line)
        found = _URL.search(line)
        if found and not server.url:
            server.url = found[0].rstrip("/")
            ready.set()
    ready.set()


def client_ssl(identity: Identity) -> ssl.SSLContext:
    """What the clients in Python trust."""
    return ssl.create_default_context(cafile=str(identity.authority))


def curl(url: str, identity: Identity, *options: str, seconds: float = SECONDS) -> str:
    """Fetches by curl; returns the SHA-256."""
    words = ["curl", "-q", "-sS", "--fail", "--noproxy", "*", "--max-time", str(seconds), *options]
    digest = hashlib.sha256()
    with subprocess.Popen(
        [*words, "--cacert", str(identity.authority), url], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        while piece := process.stdout.read(_PIECE):
            digest.update(piece)
    assert process.returncode == 0
    return digest.hexdigest()


def by_httpx(url: str, identity: Identity, *, seconds: float = SECONDS) -> str:
    """Fetches by httpx; returns the SHA-256."""
    digest = hashlib.sha256()
    with (
        httpx.Client(verify=client_ssl(identity), trust_env=False, timeout=seconds) as client,
        client.stream("GET", url) as response,
    ):
        response.raise_for_status()
        for piece in response.iter_raw(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def stdlib(url: str, identity: Identity, *, seconds: float = SECONDS) -> str:
    """Fetches by http.client; returns the SHA-256."""
    parts = urlsplit(url)
    digest = hashlib.sha256()
    connection = http.client.HTTPSConnection(
        parts.netloc, context=client_ssl(identity), timeout=seconds
    )
    connection.request("GET", parts.path)
    response = connection.getresponse()
    assert response.status == 200
    while piece := response.read(_PIECE):
        digest.update(piece)
    connection.close()
    return digest.hexdigest()


CLIENTS = {"curl": curl, "httpx": by_httpx, "stdlib": stdlib}
