"""``python -m ktls serve``, run as a user runs it."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import ktls

from .conftest import KERNEL_TLS, Identity
from .servers import CLIENTS, SECONDS, Running, client_ssl, running

SIZE = 300_000
BIG = 16_000_000  # more than the buffers of a connection take
WHERE = "kernel" if KERNEL_TLS else "userspace"


def words(directory: Path, identity: Identity | None, *options: str) -> list[str | Path]:
    """The words after ``python``."""
    own = ["--cert", str(identity.chain), "--key", str(identity.key)] if identity else []
    return ["-m", "ktls", "serve", "--port", "0", *own, *options, directory]


@dataclass
class Site:
    """A running server, and what it serves."""

    server: Running
    document: Path
    identity: Identity

    def ask(
        self, path: str, method: str = "GET", **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """One request, its path sent as it is."""
        with closing(connect(self.server, self.identity)) as connection:
            return ask(connection, path, method, **headers)


def connect(server: Running, identity: Identity) -> http.client.HTTPSConnection:
    return http.client.HTTPSConnection(
        urlsplit(server.url).netloc, context=client_ssl(identity), timeout=SECONDS
    )


def ask(
    connection: http.client.HTTPSConnection, path: str, method: str = "GET", **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection.request(
        method, path, headers={name.replace("_", "-"): text for name, text in headers.items()}
    )
    response = connection.getresponse()
    return response.status, response.headers, response.read()


@pytest.fixture(scope="module")
def site(identity: Identity, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server for a directory with all that a directory may have in it."""
    above = tmp_path_factory.mktemp("above")
    (above / "secret").write_text("secret")
    (above / "shown-too").mkdir()
    (above / "shown-too" / "secret").write_text("secret")
    shown = above / "shown"
    (shown / "sub" / "deep").mkdir(parents=True)
    (shown / "sub" / "inner").write_text("inner")
    (shown / "<b>&.txt").write_text("odd")
    (shown / os.fsdecode(b"\xff\n")).write_text("no UTF-8")
    (shown / ".hidden").write_text("secret")
    (shown / ".git").mkdir()
    (shown / ".git" / "config").write_text("secret")
    (shown / "link-in").symlink_to("sub/inner")
    (shown / "link-out").symlink_to("../secret")
    (shown / "dir-out").symlink_to("../shown-too")
    (shown / "link-hidden").symlink_to(".git/config")
    (shown / "link-round").symlink_to("link-round")
    (shown / "document.gz").write_text("something else")
    os.mkfifo(shown / "pipe")
    document = shown / "document"
    document.write_bytes(os.urandom(SIZE))
    with running(words(shown, identity), above) as server:
        yield Site(server, document, identity)
    assert "Traceback" not in "".join(server.lines)


def check_clients(site: Site) -> None:
    expected = hashlib.sha256(site.document.read_bytes()).hexdigest()
    for name, client in CLIENTS.items():
        assert client(f"{site.server.url}/document", site.identity) == expected, name


def test_files(site: Site) -> None:
    check_clients(site)


@pytest.mark.kernel
def test_files_by_the_kernel(site: Site) -> None:
    before = ktls.stats()["TlsTxSw"]
    check_clients(site)
    assert ktls.stats()["TlsTxSw"] == before + len(CLIENTS)


@pytest.mark.kernel
def test_sends_by_sendfile(identity: Identity, tmp_path: Path) -> None:
    (tmp_path / "shown").mkdir()
    document = tmp_path / "shown" / "document"
    document.write_bytes(os.urandom(SIZE))
    log = tmp_path / "strace.log"
    with running(words(document.parent, identity), tmp_path, trace=log) as server:
        check_clients(Site(server, document, identity))
    calls = re.findall(rf"(\w+)\(.*<{re.escape(str(document))}>", log.read_text())
    assert set(calls) == {"sendfile"}


def test_listing(site: Site) -> None:
    status, headers, body = site.ask("/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert re.findall(r'<li><a href="\./(.*)">(.*)</a>', body.decode()) == [
        ("%3Cb%3E%26.txt", "&lt;b&gt;&amp;.txt"),
        ("document", "document"),
        ("document.gz", "document.gz"),
        ("link-in", "link-in"),
        ("sub/", "sub/"),
    ]
    assert b"%FF%0A" in body
    for hidden in (b"secret", b"hidden", b".git", b"out", b"round", b"pipe", b"<b>"):
        assert hidden not in body


def test_listing_of_a_subdirectory(site: Site) -> None:
    status, _, body = site.ask("/sub/")
    assert status == 200
    assert re.findall(rb'href="(.*?)"', body) == [b"../", b"./deep/", b"./inner"]


