"""Thousands of connections at once, some stalling, some dying: nobody else sees it, nothing stays.

Each crowd has a process of its own, which this file is as a program, so that its memory is, too.
(User-Mode Linux maps a process's pages one by one; a process may have 65530 mappings below it.)
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import random
import resource
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pytest

from ktls import aio

from .aio_kit import place, run
from .conftest import MODES, Identity, stdlib_context
from .test_aio_server import LOCALHOST, ask, echo, port_of

__all__ = ["place"]  # a fixture


@pytest.mark.parametrize(
    ("count", "few", "seconds"),
    [
        (60, 6, 55),
        pytest.param(2000, 200, 850, marks=[pytest.mark.torture, pytest.mark.timeout(900)]),
    ],
)
def test_crowd(identity: Identity, place: str, count: int, few: int, seconds: int) -> None:
    """With warnings as errors, and asyncio's debug mode on."""
    words = map(str, (place, *astuple(identity), count, few, seconds))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", __spec__.name, *words],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        timeout=seconds + 10,
        check=False,
    )
    assert not done.stderr, done.stderr
    assert done.returncode == 0


@dataclass
class Held:
    """What a process has: none of it may stay behind."""

    descriptors: int
    tasks: int
    heap: int  # bytes that malloc has given out
    blocks: int  # that Python's own allocator has

    @classmethod
    def now(cls) -> Held:
        """Of this process."""
        gc.collect()
        info = _libc.mallinfo2()
        return cls(
            len(os.listdir("/proc/self/fd")),
            len(asyncio.all_tasks()),
            info.uordblks + info.hblkhd,
            sys.getallocatedblocks(),
        )


class _Info(ctypes.Structure):
    """``struct mallinfo2`` of <malloc.h>."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks")),
        ("keepcost", ctypes.c_size_t),
    ]
    uordblks: int
    hblkhd: int


_libc: Any = ctypes.CDLL(None)
_libc.mallinfo2.restype = _Info


class Crowd:
    """Clients of one echo server, in the same loop."""

    def __init__(self, port: int, client: ssl.SSLContext, count: int, few: int) -> None:
        """So many, of which few stall and as many die."""
        self.port, self.client, self.few = port, client, few
        self.good = count - 2 * few
        self.random = random.Random(4)  # noqa: S311 - it must repeat
        self.together = asyncio.Semaphore(200)  # handshakes: the listener's queue is no deeper
        self.arrived = 0
        self.everybody, self.over = asyncio.Event(), asyncio.Event()

    async def come_and_go(self) -> None:
        """All others get their answers, at a time when everybody is there."""
        stalled = [asyncio.ensure_future(self.stall()) for _ in range(self.few)]
        behaving = (self.behave() for _ in range(self.good))
        await asyncio.gather(*behaving, *(self.die() for _ in range(self.few)))
        self.over.set()
        await asyncio.gather(*stalled)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection."""
        async with self.together:
            return await asyncio.open_connection(
                LOCALHOST, self.port, ssl=self.client, server_hostname="localhost"
            )

    async def stall(self) -> None:
        """Begins a handshake."""
        with socket.create_connection((LOCALHOST, self.port)) as sock:
            sock.sendall(b"\x16\x03\x01")
            await self.over.wait()

    async def die(self) -> None:
        """At any moment."""
        reader, writer = await self.connect()
        with suppress(OSError, asyncio.IncompleteReadError):
            for _ in range(self.random.randrange(5)):
                writer.write(bytes(self.random.randrange(1, 100000)))
                await reader.readexactly(1)
        writer.transport.abort()

    async def behave(self) -> None:
        """Asks twice."""
        reader, writer = await self.connect()
        self.arrived += 1
        if self.arrived == self.good:
            self.everybody.set()
        await self.everybody.wait()
        for _ in range(2):
            question = self.random.randbytes(self.random.randrange(1, 20000))
            writer.write(question)
            assert await reader.readexactly(len(question)) == question
        writer.close()
        await writer.wait_closed()


async def main(server: ssl.SSLContext, client: ssl.SSLContext, count: int, few: int) -> None:
    """The crowd, and a quarter of it once more: what that leaves behind is lost."""
    serving = await asyncio.start_server(echo, LOCALHOST, 0, ssl=server, backlog=500)
    port, again, tasks = port_of(serving), count // 4, len(asyncio.all_tasks())
    async with serving:
        assert await ask(port, client) == b"hello"
        await gone(lambda: len(asyncio.all_tasks()) == tasks)
        at_first = Held.now()
        await Crowd(port, client, count, few).come_and_go()
        before = await left_by_then(at_first)
        await Crowd(port, client, again, few // 4).come_and_go()
        after = await left_by_then(at_first)
    # asyncio keeps a hundred timers that were cancelled, each with debug mode's traceback.
    assert after.heap - before.heap < 60000 + again * 40, f"{before} -> {after}"
    assert after.blocks - before.blocks < 8000 + again, f"{before} -> {after}"
    await serving.wait_closed()


async def left_by_then(at_first: Held) -> Held:
    """What is there when descriptors and tasks are as few as before."""
    await gone(lambda: len(os.listdir("/proc/self/fd")) == at_first.descriptors)
    await gone(lambda: len(asyncio.all_tasks()) == at_first.tasks)
    return Held.now()


async def gone(done: Callable[[], bool]) -> None:
    """Waits for the echoes of those who died."""
    while not done():
        await asyncio.sleep(0.01)


if __name__ == "__main__":
    where, chain, key, authority, *numbers = sys.argv[1:]
    crowd_size, few_of_it, limit = map(int, numbers)
    logging.getLogger("ktls").setLevel(logging.ERROR)  # that it is in userspace, it warns
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    pem = Identity(Path(chain), Path(key), Path(authority))
    options: Any = MODES[where]
    run(
        lambda: main(
            stdlib_context(pem, server_side=True),
            stdlib_context(pem, server_side=False),
            crowd_size,
            few_of_it,
        ),
        factory=lambda: aio.EventLoop(ktls_options=options),
        limit=limit,
    )
