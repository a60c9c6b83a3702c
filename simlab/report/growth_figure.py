"""growth.png: the answer, the curve with its laws, and beside it what the curve alone doesn't show."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from simlab.analysis.compare import Departure, departure, of_median_token
from simlab.analysis.curve import laws_in
from simlab.analysis.numbers import short
from simlab.analysis.tokens import skewed, token_apart
from simlab.report.colours import COLOURS, LABELS
from simlab.report.panels import (
    DIM,
    HALO,
    INK,
    Steps,
    draw_laws,
    draw_seeds,
    first_teeth,
    free_place,
    log_ticks,
    name_ends,
    panel,
    plain,
    write_at,
)
from simlab.report.seeds import SeedArray, axis_label, over_seeds

WIDE = 4.0  # the tokens' 95th percentile is within the axis up to this many times the curves' most
WIDTH, PANELS_HEIGHT = 12.8, 4.9  # inches, of the figure and of its panels without titles


def growth_figure(
    frame: pd.DataFrame, title: str, lines: Sequence[str], tokens: tuple[int, int] | None = None
) -> Figure:
    """The run's main figure.

    The large panel has the mean square with the seeds' band, the laws, and theory with its band. Beside
    it: the same on a log axis, the norm, the variance, and the gradient (or what a sublayer adds). With
    a checkpoint beside random inits: its ratio to them, what its sublayers add, and how that adds up.
    Where few tokens make a checkpoint's mean, the large panel has the median token, and names these.

    frame: the rows of curve.csv. title: of the run. lines: the answer, then what else is to be said.
    tokens: the batch's sequences and their length, to say where the largest token is.
    """
    drawn, note = first_teeth(frame)
    heads = textwrap.wrap(lines[0], 100) if lines else []
    further = [*lines[1:], *([note] if note else [])]
    more = [part for line in further for part in textwrap.wrap(line, 165)]
    top = 0.72 + 0.28 * len(heads) + 0.2 * len(more)
    figure = Figure(figsize=(WIDTH, PANELS_HEIGHT + top), facecolor="white")
    height = PANELS_HEIGHT + top
    for i, line in enumerate(heads):
        write_at(figure, 0.25, height - 0.38 - 0.28 * i, line, size=14, weight="bold")
    for i, line in enumerate(more):
        write_at(
            figure, 0.25, height - 0.38 - 0.28 * len(heads) - 0.2 * i, line, size=9.5, colour=DIM
        )
    write_at(figure, WIDTH - 0.25, 0.1, title, size=8, colour=DIM, ha="right")
    if frame.empty:
        return figure
    steps = Steps(drawn)
    left = departure(frame) if len(steps.names) > 1 else None
    few = skewed(frame)
    if few:
        place = token_apart(frame, tokens).place if tokens else ""
        own = departure(of_median_token(frame)) if len(steps.names) > 1 else None
        _main(figure, steps, own, few, place)
    else:
        _main(figure, steps, left)
    if steps.given and len(steps.names) > 1:
        _beside(figure, steps, left, few)
    else:
        _alone(figure, steps, few)
    return figure


def _band(ax: Axes, steps: Steps) -> None:
    """Theory's mean ± 2 std of a seed, of the mean square."""
    own = steps.rows[steps.base]
    if "band_mean_field" not in own or own["band_mean_field"].isna().all():
        return
    name, column = (
        ("theory", "mean_square") if steps.base == "theory" else (steps.base, "law_mean_field")
    )
    mean, std = steps.mean(name, column), steps.mean(steps.base, "band_mean_field")
    ax.fill_between(
        steps.x, mean - 2 * std, mean + 2 * std, color=COLOURS["theory"], alpha=0.13, lw=0, zorder=1
    )


