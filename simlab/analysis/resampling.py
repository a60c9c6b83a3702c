"""Chance from whole curves: intervals (jackknife) and the max-T tests of many rows at once.

The rows of a curve depend on each other, so a curve is never taken apart: the jackknife leaves out
one at a time, and a test relabels them. A max-T test (Westfall & Young 1993, §2.3) compares the largest
statistic of all columns with its distribution over the relabelings: sign flips of one sample,
permutations of two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simlab.theory.laws import Array

MIN_SEEDS = 8  # the sign-flip test reaches p = 2/2^8 < 0.01, not with fewer
FLIPS = 4096  # sign flips at most: all 2^S, or this number at random
PERMUTATIONS = 1 << 16
TIE = 1e-9  # relative: statistics no further apart are equal but for rounding
CONSTANT = 1e-6  # in units of a column's spread: less is what cancels in float64, not an error
AT_ONCE = 1 << 16  # statistics (relabelings × columns) at a time: 0.5 MB fits the cache


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; no interval from fewer than MIN_SEEDS seeds."""

    value: float
    low: float | None = None
    high: float | None = None


def t_quantile(q: float, df: int) -> float:
    """The quantile q of Student's t with ``df`` degrees of freedom."""
    from scipy.special import stdtrit  # late: only intervals wait for it

    return float(stdtrit(df, q))


def jackknife(v: Array, statistic: Callable[[Array], Array]) -> Estimate:
    """A statistic of the mean curve with a 95 % interval from leaving out each of S curves, v (S, R).

    θ ± t·s, s² = (S − 1)/S·Σ(θ_i − mean θ_i)², θ_i the statistic of the mean curve without curve i, t
    the 97.5 % point of Student's t with S − 1 degrees of freedom (Tukey 1958; Efron & Tibshirani 1993,
    §11.5). Of a linear statistic it is Student's interval of the curves' own values. No interval where
    the statistic isn't defined, NaN, without one of the curves. statistic: (B, R) → (B,).
    """
    value = float(statistic(v.mean(0, keepdims=True))[0])
    seeds = len(v)
    if seeds < MIN_SEEDS:
        return Estimate(value)
    # Means as sums of what is left: taken from the whole sum, a curve that dwarfs the rest erases them.
    without = statistic((1 - np.eye(seeds)) / (seeds - 1) @ v)
    error = math.sqrt((seeds - 1) / seeds) * math.hypot(*(without - without.mean()))
    if math.isnan(value + error):
        return Estimate(value)
    half = t_quantile(0.975, seeds - 1) * error
    return Estimate(value, value - half, value + half)


