"""Figures of a sweep, chosen by what was swept: curves by colour and panel, scans, heat maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from simlab.analysis import Law
from simlab.analysis.curve import laws_in
from simlab.report import sweep_scans as swept_scans
from simlab.report.facets import (
    GREY,
    SEEDS,
    Axis,
    Plan,
    axes_of,
    colours,
    entries,
    finished,
    grid,
    hero,
    labelled,
    matching,
    plan,
)  # fmt: skip
from simlab.report.style import COLOURS, LABELS

SAME = 0.02  # of the axis: laws no further from each other are drawn once
FEW = 24  # steps, up to which each has its dot
DECADES = 2  # beyond, a log axis
BEHIND: Mapping[str, Any] = {"random": "-", "checkpoint": (0, (4, 1.5))}  # line styles
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
    made: dict[str, Figure | None] = {}
    frame = prepared(curves, jobs, swept)
    if not frame.empty:
        axes = axes_of(frame, swept)
        for name, y in {"growth": "mean_square", "gradients": "gradient_rms"}.items():
            if y in frame and frame[y].notna().any():
                made[name] = curves_figure(frame, axes, y, title)
        made["statistics"] = swept_scans.statistics_figure(frame, axes, title)
    if not jobs.empty:
        texts = labelled(jobs, swept)
        axes = axes_of(texts, swept)
        made["heatmap"] = swept_scans.heatmap(texts, axes, title)
        made |= swept_scans.lambda_figures(texts, axes, swept_scans.law_lambdas(frame), title)
    return {name: figure for name, figure in made.items() if figure is not None}


def prepared(
    curves: pd.DataFrame, jobs: pd.DataFrame, swept: Mapping[str, Sequence[Any]]
) -> pd.DataFrame:
    """The curves with x, texts for swept values, each curve once, and whether a row ends a cut one.

    A sweep over ``seeds`` measures the same curves again; one over ``seed`` the same weights on other
    tokens. depth_of: the job's depth.
    """
    if curves.empty:
        return curves
    frame = labelled(curves, swept)
    # A re-norm happens after its sublayer: half a step to the right makes the drop visible.
    frame["x"] = frame["sublayer"] + np.where(frame["kind"] == "renorm", 0.35, 0.0)
    keys = [key for key in swept if key in frame and key not in SEEDS]
    same = [*keys, "curve", "seed", "x", "mean_square"]
    frame = frame.drop_duplicates(same).reset_index(drop=True)
    depths = jobs.drop_duplicates("job").set_index("job")["depth"] if len(jobs) else pd.Series()
    frame["depth_of"] = frame["job"].map(depths).astype(float)
    last = frame.groupby(["job", "curve", "seed"], sort=False)["x"].transform("max")
    frame["cut"] = (frame["x"] == last) & (last < 2 * frame["depth_of"])
    return frame


def curves_figure(frame: pd.DataFrame, axes: Sequence[Axis], y: str, title: str) -> Figure:
    """A statistic against the sublayer: the plan's colours and panels, seeds as bands."""
    made = plan(axes)
    frame = made.shown(frame)
    keys = [axis.key for axis in axes]
    lines = _lines(frame, keys, y)
    cells = [cell for cell in made.cells if len(matching(lines, cell))]
    size, below = _size(len(cells)), "sublayer (0: embedding)"
    figure, panels = grid(len(cells), made.columns, size, below)
    log, few = _log(lines, y), lines["x"].nunique() <= FEW
    behind = _alone(made, axes)
    more = False  # laws than are drawn
    for ax, cell in zip(panels, cells, strict=True):
        here = matching(lines, cell)
        if behind:
            _others(ax, lines, axes[0].key)
        _draw(ax, here, made, y == "mean_square", few)
        if y == "mean_square":
            part, top = matching(frame, cell), float(lines["high"].max())
            more = _laws(ax, part, made.colour, log, top) or more
        ax.set_title(made.title(cell, size[0]), fontsize=10, color=".35")
    _limits(panels, lines, y, log)
    for ax in panels[:: made.columns]:
        ax.set_ylabel(WORDS[y].split(" of ")[0])
    said = f"{WORDS[y].capitalize()} after each sublayer{', log axis' if log else ''}."
    entries(panels[0], made.colour)
    _entries(panels[0], lines, made, y, behind, laws_in(frame))
    if more:
        said += " Of a law that differs between colours the lowest and the highest are drawn."
    return finished(figure, panels, made.colour, [title, said, *made.notes])


