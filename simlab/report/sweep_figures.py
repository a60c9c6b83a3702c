"""Figures of a sweep, chosen by what was swept: curves by colour and panel, scans, heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from simlab.analysis import Law
from simlab.analysis.curve import basis, laws_in
from simlab.report import sweep_scans
from simlab.report.facets import GREY, Plan, grid, labelled, name_band, name_colours, plan
from simlab.report.seeds import x_of
from simlab.report.statistics_figure import statistics_figure
from simlab.report.style import BANDED, finish, law_band, predicted_band

FEW = 24  # steps, up to which each has its dot
DECADES = 2  # beyond, a log axis
WORDS = {
    "mean_square": "mean square of the residual stream",
    "gradient_rms": "rms of the gradient with respect to the residual stream",
}


def figures(
    curves: pd.DataFrame, jobs: pd.DataFrame, swept: Mapping[str, Sequence[Any]], title: str
) -> dict[str, Figure]:
    """A sweep's figures by name, for ``style.save``; empty where there is nothing to draw.

    ``growth``, ``gradients`` (where measured): curves over depth. ``heatmap``: two numeric keys.
    ``lambda``: growth exponents against a numeric key, ``lambda_KEY`` for each of several.
    ``statistics``: where width is swept. curves: the jobs' curve.csv, each row with its job and
    swept values; jobs: a row per job and curve; swept: every key's values.
    """
    drawn: dict[str, Figure | None] = {}
    if not curves.empty:
        frame, keys = prepared(curves, jobs, swept)
        for name, y in {"growth": "mean_square", "gradients": "gradient_rms"}.items():
            if y in frame and frame[y].notna().any():
                drawn[name] = curves_figure(frame, keys, y, title)
        drawn["statistics"] = statistics_figure(frame, keys, title)
    if not jobs.empty:
        table, keys = labelled(jobs, swept)
        drawn["heatmap"] = sweep_scans.heatmap(table, keys, title)
        drawn |= sweep_scans.lambda_figures(table, keys, title)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def prepared(
    curves: pd.DataFrame, jobs: pd.DataFrame, swept: Mapping[str, Sequence[Any]]
) -> tuple[pd.DataFrame, list[str]]:
    """The curves with x, each once, and with their job's ``overflow``; the keys of several values.

    A sweep over ``seeds`` measures the same curves again; one over ``seed`` the same weights on other
    tokens.
    """
    frame, keys = labelled(curves.replace([np.inf, -np.inf], np.nan), swept)
    # A re-norm happens after its sublayer: half a step to the right makes the drop visible.
    frame["x"] = x_of(frame)
    frame = frame.drop_duplicates([*keys, "curve", "seed", "x", "mean_square"])
    over = jobs if len(jobs) else frame[["job", "curve"]].drop_duplicates().assign(overflow=0)
    return frame.merge(over[["job", "curve", "overflow"]], on=["job", "curve"], how="left"), keys


def curves_figure(frame: pd.DataFrame, keys: Sequence[str], y: str, title: str) -> Figure:
    """A statistic against the sublayer, in the plan's colours and panels; bands are the seeds'.

    What a shallow model shares with a deeper one is in the shallow one's colour. Where nothing is
    coloured, the other panels' curves are grey behind.
    """
    layout = plan(frame[frame[y].notna()], keys)
    lines = _lines(layout, keys, y)
    laws = laws_in(frame) if y == "mean_square" else []
    low, high, last = lines["low"].where(lines["low"] > 0), lines["high"], lines["x"].max()
    after = lines["x"] > (2 if laws and last > 2 else -1)  # the first block makes decades by itself
    log = bool(high[after].max() > 10**DECADES * low[after].min())
    dots = "o" if lines["x"].nunique() <= FEW else None
    axes = ("sublayer (0: embedding)", WORDS[y].split(" of ")[0])
    figure, panels = grid(lines, layout.column, layout.row, axes)
    name_colours(panels[0][0], layout)
    differ = False
    for ax, part in panels:
        if layout.colour is None and layout.column:
            for _, rows in lines.groupby("line"):
                ax.plot(
                    rows["x"], rows["mean"], color=".84", lw=1, label="the other panels' curves"
                )
        groups = [rows for _, rows in part.groupby("line")]
        groups.sort(
            key=lambda rows: (layout.palette[rows["ink"].iloc[0]] != GREY, -rows["x"].max())
        )
        for rows in groups:
            end = rows.iloc[-1]
            colour = layout.palette[end["ink"]]
            style = "--" if colour == GREY and end["curve"] == "checkpoint" else "-"
            ax.plot(rows["x"], rows["mean"], style, color=colour, lw=1.8, marker=dots, ms=3)
            ax.fill_between(rows["x"], rows["low"], rows["high"], color=colour, alpha=0.2, lw=0)
            if laws and end["overflow"] > 0:
                over = "a seed's curve ends: overflow"
                ax.plot(
                    end["x"], end["mean"], "x", color=colour, ms=6, mew=1.8, zorder=5, label=over
                )
        for law in laws:
            differ = _law(ax, law, part, float(high.max())) or differ
        ax.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        ax.set_xlim(-0.01 * last - 0.2, 1.01 * last + 0.2)
        ax.set_yscale("log" if log else "linear")
        room = (8 if laws else 1.6) if log else 1.1  # a law may use another decade
        ax.set_ylim(low.min() / 1.6 if log else 0, high.max() * room or 1)
    name_band(panels[0][0], lines["count"])
    if y in BANDED and (lines["curve"] == "theory").any():
        label = "theory: mean ± 2 std of seeds"
        panels[0][0].fill_between([], [], [], color=".5", alpha=0.35, lw=0, label=label)
    caption = f"{WORDS[y].capitalize()} after each sublayer{', log axis' if log else ''}."
    if differ:
        caption += " Of a law that differs between colours the lowest and the highest are drawn."
    return finish(figure, [ax for ax, _ in panels[::-1]], [title, caption, *layout.notes])


def _lines(layout: Plan, keys: Sequence[str], y: str) -> pd.DataFrame:
    """Each group's mean, low, high over seeds, and its laws, against x; until its first seed ends.

    Low and high of a predicted curve are its band.
    """
    by = [*keys, "curve", "ink"]
    frame = layout.frame.assign(low=layout.frame[y], high=layout.frame[y])
    theory = frame["curve"] == "theory"
    if y in BANDED and theory.any():
        frame.loc[theory, "low"], frame.loc[theory, "high"] = predicted_band(frame[theory], y)
    columns = [*(law.column for law in laws_in(frame)), "band_mean_field"]
    means = {name: (name, "mean") for name in columns if name in frame}
    groups = frame.groupby([*by, "x"], observed=True)
    lines = groups.agg(
        mean=(y, "mean"), low=("low", "min"), high=("high", "max"), count=(y, "count"),
        overflow=("overflow", "max"), **means,
    ).reset_index()  # fmt: skip
    lines["line"] = lines.groupby(by, observed=True).ngroup()
    return lines[lines["count"] == lines.groupby("line")["count"].transform("max")]


def _law(ax: Axes, law: Law, part: pd.DataFrame, top: float) -> bool:
    """Draw a law, the lowest and highest where a panel's curves differ; True if others are left out.

    Theory is drawn beside every curve, with its band.
    """
    part = part[part["curve"] == basis(part)]
    table = part.pivot(index="x", columns="line", values=law.column).dropna(axis=1, how="all")
    shared = table.dropna()
    if shared.empty:
        return False
    ends = shared.iloc[-1]
    differ = bool(ends.max() > 1.1 * ends.min())
    lines = [ends.idxmin(), ends.idxmax()] if differ else [table.count().idxmax()]
    theory = law.name == "mean_field"
    if theory and differ:
        lines = list(table)
    for line in lines:
        says = table[line].dropna().clip(upper=1e6 * top)
        says[says.index % 1 > 0.2] = np.nan  # a gap at each re-norm, not a drop
        ax.plot(says.index, says, color=law.colour, ls=law.line, lw=1.4, zorder=4, label=law.label)
        if theory:
            std = part[part["line"] == line].set_index("x")["band_mean_field"].reindex(says.index)
            law_band(ax, says.index.to_series(), says, std, law)
    return differ and table.shape[1] > 2 and not theory
