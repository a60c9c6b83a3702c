"""streams.png: the vectors that a placement carries from step to step, as streams.csv has them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from simlab.report.colours import LABELS, PALETTE
from simlab.report.panels import DIM, log_ticks, panel, write_at
from simlab.report.seeds import SeedArray, longest, over_seeds, x_of

WIDTH, PANEL, TALL, LOW, GAP = 12.8, 2.75, 2.3, 0.62, 0.72  # inches
_ALIKE = 1e-3  # relative: vectors that differ by less at every step are one line
TOLD_APART = 7  # lines with a name and a colour of their own; of more, the first and the last
_PANELS = (
    ("mean_square", "Mean square", "of a vector, mean over tokens", True),
    ("token_cosine", "Cosine between tokens", "of a vector; 1: all tokens alike", False),
    ("cosine_watched", "Cosine to the stream", "of a vector and x, mean over tokens", False),
)


@dataclass(frozen=True, eq=False)
class _Line:
    """Vectors that coincide. values: by column (seeds, steps), NaN where the state lacks them."""

    numbers: list[int]
    x: SeedArray
    values: dict[str, SeedArray]

    @property
    def name(self) -> str:
        """``vector 2``, ``vectors 0 to 3``: numbers as streams.csv has them."""
        first, *others = self.numbers
        if not others:
            return f"vector {first}"
        if len(others) > 1 and others[-1] - first == len(others):
            return f"vectors {first} to {others[-1]}"
        return f"vectors {', '.join(map(str, self.numbers[:4]))}{', …' * (len(self.numbers) > 4)}"


def streams_figure(streams: pd.DataFrame | None, title: str) -> Figure | None:
    """A line per vector; those that coincide are one. None without vectors beside the stream.

    streams: the rows of streams.csv. title: of the run. Of a checkpoint beside random inits the
    checkpoint's are drawn.
    """
    if streams is None or streams["stream"].nunique() < 2:
        return None
    names = list(dict.fromkeys(streams["curve"]))
    name = next((each for each in names if each in ("checkpoint", "model")), names[0])
    rows = streams[streams["curve"] == name]
    lines = _lines(rows)
    figure = Figure(figsize=(WIDTH, LOW + TALL + 1.25), facecolor="white")
    write_at(figure, 0.25, LOW + TALL + 0.87, vectors_line(rows), size=14, weight="bold")
    write_at(figure, WIDTH - 0.25, 0.1, title, size=8, colour=DIM, ha="right")
    colours, many = _colours(len(lines)), len(lines) > TOLD_APART
    for place, (column, head, under, log) in enumerate(_PANELS):
        box = (0.65 + place * (PANEL + GAP), LOW, PANEL, TALL)
        values = np.concatenate([line.values[column].ravel() for line in lines])
        values = values[np.isfinite(values)]
        log = log and bool((values > 0).all())
        ax = panel(figure, box, head, under, log)
        for i, (line, colour) in enumerate(zip(lines, colours, strict=True)):
            # The later the thinner, so that lines which coincide in this panel all show.
            _draw(ax, line, column, colour, 1.2 if many else 2.7 - 0.25 * i, not many)
        if log:
            log_ticks(ax)
        elif len(values):
            low, high = min(0.0, values.min()), float(values.max())
            high = (high or 1.0) if column == "mean_square" else max(1.0, high)
            ax.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
        ax.set_xlim(0, float(rows["sublayer"].max()) or 1)
        ax.set_xlabel("sublayer", fontsize=8.5, color=DIM)
    _name(figure, lines, colours, LABELS.get(name, name), rows["seed"].nunique())
    return figure


def vectors_line(rows: pd.DataFrame) -> str:
    """How many vectors one kind of curve has, and if they can be told apart."""
    lines, count = _lines(rows), rows["stream"].nunique()
    fixed = rows.groupby(["seed", "sublayer", "kind"])["stream"].size().nunique() == 1
    carried = f"{'' if fixed else 'up to '}{count} vectors"
    if len(lines) == 1:
        return f"The {carried} that are carried from step to step coincide."
    if len(lines) < count:
        return f"Of {carried} that are carried from step to step, {len(lines)} can be told apart."
    return f"{carried[0].upper()}{carried[1:]} are carried from step to step, and all differ."


def _lines(rows: pd.DataFrame) -> list[_Line]:
    """The vectors, those that coincide as one."""
    steps = longest(rows[rows["stream"] == rows["stream"].min()])
    places = pd.Series(range(len(steps)), pd.MultiIndex.from_frame(steps[["sublayer", "kind"]]))
    x, found = x_of(steps).to_numpy(np.float64), list[_Line]()
    seeds = np.unique(rows["seed"])
    for number, part in rows.groupby("stream", sort=True):
        at = places.reindex(pd.MultiIndex.from_frame(part[["sublayer", "kind"]])).to_numpy(int)
        values = {}
        for column, *_ in _PANELS:
            table = np.full((len(seeds), len(x)), np.nan)
            table[np.searchsorted(seeds, part["seed"]), at] = part[column].to_numpy(np.float64)
            values[column] = table
        same = next((each for each in found if _alike(each.values, values)), None)
        if same:
            same.numbers.append(int(str(number)))
        else:
            found.append(_Line([int(str(number))], x, values))
    return found


def _alike(one: dict[str, SeedArray], other: dict[str, SeedArray]) -> bool:
    return all(
        np.allclose(one[column], other[column], rtol=_ALIKE, atol=0, equal_nan=True)
        for column, *_ in _PANELS
    )


def _colours(count: int) -> Sequence[str]:
    """The palette; of many lines shades from dark to light."""
    if count <= TOLD_APART:
        return PALETTE[:count]
    return [to_hex(colormaps["viridis"](0.92 * i / (count - 1))) for i in range(count)]


def _draw(ax: Axes, line: _Line, column: str, colour: str, width: float, band: bool) -> None:
    """The mean over seeds, and their band; dots where the state has the vector now and then."""
    values = line.values[column]
    there = np.isfinite(values).any(0)
    if not there.any():
        return
    x, y = line.x[there], values[:, there]
    now_and_then = bool((np.diff(np.flatnonzero(there)) > 1).any())
    if len(y) > 1 and band:
        low, high = over_seeds(np.nanmin, y), over_seeds(np.nanmax, y)
        ax.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    mark = "o" if now_and_then or len(x) == 1 else None
    ax.plot(x, over_seeds(np.nanmean, y), color=colour, lw=width, marker=mark, ms=3.5, zorder=3)


def _name(
    figure: Figure, lines: Sequence[_Line], colours: Sequence[str], who: str, seeds: int
) -> None:
    """The lines' names on the right, in their colours; of many the first and the last."""
    left, height = 0.65 + len(_PANELS) * (PANEL + GAP) - 0.4, LOW + TALL - 0.1
    shown = list(zip(lines, colours, strict=True))
    if len(lines) > TOLD_APART:
        shown = [shown[0], shown[-1]]
    streams = [line for line in lines if not (line.values["cosine_watched"] < 1 - 1e-6).any()]
    for line, colour in shown:
        name = line.name + ", the stream" * (streams == [line] and len(lines) > 1)
        for part in textwrap.wrap(name, 24):
            write_at(figure, left, height, part, size=9.5, colour=colour, weight="bold")
            height -= 0.22
    notes = ["numbers as in streams.csv", who + (f", {seeds} seeds," if seeds > 1 else "")]
    if len(lines) > TOLD_APART:
        notes = [f"{len(lines)} lines, shades by number", *(note.rstrip(",") for note in notes)]
    elif seeds > 1:
        notes.append("band: least to most")
    for note in notes:
        write_at(figure, left, height - 0.05, note, size=8.5, colour=DIM)
        height -= 0.18
