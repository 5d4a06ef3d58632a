"""One way to measure servers: each is verified first, then all take turns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import ktls

from .contenders import NGINX, Server, running, workplace
from .peer import Link, discard, verify
from .results import Row


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        runs: How many passes.
        batch: About how many bytes a pass moves, by one operation or many.
        most: How many operations a pass makes at the most.
        smallest: Sizes below this are left out.
        largest: Sizes beyond this are left out.
        clocks: ``wall`` is the time that passes; ``cpu`` the server's CPU time, less that of a pass
            with one operation: the connection's own cost is in both.
        only: Contenders to measure, by their programs or labels; none means all.
    """

    runs: int = 7
    batch: int = 1 << 26
    most: int = 2000
    smallest: int = 0
    largest: int = 1 << 30
    clocks: Sequence[str] = ("wall",)
    only: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Contender:
    """Who does what.

    Attributes:
        label: In the table.
        server: The program.
        operation: What it is asked for.
    """

    label: str
    server: str
    operation: str


@dataclass(frozen=True)
class Unit:
    """What the figures are.

    Attributes:
        name: Of the unit.
        of: A figure from the seconds and bytes of an operation.
        more_is_better: Which way is better.
    """

    name: str
    of: Callable[[float, int], float]
    more_is_better: bool = True


REQUESTS = Unit("requests/s", lambda seconds, _size: 1 / seconds)
MEGABYTES = Unit("MB/s", lambda seconds, size: size / seconds / 1e6)
MICROSECONDS = Unit("us each", lambda seconds, _size: seconds * 1e6, False)


@dataclass(frozen=True)
class Load:
    """What one pass consists of.

    Attributes:
        links: Connections at once.
        count: Operations on each.
        size: Bytes of each operation.
    """

    links: int
    count: int
    size: int


