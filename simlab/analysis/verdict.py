"""The verdict on a curve: its agreement with theory, its shape, the laws, in a few sentences.

Each sentence says what the numbers bear out and no more (``shape``: the word for the growth;
``agreement``: theory's prediction; ``hold``: a law). ``holds`` needs both that a test doesn't reject
the law and that it is off by less than MATTERS; off by more without a rejection is not decided
(``decision``), with the number of seeds that would tell. Fewer than MIN_SEEDS seeds, but more than one,
reject a law only where it is off by FAR or more (``few_apart``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from simlab.analysis.agreement import ALPHA, FAR, MATTERS, Agreement, agreement, enough_seeds
from simlab.analysis.curve import Curves
from simlab.analysis.fit import Growth, growth
from simlab.analysis.resampling import MIN_SEEDS, Estimate, few_apart, sign_flip
from simlab.analysis.shape import GrowthShape, shape_of
from simlab.theory.laws import LAWS, Array
from simlab.theory.mean_field import Prediction

# Unit roundoff: rounding moves a mean square by no more than about this, whatever the law. float32's
# is 6e-8; a norm takes some ten operations in it.
ROUNDING = {"float64": 1e-6, "float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True)
class Fit:
    """A law held against curves.

    log_error: max over rows of |ln(law / measured)| of the seeds' means; NaN where the law says nothing
    of these curves. p_value: of the sign-flip test, None with too few seeds. status: holds, fails or
    unknown. enough: of an unknown one, how many seeds would tell; 0 where that isn't known.
    """

    log_error: float
    p_value: float | None
    status: str
    enough: int = 0


@dataclass(frozen=True)
class Verdict:
    """The sentences and their numbers.

    main: on theory and, last, on the growth. further: on √2, the gradients and what isn't predicted.
    """

    main: tuple[str, ...]
    further: tuple[str, ...]
    growth: Growth
    laws: Mapping[str, Fit]
    seeds: int
    shape: GrowthShape
    agreement: Agreement | None = None

    @property
    def sentences(self) -> tuple[str, ...]:
        """All of them, in the order in which they are told."""
        return self.main + self.further

    @property
    def sentence(self) -> str:
        """All of them, joined."""
        return " ".join(self.sentences)


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
    error, worst = float(errors.max()), int(errors.argmax())
    # Row by row in units of the larger of the two: the test doesn't see units, and nothing overflows.
    with np.errstate(divide="ignore"):
        log_v = np.log(v)
    unit = np.maximum(log_v.max(0), top)
    unit[np.isinf(unit)] = 0.0  # both are zero throughout
    gap = np.exp(log_v - unit) - np.exp(law - unit)
    if curves.count < MIN_SEEDS:
        if (few_apart(log_v - law, ALPHA) & (errors >= FAR)).any():
            return Fit(error, None, "fails")
        return Fit(error, None, "unknown", MIN_SEEDS)
    p_value = sign_flip(gap, np.maximum(ROUNDING[dtype] * np.exp(mean_v - unit), 1e-300))
    if p_value < ALPHA:
        return Fit(error, p_value, "fails")
    if error <= math.log1p(MATTERS):
        return Fit(error, p_value, "holds")
    scatter = float(gap[:, worst].std(ddof=1) / np.abs(np.exp(mean_v - unit)[worst]))
    enough = enough_seeds(scatter)
    return Fit(error, p_value, "unknown", enough if enough > curves.count else 0)


def of_theory(found: Agreement | None) -> Fit:
    """Theory's agreement with the curves as a law's ``Fit``: it allows for theory's own error."""
    if found is None:
        return Fit(math.nan, None, "unknown")
    status = {"agrees": "holds", "chance": "unknown"}.get(found.status, "fails")
    return Fit(found.log_error, None, status)


def linear(p: Estimate) -> bool:
    """True if the exponent's interval has 1 in it, to two hundredths.

    By so little the first sublayers move the p of a linear curve.
    """
    low, high = (p.value, p.value) if p.low is None or p.high is None else (p.low, p.high)
    return low <= 1.02 and high >= 0.98


def judge(
    curves: Curves, dtype: str, name: str = "random", *, massive: bool = False,
    prediction: Prediction | None = None,
) -> Verdict:  # fmt: skip
    """Hold S curves against theory and the laws, name their shape, and say it.

    name: random, checkpoint (one curve, which needn't obey a law) or theory (one without chance).
    massive: a checkpoint has massive activations, so its shape is that of the median token. prediction:
    of a curve ``theory``, all that was predicted.
    """
    # Late: they word what is decided here.
    from simlab.analysis.sentences import further_sentences, main_sentences

    theory = agreement(curves)
    laws = {
        law.name: hold(curves, law.log_of(curves.rows), dtype) if law.exact else of_theory(theory)
        for law in LAWS.values()
    }
    v = curves.mean_square
    if massive and "mean_square_median" in curves.others:
        v = curves.others["mean_square_median"]
    found = shape_with_theory(curves, v)
    start = max(found.start - 1, 0)
    grown = growth(v[:, start:], curves.kinds[start:], found.word)
    verdict = Verdict((), (), grown, laws, curves.count, found, theory)
    return replace(
        verdict,
        main=tuple(main_sentences(curves, v, verdict, name, massive, prediction)),
        further=tuple(further_sentences(curves, verdict, name, prediction)),
    )


def shape_with_theory(curves: Curves, v: Array) -> GrowthShape:
    """The shape of the mean of v (S, R); theory's own shape, where it has one, is the first guess."""
    rows, noise, prior = len(curves.kinds), None, None
    if curves.count > 1:
        noise = v.std(0, ddof=1) / math.sqrt(curves.count)
    mean = v.mean(0)
    if curves.theory is not None and len(curves.theory.rows) >= rows:
        predicted, eps = (curves.theory.column(n, rows) for n in ("mean_square", "eps_factor"))
        band = curves.theory.column("band", rows)
        noise = np.hypot(band / math.sqrt(curves.count), curves.theory.accuracy * predicted)
        prior = shape_of(predicted, curves.kinds, eps, curves.normalises)
    return shape_of(mean, curves.kinds, curves.eps_factor.mean(0), curves.normalises, noise, prior)
