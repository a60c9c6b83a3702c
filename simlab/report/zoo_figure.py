"""zoo.png of the answer ``norm_zoo``: placements ranked by the stream's last mean square."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simlab.report.colours import PALETTE
from simlab.report.style import subplots
from simlab.report.values import shorten
from simlab.report.zoo import ZooRow

MARKERS = "osD^v"  # of groups
# ZooRow's field, the panel's title, and if its axis is logarithmic.
_PANELS = (
    ("v", "mean square after the last block\n(ring: theory)", True),
    ("gradient", "gradient's rms, first block / last\n(ring: theory)", True),
    ("cosine", "mean cosine between tokens\nafter the last block", False),
    ("bits", "bits of a last branch that its\nsum keeps in bfloat16", False),
)
_RINGS = {"v": "predicted", "gradient": "predicted_gradient"}  # theory's, of a field
_NOTHING = {"gradient": 1, "bits": 0}  # values with a line: level gradients, a branch that is lost
_LONGEST = 44  # characters of a name: a formula's


def zoo_figure(rows: Sequence[ZooRow], line: str) -> Figure:
    """A line per placement, a panel per number; colours by how the stream grows, markers by group.

    An arrow at the right edge: a curve that ends early, beyond the dtype's range.
    """
    names = list(dict.fromkeys(row.name for row in rows))
    groups = list(dict.fromkeys(row.group for row in rows))
    words = list(dict.fromkeys(row.growth for row in rows))
    colours = {word: PALETTE[i % len(PALETTE)] for i, word in enumerate(words)}
    panels = [each for each in _PANELS if each[0] == "v" or _known(rows, each[0])]
    wide = 3 * (len(panels) + 0.5)
    figure, axes = subplots(
        1, len(panels), (wide, 1.9 + 0.215 * len(names)), sharey=True,
        width_ratios=(1.5, *[1] * (len(panels) - 1)),
    )  # fmt: skip
    for ax, (field, title, log) in zip(axes[0], panels, strict=True):
        ax.set_title(title, fontsize=9.5)
        whole = [row.v for row in rows if row.v > 0 and not row.ends]
        if field == "v" and whole and len(whole) < len(rows):  # overflows would take all the room
            ax.set_xlim(min(whole) / 3, max(whole) * 10)
        for row in rows:
            if field == "v" and row.ends and whole:
                at = (1, names.index(row.name))
                ax.plot(*at, ">", color=".3", transform=ax.get_yaxis_transform(), clip_on=False)
                continue
            y, value = names.index(row.name), getattr(row, field)
            marker, colour = (
                MARKERS[groups.index(row.group) % len(MARKERS)],
                colours[row.growth],
            )
            if np.isfinite(value) and (value > 0 or not log):
                ax.plot(value, y, marker, color=colour, ms=5.5, zorder=3)
            if field in _RINGS and (predicted := getattr(row, _RINGS[field])) > 0:
                ax.plot(predicted, y, marker, ms=9, mfc="none", mec=".25", mew=0.9, zorder=2)
        _axis(ax, log, len(names))
        if field in _NOTHING:
            ax.axvline(_NOTHING[field], color=".5", lw=0.8)
    shown = [shorten(name, _LONGEST) for name in names]
    axes[0, 0].set_yticks(range(len(names)), shown, fontsize=9)
    axes[0, 0].invert_yaxis()
    for word in words:
        axes[0, 0].plot([], [], "o", color=colours[word], label=f"growth: {word}")
    for group, marker in zip(groups if len(groups) > 1 else [], MARKERS, strict=False):
        axes[0, 0].plot([], [], marker, color=".3", label=group)
    figure.legend(loc="outside lower center", ncols=8, frameon=False, fontsize=9)
    figure.suptitle(line, fontsize=10.5, x=0.01, ha="left")
    return figure


def _known(rows: Sequence[ZooRow], field: str) -> bool:
    """True if some row has a number there: without gradients none has their ratio."""
    return any(math.isfinite(getattr(row, field)) for row in rows)


def _axis(ax: Axes, log: bool, count: int) -> None:
    if log:
        ax.set_xscale("log")
    ax.set_ylim(-0.7, count - 0.3)
    ax.tick_params(which="both", labelsize=8.5)  # a short log axis labels its minor ticks, too
