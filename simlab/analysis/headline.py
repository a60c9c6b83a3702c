"""The answer in one line, for a figure's title and a page's heading: what a run's numbers say first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from simlab.analysis.compare import Departure, departure, end_ratio, of_median_token
from simlab.analysis.curve import GIVEN, INITS, basis, given_in
from simlab.analysis.decision import HOLDS, OFF, decision
from simlab.analysis.numbers import beside, off_by, plus_minus, short
from simlab.analysis.resampling import MIN_SEEDS, Estimate
from simlab.analysis.tokens import skewed, token_apart

GROWING = (
    "linear",
    "exponential",
    "power",
)  # the shapes to which √2 per sublayer is an alternative


def headline(frame: pd.DataFrame, summary: Mapping[str, Any]) -> str:
    """One sentence on a run: a checkpoint beside random inits, else how its curve grows.

    Where few tokens make a checkpoint's mean square, it is on the median token, and names the largest.

    frame: the rows of curve.csv. summary: the content of summary.json.
    """
    left = summary.get("departure")
    few = skewed(frame)
    apart = f"; {token_apart(frame, summary['tokens']).sentence}" if few else ""
    whole = summary.get("sublayers") or 2 * summary["config"]["model"]["depth"]
    if "curve" in frame and frame["curve"].nunique() > 1 and (few or left is None):
        ratio, last = end_ratio(frame)
        end = "ends" if last == whole else f"is, at sublayer {last},"
        if few:
            both = frame[frame["sublayer"] <= last]
            apart = f"; {token_apart(both, summary['tokens']).sentence}"
            return f"{_median_token(frame, end)}{apart}, which {end} {beside(ratio)} theirs."
        more = ""
        if frame.loc[frame["curve"] == "random", "seed"].nunique() in range(1, MIN_SEEDS):
            more = f"; {MIN_SEEDS} would tell whether that is chance"
        whose = f"The mean square of this {given_in(frame)}'s residual stream"
        return f"{whose} {end} {beside(ratio)} {_drawn(frame)}{more}."
    if left is not None:
        return _departed(left, whole, given_in(frame) or GIVEN[0])
    verdicts = summary["verdict"]
    if not verdicts:
        return "Every curve left the number format's range at the embedding."
    name = next(name for name in (*INITS, *GIVEN) if name in verdicts)
    rows = frame[frame["curve"] == name]
    whose = {
        "random": "At init, the residual stream's mean square",
        "theory": "At init, theory predicts that the residual stream's mean square",
    }.get(name, f"The mean square of this {name}'s residual stream")
    column = "mean_square"
    if name in GIVEN and (rows["massive"] == 1).any():  # the verdict is on the median token
        whose, column = f"The mean square of this {name}'s median token", "mean_square_median"
    ends = rows.groupby("seed").tail(1)[column].mean()
    fit = verdicts[name]["fit"]
    first = rows.groupby("seed").nth(
        0 if fit["word"] == "unknown" else fit["start"]
    )  # the verdict's
    starts, where = first[column].mean(), _at(int(first["sublayer"].iloc[0]))
    depth = int(rows["block"].max()) + 1 if rows["block"].notna().any() else 0
    says = _grows(verdicts[name], float(starts), where, float(ends), depth)
    return f"{whose} {says}{_sqrt2(verdicts[name], summary['theories'][name], name)}{apart}."


def _drawn(frame: pd.DataFrame) -> str:
    """The name of the curves that a checkpoint is compared with: ``the mean of 3 random inits``."""
    name = basis(frame)
    seeds = frame.loc[frame["curve"] == name, "seed"].nunique()
    if name == "theory":
        return "what theory predicts of random inits"
    return "one random init" if seeds == 1 else f"the mean of {seeds} random inits"


def _median_token(frame: pd.DataFrame, end: str) -> str:
    """A checkpoint's median token beside those of random inits, or beside a predicted mean square."""
    median = of_median_token(frame)
    whose = f"The mean square of this {given_in(frame)}'s median token"
    size = beside(end_ratio(median)[0])
    left: Departure | None = departure(median)
    if left is None:
        return f"{whose} {end} {size} {_drawn(frame)}"
    if left.first is None:
        return f"{whose} stays within the random inits' band"
    if left.sublayer is None:
        return f"{whose} leaves the random inits' band at {_at(left.first)} and {end} within it"
    return f"{whose} {end} {size} a random init's, outside their band from {_at(left.sublayer)} on"


def _departed(left: Mapping[str, Any], last: int, given: str) -> str:
    """A checkpoint beside random inits: how far it ends from them, and from where on."""
    end = "ends" if left["last"] == last else f"is at sublayer {left['last']}"
    size = beside(math.inf if left["ratio"] is None else left["ratio"])  # JSON has no infinity
    if left["first"] is None:
        return (
            f"This {given}'s residual stream is as large as a random init's at every sublayer "
            f"(at the end its mean square is {size} their mean)."
        )
    if left["sublayer"] is None:
        return (
            f"This {given}'s residual stream leaves the random inits' band at "
            f"{_at(left['first'])} and {end} within it."
        )
    return (
        f"The mean square of this {given}'s residual stream {end} {size} a random init's; it is "
        f"outside their band for good from {_at(left['sublayer'])} on."
    )


def _at(sublayer: int) -> str:
    return f"sublayer {sublayer}" if sublayer else "the embedding"


def _grows(verdict: Mapping[str, Any], starts: float, where: str, ends: float, depth: int) -> str:
    """The verb and its numbers, by the verdict's word for the shape.

    starts, where: the mean square of the first row that the word is about, and that row.
    """
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
    if word == "unknown" and not depth:
        return f"is {short(ends)} at the embedding"
    shape = "too few rows to name a shape" if word == "unknown" else "no simple shape"
    return f"goes from {short(starts)} at {where} to {short(ends)} in {shape}"


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
