"""Which swept key becomes colour, which panels: the layout of a sweep's figures, and its key."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize, to_hex
from matplotlib.figure import Figure

from simlab.report.style import finish

COLOURS_TOLD_APART = 6  # of categories; beyond, each gets its panel
LEGEND = 8  # entries for values; beyond, a colour bar, or some of the names
LONG = 18  # characters of an entry
GRID = 24  # panels
COLUMNS, ROWS = 4, 6
ORDERED = ("source.step", "source.revision")  # in the order given, whatever they are called
SOURCE = (*ORDERED, "source.path")
GREY = "#9a9a9a"  # what the coloured curves are held against
SEEDS = ("first_seed", "seeds")  # what bands are made of


def value_text(value: Any) -> str:
    """A swept value as it is written on the command line; equal numbers give equal texts."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "null"
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, int | np.integer):
        return str(int(value))
    number = _number(value)
    if number is None:
        return str(value)
    # 1e15: beyond, an integral float may not be the integer that it prints
    return str(int(number)) if number == int(number) and abs(number) < 1e15 else f"{number:.12g}"


def _number(value: Any) -> float | None:
    """The finite number that a value is or spells; not of a boolean."""
    if isinstance(value, bool | np.bool_) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def is_number(text: str) -> bool:
    """Whether a value's text spells a finite number."""
    return _number(text) is not None


def shorten(text: str, most: int) -> str:
    """At most ``most`` characters: of a path the end is kept, of a name the beginning."""
    if len(text) <= most:
        return text
    return f"…{text[len(text) - most + 1 :]}" if "/" in text else f"{text[: most - 1]}…"


def key_text(key: str) -> str:
    """A key as it is written on the command line."""
    return "norm" if key == "norm_placement" else key


