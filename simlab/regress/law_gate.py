"""The gate ``law``: random inits obey every expected law, whatever was recorded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from simlab.analysis import LAWS, Law
from simlab.analysis.curve import laws_in
from simlab.analysis.numbers import interval, off_by, short
from simlab.analysis.resampling import Estimate, flipped, limit, t_quantile
from simlab.analysis.verdict import ROUNDING, Verdict, linear
from simlab.regress.blame import TEN_ROUNDINGS, adds_up
from simlab.regress.gates import GATE_ALPHA, Outcome, failed, finding_at, mean

LAW_GATE_SEEDS = 11  # the sign-flip test reaches p = 2/2^11 < GATE_ALPHA, not with fewer


def law(frame: pd.DataFrame, verdict: Verdict, gain: float, dtype: str) -> Outcome:
    """Every expected law holds, and the exponent p is 1 within its interval, of S ≥ 11 random inits.

    By ``analysis.verdict``'s sign-flip test and ``analysis.fit``'s interval, but at GATE_ALPHA instead
    of 1 % and 5 %, since a gate is asked often; p may be 1 to two hundredths, as there.

    Args:
        frame: the curves' rows, with the laws' columns.
        verdict: of these curves.
        gain: of the sublayer norms.
        dtype: of the run.
    """
    if verdict.seeds < LAW_GATE_SEEDS:
        raise ValueError(f"{verdict.seeds} seeds: {LAW_GATE_SEEDS} needed")
    frame = frame.reset_index(drop=True)
    expected = [law for law in laws_in(frame, expected=True) if law.exact]
    if not expected:
        why = "no law says anything of these curves; gate theory can hold them"
        return Outcome("law", False, "no law", why)
    p = stretched(verdict.growth.exponent, verdict.seeds)
    shown = interval(p).replace(" ", "")
    figure = f"p {shown}"
    if passes(verdict):
        return Outcome("law", True, figure)
    for law in expected:
        outcome = _broken(frame, law, figure, gain, dtype)
        if outcome:
            return outcome
    errors = " and ".join(
        f"{law.phrase} is off by {off_by(verdict.laws[law.name].log_error)} at most"
        for law in expected
    )
    why = f"growth is not linear, p = {shown}; {errors}, within chance"
    return Outcome("law", False, figure, why)


def _broken(frame: pd.DataFrame, law: Law, figure: str, gain: float, dtype: str) -> Outcome | None:
    """The failed gate that names the first row where curves leave a law beyond chance, or None."""
    curves = list(frame.groupby("seed", sort=True))
    length = min(len(rows) for _, rows in curves)  # one that overflows ends early
    v, expected = (
        np.stack([rows[name].to_numpy(np.float64)[:length] for _, rows in curves])
        for name in ("mean_square", law.column)
    )
    t, maxima = flipped((v - expected)[:, 1:], ROUNDING[dtype] * v.mean(0)[1:])
    most = limit(maxima, GATE_ALPHA)
    beyond = np.flatnonzero(t > most)
    if not len(beyond):
        return None
    row = int(beyond[0]) + 1
    got = mean(frame)
    to = _law_blame(got, row, gain, dtype)
    says = got.assign(mean_square=got[law.column])
    finding = finding_at(says, got, row, "mean_square", t[row - 1], most, to)
    finding = replace(finding, against=law.column)
    size = f"{short(finding.size, 2)} standard errors (limit {short(most, 2)})"
    return failed("law", figure, finding, size)


def passes(verdict: Verdict) -> bool:
    """True if every expected law has p ≥ GATE_ALPHA and the growth is linear."""
    p_values = [
        verdict.laws[law.name].p_value for law in LAWS.values() if law.expected and law.exact
    ]
    growing = linear(stretched(verdict.growth.exponent, verdict.seeds))
    return growing and all(p is not None and p >= GATE_ALPHA for p in p_values)


def stretched(p: Estimate, seeds: int) -> Estimate:
    """A 95 % interval widened to confidence 1 − GATE_ALPHA, by the ratio of Student's t."""
    if p.low is None or p.high is None:
        return p
    ratio = t_quantile(1 - GATE_ALPHA / 2, seeds - 1) / t_quantile(0.975, seeds - 1)
    return Estimate(
        p.value, p.value - ratio * (p.value - p.low), p.value + ratio * (p.high - p.value)
    )


def _law_blame(got: pd.DataFrame, row: int, gain: float, dtype: str) -> str:
    """Name the part of Δv = ‖b‖²/d + 2⟨x, b⟩/d that departs from the law, of the mean curve's row.

    The norm, if ‖b‖²/d isn't g²c; the residual add, if Δv isn't the sum of the two; else the sublayer,
    whose branch isn't at right angles to the stream.
    """
    step = got.iloc[row]
    b, c = float(step["branch_mean_square"]), float(step["eps_factor"])
    if step["kind"] == "renorm" or abs(b / (gain**2 * c) - 1) > TEN_ROUNDINGS * ROUNDING[dtype]:
        return "norm"
    return str(step["kind"]) if adds_up(got, row, dtype) else "residual add"
