"""Figures: growth with the seeds' band and the laws, the gradient, and growth exponents by block."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from simlab.analysis import Law
from simlab.analysis.curve import laws_in
from simlab.analysis.exponents import per_block
from simlab.report.colours import COLOURS, LABELS
from simlab.report.panels import first_teeth
from simlab.report.style import draw_curves, finish, subplots


def lambda_figure(frame: pd.DataFrame, depth: int, title: str) -> Figure | None:
    """λ by block, pairwise and from the first: a row for activations, one for gradients.

    None where there is no λ: a single block, or curves that end before their second.
    """
    blocks = per_block(frame, depth)
    if blocks["lambda_pairwise"].isna().all():
        return None
    drawn, note = first_teeth(frame)
    blocks = blocks[blocks["block"] <= drawn["block"].max() + 1]
    laws = laws_in(frame, expected=True)  # √2 per sublayer would squeeze what was measured
    by_law = [law.column for law in laws]
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
            ax.set(xlabel="block i", ylabel=_formula(of, name))
            words = "from the block before" if name == "lambda_pairwise" else "from the first block"
            ax.set_title(f"{of}: growth {words}", fontsize=10, color=".35")
            ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            shown = [name] if name == "lambda_pairwise" else [name, "lambda_paper"]
            says = part[part["curve"].isin(by_law)][name]
            _lambda_limits(ax, pd.concat([measured[n] for n in shown]), says)
    what = f"‖x‖: the tokens' mean norm after block i, n = {depth} blocks"
    what += "; g: the loss's gradient with respect to x." if "gradient" in kinds else "."
    what += f" {note}" if note else ""
    return finish(figure, axes[0], [f"Growth exponents λ of {title}", what])


def _formula(of: str, name: str) -> str:
    """What an axis shows: ``λ = ln(‖xᵢ‖/‖xᵢ₋₁‖)/n``."""
    of_what = "g" if of == "gradient" else "x"
    before = "ᵢ₋₁" if name == "lambda_pairwise" else "₁"
    return f"λ = ln(‖{of_what}ᵢ‖/‖{of_what}{before}‖)/n"


def _mean_vector(ax: Axes, frame: pd.DataFrame) -> None:
    """λ of the one mean vector, the paper's, beside that of the tokens' mean norm."""
    for name, rows in frame.groupby("curve", sort=False):
        mean = rows.groupby("block")["lambda_paper"].mean()
        label = f"{LABELS[str(name)]}, of the mean vector (paper)"
        ax.plot(mean.index, mean, color=COLOURS[str(name)], ls=(0, (4, 1.5)), lw=1.4, label=label)


def _lambda_limits(ax: Axes, measured: pd.Series, laws: pd.Series) -> None:
    """Fit the axis to the measured curves; a law may widen it threefold."""
    values = measured.replace([np.inf, -np.inf], np.nan).dropna()
    if values.empty:
        return
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    size = (high - low) or 1e-3
    top, bottom = (high, low) if laws.isna().all() else (float(laws.max()), float(laws.min()))
    ax.set_ylim(max(low - 3 * size, min(bottom, low)) - 0.08 * size,
                min(high + 3 * size, max(top, high)) + 0.08 * size)  # fmt: skip


def _law(ax: Axes, law: Law, mean: pd.Series) -> None:
    """One law's curve, with its colour, line style and legend entry."""
    ax.plot(
        mean.index, mean, color=law.colour, ls=law.line, lw=1.6, label=law.label, zorder=3
    )  # fmt: skip
