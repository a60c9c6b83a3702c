"""From curves to growth: per sublayer, the exponent p of v = a + b·k^p, the rate r of v = a·r^k.

The embedding's row is left out, as in the papers. A re-norm starts a new segment: k counts from
there, the segments share b and p (or r) and have an a each. Intervals come from leaving out whole
curves (seeds), because a curve's rows depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simlab.analysis.resampling import Estimate, jackknife
from simlab.theory.laws import Array

EXPONENTS = np.geomspace(0.02, 8.0, 800)


@dataclass(frozen=True)
class Growth:
    """How a curve grows. ``shape``: the word, as ``analysis.shape`` gives it."""

    per_sublayer: Estimate
    exponent: Estimate
    rate: Estimate
    shape: str


@dataclass(frozen=True)
class _Design:
    """Which rows a fit uses, how far each is into its segment, and which segment that is."""

    rows: np.ndarray
    position: Array
    segment: np.ndarray

    def demean(self, values: Array) -> Array:
        """Subtract each segment's mean along the last axis: fits an a per segment."""
        out = values.astype(np.float64, copy=True)
        for s in np.unique(self.segment):
            where = self.segment == s
            out[..., where] -= out[..., where].mean(-1, keepdims=True)
        return out


def design(kinds: Sequence[str]) -> _Design:
    """The rows of a curve after the embedding, cut into segments at the re-norms."""
    position, segment = [], []
    k = s = 0
    for kind in kinds[1:]:
        k, s = (0, s + 1) if kind == "renorm" else (k + 1, s)
        position.append(k)
        segment.append(s)
    rows = np.arange(1, len(kinds))
    return _Design(rows, np.array(position, np.float64), np.array(segment))


def per_sublayer(v: Array, kinds: Sequence[str]) -> Array:
    """Mean increment of v over the sublayers, the first (from the embedding) left out: (…, R) → (…)."""
    steps = [r for r in range(2, len(kinds)) if kinds[r] != "renorm"]
    if not steps:
        return np.full(v.shape[:-1], np.nan)
    return (v[..., steps] - v[..., np.array(steps) - 1]).mean(-1)


def exponent(v: Array, kinds: Sequence[str]) -> Array:
    """Least-squares p of v = a + b·k^p, between 0.02 and 8: (B, R) → (B,).

    For each p on a grid a and b are solved for (variable projection), then a parabola through the
    best three grid points refines ln p. NaN where v doesn't vary or fewer than four rows remain.
    """
    d = design(kinds)
    if len(d.rows) < 4:
        return np.full(len(v), np.nan)
    size = np.abs(v[:, d.rows]).max(-1, keepdims=True)
    y = d.demean(v[:, d.rows] / np.where(size > 0, size, 1))  # scaled: squares stay in range
    x = d.demean(d.position ** EXPONENTS[:, None])
    explained = (y @ x.T) ** 2 / (x**2).sum(-1)  # (B, grid)
    total = (y**2).sum(-1)
    best = explained.argmax(-1).clip(1, len(EXPONENTS) - 2)
    left, mid, right = (
        np.take_along_axis(explained, (best + i)[:, None], 1)[:, 0] for i in (-1, 0, 1)
    )
    bend = left - 2 * mid + right
    with np.errstate(divide="ignore", invalid="ignore"):
        offset = np.where(bend < 0, 0.5 * (left - right) / bend, 0.0).clip(-1, 1)
    step = math.log(EXPONENTS[1] / EXPONENTS[0])
    p = EXPONENTS[best] * np.exp(offset * step)
    return np.where(total > 1e-20, p, np.nan)


def rate(v: Array, kinds: Sequence[str]) -> Array:
    """Least-squares r of v = a·r^k, on ln v: (B, R) → (B,). NaN where v isn't positive."""
    d = design(kinds)
    if len(d.rows) < 3 or (v[:, d.rows] <= 0).any():
        return np.full(len(v), np.nan)
    x, y = d.demean(d.position), d.demean(np.log(v[:, d.rows]))
    return np.exp(y @ x / (x @ x))


def growth(v: Array, kinds: Sequence[str], shape: str) -> Growth:
    """How S curves with R rows grow: v (S, R), kinds (R); shape: the word for it."""
    return Growth(
        per_sublayer=jackknife(v, lambda w: per_sublayer(w, kinds)),
        exponent=jackknife(v, lambda w: exponent(w, kinds)),
        rate=jackknife(v, lambda w: rate(w, kinds)),
        shape=shape,
    )
