"""A verdict's sentences: theory, the growth and the laws, √2, the gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from simlab.analysis.agreement import MATTERS, Agreement, enough_seeds
from simlab.analysis.curve import Curves
from simlab.analysis.numbers import interval, off_by, percent, plus_minus, power_of_ten, short
from simlab.analysis.resampling import MIN_SEEDS, Estimate, jackknife
from simlab.analysis.shape import DROP, HELD
from simlab.theory.laws import LAWS, Array
from simlab.theory.mean_field import Prediction

if TYPE_CHECKING:
    from simlab.analysis.verdict import Fit, Verdict

LOGARITHMIC = 0.1  # a smaller exponent of k^p is a logarithm within a hundredth over 100 sublayers
_KINDS = {"attention": "the attention", "mlp": "the MLP", "renorm": "the re-norm"}


def main_sentences(
    curves: Curves,
    v: Array,
    verdict: Verdict,
    name: str,
    massive: bool,
    prediction: Prediction | None,
) -> Iterator[str]:
    """How curves agree with theory, and last how they grow.

    v (S, R): the mean squares that the shape is about. The others as for ``judge``.
    """
    yield from _predicted(prediction) if prediction else _theory(curves, verdict.agreement)
    subject = "mean square" if not massive else "the median token's mean square"
    if len(curves.kinds) < curves.whole:
        subject = f"until a curve ends after sublayer {_sublayer(curves, -1)}, {subject}"
    text = f"{subject} {_grows(curves, v, verdict)}"
    claims = [_claim(law, fit, certain=name == "theory") for law, fit in verdict.laws.items()]
    claims = [claim for claim in claims if claim]
    if claims and not massive:
        text += f": {', '.join(claims)}"
    if name == "checkpoint":
        text += " (one curve: no intervals)"
    elif name == "random" and curves.count < MIN_SEEDS:
        seeds = "1 seed is" if curves.count == 1 else f"{curves.count} seeds are"
        text += f" ({seeds} too few for intervals and tests: {MIN_SEEDS} needed)"
    yield f"{text[0].upper()}{text[1:]}."


def further_sentences(
    curves: Curves, verdict: Verdict, name: str, prediction: Prediction | None
) -> Iterator[str]:
    """Sentences on √2, on gradients, and on a gradient that isn't predicted; as for ``judge``."""
    if name != "checkpoint":
        yield from _sqrt2(curves, verdict)
    yield from _gradients(curves)
    if prediction and prediction.no_gradient:
        yield f"Theory predicts no gradient: {prediction.no_gradient}."


def _predicted(theory: Prediction) -> Iterator[str]:
    """Of a curve ``theory``: how far seeds lie from it, and where it ends."""
    last = theory.rows[-1]
    share = percent(last.band / last.mean_square if last.mean_square > 0 else 0.0)
    where = f"sublayer {last.sublayer}" if last.sublayer else "the embedding"
    yield f"Predicted, not measured: at {where} the mean square of seeds varies by {share} (one std)."
    if theory.ends:
        yield f"Theory ends there: {theory.ends}."


def row_place(curves: Curves, row: int) -> str:
    """``sublayer 7 (the attention of block 4)``; blocks are counted from 1."""
    kind, sublayer = curves.kinds[row], _sublayer(curves, row)
    if kind not in _KINDS:
        return "the embedding" if kind == "embedding" else f"sublayer {sublayer} ({kind})"
    block = sum(kind == curves.kinds[row] for kind in curves.kinds[: row + 1])
    if kind == "renorm":
        block = sum(kind == "mlp" for kind in curves.kinds[:row])
        return f"the re-norm after block {block}"
    return f"sublayer {sublayer} ({_KINDS[kind]} of block {block})"


def _sublayer(curves: Curves, row: int) -> int:
    row %= len(curves.kinds)
    return sum(kind not in ("embedding", "renorm") for kind in curves.kinds[: row + 1])


