"""What kernel TLS does, in one run: a file over HTTPS by sendfile, to clients that know nothing.

Serves a file with https_server.py to curl and to ``openssl s_client``, over TLS 1.2 and 1.3,
compares SHA-256, and shows the kernel's counters before and after. `make demo` runs it, in the lab
if this kernel has no TLS.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trustme

import ktls

MEGABYTES = 128
CLIENTS = {
    "curl": "curl -sS --cacert ca.pem --tlsv{version} --tls-max {version} {url}file",
    "openssl s_client": "printf 'GET /file HTTP/1.0\\r\\n\\r\\n' | openssl s_client -quiet "
    "-verify_return_error -verify_quiet -CAfile ca.pem -servername localhost -tls{option} "
    "-connect {address}",
}


def main() -> int:
    """Runs the demo; 0 if every hash was right and every record was the kernel's."""
    found = ktls.probe()
    if not found.available:
        print(f"no kernel TLS here: {found.ulp}")
        return 1
    before = counters()
    wrong = 0
    with tempfile.TemporaryDirectory() as name, server(Path(name)) as url:
        digest = make_file(Path(name, "file"))
        print(f"{MEGABYTES} MiB, SHA-256 {digest}\n", flush=True)
        for version in ("1.2", "1.3"):
            for client, command in CLIENTS.items():
                received = download(Path(name), command, url, version)
                wrong += received != digest
                verdict = "equal" if received == digest else "WRONG"
                print(f"{verdict} SHA-256 from {client}\n", flush=True)
    after = counters()
    print("/proc/net/tls_stat")
    for counter, count in after.items():
        if count or counter in ("TlsTxSw", "TlsRxSw", "TlsDecryptError"):
            print(f"{counter:28}{before.get(counter, 0):6} ->{count:6}")
    in_kernel = after["TlsTxSw"] - before.get("TlsTxSw", 0) >= 2 * len(CLIENTS)
    print("\nthe kernel encrypted all of it" if in_kernel and not wrong else "\nFAILED")
    return int(wrong > 0 or not in_kernel)


def make_file(path: Path) -> str:
    """Fills a file with random bytes; returns its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(MEGABYTES):
            block = os.urandom(1 << 20)
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def download(directory: Path, command: str, url: str, version: str) -> str:
    """Runs a client; returns the SHA-256 of the body that it wrote."""
    address = url.removeprefix("https://").rstrip("/")
    option = {"1.2": "1_2", "1.3": "1_3"}[version]
    words = command.format(url=url, address=address, version=version, option=option)
    target = directory / "received"
    with target.open("wb") as output:
        subprocess.run(words, shell=True, check=True, cwd=directory, stdout=output)
    with target.open("rb") as received:
        if received.peek(5).startswith(b"HTTP/"):
            while received.readline() != b"\r\n":
                pass
        digest = hashlib.sha256()
        while block := received.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def counters() -> dict[str, int]:
    """The kernel's own count of what net/tls did."""
    lines = Path("/proc/net/tls_stat").read_text(encoding="ascii").split("\n")
    return {name: int(count) for name, count in (line.split() for line in lines if line)}


@contextmanager
def server(directory: Path) -> Iterator[str]:
    """Runs https_server.py on a directory, with a fresh certificate; gives its URL."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    issued.cert_chain_pems[0].write_to_path(str(directory / "chain.pem"))
    issued.private_key_pem.write_to_path(str(directory / "key.pem"))
    script = Path(__file__).resolve().with_name("https_server.py")
    words = [sys.executable, str(script), "0", "chain.pem", "key.pem"]
    with subprocess.Popen(
        words, cwd=directory, stdout=subprocess.PIPE, stderr=sys.stdout, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


if __name__ == "__main__":
    sys.exit(main())
