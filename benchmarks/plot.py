"""A picture of a report: `python -m benchmarks.plot JSON PNG`.

A panel a benchmark, a line a contender. Apart from the driver, whose kernel may be an emulated one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from .results import Report, Row, readable_size

mpl.use("agg")


def draw(report: Report, path: Path) -> None:
    """Writes a PNG.

    Args:
        report: Its rows, of any number of benchmarks.
        path: Where to.
    """
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        panels.setdefault((row.bench, row.unit), []).append(row)
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(11, 5.5 * len(panels)), squeeze=False, layout="constrained"
    )
    for axis, ((bench, unit), rows) in zip(axes[:, 0], panels.items(), strict=True):
        for number, contender in enumerate(dict.fromkeys(row.contender for row in rows)):
            mine = sorted((r for r in rows if r.contender == contender), key=lambda row: row.size)
            ours = contender.startswith("Socket.")
            axis.errorbar(
                [row.size for row in mine],
                [row.median for row in mine],
                yerr=[
                    [row.median - min(row.figures) for row in mine],
                    [max(row.figures) - row.median for row in mine],
                ],
                label=contender,
                linewidth=2.5 if ours else 1.2,
                linestyle="-" if ours else "--",
                marker="os^vD<>ph*XP"[number % 12],
                markersize=4,
                capsize=2,
            )
        sizes = sorted({row.size for row in rows})
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [readable_size(size) for size in sizes])
        axis.set_yscale("log")
        axis.set_ylabel(unit)
        axis.set_title(report.titles[bench], loc="left")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    about = ", ".join(report.machine[name] for name in ("kernel", "cpu"))
    figure.suptitle(f"{about}; medians, least and most of {len(report.rows[0].figures)} passes")
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    draw(Report.load(Path(sys.argv[1])), Path(sys.argv[2]))
