"""growth.png: the answer, the curve with its laws, and beside it what the curve alone doesn't show.

Axes are placed by hand and ticks are plain texts: matplotlib's layout engines and formulas would take
half of a run's time after its verdict (measured).
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from simlab.analysis.compare import Departure, departure
from simlab.analysis.curve import basis, laws_in
from simlab.analysis.numbers import short
from simlab.report.style import COLOURS, LABELS

INK, DIM, GRID = "#1a1d21", "#59616b", "#ecebe6"
WIDTH, PANELS_HEIGHT = 12.8, 4.9  # inches, of the figure and of its panels without titles
SKEWED = 5.0  # from this ratio of mean to median token on, a linear axis shows the median
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SUBLAYERS = "sublayer (0: the embedding; a block has two)"
_Array = NDArray[np.float64]


class _Steps:
    """A run's curves as arrays (seeds, steps), by curve and column; NaN where a curve has ended."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.names = list(dict.fromkeys(frame["curve"]))
        self.rows = {name: frame[frame["curve"] == name] for name in self.names}
        self.base = basis(frame)
        longest = max(self.rows.values(), key=lambda rows: rows.groupby("seed").size().max())
        steps = max((rows for _, rows in longest.groupby("seed")), key=len)
        self.kinds = steps["kind"].tolist()
        late = (steps["kind"] == "renorm").to_numpy() * 0.35  # makes the drop visible
        self.x = steps["sublayer"].to_numpy(np.float64) + late

    def __call__(self, name: str, column: str) -> _Array:
        rows = self.rows[name]
        found = np.full((rows["seed"].nunique(), len(self.x)), np.nan)
        for i, (_, values) in enumerate(rows.groupby("seed", sort=True)[column]):
            found[i, : len(values)] = values
        return found

    def mean(self, name: str, column: str) -> _Array:
        """Over the seeds that reach a step; NaN where none does."""
        return _over(np.nanmean, self(name, column))

    def has(self, column: str) -> bool:
        """True if some curve has a number in this column."""
        return any(column in rows and rows[column].notna().any() for rows in self.rows.values())

    def first_renorm(self) -> int:
        """The step of the first re-norm, or the number of steps."""
        return self.kinds.index("renorm") if "renorm" in self.kinds else len(self.kinds)


def _over(how: Callable[..., _Array], values: _Array) -> _Array:
    known = np.isfinite(values).any(0)
    out = np.full(values.shape[1], np.nan)
    out[known] = how(np.where(np.isfinite(values), values, np.nan)[:, known], axis=0)
    return out


def growth_figure(frame: pd.DataFrame, title: str, lines: Sequence[str]) -> Figure:
    """The run's main figure.

    The large panel has the mean square with the seeds' band, the laws, and theory with its band. Beside
    it: the same on a log axis, the norm, the variance, and the gradient (or what a sublayer adds). With
    a checkpoint beside random inits: its ratio to them, what its sublayers add, and how that adds up.

    frame: the rows of curve.csv. title: of the run. lines: the answer, then whatever else is to be said.
    """
    heads = textwrap.wrap(lines[0], 100) if lines else []
    more = [part for line in lines[1:] for part in textwrap.wrap(line, 165)]
    top = 0.72 + 0.28 * len(heads) + 0.2 * len(more)
    figure = Figure(figsize=(WIDTH, PANELS_HEIGHT + top), facecolor="white")
    height = PANELS_HEIGHT + top
    for i, line in enumerate(heads):
        _write(figure, 0.25, height - 0.38 - 0.28 * i, line, size=14, weight="bold")
    for i, line in enumerate(more):
        _write(figure, 0.25, height - 0.38 - 0.28 * len(heads) - 0.2 * i, line, size=9.5, colour=DIM)
    _write(figure, WIDTH - 0.25, 0.1, title, size=8, colour=DIM, ha="right")
    if frame.empty:
        return figure
    steps = _Steps(frame)
    left = departure(frame) if len(steps.names) > 1 else None
    _main(figure, steps, left)
    if "checkpoint" in steps.names and len(steps.names) > 1:
        _beside(figure, steps, left)
    else:
        _alone(figure, steps)
    return figure


