"""The written answer with which a sweep ends: every number in it comes from the sweep's files.

A writer takes a sweep's jobs and gives Markdown, a paragraph a line. ``WRITERS`` has them by the
name that the config key ``answer`` picks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from simlab.analysis.agreement import ALPHA
from simlab.analysis.curve import INITS
from simlab.analysis.decision import HOLDS, UNDECIDED, UNTOLD, decision
from simlab.analysis.numbers import off_by, plus_minus, short
from simlab.analysis.resampling import Estimate, t_quantile
from simlab.report import families_text, zoo
from simlab.report.swept import (
    SweptCurve,
    SweptJob,
    around_text,
    in_markdown,
    listed,
    missing_said,
    of_each,
    span,
    swept_curves,
    theory_said,
)

NEAR = 0.1  # of a growth exponent that is called near 0; the paper's own figures lie within


def issue797(jobs: Sequence[SweptJob]) -> str:
    """What allenai/OLMo issue 797 asked, answered with a sweep's numbers."""
    curves = list(swept_curves(jobs))
    drawn = [c for c in curves if c.name in INITS]
    alone = [c for c in drawn if not c.stored] or drawn
    trained = [c for c in curves if c.name == "checkpoint"]
    rising, saws = [c for c in alone if not c.resets], [c for c in alone if c.resets]
    lines = [*_header(alone), *_table(drawn, trained)]
    for norms in dict.fromkeys(c.norms for c in rising):
        lines += _rising([c for c in rising if c.norms == norms], norms)
    lines += [*_saw_tooth(saws), *_mean(alone), *_lambda(rising, saws), *theory_said(alone)]
    lines += [*_trained(trained), *missing_said(jobs, curves)]
    return "\n\n".join(lines) + "\n"


def _header(curves: Sequence[SweptCurve]) -> Iterator[str]:
    title = "**How do activations grow with depth in a random OLMo-2?**"
    if not curves:
        yield f"{title} No job has ended with a curve of random inits."
        return
    summary = curves[0].summary
    config, (sequences, length) = summary["config"], summary["tokens"]
    models = listed(list(dict.fromkeys(f"{c.label} ({c.model['depth']} blocks)" for c in curves)))
    what = f"{curves[0].steps['count'].max()} random inits each of {models}"
    if curves[0].name == "theory":
        what = f"The predicted curves of {models}"
    rule, std = config["init"]["rule"], config["init"]["std"]
    init = f"init {rule}{f'({std:g})' if std is not None else ''}"
    tokens = f"{sequences} × {length} {config['inputs']['kind']} {summary['token_unit']}"
    tokens += around_text(summary)
    yield f"{title} {what}: {init}, {tokens}."


def _table(drawn: Sequence[SweptCurve], trained: Sequence[SweptCurve]) -> Iterator[str]:
    if not drawn and not trained:
        return
    of_curves = []
    for c in (*drawn, *trained):
        who = (
            "trained"
            if c.name == "checkpoint"
            else "re-normed"
            if c.resets
            else in_markdown(c.norms)
        )
        who = f"{c.label} {who}"
        who += ", beside it" if c.stored and c.name != "checkpoint" else ""
        norm, mean, mean_abs = c.cell("norm"), c.mean_cell(), c.cell("mean_abs")
        of_curves.append((who, norm, mean_abs, c.cell("variance"), c.cell("law_mean_field"), mean))
    heads = ("", "norm ‖x‖", "mean \\|x\\|", "variance", "theory", "mean")
    for columns in ((0, 1, 2), (0, 3, 4, 5)):  # what fits into 80 columns side by side
        rows = [heads, ["---"] * len(heads), *of_curves]
        lines = ["| " + " | ".join(row[i] for i in columns) + " |" for row in rows]
        yield "\n".join(lines)
    saws = ""
    if any(c.resets for c in drawn):
        saws = "; with re-norms at the peaks → after the re-norms"
    yield (
        f"Means over seeds after the first block → after the last{saws}. Of the mean the lowest to the "
        "highest seed, after the last block or at the peaks. Theory: the mean square that it predicts, "
        "which is the variance but for the mean's square."
    )


