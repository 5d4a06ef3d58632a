"""The driver: `python -m benchmarks [BENCH...]`.

Measures, prints tables, and writes JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import (
    bench_asyncio,
    bench_handshake,
    bench_memory,
    bench_recv,
    bench_sendfile,
    bench_small,
    bench_threads,
)
from .measure import Bench, Settings
from .results import Report, tables, warnings

BENCHES: dict[str, Bench] = {
    bench.name: bench
    for bench in (
        bench_sendfile.BENCH,
        bench_small.BENCH,
        bench_recv.BENCH,
        bench_threads.BENCH,
        bench_handshake.BENCH,
        bench_memory.BENCH,
        bench_asyncio.FILES,
        bench_asyncio.DATA,
    )
}


def size(text: str) -> int:
    """Reads a number of bytes such as 64K or 1G."""
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper())
    return int(text[:-1]) * factor if factor else int(text)


def clocks() -> tuple[str, ...]:
    """Those that can be trusted: in User-Mode Linux CPU times can't."""
    uml = "User Mode Linux" in Path("/proc/cpuinfo").read_text(encoding="ascii")
    return ("wall",) if uml else ("wall", "cpu")


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("bench", nargs="*", help=f"which ones, of {', '.join(BENCHES)}; all")
    parser.add_argument("--runs", type=int, default=defaults.runs, help="passes (%(default)s)")
    parser.add_argument("--batch", type=size, default="64M", help="bytes a pass (%(default)s)")
    parser.add_argument("--most", type=int, default=defaults.most, help="operations a pass")
    parser.add_argument("--smallest", type=size, default="0", help="size (%(default)s)")
    parser.add_argument("--largest", type=size, default="1G", help="size (%(default)s)")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), action="append", help="wall, or the server's cpu; both"
    )
    parser.add_argument("--only", action="append", default=[], help="a contender's program or name")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args()
    unknown = set(options.bench) - set(BENCHES)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}")
    return options


def main() -> int:
    """Does what the command line says."""
    options = arguments()
    settings = Settings(
        runs=options.runs,
        batch=options.batch,
        most=options.most,
        smallest=options.smallest,
        largest=options.largest,
        clocks=options.clock or clocks(),
        only=options.only,
    )
    report = Report(titles={name: bench.title for name, bench in BENCHES.items()})
    print("\n".join(f"{name}: {value}" for name, value in report.machine.items()), flush=True)
    for name in options.bench or BENCHES:
        bench = BENCHES[name]
        rows = bench.run(settings)
        report.rows += rows
        print(f"\n## {bench.title}\n\n{tables(rows, bench.ours)}\n", flush=True)
        for line in warnings(rows):
            print(f"warning: {line}", flush=True)
        if options.json:
            report.save(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
