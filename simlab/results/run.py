"""A finished run as a Python object: its curves, verdict, plots, files and display."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from simlab.analysis.curve import basis, laws_in
from simlab.analysis.headline import headline
from simlab.analysis.numbers import short
from simlab.config import ConfigError
from simlab.report.console import figure_lines, title_of
from simlab.report.page.build import command_in, lines, run_page
from simlab.report.plot import plot
from simlab.report.table import fallen, shown_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_ROWS = 12  # of a table in a notebook


@dataclass(frozen=True, repr=False)
class Result:
    """A finished run. In a notebook it shows itself: a sentence, a figure, a small table.

    Example:

        r = simlab.measure("small", norm="swin_renorm", depth=12, seeds=8)
        r.curves.groupby("sublayer")["mean_square"].mean()
        r.summary["lambda"]["random"]["lambda_token"]  # {"value": …, "low": …, "high": …}

    Attributes:
        curves: The rows of curve.csv: one per curve × seed × step. A model of depth L has 2·L + 1
            steps, the embedding and two sublayers per block, and one more per re-norm; a curve that
            overflows ends early. No column has a unit but attention_entropy (nats): mean_square is the
            mean of x² over tokens and width, norm the mean over tokens of ‖x‖. docs/columns.md explains
            all.
        summary: The content of summary.json: config, versions, verdicts, theories, λ's.
        weights: The rows of weights.csv, one per tensor of a checkpoint that was measured with
            ``source.weights=true``, its default; else None.
        overrides: What the config was composed of, as on the command line.
        folder: Where its files are; None until it is saved.
        streams: The rows of streams.csv, one per curve × seed × step × vector, of a placement that
            carries several vectors, such as norm=parallel; else None.
    """

    curves: pd.DataFrame
    summary: Mapping[str, Any]
    weights: pd.DataFrame | None = None
    overrides: Sequence[str] = ()
    folder: Path | None = None
    streams: pd.DataFrame | None = None

    @property
    def headline(self) -> str:
        """The answer in one sentence, as "At init, … grows linearly, by 1.00 ± 0.02 per sublayer."."""
        return headline(self.curves, self.summary)

    @property
    def verdict(self) -> str:
        """Every sentence of the verdict, a paragraph per curve, as the command prints them."""
        return "\n".join(lines(self.summary))

    @property
    def title(self) -> str:
        """Which model, norm and init it is about, as "small with depth 12, norm pre, …"."""
        return title_of(self.summary)

    @property
    def command(self) -> str:
        """What makes it again: "python -m simlab.run model=small depth=12", or a call in Python."""
        return command_in(self.summary, self.overrides)

    @property
    def theory(self) -> pd.DataFrame:
        """What theory and the laws say of the random inits, a row per step.

        Example:

            r.theory[["sublayer", "mean_field", "band_mean_field", "additive"]]

        Columns: sublayer, block (from 0), kind; mean_field, the predicted mean square, with
        band_mean_field, the std between seeds, and law_gradient_rms where gradients were measured;
        additive and sqrt2, which start at each seed's own embedding: the seeds' mean. A column that
        says nothing of this run is left out.
        """
        rows = self.curves[self.curves["curve"] == basis(self.curves)]
        names = {law.column: law.name for law in laws_in(rows)}
        others = [
            c
            for c in ("band_mean_field", "law_gradient_rms")
            if c in rows and rows[c].notna().any()
        ]
        steps = rows.groupby(["sublayer", "kind"], sort=False, as_index=False)
        how = {"block": "first"} | dict.fromkeys([*names, *others], "mean")
        return steps.agg(how).rename(columns=names)

    def table(self) -> pd.DataFrame:
        """The mean square, which has no unit, after each block, and on both sides of each fall.

        Example:

            r.table().loc[3, "random"]  # after block 3

        Returns a row per block, and more where a re-norm or a sublayer sets the curve back within it:
        the peak's row is then the one before. The index is the block, from 1. Columns: after
        (attention, mlp, renorm), each curve's mean over seeds, and, of several seeds, their std.
        """
        steps = self.curves[self.curves["block"].notna()]
        keys = ["sublayer", "kind", "block"]  # mlp sorts before the renorm of the same number
        groups = steps.groupby([*keys, "curve"])["mean_square"]
        names = list(dict.fromkeys(steps["curve"]))
        means, spread = groups.mean().unstack()[names], groups.std().unstack()[names]
        kinds, blocks = (means.index.get_level_values(key) for key in ("kind", "block"))
        falls = {i for i, kind in enumerate(kinds) if kind == "renorm"}
        falls = falls.union(*(fallen(means[name].to_numpy()) for name in names))
        ends = np.flatnonzero(~blocks.duplicated(keep="last"))
        rows = sorted({*ends.tolist(), *falls, *(i - 1 for i in falls)})
        several = [name for name in names if spread[name].notna().any()]
        table = means.join(spread[several].add_suffix(" ± seeds")).iloc[rows]
        table.index = pd.Index(blocks[rows].astype(int) + 1, name="block")
        table.columns.name = None
        table.insert(0, "after", kinds[rows])
        return table

    def plot(self, quantity: str = "mean_square", ax: Axes | None = None, **options: Any) -> Axes:
        """Draw a quantity by sublayer: ``simlab.plot`` of these curves, with its arguments.

        Example:

            r.plot("norm", laws=["additive"])

        Returns the matplotlib Axes. Raises ConfigError for a column or a law that isn't there.
        """
        return plot(self.curves, quantity, ax, **options)

    def figure(self) -> Figure:
        """The run's main figure, growth.png, as a matplotlib Figure.

        Example:

            r.figure().savefig("growth.svg")
        """
        from simlab.report.growth_figure import growth_figure

        lines = figure_lines(self.curves, self.summary)
        return growth_figure(self.curves, self.title, lines, self.summary["tokens"])

    def page(self) -> str:
        """The text of report.html, a page that opens offline.

        Example:

            Path("report.html").write_text(r.page(), encoding="utf-8")
        """
        from datetime import date

        from simlab.report.streams_figure import streams_figure
        from simlab.report.style import png_of

        figure = streams_figure(self.streams, self.title)
        return run_page(
            self.curves, self.summary, self.title, self.command, str(date.today()),
            png_of(figure) if figure else None,
        )  # fmt: skip

    def save(self, folder: str | Path, *, svg: bool = False) -> Path:
        """Write the command's files into a folder: tables, figures, report.html, summary.json.

        Example:

            r.save("outputs/my_run")  # simlab.load_run("outputs/my_run") reads it again

        Args:
            folder: Where to; made where it isn't there. Files of an earlier run in it are replaced.
            svg: Write the figures as .svg, too.

        Returns the folder. Raises ConfigError where it can't be made or written.
        """
        from simlab.sweep.job import write

        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
            write(
                self.curves, dict(self.summary), self.weights, path, self.overrides, svg=svg,
                streams=self.streams,
            )  # fmt: skip
        except OSError as error:  # no such place, no right to write there, a full disk
            where = error.filename or path
            raise ConfigError(f"save: {where}: {error.strerror or error}") from error
        return path

    def __repr__(self) -> str:
        """Two lines: what it is about, and the answer."""
        what = "probe" if "call" in self.summary else "run"  # of a module in memory, or of a config
        return f"<simlab {what}: {self.title}\n {self.headline}>"

    def _repr_html_(self) -> str:
        figure = figure_html(lambda ax: self.plot(ax=ax))
        return (
            f"<p><b>{html.escape(self.headline)}</b><br><small>{html.escape(self.title)}</small></p>"
            f"{figure}{table_html(small(self.table(), basis(self.curves)))}"
        )


def read_result(folder: Path, overrides: Sequence[str]) -> Result:
    """A run from its folder's files. Raises ConfigError."""
    from simlab.store import SUMMARY, read_object
    from simlab.sweep.report import read_curve, read_vectors

    frame, summary = read_curve(folder), read_object(folder / SUMMARY)
    weights = folder / "weights.csv"
    return Result(
        frame, summary, pd.read_csv(weights) if weights.is_file() else None, tuple(overrides), folder,
        read_vectors(folder),
    )  # fmt: skip


def figure_html(draw: Any) -> str:
    """A small figure as an image within a page."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    draw(figure.subplots())
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def small(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """SHOWN_ROWS of ``Result.table``, with the peaks of the curve ``name``, as a terminal's table."""
    v = table[name].to_numpy()
    return table.iloc[shown_rows(v, range(len(v)), fallen(v), SHOWN_ROWS)]


def table_html(table: pd.DataFrame) -> str:
    """A table within a page, its numbers short."""
    texts = table.map(lambda value: short(value) if isinstance(value, float) else value)
    return str(texts.to_html(border=0, na_rep="", escape=True))
