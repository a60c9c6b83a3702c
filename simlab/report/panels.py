"""Panels placed by hand: curves with their bands and laws, axes with plain ticks, titles.

Axes are placed in inches and ticks are plain texts: matplotlib's layout engines and formulas would take
half of a run's time after its verdict (measured).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    Locator,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from simlab.analysis.curve import basis, given_in, laws_in
from simlab.analysis.numbers import raised
from simlab.report.colours import COLOURS
from simlab.report.seeds import SeedArray, SeedTable, longest, over_seeds, x_of

INK, DIM, GRID = "#1a1d21", "#59616b", "#ecebe6"
# Behind a text over lines.
HALO = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.2}


TEETH = 8  # teeth of a saw-tooth that can be told apart


def first_teeth(frame: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The rows up to the eighth re-norm, and a note that says so; all rows where there are no more."""
    if frame.empty:
        return frame, ""
    at = sorted(set(frame.loc[frame["kind"] == "renorm", "sublayer"]))
    if len(at) <= TEETH or given_in(frame):
        return frame, ""
    note = (
        f"Drawn up to the {TEETH}th of {len(at)} re-norms; curve.csv and report.html have them all."
    )
    return frame[frame["sublayer"] <= at[TEETH - 1]], note


class Steps:
    """A run's curves as arrays (seeds, steps), by curve and column; NaN where a curve has ended."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.names = list(dict.fromkeys(frame["curve"]))
        self.rows = {name: frame[frame["curve"] == name] for name in self.names}
        self.base, self.given = basis(frame), given_in(frame)
        self.tables = {name: SeedTable(rows) for name, rows in self.rows.items()}
        steps = max(map(longest, self.rows.values()), key=len)
        self.kinds = steps["kind"].tolist()
        self.x = x_of(steps).to_numpy(np.float64)

    def __call__(self, name: str, column: str) -> SeedArray:
        """A column of the curve ``name``."""
        values = self.tables[name][column]
        more = len(self.x) - values.shape[1]
        return np.pad(values, ((0, 0), (0, more)), constant_values=np.nan)

    def mean(self, name: str, column: str) -> SeedArray:
        """Over the seeds that reach a step; NaN where none does."""
        return over_seeds(np.nanmean, self(name, column))

    def has(self, column: str) -> bool:
        """True if some curve has a number in this column."""
        return any(column in rows and rows[column].notna().any() for rows in self.rows.values())

    def first_renorm(self) -> int:
        """The step of the first re-norm, or the number of steps."""
        return self.kinds.index("renorm") if "renorm" in self.kinds else len(self.kinds)


def write_at(
    figure: Figure, x: float, y: float, text: str, *, size: float, colour: str = INK,
    weight: str = "normal", ha: str = "left",
) -> None:  # fmt: skip
    """A text at inches from the lower left corner."""
    width, height = figure.get_size_inches()
    figure.text(x / width, y / height, text, fontsize=size, color=colour, weight=weight, ha=ha)


def plain(value: float, _: int | None = None) -> str:
    """A tick's text, to three digits: ``10³``, ``2.5·10⁻⁴``, ``30``."""
    if value == 0:
        return "0"
    if 1e-2 <= abs(value) < 1e4:
        return f"{value:g}".replace("-", "−")
    digits, exponent = f"{value:.2e}".split("e")
    digits = digits.rstrip("0").rstrip(".")
    power = f"10{raised(int(exponent))}"
    return {"1": power, "-1": f"−{power}"}.get(digits, f"{digits.replace('-', '−')}·{power}")


def panel(
    figure: Figure, box: tuple[float, float, float, float], title: str, under: str, log: bool = False
) -> Axes:  # fmt: skip
    """Axes at inches (left, bottom, width, height), with a title (or none) that says what is seen.

    under: one line or two below the title.
    """
    width, height = figure.get_size_inches()
    x, y, w, h = box
    ax = figure.add_axes((x / width, y / height, w / width, h / height))
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#b5b5b0")
    ax.set_axisbelow(True)
    ax.grid(color=GRID, lw=0.8)
    ax.tick_params(colors=DIM, labelsize=8.5, length=0)
    if title:
        *above, last = (under + (", log axis" if log else "")).split("\n")
        for i, line in enumerate([last, *reversed(above)]):
            write_at(figure, x, y + h + 0.1 + 0.16 * i, line, size=8.5, colour=DIM)
        write_at(figure, x, y + h + 0.29 + 0.16 * len(above), title, size=10, weight="bold")
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter(FuncFormatter(plain))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return ax


def log_locator(low: float, high: float) -> Locator:
    """Round ticks for a log axis from ``low`` to ``high``, two or more also within a decade."""
    decades = math.log10(high / low)
    if decades < 0.4:  # there may be one of subs alone: as on a linear axis
        return MaxNLocator(4, steps=[1, 2, 5, 10])
    subs: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    if decades > 0.8:
        subs = (1.0,) if decades > 3 else (1.0, 2.0, 5.0)
    return LogLocator(subs=subs, numticks=7 if decades > 3 else 12)


