"""The answer in one line, for a figure's title and a page's heading: what a run's numbers say first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from simlab.analysis.curve import INITS
from simlab.analysis.decision import HOLDS, OFF, decision
from simlab.analysis.numbers import off_by, plus_minus, short
from simlab.analysis.resampling import Estimate

GROWING = (
    "linear",
    "exponential",
    "power",
)  # the shapes to which √2 per sublayer is an alternative


def headline(frame: pd.DataFrame, summary: Mapping[str, Any]) -> str:
    """One sentence on a run: a checkpoint beside random inits, else how its curve grows.

    frame: the rows of curve.csv. summary: the content of summary.json.
    """
    left = summary.get("departure")
    if left is not None:
        return _departed(left, 2 * summary["config"]["model"]["depth"])
    verdicts = summary["verdict"]
    if not verdicts:
        return "Every curve left the number format's range at the embedding."
    name = next(name for name in (*INITS, "checkpoint") if name in verdicts)
    rows = frame[frame["curve"] == name]
    whose = {
        "random": "At init, the residual stream's mean square",
        "theory": "At init, theory predicts that the residual stream's mean square",
        "checkpoint": "The mean square of this checkpoint's residual stream",
    }[name]
    ends = rows.groupby("seed").tail(1)["mean_square"].mean()
    starts = rows.groupby("seed").head(1)["mean_square"].mean()
    depth = int(rows["block"].max()) + 1 if rows["block"].notna().any() else 0
    says = _grows(verdicts[name], float(starts), float(ends), depth)
    return f"{whose} {says}{_sqrt2(verdicts[name], summary['theories'][name], name)}."


def _departed(left: Mapping[str, Any], last: int) -> str:
    """A checkpoint beside random inits: how far it ends from them, and from where on."""
    ratio, end = left["ratio"], "ends" if left["last"] == last else f"is at sublayer {left['last']}"
    if left["first"] is None:
        return (
            "This checkpoint's residual stream is as large as a random init's at every sublayer "
            f"(mean square: {short(ratio)}× their mean at the end)."
        )
    if left["sublayer"] is None:
        return (
            "This checkpoint's residual stream leaves the random inits' band at "
            f"{_at(left['first'])} and {end} within it."
        )
    size = f"{short(ratio)}× above" if ratio is not None and ratio > 1 else "far below"
    if ratio is None:  # JSON has no infinity
        size = "far above"
    elif 0 < ratio <= 1:
        size = f"{short(1 / ratio)}× below"
    return (
        f"The mean square of this checkpoint's residual stream {end} {size} a random init's; it is "
        f"outside their band for good from {_at(left['sublayer'])} on."
    )


def _at(sublayer: int) -> str:
    return f"sublayer {sublayer}" if sublayer else "the embedding"


def _grows(verdict: Mapping[str, Any], starts: float, ends: float, depth: int) -> str:
    """The verb and its numbers, by the verdict's word for the shape."""
    fit = verdict["fit"]
    word, teeth = fit["word"], fit["teeth"]
    after = f"it is {short(ends)} after {depth} block{'s' if depth != 1 else ''}"
    if word == "constant":
        return f"stays at {short(ends)}"
    if word == "linear":
        size = Estimate(**verdict["per_sublayer"])
        if size.value < 0:
            return f"shrinks linearly; {after}"
        return f"grows linearly, by {plus_minus(size)} per sublayer"
    if word == "exponential":
        rate = Estimate(**verdict["rate"])
        verb = "grows" if rate.value > 1 else "shrinks"
        return f"{verb} exponentially, by a factor {plus_minus(rate)} per sublayer"
    if word == "power":
        verb, speed = (
            ("grows" if ends > starts else "shrinks"),
            "faster" if fit["number"] > 1 else "more slowly",
        )
        return f"{verb} {speed} than linearly; {after}"
    if word == "saturating":
        return f"saturates; {after}"
    if word == "saw-tooth" and teeth:
        peak, reset = short(teeth["high"]), short(teeth["reset"])
        norm = "each re-norm" if teeth["renorm"] else "a norm of the stream"
        if teeth.get("count") == 1:
            norm = norm.replace("each", "a")
            return f"is a saw-tooth: {norm} sets it back to {reset} once, from a peak of {peak}"
        return f"is a saw-tooth: {norm} sets it back to {reset}, from peaks of up to {peak}"
    if word == "jump":
        return f"moves in one jump; {after}"
    return f"goes from {short(starts)} to {short(ends)} in no simple shape"


def _sqrt2(verdict: Mapping[str, Any], laws: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """A clause that says whether a growing curve obeys √2 per sublayer; empty where it can't tell."""
    law = laws.get("sqrt2")
    if name not in INITS or law is None or verdict["fit"]["word"] not in GROWING:
        return ""
    error = law["log_error"]
    word = decision(name, law["status"], error)
    if word == OFF and error is not None:
        return f"; √2 per sublayer is off by {off_by(float(error))}"
    return "; √2 per sublayer holds" if word == HOLDS else ""
