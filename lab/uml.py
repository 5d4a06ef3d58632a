"""User-Mode Linux: a kernel that is an ordinary program of this machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from jobs import Job, Lines
from packages import Kernel, LabError, join_to_libc, run

PRELOADED = "xstate.so"


def arrange(root: Path, home: Path) -> None:
    """Finishes Debian's package, as `packages.Recipe` wants it."""
    (root / "linux").symlink_to(join_to_libc(root, home, "bin/linux.uml"))
    (root / "modules").symlink_to("usr/lib/uml/modules")
    if "amx_tile" in Path("/proc/cpuinfo").read_text(encoding="ascii"):
        source = Path(__file__).resolve().with_name("xstate.c")
        run("cc", "-O2", "-shared", "-fPIC", "-o", str(root / PRELOADED), str(source))


def start(box: Path, kernel: Kernel, job: Job, lines: Lines) -> list[str]:
    """Returns the words that start it, as `jobs.Starter` wants it."""
    preloaded = kernel.home / PRELOADED
    return [
        *("env", f"TMPDIR={memory_directory(job.memory)}"),
        *([f"LD_PRELOAD={preloaded}"] if preloaded.exists() else []),
        *(str(kernel.program), f"mem={job.memory}", f"uml_dir={box}", "umid=guest"),
        *("root=/dev/root", "rootfstype=hostfs", "rw", f"init={box}/init"),
        *("con=null", "con0=null,fd:1"),
        *("ssl=null", f"ssl0=null,fd:{lines.out}", f"ssl1=null,fd:{lines.err}"),
        *job.append.split(),
    ]


def memory_directory(memory: int) -> str:
    """Returns where the guest's memory can be, a file of that many bytes that is executed."""
    for directory in ("/dev/shm", tempfile.gettempdir(), "/tmp", "/var/tmp"):
        try:
            info = os.statvfs(directory)
        except OSError:
            continue
        free = info.f_bavail * info.f_frsize
        if free >= memory and not info.f_flag & os.ST_NOEXEC and os.access(directory, os.W_OK):
            return directory
    raise LabError(f"no directory for {memory} bytes of guest memory; try a smaller --memory")