def _main(
    figure: Figure, steps: Steps, left: Departure | None, few: bool = False, place: str = ""
) -> None:
    """The mean square on a linear axis, with a name at the end of every line.

    few: a few tokens make the checkpoint's mean, so the median token is drawn. place: the largest's.
    """
    under = "mean of x² over width and tokens, after each sublayer; linear axis"
    if few:
        under = (
            f"mean of x² over width, of the median token; pale: 90 % of the {steps.given}'s tokens"
        )
    ax = panel(figure, (0.65, 0.6, 5.2, 4.1), "Mean square of the residual stream", under)
    shown: dict[str, SeedArray] = {}
    highest: list[float] = []  # of what is drawn, without laws
    for name in steps.names:
        known = few and bool(steps.rows[name]["mean_square_median"].notna().any())
        values = steps(name, "mean_square_median" if known else "mean_square")
        shown[name] = over_seeds(np.nanmean, values)
        low, high = over_seeds(np.nanmin, values), over_seeds(np.nanmax, values)
        highest.append(float(np.nanmax(high)))
        if few and name == steps.given:
            low, high = steps.mean(name, "mean_square_p05"), steps.mean(name, "mean_square_p95")
        if len(values) > 1 or (few and name == steps.given):
            alpha = 0.2 if len(values) > 1 else 0.15
            ax.fill_between(steps.x, low, high, color=COLOURS[name], alpha=alpha, lw=0)
        ax.plot(steps.x, shown[name], color=COLOURS[name], lw=2.8, zorder=2)
    laws = {}
    if not few or steps.base != steps.given:  # such a checkpoint's own laws are about its mean
        laws = draw_laws(ax, steps)
        _band(ax, steps)
    tops = [value for value in highest if math.isfinite(value)]
    wide = float(np.nanmax(steps(steps.given, "mean_square_p95"))) if few else 0.0
    tops += [wide] if wide < WIDE * max(tops) else []
    of_law = {law.name: law for law in laws_in(steps.rows[steps.base])}
    tops += [
        most
        for n, v in laws.items()
        if of_law[n].expected and (most := float(np.nanmax(v))) < 3 * max(tops)
    ]
    top = 1.08 * max(tops) or 1.0
    last = float(steps.x[-1])
    ax.set(xlim=(0, last or 1), ylim=(0, top))
    ax.set_xlabel(axis_label(pd.concat(steps.rows.values())), fontsize=9, color=DIM)
    names = []
    for name, y in shown.items():
        seeds = steps.rows[name]["seed"].nunique()
        text = LABELS[name] + (f"\n{seeds} seeds, band: least to most" if seeds > 1 else "")
        if name == "theory":
            text += "\nband: ± 2 std of a seed"
        if few and name == steps.given:
            text += "\nmedian token"
            text += f"; 95th percentile: {_about(wide)}" if wide > top else ""
        text += _ending(steps, y)
        names.append((_last(y), text, COLOURS[name], "bold"))
    for name, y in laws.items():
        law = of_law[name]
        if np.nanmax(y) > top:
            _leaving(ax, steps, y, top, law.label, law.colour, left)
        elif law.expected:
            text = law.label + ("\nband: ± 2 std of a seed" if name == "mean_field" else "")
            text += _ending(steps, y)
            names.append((_last(y), text, law.colour, "normal"))
        else:
            text = law.label + ("\nuntil the first re-norm" if "renorm" in steps.kinds else "")
            names.append((_last(y), text, law.colour, "normal"))
    if few:
        largest, red = steps.mean(steps.given, "mean_square_max"), COLOURS[steps.given]
        ax.plot(steps.x, largest, color=red, lw=1.1, ls=(0, (1, 1)), zorder=2)
        text = "largest token" + (f"\n{place}" if place else "")
        if (above := float(np.nanmax(largest))) > top:
            text += f"\nup to {_about(above)}, off this axis"
        names.append((min(_last(largest), top), text, red, "bold"))
    name_ends(ax, names)
    _peak(ax, steps, shown[steps.names[0]])
    if left is not None:
        _leaves(ax, left, last)


