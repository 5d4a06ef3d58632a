"""Runs a command in a machine: what it is told, where its output goes, and how it ends."""

from __future__ import annotations

import os
import platform
import re
import resource
import selectors
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from packages import Kernel, LabError

# The guest has file systems of its own here, as init.sh mounts them.
TMPFS = ("/tmp", "/run", "/dev/shm")
ENTRY = re.compile(rf"(?:{'|'.join(TMPFS)})/[^/]+")
ENTRY_IN_TEXT = re.compile(rf"(?:{'|'.join(TMPFS)})/[^/\s:;,='\"]+")

MODULES = "tls gcm ccm chacha20poly1305 ipv6"


@dataclass(frozen=True)
class Job:
    """What to run, and in what kind of machine.

    `memory` is in bytes; `timeout`, in seconds, counts from the start of the kernel; `append` are
    more words for the kernel's command line.
    """

    command: Sequence[str]
    memory: int
    timeout: float | None
    load_modules: bool
    append: str
    log: str | None


@dataclass(frozen=True)
class Lines:
    """Descriptors that the guest's first two serial lines write to."""

    out: int
    err: int


Starter = Callable[[Path, Kernel, Job, Lines], list[str]]
"""Returns the words that start a machine. Its console goes to its own output, and it is to run the
script `init` in that directory, with the machine's own / as its root."""


def run_job(starter: Starter, kernel: Kernel, job: Job) -> int:
    """Boots the kernel, runs the command in it, and returns its exit status.

    Raises:
        LabError: if the kernel stopped before the command did; the kernel's log is in it.
        TimeoutError: if the job took longer than its timeout.
        BrokenPipeError: if nobody reads the output any more.
    """
    with tempfile.TemporaryDirectory(prefix="ktls-lab-") as name:
        box = Path(name)
        fill(box, kernel, job)
        try:
            boot(box, starter, kernel, job)
        finally:
            if job.log:
                shutil.copyfile(box / "log", job.log)
        return outcome(box)


def fill(box: Path, kernel: Kernel, job: Job) -> None:
    """Writes what the guest reads. It is shell code, which carries any byte once it is quoted."""
    shutil.copy(Path(__file__).with_name("init.sh"), box / "init")
    settings = {
        "home": str(kernel.home),
        "hostname": platform.node(),
        "keep": "".join(f"{path}\n" for path in sorted(shown(box, kernel, job))),
        "tmpfs_size": str(job.memory * 3 // 4),
        "load": MODULES if job.load_modules and kernel.modules.exists() else "",
    }
    write(box / "settings", *(f"{name}={shlex.quote(text)}" for name, text in settings.items()))
    environment = {**os.environ, "HOME": "/tmp", "TMPDIR": "/tmp", "KTLS_LAB": kernel.name}
    pairs = (f"{name}={text}" for name, text in environment.items())
    words = ["setsid", "env", "-i", *pairs, *job.command]
    write(box / "command", f"cd {shlex.quote(os.getcwd())} || exit", f"exec {shlex.join(words)}")


def write(file: Path, *lines: str) -> None:
    """Writes lines; bytes that Python could not decode come out as they were."""
    file.write_bytes(b"".join(os.fsencode(line) + b"\n" for line in lines))


def shown(box: Path, kernel: Kernel, job: Job) -> set[str]:
    """Returns the paths that the guest's own file systems must not hide.

    The command needs its working directory and whatever its words and its environment mention:
    a checkout or a virtual environment below /tmp, for example.
    """
    here = os.getcwd()
    paths = (here, str(box), str(kernel.home))
    found = {entry[0] for path in paths if (entry := ENTRY.match(path))}
    for text in (*job.command, *os.environ.values()):
        found.update(ENTRY_IN_TEXT.findall(text))
    if here in TMPFS:
        found = {path for path in found if not path.startswith(f"{here}/")} | {here}
    return {path for path in found if os.path.lexists(path)}


def boot(box: Path, starter: Starter, kernel: Kernel, job: Job) -> None:
    """Runs the kernel from start to end; leaves no process behind, whatever happens."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out, out_end = os.pipe()
    err, err_end = os.pipe()
    with open(box / "log", "wb") as log:
        process = subprocess.Popen(
            starter(box, kernel, job, Lines(out_end, err_end)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=box,
            env={"PATH": os.defpath},
            pass_fds=(out_end, err_end),
            start_new_session=True,
        )
    os.close(out_end)
    os.close(err_end)
    with guarded(process):
        relay(process, {out: 1, err: 2}, job.timeout)


@contextmanager
def guarded(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kills the kernel and the processes that it made, on leaving or if this program dies.

    A pipe that only this program holds open tells a shell outside when to do it.
    """
    script = 'read -r _; kill -s KILL -- "-$1" 2>/dev/null'
    guard = subprocess.Popen(
        ["sh", "-c", script, "guard", str(process.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        guard.communicate()
        process.wait()


def relay(process: subprocess.Popen[bytes], pipes: dict[int, int], timeout: float | None) -> None:
    """Copies each pipe to its descriptor as the data come, until the kernel has ended."""
    deadline = None if timeout is None else time.monotonic() + timeout
    ended = os.pidfd_open(process.pid)
    with selectors.DefaultSelector() as selector:
        for descriptor in (ended, *pipes):
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            for key, _ in selector.select(left):
                if key.fd == ended:
                    os.killpg(process.pid, signal.SIGKILL)  # what is left holds the pipes open
                elif data := os.read(key.fd, 1 << 16):
                    write_all(pipes[key.fd], data)
                    continue
                selector.unregister(key.fd)
                os.close(key.fd)


def write_all(descriptor: int, data: bytes) -> None:
    """Writes all of the data, however little the descriptor takes at once."""
    while data:
        data = data[os.write(descriptor, data) :]


def outcome(box: Path) -> int:
    """Returns the status that the guest left."""
    try:
        return int((box / "status").read_text())
    except (OSError, ValueError):
        log = (box / "log").read_text(errors="replace").splitlines()
        end = "\n".join(log[-60:])
        raise LabError(f"the kernel stopped before the command did; its log ends:\n{end}") from None
