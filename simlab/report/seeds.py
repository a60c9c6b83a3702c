"""A curve's rows for figures and pages: their places on the axis, and columns as (seeds, steps)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

SeedArray = NDArray[np.float64]
_LATE = 0.35  # sublayers that a re-norm is drawn after its sublayer: that makes the drop visible


def x_of(rows: pd.DataFrame) -> pd.Series:
    """Where each row lies on the axis of sublayers."""
    return rows["sublayer"] + _LATE * (rows["kind"] == "renorm")


def axis_label(frame: pd.DataFrame) -> str:
    """The name of the axis of sublayers; most models' blocks have two."""
    two = "block" in frame and frame.groupby("block")["sublayer"].nunique().max() == 2
    return f"sublayer (0: the embedding{'; a block has two' if two else ''})"


def longest(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the seed that has most: the others have ended early."""
    return max((part for _, part in rows.groupby("seed")), key=len)


class SeedTable:
    """The rows of one kind of curve: ``[column]`` is (seeds, steps), NaN where a seed has ended."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self.rows = rows
        self.seeds, self.row = np.unique(rows["seed"].to_numpy(), return_inverse=True)
        self.step = rows.groupby("seed").cumcount().to_numpy()

    def __getitem__(self, column: str) -> SeedArray:
        table = np.full((len(self.seeds), self.step.max() + 1), np.nan)
        table[self.row, self.step] = self.rows[column].to_numpy(np.float64)
        return table


def over_seeds(how: Callable[..., SeedArray], values: SeedArray) -> SeedArray:
    """A mean, least or most (steps,) over the seeds (seeds, steps) that have a number; else NaN."""
    there = np.isfinite(values)
    if there.all():
        return how(values, axis=0)
    known = there.any(0)
    out = np.full(values.shape[1], np.nan)
    out[known] = how(np.where(there, values, np.nan)[:, known], axis=0)
    return out