def _ending(steps: Steps, y: SeedArray) -> str:
    """Where a curve ends before the others, as a prediction may."""
    known = np.flatnonzero(np.isfinite(y))
    early = len(known) and known[-1] < len(y) - 1
    return f"\nends at sublayer {round(steps.x[known[-1]])}" if early else ""


def _last(y: SeedArray) -> float:
    known = np.flatnonzero(np.isfinite(y))
    return float(y[known[-1]]) if len(known) else math.nan


def _leaving(
    ax: Axes, steps: Steps, y: SeedArray, top: float, label: str, colour: str, left: Departure | None
) -> None:  # fmt: skip
    """The name of a law that leaves the axes, where it does, and where it would end."""
    over = int(np.flatnonzero(y > top)[0])
    x, last = float(steps.x[over]), float(steps.x[-1])
    ends = f"would end at {_about(_last(y))}"
    if "renorm" in steps.kinds:
        ends = f"would be {_about(_last(y))} at the first re-norm"
    right = x < 0.55 * last
    ax.annotate(
        f"{label}: {ends}", (x, top), (7 if right else -9, -9), textcoords="offset points",
        color=colour, fontsize=9, ha="left" if right else "right", va="center", bbox=HALO, zorder=6,
    )  # fmt: skip


def _about(value: float) -> str:
    """``30``, ``2·10⁶``: a number of which the size matters."""
    if value >= 1e300:
        return "more than 10³⁰⁰"
    return short(value) if 1e-2 <= value < 1e4 else plain(float(f"{value:.0e}"))


def _peak(ax: Axes, steps: Steps, y: SeedArray) -> None:
    """The largest peak of a saw-tooth, with its value."""
    rows = [
        i - 1 for i, kind in enumerate(steps.kinds) if kind == "renorm" and np.isfinite(y[i - 1])
    ]
    if not rows:
        return
    at = max(rows, key=lambda i: y[i])
    ax.plot(steps.x[at], y[at], "o", color=INK, ms=5, zorder=6)
    ax.annotate(
        f"peak {short(float(y[at]))}", (steps.x[at], y[at]), (0, 8), textcoords="offset points",
        fontsize=9, ha="center", color=INK, bbox=HALO, zorder=6,
    )  # fmt: skip


def _leaves(ax: Axes, left: Departure, last: float) -> None:
    """Where the checkpoint leaves the random inits' band for good, below the curves' names."""
    if left.sublayer is None:
        return
    red, at = COLOURS["checkpoint"], left.sublayer
    end = at > 0.55 * last
    x, height = free_place(ax, at, -1 if end else 1)
    ax.axvline(at, color=red, lw=1.1, ls=(0, (5, 3)), zorder=1)
    since = f"sublayer {at}" if at else "the embedding"
    where = f"outside the random inits' band\nfor good from {since} on"
    label = ax.annotate(
        where, (x, height), (-6 if end else 6, 0), xycoords=("data", "axes fraction"), va="top",
        textcoords="offset points", ha="right" if end else "left", fontsize=9, color=red, zorder=6,
    )  # fmt: skip
    # A line passes behind the letters alone: a box would cut it.
    label.set_path_effects([Stroke(linewidth=3, foreground="white"), Normal()])


# The panels on the right: two columns and two rows, in inches.
LEFT, RIGHT, PANEL, LOW, UP, TALL = 8.35, 10.85, 1.75, 0.6, 3.15, 1.55


def _x(ax: Axes, steps: Steps, label: bool) -> None:
    ax.set_xlim(0, float(steps.x[-1]) or 1)
    if label:
        ax.set_xlabel("sublayer", fontsize=8.5, color=DIM)