def _rising(curves: Sequence[SweptCurve], norms: str) -> Iterator[str]:
    """Growth without re-norms: the word, the additive law, and what √2 would have meant."""
    text = f"**`{norms}`{', the norms of OLMo-2' if norms == 'reordered' else ''}:**"
    linear = [c for c in curves if c.verdict["shape"] == "linear"]
    if linear:
        rate = of_each(linear, lambda c: plus_minus(Estimate(**c.verdict["per_sublayer"])))
        text += f" the mean square grows linearly, by {rate} per sublayer{_additive(linear)}."
        for c in linear:
            text += f" {c.label} {_until(c)}." if _until(c) else ""
    for c in curves:
        if c not in linear:
            v, word = c.steps["mean_square"], c.verdict["shape"]
            shape = "in no simple shape" if word in ("none", "unknown") else f"shape: {word}"
            shape += f"; it {_until(c)}" if _until(c) else ""
            text += f" {c.label}: {short(v[c.first])} → {short(v[c.top])}, {shape}."
    yield text + _claimed([c for c in curves if not _until(c)], "after the last block")


def _until(c: SweptCurve) -> str:
    """Where a curve ends, if that is before the model does."""
    last = int(c.steps["sublayer"].iloc[-1])
    whole = c.summary.get("sublayers") or 2 * c.model["depth"]
    return f"ends after sublayer {last} of {whole}" if last < whole else ""


def _additive(curves: Sequence[SweptCurve]) -> str:
    """Why they grow linearly, as far as the additive law's test lets one say so; from a comma on."""
    held: dict[str, list[SweptCurve]] = {}
    for c in curves:
        law = c.law("additive")
        if law["log_error"] is None:  # no law for this placement
            continue
        status = law["status"]
        if c.name == "theory":  # without chance: its error is all there is to say
            word = decision(c.name, status, law["log_error"])
            status = "same" if word == HOLDS else "other"
        elif status == "unknown" and law["p_value"] is None:
            status = "untested"
        held.setdefault(status, []).append(c)
    if not held:
        return ""
    said = [
        words.format(of_each(held[k], _law_error)) for k, words in ADDITIVE.items() if k in held
    ]
    how = "because"
    if not {"holds", "same"} & set(held):
        how = "but not as where" if set(held) <= {"fails", "other"} else "as where"
    return (
        f", {how} each sublayer adds a normed branch at right angles to the stream (this additive law "
        f"{'; it '.join(said)}{_enough(held.get('unknown', []))})"
    )


def _enough(curves: Sequence[SweptCurve]) -> str:
    """How many seeds would tell the law's error from chance, if that is known of all these curves."""
    enough = [c.law("additive")["enough"] for c in curves]
    return f" ({max(enough)} seeds would tell)" if enough and all(enough) else ""


# By how the law was tested. Last the one of which the number of seeds is said that would tell.
ADDITIVE = {
    "holds": "holds to {}",
    "same": "gives the predicted curve to {}",
    "other": "is off by {}",
    "fails": "fails beyond chance, off by {}",
    "untested": f"is {UNDECIDED}, off by {{}}, which {UNTOLD}",
    "unknown": f"is {UNDECIDED}, off by {{}}, which may be chance",
}


def _law_error(c: SweptCurve) -> str:
    return off_by(c.law("additive")["log_error"])


def _claimed(curves: Sequence[SweptCurve], where: str) -> str:
    """What the thread's two rates would have made of curves that they may be about."""
    curves = [c for c in curves if c.law("sqrt2")["log_error"] is not None]
    if not curves:
        return ""
    sqrt2 = of_each(curves, lambda c: c.claims()[0], whole=True)
    layer = of_each(curves, lambda c: c.claims()[1], whole=True)
    real = of_each(curves, lambda c: c.claims()[2], whole=True)
    return (
        f" √2 per sublayer would have led to {sqrt2} {where}, and “2·√2 per layer” to {layer}; it is "
        f"{real}."
    )


def _saw_tooth(curves: Sequence[SweptCurve]) -> Iterator[str]:
    if not curves:
        return

    def v(c: SweptCurve, rows: Sequence[int]) -> str:
        return span(c.steps["mean_square"][list(rows)])

    every = of_each(curves, lambda c: str(c.model["norm"]["every"]), whole=True)
    back = of_each(curves, lambda c: v(c, c.resets), whole=True)
    peaks = of_each(curves, lambda c: v(c, [row - 1 for row in c.resets]))
    yield (
        f"**A re-norm every {every} blocks** makes a saw-tooth: it sets the mean square back to "
        f"{back}, from peaks of {peaks}.{_claimed(curves, 'at the highest peak')}"
    )


