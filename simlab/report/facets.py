"""Assigns swept keys to colour, columns and rows of a sweep's figures, and notes the rest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from simlab.analysis.curve import basis
from simlab.report.colours import COLOURS, LABELS, PALETTE
from simlab.report.style import subplots
from simlab.report.values import SEEDS, is_formula, is_number, key_text, shorten, spread, value_text

SHADES, TOLD_APART = 10, 6  # colours, of numbers and of categories
COINCIDE = (
    0.1  # of the largest spread (``values.spread``), below which a key's curves lie on another
)
# Theory's green and the √2 law's orange are in neither the categories' colours nor plasma's.
CHOICES = (PALETTE[0], PALETTE[1], PALETTE[3], PALETTE[5], PALETTE[7], "#7A4F2A")
COLUMNS, ROWS, PANELS = 4, 6, 24  # of panels; those of a single key wrap
ORDERED = ("source.step", "source.revision")  # in the order given, whatever they are called
SOURCE = (*ORDERED, "source.path")
PART = "part"  # a column with panels of its own that isn't swept: which λ, which statistic
GREY = "#9a9a9a"  # of the curves beside the coloured ones


def label(key: str, value: str) -> str:
    """``key=value``, as on the command line."""
    most = 40 if is_formula(value) else 24
    return value if key == PART else f"{key_text(key)}={shorten(value, most)}"


def labelled(
    frame: pd.DataFrame, swept: Mapping[str, Sequence[Any]]
) -> tuple[pd.DataFrame, list[str]]:
    """The frame with swept values as categories of texts, and the keys with several, without seeds.

    Numbers ascend, others are in the order given.
    """
    texts: dict[str, pd.Categorical] = {}
    for key in (key for key in swept if key in frame and key not in SEEDS):
        codes, values = pd.factorize(frame[key], use_na_sentinel=False)
        all_texts = [value_text(value) for value in values]
        order = [v for v in dict.fromkeys(map(value_text, swept[key])) if v in all_texts]
        order += sorted(set(all_texts) - set(order))
        if all(map(is_number, order)):
            order.sort(key=float)
        texts[key] = pd.Categorical(np.array(all_texts, object)[codes], order)
    return frame.assign(**texts), [k for k, v in texts.items() if len(v.categories) > 1]


def values_of(column: pd.Series) -> list[str]:
    """A category's values that occur, in order."""
    return list(column.cat.remove_unused_categories().cat.categories)


def numbers(column: pd.Series) -> list[float] | None:
    """A category's values as numbers; None where one isn't."""
    values = values_of(column)
    return [float(v) for v in values] if all(map(is_number, values)) else None


@dataclass(frozen=True)
class Plan:
    """The rows that a figure shows, and the keys of its colours, columns and rows.

    ``frame`` has a column ``ink``: a colour's name in ``palette``. Beside a checkpoint, random
    inits are grey; where the init is coloured, checkpoints are. notes: what the figure leaves out.
    """

    frame: pd.DataFrame
    colour: str | None
    column: str | None
    row: str | None
    palette: Mapping[str, str]
    notes: Sequence[str]


def plan(frame: pd.DataFrame, keys: Sequence[str], coloured: bool = True, panels: int = 2) -> Plan:
    """Lay out swept keys as colour, columns and rows; further keys keep their first value.

    Colour is a checkpoint's steps, else the numeric key with most values, else the category with
    fewest; a key whose curves coincide beside another's comes last. Categories come before numbers as
    panels. Of too many values evenly spaced ones are shown.
    """
    count = {key: frame[key].nunique() for key in keys if frame[key].nunique() > 1}
    number = [key for key in count if numbers(frame[key])]
    wide = spread(_levels(frame, list(count)), list(count)) if "x" in frame else {}
    coincide = {key for key in wide if wide[key] < COINCIDE * max(wide.values())}
    choice = [key for key in count if key in SOURCE]
    choice += sorted(number, key=lambda key: (key in coincide, -count[key], key != "depth"))
    choice += sorted((k for k in count if count[k] <= TOLD_APART), key=lambda key: count[key])
    colour = choice[0] if choice and coloured else None
    rest = sorted((key for key in count if key != colour), key=lambda k: (k in number, count[k]))
    shown = sorted(rest[:panels], key=lambda key: count[key] > COLUMNS)
    most = dict.fromkeys(rest, 1) | dict.fromkeys(shown, PANELS)
    most |= dict(zip(shown, (COLUMNS, ROWS), strict=True)) if len(shown) == 2 else {}
    notes = []
    for key, room in (most | ({colour: SHADES} if colour else {})).items():
        values = values_of(frame[key])
        some = [values[int(i)] for i in np.linspace(0, len(values) - 1, room).round()]
        if len(values) > room:
            frame = frame[frame[key].isin(some)]
            alone = f"{label(key, some[0])} alone, of its {len(values)} values"
            several = f"{room} of the {len(values)} values of {key_text(key)}"
            notes.append(alone if room == 1 else several)
    frame = frame.assign(**{key: frame[key].cat.remove_unused_categories() for key in count})
    ink = names = frame["curve"].map(LABELS)
    palette = {LABELS[name]: shade for name, shade in COLOURS.items()}
    if colour:
        values = values_of(frame[colour])
        shades: Sequence[str] = CHOICES
        if colour in (*number, *ORDERED) or len(values) > len(CHOICES):
            shades = sns.color_palette("plasma", len(values) + 1).as_hex()  # without its yellow
        palette = dict(zip(values, shades, strict=False)) | dict.fromkeys(palette, GREY)
        main = basis(frame) if colour.startswith("init") else "checkpoint"
        beside = frame.groupby("job")["curve"].transform("nunique") > 1
        ink = frame[colour].astype(object).mask(beside & (frame["curve"] != main), names)
    summary = [f"Shown: {'; '.join(notes)}."] if notes else []
    column, row = [*shown, None, None][:2]
    return Plan(frame.assign(ink=ink), colour, column, row, palette, summary)


