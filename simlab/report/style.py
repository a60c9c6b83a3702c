"""Shared parts of the figures: colours, a curve with its seeds' band, the frame, and saving."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, LogFormatterMathtext
from pandas.core.groupby import SeriesGroupBy

from simlab.analysis import Law
from simlab.report.colours import COLOURS, LABELS
from simlab.store import write_atomically

_BAND = "theory: mean ± 2 std of a seed"  # a legend's name for the predicted band
_AXES = {"grid.color": ".92", "axes.edgecolor": ".6"}


def blank(size: tuple[float, float]) -> Figure:
    """A figure of ``size`` inches without axes."""
    with matplotlib.style.context(["seaborn-v0_8-whitegrid", _AXES]):
        return Figure(figsize=size, layout="constrained")


def subplots(
    rows: int, columns: int, size: tuple[float, float], into: SubFigure | None = None, **shared: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of ``size`` inches, and its axes (rows, columns); shared: sharex, sharey.

    into: the part of a figure that gets the axes; that figure is returned.
    """
    with matplotlib.style.context(["seaborn-v0_8-whitegrid", _AXES]):
        figure = blank(size) if into is None else into.figure
        return figure, (into or figure).subplots(rows, columns, squeeze=False, **shared)


def draw_band(ax: Axes, values: SeriesGroupBy[Any, Any], colour: str, **line: Any) -> None:
    """Each group's mean against the group's key, with a band from the least value to the largest."""
    mean = values.mean()
    ax.plot(mean.index, mean, color=colour, **line)
    ax.fill_between(mean.index, values.min(), values.max(), color=colour, alpha=0.2, lw=0)


def draw_curves(ax: Axes, frame: pd.DataFrame, x: str, y: str) -> None:
    """Each curve's mean over seeds with its band: the seeds' range, of a predicted one ± 2 std."""
    for name in frame["curve"].unique():
        of_curve = frame[(frame["curve"] == name) & frame[y].notna()]
        if of_curve.empty:
            continue
        seeds = of_curve["seed"].nunique()
        label = LABELS[name] + (f" ({seeds} seeds: mean, min to max)" if seeds > 1 else "")
        marker = "o" if of_curve[x].nunique() <= 24 else None
        by_x = of_curve.groupby(x)[y]
        if name == "theory" and y in BANDED:
            label += " (mean ± 2 std of seeds)"
            low, high = predicted_band(of_curve, y)
            ax.fill_between(of_curve[x], low, high, color=COLOURS[name], alpha=0.2, lw=0)
        # Laws are drawn over random inits, dashed: these are paler and show in the gaps.
        alpha = 0.6 if name == "random" else 1.0
        line = {"lw": 2.8, "alpha": alpha, "marker": marker, "ms": 4.5, "zorder": 2}
        draw_band(ax, by_x, COLOURS[name], label=label, **line)


FREE_LINES = 3  # of a title, for which a figure's height has room


def law_band(ax: Axes, x: pd.Series, mean: pd.Series, std: pd.Series, law: Law) -> None:
    """The predicted band of a seed around theory's mean, in the law's colour."""
    ax.fill_between(
        x, mean - 2 * std, mean + 2 * std, color=law.colour, alpha=0.15, lw=0, label=_BAND, zorder=1
    )


BANDED = ("mean_square", "ratio")  # columns whose predicted band is known


def predicted_band(rows: pd.DataFrame, y: str) -> tuple[pd.Series, pd.Series]:
    """Predicted mean ± 2 std between seeds of a column of BANDED."""
    share = 2 * rows["band_mean_field"] / rows["mean_square"]
    return rows[y] * (1 - share), rows[y] * (1 + share)


def finish(figure: Figure, axes: Sequence[Axes], lines: Sequence[str]) -> Figure:
    """The lines above, and one legend for all panels: in cells without a panel, or below."""
    legend(figure, axes)
    return headed(figure, lines)