def _write(
    figure: Figure, x: float, y: float, text: str, *, size: float, colour: str = INK,
    weight: str = "normal", ha: str = "left",
) -> None:  # fmt: skip
    """A text at inches from the lower left corner."""
    width, height = figure.get_size_inches()
    figure.text(x / width, y / height, text, fontsize=size, color=colour, weight=weight, ha=ha)


def plain(value: float, _: int | None = None) -> str:
    """A tick's text: ``10³``, ``2·10⁻⁴``, ``30``."""
    if value == 0:
        return "0"
    if 1e-2 <= abs(value) < 1e4:
        return f"{value:g}".replace("-", "−")
    digits, exponent = f"{value:.0e}".split("e")
    raised = f"10{str(int(exponent)).translate(RAISED)}"
    return {"1": raised, "-1": f"−{raised}"}.get(digits, f"{digits}·{raised}")


def _axes(
    figure: Figure, box: tuple[float, float, float, float], title: str, under: str, log: bool = False
) -> Axes:  # fmt: skip
    """Axes at inches (left, bottom, width, height), with a title that says what is seen."""
    width, height = figure.get_size_inches()
    x, y, w, h = box
    ax = figure.add_axes((x / width, y / height, w / width, h / height))
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#b5b5b0")
    ax.set_axisbelow(True)
    ax.grid(color=GRID, lw=0.8)
    ax.tick_params(colors=DIM, labelsize=8.5, length=0)
    _write(figure, x, y + h + 0.29, title, size=10, weight="bold")
    _write(figure, x, y + h + 0.1, under + (", log axis" if log else ""), size=8.5, colour=DIM)
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter(FuncFormatter(plain))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return ax


def _log_ticks(ax: Axes) -> None:
    """Round ticks for whatever a log axis now spans."""
    low, high = ax.get_ylim()
    decades = math.log10(high / low)
    subs = (1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.8 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=7 if decades > 3 else 12))


