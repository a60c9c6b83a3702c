"""Which component a difference is in, of the first row of a curve that differs.

A sublayer's step is x → norm before it → sublayer → norm after it → residual add. The rows before are
right, so a row's quantities tell, in this order: attention's weights and the raw mean square (the
sublayer, or a norm before or inside it), the branch's mean square (the norm after it), and the stream's
(the add). Gradients come last, whatever their size: a forward difference moves them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from simlab.analysis.verdict import ROUNDING
from simlab.config import ModelConfig
from simlab.schemes.gemma3n import ALTUP_STREAMS
from simlab.schemes.placement import at, placement_of
from simlab.schemes.streams import Coefficients

TEN_ROUNDINGS = 10  # a norm takes about as many operations in the dtype
_ATTENTION_QUANTITIES = {"attention_entropy", "attention_max_logit", "attention_first"}
_SIZES = {  # of the stream
    "norm", "mean_square", "variance", "mean_square_median", "mean_square_p05", "mean_square_p95",
    "mean_square_rest",
}  # fmt: skip
# Of |Δ ln(m/eps)|, the least that is taken for another eps. A sublayer that treats tokens otherwise
# moves it too, as m is a mean over tokens; so both kinds of sublayers must agree to EPS_AGREES of it.
EPS_SHIFT = 0.2
EPS_AGREES = 0.5
_RAW = "branch_raw_mean_square"
_SAME = 1e-3  # of |Δ ln m|: far beyond rounding, and below what seeds differ by


@dataclass(frozen=True)
class Norms:
    """The norms of a sublayer's step.

    before: True if one acts on the sublayer's input, or on queries and keys. last: what the last one
    acts on, the ``branch``, the ``stream`` or None. gain: the sublayer norms' initial gain. sums: if
    the step is x + branch, of the stream as it comes.
    """

    before: bool
    last: str | None
    gain: float
    sums: bool


NormsOf = Callable[[int, str], Norms]  # by block (from 0) and kind


def norms_of(model: ModelConfig) -> NormsOf:
    """The norms of every sublayer of a model."""

    def norms(block: int, kind: str) -> Norms:
        scheme = at(model, block, kind)
        inside = kind == "attention" and model.qk_norm != "none"
        sets_rms = not model.norm.elementwise
        before = ("norm_in" in scheme.norms and sets_rms) or inside
        last = scheme.normalises if sets_rms and scheme.normalises != "skip" else None
        placement = placement_of(model)
        parts = {
            "laurel": _nothing,
            "mix": partial(_mixed, bool(model.norm.mix_streams)),
            "embed_sides": lambda state: state[1:],
            "predict": lambda state: state,
            "correct": lambda x: (1.0,) * ALTUP_STREAMS,  # not 0: a step isn't x + branch
        }
        state = placement.start(
            1.0, _other, model, **{name: parts[name] for name in placement.start_parts}
        )
        for each in ("attention", "mlp")[: 1 + (kind == "mlp")]:  # of branches that are 0
            one, stream = at(model, block, each), placement.watch(state)
            maps: dict[str, Any] = dict.fromkeys(one.norms, _other)
            maps |= {name: parts[name] for name in one.parts}
            state = one.step(state, _nothing, lambda x, branch: x + branch, **maps)
        sums = placement.watch(state) == stream
        return Norms(before, last, model.norm.gain, last != "stream" and sums)

    return norms


def _other(x: float) -> float:
    """A norm, which doesn't give what it gets, except of 0."""
    return 2.0 * x


def _nothing(x: float) -> float:
    return 0.0 * x


def _mixed(mixes: bool, state: tuple[float, ...]) -> Coefficients[float]:
    """Coefficients of a token. mixes: whose shares sum to 1 but for 10⁻³, Sinkhorn's, so here to n."""
    one = (1.0,) * len(state)
    return Coefficients(one, one, (one,) * len(state) if mixes else None)


