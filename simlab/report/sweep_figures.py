"""Figures of a sweep, chosen by what was swept: curves by colour and panel, scans, heat maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from simlab.analysis import LAWS, Law
from simlab.analysis.curve import basis, laws_in
from simlab.analysis.numbers import short
from simlab.report import sweep_scans
from simlab.report.facets import GREY, Plan, extent, grid, labelled, name_band, name_colours, plan
from simlab.report.panels import HALO, INK
from simlab.report.seeds import x_of
from simlab.report.statistics_figure import statistics_figure
from simlab.report.style import BANDED, blank, finish, law_band, predicted_band
from simlab.report.values import key_text

FEW = 24  # steps, up to which each has its dot
DECADES = 2  # beyond, a log axis
WORDS = {
    "mean_square": "mean square of the residual stream",
    "gradient_rms": "rms of the loss's gradient with respect to the residual stream",
}
NAMES = {"mean_square": "mean square", "gradient_rms": "rms of the gradient"}  # of axes
GROWTHS = {
    "linear": "Linear growth", "constant": "No growth", "exponential": "Exponential growth",
    "power": "Growth as a power of depth", "saturating": "Saturating growth",
    "saw-tooth": "A saw-tooth", "jump": "Growth in one jump",
}  # fmt: skip
_PAIRED = 4  # panels, up to which activations and gradients are in one figure
_BANDS = 4  # of theory in a panel, up to which they can be told apart


def figures(
    curves: pd.DataFrame, jobs: pd.DataFrame, swept: Mapping[str, Sequence[Any]], title: str
) -> dict[str, Figure]:
    """A sweep's figures by name, for ``style.save``; empty where there is nothing to draw.

    ``growth``, ``gradients`` (where measured): curves over depth. ``heatmap``: two numeric keys.
    ``lambda``: growth exponents against every numeric key.
    ``statistics``: where width is swept. curves: the jobs' curve.csv, each row with its job and
    swept values; jobs: a row per job and curve; swept: every key's values.
    """
    drawn: dict[str, Figure | None] = {}
    if not curves.empty:
        frame, keys = prepared(curves, jobs, swept)
        runs = _runs(frame["job"].nunique(), keys, title)
        over = f" ({' × '.join(map(key_text, keys))})" if keys else ""
        if frame["mean_square"].notna().any():
            growth = f"{_growth(jobs)}{over}." if _growth(jobs) else runs
            drawn["growth"] = curves_figure(frame, keys, "mean_square", growth)
        if "gradient_rms" in frame and frame["gradient_rms"].notna().any():
            drawn["gradients"] = gradients_figure(frame, keys, runs)
        drawn["statistics"] = statistics_figure(frame, keys, title)
    if not jobs.empty:
        table, keys = labelled(jobs, swept)
        runs = _runs(jobs["job"].nunique(), keys, title)
        drawn["heatmap"] = sweep_scans.heatmap(table, keys, runs)
        drawn["lambda"] = sweep_scans.exponents_figure(table, keys, runs)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _runs(count: int, keys: Sequence[str], title: str) -> str:
    """``18 runs: depth × init.std × norm``; the title where nothing has several values."""
    return f"{count} runs: {' × '.join(map(key_text, keys))}" if keys else title


def _growth(jobs: pd.DataFrame) -> str:
    """How half of the jobs or more grow, with the least and the largest step; empty where none does."""
    if jobs.empty:
        return ""
    rows = jobs[jobs["curve"] == basis(jobs)]
    shape, count = Counter(rows["shape"]).most_common(1)[0]
    if shape not in GROWTHS or 2 * count < len(rows):
        return ""
    of_shape = rows[rows["shape"] == shape]
    step = ""
    if shape == "linear":
        least, most = (
            short(float(v))
            for v in (of_shape["per_sublayer"].min(), of_shape["per_sublayer"].max())
        )
        step = f" by {least}" + (f" to {most}" if most != least else "") + " per sublayer"
    where = f"all {count} runs" if count == len(rows) else f"{count} of {len(rows)} runs"
    return f"{GROWTHS[shape]}{step} in {where if len(rows) > 1 else 'this run'}"


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
    figure, axes, caption = _panels(layout, keys, y)
    return finish(figure, axes, [title, *caption, *layout.notes])


def gradients_figure(frame: pd.DataFrame, keys: Sequence[str], title: str) -> Figure:
    """The gradient's rms, beside the mean square where both have room: up to _PAIRED panels each."""
    y = "gradient_rms"
    layout = plan(frame[frame[y].notna()], keys)
    rows, columns, (wide, high) = extent(layout.frame, layout.column, layout.row)
    if rows * columns > _PAIRED or layout.frame["mean_square"].isna().all():
        return curves_figure(frame, keys, y, title)
    across = rows == columns  # one panel or four: side by side, else one above the other
    figure = blank((13 if columns == 1 else 1.8 * wide, high) if across else (wide, 2 * high - 1.2))
    axes: list[Axes] = []
    captions = [title]
    shape = (1, 2) if across else (2, 1)
    parts = np.asarray(figure.subfigures(*shape, squeeze=False), object).ravel()
    for part, column in zip(parts, ("mean_square", y), strict=True):
        _, drawn, caption = _panels(layout, keys, column, part)
        axes, captions = drawn + axes, captions + caption
    return finish(figure, axes, [*captions, *layout.notes])


