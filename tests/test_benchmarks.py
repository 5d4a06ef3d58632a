"""The benchmarks, so that they still run when somebody wants to know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.contenders import running, workplace
from benchmarks.measure import Latency
from benchmarks.peer import RIGHT, contents
from ktls.types import MAX_PAYLOAD, RecordType

from .conftest import KERNEL_TLS

DATA = RecordType.APPLICATION_DATA
ROOT = Path(__file__).resolve().parent.parent


def bench(path: Path, *words: str) -> list[dict[str, Any]]:
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
    assert all(f"| {row['unit']} |" in result.stdout for row in report["rows"])
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


AIO = ("aio-data", "aio-files", "--most", "100", "--largest", "50")


def check_asyncio(rows: list[dict[str, Any]], offloads: set[str]) -> None:
    """Throughput, and the latencies of the same requests, all in each pass."""
    found = {(row["bench"], row["contender"], row["size"], row["unit"]): row for row in rows}
    for row in rows:
        assert row["offload"] in offloads
        if row["unit"] in ("requests/s", "MB/s"):
            p50, p99, last = (
                found[row["bench"], row["contender"], row["size"], f"us, p{part}"]["figures"]
                for part in (50, 99, 99.9)
            )
            assert all(0 < a <= b <= c for a, b, c in zip(p50, p99, last, strict=True))
    assert {row["unit"] for row in rows if row["bench"] == "aio-files"} >= {"MB/s", "us, p50"}
    assert {row["unit"] for row in rows if row["bench"] == "aio-data"} >= {"requests/s", "us, p50"}
    assert {row["size"] for row in rows} == {1, 50}


@pytest.mark.skipif(KERNEL_TLS, reason="the next one then")
def test_asyncio(tmp_path: Path) -> None:
    only = ("--only", "aio-ktls", "--only", "aio-stdlib")
    check_asyncio(bench(tmp_path / "rows.json", *AIO, *only), {"process"})


@pytest.mark.kernel
def test_asyncio_in_the_kernel(tmp_path: Path) -> None:
    check_asyncio(bench(tmp_path / "rows.json", *AIO, "--only", "aio-ktls"), {"kernel"})


@pytest.mark.parametrize(("part", "expected"), [(500, 50), (990, 99), (999, 100), (1000, 100)])
def test_latency(part: int, expected: float) -> None:
    """The nearest rank; of few the worst."""
    latency = Latency(part)
    assert latency.of([float(number) for number in range(100, 0, -1)]) == expected
    assert latency.of([7.0]) == 7
    assert latency.unit.of(1e-3, 0) == 1000


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
