"""growth.png of the answer ``families``: checkpoints of any depth and size in one figure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from simlab.analysis.massive import TIMES_MEDIAN
from simlab.report.colours import PALETTE
from simlab.report.families import Surveyed
from simlab.report.panels import DIM, Steps, log_ticks, name_ends, panel, write_at
from simlab.report.seeds import SeedArray, over_seeds
from simlab.report.values import shorten

WIDTH, PANELS = 12.8, 4.9


def families_figure(members: Sequence[Surveyed], line: str) -> Figure:
    """Three panels over depth as a share of the model's: growth, ratio to random inits, outliers.

    A colour per checkpoint: solid its median token, the band its random inits, dashed theory's curve of
    them. line: the answer in one sentence.
    """
    heads = textwrap.wrap(line, 100)
    height = PANELS + 0.9 + 0.28 * len(heads)
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    for i, text in enumerate(heads):
        write_at(figure, 0.25, height - 0.38 - 0.28 * i, text, size=14, weight="bold")
    colours: Sequence[str] = PALETTE
    if len(members) > len(PALETTE):
        colours = sns.color_palette("husl", len(members)).as_hex()
    under = "÷ its random inits' mean at the embedding; solid: median token, dotted: mean of all;"
    under += "\nband: the random inits, dashed: what theory says of them"
    box = (0.65, 0.6, 4.9, 4.1)
    growth = panel(figure, box, "Mean square of the residual stream", under, log=True)
    under = "median token ÷ random inits' mean (band: these);\ndot: outside the band for good"
    ratio = panel(figure, (8.35, 3.15, 4.2, 1.55), "Relative to random inits", under, log=True)
    under = f"largest |x| ÷ median |x|; massive from {TIMES_MEDIAN:.0f} on"
    outliers = panel(figure, (8.35, 0.6, 4.2, 1.55), "Largest entry", under, log=True)
    ends = []
    for member, colour in zip(members, colours, strict=False):
        steps = Steps(member.frame)
        x = steps.x / steps.x[-1]
        trained, mean = (steps.mean("checkpoint", c) for c in ("mean_square_median", "mean_square"))
        unit = float(steps.mean(member.inits or "checkpoint", "mean_square")[0])
        growth.plot(x, trained / unit, color=colour, lw=2.2, zorder=3)
        growth.plot(x, mean / unit, color=colour, lw=1.0, ls=(0, (1, 1)))
        about = f"{member.about['model_type']}, {member.depth} blocks, {member.read}"
        last = float(trained[np.isfinite(trained)][-1])
        ends.append((last / unit, f"{shorten(member.label, 28)}\n{about}", colour, "bold"))
        if member.inits:
            drawn = _inits(growth, member, steps, colour, unit)
            _ratio(ratio, member, x, trained, drawn, colour)
        most, median = (steps.mean("checkpoint", c) for c in ("max_abs", "median_abs"))
        outliers.plot(x, most / median, color=colour, lw=1.8)
    outliers.axhline(TIMES_MEDIAN, color=DIM, lw=0.9, ls=(0, (3, 2)))
    for ax in (growth, ratio, outliers):
        ax.set_xlim(0, 1)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        ax.xaxis.set_ticks([0, 0.25, 0.5, 0.75, 1])
        log_ticks(ax)
    for ax in (growth, outliers):
        ax.set_xlabel("depth (share of the model's sublayers)", fontsize=9, color=DIM)
    name_ends(growth, ends)
    return figure


def _inits(ax: Axes, member: Surveyed, steps: Steps, colour: str, unit: float) -> SeedArray:
    """Draw the random inits' band and what theory says of them; their mean squares (seeds, steps)."""
    x, drawn = steps.x / steps.x[-1], steps(member.inits, "mean_square")
    low, high, mean = (over_seeds(how, drawn) / unit for how in (np.nanmin, np.nanmax, np.nanmean))
    ax.fill_between(x, low, high, color=colour, alpha=0.25, lw=0)
    ax.plot(x, mean, color=colour, lw=0.8, alpha=0.6)
    if "law_mean_field" in steps.rows[member.inits]:
        law = steps.mean(member.inits, "law_mean_field")
        ax.plot(x, law / unit, color=colour, lw=1.3, ls=(0, (5, 2)), zorder=4)
    return drawn


def _ratio(
    ax: Axes, member: Surveyed, x: SeedArray, trained: SeedArray, drawn: SeedArray, colour: str
) -> None:  # fmt: skip
    """The checkpoint and its random inits over these inits' mean, and where it leaves them."""
    mean = over_seeds(np.nanmean, drawn)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high, own = (
            y / mean for y in (over_seeds(np.nanmin, drawn), over_seeds(np.nanmax, drawn), trained)
        )
    ax.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
    ax.plot(x, own, color=colour, lw=1.8)
    if member.left is not None and member.left.sublayer is not None:
        at = int(np.searchsorted(member.rows["sublayer"], member.left.sublayer))
        ax.plot(x[at], own[at], "o", color=colour, ms=5, zorder=4)
