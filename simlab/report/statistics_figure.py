"""statistics.png: statistics against width, as in a coordinate check, each line with its exponent."""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from simlab.analysis.curve import INITS
from simlab.analysis.resampling import MIN_SEEDS, Estimate
from simlab.analysis.scaling import BENT, PowerLaw, power_law
from simlab.report.colours import PALETTE
from simlab.report.facets import label, numbers, values_of
from simlab.report.panels import DIM, INK, apart, log_ticks, panel, write_at
from simlab.report.seeds import SeedArray, over_seeds

BLOCKS = 5  # that the statistics are shown after, beside the embedding
ROWS = 8  # of panels
ACROSS = 3  # statistics side by side, up to which a page's width leaves them legible
SHOWN_STATISTICS = {  # the columns' titles, and what is reduced how
    "mean_abs": ("Mean |x|", "over width and tokens"),
    "norm": ("Norm ‖x‖", "mean over tokens"),
    "max_abs": ("Largest |x|", "of all tokens"),
    "attention_max_logit": ("Largest attention logit", "of all heads and tokens"),
    "attention_entropy": ("Attention entropy", "nats, mean over heads"),
    "gradient_norm": ("Gradient of the loss", "norm, mean over tokens"),
}
OF_ONE_SIZE = {"norm": 0.5}  # p where entries of x have one size at every width; of the others 0
# A panel and the room beside it for ticks and for labels, in inches.
WIDE, TALL, TICKS, ENDS, UNDER = 1.7, 1.55, 0.45, 1.3, 0.25
HEADS, FOOT = 0.65, 0.4  # above and below the rows of a statistic
_AT = "at"  # a column: -1 of the embedding, else the block


@dataclass(frozen=True)
class Line:
    """A statistic after a block against width: values (S, W), and the power law fitted to them."""

    at: int
    values: SeedArray
    law: PowerLaw | None


def statistics_figure(frame: pd.DataFrame, keys: Sequence[str], title: str) -> Figure | None:
    """Statistics after some blocks against width, as in a coordinate check; None without widths.

    A column per statistic, a row per combination of the other swept keys' values. At each line's end
    stands p, if it goes as width^p (``analysis.scaling``).
    """
    frame = frame[frame["curve"].isin(INITS)]
    names = [name for name in SHOWN_STATISTICS if name in frame and frame[name].notna().any()]
    if not names or "width" not in keys or not numbers(frame["width"]):
        return None
    frame, rows, notes = _rows(frame, [key for key in keys if key != "width"])
    widths = np.array(numbers(frame["width"]))
    block = frame["block"].astype(float).fillna(-1)
    deepest = int(block.groupby(frame["job"]).max().min())
    blocks = np.geomspace(1, deepest + 1, BLOCKS) if deepest >= 0 else ()
    places = sorted({-1, *(round(b) - 1 for b in blocks)})
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.8, len(places) - 1))
    inks = dict(zip(places, [PALETTE[6], *map(matplotlib.colors.to_hex, shades)], strict=True))
    frame = frame.assign(**{_AT: block, "width": frame["width"].astype(float)})
    panels = {
        (int(part["row"].iloc[0]), name): _lines(part, name, places, widths)
        for _, part in frame.groupby("row") for name in names
    }  # fmt: skip
    seeds = max(len(line.values) for lines in panels.values() for line in lines)
    notes = [*_fitted(seeds), *notes, f"{title}."]
    head = _headline(panels, rows, names[0], places[-1])
    return _draw(panels, rows, names, widths, inks, head, notes, seeds)


