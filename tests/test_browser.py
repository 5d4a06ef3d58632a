"""A real browser, headless, loads a page and a big file from a server whose TLS is the kernel's.

It writes what the browser saw to reports/browser-*.png; docs/browser.png is one of those.
"""

from __future__ import annotations

import base64
import hashlib
import os
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import ktls

from .conftest import Identity, version_each
from .servers import running

ROOT = Path(__file__).resolve().parent.parent
SIZE = 50 << 20
PICTURES = 4
SECONDS = 240

PAGE = """<!doctype html>
<meta charset="utf-8"><title>ktls</title>
<style>
  body {{ font: 17px/1.5 "DejaVu Sans", sans-serif; margin: 40px; color: #223 }}
  img {{ width: 180px; height: 120px; margin-right: 12px; border-radius: 8px }}
  h1 {{ margin: 0 }} code {{ font-size: 13px }} #verdict {{ font-weight: bold; color: #063 }}
</style>
<h1>A page by kernel TLS</h1>
<p>Linux {release}, {version}: handshake by OpenSSL, records by the kernel,
files by sendfile(2).</p>
<p>{pictures}</p>
<p id="verdict">downloading {size} bytes ...</p><p><code id="hash"></code></p>
<script type="module">
  const bytes = await (await fetch("download")).arrayBuffer();
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const hex = [...digest].map(each => each.toString(16).padStart(2, "0")).join("");
  const shown = [...document.images].filter(each => each.naturalWidth == 180).length;
  document.getElementById("hash").textContent = hex;
  document.getElementById("verdict").textContent = hex == "{hash}"
    ? `${{shown}} pictures, and all ${{bytes.byteLength}} bytes of the download arrived.` : "WRONG";
</script>
"""


def picture(number: int) -> bytes:
    """A PNG with a gradient."""
    rows = b"".join(
        b"\0" + b"".join(bytes([60 * number, 60 + x // 2, 255 - y]) for x in range(180))
        for y in range(120)
    )
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", 180, 120, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.fixture
def site(tmp_path: Path, version: str) -> Path:
    """The page, its pictures and the download."""
    directory = tmp_path / "site"
    directory.mkdir()
    data = os.urandom(SIZE)
    (directory / "download").write_bytes(data)
    for number in range(PICTURES):
        (directory / f"picture{number}.png").write_bytes(picture(number))
    tags = "".join(f'<img src="picture{number}.png" alt="">' for number in range(PICTURES))
    digest = hashlib.sha256(data).hexdigest()
    release = os.uname().release
    text = PAGE.format(release=release, version=version, pictures=tags, size=SIZE, hash=digest)
    (directory / "index.html").write_text(text)
    return directory


def browse(url: str, identity: Identity, version: str, home: Path, screenshot: Path) -> str:
    """What the page looks like once its script is done, as HTML; and as a picture."""
    certificate = x509.load_pem_x509_certificate(identity.chain.read_bytes())
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    pin = base64.b64encode(hashlib.sha256(key).digest()).decode()
    limit = "tls1.2" if version == "TLSv1.2" else "tls1.3"
    words = ["chromium", "--headless", "--no-sandbox", "--no-zygote", "--disable-gpu"]
    words += ["--disable-dev-shm-usage", f"--user-data-dir={home / 'profile'}"]
    words += [f"--ignore-certificate-errors-spki-list={pin}", f"--ssl-version-max={limit}"]
    words += ["--virtual-time-budget=60000", "--window-size=900,400", "--dump-dom"]
    result = subprocess.run(
        [*words, f"--screenshot={screenshot}", url],
        env=os.environ | {"HOME": str(home), "TMPDIR": str(home)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@version_each
@pytest.mark.kernel
@pytest.mark.torture
@pytest.mark.timeout(SECONDS + 60)
def test_page_and_download(site: Path, identity: Identity, version: str, tmp_path: Path) -> None:
    """Every picture and every byte arrive, over connections of the kernel's."""
    before = ktls.stats()
    (ROOT / "reports").mkdir(exist_ok=True)
    screenshot = ROOT / "reports" / f"browser-{version}.png"
    words: list[str | Path] = ["-m", "ktls", "serve", "--port", "0", "--require"]
    words += ["--cert", identity.chain, "--key", identity.key]
    with running(words, site) as server:
        dom = browse(f"{server.url}/index.html", identity, version, tmp_path, screenshot)
    assert f"{PICTURES} pictures, and all {SIZE} bytes of the download arrived." in dom
    after = ktls.stats()
    assert after["TlsTxSw"] > before["TlsTxSw"]
    assert after["TlsRxSw"] > before["TlsRxSw"]
    assert after["TlsDecryptError"] == before["TlsDecryptError"]
    log = "".join(server.lines)
    for name in ("index.html", "download", *(f"picture{each}.png" for each in range(PICTURES))):
        assert f"/{name}" in log
    assert "kernel" in log
    assert "userspace" not in log
    assert screenshot.read_bytes().startswith(b"\x89PNG")
