"""The programs that the tests talk to: openssl, curl, gnutls-cli and gnutls-serv.

From Debian's packages openssl, curl and gnutls-bin. One that is missing is a failure.
"""

from __future__ import annotations

import re
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from OpenSSL import SSL

from .conftest import Identity

SECONDS = 30  # a program's time for everything
_ATTEMPTS = 5  # at a port that was free a moment ago

# GnuTLS's name of a cipher, its suites' ending in TLS 1.2, and its suite in TLS 1.3.
CIPHERS = {
    "AES-128-GCM": ("AES128-GCM-SHA256", "TLS_AES_128_GCM_SHA256"),
    "AES-256-GCM": ("AES256-GCM-SHA384", "TLS_AES_256_GCM_SHA384"),
    "CHACHA20-POLY1305": ("CHACHA20-POLY1305", "TLS_CHACHA20_POLY1305_SHA256"),
    "AES-128-CCM": ("AES128-CCM", "TLS_AES_128_CCM_SHA256"),
}


class Suite(NamedTuple):
    """What both ends are to agree on.

    Attributes:
        version: Such as ``TLSv1.3``.
        cipher: One of `CIPHERS`.
        key: ``rsa`` or ``ecdsa``.
        groups: For the program: the groups it takes, such as ``P-384``; the first is a client's key
            share. Empty means whatever it likes.
        modifier: For GnuTLS: the end of the priority string, such as ``%NO_SESSION_HASH``.
    """

    version: str
    cipher: str = "AES-128-GCM"
    key: str = "ecdsa"
    groups: tuple[str, ...] = ()
    modifier: str = ""

    @property
    def name(self) -> str:
        """As OpenSSL writes it."""
        tls12, tls13 = CIPHERS[self.cipher]
        if self.version == "TLSv1.3":
            return tls13
        if (self.key, self.cipher) == ("rsa", "AES-128-CCM"):
            return tls12  # ECDHE-RSA has no CCM: RSA key exchange
        return f"ECDHE-{self.key.upper()}-{tls12}"

    def limit(self, context: SSL.Context) -> None:
        """Has a context that speaks this version take this cipher suite only."""
        if self.version == "TLSv1.3":
            context.set_tls13_ciphersuites(self.name.encode())
        else:
            context.set_cipher_list(self.name.encode())

    @property
    def openssl(self) -> list[str]:
        """Options of s_client and s_server."""
        groups = ["-groups", ":".join(self.groups)] if self.groups else []
        if self.version == "TLSv1.3":
            return ["-tls1_3", "-ciphersuites", self.name, *groups]
        return ["-tls1_2", "-cipher", self.name, *groups]

    @property
    def curl(self) -> list[str]:
        """Options of curl."""
        groups = ["--curves", ":".join(self.groups)] if self.groups else []
        if self.version == "TLSv1.3":
            return ["--tlsv1.3", "--tls13-ciphers", self.name, *groups]
        return ["--tlsv1.2", "--tls-max", "1.2", "--ciphers", self.name, *groups]

    @property
    def gnutls(self) -> list[str]:
        """Options of gnutls-cli and gnutls-serv."""
        version = self.version.replace("v", "")
        words = ["NORMAL", "-VERS-ALL", f"+VERS-{version}", "-CIPHER-ALL", f"+{self.cipher}"]
        if self.groups:
            words += [
                "-GROUP-ALL",
                *(f"+GROUP-SEC{group.replace('-', '')}R1" for group in self.groups),
            ]
        return ["--priority", ":".join([*words, self.modifier] if self.modifier else words)]


