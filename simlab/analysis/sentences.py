"""A verdict's sentences: theory, the growth and the laws, √2, the gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from simlab.analysis.agreement import ALPHA, FAR, MATTERS, Agreement, enough_seeds
from simlab.analysis.curve import GIVEN, Curves
from simlab.analysis.decision import HOLDS, UNDECIDED, UNTOLD, decision
from simlab.analysis.growth_clause import growth_clause, row_place, sublayer_of
from simlab.analysis.numbers import off_by, percent, power_of_ten, short
from simlab.analysis.resampling import MIN_SEEDS, few_apart, t_quantile
from simlab.theory.laws import LAWS, Array
from simlab.theory.mean_field import Prediction

if TYPE_CHECKING:
    from simlab.analysis.verdict import Fit, Verdict


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
        subject = f"until a curve ends after sublayer {sublayer_of(curves, -1)}, {subject}"
    text = f"{subject} {growth_clause(curves, v, verdict)}"
    claims = [_claim(law, fit, name) for law, fit in verdict.laws.items()]
    claims = [claim for claim in claims if claim]
    if claims and not massive:
        text += f": {', '.join(claims)}"
    if name in GIVEN:
        text += " (one curve: no intervals)"
    elif name == "random" and curves.count < MIN_SEEDS:
        few = "1 seed is too few for intervals and tests"
        if curves.count > 1:
            few = f"{curves.count} seeds are too few for intervals and close tests"
        text += f" ({few} of laws: {MIN_SEEDS} needed)"
    yield f"{text[0].upper()}{text[1:]}."


def further_sentences(
    curves: Curves, verdict: Verdict, name: str, prediction: Prediction | None
) -> Iterator[str]:
    """On branches of 0, √2, gradients, and a gradient that isn't predicted; as for ``judge``."""
    if curves.adds_nothing:
        yield "Attention and MLPs add nothing: every branch is 0."
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
        curve = f"Up to sublayer {sublayer_of(curves, found.known - 1)} the curve"
    size, errors = off_by(found.log_error), f"{found.errors:.1f} joint standard errors"
    most = size if size.startswith("less") else f"at most {size}"
    if found.status == "agrees":
        yield f"{curve} is what theory predicts: off by {most} and {errors}."
    elif found.status == "chance":
        seeds = enough_seeds(found.reach * math.sqrt(curves.count))
        tell = f"; {seeds} seeds would tell to {percent(MATTERS)}" if seeds > curves.count else ""
        yield (
            f"{curve} may be what theory predicts ({UNDECIDED}): it is off by {most} and "
            f"{errors}, which chance and theory's own error explain{tell}."
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


def _claim(name: str, fit: Fit, curve: str) -> str:
    """The decision on an exact law; of √2 and theory there are sentences of their own.

    curve: the kind of curve; of one without chance a law's error is all there is to say.
    """
    law, word = LAWS[name], decision(curve, fit.status, fit.log_error)
    if not (law.expected and law.exact) or word is None:
        return ""
    size = off_by(fit.log_error)
    if word == HOLDS:
        return f"{law.phrase} {'holds' if curve == 'random' else 'gives the same'} to {size}"
    if curve != "random":
        return f"{law.phrase} is off by {size}"
    if word == UNDECIDED:
        seeds = f" ({fit.enough} seeds would tell)" if fit.enough else ""
        chance = f", which may be chance{seeds}" if fit.p_value is not None else ""
        return f"{law.phrase} is {UNDECIDED}, off by {size}{chance}"
    if fit.log_error < math.log1p(MATTERS):
        return f"{law.phrase} is within {size}, but off beyond chance"
    return f"{law.phrase} fails, off by {size}"


def _sqrt2(curves: Curves, verdict: Verdict) -> Iterator[str]:
    """The mean squares that both rates of the discussion would give, at the end or the highest peak."""
    law = LAWS["sqrt2"]
    ends = [i for i, kind in enumerate(curves.kinds) if kind == "mlp"]
    if not law.applies(curves.rows) or len(curves.kinds) < 3 or not ends:
        return
    if (
        len(ends) < len({*curves.blocks} - {None}) - 1
    ):  # its rates are of blocks that each have an MLP
        return
    mean = curves.mean_square.mean(0)
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
    start = f"the {'last re-norm' if since else 'embedding'}'s {short(mean[since])}"
    yield (
        f"From {start}, √2 per sublayer would have meant {power_of_ten(said)} {where}, and “2·√2 per "
        f"layer” {layer}; it is {short(mean[row])}."
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
    start = "the embedding" if first == 0 else f"sublayer {sublayer_of(curves, first)}"
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
            text += f"; theory {_held(every[:, first : last + 1], predicted)}"
        elif theory.no_gradient:
            text += f"; theory predicts none: {theory.no_gradient}"
    yield f"{text}."


def _held(gradients: Array, predicted: Array) -> str:
    """A clause: how far theory's gradient rms (R,) is off that of S seeds (S, R), and if by chance.

    Student's t of the seeds' mean in the row that is furthest off, at ALPHA over all rows. Theory has
    no band for gradients, so fewer than MIN_SEEDS seeds decide nothing less than FAR.
    """
    seeds, mean = len(gradients), gradients.mean(0)
    with np.errstate(divide="ignore"):  # a prediction of 0 is off by any factor
        errors = np.abs(np.log(mean / predicted))
    row = int(np.nanargmax(errors))
    size = off_by(float(errors[row]))
    if errors[row] < math.log1p(2 * MATTERS):
        return f"predicts it to {size}"
    if seeds < MIN_SEEDS:
        with np.errstate(divide="ignore"):
            told = few_apart(np.log(gradients / predicted), ALPHA)[row] and errors[row] >= FAR
        return f"is off by {size}" if told else f"is {UNDECIDED}, off by {size}, which {UNTOLD}"
    noise = float(gradients[:, row].std(ddof=1)) / math.sqrt(seeds)
    limit = t_quantile(1 - ALPHA / (2 * int(np.isfinite(predicted).sum())), seeds - 1)
    if abs(mean[row] - predicted[row]) > limit * noise:
        return f"is off by {size}"
    return f"is {UNDECIDED}, off by {size}, which may be chance"
