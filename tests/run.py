"""Runs the tests on every kernel: this machine's, and where it has no TLS those of the lab.

usage: python tests/run.py SELECTION     a pytest ``-m`` expression, such as "not torture"

On this machine's kernel everything runs that doesn't need TLS in it; in the lab all that does, at
the same time on both kernels. Every part must have run at least a test, and none may be skipped for
want of a kernel. What is tested with one direction in the kernel is left to torture, but receiving
on the new one. The longest of torture run on one kernel, each.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 45 * 60  # seconds, for a part
LAB = {"uml": ("(rx_only or tx_only)", "new_kernel"), "uml-new": ("tx_only", "old_kernel")}
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]


@dataclass(frozen=True)
class Part:
    """One run of pytest, on one kernel."""

    name: str
    command: list[str]
    requires_kernel: bool = True

    def run(self) -> tuple[int, float]:
        """Runs it, its output in a file; returns its exit status and how long it took."""
        started = time.monotonic()
        environment = dict(os.environ)
        environment.pop("KTLS_REQUIRE_KERNEL", None)
        if self.requires_kernel:
            environment["KTLS_REQUIRE_KERNEL"] = "1"
        with self.log.open("wb") as log:
            status = subprocess.run(
                self.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        return status, time.monotonic() - started

    @property
    def log(self) -> Path:
        """Where its output is."""
        return ROOT / "reports" / f"{self.name}.log"


def parts(selection: str) -> list[Part]:
    """What is to be run on this machine."""
    check = [sys.executable, "-m", "ktls", "check"]
    if subprocess.run(check, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode == 0:
        return [Part("this-kernel", [*PYTEST, "-m", selection])]
    found = [Part("this-kernel", [*PYTEST, "-m", f"not kernel and ({selection})"], False)]
    torture = selection == "torture"
    for kernel, (left, others) in LAB.items():
        chosen = f"not {left} and ({selection})"
        if torture:
            chosen = f"torture and not ({others} or tx_only or rx_only) or {left} and not torture"
        lab = [str(ROOT / "lab" / "run"), "--kernel", kernel, "--timeout", str(LIMIT)]
        lab += ["--memory", "4G" if torture else "2G", "--"]
        found.append(Part(kernel, [*lab, *PYTEST, "-m", f"kernel and ({chosen})"]))
    return found


def main(selection: str) -> int:
    """Runs the parts, all at once: each waits a good deal. Returns the exit status."""
    (ROOT / "reports").mkdir(exist_ok=True)
    todo = parts(selection)
    failed = 0
    with ThreadPoolExecutor(len(todo)) as pool:
        for part, (status, seconds) in zip(todo, pool.map(Part.run, todo), strict=True):
            output = part.log.read_text(encoding="utf-8", errors="replace")
            print(f"== {part.name}: {seconds:.0f} s, exit status {status}\n{output}", flush=True)
            failed += status != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