def _size(count: int) -> tuple[float, float]:
    return (7.5, 4.4) if count == 1 else (4.4, 3.6) if count <= 4 else (3.3, 2.6)


def _lines(frame: pd.DataFrame, keys: Sequence[str], y: str) -> pd.DataFrame:
    """Each group's curve: x, mean, low, high over seeds; the mean ends where the first seed does.

    ends: the heights at which seeds' curves were cut here.
    """
    frame = frame[frame[y].notna()]
    by = [*keys, "curve", "x"]
    grouped = frame.groupby(by, sort=False)[y]
    lines = grouped.agg(mean="mean", low="min", high="max", count="count").reset_index()
    seeds = lines.groupby(by[:-1], sort=False)["count"].transform("max")
    lines["seeds"] = seeds
    lines["mean"] = lines["mean"].where(lines["count"] == seeds)
    ends = frame[frame["cut"]].groupby(by, sort=False)[y].agg(list).rename("ends").reset_index()
    lines = lines.merge(ends, on=by, how="left") if len(ends) else lines.assign(ends=np.nan)
    return lines.sort_values("x", kind="stable")


def _alone(made: Plan, axes: Sequence[Axis]) -> bool:
    """Whether a single key's many categories have a panel each, with all others in grey behind."""
    return made.colour is None and len(axes) == 1


def _groups(here: pd.DataFrame, colour: Axis | None) -> Iterator[tuple[str, pd.DataFrame]]:
    """A panel's colours with their curves, the shallowest first."""
    if colour is None:
        yield "", here
        return
    parts = dict(list(here.groupby(colour.key, sort=False)))
    found = [(value, parts[value]) for value in colour.values if value in parts]
    yield from sorted(found, key=lambda item: float(item[1]["x"].max()))


def _draw(ax: Axes, here: pd.DataFrame, made: Plan, cut: bool, few: bool) -> None:
    """The panel's curves: coloured ones with bands, and grey ones that they are held against.

    What a shallow model shares with a deeper one is drawn in the shallow one's colour.
    """
    named = colours(made.colour)
    seen: dict[str, set[tuple[float, ...]]] = {"behind": set(), "front": set()}
    for order, (value, part) in enumerate(_groups(here, made.colour)):
        main = hero(part, made.colour)
        for name, rows in part.groupby("curve", sort=False):
            front = name == main
            colour = named.get(value, COLOURS[main]) if front else GREY
            points = list(rows[["x", "low", "high"]].itertuples(index=False, name=None))
            drawn = seen["front" if front else "behind"]
            new = np.array([point not in drawn for point in points])
            drawn |= set(points)
            if not new.any() and not front:
                continue
            _line(ax, rows, colour, 30 - order if front else 1, front, few, new)
            if not front:
                continue
            if made.colour is not None and made.colour.key == "depth":
                end = rows.dropna(subset="mean").tail(1)
                ax.plot(end["x"], end["mean"], "o", color=colour, ms=4.5, zorder=50)
            ends = rows.dropna(subset="ends").explode("ends")
            if cut and len(ends):
                ax.plot(
                    ends["x"], ends["ends"].astype(float), "x", color=colour, ms=6, mew=1.8,
                    zorder=60, clip_on=False,
                )  # fmt: skip


def _line(
    ax: Axes, rows: pd.DataFrame, colour: str, order: float, front: bool, few: bool, new: np.ndarray
) -> None:
    """A group's mean over seeds, and its band where it is new; after a seed's end the band alone."""
    name = str(rows["curve"].iloc[0])
    ax.plot(
        rows["x"], rows["mean"], color=colour, ls="-" if front else BEHIND[name], lw=1.8,
        zorder=order, marker="o" if few and front else None, ms=3,
    )  # fmt: skip
    if rows["seeds"].max() < 2:
        return
    new = new | np.append(new[1:], False)  # from the last point that it shares
    ax.fill_between(
        rows["x"], rows["low"], rows["high"], where=new.tolist(), color=colour, lw=0,
        alpha=0.2 if front else 0.35, zorder=2 if front else 0.5,
    )  # fmt: skip
    left = rows[(rows["count"] < rows["seeds"]).shift(-1, fill_value=False).cummax()]
    left = rows.loc[left.index[0] :] if len(left) else left
    for edge in ("low", "high"):
        ax.plot(left["x"], left[edge], color=colour, lw=0.9, zorder=order)


def _others(ax: Axes, lines: pd.DataFrame, key: str) -> None:
    for _, rows in lines.groupby([key, "curve"], sort=False):
        ax.plot(rows["x"], rows["mean"], color=".84", lw=1, zorder=1)


