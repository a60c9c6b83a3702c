"""How a statistic goes with width: the power law that a coordinate check reads off.

Of widths d and a statistic's values v, least squares fits ln v = p·ln d + c:

    p = Σ (ln d − m)·ln v / Σ (ln d − m)²,   m the mean of ln d over the widths

p = 0: the statistic has one size at every width; ½: it goes as √d, as a norm whose entries have one
size. Between two widths d < e it is ln(v_e/v_d)/ln(e/d). All are linear in ln v, so that the p of the
seeds' mean ln v is the mean of the seeds' own p's, and its interval is Student's of those: it holds
however one seed's draws at different widths depend on each other. It knows of chance alone, not of a
line that isn't straight: that is what ``bent`` is for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simlab.analysis.resampling import Estimate, jackknife
from simlab.theory.laws import Array

BENT = 0.1  # a curve whose first and last p are no further apart is straight to the eye


@dataclass(frozen=True)
class PowerLaw:
    """v ∝ width^p. ``exponent``: p over all widths, with its 95 % interval from MIN_SEEDS seeds on.

    first, last: p between the two smallest widths and between the two largest. end: ``last`` with its
    interval. bent: they differ by more than BENT, every seed's own in the same direction; of S seeds
    of a straight line chance gives that to 2/2^S at most.
    """

    exponent: Estimate
    first: float
    last: float
    bent: bool
    end: Estimate


def power_law(widths: Array, values: Array) -> PowerLaw | None:
    """Fit a power law of width. widths (W,), ascending; values (S, W), of S seeds.

    A width that no seed reached (NaN) is left out, then a seed that lacks one. None with fewer than two
    widths, without a whole seed, and of values that aren't positive: they have no logarithm.
    """
    values = np.where(np.isfinite(values), values, np.nan)
    known = ~np.isnan(values).all(0)
    widths, values = widths[known], values[:, known]
    values = values[~np.isnan(values).any(1)]
    if len(widths) < 2 or not len(values) or (values <= 0).any():
        return None
    x, y = np.log(widths), np.log(values)
    fit = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    first, last = np.zeros(len(x)), np.zeros(len(x))
    first[:2] = np.array([-1.0, 1.0]) / (x[1] - x[0])
    last[-2:] = np.array([-1.0, 1.0]) / (x[-1] - x[-2])
    bends, mean = y @ (last - first), y.mean(0)
    return PowerLaw(
        jackknife(y, lambda logs: logs @ fit), float(mean @ first), float(mean @ last),
        abs(bends.mean()) > BENT and bool((bends > 0).all() or (bends < 0).all()),
        jackknife(y, lambda logs: logs @ last),
    )  # fmt: skip