def first_row_off(rows: Iterable[int], names: Sequence[str]) -> int:
    """The row where a difference begins: the first, or the last if only gradients differ.

    rows, names: the row and the quantity of every number that differs. Gradients flow back from the
    loss, so theirs begin at the last row.
    """
    where = [int(row) for row in rows]
    ahead = [row for row, name in zip(where, names, strict=True) if not is_gradient(name)]
    return min(ahead) if ahead else max(where)


def is_gradient(quantity: str) -> bool:
    """True of a quantity of the backward pass."""
    return quantity.startswith("gradient")


def told_of(names: Sequence[str]) -> list[str]:
    """The quantities that a finding is about, of those that differ: no gradient, if others do."""
    return [name for name in names if not is_gradient(name)] or list(names)


def blame(
    expected: pd.DataFrame,
    got: pd.DataFrame,
    row: int,
    beyond: Sequence[str],
    dtype: str,
    norms: NormsOf | None = None,
) -> str:
    """The component to blame for the first row that differs.

    expected, got: the expected and the new curve, a row per step. row: the first that differs, by
    ``first_row_off``; beyond: its quantities that do. norms: of the model, where it is known.

    - Only gradients differ: the loss or the head in the last row; else the next step's backward pass.
    - A re-norm's row: the norm. The embedding's row: the embedding.
    - A gain differs, the new branch isn't g²·m/(m + eps), or another eps acts: the norm.
    - The new stream isn't the one before plus the branch: the residual add.
    - Attention's weights or the raw branch differ: the sublayer, or a norm before or inside it.
    - What is added differs, and the raw branch is the same number: the norm after the sublayer. If that
      isn't sure (tokens may differ otherwise at one mean): the sublayer or its norm. Without such a
      norm, the residual add.
    - Only the stream's size differs: the residual add; where a norm acts on the stream, it or that.
    - Only directions differ: the sublayer, or what could turn its branch or the sum.
    """
    step, off = got.iloc[row], set(told_of(beyond))
    kind = str(step["kind"])
    if all(is_gradient(name) for name in beyond):
        return _backward(got, row)
    if kind in ("renorm", "embedding"):
        return "norm" if kind == "renorm" else kind
    of_step = norms(int(step["block"]), kind) if norms else None
    last = of_step.last if of_step else ("branch" if _normed(expected) else "unknown")
    sublayer = kind if of_step and not of_step.before else f"{kind} or its norm"
    if off & {"gain_mean_square", "gain_max_abs"}:
        return "norm"
    consistent = _is_norm(step, dtype) if last == "branch" else None
    if consistent is False or (last == "branch" and _other_eps(expected, got, row, of_step)):
        return "norm"
    if of_step and of_step.sums and not adds_up(got, row, dtype):
        return "residual add"
    if off & {*_ATTENTION_QUANTITIES, _RAW}:
        return sublayer
    if off & {"branch_mean_square", "delta_branch", "eps_factor"}:
        raw, added = (_moved(expected, got, row, name) for name in (_RAW, "branch_mean_square"))
        if (
            last in (None, "stream") and abs(raw - added) < _SAME
        ):  # no norm of the branch: one number
            of_sum = last == "stream" and not off & {"branch_mean_square", "delta_branch"}
            return "residual add or its norm" if of_sum else sublayer
        if last in (None, "stream"):
            return "residual add"
        return "norm" if abs(raw) < _SAME else f"{kind} or its norm"
    if "cosine" in off:
        return f"{kind} or its norm" if last == "branch" else sublayer
    if off & {*_SIZES, "delta_cross"}:
        return "residual add or its norm" if last == "stream" else "residual add"
    if last == "branch":  # LayerNorm for RMSNorm, say
        return f"{kind} or its norm"
    return f"{kind} or residual add" if last == "stream" else sublayer


def _backward(got: pd.DataFrame, row: int) -> str:
    """The part whose backward pass gives this row's gradient: what comes after the row."""
    if row == len(got) - 1:
        return "loss or head"
    kind = str(got["kind"].iloc[row + 1])
    return "norm, backward" if kind == "renorm" else f"{kind} or its norm, backward"


