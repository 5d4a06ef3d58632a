"""The lab: a command in it behaves as if it had run here. Only where the lab can boot."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .conftest import KERNEL_TLS

RUN = Path(__file__).resolve().parent.parent / "lab" / "run"

pytestmark = [
    pytest.mark.skipif(KERNEL_TLS, reason="the lab is for machines without kernel TLS"),
    pytest.mark.timeout(120),
]


def lab(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs the lab."""
    return subprocess.run(
        [RUN, *arguments],
        capture_output=True,
        timeout=110,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module", autouse=True)
def _fetched() -> None:
    """A new machine's first boot says on stderr that it fetches a kernel."""
    for kernel in ("uml", "uml-new"):
        assert lab("--fetch-only", "--kernel", kernel).returncode == 0


@pytest.mark.parametrize("kernel", ["uml", "uml-new"])
def test_status_output_and_words(kernel: str) -> None:
    check_status_output_and_words(kernel)


@pytest.mark.torture
@pytest.mark.timeout(400)
def test_the_kernels_for_measuring() -> None:
    """Those that are there: `make bench-lab` and `make bench-count` make them."""
    cache = Path(lab("--where").stdout.decode().strip())
    for kernel in ("uml-perf", "qemu", "qemu-new"):
        if (cache / kernel).exists():
            check_status_output_and_words(kernel)


def check_status_output_and_words(kernel: str) -> None:
    script = (
        'printf %s "$1" "$QUOTED"; echo err >&2; grep -q TlsTxSw /proc/net/tls_stat || exit 1; '
    )
    script += "grep -q ' told=1 said=2' /proc/cmdline && exit 7"
    words = ("--append", "told=1 said=2", "--", "sh", "-c", script, "sh", "a 'b'\n")
    result = lab("--kernel", kernel, *words, QUOTED='"c"\n')
    assert (result.returncode, result.stdout, result.stderr) == (7, b"a 'b'\n\"c\"\n", b"err\n")


def test_timeout_is_124() -> None:
    assert lab("--timeout", "4", "--", "sleep", "100").returncode == 124


def test_a_dead_kernel_is_125_and_says_why() -> None:
    result = lab("--", "sh", "-c", "echo c >/proc/sysrq-trigger; sleep 20")
    assert result.returncode == 125
    assert b"panic" in result.stderr.lower()
