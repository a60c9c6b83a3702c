"""What a curve of norms doesn't show: outliers, rank collapse, attention and gains, by sublayer."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from simlab.report.figure import COLOURS, LABELS, draw_curves, finish

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
    with sns.axes_style("whitegrid", {"grid.color": ".92", "axes.edgecolor": ".6"}):
        figure = Figure(figsize=(15, 6.4), layout="constrained")
        axes = figure.subplots(2, 4).flatten()
    for ax, (column, (words, scale)) in zip(axes, PANELS.items(), strict=True):
        rows = frame[frame[column].notna()]
        draw_curves(ax, rows, "sublayer", column)
        if column == "max_abs":
            for name, of in rows.groupby("curve", sort=False):
                median = of.groupby("sublayer")["median_abs"].mean()
                ax.plot(median.index, median, color=COLOURS[str(name)], ls=(0, (1, 1)), lw=1.6)
        if scale == "log" and (rows[column] > 0).all():
            ax.set_yscale("log")
        ax.set(xlabel="sublayer", ylabel="")
        ax.set_title(words, fontsize=10, color=".35")
    names = " and ".join(LABELS[str(name)] for name in frame["curve"].unique())
    return finish(figure, axes[0], [f"Inside the residual stream of {title}: {names}"])
