"""Figures: growth with the seeds' band and both laws, the gradient, and growth exponents by block."""

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

from simlab.growth.exponents import per_block
from simlab.store import write_atomically

LABELS = {"random": "random init", "checkpoint": "checkpoint"}
COLOURS = {"random": "#1f77b4", "checkpoint": "#d62728"}
OUTSIDE_COLOUR = "#fdeecb"
LAW_STYLES = {
    "law_additive": ("additive law", "#222222", (0, (1.2, 1.2))),
    "law_sqrt2": ("√2 per sublayer", "#e08214", (0, (5, 2))),
}


def growth_figure(frame: pd.DataFrame, title: str, lines: Sequence[str]) -> Figure:
    """Mean square of the residual stream against sublayer, on a linear axis and on a log one.

    With a checkpoint, how its tokens spread, where it is outside the random inits, and a panel with the
    two sums that its growth is made of. Where gradients were measured, a panel holds their
    rms.
    """
    frame, gradients = frame.copy(), "gradient_rms" in frame
    trained = bool((frame["curve"] == "checkpoint").any())
    # A re-norm happens after its sublayer: half a step to the right makes the drop visible.
    frame["x"] = frame["sublayer"] + np.where(frame["kind"] == "renorm", 0.35, 0.0)
    with sns.axes_style("whitegrid", {"grid.color": ".92", "axes.edgecolor": ".6"}):
        panels = 2 + gradients + trained
        figure = Figure(figsize=(3 + 4 * panels, 4.8), layout="constrained")
        axes = figure.subplots(1, panels)
    if trained:
        _tokens(axes[1], frame)
        why(axes[2], frame)
    for ax, scale in zip(axes[:2], ("linear", "log"), strict=True):
        _laws(ax, frame)
        draw_curves(ax, frame, "x", "mean_square")
        _limits(ax, frame, scale)
        ax.set(xlabel="sublayer (0: embedding)", ylabel="")
        ax.set_title(f"mean square, {scale} axis", fontsize=10, color=".35")
        if trained:
            _outside(ax, frame)
    axes[0].set_ylabel("mean square of the residual stream")
    if gradients:
        ax = axes[-1]
        draw_curves(ax, frame, "x", "gradient_rms")
        if (frame["gradient_rms"] > 0).any():
            ax.set_yscale("log")
        ax.set(xlabel="sublayer (0: embedding)", ylabel="rms")
        ax.set_title("gradient with respect to the residual stream", fontsize=10, color=".35")
    return finish(figure, axes[1], [title, *lines])


def _tokens(ax: Axes, frame: pd.DataFrame) -> None:
    """How a checkpoint's tokens spread about their mean, and the first position by itself."""
    rows = frame[frame["curve"] == "checkpoint"]
    low, high = rows["mean_square_p05"], rows["mean_square_p95"]
    ax.fill_between(
        rows["x"], low, high, color=COLOURS["checkpoint"], alpha=0.15, lw=0,
        label="checkpoint, 90 % of tokens", zorder=1,
    )  # fmt: skip
    ax.plot(
        rows["x"], rows["mean_square_first"], color=COLOURS["checkpoint"], lw=1.2, ls=(0, (1, 1)),
        label="checkpoint, position 0", zorder=2,
    )  # fmt: skip


def _outside(ax: Axes, frame: pd.DataFrame) -> None:
    """Shade the sublayers where the checkpoint is outside the random inits' band."""
    rows = frame[(frame["curve"] == "checkpoint") & frame["outside"].notna()]
    away = rows["outside"].to_numpy() == 1
    if not away.any():
        return
    x = rows["x"].to_numpy()
    for i in np.flatnonzero(away):
        ax.axvspan(x[i] - 0.5, x[i] + 0.5, color=OUTSIDE_COLOUR, lw=0, zorder=0)
    ax.axvspan(np.nan, np.nan, color=OUTSIDE_COLOUR, label="checkpoint outside random inits")


