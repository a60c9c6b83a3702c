"""The answer ``norm_zoo``: what each norm placement makes of the stream, a row per job.

docs/norm_zoo.md defines the columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from simlab.analysis.numbers import off_by, short
from simlab.report.swept import (
    SweptCurve,
    SweptJob,
    in_markdown,
    listed,
    missing_said,
    swept_curves,
)
from simlab.report.values import value_text

_LARGEST = math.log2(3.3895313892515355e38)  # of a bfloat16's log2: (2 − 2⁻⁷)·2¹²⁷
_DIGITS = 8  # significant bits of a bfloat16
NORMED = {"float32": 1e-5}  # relative: how near a normed stream's mean square is to its norm's
_HEADS = (
    "placement",
    "v",
    "theory",
    "growth",
    "grad.",
    "cosine",
    "bits",
    "room",
)  # 80 columns wide


@dataclass(frozen=True)
class ZooRow:
    """A placement's numbers; NaN where one isn't known or doesn't exist.

    group: the values of further swept keys. v, predicted: the mean square after the last block,
    measured and by theory. growth: its word. gradient, predicted_gradient: rms after the first block
    over that after the last, likewise. cosine: of tokens, at the end. bits: of a branch of the last
    block that a bfloat16 sum keeps. room: powers of 2 between the largest |x| and bfloat16's largest
    number. beyond: True if theory's v is off by more than chance explains. ends: where the curve ends
    before the model does; unpredicted, no_gradient: why theory has no last value or no gradient; or
    empty texts.
    """

    name: str
    group: str
    v: float
    predicted: float
    growth: str
    gradient: float
    cosine: float
    bits: float
    room: float
    predicted_gradient: float = math.nan
    beyond: bool = False
    ends: str = ""
    unpredicted: str = ""
    no_gradient: str = ""


def zoo_rows(jobs: Sequence[SweptJob]) -> list[ZooRow]:
    """A row per job that has a curve of random inits or of theory, by group and then by mean square."""
    rows = []
    for job in jobs:
        for curve in swept_curves([job]):
            if curve.name in ("random", "theory"):
                rows.append(_row(job, curve))
    groups = list(dict.fromkeys(row.group for row in rows))
    return sorted(rows, key=lambda row: (groups.index(row.group), row.v))


def _row(job: SweptJob, curve: SweptCurve) -> ZooRow:
    named = {k: value_text(v) for k, v in job.values.items()}
    own = [
        text for key, text in named.items() if key == "norm_placement" or key.startswith("norm.")
    ]
    others = [text for text in named.values() if text not in own]
    numeric = curve.rows.select_dtypes("number").columns.difference(["sublayer", "block", "seed"])
    steps = curve.rows.groupby(["sublayer", "kind"], sort=False)[list(numeric)].mean()
    steps = steps.reset_index()[: len(curve.steps)]
    steps["block"] = curve.steps["block"].to_numpy()
    first, last = steps.iloc[curve.first], steps.iloc[-1]
    total = curve.summary.get("sublayers") or 2 * curve.model["depth"]
    short_of = int(last["sublayer"]) < total
    eps = float(curve.model["norm"]["eps"])
    return ZooRow(
        ", ".join(own) or curve.norms,
        ", ".join(others),
        float(last["mean_square"]),
        _number(last, "law_mean_field"),
        _word(curve.verdict),
        _number(first, "gradient_rms") / _number(last, "gradient_rms"),
        _number(last, "token_cosine"),
        kept_bits(
            steps[steps["block"] == steps["block"].max()], eps, curve.summary["config"]["dtype"]
        ),
        _LARGEST - math.log2(largest) if (largest := _largest(steps)) > 0 else math.nan,
        _number(first, "law_gradient_rms") / _number(last, "law_gradient_rms"),
        (held := curve.agreement) is not None and held.status in ("near", "fails"),
        f"ends after sublayer {int(last['sublayer'])} of {total}" if short_of else "",
        curve.ends or "",
        (curve.summary.get("mean_field") or {}).get("no_gradient") or "",
    )


def _word(verdict: Mapping[str, Any]) -> str:
    """The word for the growth; of a curve without one, whether it has reached a level."""
    word = str(verdict["shape"])
    level = verdict["fit"].get("level") is not None
    return word if word != "none" else "to a level" if level else "no shape"


def _number(row: pd.Series, column: str) -> float:
    return float(row[column]) if column in row else math.nan


def _largest(steps: pd.DataFrame) -> float:
    return float(steps["max_abs"].max()) if "max_abs" in steps else math.nan


def kept_bits(steps: pd.DataFrame, eps: float, dtype: str = "float32") -> float:
    """8 + log2(rms of the branch / rms of the sum that it goes into): the least of these steps.

    The sum is the stream after the step. Where the step's last norm acts on the sum, the stream is
    g·s/√(m + eps) and the sum's mean square m = eps·c/(1 − c), of c = m/(m + eps), ``eps_factor``.
    """
    found = []
    for _, step in steps.iterrows():
        branch, size = _number(step, "branch_mean_square"), _number(step, "mean_square")
        c, gain = _number(step, "eps_factor"), _number(step, "gain_mean_square")
        if gain > 0 and c > 0 and abs(size / (gain * c) - 1) < NORMED.get(dtype, 1e-2):
            size = eps * c / (1 - c) if c < 1 else math.nan
        if branch > 0 and size > 0:
            found.append(_DIGITS + math.log2(branch / size) / 2)
    return min(found, default=math.nan)


def zoo(jobs: Sequence[SweptJob]) -> str:
    """The table, what its columns are, how far theory is off, and what is missing, in Markdown."""
    rows = zoo_rows(jobs)
    lines = []
    for group in dict.fromkeys(row.group for row in rows):
        of_group = [row for row in rows if row.group == group]
        title = "**What does each norm placement make of a random model's stream?**"
        about = next(job for job in jobs if job.summary is not None)
        lines.append(f"{title} {group or about_model(about)}")
        table = [_HEADS, ["---", *["---:"] * (len(_HEADS) - 1)], *map(_cells, of_group)]
        lines.append("\n".join("| " + " | ".join(row) + " |" for row in table))
    if not rows:
        lines.append("No job has ended with a curve.")
    lines.append(
        "v: the mean square after the last block; theory: its prediction. grad.: the gradient's rms "
        "after the first block over that after the last. cosine: between tokens, the mean after the "
        "last block. bits: of a branch of the last block that its sum keeps in bfloat16, "
        "8 + log2(rms of branch / rms of sum). room: powers of 2 between the largest |x| and "
        "bfloat16's largest number."
    )
    if ended := [f"{in_markdown(row.name)} {row.ends}" for row in rows if row.ends]:
        lines.append(
            f"×: the curve ends early, and the numbers are its last ones: {listed(ended)}."
        )
    lines += _theory(rows)
    return "\n\n".join([*lines, *missing_said(jobs, list(swept_curves(jobs)))]) + "\n"


def about_model(job: SweptJob) -> str:
    """A job's model, init and tokens in a few words."""
    assert job.summary is not None
    config = job.summary["config"]
    model, init = config["model"], config["init"]
    std = f"({init['std']:g})" if init.get("std") is not None else ""
    tokens = " × ".join(map(str, job.summary["tokens"]))
    shape = f"{model['name']}, {model['depth']} blocks of width {model['width']}"
    return f"{shape}, init {init['rule']}{std}, {tokens} tokens."


