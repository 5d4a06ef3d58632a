"""Runs tests of other projects, in a process of their own whose event loops are all ours.

usage: python tests/borrowed.py fetch     the sources of the frameworks, beside their packages

and, for the tests here, ``run unittest|pytest OPTIONS ARGUMENTS...``, where OPTIONS are those of
`ktls.wrap`, as JSON. What came of it is the last line of the output.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import unittest
from asyncio import unix_events
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

import ktls
from ktls import aio

FRAMEWORKS = ("aiohttp", "uvicorn")
_OUTCOME = "outcome: "


# -- from the tests here ---------------------------------------------------------------------------


def run(
    runner: str,
    arguments: Iterable[str],
    *,
    place: str,
    limit: float,
    directory: Path | None = None,
) -> set[str]:
    """Runs tests. None may fail, and their TLS must be ours, where it is to be.

    Args:
        runner: ``unittest`` or ``pytest``.
        arguments: The names of tests; for pytest also its options.
        place: ``kernel`` or ``userspace``.
        limit: In seconds.
        directory: Where to run it.

    Returns:
        The names of those that passed.
    """
    kernel = place == "kernel"
    options = {"tx": kernel, "rx": kernel}
    counted = ktls.stats().get("TlsTxSw", 0)
    outcome = _outcome([runner, json.dumps(options), *arguments], limit, directory)
    connections = outcome["connections"]
    assert connections > 0
    if kernel:
        assert ktls.stats()["TlsTxSw"] - counted >= outcome["sending"]
        # Of one whose peer closes it at once there may be nothing left to hand over.
        assert min(outcome["sending"], outcome["receiving"]) > 0.8 * connections
    else:
        assert outcome["sending"] == outcome["receiving"] == 0
    return set(outcome["passed"])


def _outcome(arguments: list[str], limit: float, directory: Path | None) -> dict[str, Any]:
    """Runs this file, and kills whatever is left of it."""
    process = subprocess.Popen(
        [sys.executable, __file__, "run", *arguments],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"not over after {limit} seconds:\n{output}") from None
    assert process.returncode == 0, output
    outcome: dict[str, Any] = json.loads(output.rpartition(_OUTCOME)[2])
    return outcome


def sources(name: str) -> Path:
    """A framework's own tests, of the version that is installed; fetched if they aren't there."""
    version = importlib.metadata.version(name)
    home = Path(sys.prefix, "borrowed")
    found = home / f"{name}-{version}"
    if not found.exists():
        assert "KTLS_LAB" not in os.environ, f"the lab has no network to fetch {found}: make build"
        home.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            _fetch(name, version, Path(scratch))
            Path(scratch, found.name).rename(found)
    return found


def _fetch(name: str, version: str, scratch: Path) -> None:
    """By pip, which knows the machine's index; it wants to know a source's name, not to build."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    subprocess.run([*pip, "--no-binary", name, f"{name}=={version}"], check=True)
    (archive,) = scratch.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        for member in packed.getmembers():
            path = PurePosixPath(member.name)
            if member.isreg() and path.parts[1:2] == ("tests",) and ".." not in path.parts:
                packed.extract(member, scratch, filter="data")


# -- in the process of their own -------------------------------------------------------------------


def install(options: aio.WrapOptions) -> Counter[str]:
    """Makes every new loop ours; counts its TLS connections."""
    counts = Counter(connections=0, sending=0, receiving=0)

    class Loop(aio.EventLoop):
        """Ours, with options."""

        def __init__(self, selector: Any = None) -> None:  # noqa: ANN401
            super().__init__(selector, ktls_options=options)

    begin = aio.Transport.begin

    def counting(self: aio.Transport, **keywords: Any) -> None:  # noqa: ANN401
        counts["connections"] += 1
        counts["sending"] += self.get_extra_info("ktls_send_enabled")
        counts["receiving"] += self.get_extra_info("ktls_recv_enabled")
        begin(self, **keywords)

    aio.Transport.begin = counting  # type: ignore[method-assign]
    for module in (asyncio, unix_events):
        for name in ("SelectorEventLoop", "EventLoop"):
            if hasattr(module, name):
                setattr(module, name, Loop)
    for name in ("DefaultEventLoopPolicy", "_DefaultEventLoopPolicy"):
        if hasattr(unix_events, name):
            getattr(unix_events, name)._loop_factory = Loop
    loop = asyncio.new_event_loop()
    loop.close()
    assert type(loop) is Loop
    return counts


def adapt() -> None:
    """Gives tests what they expect of asyncio's transports, or uvloop's, beside what they test."""
    aio.Transport.__name__ = "SSLTransport"  # test_ssl and test_events look for "ssl" in it
    # aiohttp's test_connector, of uvloop's transports
    context = property(lambda self: self.get_extra_info("sslcontext"))
    aio.Transport._sslcontext = context  # type: ignore[attr-defined]


def run_unittest(names: list[str]) -> tuple[int, list[str]]:
    """Runs tests by name; returns an exit status and which passed."""
    passed = []

    class Result(unittest.TextTestResult):
        def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
            super().addSuccess(test)
            passed.append(test.id())

    suite = unittest.defaultTestLoader.loadTestsFromNames(names)
    _make_room()
    runner = unittest.TextTestRunner(sys.stdout, verbosity=2)
    runner.resultclass = Result  # type: ignore[assignment]
    result = runner.run(suite)
    return int(not result.wasSuccessful()), passed


def _make_room() -> None:
    """test_sendfile sets a buffer's size by a socket that create_connection took over.

    asyncio goes on using that object, ktls moves the descriptor to one of its own.
    """
    tests = getattr(sys.modules.get("test.test_asyncio.test_sendfile"), "SendfileTestsBase", None)
    if tests is None:
        return
    original = tests.reduce_send_buffer_size

    def reduce(self: Any, sock: Any, transport: Any = None) -> None:  # noqa: ANN401
        if transport is not None:
            sock = transport.get_extra_info("socket")
        original(self, sock, transport)

    tests.reduce_send_buffer_size = reduce


def run_pytest(arguments: list[str]) -> tuple[int, list[str]]:
    """Runs pytest without a configuration; returns its exit status and what passed."""
    passed = []

    class Plugin:
        @pytest.hookimpl
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" and report.passed:
                passed.append(report.nodeid)

    own = ["-c", os.devnull, "--rootdir", ".", "-W", "ignore", "-v"]
    quick = ["--assert=plain", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    return int(pytest.main([*own, *quick, *arguments], plugins=[Plugin()])), passed


def main(command: str, *arguments: str) -> int:
    """Does what is asked for."""
    if command == "fetch":
        for name in FRAMEWORKS:
            print(sources(name))
        return 0
    runner, options, *rest = arguments
    sys.path[0] = os.getcwd()  # theirs has a package `tests`, too
    counts = install(json.loads(options))
    adapt()
    status, passed = {"unittest": run_unittest, "pytest": run_pytest}[runner](rest)
    sys.stdout.flush()
    print(f"\n{_OUTCOME}{json.dumps({'passed': passed, **counts})}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
