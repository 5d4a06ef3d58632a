"""Finds a kernel in the machine's own apt sources and unpacks it into a cache.

apt does the work: it resolves the dependencies and verifies the signatures, in a private world
(own lists, own archive, an empty dpkg status) that leaves the machine's apt state alone. The
other settings of the machine's apt.conf, such as a proxy, stay in force.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

# kmod brings `modprobe`, busybox-static `ip`, and patchelf joins programs to the libc of their
# own suite: with these in the cache, nothing has to be installed on the machine.
TOOLS = ("kmod", "busybox-static", "patchelf")

NEWER_SUITES = (("trixie-backports", "trixie"), ("forky",), ("sid",))

APT_CONF = """\
Dir::State "{world}";
Dir::State::Lists "{world}/lists";
Dir::State::Status "{world}/status";
Dir::Cache "{world}";
Dir::Cache::Archives "{world}/archives";
Dir::Etc::SourceList "/dev/null";
Dir::Etc::SourceParts "{world}/sources";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
APT::Default-Release "{release}";
APT::Install-Recommends "false";
APT::Sandbox::User "root";
APT::Update::Error-Mode "any";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""


class LabError(Exception):
    """The lab itself failed: no kernel was found, or it did not run to its end."""


@dataclass(frozen=True)
class Source:
    """One suite of one mirror; `trust` holds the Signed-By and Trusted fields, if any."""

    uri: str
    suite: str
    components: str
    trust: str

    def __str__(self) -> str:
        """Writes it as an entry of a `.sources` file."""
        return (
            f"Types: deb\nURIs: {self.uri}\nSuites: {self.suite}\n"
            f"Components: {self.components}\n{self.trust}\n"
        )


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel, perhaps with modules, and the two tools that its guest needs."""

    name: str
    home: Path

    @property
    def program(self) -> Path:
        """The kernel itself: an ordinary program, or what a machine boots."""
        return self.home / "linux"

    @property
    def modules(self) -> Path:
        """What is /lib/modules to this kernel, if it has modules."""
        return self.home / "modules"


@dataclass(frozen=True)
class Recipe:
    """What a kernel is made from.

    `finish` is called with the directory that the packages and the tools were unpacked into, and
    where that will be: it leaves `linux` there, and `modules` if there are any.
    """

    package: str
    finish: Callable[[Path, Path], None]
    oldest: str = ""  # version of the package that will do
    newer: bool = False  # whether to look in newer suites than the machine's own, too


def cache_directory() -> Path:
    """Returns where unpacked kernels are kept (it need not exist yet)."""
    if own := os.environ.get("KTLS_LAB_CACHE"):
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base, "ktls-lab").absolute()


def fetch(name: str, recipe: Recipe) -> Kernel:
    """Returns the kernel of that name, making it first if the cache has none.

    Raises:
        LabError: if no suite has it, or apt or what follows failed.
    """
    home = cache_directory() / name
    if not home.exists():
        with locked(home):
            if not home.exists():
                build(name, recipe, home)
    return Kernel(name, home)


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Lets one process at a time populate that directory of the cache."""
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(f"{home}.lock", os.O_WRONLY | os.O_CREAT, 0o600)
    except OSError as error:
        raise LabError(f"cannot write the cache, set KTLS_LAB_CACHE: {error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def build(name: str, recipe: Recipe, home: Path) -> None:
    """Fills `home`, which appears in one step: whoever sees it sees it complete."""
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f"{name}.") as scratch:
        root = Path(scratch, "root")
        for package in download(name, recipe, Path(scratch, "apt")):
            run("dpkg-deb", "-x", str(package), str(root))
        (root / "modprobe").symlink_to(join_to_libc(root, home, "bin/kmod"))
        (root / "busybox").symlink_to(unpacked(root, "bin/busybox").relative_to(root))
        recipe.finish(root, home)
        root.rename(home)


def download(name: str, recipe: Recipe, world: Path) -> list[Path]:
    """Downloads the packages, from the first suite whose version of the kernel will do."""
    looked: list[str] = []
    for sources in choices(recipe.newer):
        version = candidate(world, sources, recipe.package)
        if version and at_least(version, recipe.oldest):
            say(f"{name}: fetching {recipe.package} {version} ({sources[0].suite})")
            install = ("apt-get", "install", "--yes", "--download-only")
            apt(world, *install, recipe.package, *TOOLS)
            return list((world / "archives").glob("*.deb"))
        looked.append(f"  {sources[0].uri} {sources[0].suite}: {version or 'none'}")
    wanted = f"{recipe.oldest} or later" if recipe.oldest else "at all"
    raise LabError(f"{name}: no {recipe.package} {wanted}; looked in\n" + "\n".join(looked))


def choices(newer: bool) -> Iterator[list[Source]]:
    """Yields sets of sources, in the order in which to look for the kernel there."""
    known = list(machine_sources())
    own = own_suite({source.suite for source in known})
    yield [s for s in known if s.suite == own or s.suite.startswith(f"{own}-")]
    if newer:
        base = next(source for source in known if source.suite == own)
        for suites in NEWER_SUITES:
            yield [replace(base, suite=suite) for suite in suites]