def _levels(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """A row per job, for ``spread``: its keys' values and its mean square where the shallowest ends."""
    own = frame[frame["curve"] == basis(frame)]
    own = own[own["x"] <= own.groupby("job")["x"].max().min()]
    ends = own[own["x"] == own.groupby("job")["x"].transform("max")]
    means = ends.groupby(["job", *keys], observed=True)["mean_square"].mean()
    return means.rename("level").reset_index()


def name_colours(ax: Axes, layout: Plan, marker: str | None = None) -> None:
    """The legend's entries for the plan's colours, and for the curves in grey."""
    for ink, colour in layout.palette.items():
        if ink in set(layout.frame["ink"]):
            name = ink if ink in LABELS.values() else label(str(layout.colour), ink)
            ax.plot([], [], color=colour, lw=2, marker=marker, ms=4.5, label=name)


def name_band(ax: Axes, seeds: pd.Series) -> None:
    """The legend's entry for the bands, with the count of seeds; none where curves have one seed."""
    counts = sorted({count for count in seeds if count > 1})
    if counts:
        count = " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]])))
        name = f"{count} seeds: mean, min to max"
        ax.fill_between([], [], [], color=".5", alpha=0.35, lw=0, label=name)


def columns_of(panels: int) -> int:
    """Columns for the panels of a single key: few empty cells, and rather wide than high."""
    if panels <= 3:
        return panels
    wide = math.sqrt(1.6 * panels)
    return min(range(2, 7), key=lambda n: (-panels % n) + 2 * abs(n - wide))


def extent(
    frame: pd.DataFrame,
    column: str | None,
    row: str | None,
    *,
    size: tuple[float, float] | None = None,
    alike: bool | Literal["row"] = True,
) -> tuple[int, int, tuple[float, float]]:
    """The rows and columns of ``grid``, and its width and height in inches."""
    columns, rows = (frame[key].nunique() if key else 1 for key in (column, row))
    panels = columns * rows
    if column and not row:
        columns = columns_of(panels) if alike else min(panels, 2)
    wide, high = size or ((7.5, 4.4) if panels == 1 else (4.4, 3.6) if panels <= 4 else (3.3, 2.6))
    height = math.ceil(panels / columns)
    return height, columns, (max(columns * wide, 8.5), height * high + 1.2)


def grid(
    frame: pd.DataFrame,
    column: str | None,
    row: str | None,
    labels: tuple[str, str],
    *,
    size: tuple[float, float] | None = None,
    alike: bool | Literal["row"] = True,
    into: SubFigure | None = None,
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A figure with a panel per value of ``column`` × ``row``: each with its title and its rows.

    A cell that is left over is an invisible panel: ``style.finish`` puts the legend there.

    labels: of the x and y axes. size: of a panel, in inches. alike: which panels share a y axis.
    into: a part of a figure, where it isn't one of its own.
    """
    height, columns, inches = extent(frame, column, row, size=size, alike=alike)
    panels = (frame[column].nunique() if column else 1) * (frame[row].nunique() if row else 1)
    figure, axes = subplots(height, columns, inches, into=into, sharex=True, sharey=alike)
    keys = [key for key in (row, column) if key]
    shown = []
    values = itertools.product(*(values_of(frame[key]) for key in keys))
    for i, (ax, of_panel) in enumerate(itertools.zip_longest(axes.flat, values)):
        if of_panel is None:  # the last row isn't full
            ax.set_visible(False)
            continue
        last, first = i + columns >= panels, i % columns == 0
        ax.set(xlabel=labels[0] if last else "", ylabel=labels[1] if first else "")
        ax.tick_params(which="both", labelbottom=last, labelleft=first or not alike)
        part, lines = frame, []
        for key, value in zip(keys, of_panel, strict=True):
            part = part[part[key] == value]
            lines.append(label(key, value))
        ax.set_title("\n".join(lines), fontsize=10, color=".35")
        shown.append((ax, part))
    return figure, shown
