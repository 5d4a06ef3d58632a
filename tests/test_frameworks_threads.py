"""The examples for frameworks that don't run on asyncio, with real clients."""

from __future__ import annotations

import ftplib
import hashlib
import io
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import ktls

from .aio_kit import place
from .conftest import KERNEL_TLS, Identity

__all__ = ["place"]  # a fixture

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
BLOB = os.urandom(3_000_000)
Start = Callable[..., str]


@pytest.fixture
def start(identity: Identity, tmp_path: Path) -> Iterator[Start]:
    """Starts an example; gives its URL."""
    processes = []

    def starting(name: str, *arguments: str) -> str:
        words = [sys.executable, str(EXAMPLES / name), "0"]
        words += [str(identity.chain), str(identity.key), *arguments]
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log)
        processes.append(process)
        assert process.stdout is not None
        return process.stdout.readline().decode().strip()

    yield starting
    for process in processes:
        process.terminate()
        process.communicate()


def curl(identity: Identity, *words: str) -> bytes:
    """What curl fetches."""
    command = ["curl", "--silent", "--show-error", "--max-time", "50"]
    return subprocess.run(
        [*command, "--cacert", str(identity.authority), *words], check=True, capture_output=True
    ).stdout


def sent_by_kernel() -> int:
    """How many connections have begun to send by the kernel."""
    return ktls.stats()["TlsTxSw"] if KERNEL_TLS else 0


@pytest.fixture
def _counted(place: str) -> Iterator[None]:
    """On a kernel with TLS it is used."""
    if (place == "kernel") is not KERNEL_TLS:
        pytest.skip("the same is run on a kernel with TLS, and on one without")
    before = sent_by_kernel()
    yield
    assert (sent_by_kernel() > before) is KERNEL_TLS


@pytest.mark.usefixtures("_counted")
def test_wsgi_server(start: Start, identity: Identity, tmp_path: Path) -> None:
    """A file for curl and for Python, while another client stalls in its handshake."""
    (tmp_path / "file").write_bytes(BLOB)
    url = start("wsgi_server.py", str(tmp_path / "file"))
    with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0)):
        assert curl(identity, url) == BLOB
        assert curl(identity, "--tls-max", "1.2", url) == BLOB


class ReusingFTP(ftplib.FTP_TLS):
    """A client that resumes the control connection's session, as many servers want it."""

    def ntransfercmd(
        self, cmd: str, rest: int | str | None = None
    ) -> tuple[socket.socket, int | None]:
        """As ftplib's, but for the session."""
        sock, size = ftplib.FTP.ntransfercmd(self, cmd, rest)  # noqa: S321 - TLS comes next
        assert isinstance(self.sock, ssl.SSLSocket)
        session = self.sock.session
        wrapped = self.context.wrap_socket(sock, server_hostname=self.host, session=session)
        return wrapped, size


@pytest.mark.usefixtures("_counted")
@pytest.mark.parametrize("client", [ftplib.FTP_TLS, ReusingFTP])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_ftps_server(
    start: Start,
    identity: Identity,
    tmp_path: Path,
    client: type[ftplib.FTP_TLS],
    version: ssl.TLSVersion,
) -> None:
    """Up, down, a part, a listing, and an end in the middle; then it goes on."""
    url = start("ftps_server.py", str(tmp_path))
    context = ssl.create_default_context(cafile=str(identity.authority))
    context.maximum_version = version
    with client(context=context, timeout=30) as ftp:
        ftp.connect("localhost", urlsplit(url).port or 0)
        ftp.login()
        ftp.prot_p()
        ftp.storbinary("STOR file", io.BytesIO(BLOB))
        assert (tmp_path / "file").read_bytes() == BLOB
        for rest in (None, len(BLOB) - 5000):
            got = bytearray()
            ftp.retrbinary("RETR file", got.extend, rest=rest)
            assert hashlib.sha256(got).digest() == hashlib.sha256(BLOB[rest or 0 :]).digest()
        assert "file" in ftp.nlst()
        lines: list[str] = []
        (tmp_path / "text").write_text("one\ntwo\n")
        ftp.retrlines("RETR text", lines.append)
        assert lines == ["one", "two"]
        ftp.voidcmd("TYPE I")
        with (tmp_path / "big").open("wb") as file:
            file.truncate(1 << 26)  # more than any buffers hold
        with ftp.transfercmd("RETR big") as data:
            assert not any(data.recv(1000))
        with pytest.raises(ftplib.error_temp, match="426"):
            ftp.voidresp()
        assert ftp.nlst()


@pytest.mark.usefixtures("_counted")
def test_ftps_and_curl(start: Start, identity: Identity, tmp_path: Path) -> None:
    """The tool resumes its session on the data connection, and insists on close_notify."""
    url = start("ftps_server.py", str(tmp_path))
    (tmp_path / "file").write_bytes(BLOB)
    assert curl(identity, "--ssl-reqd", url + "file") == BLOB
    curl(identity, "--ssl-reqd", "--upload-file", str(tmp_path / "file"), url + "copy")
    assert (tmp_path / "copy").read_bytes() == BLOB
