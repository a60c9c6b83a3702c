"""Figures of a sweep against what was swept: growth exponents, statistics over width, heat maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from simlab.analysis.curve import laws_in
from simlab.analysis.numbers import short
from simlab.report.facets import (
    COLUMNS,
    GREY,
    ORDERED,
    SEEDS,
    SEQUENCE,
    Axis,
    Plan,
    colours,
    entries,
    finished,
    grid,
    hero,
    key_text,
    matching,
    plan,
)  # fmt: skip
from simlab.report.style import COLOURS, LABELS, finish

MEASURES = {
    "lambda_token": "λ of the tokens' mean norm",
    "lambda_paper": "λ of the mean vector (paper)",
    "lambda_token_gradient": "λ of the gradient's mean norm",
    "lambda_paper_gradient": "λ of the gradient's mean vector",
}
_SHOWN_STATISTICS = {  # column: title, scale
    "norm": ("norm ‖x‖", "log"),
    "mean_abs": ("mean |x|", "log"),
    "max_abs": ("largest |x|", "log"),
    "attention_max_logit": ("largest attention logit", "log"),
    "attention_entropy": ("attention entropy, nats", "linear"),
    "gradient_norm": ("norm of the gradient", "log"),
}
BLOCKS = 5  # that the statistics are shown after, beside the embedding
STEPS = 4  # rows of statistics
CELLS = 12  # of a side of a heat map, up to which numbers are written


def ticks(ax: Axes, axis: Axis) -> None:
    """The x axis of a swept key: its values are the ticks."""
    if axis.geometric:
        ax.set_xscale("log")
    x = np.array(axis.positions, float)
    ends = np.log(x[[0, -1]]) if axis.geometric else x[[0, -1]]
    ends = ends + 0.05 * np.array([-1, 1]) * (ends[1] - ends[0])
    ax.set_xlim(*(np.exp(ends) if axis.geometric else ends))
    some = _every(axis, 8)
    ax.xaxis.set_major_locator(FixedLocator([axis.positions[i] for i in some]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([_tick(axis, i) for i in some])


def _every(axis: Axis, most: int) -> range:
    """Places of at most so many ticks, from the first value on."""
    return range(0, len(axis.values), math.ceil(len(axis.values) / most))


def _tick(axis: Axis, place: int) -> str:
    return f"{axis.numbers[place]:.4g}" if axis.numbers else axis.values[place]


def law_lambdas(frame: pd.DataFrame) -> pd.DataFrame:
    """``lambda_token`` of each expected law, as in ``analysis.exponents``: job, ``law_NAME``.

    A row per job: for its random inits, where there are any; NaN where a curve ends early.
    """
    laws = laws_in(frame, expected=True)
    if frame.empty:
        return pd.DataFrame({"job": [0][:0]})
    rows = frame[frame["block"].notna()]
    drawn = rows.loc[rows["curve"] == "random", "job"].unique()
    rows = rows[(rows["curve"] == "random") | ~rows["job"].isin(drawn)]
    ends = rows.groupby(["job", "seed", "block"], sort=False).tail(1).groupby(["job", "seed"])
    found = ends.agg(blocks=("block", "count"), depth=("depth_of", "first"))
    lambdas = {}
    for law in laws:
        first, last = ends[law.column].first(), ends[law.column].last()
        whole = (found["blocks"] == found["depth"]) & (found["depth"] > 1) & (first > 0)
        lambdas[law.column] = np.log(last.where(whole) / first.where(whole)) / 2 / found["depth"]
    return pd.DataFrame(lambdas, found.index).groupby("job").mean().reset_index()


def lambda_figures(
    jobs: pd.DataFrame, axes: Sequence[Axis], laws: pd.DataFrame, title: str
) -> dict[str, Figure | None]:
    """Growth exponents against each numeric key, and against a checkpoint's steps."""
    keys = [axis for axis in axes if axis.numbers or axis.key in ORDERED]
    jobs = jobs.merge(laws, on="job", how="left")
    return {
        "lambda" if len(keys) == 1 else f"lambda_{key_text(x.key)}": _lambda_figure(
            jobs, x, [axis for axis in axes if axis is not x], title
        )
        for x in keys
    }


