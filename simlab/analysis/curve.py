"""A curve's tidy rows (curve.csv) as arrays (seeds × rows), and the laws' columns beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from simlab.theory.laws import LAWS, Array, Law, Rows


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
        """The number of curves (seeds)."""
        return len(self.mean_square)

    @property
    def rows(self) -> Rows:
        """The facts about these curves that laws use."""
        first = self.mean_square[:, 0]
        return Rows(self.kinds, first, self.eps_factor, self.gain, self.normalises)


def curves_of(
    frame: pd.DataFrame, name: str, gain: Sequence[float], normalises: Sequence[str | None]
) -> Curves:
    """The frame's curves called ``name``, cut to the rows that every seed reached.

    gain, normalises: as in ``Rows``, for each row of a whole curve.
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


def laws_in(frame: pd.DataFrame, *, expected: bool = False) -> list[Law]:
    """The registered laws with a column in the frame; ``expected`` leaves out the others."""
    laws = [law for law in LAWS.values() if law.column in frame]
    return [law for law in laws if law.expected] if expected else laws


def with_laws(frame: pd.DataFrame, by_curve: Mapping[str, Curves]) -> pd.DataFrame:
    """Add each law's prediction of the mean square as a column ``law_NAME``.

    by_curve: the frame's curves by name. Rows beyond the shortest seed's end stay empty.
    """
    frame = frame.assign(**{law.column: np.nan for law in LAWS.values()})
    for name, of_curve in by_curve.items():
        own = frame[frame["curve"] == name]
        step = own.groupby("seed").cumcount()
        reached = step < len(of_curve.kinds)
        seed = pd.Categorical(own["seed"]).codes  # ascending, as ``curves`` stacks them
        for law in LAWS.values():
            with np.errstate(over="ignore"):
                values = np.exp(law.predict(of_curve.rows))
            frame.loc[own.index[reached], law.column] = values[seed[reached], step[reached]]
    return frame