@pytest.mark.parametrize("path", ["/sub", "//sub", "///sub"])
def test_a_directory_without_its_slash(path: str, site: Site) -> None:
    status, headers, _ = site.ask(path)
    assert (status, headers["Location"]) == (301, "/sub/")


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/%3Cb%3E%26.txt", b"odd"),
        ("/%ff%0a", b"no UTF-8"),
        ("/link-in", b"inner"),
        ("/sub//inner?query", b"inner"),
    ],
)
def test_names(path: str, content: bytes, site: Site) -> None:
    status, _, body = site.ask(path)
    assert (status, body) == (200, content)


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/document/",
        "/.hidden",
        "/%2ehidden",
        "/.git/config",
        "/link-out",
        "/dir-out/",
        "/dir-out/secret",
        "/link-hidden",
        "/link-round",
        "/pipe",
        "/../secret",
        "/%2e%2e/secret",
        "/sub/..%2f..%2fsecret",
        "/../shown-too/secret",
        "/%00",
        "//etc/passwd",
        "/%2fetc%2fpasswd",
        "/" + "x" * 300,
    ],
)
def test_what_is_not_served(path: str, site: Site) -> None:
    status, _, body = site.ask(path)
    assert status == 404
    assert b"secret" not in body


def test_one_connection_for_ranges_and_conditions(site: Site) -> None:
    content = site.document.read_bytes()
    with closing(connect(site.server, site.identity)) as connection:
        status, headers, body = ask(connection, "/document", Accept_Encoding="gzip")
        assert (status, body) == (200, content)
        sock = connection.sock
        etag, modified = headers["ETag"], headers["Last-Modified"]
        assert headers["Content-Type"] == "application/octet-stream"
        status, headers, body = ask(connection, "/document", Range="bytes=1000-199999")
        assert (status, body) == (206, content[1000:200_000])
        assert headers["Content-Range"] == f"bytes 1000-199999/{SIZE}"
        status, _, body = ask(connection, "/document", Range="bytes=-5")
        assert (status, body) == (206, content[-5:])
        assert ask(connection, "/document", Range=f"bytes={SIZE}-")[0] == 416
        assert ask(connection, "/document", If_None_Match=etag)[0] == 304
        assert ask(connection, "/document", If_Modified_Since=modified)[0] == 304
        assert ask(connection, "/document", If_Match='"other"')[0] == 412
        status, headers, body = ask(connection, "/document", "HEAD")
        assert (status, headers["Content-Length"], body) == (200, str(SIZE), b"")
        assert ask(connection, "/document", "POST")[0] == 405
        assert connection.sock is sock


def test_access_log(identity: Identity, tmp_path: Path) -> None:
    (tmp_path / "document").write_bytes(bytes(1000))
    with running(words(tmp_path, identity), tmp_path) as server:
        site = Site(server, tmp_path / "document", identity)
        site.ask("/document")
        site.ask("/nothing%0A")
    log = "".join(server.lines)
    assert f"127.0.0.1 'GET /document' 200 1000 {WHERE} " in log
    assert re.search(rf"127\.0\.0\.1 'GET /nothing%0A' 404 \d+ {WHERE} ", log)
    assert ("kernel TLS isn't used" in log) is not KERNEL_TLS


@pytest.mark.kernel
def test_access_log_with_the_kernel(identity: Identity, tmp_path: Path) -> None:
    test_access_log(identity, tmp_path)


def test_self_signed(tmp_path: Path) -> None:
    """The fingerprint is printed; a client that takes the certificate for its authority agrees."""
    with running(words(tmp_path, None), tmp_path) as server:
        port = urlsplit(server.url).port
        assert port
        pem = ssl.get_server_certificate(("127.0.0.1", port))
        for name in ("localhost", "127.0.0.1"):
            context = ssl.create_default_context(cadata=pem)
            connection = http.client.HTTPSConnection(name, port, context=context, timeout=SECONDS)
            with closing(connection):
                assert ask(connection, "/")[0] == 200
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest().upper()
    assert server.lines[0].endswith(f"SHA-256 {':'.join(re.findall('..', digest))}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_signal_lets_downloads_end(
    number: int, workers: str, identity: Identity, tmp_path: Path
) -> None:
    check_downloads_end(number, workers, identity, tmp_path)


@pytest.mark.kernel
def test_a_signal_lets_downloads_by_the_kernel_end(identity: Identity, tmp_path: Path) -> None:
    check_downloads_end(signal.SIGTERM, "2", identity, tmp_path)