@dataclass(frozen=True)
class Axis:
    """A swept key with the values' texts; numbers, ascending, where all of them are."""

    key: str
    values: tuple[str, ...]
    numbers: tuple[float, ...] | None

    @property
    def positions(self) -> tuple[float, ...]:
        """Where the values lie on an x axis: at their numbers, else side by side."""
        return self.numbers or tuple(range(len(self.values)))

    @property
    def geometric(self) -> bool:
        """Whether a log axis spaces the values more evenly than a linear one."""
        x = self.numbers
        if x is None or min(x) <= 0 or len(x) < 2:
            return False
        if len(x) == 2:
            return x[1] > 4 * x[0]
        steps, ratios = np.diff(x), np.diff(np.log(x))
        return bool(ratios.std() / ratios.mean() < steps.std() / steps.mean())

    def label(self, value: str, most: int = 24) -> str:
        """``key=value``, as on the command line."""
        return f"{key_text(self.key)}={shorten(value, most)}"

    def thinned(self, most: int) -> Axis:
        """At most ``most`` values, evenly spaced, the first and the last among them."""
        return self.only(evenly(len(self.values), most))

    def only(self, which: Sequence[int]) -> Axis:
        """Some of the values, by their places."""
        numbers = None if self.numbers is None else tuple(self.numbers[i] for i in which)
        return replace(self, values=tuple(self.values[i] for i in which), numbers=numbers)


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of the places 0 … count − 1, the first and the last among them."""
    return [int(i) for i in np.linspace(0, count - 1, min(count, most)).round()]


def axes_of(frame: pd.DataFrame, swept: Mapping[str, Sequence[Any]]) -> list[Axis]:
    """The swept keys that still have two values in a frame of texts (``labelled``), without seeds."""
    axes = []
    for key, given in swept.items():
        if key in SEEDS or key not in frame:
            continue
        found = set(frame[key])
        values = [value for value in dict.fromkeys(map(value_text, given)) if value in found]
        values += sorted(found - set(values))
        if len(values) < 2:
            continue
        numbers = [_number(value) for value in values]
        if None in numbers:
            axes.append(Axis(key, tuple(values), None))
        else:
            pairs = sorted((number, value) for number, value in zip(numbers, values, strict=True)
                           if number is not None)  # fmt: skip
            axes.append(Axis(key, tuple(v for _, v in pairs), tuple(x for x, _ in pairs)))
    return axes


def labelled(frame: pd.DataFrame, swept: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    """The frame with its swept columns as texts."""
    keys = [key for key in swept if key in frame and key not in SEEDS]
    return frame.assign(**{key: _texts(frame[key]) for key in keys})


def _texts(column: pd.Series) -> np.ndarray:
    codes, values = pd.factorize(column, use_na_sentinel=False)
    return np.array([value_text(value) for value in values], object)[codes]


@dataclass(frozen=True)
class Plan:
    """Which swept key is colour, which are panels, and which are fixed at one value.

    panels: at most two keys, columns then rows; a single one's panels wrap. notes: what isn't shown.
    """

    colour: Axis | None
    panels: tuple[Axis, ...] = ()
    fixed: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def cells(self) -> list[dict[str, str]]:
        """Each panel's key → value, row by row."""
        axes = self.panels[::-1]
        keys = [axis.key for axis in axes]
        every = itertools.product(*(axis.values for axis in axes))
        return [dict(zip(keys, values, strict=True)) for values in every]

    @property
    def columns(self) -> int:
        """How many panels stand side by side."""
        side = len(self.panels[0].values) if self.panels else 1
        if side <= COLUMNS:
            return side
        return 3 if side in (5, 6, 9) else COLUMNS

    def title(self, cell: Mapping[str, str], inches: float) -> str:
        """A panel's title, in lines that fit its width."""
        lines: list[str] = []
        for axis in self.panels:
            label = axis.label(cell[axis.key])
            if lines and len(lines[-1]) + len(label) < 11 * inches:
                lines[-1] += f", {label}"
            else:
                lines.append(label)
        return "\n".join(lines)

    def shown(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The rows that the fixed keys leave."""
        return matching(frame, dict(self.fixed))


def matching(frame: pd.DataFrame, cell: Mapping[str, str]) -> pd.DataFrame:
    """The rows of a panel."""
    for key, value in cell.items():
        frame = frame[frame[key] == value]
    return frame


def plan(axes: Sequence[Axis], coloured: bool = True, most: int = GRID) -> Plan:
    """Lay out up to three swept keys as colour, columns and rows; further keys keep one value.

    Colour is a checkpoint's steps, else the numeric key with most values. Categories come before
    numbers as panels. Where the panels would be more than ``most``, some values of a key are shown.
    The plan's notes say what is left out.
    """
    colour = _colour(axes) if coloured else None
    rest = [axis for axis in axes if axis is not colour]
    rest.sort(key=lambda axis: (axis.numbers is not None, len(axis.values)))
    panels, fixed = rest[:2], rest[2:]
    notes = [f"{a.label(a.values[0])} alone, of its {len(a.values)} values" for a in fixed]
    panels.sort(key=lambda axis: len(axis.values) > COLUMNS)
    room = [most]
    if len(panels) == 2:
        columns = min(COLUMNS, len(panels[0].values))
        room = [columns, min(ROWS, most // columns)]
    shown = [axis.thinned(count) for axis, count in zip(panels, room, strict=False)]
    for axis, some in zip(panels, shown, strict=True):
        if len(some.values) < len(axis.values):
            count = f"{len(some.values)} of the {len(axis.values)}"
            notes.append(f"{count} values of {key_text(axis.key)}")
    return Plan(
        colour,
        tuple(shown),
        tuple((axis.key, axis.values[0]) for axis in fixed),
        (f"Shown: {'; '.join(notes)}.",) if notes else (),
    )


def _colour(axes: Sequence[Axis]) -> Axis | None:
    for axis in axes:
        if axis.key in SOURCE:
            return axis
    numeric = [axis for axis in axes if axis.numbers]
    if numeric:
        return max(numeric, key=lambda axis: (len(axis.values), axis.key == "depth"))
    fewest = min(axes, key=lambda axis: len(axis.values), default=None)
    return fewest if fewest and len(fewest.values) <= COLOURS_TOLD_APART else None


SEQUENCE = LinearSegmentedColormap.from_list(  # viridis without its yellow, too pale on white
    "sequence", sns.color_palette("viridis", 256)[:226]
)


def _scale(axis: Axis) -> Normalize:
    """Of a colour bar: a numeric axis from end to end."""
    numbers = axis.positions
    kind = LogNorm if axis.geometric else Normalize
    return kind(min(numbers), max(numbers))


def _on_a_bar(axis: Axis) -> bool:
    return axis.numbers is not None and len(axis.values) > LEGEND


def colours(axis: Axis | None) -> dict[str, str]:
    """A colour per value: a sequence for numbers, checkpoints' steps and many, else distinct ones."""
    if axis is None:
        return {}
    values, count = axis.values, len(axis.values)
    if _on_a_bar(axis):
        scale = _scale(axis)
        shades = [float(scale(x)) for x in axis.positions]
    elif axis.numbers or axis.key in ORDERED or count > LEGEND:
        shades = [i / (count - 1) for i in range(count)]
    else:
        return dict(zip(values, sns.color_palette("deep", LEGEND).as_hex(), strict=False))
    return {v: to_hex(SEQUENCE(shade)) for v, shade in zip(values, shades, strict=True)}


def grid(
    count: int,
    columns: int,
    size: tuple[float, float],
    below: str,
    *,
    blocks: int = 1,
    alike: bool = True,
) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels in each of its blocks; a block starts a row.

    size: of a panel, in inches. below: what the x axes are. alike: panels of a row have one y axis.
    """  # fmt: skip
    rows = math.ceil(count / columns)
    with sns.axes_style("whitegrid", {"grid.color": ".92", "axes.edgecolor": ".6"}):
        wide = max(columns * size[0], 8.5)  # room for the legend
        figure = Figure(figsize=(wide, blocks * rows * size[1] + 1.2), layout="constrained")
        every = figure.subplots(blocks * rows, columns, squeeze=False)
    panels = []
    for (row, column), ax in np.ndenumerate(every):
        place = row % rows * columns + column
        if place >= count:
            ax.remove()
            continue
        panels.append(ax)
        last = row >= rows * (blocks - 1) and place + columns >= count
        ax.set_xlabel(below if last else "")
        ax.tick_params(which="both", labelbottom=last, labelleft=not alike or column == 0)
    return figure, panels


def entries(ax: Axes, colour: Axis | None) -> None:
    """The colours in the legend, of many some; none where a bar shows them."""
    if colour is None or _on_a_bar(colour):
        return
    named = colours(colour)
    for value in (colour.values[i] for i in evenly(len(colour.values), LEGEND)):
        label = shorten(value, LONG) if _long(colour) else colour.label(value)
        ax.plot([], [], color=named[value], lw=2.5, label=label)


def _long(axis: Axis) -> bool:
    """Whether a legend with ``key=value`` would be too wide."""
    return any(len(axis.label(value, 1000)) > LONG for value in axis.values)


def finished(
    figure: Figure, axes: Sequence[Axes], colour: Axis | None, lines: Sequence[str]
) -> Figure:
    """A bar for the colours where they are many numbers, then the frame; the first panel's legend."""
    if colour is not None and _on_a_bar(colour):
        bar = figure.colorbar(
            ScalarMappable(_scale(colour), SEQUENCE), ax=list(axes), label=key_text(colour.key),
            aspect=30, pad=0.01, shrink=min(1, 6 / figure.get_figheight()),
        )  # fmt: skip
        bar.outline.set_visible(False)
    elif colour is not None:
        if _long(colour):
            lines = [*lines, f"Coloured by {key_text(colour.key)}."]
        if len(colour.values) > LEGEND:
            lines = [*lines, f"Of {len(colour.values)} colours the legend names {LEGEND}."]
    return finish(figure, axes[:1], lines)


def hero(part: pd.DataFrame, colour: Axis | None) -> str:
    """The curve that the colours are of: the checkpoint's, but where what is swept is the init."""
    if (part["curve"] == "checkpoint").any() and not (colour and colour.key.startswith("init")):
        return "checkpoint"
    return "random" if (part["curve"] == "random").any() else "checkpoint"
