"""A curve's tidy rows (curve.csv) as arrays: seeds × rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from simlab.theory.laws import Array, Rows


@dataclass(frozen=True)
class Curves:
    """S curves of one kind (``random`` or ``checkpoint``) over the R rows that all of them have.

    kinds, gain, normalises: (R,), as in ``Rows``. mean_square, eps_factor: (S, R).
    """

    kinds: list[str]
    mean_square: Array
    eps_factor: Array
    gain: Sequence[float]
    normalises: Sequence[str | None]

    @property
    def count(self) -> int:
        """How many curves (seeds) there are."""
        return len(self.mean_square)

    @property
    def rows(self) -> Rows:
        """What the laws may know of these curves."""
        first = self.mean_square[:, 0]
        return Rows(self.kinds, first, self.eps_factor, self.gain, self.normalises)


def curves(
    frame: pd.DataFrame, name: str, gain: Sequence[float], normalises: Sequence[str | None]
) -> Curves:
    """The curves called ``name`` in the frame, cut to the rows that every seed reached.

    gain, normalises: as in ``Rows``, of every row that a whole curve has.
    """
    groups = [group for _, group in frame[frame["curve"] == name].groupby("seed", sort=True)]
    length = min(len(group) for group in groups)

    def stack(column: str) -> Array:
        return np.stack([group[column].to_numpy(np.float64)[:length] for group in groups])

    return Curves(
        kinds=groups[0]["kind"].tolist()[:length],
        mean_square=stack("mean_square"),
        eps_factor=stack("eps_factor"),
        gain=gain[:length],
        normalises=normalises[:length],
    )
