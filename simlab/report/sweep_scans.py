"""Figures of a sweep against what was swept: growth exponents, heat maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from simlab.analysis import LAWS
from simlab.analysis.curve import INITS, basis
from simlab.analysis.numbers import short
from simlab.report.colours import LABELS
from simlab.report.facets import (
    COLUMNS,
    ORDERED,
    PART,
    Plan,
    extent,
    grid,
    name_colours,
    numbers,
    plan,
    values_of,
)
from simlab.report.panels import log_locator, plain
from simlab.report.style import blank, finish, headed, legend
from simlab.report.values import SEEDS, key_text

_FORMULA = (
    "Growth exponents λ = ln(‖xₙ‖/‖x₁‖)/n; x₁: after the first block, xₙ: after the last of n."
)
MEASURES = {
    "lambda_token": "λ of the tokens' mean norm",
    "lambda_paper": "λ of the mean vector (paper)",
    "lambda_token_gradient": "λ of the gradient's mean norm",
    "lambda_paper_gradient": "λ of the gradient's mean vector",
}
CELLS = 12  # of a side of a heat map, up to which numbers are written


def _far_apart(column: pd.Series) -> bool:
    """True if a swept key's values are numbers that need a log axis."""
    x = numbers(column)
    return bool(x and x[0] > 0 and x[-1] >= 4 * x[0])