def legend(figure: Figure | SubFigure, axes: Sequence[Axes]) -> None:
    """One legend of what the axes name: in the cells that a grid left empty if it fits, or below."""
    named: dict[str, Artist] = {}
    for ax in axes:
        named = dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True)) | named
    handles, labels = list(named.values()), list(named)
    if not handles:
        return
    looks: dict[str, Any] = {"frameon": False, "fontsize": 9.5, "handlelength": 3}
    inches = figure.bbox.width / figure.dpi
    empty = [ax for ax in figure.axes if not ax.get_visible()]
    if empty:
        spec = empty[0].get_subplotspec()
        assert spec is not None
        rows, columns = spec.get_gridspec().get_geometry()
        lines = int((figure.bbox.height / figure.dpi / rows - 0.6) / 0.21)
        ncols = math.ceil(len(labels) / lines)
        if ncols <= _legend_columns(labels, inches * len(empty) / columns):
            drawn = figure.legend(
                handles, labels, loc="center left", ncols=ncols, bbox_to_anchor=(0, 0.5),
                bbox_transform=empty[0].transAxes, **looks,
            )  # fmt: skip
            drawn.set_in_layout(False)
            return
    ncols = _legend_columns(labels, inches)
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, **looks)


def headed(figure: Figure, lines: Sequence[str]) -> Figure:
    """The lines above the panels, wrapped."""
    width = round(figure.get_figwidth() * 13)
    wrapped = [part for line in lines for part in textwrap.wrap(line, width)]
    # 0.17 inches a line: a longer title doesn't take room from the panels.
    figure.set_figheight(figure.get_figheight() + 0.17 * max(0, len(wrapped) - FREE_LINES))
    figure.suptitle("\n".join(wrapped), fontsize=10.5, x=0.01, ha="left")
    return figure


def _legend_columns(labels: Sequence[str], inches: float) -> int:
    """As many columns as fit into a width, where matplotlib fills them one after the other."""
    # Measured in DejaVu Sans of 9.5 points: 0.074 inches a letter, 0.84 for the line and the gaps.
    wide = [0.074 * len(label) + 0.84 for label in labels]
    for columns in range(min(len(wide), 6), 1, -1):
        if sum(max(part) for part in np.array_split(wide, columns)) < inches - 0.3:
            return columns
    return 1


class _PlainPowers(LogFormatter):
    """Ticks of a log axis as plain text. Formulas take a fifth of a figure's time (measured)."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """``10³`` of 1000, ``2·10³`` of 2000, ``20`` of 20; nothing where matplotlib has no label."""
        if not super().__call__(x, pos):
            return ""
        if 0.01 <= x < 1000:
            return f"{x:g}"
        digits, power = f"{x:.0e}".split("e")
        raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{'' if digits == '1' else digits + '·'}10{raised}"


def png_of(figure: Figure) -> bytes:
    """The content of ``save``'s PNG."""
    with TemporaryDirectory() as folder:
        (path,) = save(figure, Path(folder), "figure")
        return path.read_bytes()


def save(figure: Figure, folder: Path, name: str, *, svg: bool = False) -> list[Path]:
    """NAME.png, and with ``svg`` NAME.svg; the same figure gives the same bytes.

    Without ``svg`` an earlier NAME.svg is removed: it shows other numbers.
    """
    for text in figure.findobj(Text):  # a user's own may have a dollar
        text.set_parse_math(False)
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            if isinstance(axis.get_major_formatter(), LogFormatterMathtext):
                axis.set_major_formatter(_PlainPowers())
            if isinstance(axis.get_minor_formatter(), LogFormatterMathtext):
                axis.set_minor_formatter(_PlainPowers())
    drawing, vectors = folder / f"{name}.png", folder / f"{name}.svg"
    # Canvases themselves: ``savefig`` draws everything twice, once to find the layout.
    dpi = figure.dpi
    figure.set_dpi(150)
    write_atomically(drawing, FigureCanvasAgg(figure).print_png)
    figure.set_dpi(dpi)
    if not svg:
        if vectors.is_file() or vectors.is_symlink():  # a folder of that name isn't ours
            vectors.unlink()
        return [drawing]
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure.set_layout_engine("none")  # found once: it's a third of the time
    canvas = FigureCanvasSVG(figure)
    with matplotlib.rc_context({"svg.hashsalt": "simlab"}):
        write_atomically(vectors, lambda path: canvas.print_svg(path, metadata={"Date": None}))
    return [drawing, vectors]
