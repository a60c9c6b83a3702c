"""What trackers are given of a finished run: its config, curves, numbers and words, by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd

from simlab.results import Result

# Columns of curve.csv that say which row it is, or name a token: their means mean nothing.
NOT_CURVES = ("seed", "sublayer", "block", "max_token")
# The parts of summary.json whose numbers a tracker gets.
NUMBERS = ("verdict", "theories", "lambda", "loss", "departure")
MOST_NAME = 128  # characters of a run's or a group's name in W&B; MLflow takes 250
MOST_TEXT = 500  # characters of a value of the config, such as a prompt; MLflow takes 6000


@dataclass(frozen=True)
class Record:
    """A run as trackers take it.

    Attributes:
        name: The run's name: its title, or in a sweep its swept values.
        sweep: The sweep's folder; None for a single run.
        folder: The run's own folder.
        config: The values of summary.json's ``config`` by their paths, as ``model.norm.eps``.
        points: The sublayer, and the values there by curve and column, as ``random/mean_square``: the
            means over seeds. A re-norm of the stream has the number of the sublayer that it follows.
        numbers: Those of NUMBERS by their paths in summary.json, as ``verdict/random/rate/value``.
        text: The answer, and below it every sentence of the verdict.
        tags: ``headline``, ``command`` and ``folder``.
        figure, page: The files growth.png and report.html.
    """

    name: str
    sweep: Path | None
    folder: Path
    config: Mapping[str, bool | int | float | str]
    points: list[tuple[int, dict[str, float]]]
    numbers: Mapping[str, float]
    text: str
    tags: Mapping[str, str]
    figure: Path
    page: Path

    @property
    def group(self) -> str | None:
        """The sweep in a few words: the end of its folder's path, as ``2026-01-31/12-00-00-0``."""
        return "/".join(self.sweep.parts[-2:])[-MOST_NAME:] if self.sweep else None


def record_of(
    name: str, run: Result, folder: Path, sweep: Path | None, figure: Path, page: Path
) -> Record:
    """What trackers are given of a run. figure, page: its growth.png and report.html."""
    told = {part: run.summary.get(part) for part in NUMBERS}
    paragraphs = [f"**{run.headline}**", *run.verdict.split("\n")]
    return Record(
        name=name[:MOST_NAME],
        sweep=sweep,
        folder=folder,
        config=dict(_config(run.summary["config"])),
        points=list(_points(run.curves)),
        numbers={path: v for path, v in _leaves(told, "/") if _is_number(v)},
        text="\n\n".join(paragraphs),
        tags={"headline": run.headline, "command": run.command, "folder": str(folder)},
        figure=figure,
        page=page,
    )


def _leaves(values: Mapping[str, Any], joint: str, above: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings, by their paths."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, joint, f"{above}{key}{joint}")
        else:
            yield f"{above}{key}", value


def _config(config: Mapping[str, Any]) -> Iterator[tuple[str, bool | int | float | str]]:
    """A config's values but for null; a list and a long text as a text of at most MOST_TEXT."""
    for path, value in _leaves(config, "."):
        if isinstance(value, bool | int | float):
            yield path, value
        elif value is not None:
            text = str(list(value)) if isinstance(value, tuple) else str(value)
            yield path, text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 1]}…"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _points(curves: pd.DataFrame) -> Iterator[tuple[int, dict[str, float]]]:
    """Each step's sublayer, and there the seeds' mean of every curve's columns; in order."""
    numeric = curves.select_dtypes("number").columns.difference(list(NOT_CURVES), sort=False)
    steps = curves.groupby(["sublayer", "kind", "curve"], sort=False)[list(numeric)].mean()
    rows: dict[tuple[int, str], dict[str, float]] = {}
    for at, means in steps.iterrows():
        sublayer, kind, curve = cast("tuple[int, str, str]", at)
        row = rows.setdefault((int(sublayer), kind), {})
        row |= {f"{curve}/{name}": float(v) for name, v in means.items() if math.isfinite(v)}
    # Stable: within a sublayer the re-norm stays after what it follows.
    yield from ((at, row) for (at, _), row in sorted(rows.items(), key=lambda item: item[0][0]))
