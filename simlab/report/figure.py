"""The growth figure: the measured curves with the seeds' band, both laws, linear and log axes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simlab.store import write_atomically

LABELS = {"random": "random init", "checkpoint": "checkpoint"}
COLOURS = {"random": "#1f77b4", "checkpoint": "#d62728"}
LAW_STYLES = {
    "law_additive": ("additive law", "#222222", (0, (1.2, 1.2))),
    "law_sqrt2": ("√2 per sublayer", "#e08214", (0, (5, 2))),
}


def growth_figure(frame: pd.DataFrame, title: str, lines: Sequence[str]) -> Figure:
    """Mean square of the residual stream against sublayer, linear on the left, log on the right."""
    frame = frame.copy()
    # A re-norm happens after its sublayer: half a step to the right makes the drop visible.
    frame["x"] = frame["sublayer"] + np.where(frame["kind"] == "renorm", 0.35, 0.0)
    with sns.axes_style("whitegrid", {"grid.color": ".92", "axes.edgecolor": ".6"}):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        axes = figure.subplots(1, 2)
    for ax, scale in zip(axes, ("linear", "log"), strict=True):
        _draw(ax, frame)
        _limits(ax, frame, scale)
        ax.set(xlabel="sublayer (0: embedding)", ylabel="")
        ax.set_title(f"{scale} axis", fontsize=10, color=".35")
    axes[0].set_ylabel("mean square of the residual stream")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9.5
        )
    wrapped = [part for line in lines for part in textwrap.wrap(line, 145)]
    figure.suptitle("\n".join([title, *wrapped]), fontsize=10.5, x=0.01, ha="left")
    return figure


def _draw(ax: Axes, frame: pd.DataFrame) -> None:
    if frame.empty:  # every curve overflowed at the embedding
        return
    basis = "random" if (frame["curve"] == "random").any() else "checkpoint"
    law = frame[frame["curve"] == basis].groupby("x")[list(LAW_STYLES)].mean()
    law.loc[law.index % 1 > 0.2, list(LAW_STYLES)] = np.nan  # a gap at each re-norm, not a drop
    for name, (label, colour, style) in LAW_STYLES.items():
        ax.plot(law.index, law[name], color=colour, ls=style, lw=1.6, label=label, zorder=3)
    for name in frame["curve"].unique():
        of_curve = frame[frame["curve"] == name]
        seeds = of_curve["seed"].nunique()
        label = LABELS[name] + (f" ({seeds} seeds: mean, min to max)" if seeds > 1 else "")
        few = of_curve["x"].nunique() <= 24
        sns.lineplot(
            of_curve, x="x", y="mean_square", ax=ax, label=label, color=COLOURS[name], lw=2,
            errorbar=("pi", 100) if seeds > 1 else None, marker="o" if few else None,
            markersize=5, legend=False, zorder=2,
        )  # fmt: skip


def _limits(ax: Axes, frame: pd.DataFrame, scale: str) -> None:
    """Linear: what was measured fills the axis. Log: the √2 law may use three further decades."""
    v = frame["mean_square"]
    if v.empty:
        return
    top = float(
        max(v.max(), frame.loc[frame["curve"] == frame["curve"].iloc[-1], "law_additive"].max())
    )
    ax.set_xlim(frame["x"].min() - 0.3, frame["x"].max() + 0.3)
    if scale == "linear":
        ax.set_ylim(0, top * 1.12 or 1)
        return
    positive = v[v > 0]
    if positive.empty:
        return
    ax.set_yscale("log")
    laws = frame[["law_sqrt2", "law_additive"]].replace([np.inf], np.nan).max().max()
    ax.set_ylim(float(positive.min()) / 2, max(top * 2, min(laws * 2, top * 1e3)))


def save(figure: Figure, folder: Path) -> list[Path]:
    """growth.png and growth.svg; the same figure gives the same bytes."""
    paths = [folder / "growth.png", folder / "growth.svg"]
    with matplotlib.rc_context({"svg.hashsalt": "simlab"}):
        write_atomically(paths[0], lambda path: figure.savefig(path, dpi=150))
        write_atomically(paths[1], lambda path: figure.savefig(path, metadata={"Date": None}))
    return paths
