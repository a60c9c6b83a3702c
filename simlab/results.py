"""Finished runs and sweeps as Python objects: their curves, verdicts, plots, files and displays.

``simlab.measure``, ``simlab.multirun`` and ``simlab.load`` (simlab/api.py) make them.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from simlab.analysis.curve import basis, laws_in
from simlab.analysis.headline import headline
from simlab.analysis.numbers import short
from simlab.config import ConfigError
from simlab.report.console import figure_lines, title_of
from simlab.report.page.build import command_of, lines, run_page
from simlab.report.plot import plot
from simlab.report.table import fallen, shown_rows
from simlab.report.values import key_text, value_text

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
    """

    curves: pd.DataFrame
    summary: Mapping[str, Any]
    weights: pd.DataFrame | None = None
    overrides: Sequence[str] = ()
    folder: Path | None = None

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
        """The command line that makes it again: "python -m simlab.run model=small depth=12"."""
        return command_of(self.overrides)

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

        return run_page(self.curves, self.summary, self.title, self.command, str(date.today()))

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
            write(self.curves, dict(self.summary), self.weights, path, self.overrides, svg=svg)
        except OSError as error:  # no such place, no right to write there, a full disk
            where = error.filename or path
            raise ConfigError(f"save: {where}: {error.strerror or error}") from error
        return path

    def __repr__(self) -> str:
        """Two lines: what it is about, and the answer."""
        return f"<simlab run: {self.title}\n {self.headline}>"

    def _repr_html_(self) -> str:
        figure = _figure_html(lambda ax: self.plot(ax=ax))
        return (
            f"<p><b>{html.escape(self.headline)}</b><br><small>{html.escape(self.title)}</small></p>"
            f"{figure}{_table_html(small(self.table(), basis(self.curves)))}"
        )


@dataclass(frozen=True, repr=False)
class SweepResult:
    """A finished sweep, or what is there of one.

    Example:

        s = simlab.multirun({"depth": [8, 16], "init.std": [0.01, 0.02]}, "small", seeds=2)
        s.frame.groupby(["depth", "init.std"])["norm"].max()
        s.table[["depth", "init.std", "mean_square", "shape"]]  # where each job's curve ends

    Attributes:
        folder: Where its files are.
        frame: The rows of sweep.parquet: those of ``Result.curves`` of every job, one per job × curve ×
            seed × step, with the columns job and one per swept key. Empty where no job has ended.
        table: The rows of jobs.csv: one per job × curve, with mean_square (where the curve ends, the
            mean over seeds), shape (the verdict's word), and λ's. None has a unit.
        swept: The swept columns with their values, in order.
        failed: The errors of jobs that have failed, by their numbers.
        unfinished: The numbers of jobs that have not ended; the same call does them.
        folders: Each finished job's folder, by its number.
    """

    folder: Path
    frame: pd.DataFrame
    table: pd.DataFrame
    swept: Mapping[str, Sequence[Any]]
    failed: Mapping[int, str] = field(default_factory=dict)
    unfinished: Sequence[int] = ()
    folders: Mapping[int, Path] = field(default_factory=dict)

    def plot(self, quantity: str = "mean_square", ax: Axes | None = None, **options: Any) -> Axes:
        """Draw a quantity by sublayer, a line per job (with its curve's name where there are several).

        Example:

            s.plot("norm", log=True)

        Arguments as of ``simlab.plot``, but for ``by``. Returns the matplotlib Axes. Raises ConfigError
        for a column that isn't there, and where no job has ended.
        """
        if self.frame.empty:
            raise ConfigError(f"plot: no job of {self.folder} has ended")
        keys = [key for key in self.swept if self.frame[key].nunique(dropna=False) > 1]
        kinds = self.frame["curve"].nunique() > 1
        several = [*keys, "curve"] if kinds or not keys else keys
        parts = [(key, self.frame[key].map(value_text)) for key in several]
        named = [text if key == "curve" else f"{key_text(key)} " + text for key, text in parts]
        names = pd.concat(named, axis=1).agg(", ".join, axis=1)
        return plot(self.frame.assign(_name=names), quantity, ax, by="_name", **options)

    def job(self, number: int) -> Result:
        """One of its finished jobs as a run of its own.

        Example:

            s.job(0).verdict

        Args:
            number: The job's, from 0: the column job of ``frame`` and ``table``.

        Returns the run. Raises ConfigError for a number that isn't a finished job's.
        """
        from simlab.sweep.report import overrides_in

        if number not in self.folders:
            there = ", ".join(map(str, self.folders)) or "none"
            raise ConfigError(
                f"job {number}: not a finished job of {self.folder}; there are {there}"
            )
        return read_result(self.folders[number], overrides_in(self.folders[number]))

    def __repr__(self) -> str:
        """One line: how many jobs, over what, and where."""
        over = "; ".join(
            f"{key} {', '.join(map(str, values))}" for key, values in self.swept.items()
        )
        lost = f", {len(self.failed)} failed" if self.failed else ""
        lost += f", {len(self.unfinished)} unfinished" if self.unfinished else ""
        count = self.table["job"].nunique() if len(self.table) else 0
        return f"<simlab sweep: {count} jobs{lost}: {over}; {self.folder}>"

    def _repr_html_(self) -> str:
        columns = [
            *self.swept,
            "curve",
            "mean_square",
            "shape",
            "per_sublayer",
            "exponent",
            "lambda_token",
        ]
        shown = self.table[[c for c in columns if c in self.table]].head(SHOWN_ROWS)
        figure = _figure_html(lambda ax: self.plot(ax=ax)) if len(self.frame) else ""
        return f"<p>{html.escape(repr(self)[1:-1])}</p>{figure}{_table_html(shown)}"