def _laws(ax: Axes, here: pd.DataFrame, colour: Axis | None, log: bool, top: float) -> bool:
    """The laws, once where the colours' coincide, else lowest and highest; whether there are more."""
    more = False
    for law in laws_in(here):
        found: list[pd.Series] = []
        for _, part in _groups(here, colour):
            basis = "random" if (part["curve"] == "random").any() else "checkpoint"
            says = part[part["curve"] == basis].groupby("x")[law.column].mean()
            says = says.replace(np.inf, np.nan).dropna().clip(upper=1e6 * top)
            says[says.index % 1 > 0.2] = np.nan  # a gap at each re-norm, not a drop
            found.append(says)
        kept = _distinct(found, log, top)
        more = more or len(kept) > 2
        for says in [*kept[:1], *kept[1:][-1:]]:
            ax.plot(says.index, says, color=law.colour, ls=law.line, lw=1.4, zorder=40)
    return more


def _distinct(laws: Sequence[pd.Series], log: bool, top: float) -> list[pd.Series]:
    kept: list[pd.Series] = []
    for law in sorted(laws, key=len, reverse=True):
        if law.notna().any() and not any(_same(law, other, log, top) for other in kept):
            kept.append(law)
    shared = min(map(len, kept), default=1) - 1
    kept.sort(key=lambda law: float(law.iloc[shared]))
    return kept


def _same(law: pd.Series, other: pd.Series, log: bool, top: float) -> bool:
    """Whether nine tenths of the rows that two laws share, but the embedding's, can't be told apart."""
    both = pd.concat([law, other], axis=1, keys=["a", "b"]).dropna()
    both = both[(both.index > 0) & (both.min(axis=1) <= top)]
    if both.empty:
        return True
    near = (both["a"] / both["b"]).map(np.log).abs().quantile(0.9) < (0.1 if log else 0.05)
    return bool(near or (not log and (both["a"] - both["b"]).abs().quantile(0.9) < SAME * top))


def _log(lines: pd.DataFrame, y: str) -> bool:
    """Whether the curves range over more than DECADES after their first block."""
    if y == "gradient_rms":
        values = lines["mean"]
    else:
        values = lines.loc[(lines["x"] > 2) | (lines["x"] == lines["x"].max()), "high"]
    positive = values[values > 0]
    return len(positive) > 0 and bool(positive.max() > 10**DECADES * positive.min())


def _limits(panels: Sequence[Axes], lines: pd.DataFrame, y: str, log: bool) -> None:
    """What was measured fills the axis; on a log one a law may use another decade."""
    positive = lines["low"][lines["low"] > 0]
    top = float(lines["high"].max())
    for ax in panels:
        ax.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        ax.set_xlim(-0.01 * lines["x"].max() - 0.2, 1.01 * lines["x"].max() + 0.2)
        if log and len(positive):
            ax.set_yscale("log")
            ax.set_ylim(float(positive.min()) / 1.6, top * (8 if y == "mean_square" else 1.6))
        else:
            ax.set_ylim(min(0.0, float(lines["low"].min())), top * 1.1 or 1)


def _entries(
    ax: Axes, lines: pd.DataFrame, made: Plan, y: str, behind: bool, laws: Sequence[Law]
) -> None:
    """The legend's entries that are not the colours'."""
    names = list(lines["curve"].unique())
    main = hero(lines, made.colour)
    if made.colour is None:
        ax.plot([], [], color=COLOURS[main], lw=1.8, label=LABELS[main])
    for name in names:
        if name != main:
            ax.plot([], [], color=GREY, lw=1.8, ls=BEHIND[name], label=LABELS[name])
    if behind:
        ax.plot([], [], color=".8", lw=1, label="the other panels' curves")
    if y == "mean_square":
        for law in laws:
            ax.plot([], [], color=law.colour, ls=law.line, lw=1.4, label=law.label)
    seeds = lines["seeds"].unique()
    if seeds.max() > 1:
        several = seeds[seeds > 1]
        few, most = several.min(), several.max()
        count = f"{most}" if few == most else f"{few} to {most}"
        label = f"{count} seeds: mean, min to max"
        ax.fill_between([], [], [], color=".5", alpha=0.35, lw=0, label=label)
    if y == "mean_square" and lines["ends"].notna().any():
        ax.plot([], [], "x", color=".3", ms=6, mew=1.8, label="a seed's curve ends: overflow")