def _alone(figure: Figure, steps: Steps, few: bool) -> None:
    """One kind of curve: its log axis, norm, variance, and gradient or what is added."""
    base = steps.base
    names = ("Mean over tokens", "of their mean squares") if few else ("The same", "mean square")
    ax = panel(figure, (LEFT, UP, PANEL, TALL), *names, log=True)
    draw_seeds(ax, steps, "mean_square")
    draw_laws(ax, steps)
    values = np.concatenate([steps(name, "mean_square").ravel() for name in steps.names])
    positive = values[values > 0]
    if len(positive):
        ax.set_ylim(positive.min() / 2, positive.max() * 100)
    log_ticks(ax)
    _x(ax, steps, False)
    ax = panel(figure, (RIGHT, UP, PANEL, TALL), "Norm ‖x‖", "mean over tokens")
    if steps.has("norm"):
        rows = steps.rows[base]
        width = float((rows["norm"] ** 2 / rows["mean_square"]).median())
        draw_seeds(ax, steps, "norm")
        draw_laws(ax, steps, lambda y: np.sqrt(width * y))
        ax.set_ylim(0, 1.12 * float(np.nanmax(steps(base, "norm"))) or 1)
    _x(ax, steps, False)
    share = _least_share(steps)
    under = f"≥ {share} of the mean square (dotted)" if share else "of x over its entries"
    ax = panel(figure, (LEFT, LOW, PANEL, TALL), "Variance", under)
    if steps.has("variance"):
        draw_seeds(ax, steps, "variance")
        ax.plot(
            steps.x, steps.mean(base, "mean_square"), color=INK, ls=(0, (1, 1.3)), lw=1.4, zorder=4
        )
        _from_zero(ax)
    _x(ax, steps, True)
    if steps.has("gradient_rms"):
        _gradient(figure, steps, (RIGHT, LOW, PANEL, TALL))
    else:
        _added(figure, steps, (RIGHT, LOW, PANEL, TALL))


def _from_zero(ax: Axes) -> None:
    """An axis from 0 to somewhat above the curves, also where they are nearly constant."""
    top = ax.dataLim.y1
    ax.set_ylim(0, 1.08 * top if 0 < top < np.inf else 1)


def _least_share(steps: Steps) -> str:
    """The variance over the mean square, at least."""
    if not steps.has("variance"):
        return ""
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.nanmin(steps(steps.base, "variance") / steps(steps.base, "mean_square"))
    return f"{np.floor(1000 * share) / 10:.3g} %" if np.isfinite(share) else ""


def _gradient(figure: Figure, steps: Steps, box: tuple[float, float, float, float]) -> None:
    ax = panel(figure, box, "Gradient of the loss", "with respect to x, rms", log=True)
    draw_seeds(ax, steps, "gradient_rms")
    own = steps.rows[steps.base]
    if "law_gradient_rms" in own and own["law_gradient_rms"].notna().any():
        law = steps.mean(steps.base, "law_gradient_rms")
        ax.plot(steps.x, law, color=COLOURS["theory"], ls=(0, (6, 2)), lw=1.4, zorder=4)
    measured = [name for name in steps.names if "gradient_rms" in steps.rows[name]]
    if not any((steps(name, "gradient_rms") > 0).any() for name in measured):
        ax.set_yscale("linear")
    else:
        log_ticks(ax)
    _x(ax, steps, box[1] == LOW)


def _added(figure: Figure, steps: Steps, box: tuple[float, float, float, float]) -> None:
    known = steps.has("branch_mean_square")
    what = "‖b‖²/d, as it is added" if known else "not known: blocks are measured as a whole"
    ax = panel(figure, box, "What a sublayer adds", what)
    if known:
        draw_seeds(ax, steps, "branch_mean_square", lw=1.6)
        _from_zero(ax)
    _x(ax, steps, box[1] == LOW)


