"""The table of a dry run: every job's size, engine, and estimated memory and time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from simlab.analysis.numbers import count, duration, gigabytes

_MOST_ROWS = 40  # rows; of more jobs the first and the last


@dataclass(frozen=True)
class JobEstimate:
    """A job: swept values, parameters of the model, peak bytes, seconds, and if a result is stored."""

    number: int
    values: Mapping[str, Any]
    parameters: int
    engine: str
    memory: int
    seconds: float
    kept: bool


def show_estimates(rows: Sequence[JobEstimate], at_once: int) -> None:
    """The table, for 80 columns, and all jobs together. at_once: how many run at a time."""
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("job", justify="right")
    swept = list(rows[0].values) if rows else []
    for key in swept:
        table.add_column(key, overflow="ellipsis", no_wrap=True)
    for head in ("parameters", "engine", "memory", "time"):
        table.add_column(head, justify="left" if head == "engine" else "right", no_wrap=True)
    shown = rows if len(rows) <= _MOST_ROWS else [*rows[: _MOST_ROWS - 1], rows[-1]]
    for row in shown:
        if row is rows[-1] and len(shown) < len(rows):
            table.add_row("…")
        time = "kept" if row.kept else duration(row.seconds)
        values = [str(row.values[key]) for key in swept]
        memory = gigabytes(row.memory)
        table.add_row(str(row.number), *values, count(row.parameters), row.engine, memory, time)
    console.print(table)
    missing = [row for row in rows if not row.kept]
    total = sum(row.seconds for row in missing) / at_once
    jobs = f"{len(missing)} job{'s' if len(missing) != 1 else ''} to run"
    if len(missing) < len(rows):
        jobs += f", {len(rows) - len(missing)} kept"
    peak = max((row.memory for row in missing), default=0) * min(at_once, max(1, len(missing)))
    time = "a time that isn't known here" if math.isnan(total) else f"about {duration(total)}"
    size = f", {time} and {gigabytes(peak)}" if missing else ""
    together = f" with {at_once} at a time" if at_once > 1 else ""
    console.print(Text(f"{jobs}{size}{together} (estimates); nothing was run", style="bold"))