def _theory(curves: Curves, found: Agreement | None) -> Iterator[str]:
    theory = curves.theory
    if theory is None:
        return
    if found is None:
        if theory.ends and len(theory.rows) < 2:
            yield f"Theory predicts no curve here: {theory.ends}."
        return
    curve = "The curve"
    if found.known < curves.whole:
        curve = f"Up to sublayer {_sublayer(curves, found.known - 1)} the curve"
    size, errors = percent(abs(found.largest)), f"{found.errors:.1f} joint standard errors"
    if found.status == "agrees":
        yield f"{curve} is what theory predicts: off by at most {size} and {errors}."
    elif found.status == "chance":
        seeds = enough_seeds(found.reach * math.sqrt(curves.count))
        tell = f"; {seeds} seeds would tell to {percent(MATTERS)}" if seeds > curves.count else ""
        yield (
            f"{curve} may be what theory predicts: it is off by at most {size} and {errors}, which "
            f"chance and theory's own error explain{tell}."
        )
    else:
        assert found.first is not None
        assert found.component is not None
        where = f"first at {row_place(curves, found.first)}, where {_blame(found.component)} off"
        if found.status == "near":
            yield (
                f"{curve} is within {size} of what theory predicts, but off beyond chance "
                f"({errors}), {where}."
            )
        else:
            yield f"{curve} is not what theory predicts: off by {size} ({errors}), {where}."
    if theory.ends is not None and found.known == len(theory.rows):
        yield f"Theory ends before the model: {theory.ends}."


def _blame(component: str) -> str:
    return {
        "norm": "the norm is", "embedding": "it is",
        "attention": "attention's output is", "mlp": "the MLP's output is",
    }.get(component, f"the {component} is")  # fmt: skip


def _grows(curves: Curves, v: Array, verdict: Verdict) -> str:
    """The growth clause: the word, its numbers, how well it fits, and the rows that are set aside."""
    shape, mean = verdict.shape, v.mean(0)
    curves = replace(curves, mean_square=v)
    text = _CLAUSES[shape.word](curves, mean, verdict)
    apart = (
        len(mean) > 1 and mean[0] > 0 and shape.start == 1 and not 0.8 < mean[1] / mean[0] < 1.25
    )
    if apart and shape.word in ("constant", "power", "saturating", "none"):
        text += f", after the embedding's {short(mean[0])}"
    if shape.held == "eps":
        first = _sublayer(curves, shape.start)
        text += f", from sublayer {first} on (before, eps holds the branches back)"
    elif shape.held == "norm":
        last = _sublayer(curves, shape.start - 1)
        level = short(mean[shape.start - 1])
        text += f", after sublayer {last} (until there norms keep the stream at {level})"
    elif shape.held == "reset" and shape.start > 1:
        text += f", from sublayer {_sublayer(curves, shape.start)} on, where a norm sets it"
    elif curves.normalises[-1] == "branch":
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
    start = verdict.shape.start
    return (
        f"goes from {short(mean[start])} to {short(mean[-1])} in no simple shape: neither constant, "
        "linear, exponential, a power nor saturating" + _faster(mean[start:])
    )


def _largest_step(curves: Curves, mean: Array, verdict: Verdict) -> str:
    row = verdict.shape.step
    if verdict.shape.word != "none" or row is None:
        return ""
    step = f"from {short(mean[row - 1])} to {short(mean[row])}, at {row_place(curves, row)}"
    return f"; its largest step is {step}"


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
    return f"goes from {short(mean[0])} to {short(mean[-1])}, in too few rows to name a shape"


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


