"""A sweep's tables, for an 80-column terminal: its jobs, and those that failed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from simlab.analysis import LAWS
from simlab.analysis.decision import NOT_DECIDED, UNDECIDED
from simlab.analysis.numbers import short
from simlab.config import printable
from simlab.report.values import (
    SEEDS,
    is_formula,
    is_number,
    key_text,
    law_text,
    shape_text,
    shorten,
    value_text,
)

WIDTH = 80
_MOST_ROWS = 40  # rows; beyond, some of them
_LEAST_COLUMNS = 5  # columns of a swept key, below which it is left out
LEAST_TOLD = ("λ token", "per subl.")  # columns that give way to swept keys, in this order
# Columns that give way to a narrow terminal after those, in this order.
LESS_TOLD = (*(law.head for law in LAWS.values() if law.expected), "growth")
ROOMY = 11  # columns of a swept key: as many as a placement's name
ROOMY_FORMULA = 22  # of a key whose values are formulas, which go on in further lines
LEFT = ("curve", "growth")
LONGEST = 400  # characters of an error


def jobs_table(jobs: pd.DataFrame, swept: Mapping[str, Sequence[Any]], width: int = WIDTH) -> Table:
    """A row per job and curve: what was swept, how it grew, and the expected laws' status.

    width: of the terminal; where not all columns fit, those of LEAST_TOLD, then of LESS_TOLD,
    are left out, and the caption says so.
    Of more than _MOST_ROWS rows every n-th is shown; the caption says so.
    """
    notes, rows, without = [], jobs, []
    if len(jobs) > _MOST_ROWS:
        fastest = [len(values) for values in swept.values()][-1:]  # but for the curves of a job
        inner = [*fastest, jobs["curve"].nunique()]
        rows = jobs.iloc[:: _stride(len(jobs), inner)]
        left = len(jobs) - len(rows)
        notes.append(f"{left} of {len(jobs)} rows are left out; jobs.csv has them all.")
    columns = _measured(rows)
    keys = [key for key in (*swept, *SEEDS) if key in rows and rows[key].nunique(dropna=False) > 1]
    given = {key: [value_text(value) for value in rows[key]] for key in dict.fromkeys(keys)}
    for least in ("", *LEAST_TOLD, *LESS_TOLD):  # without swept keys rows can't be told apart
        if columns.pop(least, None) and least in LESS_TOLD:
            without.append(least)
        room = width - sum(_wide(head, cells) + 1 for head, cells in columns.items())
        widths = _widths(given, room)
        roomy = all(
            widths.get(k, 0) >= min(_wide(_head(k, given), given[k]), _roomy(given[k]))
            for k in given
        )
        narrow = least in (*LEAST_TOLD[-1:], *LESS_TOLD) and len(widths) == len(given)
        if room >= 0 and (roomy or narrow):
            break
    if without:
        notes.append(f"No room for {', '.join(without)}; jobs.csv has all.")
    if len(widths) < len(given):
        names = ", ".join(key_text(key) for key in given if key not in widths)
        notes.append(f"No room for {names}.")
    if (rows.get("overflow", pd.Series(dtype=float)) > 0).any():
        notes.append("×: curves overflow; their last finite value.")
    if "peak" in rows and rows["peak"].notna().any():
        notes.append("≤: a saw-tooth, its largest peak.")
    laws = (columns.get(law.head, []) for law in LAWS.values())
    if any(cell.startswith("?") for cells in laws for cell in cells):
        notes.append(f"?: {UNDECIDED}, {NOT_DECIDED}")
    table = Table(
        box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold",
        caption=Text(" ".join(notes)) if notes else None, caption_justify="left",
    )  # fmt: skip
    table.add_column("job", justify="right", no_wrap=True)
    for key, width in widths.items():
        numbers = all(text == "null" or is_number(text) for text in given[key])
        side: JustifyMethod = "right" if numbers else "left"
        head = Text(shorten(_head(key, given), width))
        whole = any(map(is_formula, given[key]))
        table.add_column(head, justify=side, no_wrap=not whole, overflow="fold", width=width)
    for name in list(columns)[1:]:
        side = "left" if name in (*LEFT, *(law.head for law in LAWS.values())) else "right"
        table.add_column(name, justify=side, no_wrap=True)
    for i in range(len(rows)):
        shown = [columns["job"][i]]
        for key, width in widths.items():
            text = given[key][i]
            shown.append(text if is_formula(text) else shorten(text, width))
        shown += [cells[i] for head, cells in columns.items() if head != "job"]
        table.add_row(*map(Text, shown))
    return table


def _stride(count: int, inner: Sequence[int]) -> int:
    """The step between shown rows: prime to the fastest keys' counts, so that each value occurs."""
    stride = math.ceil(count / _MOST_ROWS)
    while math.gcd(stride, math.prod(inner)) > 1:
        stride += 1
    return stride