@dataclass(frozen=True)
class Latency:
    """What a part of the operations isn't slower than.

    Attributes:
        part: How many of 1000.
    """

    part: int

    @property
    def unit(self) -> Unit:
        """Of its figures."""
        return Unit(f"us, p{self.part / 10:g}", MICROSECONDS.of, more_is_better=False)

    def of(self, seconds: Sequence[float]) -> float:
        """The least of them that so many aren't above."""
        rank = -(-len(seconds) * self.part // 1000)
        return sorted(seconds)[max(0, rank - 1)]


LATENCIES = (Latency(500), Latency(990), Latency(999))

Work = Callable[[Server, Link, str, Load], float]
WorkOnAll = Callable[[Server, Sequence[Link], str, Load], tuple[float, Sequence[float]]]
Check = Callable[[Server, Link, str, Load], bool]


def send(server: Server, link: Link, operation: str, load: Load) -> float:
    """Has it send, and discards that; returns the seconds."""
    return discard(link, server.request(operation, load.count, load.size))


def check_sent(server: Server, link: Link, operation: str, load: Load) -> bool:
    """Has it send, not as often, and looks at all of it."""
    count = 1 if server.name in NGINX or load.size > 1 << 20 else min(load.count, 3)
    file = server.directory / str(load.size)
    return verify(link, server.request(operation, count, load.size), file, count)


@dataclass(frozen=True)
class Bench:
    """One benchmark.

    Attributes:
        name: On the command line, and in the results.
        title: What it is, in a line.
        ours: The label of the contender that the others are compared with.
        contenders: All of them.
        sizes: What is varied.
        load: A pass, by the size and the settings.
        unit: Of its figures.
        work: Makes a pass on one connection; all have their threads.
        work_on_all: Makes it on all connections, instead of work; tells each operation's seconds,
            too, of which `LATENCIES` are taken.
        check: Makes a pass on one connection whose bytes are compared.
    """

    name: str
    title: str
    ours: str
    contenders: Sequence[Contender]
    sizes: Sequence[int]
    unit: Unit = MEGABYTES
    load: Callable[[int, Settings], Load] = lambda size, settings: Load(
        1, max(1, min(settings.most, settings.batch // size)), size
    )
    work: Work = send
    work_on_all: WorkOnAll | None = None
    check: Check = check_sent

    def chosen(self, settings: Settings) -> list[Contender]:
        """Those that are to be measured."""
        only = set(settings.only)
        return [one for one in self.contenders if not only or {one.label, one.server} & only]

    def run(self, settings: Settings) -> list[Row]:
        """Measures all contenders at all sizes, a pass of each in turn."""
        chosen = self.chosen(settings)
        loads = {
            size: self.load(size, settings)
            for size in self.sizes
            if settings.smallest <= size <= settings.largest
        }
        if "cpu" in settings.clocks:
            loads = {size: replace(load, count=max(2, load.count)) for size, load in loads.items()}
        rows = []
        names = dict.fromkeys(one.server for one in chosen)
        with (
            workplace({load.size for load in loads.values()}) as directory,
            running(names, directory) as servers,
        ):
            for size, load in loads.items():
                print(f"{self.name}: {size}, {load}", file=sys.stderr, flush=True)
                rows += self._measure(chosen, servers, settings, size, load)
        return rows

    def _measure(
        self,
        chosen: Sequence[Contender],
        servers: dict[str, Server],
        settings: Settings,
        size: int,
        load: Load,
    ) -> list[Row]:
        facts = {one: self._verify(servers[one.server], one, load) for one in chosen}
        passes: dict[Contender, list[dict[Unit, float]]] = {one: [] for one in chosen}
        for _ in range(settings.runs):
            for one in chosen:
                passes[one].append(self._pass(servers[one.server], one, load, settings.clocks))
        return [
            Row(
                bench=self.name,
                contender=one.label,
                size=size,
                unit=unit.name,
                figures=[unit.of(each[unit], load.size) for each in passes[one]],
                more_is_better=unit.more_is_better,
                verified=facts[one][0],
                offload=facts[one][1],
            )
            for unit in dict.fromkeys(unit for one in chosen for unit in passes[one][0])
            for one in chosen
        ]

    def _verify(self, server: Server, one: Contender, load: Load) -> tuple[bool, str]:
        """Whether the bytes are right, and whether the kernel made the records."""
        counter = "TlsRxSw" if one.operation.startswith("recv") else "TlsTxSw"
        before = ktls.stats().get(counter, 0)
        link = server.connect(one.operation)
        with link.sock:
            right = self.check(server, link, one.operation, load)
        in_kernel = ktls.stats().get(counter, 0) > before
        plain = one.operation == "plain"
        return right, "" if plain else "kernel" if in_kernel else "process"

    def _pass(
        self, server: Server, one: Contender, load: Load, clocks: Sequence[str]
    ) -> dict[Unit, float]:
        """Seconds of an operation, by each clock."""
        wall, cpu, each = self._run(server, one, load)
        seconds = {}
        if "wall" in clocks:
            seconds[self.unit] = wall / load.links / load.count
            seconds |= {latency.unit: latency.of(each) for latency in LATENCIES if each}
        if "cpu" in clocks:
            _, once, _ = self._run(server, one, replace(load, count=1))
            of_cpu = replace(self.unit, name=self.unit.name + " of the server's CPU")
            # Some kernels count CPU time in ticks: there may have been none.
            seconds[of_cpu] = max(cpu - once, 1e-9) / load.links / (load.count - 1)
        return seconds

    def _run(
        self, server: Server, one: Contender, load: Load
    ) -> tuple[float, float, Sequence[float]]:
        """Seconds that passed, that the server's CPU time grew by, and of each operation."""
        with ExitStack() as stack:
            links = [server.connect(one.operation) for _ in range(load.links)]
            for link in links:
                stack.enter_context(link.sock)
            before = server.cpu()
            wall, each = (self.work_on_all or self._in_threads)(server, links, one.operation, load)
            return wall, server.cpu() - before, each

    def _in_threads(
        self, server: Server, links: Sequence[Link], operation: str, load: Load
    ) -> tuple[float, Sequence[float]]:
        with ThreadPoolExecutor(load.links) as pool:
            works = [pool.submit(self.work, server, link, operation, load) for link in links]
            return max(work.result() for work in works), ()
