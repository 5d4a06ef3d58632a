"""``python -m ktls get``, as a user runs it, from a server that can do all sorts of things."""

from __future__ import annotations

import os
import re
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Protocol

import pytest

from ktls.getting import _name

from .aio_kit import place
from .conftest import KERNEL_TLS, Identity, stdlib_context

__all__ = ["place"]  # a fixture

BLOB = os.urandom(3_000_000)
MODIFIED = 1_700_000_000


class Handler(BaseHTTPRequestHandler):
    """Answers by the path."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """The file, or trouble."""
        getattr(self, "serve_" + self.path.strip("/").split("/")[0])()

    def serve_file(self) -> None:
        """A file that supports ranges."""
        begin, match = 0, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match and self.headers["If-Range"] == formatdate(MODIFIED, usegmt=True):
            begin = int(match[1])
        if begin >= len(BLOB):
            self.answer(416, {"Content-Range": f"bytes */{len(BLOB)}", "Content-Length": "0"})
            return
        headers = {"Content-Length": str(len(BLOB) - begin)}
        headers["Last-Modified"] = formatdate(MODIFIED, usegmt=True)
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(BLOB) - 1}/{len(BLOB)}"
        self.answer(206 if begin else 200, headers)
        self.wfile.write(BLOB[begin:])

    def serve_cut(self) -> None:
        """The same, but the connection ends in the middle."""
        length = {"Content-Length": str(len(BLOB))}
        self.answer(200, {**length, "Last-Modified": formatdate(MODIFIED, usegmt=True)})
        self.wfile.write(BLOB[:1_000_000])
        self.close_connection = True

    def serve_close(self) -> None:
        """Its length isn't told: the end of the connection is that of the file."""
        self.answer(200, {"Connection": "close"})
        self.wfile.write(BLOB)
        assert isinstance(self.connection, ssl.SSLSocket)
        self.connection.unwrap()  # without its close_notify it might as well be cut

    def serve_chunked(self) -> None:
        """Chunks of all sizes."""
        self.answer(200, {"Transfer-Encoding": "chunked"})
        at = 0
        for size in [*range(1, 2000, 100), len(BLOB)]:
            part = BLOB[at : at + size]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
            at += size
        self.wfile.write(b"0\r\n\r\n")

    def serve_redirect(self) -> None:
        """To the file."""
        self.answer(302, {"Location": "/file/name", "Content-Length": "0"})

    def serve_circle(self) -> None:
        """To itself."""
        self.answer(301, {"Location": self.path, "Content-Length": "0"})

    def serve_plain(self) -> None:
        """Away from TLS."""
        self.answer(301, {"Location": "http://localhost/", "Content-Length": "0"})

    def serve_missing(self) -> None:
        """Nothing."""
        self.send_error(404)

    def serve_other(self) -> None:
        """Another part than was asked for."""
        self.answer(206, {"Content-Range": "bytes 5-6/7", "Content-Length": "2"})
        self.wfile.write(b"56")

    def serve_part(self) -> None:
        """The rest, framed as the path says, and so many bytes more or fewer than it is."""
        begin = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        framing, more = self.path.split("/")[2:4]
        body = (BLOB[begin:] + b"more")[: len(BLOB) - begin + int(more)]
        headers = {"Content-Range": f"bytes {begin}-{len(BLOB) - 1}/{len(BLOB)}"}
        if framing == "length":
            headers["Content-Length"] = str(len(body))
        elif framing == "chunked":
            headers["Transfer-Encoding"] = "chunked"
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        self.answer(206, headers)
        self.wfile.write(body)
        if framing == "close":
            self.close_connection = True
            assert isinstance(self.connection, ssl.SSLSocket)
            self.connection.unwrap()

    def answer(self, status: int, headers: dict[str, str]) -> None:
        """The head of an answer."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Keeps quiet."""


@pytest.fixture
def url(identity: Identity) -> Iterator[str]:
    """Where the server is."""
    context = stdlib_context(identity, server_side=True)

    class Server(ThreadingHTTPServer):
        def finish_request(self, request: object, client_address: object) -> None:
            with context.wrap_socket(request, server_side=True) as tls:  # type: ignore[arg-type]
                super().finish_request(tls, client_address)

        def handle_error(self, *_: object) -> None:
            """Clients that go away."""

    with Server(("", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"https://localhost:{server.server_port}"
        server.shutdown()
        thread.join()


class Get(Protocol):
    """Runs the command."""

    def __call__(self, *words: str, trust: bool = True) -> subprocess.CompletedProcess[bytes]:
        """Takes its arguments, and whether to trust the test's authority."""


@pytest.fixture
def get(identity: Identity, tmp_path: Path, place: str) -> Get:
    """Runs the command; in the kernel where there is one, else in userspace."""
    if (place == "kernel") is not KERNEL_TLS:
        pytest.skip("the same is run on a kernel with TLS, and on one without")

    def run(*words: str, trust: bool = True) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "ktls", "get", *words]
        command += ["--cacert", str(identity.authority)] * trust
        return subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=50, check=False)

    return run