def _lambda_figure(
    jobs: pd.DataFrame, x: Axis, others: Sequence[Axis], title: str
) -> Figure | None:
    """A panel for each measure and cell of the plan."""
    made = plan(others)
    jobs, notes = made.shown(jobs), list(made.notes)
    measures = [name for name in MEASURES if name in jobs and jobs[name].notna().any()]
    cells = [cell for cell in made.cells if len(matching(jobs, cell))]
    if not measures or jobs[x.key].nunique() < 2:
        return None
    if len(cells) > COLUMNS:  # too many panels to have all
        measures = [name for name in measures if "token" in name] or measures
        notes.append("λ of the mean vectors: see jobs.csv.")
    alone = len(cells) == 1  # the measures are then side by side
    count, blocks = (len(measures), 1) if alone else (len(cells), len(measures))
    columns = min(len(measures), 2) if alone else made.columns
    size = (4.4, 3.4) if count * blocks <= 6 else (3.3, 2.5)
    figure, panels = grid(count, columns, size, key_text(x.key), blocks=blocks, alike=not alone)
    for m, measure in enumerate(measures):
        mine = panels[m * len(cells) : (m + 1) * len(cells)]
        for ax, cell in zip(mine, cells, strict=True):
            _exponents(ax, matching(jobs, cell), x, made, measure)
            words = [MEASURES[measure], made.title(cell, size[0])]
            ax.set_title("\n".join(filter(None, words)), fontsize=10, color=".35")
        _alike(mine)
    entries(panels[0], made.colour)
    _lambda_entries(panels[0], jobs, made, measures)
    said = f"Growth exponents λ against {key_text(x.key)}."
    if (jobs[measures].isna().any(axis=1) & (jobs["overflow"] > 0)).any():
        said += " There is none where a curve overflows."
    return finished(figure, panels, made.colour, [title, said, *notes])


def _alike(panels: Sequence[Axes]) -> None:
    """One y axis for panels that are read together."""
    limits = [ax.get_ylim() for ax in panels]
    for ax in panels:
        ax.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _exponents(ax: Axes, here: pd.DataFrame, x: Axis, made: Plan, measure: str) -> None:
    named = colours(made.colour)
    values = [""] if made.colour is None else made.colour.values
    for value in values:
        part = here if made.colour is None else here[here[made.colour.key] == value]
        if part.empty:
            continue
        main = hero(part, made.colour)
        inks = {main: named.get(value, COLOURS[main])}
        for name, rows in part.groupby("curve", sort=False):
            ink = inks.setdefault(str(name), GREY)
            _points(ax, rows, x, measure, ink, 4 if name == main else 2)
        if measure == "lambda_token":
            for law in laws_in(part):
                says = part.groupby(x.key)[law.column].mean().reindex(x.values).to_numpy(float)
                ink = inks.get("random", inks[main]) if made.colour else law.colour
                ax.plot(x.positions, says, color=ink, ls=law.line, lw=1.6, zorder=5)
    ax.axhline(0, color=".4", lw=0.8, zorder=1)
    ticks(ax, x)


def _points(ax: Axes, rows: pd.DataFrame, x: Axis, measure: str, colour: str, order: int) -> None:
    """The values with their intervals; of jobs that differ in seeds alone the mean, least and most."""
    rows = rows.assign(low=rows.get(f"{measure}_low"), high=rows.get(f"{measure}_high"))
    by_value = rows.groupby(x.key)
    found = by_value[measure].agg(["mean", "min", "max", "count"]).reindex(x.values)
    low = by_value["low"].min().reindex(x.values).where(found["count"] < 2, found["min"])
    high = by_value["high"].max().reindex(x.values).where(found["count"] < 2, found["max"])
    mean = found["mean"].to_numpy(float)
    reach = np.stack([mean - low.to_numpy(float), high.to_numpy(float) - mean])
    ax.errorbar(
        x.positions, mean, yerr=np.nan_to_num(np.maximum(reach, 0)), color=colour, lw=1.6,
        marker="o", ms=4.5, capsize=2.5, elinewidth=1.1, zorder=order,
    )  # fmt: skip


