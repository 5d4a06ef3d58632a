"""The servers under test, as processes: each is started once and measured in turns."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trustme

from ktls.types import MAX_PAYLOAD

from .peer import REQUEST_SIZE, Link, PlainLink, TLSLink

ROOT = Path(__file__).resolve().parent.parent
_MEMORY = "/dev/shm"  # noqa: S108 - for files that aren't to be read from a disk
_CHUNK = 1 << 20
_CPUCLOCK_SCHED = 2  # with a process's number, a clock id: see clock_getcpuclockid(3)

# One worker that is this process, so that its CPU time is the server's; the rest as Debian has it.
_NGINX = """\
daemon off; master_process off; pid {directory}/{port}.pid; error_log stderr error; {user}
events {{ worker_connections 512; }}
http {{
    access_log off; sendfile on; keepalive_requests 1000000;
    client_body_temp_path {directory}/{port}-1; proxy_temp_path {directory}/{port}-2;
    fastcgi_temp_path {directory}/{port}-3; uwsgi_temp_path {directory}/{port}-4;
    scgi_temp_path {directory}/{port}-5;
    server {{
        listen 127.0.0.1:{port} ssl; root {directory};
        ssl_certificate {directory}/chain.pem; ssl_certificate_key {directory}/key.pem;
        ssl_protocols TLSv1.2 TLSv1.3; {options}
    }}
}}
"""


NGINX = {"nginx-ktls": "ssl_conf_command Options KTLS;", "nginx": ""}
"""Servers that are nginx, with their options."""


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        name: Of the program: reference, one of server.py's or aio_server.py's, or of `NGINX`.
        process: It.
        port: Where it listens.
        directory: Where its files are.
    """

    name: str
    process: subprocess.Popen[bytes]
    port: int
    directory: Path

    def connect(self, operation: str) -> Link:
        """Makes a connection that is ready for a request."""
        if self.name == "reference":
            seals = operation.startswith("recv")
            return PlainLink(self.port, opens=not seals and operation != "plain", seals=seals)
        if self.name in NGINX:
            hello = b"HEAD /16384 HTTP/1.1\r\nHost: localhost\r\n\r\n"
            return TLSLink(self.port, hello, lambda answer: answer.endswith(b"\r\n\r\n"))
        return TLSLink(self.port)

    def request(self, operation: str, count: int, size: int) -> bytes:
        """What to ask of it."""
        if self.name in NGINX:
            get = f"GET /{size} HTTP/1.1\r\nHost: localhost\r\n"
            return (f"{get}\r\n" * (count - 1) + f"{get}Connection: close\r\n\r\n").encode()
        return f"{operation} {count} {size}".encode().ljust(REQUEST_SIZE)

    def cpu(self) -> float:
        """Seconds of CPU time that its threads have had, those that have ended too."""
        return time.clock_gettime(~self.process.pid << 3 | _CPUCLOCK_SCHED)


@contextmanager
def workplace(sizes: Iterable[int]) -> Iterator[Path]:
    """A directory in memory with an identity, and a file of each size, named by it."""
    memory = _MEMORY if os.access(_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="ktls-bench-", dir=memory) as name:
        directory = Path(name)
        authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
        issued = authority.issue_cert("localhost", key_type=trustme.KeyType.ECDSA)
        for pem in issued.cert_chain_pems:
            pem.write_to_path(str(directory / "chain.pem"), append=True)
        issued.private_key_pem.write_to_path(str(directory / "key.pem"))
        block = os.urandom(_CHUNK)
        for size in {*sizes, MAX_PAYLOAD}:
            with (directory / str(size)).open("wb") as file:
                for at in range(0, size, _CHUNK):
                    file.write(block[: size - at])
        yield directory


def reference() -> Path:
    """The C reference, compiled if it isn't: it may have to run where no compiler can."""
    sources = [
        ROOT / "benchmarks" / "reference.c",
        ROOT / "src" / "ktls.c",
        ROOT / "src" / "ktls.h",
    ]
    program = ROOT / "build" / "reference"
    if not program.exists() or program.stat().st_mtime < max(s.stat().st_mtime for s in sources):
        program.parent.mkdir(exist_ok=True)
        words = [
            "cc",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{ROOT / 'src'}",
            "-o",
            str(program),
        ]
        subprocess.run([*words, *map(str, sources[:2]), "-lpthread"], check=True)
    return program


@contextmanager
def running(names: Iterable[str], directory: Path) -> Iterator[dict[str, Server]]:
    """Starts servers by their names; ends them with the block."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # of connections that are left open
    with ExitStack() as stack:
        yield {name: stack.enter_context(_running(name, directory)) for name in names}


@contextmanager
def _running(name: str, directory: Path) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        port = listener.getsockname()[1]
        if name in NGINX:
            listener.close()
            words = _nginx(directory, port, NGINX[name])
        elif name == "reference":
            words = [str(reference()), str(listener.fileno()), str(directory)]
        else:
            module = "benchmarks.aio_server" if name.startswith("aio-") else "benchmarks.server"
            words = [sys.executable, "-m", module, name, str(listener.fileno()), str(directory)]
        inherited = () if name in NGINX else (listener.fileno(),)
        process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=inherited)
    try:
        _wait_for(port, process)
        yield Server(name, process, port, directory)
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(6000):
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with status {process.returncode}")
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.01)
    raise RuntimeError(f"{process.args!r} doesn't listen")


def _nginx(directory: Path, port: int, options: str) -> list[str]:
    user = "user root;" if os.geteuid() == 0 else ""
    text = _NGINX.format(directory=directory, port=port, options=options, user=user)
    file = directory / f"nginx-{port}.conf"
    file.write_text(text)
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    return [program or "nginx", "-c", str(file)]
