"""Draw a table of docs/benchmarks.md: python scripts/benchmark_figure.py FILE.

The table is "Beside transformers".
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from simlab.report.colours import COLOURS

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
LEFT = 0.5  # of the axis, where bars begin
ROW = re.compile(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| (s|MiB) \|$", re.MULTILINE)


def main() -> None:
    """Two bars for each row, on a log axis, with their numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="the PNG to write")
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for i, (_, *values, unit) in enumerate(rows):
        for side, value in zip((-0.2, 0.2), map(float, values), strict=True):
            colour = COLOURS["random" if side < 0 else "checkpoint"]
            ax.barh(i + side, value - LEFT, 0.36, left=LEFT, color=colour)
            ax.text(value * 1.08, i + side, f"{value:g} {unit}", va="center", size="small")
    for side, name in ((-0.2, "simlab"), (0.2, "transformers")):
        ax.text(1.1 * LEFT, side, name, va="center", color="white", size="small", weight="bold")
    ax.set(
        xscale="log",
        xlim=(LEFT, 1e5),
        yticks=range(len(rows)),
        yticklabels=[row[0] for row in rows],
    )
    ax.set_xlabel("seconds or MiB, log axis")
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(parser.parse_args().file, dpi=110)


if __name__ == "__main__":
    main()
