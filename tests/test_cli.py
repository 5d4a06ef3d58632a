"""``python -m ktls``, run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ktls.cli import main

from .conftest import KERNEL_TLS


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs it in a process of its own."""
    command = [sys.executable, "-m", "ktls", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


@pytest.mark.skipif(KERNEL_TLS, reason="for a kernel without TLS")
def test_check_without_kernel_tls_says_what_to_do() -> None:
    result = run("check")
    assert result.returncode == 1
    assert "kernel TLS  no" in result.stdout
    assert "modprobe tls" in result.stdout or "CONFIG_TLS" in result.stdout
    assert not result.stderr


@pytest.mark.kernel
def test_check_lists_every_cipher() -> None:
    result = run("check")
    assert result.returncode == 0
    assert "kernel TLS  yes" in result.stdout
    assert "AES_GCM_128         yes   yes       yes   yes\n" in result.stdout
    assert "SM4_GCM             -     -         no    no\n" in result.stdout


@pytest.mark.kernel
def test_check_warns_of_an_old_kernel(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ktls.checking._PATCH_FLOOR", {_kernel(): 10_000})
    assert main(["check"]) == 0
    assert "CVE-2025-39946" in capsys.readouterr().out


def _kernel() -> tuple[int, int]:
    major, minor, *_ = os.uname().release.split(".")
    return int(major), int(minor)


def test_no_command() -> None:
    result = run()
    assert result.returncode == 2
    assert "check" in result.stderr