# What has nothing to do with the kernel.
anywhere = pytest.mark.parametrize("place", ["userspace"], indirect=True)
WHERE = b"received by the kernel" if KERNEL_TLS else b"received in userspace: this kernel has"


def check(result: subprocess.CompletedProcess[bytes], said: bytes = WHERE) -> None:
    """It worked, and says how."""
    assert result.returncode == 0, result.stderr
    assert said in result.stderr


def refused(result: subprocess.CompletedProcess[bytes], said: bytes) -> None:
    """It did not, and says why, in a line."""
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith(b"ktls get: ")
    assert said in result.stderr
    assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize("path", ["file/name", "redirect", "close/name", "chunked/name"])
def test_whole(url: str, get: Get, tmp_path: Path, path: str) -> None:
    check(get(f"{url}/{path}"))
    name = "redirect" if path == "redirect" else "name"
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == BLOB


def test_to_stdout(url: str, get: Get, tmp_path: Path) -> None:
    result = get(f"{url}/file", "-o", "-")
    check(result)
    assert result.stdout == BLOB
    assert not os.listdir(tmp_path)


def test_resume(url: str, get: Get, tmp_path: Path) -> None:
    """What was cut is kept, and gone on with; what is whole already is just named."""
    refused(get(f"{url}/cut", "-o", "name"), b"without close_notify")
    part = tmp_path / "name.part"
    assert part.read_bytes() == BLOB[:1_000_000]
    assert part.stat().st_mtime == MODIFIED
    check(get(f"{url}/file", "-C", "-o", "name"), b"name: 1.9 MiB in ")
    assert (tmp_path / "name").read_bytes() == BLOB
    (tmp_path / "name").rename(part)
    check(get(f"{url}/file", "-C", "-o", "name"), b"name: 0 B in ")
    assert (tmp_path / "name").read_bytes() == BLOB


@anywhere
@pytest.mark.parametrize("seconds", [MODIFIED + 1, 0])
def test_resume_of_another_file(url: str, get: Get, tmp_path: Path, seconds: int) -> None:
    """The server's file has changed, or nobody knows: it begins anew."""
    part = tmp_path / "name.part"
    part.write_bytes(b"something else")
    os.utime(part, (seconds, seconds))
    check(get(f"{url}/file", "-C", "-o", "name"))
    assert (tmp_path / "name").read_bytes() == BLOB


@anywhere
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("more", [0, -1, 1])
def test_resume_by_a_part(url: str, get: Get, tmp_path: Path, framing: str, more: int) -> None:
    """What Content-Range says of the file holds, or there is no file; what follows is left."""
    part = tmp_path / "name.part"
    part.write_bytes(BLOB[:1000])
    os.utime(part, (MODIFIED, MODIFIED))
    result = get(f"{url}/part/{framing}/{more}", "-C", "-o", "name")
    if more < 0 or (more and framing != "close"):
        refused(result, b"")
        assert os.listdir(tmp_path) == ["name.part"]
        assert BLOB.startswith(part.read_bytes())
    else:
        check(result)
        assert (tmp_path / "name").read_bytes() == BLOB


@anywhere
def test_trouble(url: str, get: Get, tmp_path: Path) -> None:
    """A line each, and no file."""
    refused(get(f"{url}/missing"), b"404 Not Found")
    refused(get(f"{url}/circle"), b"redirects")
    refused(get(f"{url}/plain"), b"not an https URL: http://localhost/")
    refused(get("ftp://localhost/"), b"not an https URL")
    refused(get("https://localhost:1/"), b"refused")
    refused(get(f"{url}/file", trust=False), b"certificate verify failed")
    refused(get(url.replace("localhost", "127.0.0.2") + "/file"), b"certificate verify failed")
    assert not os.listdir(tmp_path)
    (tmp_path / "name.part").write_bytes(b"part")
    refused(get(f"{url}/other", "-C", "-o", "name"), b"another part")
    check(get(f"{url}/file", "--insecure", "-o", "name", trust=False))


@anywhere
def test_full_disk(url: str, get: Get, tmp_path: Path) -> None:
    refused(get(f"{url}/file", "-o", "/dev/full/name"), b"Not a directory")
    (tmp_path / "name.part").symlink_to("/dev/full")
    refused(get(f"{url}/file", "-o", "name"), b"No space left on device")


def test_require(url: str, get: Get, tmp_path: Path) -> None:
    """Then it is the kernel or nothing."""
    result = get(f"{url}/file", "--require")
    if KERNEL_TLS:
        check(result)
    else:
        refused(result, b"kernel")


def test_names() -> None:
    """They stay in this directory."""
    for path, name in (
        ("/a/b.c", "b.c"),
        ("/a/b%20c?d=/e", "b c"),
        ("/..%2f..%2fetc%2fpasswd", "passwd"),
        ("/a/%2e%2e", "index.html"),
        ("", "index.html"),
    ):
        assert _name(f"https://localhost{path}") == name
