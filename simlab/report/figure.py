"""Figures: growth with the seeds' band and the laws, the gradient, and growth exponents by block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simlab.analysis import LAWS, Law
from simlab.analysis.curve import basis, laws_in
from simlab.analysis.exponents import per_block
from simlab.report import checkpoint_figure
from simlab.report.style import COLOURS, LABELS, draw_curves, finish, law_band, subplots


def growth_figure(frame: pd.DataFrame, title: str, lines: Sequence[str]) -> Figure:
    """Mean square of the residual stream against sublayer, on a linear axis and on a log one.

    With a checkpoint beside random inits the second panel is relative to their mean, and a third
    has the two sums that growth is made of. Where gradients were measured, the last holds their rms.
    """
    frame, gradients = frame.copy(), "gradient_rms" in frame
    beside = frame["curve"].nunique() > 1
    # A re-norm happens after its sublayer: half a step to the right makes the drop visible.
    frame["x"] = frame["sublayer"] + np.where(frame["kind"] == "renorm", 0.35, 0.0)
    panels = 2 + gradients + beside
    figure, ((*axes,),) = subplots(1, panels, (3 + 4 * panels, 4.8))
    if beside:
        checkpoint_figure.relative(axes[1], frame)
        checkpoint_figure.why(axes[2], frame)
        checkpoint_figure.leaves(axes[0], frame)
    for ax, scale in zip(axes[:2], ["linear"] if beside else ["linear", "log"], strict=False):
        _laws(ax, frame)
        draw_curves(ax, frame, "x", "mean_square")
        _limits(ax, frame, scale)
        ax.set(xlabel="sublayer (0: embedding)", ylabel="")
        ax.set_title(f"mean square, {scale} axis", fontsize=10, color=".35")
    axes[0].set_ylabel("mean square of the residual stream")
    if gradients:
        ax = axes[-1]
        if "law_gradient_rms" in frame and frame["law_gradient_rms"].notna().any():
            _law(ax, LAWS["mean_field"], frame.groupby("x")["law_gradient_rms"].mean())
        draw_curves(ax, frame, "x", "gradient_rms")
        if (frame["gradient_rms"] > 0).any():
            ax.set_yscale("log")
        ax.set(xlabel="sublayer (0: embedding)", ylabel="rms")
        ax.set_title("gradient with respect to the residual stream", fontsize=10, color=".35")
    return finish(figure, axes[:2], [title, *lines])


def lambda_figure(frame: pd.DataFrame, depth: int, title: str) -> Figure | None:
    """λ by block, pairwise and from the first: a row for activations, one for gradients.

    None where there is no λ: a single block, or curves that end before their second.
    """
    blocks = per_block(frame, depth)
    if blocks["lambda_pairwise"].isna().all():
        return None
    laws = laws_in(frame)
    kinds = list(blocks["of"].unique())
    figure, axes = subplots(len(kinds), 2, (11, 1.6 + 3.2 * len(kinds)))
    for row, of in zip(axes, kinds, strict=True):
        for ax, name in zip(row, ("lambda_pairwise", "lambda_from_first"), strict=True):
            part = blocks[blocks["of"] == of]
            measured = part[part["curve"].isin(frame["curve"].unique())]  # a law is there too
            for law in laws:
                mean = part[part["curve"] == law.column].groupby("block")[name].mean()
                if not mean.empty:
                    _law(ax, law, mean)
            draw_curves(ax, measured, "block", name)
            if name == "lambda_from_first":
                _mean_vector(ax, measured)
            ax.axhline(0, color=".4", lw=0.8, zorder=1)
            ax.set(xlabel="block", ylabel="λ")
            words = "from the block before" if name == "lambda_pairwise" else "from the first block"
            ax.set_title(f"{of}, {words}", fontsize=10, color=".35")
            shown = [name] if name == "lambda_pairwise" else [name, "lambda_paper"]
            _lambda_limits(ax, pd.concat([measured[n] for n in shown]), part[name])
    return finish(figure, axes[0], [f"Growth exponents λ of {title}"])


def _mean_vector(ax: Axes, frame: pd.DataFrame) -> None:
    """λ of the one mean vector, the paper's, beside that of the tokens' mean norm."""
    for name, rows in frame.groupby("curve", sort=False):
        mean = rows.groupby("block")["lambda_paper"].mean()
        label = f"{LABELS[str(name)]}, of the mean vector (paper)"
        ax.plot(mean.index, mean, color=COLOURS[str(name)], ls=(0, (4, 1.5)), lw=1.4, label=label)


def _lambda_limits(ax: Axes, measured: pd.Series, every: pd.Series) -> None:
    """Fit the axis to the measured curves; a law may widen it threefold."""
    values = measured.replace([np.inf, -np.inf], np.nan).dropna()
    if values.empty:
        return
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    size = (high - low) or 1e-3
    top, bottom = float(every.max()), float(every.min())
    ax.set_ylim(max(low - 3 * size, min(bottom, low)) - 0.08 * size,
                min(high + 3 * size, max(top, high)) + 0.08 * size)  # fmt: skip


def _laws(ax: Axes, frame: pd.DataFrame) -> None:
    if frame.empty:  # every curve overflowed at the embedding
        return
    for law in laws_in(frame):
        mean = frame[frame["curve"] == basis(frame)].groupby("x")[law.column].mean()
        mean = mean.clip(upper=1e6 * frame["mean_square"].max())  # off the axis, within float64
        mean[mean.index % 1 > 0.2] = np.nan  # a gap at each re-norm, not a drop
        _law(ax, law, mean)
        if law.name == "mean_field":
            std = frame[frame["curve"] == basis(frame)].groupby("x")["band_mean_field"].mean()
            law_band(ax, mean.index.to_series(), mean, std, law)


def _law(ax: Axes, law: Law, mean: pd.Series) -> None:
    """One law's curve, with its colour, line style and legend entry."""
    ax.plot(
        mean.index, mean, color=law.colour, ls=law.line, lw=1.6, label=law.label, zorder=3
    )  # fmt: skip


def _limits(ax: Axes, frame: pd.DataFrame, scale: str) -> None:
    """Linear: measured curves and expected laws fill the axis. Log: a law may use further decades."""
    v = frame["mean_square"]
    if v.empty:
        return
    last = frame[frame["curve"] == frame["curve"].iloc[-1]]
    top = max([v.max(), *(last[law.column].max() for law in laws_in(frame, expected=True))])
    ax.set_xlim(frame["x"].min() - 0.3, frame["x"].max() + 0.3)
    if scale == "linear":
        ax.set_ylim(0, top * 1.12 or 1)
        return
    positive = v[v > 0]
    if positive.empty:
        return
    ax.set_yscale("log")
    columns = [law.column for law in laws_in(frame)]
    laws = frame[columns].replace([np.inf], np.nan).max().max()
    ax.set_ylim(float(positive.min()) / 2, max(top, min(laws, top * 500)) * 2)
