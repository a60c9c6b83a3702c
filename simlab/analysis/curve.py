"""A curve's tidy rows (curve.csv) as arrays: seeds × rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from simlab.theory.laws import Array, Rows


@dataclass(frozen=True)
class Curves:
    """S curves of one kind (``random`` or ``checkpoint``) over the R rows that all of them have.

    kinds: (R,). mean_square, eps_factor: (S, R).
    """

    kinds: list[str]
    mean_square: Array
    eps_factor: Array

    @property
    def count(self) -> int:
        """How many curves (seeds) there are."""
        return len(self.mean_square)

    def rows(self, gain: float, normalises: str | None) -> Rows:
        """What the laws may know of these curves."""
        return Rows(self.kinds, self.mean_square[:, 0], self.eps_factor, gain, normalises)


def curves(frame: pd.DataFrame, name: str) -> Curves:
    """The curves called ``name`` in the frame, cut to the rows that every seed reached."""
    groups = [group for _, group in frame[frame["curve"] == name].groupby("seed", sort=True)]
    length = min(len(group) for group in groups)

    def stack(column: str) -> Array:
        return np.stack([group[column].to_numpy(np.float64)[:length] for group in groups])

    return Curves(
        kinds=groups[0]["kind"].tolist()[:length],
        mean_square=stack("mean_square"),
        eps_factor=stack("eps_factor"),
    )