def _mean(curves: Sequence[SweptCurve]) -> Iterator[str]:
    """The thread's question why the mean starts below zero."""
    curves = [c for c in curves if "mean" in c.steps and c.steps["count"].max() > 2]
    if not curves:
        return
    after = [_after_first(c)["mean"].to_numpy() for c in curves]
    off = [c for c, away in zip(curves, off_zero(after), strict=True) if away]
    below = of_each(
        curves,
        lambda c: f"{(_after_first(c)['mean'] < 0).sum()} of {len(_after_first(c))} inits",
        whole=True,
    )
    text = "is zero but for chance"
    if off:
        names = listed(list(dict.fromkeys(f"{c.label} {in_markdown(c.norms)}" for c in off)))
        text = f"differs from zero beyond chance for {names}"
    yield (
        f"**The mean** {text} (after the first block it is below zero in {below}); the mean of |x| is "
        "what shows growth."
    )


def _after_first(c: SweptCurve) -> pd.DataFrame:
    step = c.steps.iloc[c.first]
    return c.rows[(c.rows["sublayer"] == step["sublayer"]) & (c.rows["kind"] == step["kind"])]


def off_zero(groups: Sequence[NDArray[np.float64]]) -> list[bool]:
    """Of each group of seeds' values: True if their mean differs from 0 beyond chance.

    Student's t at ALPHA for all groups together, by Bonferroni: sizes of one seed may depend on each
    other.
    """
    quantiles = (t_quantile(1 - ALPHA / (2 * len(groups)), len(values) - 1) for values in groups)
    return [
        bool(abs(values.mean()) > quantile * values.std(ddof=1) / math.sqrt(len(values)))
        for values, quantile in zip(groups, quantiles, strict=True)
    ]


_LAMBDAS = {
    "lambda_paper": "of the mean vector, the paper's",
    "lambda_token": "of the tokens' norm",
}


def _lambda(rising: Sequence[SweptCurve], saws: Sequence[SweptCurve]) -> Iterator[str]:
    known = [c for c in rising if all(c.exponents.get(key) for key in _LAMBDAS)]
    text = ""
    if known:
        texts = []
        for key, words in _LAMBDAS.items():
            texts.append(f"{_exponents(known, key)} {words}{_predicted(known, key)}")
        near = all(abs(c.exponents[key]["value"]) < NEAR for c in known for key in _LAMBDAS)
        ratio = of_each(known, lambda c: short(_ratio(c)))
        text = "**The exponent λ**"
        if near:
            text = "**λ near 0, as in the paper, is no contradiction:** λ"
        text += f" from the first block to the last is {' and '.join(texts)}"
        text += f", while the mean square changes by a factor of {ratio}"
        if all(c.exponents.get("lambda_token_sqrt2") for c in known):
            sqrt2 = of_each(known, lambda c: short(c.exponents["lambda_token_sqrt2"]))
            text += f"; √2 per sublayer would make λ {sqrt2}"
        text += ". λ is a logarithm over the number of blocks"
        linear = all(c.verdict["shape"] == "linear" for c in known)
        text += ": of linear growth it tends to 0 with depth." if linear else "."
    first = "lambda_from_first"
    both = [c for c in saws if c.exponents.get(first)]
    if both:
        extremes = of_each(both, lambda c: span(pd.Series(c.exponents[first], dtype=float)))
        text += f" With re-norms it depends on the block where one stops: {extremes}."
    if text:
        yield text.strip()


def _ratio(c: SweptCurve) -> float:
    v = c.steps["mean_square"]
    return float(v[c.top] / v[c.first])


def _exponents(curves: Sequence[SweptCurve], key: str) -> str:
    return of_each(curves, lambda c: plus_minus(Estimate(**c.exponents[key])))


def _predicted(curves: Sequence[SweptCurve], key: str) -> str:
    if any(c.exponents.get(f"{key}_mean_field") is None for c in curves):
        return ""
    return f" (theory: {of_each(curves, lambda c: short(c.exponents[f'{key}_mean_field']))})"


def _trained(curves: Sequence[SweptCurve]) -> Iterator[str]:
    if not curves:
        yield (
            "**Trained weights are not in these numbers.** The same command with `source=checkpoint "
            "source.path=A,B,C` (folders or hub ids) puts trained models beside the random ones."
        )
    for c in curves:
        said = [c.verdict["sentence"], *c.summary.get("comparison", [])[:1]]
        yield f"**{c.label}, trained:** {' '.join(said)}"


WRITERS: dict[str, Callable[[Sequence[SweptJob]], str]] = {
    "issue797": issue797,
    "families": families_text.answer,
    "norm_zoo": zoo.zoo,
}