def _rows(
    frame: pd.DataFrame, keys: Sequence[str]
) -> tuple[pd.DataFrame, Mapping[int, Sequence[str]], list[str]]:
    """The rows that are shown, with their panels' ``row``; each row's header; what is left out."""
    notes, room = [], ROWS
    keys = sorted(keys, key=lambda key: frame[key].nunique())
    for key in keys:
        values = values_of(frame[key])
        if len(values) > room:
            some = [values[int(i)] for i in np.linspace(0, len(values) - 1, room).round()]
            frame = frame[frame[key].isin(some)]
            notes.append(f"Shown: {', '.join(label(key, v) for v in some)}, of {len(values)}.")
        room = max(1, room // len(values))
    frame = frame.assign(row=frame.groupby(keys, observed=True).ngroup() if keys else 0)
    heads = {
        int(row): [label(key, str(value)) for key, value in zip(keys, values, strict=True)]
        for row, *values in frame[["row", *keys]].drop_duplicates("row").to_numpy(object).tolist()
    }
    return frame, dict(sorted(heads.items())), notes


def _lines(rows: pd.DataFrame, name: str, places: Sequence[int], widths: SeedArray) -> list[Line]:
    """A panel's lines: what the statistic is at the end of each place, a block or the embedding."""
    last = rows[rows[name].notna() & rows[_AT].isin(places)]
    last = last.groupby([_AT, "job", "seed"]).tail(1)  # after the MLP, and the re-norm behind it
    lines = []
    for _, part in last.groupby(_AT):
        table = part.groupby(["seed", "width"])[name].mean().unstack().reindex(columns=widths)
        values = table.to_numpy(np.float64)
        lines.append(Line(int(part[_AT].iloc[0]), values, power_law(widths, values)))
    return lines


def _place(at: int) -> str:
    return "embedding" if at < 0 else f"after block {at + 1}"


def _signed(value: float) -> str:
    text = f"{value:+.2f}".replace("-", "−")
    return "0.00" if float(text[1:]) == 0 else text


def _exponent(law: PowerLaw | None) -> str:
    """``+0.50 ± 0.01``; ``+0.49 → +0.08`` of a bent line; empty without a law."""
    if law is None:
        return ""
    if law.bent:
        return f"{_signed(law.first)} → {_signed(law.last)}"
    return _signed(law.exponent.value) + _half(law.exponent)


def _half(e: Estimate) -> str:
    """`` ± 0.01``, never narrower than it is; empty without an interval."""
    if e.low is None or e.high is None:
        return ""
    return f" ± {max(1, math.ceil(50 * (e.high - e.low) - 1e-9)) / 100:.2f}"


def _grows(law: PowerLaw, name: str) -> bool:
    """True if p is off OF_ONE_SIZE by more than BENT and by more than its interval.

    Of a bent line: p between the two largest widths. Without an interval that can't be told.
    """
    e = law.end if law.bent else law.exponent
    if e.value is None or e.low is None or e.high is None:
        return False
    flat = OF_ONE_SIZE.get(name, 0.0)
    return abs(e.value - flat) > BENT and not e.low <= flat <= e.high


def _headline(
    panels: Mapping[tuple[int, str], Sequence[Line]], rows: Mapping[int, Sequence[str]],
    name: str, deepest: int,
) -> str:  # fmt: skip
    """The exponents of the first statistic after the deepest block, the least and the largest."""
    laws = {
        row: line.law
        for row in rows for line in panels[row, name]
        if line.at == deepest and line.law is not None
    }  # fmt: skip
    what = f"{SHOWN_STATISTICS[name][0]} {_place(deepest)}"
    if not laws:
        return f"{what} against width"
    order = sorted(laws, key=lambda row: laws[row].exponent.value)
    said = [
        _exponent(laws[row]) + (f" ({', '.join(rows[row])})" if rows[row] else "")
        for row in dict.fromkeys((order[0], order[-1]))
    ]
    least_to_most = f"from {said[0]} to {said[1]}" if len(said) > 1 else f"= {said[0]}"
    return f"{what} goes as widthᵖ, p {least_to_most}"


def _fitted(seeds: int) -> list[str]:
    """What the numbers at the lines' ends are, and which of them are bold."""
    known = seeds >= MIN_SEEDS
    chance = " ± its 95 % interval over the seeds" if known else ""
    bold = f"bold: p is off by more than {BENT:g}, and by more than its interval"
    return [
        f"At each line's end: p of widthᵖ{chance}; of a bent line p at the smallest widths → at the"
        " largest. Each panel has its own vertical axis.",
        "Where entries of x have one size at every width, p is 0, and ½ for the norm; "
        + (bold if known else f"fewer than {MIN_SEEDS} seeds can't tell what is off by chance")
        + ".",
    ]


def _draw(
    panels: Mapping[tuple[int, str], Sequence[Line]], rows: Mapping[int, Sequence[str]],
    names: Sequence[str], widths: SeedArray, inks: Mapping[int, str], head: str,
    notes: Sequence[str], seeds: int,
) -> Figure:  # fmt: skip
    """Panels in rows and columns with their headers, below the headline, notes and colours.

    Of more than ACROSS statistics the others stand below, with rows of their own.
    """
    longest = max((len(text) for head in rows.values() for text in head), default=0)
    left = 0.25 + (0.085 * longest + 0.1 if longest else 0)
    pitch = TICKS + WIDE + ENDS
    bands = math.ceil(len(names) / ACROSS)
    across = math.ceil(len(names) / bands)
    width = max(left + pitch * across, 9.0)
    heads = textwrap.wrap(head, round(7.5 * width))
    more = [part for line in notes for part in textwrap.wrap(line, round(14 * width))]
    top = 0.3 + 0.28 * len(heads) + 0.19 * len(more) + 0.4
    of_band = HEADS + len(rows) * (TALL + UNDER) + FOOT
    height = top + bands * of_band
    figure = Figure(figsize=(width, height), facecolor="white")
    for i, line in enumerate(heads):
        write_at(figure, 0.25, height - 0.38 - 0.28 * i, line, size=14, weight="bold")
    under = height - 0.36 - 0.28 * len(heads)
    for i, line in enumerate(more):
        write_at(figure, 0.25, under - 0.19 * i, line, size=9.5, colour=DIM)
    _legend(figure, left + TICKS, under - 0.19 * len(more) - 0.08, inks, seeds)
    for i, name in enumerate(names):
        band, column = divmod(i, across)
        log = _limits([line for row in rows for line in panels[row, name]])[2]
        for r, row in enumerate(rows):
            bottom = height - top - band * of_band - HEADS - (r + 1) * (TALL + UNDER) + UNDER
            for n, text in enumerate(rows[row] if column == 0 else ()):
                y = bottom + TALL / 2 + 0.2 * ((len(rows[row]) - 1) / 2 - n) - 0.05
                write_at(figure, 0.25, y, text, size=10, weight="bold")
            box = (left + column * pitch + TICKS, bottom, WIDE, TALL)
            limits = _limits(panels[row, name], log)
            _panel(figure, box, panels[row, name], name, widths, inks, limits, r, len(rows))
    return figure


def _limits(lines: Sequence[Line], log: bool | None = None) -> tuple[float, float, bool]:
    """A y axis's ends for these lines, and True for a log axis: positive values, a factor of 4 apart.

    log: whether it is one; None to decide it. It spans a factor of 4 at least, so that it has ticks.
    """
    values = np.concatenate([line.values.ravel() for line in lines] or [np.array([])])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if low > 0 and (4 * low < high if log is None else log):
        more = max(1.0, 2 * math.sqrt(low / high))
        room = (high / low) ** 0.06 * more
        return low / room, high * room, True
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room, False


def _panel(
    figure: Figure, box: tuple[float, float, float, float], lines: Sequence[Line], name: str,
    widths: SeedArray, inks: Mapping[int, str], limits: tuple[float, float, bool], row: int, rows: int,
) -> None:  # fmt: skip
    low, high, log = limits
    head, how = SHOWN_STATISTICS[name] if row == 0 else ("", "")
    ax = panel(figure, box, head, how if log else f"{how}, linear axis", log=log)
    ax.set_gid(f"{row} {name}")
    for line in lines:
        colour = inks[line.at]
        if len(line.values) > 1:
            least, most = (over_seeds(how, line.values) for how in (np.nanmin, np.nanmax))
            ax.fill_between(widths, least, most, color=colour, alpha=0.2, lw=0)
        mean = over_seeds(np.nanmean, line.values)
        ax.plot(widths, mean, color=colour, lw=1.8, marker="o", ms=3.5, zorder=3)
    ax.set(xscale="log", ylim=(low, high), xlim=(widths[0] / 1.1, widths[-1] * 1.1))
    some = slice(None, None, math.ceil(len(widths) / 4))
    ax.xaxis.set_major_locator(FixedLocator(widths[some].tolist()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xticklabels([f"{w:.12g}" for w in widths[some]] if row == rows - 1 else [])
    if row == rows - 1:
        ax.set_xlabel("width, log axis", fontsize=9, color=DIM)
    if log:
        log_ticks(ax)
    _ends(ax, lines, name, inks)


def _ends(ax: Axes, lines: Sequence[Line], name: str, inks: Mapping[int, str]) -> None:
    """Each line's exponent beside its end, with a dot in its colour."""
    ends = []
    for line in lines:
        if line.law is not None:
            mean = over_seeds(np.nanmean, line.values)
            last = float(mean[np.isfinite(mean)][-1])
            end = ax.transAxes.inverted().transform(ax.transData.transform((1, last)))
            ends.append((float(end[1]), line.at, line.law))
    ends.sort(key=lambda end: end[0])
    places = apart([y for y, *_ in ends], [0.17 / TALL] * len(ends), 1.0)
    for y, (_, at, law) in zip(places, ends, strict=True):
        put = functools.partial(ax.text, transform=ax.transAxes, va="center_baseline")
        put(1.03, y, "●", color=inks[at], fontsize=7)
        colour, weight = (INK, "bold") if _grows(law, name) else (DIM, "normal")
        put(1.1, y, _exponent(law), fontsize=9, color=colour, weight=weight)


def _legend(figure: Figure, x: float, y: float, inks: Mapping[int, str], seeds: int) -> None:
    """The lines' colours, in a row of names."""
    for at, colour in inks.items():
        write_at(figure, x, y - 0.15, "●", size=11, colour=colour)
        write_at(figure, x + 0.17, y - 0.15, _place(at), size=9.5)
        x += 0.45 + 0.078 * len(_place(at))
    if seeds > 1:
        write_at(figure, x, y - 0.15, f"pale: {seeds} seeds, least to most", size=9.5, colour=DIM)