def _lambda_entries(ax: Axes, jobs: pd.DataFrame, made: Plan, measures: Sequence[str]) -> None:
    main = hero(jobs, made.colour)
    if made.colour is None:
        ax.plot([], [], color=COLOURS[main], marker="o", ms=4.5, lw=1.6, label=LABELS[main])
    for name in jobs["curve"].unique():
        if name != main:
            ax.plot([], [], color=GREY, marker="o", ms=4.5, lw=1.6, label=LABELS[str(name)])
    for law in laws_in(jobs) if "lambda_token" in measures else ():
        if jobs[law.column].notna().any():
            ax.plot([], [], color=law.colour, ls=law.line, lw=1.6, label=law.label)
    if any(f"{m}_low" in jobs and jobs[f"{m}_low"].notna().any() for m in measures):
        label = "95 % interval"
        if any(key in jobs and jobs[key].nunique() > 1 for key in SEEDS):
            label += "; of several jobs least to most"
        ax.errorbar([], [], yerr=[], color=".4", ls="", capsize=2.5, label=label)


def statistics_figure(frame: pd.DataFrame, axes: Sequence[Axis], title: str) -> Figure | None:
    """Statistics at some blocks against width, as in a coordinate check; None without widths.

    A row per value of another swept key.
    """
    width = next((axis for axis in axes if axis.key == "width" and axis.numbers), None)
    frame = frame[frame["curve"] == "random"]
    if width is None or frame.empty:
        return None
    made = plan([axis for axis in axes if axis is not width], coloured=False, most=STEPS)
    frame = made.shown(frame)
    cells = [cell for cell in made.cells if len(matching(frame, cell))]
    shown = {name: words for name, words in _SHOWN_STATISTICS.items()
             if name in frame and frame[name].notna().any()}  # fmt: skip
    if not shown or frame["block"].isna().all():
        return None
    blocks = int(frame.groupby("job")["block"].max().min()) + 1
    some = sorted({round(b) - 1 for b in np.geomspace(1, blocks, BLOCKS)})
    count = len(shown) * len(cells)
    figure, panels = grid(count, len(shown), (2.8, 2.9), "width", alike=False)
    for i, ax in enumerate(panels):
        name, cell = list(shown)[i % len(shown)], cells[i // len(shown)]
        words, scale = shown[name]
        part = matching(frame, cell)
        _over_width(ax, part, name, width, some)
        low, high = frame[name].min(), frame[name].max()
        if scale == "log" and low > 0 and high > 8 * low:  # less than a decade has no round ticks
            ax.set_yscale("log")
        ax.set_title(
            "\n".join(filter(None, [words, made.title(cell, 2.8)])), fontsize=10, color=".35"
        )
    for column in range(len(shown)):
        _alike(panels[column :: len(shown)])
    for label, colour in _steps(some).items():
        panels[0].plot([], [], color=colour, marker="o", ms=4, lw=1.6, label=label)
    if frame.groupby(["job", "sublayer", "kind"]).size().max() > 1:
        band = "seeds: mean, min to max"
        panels[0].fill_between([], [], [], color=".5", alpha=0.35, lw=0, label=band)
    return finish(figure, panels[:1], [title, "Statistics against width.", *made.notes])


def _steps(blocks: Sequence[int]) -> dict[str, str]:
    """The colours of the embedding and of the blocks."""
    last = max(len(blocks) - 1, 1)
    named = {f"after block {b + 1}": to_hex(SEQUENCE(i / last)) for i, b in enumerate(blocks)}
    return {"embedding": ".55"} | named


def _over_width(
    ax: Axes, part: pd.DataFrame, name: str, width: Axis, blocks: Sequence[int]
) -> None:
    """One statistic against width, a line for the embedding and for each block."""
    rows = part[part[name].notna()]
    rows = rows.groupby(["job", "seed", "block"], sort=False, dropna=False).tail(1)
    at = rows["block"].astype(float).fillna(-1)
    for block, (_, colour) in zip([-1, *blocks], _steps(blocks).items(), strict=True):
        seeds = rows[at == block].groupby("width")[name].agg(["mean", "min", "max"])
        if seeds.empty:  # attention has no embedding
            continue
        seeds = seeds.reindex(width.values)
        ax.plot(width.positions, seeds["mean"], color=colour, marker="o", ms=4, lw=1.6)
        ax.fill_between(width.positions, seeds["min"], seeds["max"], color=colour, alpha=0.2, lw=0)
    ticks(ax, width)


def heatmap(jobs: pd.DataFrame, axes: Sequence[Axis], title: str) -> Figure | None:
    """The final mean square over two numeric keys, a panel per value of others; None without two."""
    numeric = sorted((axis for axis in axes if axis.numbers), key=lambda axis: -len(axis.values))
    if len(numeric) < 2 or not (jobs["mean_square"] > 0).any():
        return None
    x, y = numeric[:2]
    made = plan([axis for axis in axes if axis not in (x, y)], coloured=False, most=12)
    jobs = made.shown(jobs)
    name = hero(jobs, x if x.key.startswith("init") else y)
    jobs = jobs[jobs["curve"] == name]
    cells = [cell for cell in made.cells if len(matching(jobs, cell))]
    values = jobs["mean_square"][jobs["mean_square"] > 0]
    if values.empty:
        return None
    low, high = float(values.min()), float(values.max())
    scale = LogNorm(low, high) if high > 3 * low else Normalize(low, high)
    size = (0.6 * min(len(x.values), CELLS) + 1.6, 0.4 * min(len(y.values), CELLS) + 1.2)
    figure, panels = grid(
        len(cells), made.columns, (max(size[0], 3), max(size[1], 2.4)), key_text(x.key)
    )
    for i, (ax, cell) in enumerate(zip(panels, cells, strict=True)):
        _heat(ax, matching(jobs, cell), x, y, scale)
        ax.set_ylabel("" if i % made.columns else key_text(y.key))
        ax.set_title(made.title(cell, size[0]), fontsize=10, color=".35")
    bar = figure.colorbar(ScalarMappable(scale, SEQUENCE), ax=panels, aspect=25, pad=0.01)
    bar.set_label("mean square")
    if isinstance(scale, LogNorm) and high < 200 * low:
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.yaxis.set_minor_locator(NullLocator())
    cut = ["×: curves overflow; their last finite value."] if (jobs["overflow"] > 0).any() else []
    lines = [title, f"Mean square at the last sublayer, {LABELS[name]}.", *made.notes, *cut]
    return finish(figure, [], lines)


def _heat(ax: Axes, here: pd.DataFrame, x: Axis, y: Axis, scale: Normalize) -> None:
    """A cell per pair of values, the number in it where there is room; grey where there is none."""
    by_pair = here.groupby([y.key, x.key])
    table = by_pair["mean_square"].mean().unstack().reindex(y.values, axis=0)
    cells = table.reindex(x.values, axis=1).to_numpy(float)
    over = by_pair["overflow"].max().unstack().reindex(y.values, axis=0)
    cut = over.reindex(x.values, axis=1).to_numpy(float) > 0
    ax.set_facecolor(".88")
    ax.grid(False)
    shade = np.ma.masked_invalid(np.where(cells > 0, cells, np.nan))
    ax.pcolormesh(shade, norm=scale, cmap=SEQUENCE, edgecolors="white", linewidth=0.8)
    if max(cells.shape) <= CELLS:
        font = 9.5 if max(cells.shape) <= 6 else 8
        for (row, column), value in np.ndenumerate(cells):
            pale = value > 0 and scale(value) > 0.6
            text = short(value) or "–"
            text += " ×" if cut[row, column] else ""
            ax.text(
                column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=font,
                color=".1" if pale or not value > 0 else "white",
            )  # fmt: skip
    for axis, of in ((ax.xaxis, x), (ax.yaxis, y)):
        some = _every(of, CELLS)
        axis.set_major_locator(FixedLocator([place + 0.5 for place in some]))
        axis.set_ticklabels([_tick(of, place) for place in some])
