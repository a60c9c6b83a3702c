"""Several finished runs as Python objects: a sweep, and runs side by side."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from simlab.config import ConfigError
from simlab.report.plot import plot
from simlab.report.values import key_text, value_text
from simlab.results.run import SHOWN_ROWS, Result, figure_html, read_result, table_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
        streams: The rows of streams.parquet: those of ``Result.streams`` of every job that has them.
    """

    folder: Path
    frame: pd.DataFrame
    table: pd.DataFrame
    swept: Mapping[str, Sequence[Any]]
    failed: Mapping[int, str] = field(default_factory=dict)
    unfinished: Sequence[int] = ()
    folders: Mapping[int, Path] = field(default_factory=dict)
    streams: pd.DataFrame = field(default_factory=pd.DataFrame)

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
        figure = figure_html(lambda ax: self.plot(ax=ax)) if len(self.frame) else ""
        return f"<p>{html.escape(repr(self)[1:-1])}</p>{figure}{table_html(shown)}"


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
        return f"<ul>{said}</ul>{figure_html(lambda ax: self.plot(ax=ax))}{table_html(self.table)}"
