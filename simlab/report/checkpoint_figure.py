"""A checkpoint beside random inits: how far from them, why, and what a curve of norms doesn't show."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from simlab.analysis.compare import departure
from simlab.analysis.curve import basis, laws_in
from simlab.report.style import COLOURS, LABELS, draw_curves, finish, law_band, subplots


def relative(ax: Axes, frame: pd.DataFrame) -> None:
    """Mean squares over the random inits' mean, a log axis: their band lies around 1."""
    mean = frame[frame["curve"] == basis(frame)].groupby("x")["mean_square"].mean()
    frame = frame[frame["x"].isin(mean.index)].copy()
    of = frame["x"].map(mean)
    frame["ratio"] = frame["mean_square"] / of
    red, rows = COLOURS["checkpoint"], frame[frame["curve"] == "checkpoint"]
    low, high, first = (
        rows[f"mean_square_{part}"] / rows["x"].map(mean) for part in ("p05", "p95", "first")
    )
    ax.fill_between(
        rows["x"], low, high, color=red, alpha=0.15, lw=0, label="checkpoint, 90 % of tokens"
    )
    ax.plot(rows["x"], first, color=red, lw=1.2, ls=(0, (1, 1)), label="checkpoint, position 0")
    for law in laws_in(frame, expected=True):
        says = (frame[law.column] / of)[frame["curve"] == basis(frame)].groupby(frame["x"]).mean()
        ax.plot(says.index, says, color=law.colour, ls=law.line, lw=1.6, zorder=3)
        if law.name == "mean_field":
            std = (frame["band_mean_field"] / of).groupby(frame["x"]).mean()
            law_band(ax, says.index.to_series(), says, std, law)
    draw_curves(ax, frame, "x", "ratio")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}×"))
    ax.yaxis.set_minor_locator(NullLocator())
    leaves(ax, frame)
    ax.set(xlabel="sublayer (0: embedding)", ylabel="")
    ax.set_title("relative to the random inits' mean, log axis", fontsize=10, color=".35")


def leaves(ax: Axes, frame: pd.DataFrame) -> None:
    """A line where the checkpoint leaves the random inits' band for good."""
    departed = departure(frame)
    if departed is None or departed.sublayer is None:
        return
    at, last = departed.sublayer, int(frame["sublayer"].max())
    left = at > 0.6 * last
    ax.axvline(at, color=COLOURS["checkpoint"], lw=1.2, ls=(0, (6, 3)), zorder=1)
    ax.annotate(
        f"outside the random band\nfor good from sublayer {at}", (at, 0.975), (-5 if left else 5, 0),
        xycoords=("data", "axes fraction"), textcoords="offset points", va="top",
        ha="right" if left else "left", fontsize=9, color=COLOURS["checkpoint"],
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
    )  # fmt: skip


def why(ax: Axes, frame: pd.DataFrame) -> None:
    """v_k − v_0 = Σ‖b‖²/d + Σ2⟨x, b⟩/d, summed up to each sublayer: size and alignment of branches."""
    for name in ("random", "checkpoint"):
        rows = frame[frame["curve"] == name]
        if rows.empty:
            continue
        width = float((rows["delta_branch"] / rows["branch_mean_square"]).median())
        for column, words, style in (
            ("delta_cross", "alignment, 2⟨x, b⟩", "-"),
            ("delta_branch", "size of branches, ‖b‖²", (0, (4, 1.5))),
        ):
            total = rows.groupby("seed")[column].cumsum() / width
            mean = total.groupby(rows["x"]).mean()
            label = f"{LABELS[name]}: {words}"
            ax.plot(mean.index, mean, color=COLOURS[name], ls=style, lw=1.8, label=label)
    ax.axhline(0, color=".4", lw=0.8)
    ax.legend(fontsize=8.5, frameon=False, loc="upper left")
    ax.set(xlabel="sublayer (0: embedding)", ylabel="")
    ax.set_title("what its growth is made of, added up", fontsize=10, color=".35")


PANELS = {  # column: title, scale
    "max_abs": ("largest |x| (dotted: the median)", "log"),
    "kurtosis": ("kurtosis of x (3: Gaussian)", "log"),
    "token_cosine": ("cosine between tokens (1: rank collapse)", "linear"),
    "cosine": ("cosine of x and what is added", "linear"),
    "attention_entropy": ("attention entropy, nats", "linear"),
    "attention_max_logit": ("largest attention logit", "linear"),
    "attention_first": ("attention to position 0", "linear"),
    "gain_mean_square": ("mean square of the norm's gain", "linear"),
}


def inside_figure(frame: pd.DataFrame, title: str) -> Figure | None:
    """A panel per statistic, a checkpoint's beside the random inits'. None without a checkpoint."""
    if not (frame["curve"] == "checkpoint").any():
        return None
    figure, axes = subplots(2, 4, (15, 6.4))
    for ax, (column, (words, scale)) in zip(axes.flat, PANELS.items(), strict=True):
        rows = frame[frame[column].notna()]
        draw_curves(ax, rows, "sublayer", column)
        if column == "max_abs":
            for name, of in rows.groupby("curve", sort=False):
                median = of.groupby("sublayer")["median_abs"].mean()
                ax.plot(median.index, median, color=COLOURS[str(name)], ls=(0, (1, 1)), lw=1.6)
        low, high = rows[column].min(), rows[column].max()
        if scale == "log" and low > 0 and high > 8 * low:  # less than a decade has no round ticks
            ax.set_yscale("log")
        ax.set(xlabel="sublayer", ylabel="")
        ax.set_title(words, fontsize=10, color=".35")
    names = " and ".join(LABELS[str(name)] for name in frame["curve"].unique())
    return finish(figure, list(axes.flat), [f"Inside the residual stream of {title}: {names}"])
