"""The performance kernel: User-Mode Linux compiled here, with AES by the processor's instructions.

Debian's own has AES in plain C, one CPU, and stops its processes by ptrace. `perf.patch` and
`perf.config`, for Debian's kernel source, change these three.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import uml
from jobs import Job, Lines
from packages import Kernel, run, say

OLDEST = "7.2"  # the kernel that the patch was made for
CPUS = 2  # as many as perf.config allows


def build(root: Path, home: Path) -> None:
    """Compiles the source package, as `packages.Recipe` wants it; keeps nothing but the kernel."""
    say("uml-perf: compiling it, some minutes")
    sources = root / "usr" / "src"
    run("tar", "-xf", str(archive(sources)), "-C", str(sources))
    (tree,) = (path for path in sources.iterdir() if path.is_dir())
    recipe = Path(__file__).resolve()
    run("patch", "-d", str(tree), "-p1", "-i", str(recipe.with_suffix(".patch")))
    make = ("make", "-s", "-C", str(tree), "ARCH=um", f"-j{os.cpu_count()}")
    run(*make, "x86_64_defconfig")
    with (tree / ".config").open("a") as config:
        # Of two settings the last one counts.
        config.write(recipe.with_suffix(".config").read_text())
    run(*make, "olddefconfig")
    run(*make, "linux")
    run("strip", "-o", str(root / "linux"), str(tree / "linux"))
    shutil.rmtree(sources)


def archive(sources: Path) -> Path:
    """Returns the archive in the source package."""
    (found,) = sources.glob("linux-source-*.tar.xz")
    return found


def start(box: Path, kernel: Kernel, job: Job, lines: Lines) -> list[str]:
    """Returns the words that start it, as `jobs.Starter` wants it.

    Each CPU keeps to one of the machine's, which is what UML_PIN is for.
    """
    cpus = min(CPUS, len(os.sched_getaffinity(0)))
    return ["env", "UML_PIN=1", *uml.start(box, kernel, job, lines), f"ncpus={cpus}", "seccomp=on"]