def _beside(figure: Figure, steps: Steps, left: Departure | None, few: bool) -> None:
    """A checkpoint beside random inits: the ratio, the gradient, and why it grows as it does."""
    gradient = steps.has("gradient_rms")
    wide = PANEL if gradient else RIGHT + PANEL - LEFT
    _relative(figure, steps, (LEFT, UP, wide, TALL), left, few)
    if gradient:
        _gradient(figure, steps, (RIGHT, UP, PANEL, TALL))
    both = (("random", left.random), (steps.given, left.checkpoint)) if left else ()
    sums = [(name, split) for name, split in both if split is not None]
    if not sums:
        _added(figure, steps, (LEFT, LOW, RIGHT + PANEL - LEFT, TALL))
        return
    _added(figure, steps, (LEFT, LOW, PANEL, TALL))
    ax = panel(figure, (RIGHT, LOW, PANEL, TALL), "How it adds up", "Σ‖b‖²/d and Σ2⟨x, b⟩/d")
    most = max(max(abs(s.branches), abs(s.alignment)) for _, s in sums) or 1.0
    for i, (name, split) in enumerate(reversed(sums)):
        bars = ((0.19, split.branches, "size", None), (-0.19, split.alignment, "alignment", "////"))
        for up, value, what, hatch in bars:
            bar = ax.barh(i + up, value, 0.32, alpha=0.75, hatch=hatch, lw=0, color=COLOURS[name])
            bar[0].set_edgecolor("white")
            text = f"{what} {'+' if value >= 0 else '−'}{short(abs(value))}"
            place = (max(value, 0.0), i + up)
            ax.annotate(text, place, (4, 0), textcoords="offset points", va="center", fontsize=8)
    low = min(0.0, *(s.alignment for _, s in sums))
    ax.set(xlim=(1.1 * low, 2.1 * most), ylim=(-0.5, len(sums) - 0.5))
    ax.set_yticks(range(len(sums)), [])
    for i, (name, _) in enumerate(reversed(sums)):
        ax.annotate(
            name, (0, i), (-5, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", va="center", fontsize=7.5, color=COLOURS[name], rotation=90,
        )  # fmt: skip
    ax.axvline(0, color=DIM, lw=0.8)
    ax.grid(visible=False, axis="y")
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(FuncFormatter(plain))


def _relative(
    figure: Figure, steps: Steps, box: tuple[float, float, float, float], left: Departure | None,
    few: bool,
) -> None:  # fmt: skip
    """Mean squares over the random inits' mean: their band lies around 1. few: as for ``_main``."""
    under = "solid: mean, pale: 90 % of tokens,\ndotted: position 0"
    if few:
        under = "solid: mean, dashed: median token,\ndots: position 0, pale: 90 %"
    if box[2] > PANEL:  # there is room for more
        under = "÷ their mean; pale: 90 % of tokens, dotted: position 0"
        if few:
            under = "÷ their mean; solid: mean over tokens, dashed: the median token,\n"
            under += "dotted: position 0, pale: 90 % of tokens"
    ax = panel(figure, box, "Relative to random inits", under, log=True)
    mean = steps.mean(steps.base, "mean_square")
    with np.errstate(divide="ignore", invalid="ignore"):
        draw_seeds(ax, steps, "mean_square", lambda y: np.where(mean > 0, y / mean, np.nan))
        tokens = {
            part: steps.mean(steps.given, f"mean_square_{part}") / mean
            for part in ("p05", "p95", "first", "median")
        }
    red = COLOURS[steps.given]
    ax.fill_between(steps.x, tokens["p05"], tokens["p95"], color=red, alpha=0.14, lw=0)
    ax.plot(steps.x, tokens["first"], color=red, lw=1.1, ls=(0, (1, 1)))
    if few:
        ax.plot(steps.x, tokens["median"], color=red, lw=1.3, ls=(0, (5, 2)))
    if left is not None and left.sublayer is not None:
        ax.axvline(left.sublayer, color=red, lw=1.1, ls=(0, (5, 3)), zorder=1)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: plain(y) + "×"))
    log_ticks(ax)
    _x(ax, steps, False)
