"""A measured mean curve against theory's: how far apart, where first, and which component.

At row r the seeds' mean of S curves departs from the prediction v by δ = mean/v − 1. Its size is the
factor between them, |ln(1 + δ)|, as of a law (``decision``). In joint standard errors it is

    z = (mean − v)/√(s²/S + (a·v)²),

s the predicted std between seeds (the measured one where that is larger), a the accuracy that theory
itself has at this width (docs/theory.md). Rows depend on each other; the limit on max |z| is
Bonferroni's, Φ⁻¹(1 − ALPHA/2R), which holds whatever the dependence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from simlab.analysis.curve import Curves
from simlab.analysis.resampling import MIN_SEEDS
from simlab.theory.laws import Array

ALPHA = 0.01  # the rate at which a right theory is rejected
MATTERS = 0.05  # relative: a smaller difference is no difference to anybody who looks at growth
# In logs: a factor that fewer than MIN_SEEDS seeds can tell from chance, if they lie close together. A
# smaller one needs the sign-flip test, which takes no law of the seeds' chance for granted.
FAR = math.log(2)
# The least relative departure of a component that can be blamed for one of the stream: a branch is an
# average over fewer numbers than the stream, and theory's own error in it is some 2 %.
BLAMED = 0.05


@dataclass(frozen=True)
class Agreement:
    """How a curve's R rows agree with theory's.

    largest: the δ that is largest by ``log_error``; errors: the largest |z|; limit: of |z|;
    row: of the largest δ. first: the first row with |z| beyond the limit, or None; component: what is
    off there. known: how many rows are predicted. reach: what a seed more or less may do: the largest
    relative standard error.
    """

    largest: float
    errors: float
    limit: float
    row: int
    first: int | None
    component: str | None
    known: int
    reach: float

    @property
    def log_error(self) -> float:
        """|ln(1 + δ)| of the largest δ."""
        return float(_log_size(np.array(self.largest)))

    @property
    def status(self) -> str:
        """``agrees``, ``near`` (off beyond chance by less than MATTERS), ``chance`` or ``fails``.

        ``chance``: off by more than MATTERS, which so few seeds don't tell from chance.
        """
        small = self.log_error <= math.log1p(MATTERS)
        if self.first is None:
            return "agrees" if small else "chance"
        return "near" if small else "fails"


def _log_size(apart: Array) -> Array:
    """|ln(1 + δ)| of departures δ; inf of −1, where all is zero."""
    with np.errstate(divide="ignore"):
        return np.abs(np.log1p(apart))


def enough_seeds(scatter: float) -> int:
    """The number of seeds whose mean is known to MATTERS by three standard errors, in two digits.

    scatter: the std between seeds over their mean.
    """
    count = (3 * scatter / MATTERS) ** 2
    if not math.isfinite(count):
        return 0
    power = 10 ** max(0, math.floor(math.log10(max(count, 1))) - 1)
    return max(MIN_SEEDS, math.ceil(count / power) * power)


def agreement(curves: Curves) -> Agreement | None:
    """Hold S curves against the prediction that they carry; None where there is none."""
    theory, rows = curves.theory, len(curves.kinds)
    if theory is None or len(theory.rows) < 2:
        return None
    predicted, band = (theory.column(name, rows) for name in ("mean_square", "band"))
    known = int(np.isfinite(predicted).sum())
    if known < 2:  # no sublayer to compare
        return None
    v, predicted, band = curves.mean_square[:, :known], predicted[:known], band[:known]
    mean = v.mean(0)
    spread = np.maximum(band, v.std(0, ddof=1)) if curves.count >= MIN_SEEDS else band
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = np.where(mean == predicted, 0.0, mean / predicted - 1)
        noise = spread / (math.sqrt(curves.count) * predicted)
        z = np.where(apart == 0, 0.0, apart / np.hypot(noise, theory.accuracy))
    limit = NormalDist().inv_cdf(1 - ALPHA / (2 * known))
    beyond = np.flatnonzero(np.abs(z) > limit)
    row, first = int(_log_size(apart).argmax()), int(beyond[0]) if len(beyond) else None
    return Agreement(
        float(apart[row]), float(np.abs(z).max()), limit, row, first,
        None if first is None else component(curves, first), known, float(np.nanmax(noise)),
    )  # fmt: skip


def component(curves: Curves, row: int) -> str:
    """The component that is off in a row: embedding, attention, mlp, norm, or branch or add.

    A sublayer, if its output before norms isn't what theory predicts; a norm, if the output is and what
    is added isn't; else the branch, by less than BLAMED, or the add, which can't be told apart.
    """
    kind = curves.kinds[row]
    if kind == "embedding":
        return kind
    if kind == "renorm" or (
        row and curves.normalises[row] == "stream" and _off(curves, row) is None
    ):
        return "norm"
    return _off(curves, row) or "branch or the residual add"


def _off(curves: Curves, row: int) -> str | None:
    """The sublayer or the norm of its branch, whichever departs from theory first."""
    theory = curves.theory
    assert theory is not None
    for column, name in (
        ("branch_raw_mean_square", curves.kinds[row]), ("branch_mean_square", "norm"),
    ):  # fmt: skip
        predicted = theory.column(column, row + 1)[row]
        values = curves.others.get(column)
        if values is None or not predicted > 0:
            continue
        own: Array = values[:, row] / predicted
        error = float(own.std(ddof=1)) / math.sqrt(len(own)) if len(own) > 1 else 0.0
        if abs(float(own.mean()) - 1) > max(BLAMED, 3 * error):
            return name
    return None