def check_downloads_end(number: int, workers: str, identity: Identity, tmp_path: Path) -> None:
    """One connection is in the middle of a file, one idle; both are closed properly."""
    (tmp_path / "document").write_bytes(bytes(BIG))
    with running(words(tmp_path, identity, "--workers", workers), tmp_path) as server:
        with (
            closing(connect(server, identity)) as connection,
            closing(connect(server, identity)) as idle,
        ):
            assert ask(idle, "/")[0] == 200
            connection.request("GET", "/document")
            response = connection.getresponse()
            server.process.send_signal(number)
            assert idle.sock.recv(1) == b""
            assert response.read() == bytes(BIG)
            assert connection.sock is None or connection.sock.recv(1) == b""
        assert server.process.wait(SECONDS) == 0
    assert "Traceback" not in "".join(server.lines)


IMPATIENT = (
    "import sys, ktls.serving, ktls.cli; ktls.serving.GRACE = 0.2; sys.exit(ktls.cli.main())"
)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_client_that_stalls_is_not_waited_for(
    workers: str, identity: Identity, tmp_path: Path
) -> None:
    (tmp_path / "document").write_bytes(bytes(BIG))
    command = ["-c", IMPATIENT, *words(tmp_path, identity, "--workers", workers)[2:]]
    with running(command, tmp_path) as server, closing(connect(server, identity)) as connection:
        connection.request("GET", "/document")
        response = connection.getresponse()
        assert server.stop() == 0
        with pytest.raises((OSError, http.client.IncompleteRead)):  # no end is made up
            response.read()


def children(process: int) -> set[int]:
    """The processes that a process started."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == process:
            found.add(int(status.parent.name))
    return found


def test_workers(identity: Identity, tmp_path: Path) -> None:
    """All share the port; when one dies the others stop, and it is an error."""
    (tmp_path / "document").write_bytes(os.urandom(1000))
    with running(words(tmp_path, identity, "--workers", "3"), tmp_path) as server:
        workers = children(server.process.pid)
        assert len(workers) == 3
        for _ in range(2):
            check_clients(Site(server, tmp_path / "document", identity))
        os.kill(min(workers), signal.SIGKILL)
        assert server.process.wait(SECONDS) == 1
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert "ended with signal 9" in "".join(server.lines)


def test_workers_end_with_the_first_process(identity: Identity, tmp_path: Path) -> None:
    with running(words(tmp_path, identity, "--workers", "2"), tmp_path) as server:
        server.stop(signal.SIGKILL)
    # That running() is through means that nobody has the other end of the output any more.


def fails(*arguments: str | Path) -> str:
    """Runs it; returns the one line that says why not."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 1, done.stderr
    assert not done.stdout
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_errors(identities: dict[str, Identity], tmp_path: Path) -> None:
    ecdsa, rsa = identities["ecdsa"], identities["rsa"]
    start = ["-m", "ktls", "serve", "--port", "0"]
    assert "nowhere: not a directory" in fails(*start, tmp_path / "nowhere")
    assert "none.pem: No such file" in fails(*start, "--cert", tmp_path / "none.pem")
    assert "no certificate chain" in fails(*start, "--cert", ecdsa.key)
    assert "not the certificate's" in fails(*start, "--cert", ecdsa.chain, "--key", rsa.key)
    assert "can't listen on 192.0.2.1" in fails(*start, "--bind", "192.0.2.1")
    assert "can't listen on a..b" in fails(*start, "--bind", "a..b")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_port_in_use(workers: str) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = fails("-m", "ktls", "serve", "--port", port, "--workers", workers)
    assert f"port {port}: Address already in use" in line


def test_without_aiohttp() -> None:
    code = "import sys; sys.modules['aiohttp'] = None; from ktls.cli import main; sys.exit(main())"
    assert "pip install 'ktls[serve]'" in fails("-c", code, "serve")


@pytest.mark.skipif(KERNEL_TLS, reason="for a kernel without TLS")
def test_require_without_kernel_tls() -> None:
    assert "no TLS" in fails("-m", "ktls", "serve", "--port", "0", "--require")


@pytest.mark.kernel
def test_require(identity: Identity, tmp_path: Path) -> None:
    """What the kernel can't do is refused: here a cipher suite without a table row."""
    with running(words(tmp_path, identity, "--require"), tmp_path) as server:
        assert Site(server, tmp_path, identity).ask("/")[0] == 200
        context = client_ssl(identity)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("ECDHE-ECDSA-AES256-SHA384")
        parts = urlsplit(server.url)
        connection = http.client.HTTPSConnection(parts.netloc, context=context, timeout=SECONDS)
        with closing(connection), pytest.raises((OSError, http.client.HTTPException)):
            ask(connection, "/")


@pytest.mark.parametrize(
    "options", [["--port", "70000"], ["--port", "x"], ["--workers", "0"], ["--key", "key.pem"]]
)
def test_usage(options: list[str]) -> None:
    command = [sys.executable, "-m", "ktls", "serve", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 2
    assert f"error: {'argument ' * (options[0] != '--key')}{options[0]}" in done.stderr