def _normed(expected: pd.DataFrame) -> bool:
    """True if recorded branches were normed: their size is nearly constant, unlike the raw ones'."""
    if "branch_mean_square" not in expected:
        return False
    b = expected["branch_mean_square"].dropna()
    # Not everywhere: eps holds back the first ones. Not exactly: a trained norm's gains differ.
    raw = expected.get(_RAW, pd.Series(math.nan, expected.index))[b.index]
    alike, as_raw = abs(b - b.median()) < 0.1 * b.median(), abs(b - raw) < 0.01 * b
    return bool(len(b) > 1 and alike.mean() > 0.7 and as_raw.mean() < 0.3)


def _is_norm(got: pd.Series, dtype: str) -> bool | None:
    """True if a branch is the output of a norm with one gain for all entries; None if unknown."""
    names = ("branch_mean_square", "eps_factor", "gain_mean_square", "gain_max_abs")
    b, c, square, largest = (float(got.get(name, math.nan)) for name in names)
    if not abs(largest**2 - square) <= 1e-6 * square or not c > 0:
        return None
    return abs(b / (square * c) - 1) < TEN_ROUNDINGS * ROUNDING[dtype]


def adds_up(got: pd.DataFrame, row: int, dtype: str) -> bool:
    """True if a row's mean square is the one before plus ‖b‖²/d + 2⟨x, b⟩/d, or if that isn't measured.

    So it is to rounding where the step is x + b, however the branch b came about.
    """
    names = ("mean_square", "branch_mean_square", "delta_branch", "delta_cross")
    v, b, own, cross = (float(got.iloc[row].get(name, math.nan)) for name in names)
    before = float(got.get("mean_square", pd.Series(math.nan, got.index)).iloc[row - 1])
    missing = v - before - b * (1 + cross / own) if own > 0 else math.nan
    return not abs(missing) > TEN_ROUNDINGS * ROUNDING[dtype] * (v + before + b)


def _moved(expected: pd.DataFrame, got: pd.DataFrame, row: int, name: str) -> float:
    """Δ ln v of a row's number; NaN where it isn't measured."""
    old, new = (float(f[name].iloc[row]) if name in f else 0.0 for f in (expected, got))
    return math.log(new / old) if old > 0 and new > 0 else math.nan


def _other_eps(expected: pd.DataFrame, got: pd.DataFrame, row: int, norms: Norms | None) -> bool:
    """True if branches' norms have another eps: c/(1 − c) = m/eps moves and m doesn't.

    c = m/(m + eps) is a normed branch's mean square over g². By the first attention and the first MLP
    from ``row`` on, which must agree.
    """
    if _RAW not in expected or _RAW not in got:
        return False
    shifts = []
    for kind in ("attention", "mlp"):
        steps = [i for i in range(row, len(got)) if got["kind"].iloc[i] == kind][:1]
        pair = [frame.iloc[i] for i in steps for frame in (expected, got)]
        sizes = [(_factor(step, norms), float(step[_RAW])) for step in pair]
        if not sizes or not all(0 < c < 1 - 1e-4 and m > 0 for c, m in sizes):
            return False
        (old_c, old_m), (c, m) = sizes
        moved = math.log(m / old_m)
        shifts.append((math.log(c / (1 - c)) - math.log(old_c / (1 - old_c)) - moved, moved))
    (first, moved), (second, _) = shifts
    alike = abs(first - second) < EPS_AGREES * min(abs(first), abs(second))
    return alike and abs(first) > max(EPS_SHIFT, 2 * abs(moved))


def _factor(step: pd.Series, norms: Norms | None) -> float:
    """m/(m + eps) of a row's branch, NaN if neither it nor the norm's gain is known."""
    c = float(step.get("eps_factor", math.nan))
    if math.isnan(c) and norms:
        c = float(step.get("branch_mean_square", math.nan)) / norms.gain**2
    return c