def _scan(ax: Axes, column: pd.Series) -> dict[str, float]:
    """Make a swept key the x axis; where each of its values lies. Numbers far apart: a log axis."""
    values = values_of(column)
    x = np.array(numbers(column) or range(len(values)), float)
    ax.set_xscale("log" if _far_apart(column) else "linear")
    some = slice(None, None, math.ceil(len(x) / 8))
    ax.xaxis.set_major_locator(FixedLocator(x[some].tolist()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels(values[some])
    ax.margins(x=0.1)
    return dict(zip(values, x.tolist(), strict=True))


def _between(values: pd.Series) -> str:
    """``between 0.02 and 145``, or one value where both are written alike."""
    ends = [short(float(value)) for value in (values.min(), values.max())]
    return ends[0] if ends[0] == ends[1] else f"between {ends[0]} and {ends[1]}"


def exponents_figure(jobs: pd.DataFrame, keys: Sequence[str], title: str) -> Figure | None:
    """Growth exponents against each numeric key, and against a checkpoint's steps; None without any.

    A part of the figure for each of these keys, with its own legend.
    """
    measures = [name for name in MEASURES if name in jobs and jobs[name].notna().any()]
    against = [key for key in keys if numbers(jobs[key]) or key in ORDERED]
    if not against or not measures:
        return None
    scans = [_scan_of(jobs, x, [key for key in keys if key != x], measures) for x in against]
    wide, high = (max(sizes) for sizes in zip(*(scan.extent for scan in scans), strict=True))
    across = len(scans) > 1 and len(scans) * high > 1.5 * wide  # else one above the other
    shape = (1, len(scans)) if across else (len(scans), 1)
    figure = blank((wide * shape[1], high * shape[0]))
    known = jobs[measures[0]].dropna()
    lines = [f"{MEASURES[measures[0]]} is {_between(known)}. {title}.", _FORMULA]
    for scan, part in zip(scans, figure.subfigures(*shape, squeeze=False).ravel(), strict=True):
        _draw_scan(scan, part, jobs)
        lines += [] if scan.notes in lines else [scan.notes]
    return headed(figure, [line for line in lines if line])


@dataclass(frozen=True)
class _Scan:
    """What λ is shown against, its panels' keys, and the rows: a job's λ of each measure shown.

    notes: what is left out.
    """

    key: str
    layout: Plan
    column: str
    row: str | None
    alike: bool | Literal["row"]
    measures: Sequence[str]
    rows: pd.DataFrame
    notes: str

    @property
    def extent(self) -> tuple[float, float]:
        """Width and height in inches."""
        return extent(self.rows, self.column, self.row, alike=self.alike)[2]


def _scan_of(jobs: pd.DataFrame, x: str, others: Sequence[str], measures: Sequence[str]) -> _Scan:
    """A panel for each measure and for the plan's column; of many panels one measure's alone."""
    layout = plan(jobs, others)
    row, notes = layout.row, list(layout.notes)
    if layout.column and (row or layout.frame[layout.column].nunique() > COLUMNS):
        notes.append(
            f"Shown against {key_text(x)}: {MEASURES[measures[0]]}; jobs.csv has the others."
        )
        measures = measures[:1]
    elif layout.column:
        row = PART
    if (layout.frame["overflow"] > 0).any():
        notes.append("There is none where a curve overflows.")
    frame = pd.concat(
        layout.frame.assign(part=MEASURES[name], value=layout.frame[name],
                          low=layout.frame[f"{name}_low"], high=layout.frame[f"{name}_high"])
        for name in measures
    )  # fmt: skip
    frame[PART] = pd.Categorical(frame[PART], [MEASURES[name] for name in measures])
    alike: bool | Literal["row"] = "row" if row == PART else bool(layout.column)
    return _Scan(
        x, layout, layout.column or PART, row, alike, measures, frame, " ".join(notes)
    )  # fmt: skip


def _draw_scan(scan: _Scan, into: SubFigure, jobs: pd.DataFrame) -> None:
    """Fill a part of the figure with one scan's panels and their legend."""
    layout, frame, x, measures = scan.layout, scan.rows, scan.key, scan.measures
    of = "·" if any("gradient" in name for name in measures) else "x"
    formula = f"λ = ln(‖{of}ₙ‖/‖{of}₁‖)/n"
    labels = (key_text(x) + (", log axis" if _far_apart(frame[x]) else ""), formula)
    _, panels = grid(frame, scan.column, scan.row, labels, alike=scan.alike, into=into)
    first = panels[0][0]
    name_colours(first, layout, "o")
    laws = [law for law in LAWS.values() if law.expected and f"lambda_token_{law.name}" in jobs]
    laws = laws if "lambda_token" in measures else []
    for law in laws:
        shade = ".3" if layout.colour else law.colour  # there it has the curves' colours
        first.plot([], [], color=shade, ls=law.line, lw=1.6, label=law.label)
    seeds = any(jobs[key].nunique() > 1 for key in SEEDS if key in jobs)
    bar = "95 % interval" + ("; of several jobs least to most" if seeds else "")
    if (frame["low"] < frame["high"]).any() or seeds:
        first.errorbar([], [], yerr=[], color=".4", ls="", capsize=2.5, label=bar)
    for end in ("low", "high"):
        frame[end] = frame[end].fillna(frame["value"])
    for ax, part in panels:
        at = _scan(ax, frame[x])
        ax.axhline(0, color=".4", lw=0.8, zorder=1)
        inits = basis(part)
        tokens = (part[PART] == MEASURES["lambda_token"]).all()
        lines = part.groupby(["ink", "curve", layout.colour or "ink"], observed=True)
        for (ink, curve, _), rows in lines:
            by, colour = rows.groupby(x, observed=True), layout.palette[str(ink)]
            mean = by["value"].mean()  # over jobs that differ in their seeds alone
            reach = [mean - by["low"].min(), by["high"].max() - mean]
            places = mean.index.map(at)
            ax.errorbar(
                places, mean, yerr=np.nan_to_num(np.clip(reach, 0, None)), color=colour, lw=1.6,
                marker="o", ms=4.5, capsize=2.5, elinewidth=1.1,
            )  # fmt: skip
            for law in laws if tokens and curve == inits else ():
                says = by[f"lambda_token_{law.name}"].mean()
                shade = colour if layout.colour else law.colour
                ax.plot(places, says, color=shade, ls=law.line, lw=1.6, zorder=5)
    legend(into, [first])


def heatmap(jobs: pd.DataFrame, keys: Sequence[str], title: str) -> Figure | None:
    """The final mean square over two numeric keys, a panel per value of others; None without two.

    A cell has its number where there is room; it is grey where nothing was measured.
    """
    numeric = sorted((k for k in keys if numbers(jobs[k])), key=lambda k: -jobs[k].nunique())
    if len(numeric) < 2:
        return None
    x, y = numeric[:2]
    inits = jobs["curve"].isin(INITS if x.startswith("init") else ("checkpoint",))
    jobs = jobs[inits] if inits.any() else jobs
    layout = plan(jobs, [key for key in keys if key not in (x, y)], coloured=False)
    frame, labels = layout.frame, (key_text(x), key_text(y))
    positive = frame["mean_square"][frame["mean_square"] > 0]
    if positive.empty:
        return None
    low, high = float(positive.min()), float(positive.max())
    scale = LogNorm(low, high) if high > 3 * low else Normalize(low, high)
    sides = [min(len(values_of(jobs[key])), CELLS) for key in (x, y)]
    size = (max(0.6 * sides[0] + 1.6, 3), max(0.4 * sides[1] + 1.2, 2.4))
    figure, panels = grid(frame, layout.column, layout.row, labels, size=size)
    for ax, part in panels:
        by, names = part.groupby([y, x], observed=False), (ax.get_xlabel(), ax.get_ylabel())
        cells = by["mean_square"].mean().unstack().iloc[::-1]
        over = by["overflow"].max().unstack().iloc[::-1] > 0
        texts = cells.map(lambda value: short(value) or "–") + over.map(" ×".__mul__)
        ax.set_facecolor(".88")
        ax.grid(False)
        sns.heatmap(
            cells.where(cells > 0), ax=ax, norm=scale, cmap="viridis", cbar=False, linewidths=0.8,
            annot=texts if max(cells.shape) <= CELLS else None, fmt="", annot_kws={"size": 8},
        )  # fmt: skip
        ax.set(xlabel=names[0], ylabel=names[1])
        ax.tick_params(axis="y", labelrotation=0)
    log = isinstance(scale, LogNorm)
    bar = figure.colorbar(
        ScalarMappable(scale, "viridis"), ax=[ax for ax, _ in panels], pad=0.01,
        label="mean square" + (", log scale" if log else ""), format=FuncFormatter(plain),
        ticks=log_locator(low, high) if log else MaxNLocator(5),
    )  # fmt: skip
    bar.minorticks_off()
    name = LABELS[frame["curve"].iloc[0]]
    cut = ["×: curves overflow; their last finite value."] if (jobs["overflow"] > 0).any() else []
    head = f"The mean square at the last sublayer is {_between(positive)}."
    return finish(figure, [], [head, f"{name.capitalize()}; {title}.", *layout.notes, *cut])
