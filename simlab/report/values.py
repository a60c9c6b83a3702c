"""Swept keys, their values and jobs.csv's words as texts, for tables, pages and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from simlab.analysis.decision import UNDECIDED, decision
from simlab.analysis.numbers import off_by

SEEDS = ("first_seed", "seeds")  # curves that differ in these alone make a band


def value_text(value: Any) -> str:
    """A swept value as it is written on the command line; equal numbers give equal texts."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "null"
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, int | np.integer):
        return str(int(value))
    if not is_number(value):
        return str(value)
    number = float(value)
    # 1e15: beyond, an integral float may not be the integer that it prints
    return str(int(number)) if number == int(number) and abs(number) < 1e15 else f"{number:.12g}"


def is_number(value: Any) -> bool:
    """True for a finite number and for a text that spells one."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def is_formula(text: str) -> bool:
    """True for a formula of ``norm=custom``: F(…) stands in it."""
    return "F(" in text


def shorten(text: str, most: int) -> str:
    """Cut a text to ``most`` characters: a path at its beginning, a name at its end.

    A formula in its middle: those of a sweep differ in their first factors or their last.
    """
    if len(text) <= most:
        return text
    if is_formula(text) and most > 2:
        return f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :]}"
    return f"…{text[len(text) - most + 1 :]}" if "/" in text else f"{text[: most - 1]}…"


def key_text(key: str) -> str:
    """A key as it is written on the command line."""
    return "norm" if key == "norm_placement" else key


def spread(levels: pd.DataFrame, keys: Sequence[str]) -> dict[str, float]:
    """How far apart each swept key's curves lie: the range of ln(level) along it, others fixed.

    levels: a row per curve, its keys' values and its ``level``, above 0, at one depth. The mean
    over the other keys' values; 0 where nothing is known.
    """
    logs = np.log(levels["level"].where(levels["level"] > 0)).astype(float)
    wide = {}
    for key in keys:
        others = [levels[other].astype(str) for other in keys if other != key]
        groups = logs.groupby(others) if others else logs.groupby(np.zeros(len(logs)))
        mean = (groups.max() - groups.min()).mean()
        wide[key] = float(mean) if math.isfinite(mean) else 0.0
    return wide


def shape_text(word: Any) -> str:
    """The verdict's word for a shape, as tables have it."""
    return {"none": "no shape", "unknown": ""}.get(str(word), str(word))


def law_text(row: Mapping[str, Any], name: str, undecided: str = UNDECIDED) -> str:
    """The decision on a law in a row of jobs.csv, and how far it is off: ``holds, 1.2 %``; or empty."""
    status, error = row.get(name), row.get(f"{name}_error")
    size = None if error is None or pd.isna(error) else float(error)
    word = None if pd.isna(status) else decision(str(row["curve"]), str(status), size)
    if word is None or size is None:  # a size that is infinite isn't in the file
        return word or ""
    off = off_by(size).replace("a factor of ", "×").replace("less than ", "<")
    return f"{undecided if word == UNDECIDED else word}, {off.replace('any factor', '×∞')}"
