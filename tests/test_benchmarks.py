"""The benchmarks, so that they still run when somebody wants to know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.contenders import running, workplace
from benchmarks.peer import RIGHT, contents
from ktls.types import MAX_PAYLOAD, RecordType

from .conftest import KERNEL_TLS

DATA = RecordType.APPLICATION_DATA
ROOT = Path(__file__).resolve().parent.parent


def bench(path: Path, *words: str) -> list[dict[str, object]]:
    """Runs the driver on next to nothing; returns the rows of its JSON."""
    small = ("--runs", "2", "--batch", "32K", "--most", "3", "--largest", "4K")
    command = [sys.executable, "-m", "benchmarks", *small, "--json", str(path), *words]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(path.read_text())
    assert report["machine"]["kernel"].startswith("Linux")
    assert all(row["runs"] == 2 and row["min"] <= row["median"] for row in report["rows"])
    assert all(row["verified"] for row in report["rows"] if row["unit"] != "KiB"), result.stdout
    return list(report["rows"])


@pytest.mark.skipif(KERNEL_TLS, reason="the next one then")
def test_the_driver_runs(tmp_path: Path) -> None:
    only = ("--only", "ktls", "--only", "stdlib", "--only", "pyopenssl")
    names = ("sendfile", "small", "recv", "threads", "memory")
    rows = bench(tmp_path / "rows.json", *names, *only)
    assert {row["bench"] for row in rows} == set(names)
    assert {row["offload"] for row in rows} == {"process", ""}


@pytest.mark.kernel
def test_the_c_reference_and_the_library_in_the_kernel(tmp_path: Path) -> None:
    only = ("--only", "ktls", "--only", "reference")
    rows = bench(tmp_path / "rows.json", "sendfile", "recv", "handshake", *only)
    assert {row["offload"] for row in rows} == {"kernel", ""}
    assert {row["contender"] for row in rows} >= {"C reference", "Socket.sendfile"}


@pytest.mark.kernel
def test_data_that_come_with_the_request() -> None:
    """The kernel joins records: a server that reads on takes the first of the data for the request.

    On a busy machine that refused a row whose bytes were right.
    """
    with workplace([4096]) as directory, running(["ktls"], directory) as servers:
        server = servers["ktls"]
        pattern = (directory / str(MAX_PAYLOAD)).read_bytes()
        for operation in ("check", "checkfile"):
            link = server.connect("recv")
            with link.sock:
                sealer = link.sealer()
                assert sealer is not None
                stream = sealer.seal(DATA, server.request(operation, 8, 4096))
                stream += sealer.seal(DATA, pattern) + sealer.seal(DATA, pattern)
                link.sock.sendall(stream)
                assert b"".join(contents(link)) == RIGHT