def _measured(rows: pd.DataFrame) -> dict[str, list[str]]:
    """The columns that are no keys, by their heads; empty cells where something wasn't measured."""
    records = [{str(key): value for key, value in row.items()} for row in rows.to_dict("records")]
    columns = {"job": [value_text(row.get("job", "")) for row in records]}
    if len({row.get("curve") for row in records}) > 1:
        columns["curve"] = [str(row["curve"]) for row in records]
    return (
        columns
        | {
            "mean sq.": [_square(row) for row in records],
            "per subl.": [short(row.get("per_sublayer")) for row in records],
            "growth": [_growth(row) for row in records],
            "λ token": [short(row.get("lambda_token")) for row in records],
        }
        | {
            law.head: [law_text(row, law.name, "?") for row in records]
            for law in LAWS.values()
            if law.expected
        }
    )


def _square(row: Mapping[str, Any]) -> str:
    over, peak = row.get("overflow"), row.get("peak")
    if peak is not None and pd.notna(peak):
        return f"≤ {short(peak)}"
    return short(row.get("mean_square")) + (" ×" if over and over > 0 else "")


def _growth(row: Mapping[str, Any]) -> str:
    """The word for the shape; of a power its exponent, of an exponential its rate, where known."""
    shape, exponent, rate = row.get("shape"), row.get("exponent"), row.get("rate")
    if shape == "power" and pd.notna(exponent):
        return f"p = {exponent:.2f}"
    if shape == "exponential" and pd.notna(rate):
        return f"rate {rate:.3g}"
    return shape_text(shape)


def _wide(head: str, cells: Sequence[str]) -> int:
    return max(len(head), *map(len, cells), 0)


def _roomy(cells: Sequence[str]) -> int:
    return ROOMY_FORMULA if any(map(is_formula, cells)) else ROOMY


def _head(key: str, given: Mapping[str, object]) -> str:
    """A key's last part, where no other key ends the same."""
    end = key_text(key).rpartition(".")[2]
    same = [other for other in given if key_text(other).rpartition(".")[2] == end]
    return end if len(same) == 1 else key_text(key)


def _widths(given: Mapping[str, Sequence[str]], room: int) -> dict[str, int]:
    """The keys' columns: the widest give way; the last are left out where none can any more."""
    widths = {key: _wide(_head(key, given), cells) for key, cells in given.items()}
    while widths and sum(widths.values()) + len(widths) > room:
        widest = max(widths, key=lambda key: widths[key])
        if widths[widest] > _LEAST_COLUMNS:
            widths[widest] -= 1
        else:
            widths.popitem()
    return widths


def failed_table(failed: Sequence[Mapping[str, Any]]) -> Table:
    """The jobs that failed: job, overrides, error."""
    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", width=WIDTH
    )  # fmt: skip
    table.add_column("job", justify="right", no_wrap=True)
    table.add_column("overrides", ratio=2, overflow="fold")
    table.add_column("error", ratio=3, overflow="fold")
    for row in failed:
        given = row.get("overrides") or ""
        overrides = given if isinstance(given, str) else " ".join(map(str, given))
        error = " ".join(str(row.get("error") or "").split())
        cells = (
            str(row.get("job", "")),
            overrides,
            error if len(error) <= LONGEST else f"{error[: LONGEST - 1]}…",
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table