def lambda_figure(frame: pd.DataFrame, depth: int, title: str) -> Figure | None:
    """λ by block, pairwise and from the first: a row for activations, one for gradients.

    None where there is no λ: a single block, or curves that end before their second.
    """
    blocks = per_block(frame, depth)
    if blocks["lambda_pairwise"].isna().all():
        return None
    kinds = list(blocks["of"].unique())
    with sns.axes_style("whitegrid", {"grid.color": ".92", "axes.edgecolor": ".6"}):
        figure = Figure(figsize=(11, 1.6 + 3.2 * len(kinds)), layout="constrained")
        axes = figure.subplots(len(kinds), 2, squeeze=False)
    for row, of in zip(axes, kinds, strict=True):
        for ax, name in zip(row, ("lambda_pairwise", "lambda_from_first"), strict=True):
            part = blocks[blocks["of"] == of]
            measured = part[~part["curve"].isin(list(LAW_STYLES))]
            for law, (label, colour, style) in LAW_STYLES.items():
                mean = part[part["curve"] == law].groupby("block")[name].mean()
                if not mean.empty:
                    ax.plot(mean.index, mean, color=colour, ls=style, lw=1.6, label=label, zorder=3)
            draw_curves(ax, measured, "block", name)
            if name == "lambda_from_first":
                _mean_vector(ax, measured)
            ax.axhline(0, color=".4", lw=0.8, zorder=1)
            ax.set(xlabel="block", ylabel="λ")
            words = "from the block before" if name == "lambda_pairwise" else "from the first block"
            ax.set_title(f"{of}, {words}", fontsize=10, color=".35")
            shown = [name] if name == "lambda_pairwise" else [name, "lambda_paper"]
            _lambda_limits(ax, pd.concat([measured[n] for n in shown]), part[name])
    return finish(figure, axes[0, 1], [f"Growth exponents λ of {title}"])


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


def _mean_vector(ax: Axes, frame: pd.DataFrame) -> None:
    """λ of the one mean vector, the paper's, beside that of the tokens' mean norm."""
    for name, rows in frame.groupby("curve", sort=False):
        mean = rows.groupby("block")["lambda_paper"].mean()
        label = f"{LABELS[str(name)]}, of the mean vector (paper)"
        ax.plot(mean.index, mean, color=COLOURS[str(name)], ls=(0, (4, 1.5)), lw=1.4, label=label)


def _lambda_limits(ax: Axes, measured: pd.Series, every: pd.Series) -> None:
    """What was measured fills the axis; a law may widen it threefold."""
    values = measured.replace([np.inf, -np.inf], np.nan).dropna()
    if values.empty:
        return
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    size = (high - low) or 1e-3
    top, bottom = float(every.max()), float(every.min())
    ax.set_ylim(max(low - 3 * size, min(bottom, low)) - 0.08 * size,
                min(high + 3 * size, max(top, high)) + 0.08 * size)  # fmt: skip


def finish(figure: Figure, ax: Axes, lines: Sequence[str]) -> Figure:
    """One legend for all panels, below; the lines above."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9.5
        )
    width = round(figure.get_figwidth() * 13)
    wrapped = [part for line in lines for part in textwrap.wrap(line, width)]
    figure.suptitle("\n".join(wrapped), fontsize=10.5, x=0.01, ha="left")
    return figure


def _laws(ax: Axes, frame: pd.DataFrame) -> None:
    if frame.empty:  # every curve overflowed at the embedding
        return
    basis = "random" if (frame["curve"] == "random").any() else "checkpoint"
    law = frame[frame["curve"] == basis].groupby("x")[list(LAW_STYLES)].mean()
    law = law.clip(upper=1e6 * frame["mean_square"].max())  # off the axis, within float64
    law.loc[law.index % 1 > 0.2, list(LAW_STYLES)] = np.nan  # a gap at each re-norm, not a drop
    for name, (label, colour, style) in LAW_STYLES.items():
        ax.plot(law.index, law[name], color=colour, ls=style, lw=1.6, label=label, zorder=3)


def draw_curves(ax: Axes, frame: pd.DataFrame, x: str, y: str) -> None:
    """Each curve's mean over seeds with its band."""
    for name in frame["curve"].unique():
        of_curve = frame[frame["curve"] == name]
        if of_curve[y].isna().all():
            continue
        seeds = of_curve["seed"].nunique()
        label = LABELS[name] + (f" ({seeds} seeds: mean, min to max)" if seeds > 1 else "")
        few = of_curve[x].nunique() <= 24
        sns.lineplot(
            of_curve, x=x, y=y, ax=ax, label=label, color=COLOURS[name], lw=2,
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
    ax.set_ylim(float(positive.min()) / 2, max(top, min(laws, top * 500)) * 2)


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """NAME.png and NAME.svg; the same figure gives the same bytes."""
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    with matplotlib.rc_context({"svg.hashsalt": "simlab"}):
        write_atomically(paths[0], lambda path: figure.savefig(path, dpi=150))
        write_atomically(paths[1], lambda path: figure.savefig(path, metadata={"Date": None}))
    return paths