def _cells(row: ZooRow) -> list[str]:
    numbers = [
        short(row.v) + " ×" * bool(row.ends),
        short(row.predicted),
        row.growth,
        short(row.gradient),
    ]
    numbers += [short(row.cosine, 2), f"{row.bits:.1f}", f"{row.room:.0f}"]
    return [in_markdown(row.name), *(text if text not in ("", "nan") else "–" for text in numbers)]


def _theory(rows: Sequence[ZooRow]) -> list[str]:
    """How far theory is off; and where it has no last value or no gradient, why."""
    v = _off("Theory's v is off", [(row, row.v, row.predicted) for row in rows])
    if v:
        beyond = listed([in_markdown(row.name) for row in rows if row.beyond])
        v += f"; somewhere on the curve it is off beyond chance for {beyond or 'no placement'}."
    ratios = [(row, row.gradient, row.predicted_gradient) for row in rows]
    gradient = _off("Theory's grad. is off", ratios)
    lines = [v, gradient and gradient + "."]
    lines += _without("v", [(row, row.predicted, row.unpredicted) for row in rows])
    unknown = [(row, row.predicted_gradient, row.no_gradient) for row in rows if row.predicted > 0]
    return [line for line in (*lines, *_without("gradient", unknown)) if line]


def _off(start: str, rows: Sequence[tuple[ZooRow, float, float]]) -> str:
    """How far theory is off, of rows with a measured and a predicted number; or an empty text."""
    known = [(row, abs(math.log(p / m))) for row, m, p in rows if p > 0 and m > 0]
    if not known:
        return ""
    median = float(np.median([error for _, error in known]))
    worst, most = max(known, key=lambda each: each[1])
    text = f"{start} by {off_by(median)} in the median of {len(known)} rows"
    return f"{text}, at most by {off_by(most)} ({in_markdown(worst.name)})"


def _without(what: str, rows: Sequence[tuple[ZooRow, float, str]]) -> list[str]:
    """The rows for which theory has no number, by reason."""
    reasons: dict[str, list[str]] = {}
    for row, predicted, reason in rows:
        if reason and math.isnan(predicted):
            reasons.setdefault(reason, []).append(in_markdown(row.name))
    return [f"Theory has no {what} of {listed(names)}: {why}." for why, names in reasons.items()]