def log_ticks(ax: Axes) -> None:
    """Round ticks for what a log axis now spans: 5 % or more, so that three digits tell them apart."""
    low, high = ax.get_ylim()
    if high < 1.05 * low:
        middle = math.sqrt(low * high)
        low, high = ax.set_ylim(middle / 1.025, middle * 1.025)
    ax.yaxis.set_major_locator(log_locator(low, high))


def apart(at: Sequence[float], heights: Sequence[float], top: float) -> list[float]:
    """Places of labels beside their lines' ends, moved so that none overlaps another.

    at: where they belong, ascending. heights: theirs. top: the highest place. All in one unit.
    """
    places = list(at)
    for i in range(1, len(places)):  # upwards, then back down from the top
        places[i] = max(places[i], places[i - 1] + (heights[i] + heights[i - 1]) / 2)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], top)
        top = places[i] - (heights[i] + heights[i - 1]) / 2
    return places


LABEL = (0.44, 0.09)  # width and height of a label's two lines, of the large panel's axes: measured


def free_place(ax: Axes, at: float, side: int) -> tuple[float, float]:
    """Where a LABEL beside ``at`` begins, and its top as a share of the axes: no line passes it.

    The axes are linear, from 0. The nearest place to ``at`` and of these the highest, below the curves'
    names; at the line itself where none is free. side: 1 for a label to the right of ``at``, or −1.
    """
    (_, last), (_, top) = ax.get_xlim(), ax.get_ylim()
    wide, high = LABEL[0] * last, LABEL[1]
    for start in at + side * last * np.arange(0, 0.5, 0.05):
        x = np.linspace(start, start + side * wide, 50)
        if not 0 <= x[-1] <= last:
            break
        drawn = (np.asarray(line.get_data(), np.float64) for line in ax.get_lines())
        lines = [np.interp(x, each[0], each[1], np.nan, np.nan) / top for each in drawn]
        for y in (0.86, 0.74, 0.62, 0.5, 0.38, 0.26):
            if not any(((y - high < line) & (line < y + 0.01)).any() for line in lines):
                return float(start), y
    return at, 0.86


def name_ends(ax: Axes, names: Sequence[tuple[float, str, str, str]]) -> None:
    """Lines' names right of axes 4.1 inches high, each at its line's end, moved where they'd overlap.

    names: a line's last value, its name (further lines of it smaller), colour and weight. The axes'
    limits are final.
    """
    placed = sorted((n for n in names if math.isfinite(n[0])), key=lambda n: n[0])
    heights = [0.042 * (text.count("\n") + 1) + 0.018 for _, text, *_ in placed]
    to_axes = (ax.transData - ax.transAxes).transform
    at = [float(np.clip(to_axes((1.0, value))[1], 0.0, 1.0)) for value, *_ in placed]
    for y, (_, text, colour, weight) in zip(apart(at, heights, 1.0), placed, strict=True):
        first, *others = text.split("\n")
        offset = 0.021 * len(others)
        put = functools.partial(ax.text, 1.015, transform=ax.transAxes, color=colour, va="center")
        put(y + offset, first, fontsize=9, weight=weight)
        for i, line in enumerate(others, start=1):
            put(y + offset - 0.042 * i, line, fontsize=8)


def draw_seeds(
    ax: Axes, steps: Steps, column: str, change: Callable[[SeedArray], SeedArray] = lambda y: y,
    lw: float = 2.0,
) -> None:  # fmt: skip
    """Each curve's mean over its seeds, and the band from the least to the most."""
    for name in steps.names:
        if column not in steps.rows[name]:
            continue
        y = change(steps(name, column))
        known = np.isfinite(y).any(0)
        x, y = steps.x[known], y[:, known]
        if y.size == 0:
            continue
        if len(y) > 1:
            low, high = over_seeds(np.nanmin, y), over_seeds(np.nanmax, y)
            ax.fill_between(x, low, high, color=COLOURS[name], alpha=0.2, lw=0)
        ax.plot(x, over_seeds(np.nanmean, y), color=COLOURS[name], lw=lw, zorder=3)


def draw_laws(
    ax: Axes, steps: Steps, change: Callable[[SeedArray], SeedArray] = lambda y: y
) -> dict[str, SeedArray]:  # fmt: skip
    """The laws of the random inits (or of the checkpoint alone), above the curves, by their names.

    √2 per sublayer starts anew at each re-norm: it is drawn up to the first one.
    """
    drawn = {}
    own = steps.rows[steps.base]
    most = float(own["mean_square"].max())
    for law in laws_in(own):
        if steps.base == "theory" and law.name == "mean_field":
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            y = change(np.minimum(steps.mean(steps.base, law.column), 1e300))
        if not law.expected:
            y = np.where(np.arange(len(y)) < steps.first_renorm(), y, np.nan)
        drawn[law.name] = y
        shown = np.minimum(y, change(np.array(1e6 * most)))  # off the axis, within float64
        ax.plot(steps.x, shown, color=law.colour, ls=law.line, lw=1.6, zorder=4)
    return drawn
