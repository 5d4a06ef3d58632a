"""The examples, run as the README says."""

from __future__ import annotations

import hashlib
import http.client
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from .conftest import KERNEL_TLS, Identity

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def server(identity: Identity, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A running https_server.py on a directory with one file: its URL and its log."""
    (tmp_path / "file").write_bytes(os.urandom(300_000))
    words = [sys.executable, str(EXAMPLES / "https_server.py"), "0"]
    words += [str(identity.chain), str(identity.key)]
    log = tmp_path / "log"
    with (
        log.open("wb") as stderr,
        subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=stderr) as process,
    ):
        assert process.stdout is not None
        yield process.stdout.readline().decode().strip(), log
        process.terminate()


def check_file_server(server: tuple[str, Path], identity: Identity, mode: str) -> None:
    """Fetches the file twice over one connection, and a listing."""
    url, log = server
    context = ssl.create_default_context(cafile=str(identity.authority))
    connection = http.client.HTTPSConnection(urlsplit(url).netloc, context=context, timeout=30)
    expected = hashlib.sha256((log.parent / "file").read_bytes()).digest()
    for _ in range(2):
        connection.request("GET", "/file")
        assert hashlib.sha256(connection.getresponse().read()).digest() == expected
    connection.request("GET", "/")
    assert b"file" in connection.getresponse().read()
    connection.close()
    assert f"TX {mode}" in log.read_text()


def test_https_server(server: tuple[str, Path], identity: Identity) -> None:
    check_file_server(server, identity, "software" if KERNEL_TLS else "userspace: this kernel has")


@pytest.mark.kernel
def test_https_server_in_the_kernel(server: tuple[str, Path], identity: Identity) -> None:
    check_file_server(server, identity, "software")


@pytest.mark.kernel
@pytest.mark.torture
@pytest.mark.timeout(600)
def test_demo() -> None:
    result = subprocess.run(
        [sys.executable, EXAMPLES / "demo.py"],
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the kernel encrypted all of it" in result.stdout