def _panels(
    layout: Plan, keys: Sequence[str], y: str, into: SubFigure | None = None
) -> tuple[Figure, list[Axes], list[str]]:
    """The panels of ``curves_figure``: their figure, themselves, last first, and the caption."""
    lines = _lines(layout, keys, y)
    laws = _laws(layout.frame, y)
    low, high, last = lines["low"].where(lines["low"] > 0), lines["high"], lines["x"].max()
    activations = y == "mean_square"
    skipped = 2 if activations and last > 2 else -1  # the first block makes decades by itself
    after = lines["x"] > skipped
    log = bool(high[after].max() > 10**DECADES * low[after].min())
    dots = "o" if lines["x"].nunique() <= FEW else None
    axes = ("sublayer (0: embedding)", NAMES[y] + (", log axis" if log else ""))
    figure, panels = grid(lines, layout.column, layout.row, axes, into=into)
    name_colours(panels[0][0], layout)
    notes: dict[str, None] = {}
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
            ax.plot(rows["x"], rows["mean"], style, color=colour, lw=2.2, marker=dots, ms=3.5)
            ax.fill_between(rows["x"], rows["low"], rows["high"], color=colour, alpha=0.2, lw=0)
            if activations and laws and end["overflow"] > 0:
                over = "a seed's curve ends: overflow"
                ax.plot(
                    end["x"], end["mean"], "x", color=colour, ms=6, mew=1.8, zorder=5, label=over
                )
        for law, column in laws:
            notes |= dict.fromkeys(_law(ax, law, column, part, float(high.max()), log))
        peaks = activations and _peak(ax, groups)
        ax.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        ax.set_xlim(-0.01 * last - 0.2, 1.01 * last + 0.2)
        ax.set_yscale("log" if log else "linear")
        room = 8 if activations and laws else 4  # a law may use another decade
        ax.set_ylim(
            low.min() / 1.6 if log else 0,
            high.max() * (room if log else 1.15 if peaks else 1.1) or 1,
        )
    name_band(panels[0][0], lines["count"])
    if y in BANDED and (lines["curve"] == "theory").any():
        label = "theory: mean ± 2 std of seeds"
        panels[0][0].fill_between([], [], [], color=".5", alpha=0.35, lw=0, label=label)
    caption = f"{WORDS[y].capitalize()} after each sublayer{', log axis' if log else ''}."
    return figure, [ax for ax, _ in panels[::-1]], [" ".join([caption, *notes])]


def _laws(frame: pd.DataFrame, y: str) -> list[tuple[Law, str]]:
    """The laws about the statistic, each with the column that has it."""
    if y == "mean_square":
        return [(law, law.column) for law in laws_in(frame)]
    known = f"law_{y}" in frame and frame[f"law_{y}"].notna().any()
    return [(LAWS["mean_field"], f"law_{y}")] if known else []