@dataclass(frozen=True, repr=False)
class Comparison:
    """Runs side by side.

    Example:

        both = simlab.compare(pre, post, labels=["pre-norm", "post-norm"])
        both.table.loc[("pre-norm", "random"), "mean_square"]

    Attributes:
        frame: The rows of each run's ``Result.curves``, one per run × curve × seed × step, with a
            column ``run``, the run's label.
        headlines: Each run's answer in one sentence, by its label.
    """

    frame: pd.DataFrame
    headlines: Mapping[str, str]

    @property
    def table(self) -> pd.DataFrame:
        """Where each run's curves end, the mean over seeds: a row per run and curve.

        The index is (run, curve), both texts. Columns, without a unit: mean_square (of x² over tokens
        and width), norm (the tokens' mean ‖x‖), max_abs (the largest |x|), and token_cosine (the mean
        cosine between tokens, from -1 to 1).
        """
        last = self.frame.groupby(["run", "curve", "seed"], sort=False).tail(1)
        columns = [c for c in ("mean_square", "norm", "max_abs", "token_cosine") if c in last]
        return last.groupby(["run", "curve"], sort=False)[columns].mean()

    def plot(self, quantity: str = "mean_square", ax: Axes | None = None, **options: Any) -> Axes:
        """Draw a quantity by sublayer, a line per run and curve.

        Example:

            both.plot("norm", log=True)

        Arguments as of ``simlab.plot``, but for ``by``. Returns the matplotlib Axes. Raises ConfigError
        for a column that isn't there.
        """
        kinds = self.frame["curve"].nunique() > 1
        names = self.frame["run"] + (": " + self.frame["curve"] if kinds else "")
        return plot(self.frame.assign(_name=names), quantity, ax, by="_name", **options)

    def __repr__(self) -> str:
        """A line per run: its label and its answer."""
        return "\n".join(f"{label}: {text}" for label, text in self.headlines.items())

    def _repr_html_(self) -> str:
        said = "".join(
            f"<li><b>{html.escape(label)}</b>: {html.escape(text)}</li>"
            for label, text in self.headlines.items()
        )
        return (
            f"<ul>{said}</ul>{_figure_html(lambda ax: self.plot(ax=ax))}{_table_html(self.table)}"
        )


def read_result(folder: Path, overrides: Sequence[str]) -> Result:
    """A run from its folder's files. Raises ConfigError."""
    from simlab.store import SUMMARY, read_object
    from simlab.sweep.report import read_curve

    frame, summary = read_curve(folder), read_object(folder / SUMMARY)
    weights = folder / "weights.csv"
    return Result(
        frame, summary, pd.read_csv(weights) if weights.is_file() else None, tuple(overrides), folder
    )  # fmt: skip


def _figure_html(draw: Any) -> str:
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


def _table_html(table: pd.DataFrame) -> str:
    texts = table.map(lambda value: short(value) if isinstance(value, float) else value)
    return str(texts.to_html(border=0, na_rep="", escape=True))