def _draw(
    ax: Axes, steps: _Steps, column: str, change: Callable[[_Array], _Array] = lambda y: y, lw: float = 2.0
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
            low, high = _over(np.nanmin, y), _over(np.nanmax, y)
            ax.fill_between(x, low, high, color=COLOURS[name], alpha=0.2, lw=0)
        ax.plot(x, _over(np.nanmean, y), color=COLOURS[name], lw=lw, zorder=3)


def _laws(
    ax: Axes, steps: _Steps, change: Callable[[_Array], _Array] = lambda y: y, expected: bool = False
) -> dict[str, _Array]:  # fmt: skip
    """The laws of the random inits (or of the checkpoint alone), above the curves, by their names.

    √2 per sublayer starts anew at each re-norm: it is drawn up to the first one.
    """
    drawn = {}
    own = steps.rows[steps.base]
    for law in laws_in(own, expected=expected):
        if steps.base == "theory" and law.name == "mean_field":
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            y = change(np.minimum(steps.mean(steps.base, law.column), 1e300))
        if not law.expected:
            y = np.where(np.arange(len(y)) < steps.first_renorm(), y, np.nan)
        drawn[law.name] = y
        ax.plot(steps.x, y, color=law.colour, ls=law.line, lw=1.6, zorder=4)
    return drawn


def _band(ax: Axes, steps: _Steps) -> None:
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


def _main(figure: Figure, steps: _Steps, left: Departure | None) -> None:
    """The mean square on a linear axis, with a name at the end of every line."""
    skewed = _skewed(steps)
    under = "mean of x² over width and tokens, after each sublayer; linear axis"
    if skewed:
        under = "mean of x² over width, after each sublayer; of the checkpoint the median token, pale: 90 % of tokens"
    ax = _axes(figure, (0.65, 0.6, 5.2, 4.1), "Mean square of the residual stream", under)
    shown: dict[str, _Array] = {}
    for name in steps.names:
        column = "mean_square_median" if skewed and name == "checkpoint" else "mean_square"
        shown[name] = steps.mean(name, column)
        values = steps(name, column)
        if skewed and name == "checkpoint":
            low, high = steps.mean(name, "mean_square_p05"), steps.mean(name, "mean_square_p95")
            ax.fill_between(steps.x, low, high, color=COLOURS[name], alpha=0.15, lw=0)
        elif len(values) > 1:
            low, high = _over(np.nanmin, values), _over(np.nanmax, values)
            ax.fill_between(steps.x, low, high, color=COLOURS[name], alpha=0.2, lw=0)
        ax.plot(steps.x, shown[name], color=COLOURS[name], lw=2.8, zorder=2)
    laws = _laws(ax, steps)
    _band(ax, steps)
    tops = [np.nanmax(y) for y in shown.values() if np.isfinite(y).any()]
    tops += [np.nanmax(steps(n, "mean_square")) for n in steps.names if not (skewed and n == "checkpoint")]
    of_law = {law.name: law for law in laws_in(steps.rows[steps.base])}
    tops += [y for n, v in laws.items() if of_law[n].expected and (y := np.nanmax(v)) < 3 * max(tops)]
    top = 1.08 * max(tops) or 1.0
    last = float(steps.x[-1])
    ax.set(xlim=(0, last or 1), ylim=(0, top))
    ax.set_xlabel(SUBLAYERS, fontsize=9, color=DIM)
    names = []
    for name, y in shown.items():
        seeds = steps.rows[name]["seed"].nunique()
        text = LABELS[name] + (f"\n{seeds} seeds, band: least to most" if seeds > 1 else "")
        if name == "theory":
            text += "\nband: ± 2 std of a seed"
        names.append((_last(y), text, COLOURS[name], "bold"))
    for name, y in laws.items():
        law = of_law[name]
        if np.nanmax(y) > top:
            _leaving(ax, steps, y, top, law.label, law.colour, left)
        elif law.expected:
            text = law.label + ("\nband: ± 2 std of a seed" if name == "mean_field" else "")
            names.append((_last(y), text, law.colour, "normal"))
        else:
            names.append((_last(y), f"{law.label}{': until the re-norm' if 'renorm' in steps.kinds else ''}", law.colour, "normal"))
    _ends(ax, names, top)
    _peak(ax, steps, shown[steps.names[0]])
    if left is not None:
        _leaves(ax, left, last)


def _skewed(steps: _Steps) -> bool:
    """True for a checkpoint of whose tokens a few are far larger than the median."""
    if "checkpoint" not in steps.names or "mean_square_median" not in steps.rows["checkpoint"]:
        return False
    rows = steps.rows["checkpoint"]
    return bool((rows["mean_square"] > SKEWED * rows["mean_square_median"]).any())


def _last(y: _Array) -> float:
    known = np.flatnonzero(np.isfinite(y))
    return float(y[known[-1]]) if len(known) else math.nan


def _ends(ax: Axes, names: Sequence[tuple[float, str, str, str]], top: float) -> None:
    """The lines' names right of the axes, each at its line's end, moved apart where they'd overlap."""
    placed = sorted((n for n in names if math.isfinite(n[0])), key=lambda n: n[0])
    heights = [0.042 * (text.count("\n") + 1) + 0.018 for _, text, *_ in placed]
    at = [min(max(value / top, 0.0), 1.0) for value, *_ in placed]
    for i in range(1, len(at)):  # upwards, then back down from the top
        at[i] = max(at[i], at[i - 1] + (heights[i] + heights[i - 1]) / 2)
    limit = 1.0
    for i in reversed(range(len(at))):
        at[i] = min(at[i], limit - heights[i] / 2 if limit < 1 else 1.0)
        limit = at[i] - heights[i] / 2
    for y, (_, text, colour, weight) in zip(at, placed, strict=True):
        first, *others = text.split("\n")
        offset = 0.021 * len(others)
        ax.text(1.015, y + offset, first, transform=ax.transAxes, color=colour, fontsize=9, weight=weight, va="center")
        for i, line in enumerate(others):
            ax.text(1.015, y + offset - 0.042 * (i + 1), line, transform=ax.transAxes, color=colour, fontsize=8, va="center")


HALO = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.2}