def _claim(name: str, fit: Fit, certain: bool) -> str:
    """A claim on an exact law; of √2 and theory there are sentences of their own.

    certain: of a curve without chance, of which a law's error is all there is to say.
    """
    law = LAWS[name]
    if not (law.expected and law.exact) or math.isnan(fit.log_error):
        return ""
    size = off_by(fit.log_error)
    if certain and fit.log_error <= math.log1p(MATTERS):
        return f"{law.phrase} gives the same to {size}"
    if fit.status == "holds":
        return f"{law.phrase} holds to {size}"
    if fit.status == "unknown":
        if fit.p_value is None:
            return f"{law.phrase} is off by {size}"
        seeds = f", which may be chance ({fit.enough} seeds would tell)" if fit.enough else ""
        return f"{law.phrase} is off by {size}{seeds}"
    if fit.log_error < math.log1p(MATTERS):
        return f"{law.phrase} is within {size}, but fails beyond chance"
    return f"{law.phrase} fails, off by {size}"


def _sqrt2(curves: Curves, verdict: Verdict) -> Iterator[str]:
    """The mean squares that both rates of the discussion would give, at the end or the highest peak."""
    law = LAWS["sqrt2"]
    if not law.applies(curves.rows) or len(curves.kinds) < 3:
        return
    mean = curves.mean_square.mean(0)
    ends = [i for i, kind in enumerate(curves.kinds) if kind == "mlp"] or [len(mean) - 1]
    row = max(ends, key=lambda i: mean[i]) if verdict.shape.word == "saw-tooth" else ends[-1]
    said = float(law.predict(curves.rows)[:, row].mean()) / math.log(10)
    # 2·√2 per layer: the mean square times 8 per block, from the last re-norm on.
    since = max((i for i in range(row) if curves.kinds[i] == "renorm"), default=0)
    if not math.isfinite(said) or not mean[since] > 0:  # an embedding of zeros
        return
    steps = sum(kind == "mlp" for kind in curves.kinds[since + 1 : row + 1])
    layer = power_of_ten(math.log10(mean[since]) + steps * math.log10(8))
    blocks = sum(kind == "mlp" for kind in curves.kinds[: row + 1])
    where = f"after {blocks} block{'s' if blocks > 1 else ''}"
    yield (
        f"√2 per sublayer would have meant {power_of_ten(said)} {where}, and “2·√2 per layer” {layer}; "
        f"it is {short(mean[row])}."
    )


def _gradients(curves: Curves) -> Iterator[str]:
    """How the gradient's rms changes from the embedding to the end, and what theory says of it."""
    every = curves.others.get("gradient_rms")
    if every is None:
        return
    g = every.mean(0)
    rows = np.flatnonzero(np.isfinite(g) & (g > 0))
    if len(rows) < 3:
        return
    first, last = int(rows[0]), int(rows[-1])
    g, logs = g[first : last + 1], np.log(g[first : last + 1])
    total, steps = math.exp(abs(logs[-1] - logs[0])), np.diff(logs)
    row = int(np.abs(steps).argmax())
    start = "the embedding" if first == 0 else f"sublayer {_sublayer(curves, first)}"
    ends = f"{short(g[0])} at {start}, {short(g[-1])} at the end"
    if total < 1.25:
        text = f"The gradient's rms is about the same at both ends ({ends})"
    else:
        verb = "falls" if logs[-1] < logs[0] else "rises"
        text = f"The gradient's rms {verb} {short(total)}-fold through the model ({ends})"
    at = math.exp(abs(steps[row]))
    if at > 1.5:
        turn = "a fall" if steps[row] < 0 else "a rise"
        where = row_place(curves, first + row + 1)
        text += f"; its largest step is {turn} by a factor {short(at)} at {where}"
    theory = curves.theory
    if theory is not None:
        predicted = theory.column("gradient_rms", len(curves.kinds))[first : last + 1]
        if np.isfinite(predicted).any():
            with np.errstate(divide="ignore"):  # a prediction of 0 is off by any factor
                error = float(np.nanmax(np.abs(logs - np.log(predicted))))
            right = error < math.log1p(2 * MATTERS)
            text += f"; theory {'predicts it to' if right else 'is off by'} {off_by(error)}"
        elif theory.no_gradient:
            text += f"; theory predicts none: {theory.no_gradient}"
    yield f"{text}."