def own_suite(suites: set[str]) -> str:
    """Returns the name by which the machine's sources call the machine's release."""
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    for name in (codename, "oldstable", "stable", "testing", "unstable", "sid"):
        if name in suites:
            return name
    raise LabError(f"the apt sources have no suite for this machine ({codename or 'no codename'})")


def machine_sources() -> Iterator[Source]:
    """Yields every binary source of the machine, from files in both of apt's formats."""
    etc = Path("/etc/apt")
    for file in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if file.suffix == ".sources":
            yield from deb822(file.read_text())
        elif file.suffix == ".list" and file.exists():
            yield from one_line(file.read_text())


def deb822(text: str) -> Iterator[Source]:
    """Yields the sources in a `.sources` file."""
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    for stanza in re.split(r"\n\s*\n", text):
        found = re.findall(r"^([\w-]+):[ \t]*(.*(?:\n[ \t].*)*)", stanza, flags=re.MULTILINE)
        field = {name.lower(): value for name, value in found}
        if "deb" in field.get("types", "").split() and field.get("enabled", "yes") != "no":
            trust = "".join(f"{n}: {field[n]}\n" for n in ("signed-by", "trusted") if n in field)
            for uri in field["uris"].split():
                for suite in field["suites"].split():
                    yield Source(uri, suite, field.get("components", ""), trust)


def one_line(text: str) -> Iterator[Source]:
    """Yields the sources in a `.list` file."""
    entry = re.compile(r"^deb[ \t]+(?:\[(.*?)\][ \t]+)?(\S+)[ \t]+(\S+)([^#\n]*)", re.MULTILINE)
    for options, uri, suite, components in entry.findall(text):
        trust = re.findall(r"(signed-by|trusted)=(\S+)", options)
        yield Source(uri, suite, components, "".join(f"{n}: {value}\n" for n, value in trust))


def candidate(world: Path, sources: list[Source], package: str) -> str:
    """Makes apt's private world from those sources; returns their version of the package."""
    for folder in ("lists/partial", "archives/partial", "sources"):
        (world / folder).mkdir(parents=True, exist_ok=True)
    (world / "status").touch()  # nothing is installed here, so every dependency is downloaded
    suite = sources[0].suite
    release = suite if suite.endswith("-backports") else ""
    (world / "apt.conf").write_text(APT_CONF.format(world=world, release=release))
    (world / "sources" / "lab.sources").write_text("\n".join(map(str, sources)))
    try:
        apt(world, "apt-get", "update")
    except LabError as error:
        say(str(error))
        return ""
    policy = apt(world, "apt-cache", "policy", package)
    version = re.search(r"Candidate: (\d\S*)", policy)
    return version[1] if version else ""


def apt(world: Path, program: str, *arguments: str) -> str:
    """Runs an apt program in the private world; returns what it printed."""
    return run(program, "-q", "-c", str(world / "apt.conf"), *arguments)


def at_least(version: str, wanted: str) -> bool:
    """Compares versions as dpkg does."""
    comparison = ("dpkg", "--compare-versions", version, "ge", wanted)
    return subprocess.run(comparison, check=False).returncode == 0


def join_to_libc(root: Path, home: Path, pattern: str) -> Path:
    """Joins a program to the libc that was unpacked with it; returns where it is in `root`.

    The machine's may be older. Starting the program through the loader wouldn't do for a kernel
    that executes itself again. `root` will become `home`, whose paths it gets.
    """
    program = unpacked(root, pattern)
    loader = unpacked(root, "ld-linux*.so*")
    folders = [f"{lib}/{loader.parent.name}" for lib in ("usr/lib", "lib")]
    final = ":".join(str(home / folder) for folder in folders)
    words = ("--set-interpreter", str(home / loader.relative_to(root)), "--set-rpath", final)
    run(*through_loader(root, "bin/patchelf"), *words, str(program))
    return program.relative_to(root)


def through_loader(root: Path, pattern: str) -> list[str]:
    """Returns the words that start a program before `root` has become its home."""
    loader = unpacked(root, "ld-linux*.so*")
    folders = (root / lib / loader.parent.name for lib in ("usr/lib", "lib"))
    libraries = ":".join(map(str, folders))
    return [str(loader), "--library-path", libraries, str(unpacked(root, pattern))]


def unpacked(root: Path, pattern: str) -> Path:
    """Returns the program of that name; suites differ in whether it is below usr/ or not."""
    for file in root.rglob(pattern):
        if file.is_file() and not file.is_symlink() and os.access(file, os.X_OK):
            return file
    raise LabError(f"the packages contain no {pattern}")


def run(*command: str, cwd: Path | None = None) -> str:
    """Runs a command; returns what it printed, which a failure carries in its message."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            check=False,
            cwd=cwd,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except FileNotFoundError as error:
        raise LabError(f"{command[0]} is missing on this machine") from error
    if done.returncode:
        raise LabError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


def say(text: str) -> None:
    """Prints a line about the lab's own doings, on stderr."""
    print(f"lab: {text}", file=sys.stderr, flush=True)