def _leaving(
    ax: Axes, steps: _Steps, y: _Array, top: float, label: str, colour: str, left: Departure | None
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


def _peak(ax: Axes, steps: _Steps, y: _Array) -> None:
    """The largest peak of a saw-tooth, with its value."""
    rows = [i - 1 for i, kind in enumerate(steps.kinds) if kind == "renorm" and np.isfinite(y[i - 1])]
    if not rows:
        return
    at = max(rows, key=lambda i: y[i])
    ax.annotate(
        f"peak {short(float(y[at]))}", (steps.x[at], y[at]), (0, 8), textcoords="offset points",
        fontsize=9, ha="center", color=INK, bbox=HALO, zorder=6,
    )  # fmt: skip


def _leaves(ax: Axes, left: Departure, last: float) -> None:
    """Where the checkpoint leaves the random inits' band for good, below the curves' names."""
    if left.sublayer is None:
        return
    red, at = COLOURS["checkpoint"], left.sublayer
    ax.axvline(at, color=red, lw=1.1, ls=(0, (5, 3)), zorder=1)
    where = f"outside the random inits' band\nfor good from {f'sublayer {at}' if at else 'the embedding'} on"
    end = at > 0.55 * last
    ax.annotate(
        where, (at, 0.86), (-6 if end else 6, 0), xycoords=("data", "axes fraction"), va="top",
        textcoords="offset points", ha="right" if end else "left", fontsize=9, color=red, bbox=HALO, zorder=6,
    )  # fmt: skip


# The panels on the right: two columns and two rows, in inches.
LEFT, RIGHT, PANEL, LOW, UP, TALL = 8.35, 10.85, 1.75, 0.6, 3.15, 1.55


def _x(ax: Axes, steps: _Steps, label: bool) -> None:
    ax.set_xlim(0, float(steps.x[-1]) or 1)
    if label:
        ax.set_xlabel("sublayer", fontsize=8.5, color=DIM)


def _alone(figure: Figure, steps: _Steps) -> None:
    """One kind of curve: its log axis, norm, variance, and gradient or what is added."""
    base = steps.base
    width = float((steps.rows[base]["norm"] ** 2 / steps.rows[base]["mean_square"]).median()) if steps.has("norm") else 0.0
    ax = _axes(figure, (LEFT, UP, PANEL, TALL), "The same", "mean square", log=True)
    _draw(ax, steps, "mean_square")
    _laws(ax, steps)
    values = np.concatenate([steps(name, "mean_square").ravel() for name in steps.names])
    positive = values[values > 0]
    if len(positive):
        ax.set_ylim(positive.min() / 2, positive.max() * 100)
    _log_ticks(ax)
    _x(ax, steps, False)
    ax = _axes(figure, (RIGHT, UP, PANEL, TALL), "Norm ‖x‖", "mean over tokens")
    if steps.has("norm"):
        _draw(ax, steps, "norm")
        _laws(ax, steps, lambda y: np.sqrt(width * y))
        ax.set_ylim(0, 1.12 * float(np.nanmax(steps(base, "norm"))) or 1)
    _x(ax, steps, False)
    share = _least_share(steps)
    ax = _axes(figure, (LEFT, LOW, PANEL, TALL), "Variance", f"≥ {share} of the mean square (dotted)" if share else "of x over its entries")
    if steps.has("variance"):
        _draw(ax, steps, "variance")
        ax.plot(steps.x, steps.mean(base, "mean_square"), color=INK, ls=(0, (1, 1.3)), lw=1.4, zorder=4)
        ax.set_ylim(0)
    _x(ax, steps, True)
    if steps.has("gradient_rms"):
        _gradient(figure, steps, (RIGHT, LOW, PANEL, TALL))
    else:
        _added(figure, steps, (RIGHT, LOW, PANEL, TALL))


def _least_share(steps: _Steps) -> str:
    """The variance over the mean square, at least."""
    if not steps.has("variance"):
        return ""
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.nanmin(steps(steps.base, "variance") / steps(steps.base, "mean_square"))
    return f"{100 * share:.3g} %" if np.isfinite(share) else ""


def _gradient(figure: Figure, steps: _Steps, box: tuple[float, float, float, float]) -> None:
    ax = _axes(figure, box, "Gradient of the loss", "with respect to x, rms", log=True)
    _draw(ax, steps, "gradient_rms")
    own = steps.rows[steps.base]
    if "law_gradient_rms" in own and own["law_gradient_rms"].notna().any():
        law = steps.mean(steps.base, "law_gradient_rms")
        ax.plot(steps.x, law, color=COLOURS["theory"], ls=(0, (6, 2)), lw=1.4, zorder=4)
    if not any((steps(name, "gradient_rms") > 0).any() for name in steps.names if "gradient_rms" in steps.rows[name]):
        ax.set_yscale("linear")
    else:
        _log_ticks(ax)
    _x(ax, steps, box[1] == LOW)


def _added(figure: Figure, steps: _Steps, box: tuple[float, float, float, float]) -> None:
    ax = _axes(figure, box, "What a sublayer adds", "‖b‖²/d, as it is added")
    if steps.has("branch_mean_square"):
        _draw(ax, steps, "branch_mean_square", lw=1.6)
        ax.set_ylim(0)
    _x(ax, steps, box[1] == LOW)


def _beside(figure: Figure, steps: _Steps, left: Departure | None) -> None:
    """A checkpoint beside random inits: the ratio, the gradient, and why it grows as it does."""
    gradient = steps.has("gradient_rms")
    wide = PANEL if gradient else RIGHT + PANEL - LEFT
    _relative(figure, steps, (LEFT, UP, wide, TALL), left)
    if gradient:
        _gradient(figure, steps, (RIGHT, UP, PANEL, TALL))
    sums = [(name, split) for name, split in (("random", left.random), ("checkpoint", left.checkpoint)) if split] if left else []
    if not sums:
        _added(figure, steps, (LEFT, LOW, RIGHT + PANEL - LEFT, TALL))
        return
    _added(figure, steps, (LEFT, LOW, PANEL, TALL))
    ax = _axes(figure, (RIGHT, LOW, PANEL, TALL), "How it adds up", "Σ‖b‖²/d and Σ2⟨x, b⟩/d")
    most = max(max(abs(s.branches), abs(s.alignment)) for _, s in sums) or 1.0
    for i, (name, split) in enumerate(reversed(sums)):
        for y, value, what, hatch in ((i + 0.19, split.branches, "size", None), (i - 0.19, split.alignment, "alignment", "////")):
            ax.barh(y, value, 0.32, color=COLOURS[name], alpha=0.75, hatch=hatch, edgecolor="white", lw=0)
            text = f"{what} {'+' if value >= 0 else '−'}{short(abs(value))}"
            ax.annotate(text, (max(value, 0.0), y), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    low = min(0.0, *(s.alignment for _, s in sums))
    ax.set(xlim=(1.1 * low, 2.1 * most), ylim=(-0.5, len(sums) - 0.5))
    ax.set_yticks(range(len(sums)), [])
    for i, (name, _) in enumerate(reversed(sums)):
        ax.annotate("random" if name == "random" else name, (0, i), (-5, 0), xycoords=("axes fraction", "data"),
                    textcoords="offset points", ha="right", va="center", fontsize=7.5, color=COLOURS[name], rotation=90)  # fmt: skip
    ax.axvline(0, color=DIM, lw=0.8)
    ax.grid(visible=False, axis="y")
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(FuncFormatter(plain))


def _relative(
    figure: Figure, steps: _Steps, box: tuple[float, float, float, float], left: Departure | None
) -> None:  # fmt: skip
    """Mean squares over the random inits' mean: their band lies around 1."""
    ax = _axes(figure, box, "Relative to random inits", "÷ their mean; pale: 90 % of tokens, dotted: position 0", log=True)
    if box[2] == PANEL:
        ax.figure.texts[-1].set_text("pale: 90 % of tokens, log axis")  # there is no room for more
    mean = steps.mean(steps.base, "mean_square")
    with np.errstate(divide="ignore", invalid="ignore"):
        _draw(ax, steps, "mean_square", lambda y: np.where(mean > 0, y / mean, np.nan))
        tokens = {p: steps.mean("checkpoint", f"mean_square_{p}") / mean for p in ("p05", "p95", "first", "median")}
    red = COLOURS["checkpoint"]
    ax.fill_between(steps.x, tokens["p05"], tokens["p95"], color=red, alpha=0.14, lw=0)
    ax.plot(steps.x, tokens["first"], color=red, lw=1.1, ls=(0, (1, 1)))
    if _skewed(steps):
        ax.plot(steps.x, tokens["median"], color=red, lw=1.3, ls=(0, (5, 2)))
        ax.figure.texts[-1].set_text("÷ their mean; dashed: median token, dotted: position 0; log axis")
    if left is not None and left.sublayer is not None:
        ax.axvline(left.sublayer, color=red, lw=1.1, ls=(0, (5, 3)), zorder=1)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: plain(y) + "×"))
    _log_ticks(ax)
    _x(ax, steps, False)
