"""Two samples of curves, compared at all rows at once by dealing them anew (max-T permutation test)."""

from __future__ import annotations

import itertools
import math

import numpy as np

from simlab.theory.laws import Array

PERMUTATIONS = 1 << 16
CONSTANT = 1e-6  # in units of a column's spread: less is what cancels in float64, not an error
AT_ONCE = 1 << 21  # numbers that are held of a block of permutations


def deals_for(alpha: float) -> int:
    """How many random deals are enough to tell what one in 1/alpha is: the limit has 20 beyond it."""
    return min(PERMUTATIONS, math.ceil(20 / alpha))


def enough(first: int, second: int, alpha: float) -> bool:
    """Whether so many curves can be dealt in enough ways for a false-alarm rate of alpha.

    Of two groups of one size every deal has a mirror image with the same statistic.
    """
    mirrored = 2 if first == second else 1
    return min(math.comb(first + second, first), PERMUTATIONS) * alpha >= mirrored


def permuted(old: Array, new: Array, floor: Array, most: int = PERMUTATIONS) -> tuple[Array, Array]:
    """t of each column of two samples (n, C), (m, C), and its maxima over P ways of dealing them anew.

    t = (|Δ mean| − floor)₊ / standard error, the variance pooled. floor: (C,). The maxima (P,) descend;
    all ways are dealt, or ``most`` random ones.
    """
    both = np.concatenate([new, old])
    scale = both.std(0)
    scale[scale == 0] = 1.0
    z, f = (both - both.mean(0)) / scale, floor / scale
    deals = _deals(len(new), len(both), most)
    squares, found = z**2, []
    for part in np.array_split(deals, 1 + len(deals) * z.shape[1] // AT_ONCE):
        found.append(_t(part, z, squares, f, len(new)).max(1))
    t = _t(deals[:1], z, squares, f, len(new))[0]
    return t, np.sort(np.concatenate(found))[::-1]


def limit(maxima: Array, alpha: float) -> float:
    """What the largest t may reach: the ⌊alpha·P⌋ + 1st largest maximum. Chance exceeds it ≤ alpha."""
    above = math.floor(alpha * len(maxima) * (1 + 1e-9))
    if above < 1:
        raise ValueError(f"{len(maxima)} ways of dealing are too few for alpha = {alpha:g}")
    return float(maxima[above] * (1 + 1e-9))


def _t(deals: Array, z: Array, squares: Array, floor: Array, first: int) -> Array:
    """|t| with pooled variance of every deal (P, n + m) and column (C): (P, C)."""
    count = len(z)
    mean = deals @ z / first
    rest = -mean * first / (count - first)  # z has mean zero
    within = squares.sum(0) - first * mean**2 - (count - first) * rest**2
    error = np.sqrt(np.maximum(within, 0) / (count - 2) * (1 / first + 1 / (count - first)))
    beyond = np.maximum(np.abs(mean - rest) - floor, 0)
    return beyond / np.maximum(error, CONSTANT)


def _deals(first: int, count: int, most: int) -> Array:
    """Ways to deal ``first`` of ``count`` curves to one group, as rows of 0 and 1; as it is first."""
    if math.comb(count, first) <= most:
        chosen = np.array(list(itertools.combinations(range(count), first)))
    else:
        generator = np.random.default_rng(0)
        chosen = generator.random((most, count)).argsort(1)[:, :first]
        chosen[0] = np.arange(first)
    deals = np.zeros((len(chosen), count))
    np.put_along_axis(deals, chosen, 1.0, axis=1)
    return deals