def max_t(
    statistics: Callable[[Array], Array], relabelings: Array, columns: int
) -> tuple[Array, Array]:
    """Each column's statistic t (C,), and the maxima over columns of all P relabelings, descending.

    statistics: relabelings (P, S) → (P, C). The first relabeling leaves the curves as they are.
    """
    parts = np.array_split(relabelings, 1 + len(relabelings) * columns // AT_ONCE)
    first = statistics(parts[0])
    maxima = [first.max(1), *(statistics(part).max(1) for part in parts[1:])]
    return first[0], np.sort(np.concatenate(maxima))[::-1]


def p_value(t: Array, maxima: Array) -> float:
    """The share of relabelings whose maximum is at least the largest t."""
    return float((maxima >= t.max() * (1 - TIE)).mean())


def limit(maxima: Array, alpha: float) -> float:
    """The critical value, which chance exceeds with probability ≤ alpha: the ⌊alpha·P⌋ + 1st maximum.

    Raises ValueError if the P relabelings are too few.
    """
    above = math.floor(alpha * len(maxima) * (1 + TIE))
    if above < 1:
        raise ValueError(f"{len(maxima)} relabelings are too few for alpha = {alpha:g}")
    return float(maxima[above] * (1 + TIE))


def few_apart(logs: Array, alpha: float) -> NDArray[np.bool_]:
    """The rows (R,) where the ln of S curves over their expected value, (S, R), isn't 0 but for chance.

    |mean| > t·s/√S, Student's t at Bonferroni's limit, and s < ln 2: wider seeds may be of a heavy
    tail, whose mean ln is far below 0. For few seeds, of which the sign-flip test can't reach alpha.
    Rows with NaN or an infinity aren't apart, and aren't counted; one curve has no spread: none are.
    """
    seeds, known = len(logs), np.isfinite(logs).all(0)
    apart: NDArray[np.bool_] = np.zeros(logs.shape[1], bool)
    if seeds < 2 or not known.any():
        return apart
    logs = logs[:, known]
    spread, t = logs.std(0, ddof=1), t_quantile(1 - alpha / (2 * logs.shape[1]), seeds - 1)
    apart[known] = (spread < math.log(2)) & (np.abs(logs.mean(0)) > t * spread / math.sqrt(seeds))
    return apart


def sign_flip(differences: Array, floor: Array) -> float:
    """The p-value of ``flipped``'s test."""
    return p_value(*flipped(differences, floor))


def flipped(differences: Array, floor: Array) -> tuple[Array, Array]:
    """Test "S curves (S, R) have mean zero at every row": each row's t (R,), and the maxima (P,).

    t = (|mean| − floor)₊ / standard error; floor (R,): the part of a mean that rounding explains. A
    relabeling flips whole curves' signs: all 2^S ways, or FLIPS random ones. The test holds if a curve
    and its negative are equally likely, as the cross terms ⟨x, branch⟩ are: a sublayer's last matrix
    with its sign flipped has the same law.
    """
    seeds = len(differences)
    if 2**seeds <= FLIPS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=seeds)))
    else:
        signs = np.random.default_rng(0).choice((1.0, -1.0), size=(FLIPS, seeds))
        signs[0] = 1.0
    squares = (differences**2).mean(0)

    def statistics(some: Array) -> Array:
        means = some @ differences / seeds
        errors = np.sqrt(np.maximum(squares - means**2, 0) / (seeds - 1))
        return np.maximum(np.abs(means) - floor, 0) / np.maximum(errors, 1e-3 * floor)

    return max_t(statistics, signs, differences.shape[1])


def permuted(old: Array, new: Array, floor: Array, most: int = PERMUTATIONS) -> tuple[Array, Array]:
    """Test "two samples (m, C), (n, C) have one law": each column's t (C,), and the maxima (P,).

    t = (|Δ mean| − floor)₊ / standard error, the variance pooled; floor: (C,). A relabeling deals the
    curves into two groups: all ways, or ``most`` random ones.
    """
    both, first = np.concatenate([new, old]), len(new)
    count = len(both)
    scale = both.std(0)
    scale[scale == 0] = 1.0
    z, f = (both - both.mean(0)) / scale, floor / scale
    squares = (z**2).sum(0)

    def statistics(deals: Array) -> Array:
        mean = deals @ z / first  # the rest's is −first/(count − first) times as large
        within = squares - mean**2 * (first * count / (count - first))
        error = np.sqrt(np.maximum(within, 0) / (count - 2) * (1 / first + 1 / (count - first)))
        apart = np.abs(mean) * (count / (count - first))
        return np.maximum(apart - f, 0) / np.maximum(error, CONSTANT)

    return max_t(statistics, _deals(first, count, most), both.shape[1])


def deals_for(alpha: float) -> int:
    """The number of random deals that put 20 maxima beyond the limit at this alpha."""
    return min(PERMUTATIONS, math.ceil(20 / alpha))


def enough(first: int, second: int, alpha: float) -> bool:
    """True if two groups of these sizes can be dealt in enough ways for a false-alarm rate of alpha.

    Of two groups of one size every deal has a mirror image with the same statistic.
    """
    mirrored = 2 if first == second else 1
    return min(math.comb(first + second, first), PERMUTATIONS) * alpha >= mirrored


def _deals(first: int, count: int, most: int) -> Array:
    """Ways to deal ``first`` of ``count`` curves to one group: rows of 0 and 1, the actual first."""
    if math.comb(count, first) <= most:
        chosen = np.array(list(itertools.combinations(range(count), first)))
    else:
        generator = np.random.default_rng(0)
        chosen = generator.random((most, count)).argsort(1)[:, :first]
        chosen[0] = np.arange(first)
    deals = np.zeros((len(chosen), count))
    np.put_along_axis(deals, chosen, 1.0, axis=1)
    return deals
