"""The growth clause of a verdict: the word for the shape, its numbers, and how well it fits."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from simlab.analysis.curve import Curves
from simlab.analysis.numbers import interval, percent, plus_minus, short
from simlab.analysis.resampling import Estimate, jackknife
from simlab.analysis.shape import DROP, HELD
from simlab.theory.laws import Array

if TYPE_CHECKING:
    from simlab.analysis.verdict import Verdict

LOGARITHMIC = 0.1  # a smaller exponent of k^p is a logarithm within a hundredth over 100 sublayers
_KINDS = {"attention": "the attention", "mlp": "the MLP", "renorm": "the re-norm"}


def row_place(curves: Curves, row: int) -> str:
    """``sublayer 7 (the attention of block 4)``; blocks are counted from 1."""
    kind, sublayer = curves.kinds[row], sublayer_of(curves, row)
    if kind not in _KINDS:
        return "the embedding" if kind == "embedding" else f"sublayer {sublayer} ({kind})"
    block = sum(kind == curves.kinds[row] for kind in curves.kinds[: row + 1])
    if curves.blocks and (known := curves.blocks[row]) is not None:
        block = known + 1
    if kind == "renorm":
        block = sum(kind == "mlp" for kind in curves.kinds[:row])
        return f"the re-norm after block {block}"
    return f"sublayer {sublayer} ({_KINDS[kind]} of block {block})"


def sublayer_of(curves: Curves, row: int) -> int:
    """The number of sublayers up to a row; a negative row counts from the end."""
    row %= len(curves.kinds)
    return sum(kind not in ("embedding", "renorm") for kind in curves.kinds[: row + 1])


def growth_clause(curves: Curves, v: Array, verdict: Verdict) -> str:
    """The growth clause: the word, its numbers, how well it fits, and the rows that are set aside."""
    shape, mean = verdict.shape, v.mean(0)
    curves = replace(curves, mean_square=v)
    text = _CLAUSES[shape.word](curves, mean, verdict)
    apart = (
        len(mean) > 1 and mean[0] > 0 and shape.start == 1 and not 0.8 < mean[1] / mean[0] < 1.25
    )
    if apart and shape.word in ("constant", "power", "saturating", "jump", "none"):
        text += f", after the embedding's {short(mean[0])}"
    if shape.held == "eps":
        first = sublayer_of(curves, shape.start)
        text += f", from sublayer {first} on (before, eps holds the branches back)"
    elif shape.held == "norm":
        last = sublayer_of(curves, shape.start - 1)
        level = short(mean[shape.start - 1])
        text += f", after sublayer {last} (until there norms keep the stream at {level})"
    elif shape.held == "reset" and shape.start > 1:
        text += f", from sublayer {sublayer_of(curves, shape.start)} on, where a norm sets it"
    elif curves.normalises[-1] == "branch" and not curves.adds_nothing:
        # Attention and MLP may be held back by very different factors.
        branches = [i for i, kind in enumerate(curves.kinds) if kind in ("attention", "mlp")]
        last = curves.eps_factor.mean(0)[branches[-2:]]
        if (last < HELD).all():
            factors = " and ".join(dict.fromkeys(short(float(factor)) for factor in last))
            text += f" (eps holds the branches back: m/(m + eps) is {factors} at the end)"
    return text + _largest_step(curves, mean, verdict)


def _constant(curves: Curves, mean: Array, verdict: Verdict) -> str:
    return f"stays at {short(mean[-1])} (it varies by {percent(verdict.shape.misfit)})"


def _linear(curves: Curves, mean: Array, verdict: Verdict) -> str:
    verb = _verb(verdict.growth.per_sublayer.value)
    fits = f"a line fits to {percent(verdict.shape.misfit)} of its growth"
    return f"{verb} by {_amount(curves, mean, verdict)}, linearly ({fits})"


def _amount(curves: Curves, mean: Array, verdict: Verdict) -> str:
    """``1.00 ± 0.01 per sublayer``, or per block where attention and MLP add different amounts.

    Per block: over pairs of blocks' ends without a norm of the stream between.
    """
    size = _positive(verdict.growth.per_sublayer)
    kinds = curves.kinds
    ends = [i for i in range(verdict.shape.start, len(mean)) if kinds[i] == "mlp"]
    pairs = [
        (i, j) for i, j in itertools.pairwise(ends) if kinds[i + 1 : j + 1] == ["attention", "mlp"]
    ]
    if not pairs:
        return f"{plus_minus(size)} per sublayer"
    first, second = (np.array(rows) for rows in zip(*pairs, strict=True))
    added = (
        float((mean[first + 1] - mean[first]).mean()),
        float((mean[second] - mean[first + 1]).mean()),
    )
    if abs(added[0] - added[1]) < 0.4 * size.value:
        return f"{plus_minus(size)} per sublayer"
    block = jackknife(curves.mean_square, lambda w: (w[..., second] - w[..., first]).mean(-1))
    return (
        f"{plus_minus(_positive(block))} per block (attention adds {short(added[0])}, "
        f"the MLP {short(added[1])})"
    )


def _exponential(curves: Curves, mean: Array, verdict: Verdict) -> str:
    rate, fits = verdict.growth.rate, percent(verdict.shape.misfit)
    verb = "grows" if rate.value > 1 else "shrinks"
    return (
        f"{verb} by a factor {plus_minus(rate)} per sublayer, exponentially (fits to {fits} of its "
        "growth in logs)"
    )


def _power(curves: Curves, mean: Array, verdict: Verdict) -> str:
    start, p = verdict.shape.start, verdict.growth.exponent
    word = "faster" if verdict.shape.number > 1 else "more slowly"
    law = f"as its power p = {interval(p)}"
    if verdict.shape.number < LOGARITHMIC:
        law = "as its logarithm"
    fits = percent(verdict.shape.misfit)
    return (
        f"{_verb(mean[-1] - mean[start])} from {short(mean[start])} to {short(mean[-1])}, {word} than "
        f"linearly in the sublayer, {law} (fits to {fits} of its growth)"
    )


def _saturating(curves: Curves, mean: Array, verdict: Verdict) -> str:
    start, verb = verdict.shape.start, _verb(mean[-1] - mean[verdict.shape.start])
    limit, fits = short(verdict.shape.number), percent(verdict.shape.misfit)
    return (
        f"{verb} from {short(mean[start])} to {short(mean[-1])} and saturates: the fitted curve "
        f"tends to {limit} (it fits to {fits} of its growth)"
    )


def _saw_tooth(curves: Curves, mean: Array, verdict: Verdict) -> str:
    teeth, inside = verdict.shape.teeth, verdict.shape.inside
    assert teeth is not None
    low, high = short(teeth.low), short(teeth.high)
    peaks = f"peaks of {high}" if low == high else f"peaks of {low} to {high}"
    if teeth.count == 1:
        peaks = f"a peak of {high}"
    who = "a re-norm" if teeth.renorm else "a norm of the stream"
    often = "once" if teeth.sublayers is None and teeth.count == 1 else "again and again"
    if teeth.sublayers is not None:
        blocks = (
            f"{teeth.sublayers // 2} blocks, " if teeth.renorm and teeth.sublayers % 2 == 0 else ""
        )
        often = f"every {blocks}{teeth.sublayers} sublayers"
    text = f"is a saw-tooth: {who} sets it back to {short(teeth.reset)} {often}, from {peaks}"
    renorms = [i for i, kind in enumerate(curves.kinds) if kind == "renorm"]
    raised = [i for i in renorms if teeth.renorm and mean[i] > (1 + DROP) * mean[i - 1]]
    if raised:  # a stream that is still small
        i = raised[-1]
        text += f" (while the stream is small it raises it: at {row_place(curves, i)} from "
        text += f"{short(mean[i - 1])})"
    if mean[-1] > (1 + DROP) * teeth.high:
        text += f"; it ends at {short(mean[-1])}, above every peak"
    if inside == "linear":
        text += (
            f"; between, it grows by {_amount(curves, mean, verdict)}, linearly (a line fits to "
        )
        text += f"{percent(verdict.shape.misfit)} of its growth)"
    return text


def _jump(curves: Curves, mean: Array, verdict: Verdict) -> str:
    row = verdict.shape.step
    assert row is not None
    share, at = percent(1 - verdict.shape.misfit), row_place(curves, row)
    return (
        f"moves in one jump, from {short(mean[row - 1])} to {short(mean[row])} at {at}, which is "
        f"{share} of all that it moves"
    )


def _none(curves: Curves, mean: Array, verdict: Verdict) -> str:
    start, last = verdict.shape.start, short(mean[-1])
    return (
        f"goes from {short(mean[start])} at sublayer {sublayer_of(curves, start)} to {last} in "
        "no simple shape: neither constant, linear, exponential, a power nor saturating"
        + _faster(mean[start:])
    )


def _largest_step(curves: Curves, mean: Array, verdict: Verdict) -> str:
    row = verdict.shape.step
    if verdict.shape.word != "none" or row is None:
        return ""
    step = f"from {short(mean[row - 1])} to {short(mean[row])}, at {row_place(curves, row)}"
    return f"; its largest step is {step}{_level(curves, mean, verdict.shape.level)}"


def _level(curves: Curves, mean: Array, start: int | None) -> str:
    """A clause: between which values blocks end from a row on; empty for None."""
    if start is None:
        return ""
    ends = [i for i in range(start, len(mean)) if curves.kinds[i] == curves.kinds[start]]
    low, high = short(min(mean[ends])), short(max(mean[ends]))
    where = f"; from sublayer {sublayer_of(curves, start)} on"
    span = f"at {low}" if low == high else f"between {low} and {high}"
    return f"{where} blocks end {span}" if curves.kinds[start] == "mlp" else ""


def _faster(v: Array) -> str:
    """A clause that says that v (n,) grows faster than exponentially, or an empty text."""
    if (v <= 0).any() or len(v) < 6:
        return ""
    logs = np.log(v)[np.linspace(0, len(v) - 1, 5).round().astype(int)]  # growth by quarters
    steps = np.diff(logs)
    faster = (
        steps[0] > 0 and (steps[1:] > 1.2 * steps[:-1]).all() and logs[-1] - logs[0] > math.log(100)
    )
    return "; it grows faster than exponentially" if faster else ""


def _unknown(curves: Curves, mean: Array, verdict: Verdict) -> str:
    if len(mean) == 1:
        return f"is {short(mean[0])} at the embedding, and there is no sublayer to speak of"
    first, last = short(mean[0]), short(mean[-1])
    return f"goes from {first} at the embedding to {last}, in too few rows to name a shape"


_CLAUSES = {
    "constant": _constant, "linear": _linear, "exponential": _exponential, "power": _power,
    "saturating": _saturating, "saw-tooth": _saw_tooth, "jump": _jump, "none": _none,
    "unknown": _unknown,
}  # fmt: skip


def _verb(change: float) -> str:
    return "grows" if change > 0 else "shrinks"


def _positive(e: Estimate) -> Estimate:
    if e.value >= 0:
        return e
    return Estimate(-e.value, *(None if x is None else -x for x in (e.high, e.low)))
