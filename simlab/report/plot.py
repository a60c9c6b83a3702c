"""One quantity of any curves on one pair of axes: what ``.plot()`` draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from simlab.analysis.curve import INITS, laws_in
from simlab.config import ConfigError, nearest
from simlab.config.names import some
from simlab.report.colours import COLOURS, LABELS, PALETTE
from simlab.report.page.payload import FROM_LAW
from simlab.report.page.quantities import BY_SUBLAYER
from simlab.report.seeds import axis_label, x_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIDDLE = (0.05, 0.95)  # quantiles of the seeds' band from twenty seeds on; else least to most


def plot(
    curves: pd.DataFrame,
    quantity: str = "mean_square",
    ax: Axes | None = None,
    *,
    by: str = "curve",
    log: bool | None = None,
    laws: bool | Sequence[str] = True,
) -> Axes:
    """Draw a quantity against the sublayer: each curve's mean over its seeds, with their range.

    Example:

        ax = simlab.plot(simlab.probe(model, ids).rows(), "norm")

    Args:
        curves: Tidy rows as in curve.csv, one per curve × seed × step: of ``Result.curves``, of
            ``probe(…).rows()`` or of a sweep.
        quantity: A column of them, or ``rms``, the root of mean_square. None has a unit but
            attention_entropy (nats).
        ax: Axes to draw on; new ones without.
        by: The column whose values get a line each.
        log: A logarithmic axis; by default for quantities that cross decades.
        laws: Which laws to draw beside random inits (additive, sqrt2, mean_field), or all or none.
            A law is about the mean square: of rms and norm it says what follows, of other columns
            nothing. √2 per sublayer is drawn up to the first re-norm.

    Returns the axes: its x is the sublayer, from 0, the embedding. Raises ConfigError for a column or a
    law that isn't there, and for a column of texts.
    """
    if not isinstance(curves, pd.DataFrame):
        raise ConfigError("plot: give a DataFrame, such as .curves of a run or .rows() of a probe")
    wanted = [laws] if isinstance(laws, str) else laws
    for name in wanted if not isinstance(wanted, bool) else ():
        names = [law.name for law in laws_in(curves)]
        if name not in names:
            near = nearest(str(name), names) or f"; there are {', '.join(names) or 'none'}"
            raise ConfigError(f"plot: there is no law {name}{near}")
    rows = curves.copy()
    if quantity == "rms" and "rms" not in rows:
        rows["rms"] = np.sqrt(rows["mean_square"])
    for column in ("sublayer", by, quantity):
        if column not in rows:
            raise ConfigError(f"plot: there is no column {column}{_instead(str(column), rows)}")
    if not pd.api.types.is_numeric_dtype(rows[quantity]):
        raise ConfigError(f"plot: {quantity} is a column of texts: give one of numbers")
    rows = rows[rows[quantity].notna()]
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")[1]
    rows["x"] = x_of(rows) if "kind" in rows else rows["sublayer"]
    names = list(dict.fromkeys(rows[by]))
    free = iter(c for c in PALETTE if not set(names) & set(COLOURS) or c not in COLOURS.values())
    for name in names:
        colour = COLOURS.get(name) if by == "curve" else None
        _line(ax, rows[rows[by] == name], quantity, str(name), colour or next(free, PALETTE[-1]))
    if quantity in FROM_LAW and "curve" in rows and by == "curve" and wanted is not False:
        _laws(ax, rows, quantity, wanted)
    named = len(ax.get_legend_handles_labels()[1])
    known = BY_SUBLAYER.get(quantity)
    values = rows[quantity]
    if known is not None and known.log if log is None else log:
        if len(values) and values.max() > 0:
            ax.set_yscale("log")
    elif len(values) and values.min() >= 0:
        room = 1.08 + (0.09 * min(named, 5) if named > 1 else 0)  # for a legend above the curves
        ax.set_ylim(0, room * float(values.max()) or 1.0)
    ax.set(
        xlabel=axis_label(curves),
        ylabel=known.label if known else quantity,
    )
    ax.grid(color="0.92")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if named > 1:
        ax.legend(frameon=False, fontsize="small")
    return ax


def _instead(column: str, rows: pd.DataFrame) -> str:
    """What to ask for instead of a column that isn't there."""
    if column.startswith("lambda"):
        return (
            "; a run's λ's are in .summary['lambda'], by curve, and report.html draws them by block"
        )
    if column in BY_SUBLAYER and column.startswith("gradient"):
        return "; measure with gradients=True"
    names = [str(name) for name in rows.columns]
    main = [name for name in BY_SUBLAYER if name in names]  # in the page's order
    return (
        nearest(column, names) or f"; there are {some(main + [n for n in names if n not in main])}"
    )


def _line(ax: Axes, rows: pd.DataFrame, quantity: str, name: str, colour: str) -> None:
    """One curve's mean over its seeds, and a band: their range, of a predicted curve two std."""
    groups = rows.groupby("x")[quantity]
    mean = groups.mean()
    count = rows.groupby("x").size().max()
    label = LABELS.get(name, name) + (
        f" ({count} curves: mean, least to most)" if count > 1 else ""
    )
    if name == "theory" and quantity == "mean_square" and "band_mean_field" in rows:
        band = 2 * rows.groupby("x")["band_mean_field"].mean()
        ax.fill_between(mean.index, mean - band, mean + band, color=colour, alpha=0.18, lw=0)
        label += " (± 2 std of a seed)"
    if count > 1:
        ax.fill_between(mean.index, groups.min(), groups.max(), color=colour, alpha=0.18, lw=0)
    # the dot at its end shows a curve that lies under a longer one: equal seeds share their blocks
    ax.plot(mean.index, mean, color=colour, lw=2, label=label, marker="o", ms=4, markevery=[-1])


def _laws(ax: Axes, rows: pd.DataFrame, quantity: str, wanted: bool | Sequence[str]) -> None:
    """The laws of the random inits there, or else of the checkpoint, dashed."""
    there = list(rows["curve"].unique())
    basis = next((name for name in (*INITS, *there) if name in there), None)
    if basis is None:
        return
    own = rows[rows["curve"] == basis]
    renorms = own.loc[own["kind"] == "renorm", "x"] if "kind" in own else own["x"][:0]
    width = float((own["norm"] ** 2 / own["mean_square"]).median()) if "norm" in own else 1.0
    for law in laws_in(own):
        if wanted is not True and law.name not in list(wanted or ()):
            continue
        if basis == "theory" and law.name == "mean_field":
            continue
        mean = own.groupby("x")[law.column].mean()
        with np.errstate(over="ignore"):
            says = FROM_LAW[quantity](mean.to_numpy(np.float64), round(width))
        top = 50 * float(rows[quantity].max() or 1.0)  # √2 per sublayer leaves the axis
        says = np.where(says > top, np.nan, says)
        label = law.label
        if len(renorms) and not law.expected:  # √2 per sublayer would start anew at each
            says = np.where(mean.index < renorms.min(), says, np.nan)
            label += ", until the first re-norm"
        if law.name == "mean_field" and quantity == "mean_square":
            band = 2 * own.groupby("x")["band_mean_field"].mean()
            ax.fill_between(
                mean.index, mean - band, mean + band, color=law.colour, alpha=0.12, lw=0
            )
        ax.plot(mean.index, says, color=law.colour, ls=law.line, lw=1.4, label=label)
