"""A checkpoint beside random inits: how far from them, why, and what a curve of norms doesn't show."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from simlab.analysis.curve import given_in
from simlab.report.colours import COLOURS, LABELS
from simlab.report.panels import log_ticks, plain
from simlab.report.style import draw_curves, finish, subplots

PANELS = {  # column: title, axis, scale
    "max_abs": ("largest entry of x (dotted: the median)", "|x|", "log"),
    "token_ratio": ("largest token over the median token", "ratio of mean squares", "log"),
    "kurtosis": ("kurtosis of a token's entries (3: Gaussian)", "mean x⁴ / (mean x²)²", "log"),
    "token_cosine": ("cosine between tokens (1: rank collapse)", "cosine", "linear"),
    "cosine": ("cosine of x and what is added", "cosine", "linear"),
    "gain_mean_square": ("gain of the sublayer's norm", "mean square of the gain", "linear"),
    "attention_entropy": ("attention entropy", "nats", "linear"),
    "attention_max_logit": ("largest attention logit", "logit", "linear"),
    "attention_first": ("attention to position 0", "share of the attention", "linear"),
}


def inside_figure(frame: pd.DataFrame, title: str) -> Figure | None:
    """A panel per statistic, a checkpoint's beside the random inits'. None without a checkpoint."""
    if not given_in(frame):
        return None
    median = frame["mean_square_median"]
    frame = frame.assign(token_ratio=frame["mean_square_max"] / median.where(median > 0))
    figure, axes = subplots(3, 3, (12, 9))
    for ax, (column, (words, unit, scale)) in zip(axes.flat, PANELS.items(), strict=True):
        rows = frame[frame[column].notna()]
        draw_curves(ax, rows, "sublayer", column)
        if column == "max_abs":
            for name, of in rows.groupby("curve", sort=False):
                typical = of.groupby("sublayer")["median_abs"].mean()
                ax.plot(typical.index, typical, color=COLOURS[str(name)], ls=(0, (1, 1)), lw=1.6)
        if rows.empty:
            ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color=".35")
        low, high = rows[column].min(), rows[column].max()
        if scale == "log" and low > 0 and high > 8 * low:  # less than a decade has no round ticks
            ax.set_yscale("log")
            unit += ", log axis"
            log_ticks(ax)
            ax.yaxis.set_major_formatter(FuncFormatter(plain))
            ax.yaxis.set_minor_locator(NullLocator())
        ax.set(xlabel="sublayer" if ax in axes[-1] else "", ylabel=unit)
        ax.set_xlim(-0.5, frame["sublayer"].max() + 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.set_title(words, fontsize=10, color=".35")
    names = " and ".join(LABELS[str(name)] for name in frame["curve"].unique())
    head = f"Inside the residual stream: {names}."
    return finish(figure, list(axes.flat), [head, title])