def client(
    program: str, port: int, suite: Suite, identity: Identity, *, certificate: bool = False
) -> list[str]:
    """The command line of a client that verifies us, sends a request and prints the answer.

    Args:
        program: ``curl``, ``s_client`` or ``gnutls-cli``.
        port: Where we listen, on 127.0.0.1.
        suite: What it offers.
        identity: Has the authority that it trusts.
        certificate: Whether it identifies itself by that identity, too.
    """
    chain, key, authority = (
        str(path) for path in (identity.chain, identity.key, identity.authority)
    )
    if program == "curl":
        own = ["--cert", chain, "--key", key] if certificate else []
        return [
            *("curl", "-q", "-sSi", "--fail", "--noproxy", "*", "--cacert", authority),
            *("--resolve", f"localhost:{port}:127.0.0.1", f"https://localhost:{port}/"),
            *suite.curl,
            *own,
        ]
    if program == "s_client":
        own = ["-cert", chain, "-key", key] if certificate else []
        return [
            *("openssl", "s_client", "-quiet", "-connect", f"127.0.0.1:{port}"),
            *("-servername", "localhost", "-verify_hostname", "localhost"),
            *("-CAfile", authority, "-verify_return_error"),
            *suite.openssl,
            *own,
        ]
    own = ["--x509certfile", chain, "--x509keyfile", key] if certificate else []
    return [
        *("gnutls-cli", "--logfile=/dev/null", "--port", str(port), "--x509cafile", authority),
        *("--sni-hostname=localhost", "--verify-hostname=localhost", "127.0.0.1"),
        *suite.gnutls,
        *(["--single-key-share"] if suite.groups else []),
        *own,
    ]


def run(words: Sequence[str], request: bytes) -> bytes:
    """Runs a client to its end; returns what it printed.

    Raises:
        AssertionError: It failed; the text has what it said.
    """
    with tempfile.TemporaryFile() as output:  # a pipe's reader would wake for each of its bytes
        done = subprocess.run(
            words,
            input=request,
            stdout=output,
            stderr=subprocess.PIPE,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stderr.decode()}"
        output.seek(0)
        return output.read()


@contextmanager
def server(
    program: str,
    task: str,
    suite: Suite,
    identity: Identity,
    document: Path,
    *,
    certificate: bool = False,
) -> Iterator[int]:
    """Runs a server until the end of the block; yields its port.

    Args:
        program: ``s_server`` or ``gnutls-serv``.
        task: ``file``: it answers ``GET /document`` with that file. ``echo``: it answers each line
            with itself, s_server with the line reversed.
        suite: What it accepts.
        identity: Its own; and the authority of clients' certificates.
        document: The file.
        certificate: Whether it wants a certificate.
    """
    chain, key, authority = (
        str(path) for path in (identity.chain, identity.key, identity.authority)
    )
    if program == "s_server":
        wanted = ["-Verify", "3", "-verify_return_error", "-CAfile", authority]
        words = [
            *("openssl", "s_server", "-accept", "127.0.0.1:0", "-cert", chain, "-key", key),
            "-WWW" if task == "file" else "-rev",
            *suite.openssl,
            *(wanted if certificate else []),
        ]
        with _started(words, rb"ACCEPT 127\.0\.0\.1:(\d+)", document.parent) as port:
            assert port is not None, f"{words} doesn't start"
            yield port
        return
    wanted = ["--require-client-cert", "--verify-client-cert", "--x509cafile", authority]
    words = [
        *("gnutls-serv", "--quiet", "--x509certfile", chain, "--x509keyfile", key),
        *(["--http", f"--httpdata={document}"] if task == "file" else ["--echo"]),
        *suite.gnutls,
        *(wanted if certificate else []),
    ]
    for _ in range(_ATTEMPTS):
        here = [*words, f"--port={_free_port()}"]
        with _started(here, rb"IPv4 .* port (\d+)\.\.\.done", document.parent) as port:
            if port is not None:
                yield port
                return
    raise AssertionError(f"{words} doesn't start")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port: int = reserved.getsockname()[1]
        return port


@contextmanager
def _started(words: Sequence[str], ready: bytes, directory: Path) -> Iterator[int | None]:
    """Runs a server until the end of the block; yields the port that it says, or None."""
    with subprocess.Popen(
        words,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=process.stdout.read)  # gnutls-serv prints all it receives
        try:
            found = (re.search(ready, line) for line in process.stdout)
            port = next((int(match[1]) for match in found if match), None)
            reader.start()
            yield port
        finally:
            process.kill()
            if reader.ident is not None:
                reader.join()


def note_hellos(context: SSL.Context) -> list[bytes]:
    """Has a context note each hello that it reads in the list returned."""
    hellos: list[bytes] = []

    def note(connection: SSL.Connection, where: int, _result: int) -> None:
        state = connection.get_state_string()
        if where & SSL.SSL_CB_LOOP and re.search(rb"read (client|server) hello", state):
            hellos.append(state)

    context.set_info_callback(note)
    return hellos
