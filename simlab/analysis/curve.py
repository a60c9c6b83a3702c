"""A curve's tidy rows (curve.csv) as arrays (seeds × rows), and the laws' columns beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from simlab.theory.laws import LAWS, Array, Law, Rows
from simlab.theory.mean_field import Prediction

INITS = ("random", "theory")  # the kinds of curves of random inits: measured, predicted
GIVEN = ("checkpoint", "model")  # of a given model: of a checkpoint's files, of a module in memory
PREDICTED = ("law_mean_field", "band_mean_field", "law_gradient_rms")  # theory's columns
COLUMNS = (  # of curve.csv, that verdicts use besides mean_square and eps_factor
    "mean_square_median", "branch_mean_square", "branch_raw_mean_square", "cosine", "gradient_rms",
)  # fmt: skip


@dataclass(frozen=True)
class Curves:
    """S curves of one kind (a name in the column ``curve``) over the R rows that all of them have.

    kinds, gain, normalises: (R,), as in ``Rows``. mean_square, eps_factor: (S, R). others: (S, R) of
    each of COLUMNS that was measured. theory: the predicted curve of random inits. whole: how many rows
    a curve has that reaches the model's end. blocks: (R,), each row's block from 0, None of the
    embedding; empty where it isn't known.
    """

    kinds: list[str]
    mean_square: Array
    eps_factor: Array
    gain: Sequence[float]
    normalises: Sequence[str | None]
    others: Mapping[str, Array] = field(default_factory=dict)
    theory: Prediction | None = None
    whole: int = 0
    blocks: Sequence[int | None] = ()

    @property
    def count(self) -> int:
        """The number of curves (seeds)."""
        return len(self.mean_square)

    @property
    def adds_nothing(self) -> bool:
        """True if attention and MLPs add exactly 0: residual outputs, or their scale, start at 0."""
        added = self.others.get("branch_mean_square")
        steps = [i for i, kind in enumerate(self.kinds) if kind in ("attention", "mlp")]
        return added is not None and bool(steps) and not added[:, steps].any()

    @property
    def rows(self) -> Rows:
        """The facts about these curves that laws use."""
        first, predicted = self.mean_square[:, 0], None
        if self.theory is not None:
            with np.errstate(divide="ignore"):
                predicted = np.log(self.theory.column("mean_square", len(self.kinds)))
        return Rows(self.kinds, first, self.eps_factor, self.gain, self.normalises, predicted)


def curves_of(
    frame: pd.DataFrame,
    name: str,
    gain: Sequence[float],
    normalises: Sequence[str | None],
    theory: Prediction | None = None,
) -> Curves:
    """The frame's curves called ``name``, cut to the rows that every seed reached.

    gain, normalises: as in ``Rows``, for each row of a whole curve. theory: of random inits.
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
        others={column: stack(column) for column in COLUMNS if column in frame},
        theory=theory,
        whole=len(gain),
        blocks=[None if pd.isna(b) else int(b) for b in groups[0]["block"][:length]],
    )


def basis(frame: pd.DataFrame) -> str:
    """The kind of curve that a frame's laws are about: the first of INITS, else the given model's."""
    there = set(frame["curve"].unique())
    return next((name for name in INITS if name in there), given_in(frame) or GIVEN[0])


def given_in(frame: pd.DataFrame) -> str:
    """The kind of curve of the given model in a frame, which is also the word for it; empty without."""
    there = set(frame["curve"].unique()) if "curve" in frame else set()
    return next((name for name in GIVEN if name in there), "")


def laws_in(frame: pd.DataFrame, *, expected: bool = False) -> list[Law]:
    """The registered laws that say something in the frame; ``expected`` leaves out the others."""
    laws = [law for law in LAWS.values() if law.column in frame and frame[law.column].notna().any()]
    return [law for law in laws if law.expected] if expected else laws


def with_laws(frame: pd.DataFrame, by_curve: Mapping[str, Curves]) -> pd.DataFrame:
    """Add each law's prediction of the mean square as a column ``law_NAME``, and theory's others.

    ``band_mean_field``: the predicted std of the mean square between seeds. ``law_gradient_rms``: where
    gradients were measured, their predicted rms. by_curve: the frame's curves by name. Rows beyond the
    shortest seed's end stay empty, and so do those where a law says nothing.
    """
    others = {"band_mean_field": "band", "law_gradient_rms": "gradient_rms"}
    if "gradient_rms" not in frame:
        del others["law_gradient_rms"]
    columns = [*(law.column for law in LAWS.values()), *others]
    frame = frame.assign(**dict.fromkeys(columns, np.nan))
    for name, of_curve in by_curve.items():
        own = frame[frame["curve"] == name]
        step = own.groupby("seed").cumcount()
        reached = step < len(of_curve.kinds)
        seed = pd.Categorical(own["seed"]).codes  # ascending, as ``curves`` stacks them
        for law in LAWS.values():
            with np.errstate(over="ignore"):
                values = np.exp(law.log_of(of_curve.rows))
            frame.loc[own.index[reached], law.column] = values[seed[reached], step[reached]]
        if of_curve.theory is not None:
            for column, name_there in others.items():
                predicted = of_curve.theory.column(name_there, len(of_curve.kinds))
                frame.loc[own.index[reached], column] = predicted[step[reached]]
    return frame
