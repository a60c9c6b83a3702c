"""A checkpoint beside random inits: how far from them, why, and what a curve of norms doesn't show."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from simlab.report.style import COLOURS, LABELS, draw_curves, finish, subplots

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