def _peak(ax: Axes, groups: Sequence[pd.DataFrame]) -> bool:
    """Write the largest value before a re-norm of a panel's curves beside it; True if there is one."""
    before = [rows[(rows["x"].shift(-1) % 1 > 0.2)] for rows in groups]
    peaks = pd.concat(before).sort_values("mean")
    if peaks.empty:
        return False
    at = peaks.iloc[-1]
    text = f"peak {short(float(at['mean']))}"
    right = at["x"] > 0.8 * max(rows["x"].max() for rows in groups)
    ax.plot(at["x"], at["mean"], "o", color=INK, ms=5, zorder=6)
    ax.annotate(
        text, (at["x"], at["mean"]), (0, 6), textcoords="offset points", fontsize=9, zorder=6,
        ha="right" if right else "center", color=INK, bbox=HALO,
    )  # fmt: skip
    return True


def _lines(layout: Plan, keys: Sequence[str], y: str) -> pd.DataFrame:
    """Each group's mean, low, high over seeds, and its laws, against x; until its first seed ends.

    Low and high of a predicted curve are its band.
    """
    by = [*keys, "curve", "ink"]
    frame = layout.frame.assign(low=layout.frame[y], high=layout.frame[y])
    theory = frame["curve"] == "theory"
    if y in BANDED and theory.any():
        frame.loc[theory, "low"], frame.loc[theory, "high"] = predicted_band(frame[theory], y)
    columns = [*(column for _, column in _laws(frame, y)), "band_mean_field"]
    means = {name: (name, "mean") for name in columns if name in frame}
    groups = frame.groupby([*by, "x"], observed=True)
    lines = groups.agg(
        mean=(y, "mean"), low=("low", "min"), high=("high", "max"), count=(y, "count"),
        overflow=("overflow", "max"), **means,
    ).reset_index()  # fmt: skip
    lines["line"] = lines.groupby(by, observed=True).ngroup()
    return lines[lines["count"] == lines.groupby("line")["count"].transform("max")]


def _law(
    ax: Axes, law: Law, column: str, part: pd.DataFrame, top: float, log: bool
) -> list[str]:  # fmt: skip
    """Draw a law, the lowest and highest where a panel's curves differ. What is left out, in words.

    A law that random inits aren't expected to obey is drawn once, up to the first re-norm, where it
    starts anew. Theory is drawn beside every curve, with its band if there are few.
    """
    part = part[part["curve"] == basis(part)]
    table = part.pivot(index="x", columns="line", values=column).dropna(axis=1, how="all")
    shared = table.dropna()
    if shared.empty:
        return []
    style: dict[str, Any] = {"color": law.colour, "ls": law.line, "lw": 1.4, "zorder": 4}
    style["label"] = law.label
    renorm = table.index.to_numpy() % 1 > 0.2
    if not law.expected:
        first = table.where((table.notna() & renorm[:, None]).cumsum() == 0)
        longest = first.loc[:, first.count() == first.count().max()]
        says = longest[longest.bfill().iloc[0].idxmin()].dropna().clip(upper=1e6 * top)
        ax.plot(says.index, says, **style)
        starts, notes = first.bfill().iloc[0], []
        if starts.max() > 1.1 * starts.min():
            notes.append(f"{law.label} is drawn from the lowest start.")
        return [*notes, f"{law.label} is drawn up to the first re-norm."] if renorm.any() else notes
    low, high = shared.min(axis=1), shared.max(axis=1)
    # What can be seen: a tenth of a value on a log axis, a twentieth of a linear axis.
    apart = (high / low - 1).fillna(0) / 0.1 if log else (high - low) / top / 0.05
    at = shared.iloc[int(apart.to_numpy().argmax())]
    differ = bool(apart.max() > 1)
    lines = [at.idxmin(), at.idxmax()] if differ else [table.count().idxmax()]
    theory = law.name == "mean_field"
    if theory and differ:
        lines = list(table)
    banded = column == law.column and len(lines) <= _BANDS
    for line in lines:
        says = table[line].dropna().clip(upper=1e6 * top)
        says[says.index % 1 > 0.2] = np.nan  # a gap at each re-norm, not a drop
        ax.plot(says.index, says, **style)
        if theory and banded:
            std = part[part["line"] == line].set_index("x")["band_mean_field"].reindex(says.index)
            law_band(ax, says.index.to_series(), says, std, law)
    if differ and table.shape[1] > 2 and not theory:
        return ["Of a law that differs between colours the lowest and the highest are drawn."]
    left = theory and column == law.column and not banded
    return ["Theory's bands are left out."] if left else []
