"""The verdict on a curve: its growth, the laws' errors and the tests' p-values, in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from simlab.analysis.curve import Curves
from simlab.analysis.fit import Growth, growth
from simlab.analysis.numbers import interval, off_by, plus_minus
from simlab.analysis.resampling import MIN_SEEDS, Estimate, sign_flip
from simlab.theory.laws import LAWS, Array

ALPHA = 0.01  # the rate at which a true law is rejected
# Unit roundoff: rounding moves a mean square by no more than about this, whatever the law. float32's
# is 6e-8; a norm takes some ten operations in it.
ROUNDING = {"float64": 1e-6, "float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True)
class Fit:
    """A law held against curves.

    log_error: max over rows of |ln(law / measured)| of the seeds' means. p_value: of the sign-flip
    test, None with too few seeds. status: holds, fails or unknown.
    """

    log_error: float
    p_value: float | None
    status: str


@dataclass(frozen=True)
class Verdict:
    """The sentence and its numbers."""

    sentence: str
    growth: Growth
    laws: Mapping[str, Fit]
    seeds: int


def hold(curves: Curves, law_log: Array, dtype: str) -> Fit:
    """A law's ln v (S, R) against the curves' mean squares, from the first sublayer on."""
    says = ~np.isnan(law_log[:, 1:]).any(0)
    v, law = curves.mean_square[:, 1:][:, says], law_log[:, 1:][:, says]
    if v.shape[1] == 0:
        return Fit(math.nan, None, "unknown")
    # The mean over seeds of the law, in logs: law values may be beyond float64.
    top = law.max(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_law = np.where(np.isinf(top), top, top + np.log(np.exp(law - top).mean(0)))
        mean_v = np.log(v.mean(0))
        errors = np.abs(np.where(mean_law == mean_v, 0.0, mean_law - mean_v))
    error = float(errors.max())
    if curves.count < MIN_SEEDS:
        return Fit(error, None, "unknown")
    # Row by row in units of the larger of the two: the test doesn't see units, and nothing overflows.
    with np.errstate(divide="ignore"):
        log_v = np.log(v)
    unit = np.maximum(log_v.max(0), top)
    unit[np.isinf(unit)] = 0.0  # both are zero throughout
    gap = np.exp(log_v - unit) - np.exp(law - unit)
    p_value = sign_flip(gap, np.maximum(ROUNDING[dtype] * np.exp(mean_v - unit), 1e-300))
    return Fit(error, p_value, "fails" if p_value < ALPHA else "holds")


def linear(p: Estimate) -> bool:
    """True if the exponent's interval has 1 in it, to two hundredths.

    By so little the first sublayers move the p of a linear curve.
    """
    low, high = (p.value, p.value) if p.low is None or p.high is None else (p.low, p.high)
    return low <= 1.02 and high >= 0.98


def _how(g: Growth, level: float, one_piece: bool) -> str:
    """The growth clause: how fast and in which shape. level: the last mean square."""
    if g.shape == "constant":
        return f"mean square stays at {level:.3g}" + (
            "" if one_piece else " since the last re-norm"
        )
    if g.shape == "unknown":
        return "the curve can't be fitted"
    if g.shape == "exponential":
        verb = "grows" if g.rate.value > 1 else "shrinks"
        return f"mean square {verb} by a factor {plus_minus(g.rate)} per sublayer, exponentially"
    p = g.exponent
    if linear(p):
        word = "linearly"
    else:
        word = "faster than linearly" if p.value > 1 else "more slowly than linearly"
    verb = "grows" if g.per_sublayer.value > 0 else "shrinks"
    size = g.per_sublayer
    if size.value < 0:
        flipped = (size.high, size.low)
        size = Estimate(-size.value, *(None if x is None else -x for x in flipped))
    return f"mean square {verb} by {plus_minus(size)} per sublayer, {word} (p = {interval(p)})"


def _claim(name: str, fit: Fit) -> str:
    law, size = LAWS[name].phrase, off_by(fit.log_error)
    if fit.status == "unknown":
        return f"{law} is off by {size}"
    if fit.status == "holds":
        return f"{law} holds to {size}"
    if fit.log_error < math.log(1.1):
        return f"{law} is within {size}, but fails beyond chance"
    return f"{law} is off by {size}"


def judge(curves: Curves, dtype: str, *, drawn: bool = True) -> Verdict:
    """Fit S curves and test every law on them. drawn: random inits, not a checkpoint's one curve."""
    laws = {name: hold(curves, law.log_of(curves.rows), dtype) for name, law in LAWS.items()}
    g = growth(curves.mean_square, curves.kinds)
    level = float(curves.mean_square[:, -1].mean())
    known = {name: fit for name, fit in laws.items() if not math.isnan(fit.log_error)}
    claims = ", ".join(_claim(name, fit) for name, fit in known.items())
    sentence = _how(g, level, "renorm" not in curves.kinds) + (f": {claims}" if claims else "")
    if not drawn:
        sentence = f"{sentence} (one curve: no intervals)"
    elif curves.count < MIN_SEEDS:
        seeds = "1 seed is" if curves.count == 1 else f"{curves.count} seeds are"
        sentence = f"{seeds} too few to tell ({MIN_SEEDS} needed); so far, {sentence}"
    return Verdict(sentence[0].upper() + sentence[1:] + ".", g, laws, curves.count)
