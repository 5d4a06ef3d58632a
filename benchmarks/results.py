"""What was measured: rows, ratios within one run, a table, a JSON file, a picture."""

from __future__ import annotations

import json
import os
import platform
import ssl
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path

from OpenSSL import SSL

WIDE = 0.2  # a spread beyond which a median says little


@dataclass(frozen=True)
class Row:
    """One contender at one size.

    Attributes:
        bench: Which benchmark.
        contender: Who.
        size: What the benchmark varies; bytes, or connections.
        unit: Of the figures.
        figures: One a pass, in the order of the passes, which all contenders of a size share.
        more_is_better: Which way is better.
        verified: Whether the bytes were compared; None where there are none.
        offload: Who encrypted, by the kernel's own count: ``kernel``, ``process``, or empty.
    """

    bench: str
    contender: str
    size: int
    unit: str
    figures: list[float]
    more_is_better: bool = True
    verified: bool | None = None
    offload: str = ""

    @property
    def median(self) -> float:
        """Of the figures."""
        return statistics.median(self.figures)

    @property
    def spread(self) -> float:
        """Largest less smallest, as a part of the median."""
        return (max(self.figures) - min(self.figures)) / self.median if self.median else 0.0

    def ratio(self, other: Row) -> float:
        """How many times better this is: the median of the passes' ratios."""
        pairs = zip(self.figures, other.figures, strict=True)
        ratios = [mine / theirs if theirs else 0.0 for mine, theirs in pairs]
        ratio = statistics.median(ratios)
        return ratio if self.more_is_better or not ratio else 1 / ratio


def _machine() -> dict[str, str]:
    """Kernel, CPU and versions."""
    uname = platform.uname()
    found = {
        "kernel": f"{uname.system} {uname.release} {os.environ.get('KTLS_LAB', '')}".strip(),
        "cpu": f"{_cpu()}, {len(os.sched_getaffinity(0))} of them",
        "python": platform.python_version(),
        "ssl": ssl.OPENSSL_VERSION,
        "cryptography's OpenSSL": SSL.OpenSSL_version(SSL.OPENSSL_VERSION).decode(),
    }
    for name in ("ktls", "pyOpenSSL", "cryptography", "aiofastnet", "uvloop"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "host")):
            return line.partition(":")[2].strip()
    return platform.machine()


@dataclass
class Report:
    """All rows of a run, and what they were measured on.

    Attributes:
        rows: As they come.
        machine: Kernel, CPU, versions.
        titles: Of the benchmarks, by their names.
    """

    rows: list[Row] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=_machine)
    titles: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes JSON: each row with its extremes, whatever prints it later."""
        rows = [
            {
                **asdict(row),
                "runs": len(row.figures),
                "min": min(row.figures),
                "median": row.median,
                "max": max(row.figures),
            }
            for row in self.rows
        ]
        content = {"machine": self.machine, "titles": self.titles, "rows": rows}
        path.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Reads what `save` wrote."""
        content = json.loads(path.read_text())
        names = [one.name for one in fields(Row)]
        rows = [Row(**{name: row[name] for name in names}) for row in content["rows"]]
        return cls(rows, content["machine"], content["titles"])


def tables(rows: Sequence[Row], ours: str) -> str:
    """Medians, and how many times better the library is, as Markdown.

    Args:
        rows: Of one benchmark, all sizes.
        ours: The contender that the others are compared with.
    """
    text = []
    for unit in dict.fromkeys(row.unit for row in rows):
        chosen = [row for row in rows if row.unit == unit]
        sizes = sorted({row.size for row in chosen})
        found = {(row.contender, row.size): row for row in chosen}
        head = [f"{unit}", *(readable_size(size) for size in sizes), "verified", "records by"]
        lines = [head, ["---"] * len(head)]
        for contender in dict.fromkeys(row.contender for row in chosen):
            cells = [contender]
            mine = [found[contender, size] for size in sizes if (contender, size) in found]
            for size in sizes:
                cells.append(_cell(found.get((contender, size)), found.get((ours, size))))
            right = {row.verified for row in mine}
            cells.append("NO" if False in right else "yes" if True in right else "")
            cells.append(", ".join(sorted({row.offload for row in mine})))
            lines.append(cells)
        text.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return "\n\n".join(text)


def _cell(row: Row | None, ours: Row | None) -> str:
    if row is None:
        return ""
    doubt = "~" if row.spread > WIDE else ""
    text = f"{doubt}{_number(row.median)}"
    if ours is None or ours is row:
        return text
    return f"{text} (x{ours.ratio(row):.2f})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def readable_size(size: int) -> str:
    """A size for reading; numbers below a KiB may be anything."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << power and size % (1 << power) == 0:
            return f"{size >> power} {unit}"
    return f"{size}" if size else ""


def warnings(rows: Iterable[Row]) -> list[str]:
    """What is wrong with rows."""
    found = []
    for row in rows:
        where = f"{row.bench}: {row.contender}, {readable_size(row.size)}"
        if row.spread > WIDE:
            found.append(f"{where}: the passes differ by {row.spread:.0%} of their median")
        if row.verified is False:
            found.append(f"{where}: the bytes were NOT verified")
    return found
