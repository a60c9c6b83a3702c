"""A sweep's curves as a written answer speaks of them: a kind of curve of a job, its seeds' means."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from simlab.analysis.agreement import Agreement
from simlab.analysis.decision import UNDECIDED
from simlab.analysis.numbers import off_by, power_of_ten, short
from simlab.config import printable
from simlab.config.title import norm_name

MEANS = (
    "norm", "mean", "mean_abs", "variance", "mean_square", "mean_square_median", "law_mean_field",
)  # fmt: skip


@dataclass(frozen=True)
class SweptJob:
    """How a job of a sweep ended: with a curve.csv and a summary.json, or with an error, or not yet.

    values: of the swept keys.
    """

    values: Mapping[str, Any]
    error: str = ""
    frame: pd.DataFrame | None = None
    summary: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class SweptCurve:
    """One kind of curve of a job, as the means over its seeds after each step that all reach.

    name: random, theory or checkpoint. called: its label, by default after its model.
    """

    name: str
    summary: Mapping[str, Any]
    rows: pd.DataFrame
    called: str = ""

    @property
    def stored(self) -> bool:
        """True if the job has a checkpoint."""
        return bool(self.summary["config"]["source"]["kind"] != "random")

    @property
    def model(self) -> Mapping[str, Any]:
        """The shape in the job's config."""
        found: Mapping[str, Any] = self.summary["config"]["model"]
        return found

    @property
    def label(self) -> str:
        """``7B`` for olmo2_7b; other models by their names."""
        name = self.called or str(self.model["name"])
        size = re.fullmatch(r"olmo2_(\d+b)", name)
        return size[1].upper() if size else name

    @property
    def norms(self) -> str:
        """The choice of norm, and the formulas of ``custom``."""
        name, own = norm_name(self.model["norm"])
        return " ".join([name, *(str(own[key]) for key in ("update", "mlp_update") if key in own)])

    @property
    def verdict(self) -> Mapping[str, Any]:
        """Its verdict in the summary."""
        found: Mapping[str, Any] = self.summary["verdict"][self.name]
        return found

    @property
    def exponents(self) -> Mapping[str, Any]:
        """Its λ's in the summary."""
        found: Mapping[str, Any] = self.summary["lambda"][self.name]
        return found

    @cached_property
    def steps(self) -> pd.DataFrame:
        """A row per step: means over seeds of MEANS, and the seeds' least and largest mean."""
        groups = self.rows.groupby(["sublayer", "kind"], sort=False)
        known = {column: (column, "mean") for column in MEANS if column in self.rows}
        extremes = {"low": ("mean", "min"), "high": ("mean", "max")} if "mean" in known else {}
        steps = groups.agg(block=("block", "first"), count=("seed", "count"), **known, **extremes)
        steps = steps.reset_index().astype({"block": float})
        return steps[steps["count"] == steps["count"].max()].reset_index(drop=True)

    @property
    def resets(self) -> list[int]:
        """The rows of re-norms; the row before each is a peak."""
        return np.flatnonzero(self.steps["kind"] == "renorm").tolist()

    @property
    def first(self) -> int:
        """The row of the first block's end."""
        return int(np.flatnonzero(self.steps["block"] == 0)[-1])

    @property
    def top(self) -> int:
        """The row that is spoken of: the largest peak of a saw-tooth, else the last row."""
        peaks = [row - 1 for row in self.resets]
        v = self.steps["mean_square"]
        return max(peaks, key=lambda row: v[row]) if peaks else len(v) - 1

    def cell(self, column: str) -> str:
        """From the first block's end to the last; of a saw-tooth peaks, and what re-norms set."""
        if column not in self.steps or self.steps[column].isna().all():
            return "–"
        values = self.steps[column]
        before, after = [self.first], [len(values) - 1]
        if self.resets:
            before, after = [row - 1 for row in self.resets], self.resets
        return f"{span(values[before])} → {span(values[after]) or '–'}"

    def mean_cell(self) -> str:
        """The mean at that end (of a saw-tooth: at peaks), the seeds' least and largest."""
        if "mean" not in self.steps:
            return "–"
        rows = [row - 1 for row in self.resets] or [len(self.steps) - 1]
        low, high = self.steps["low"][rows].min(), self.steps["high"][rows].max()
        return span(pd.Series([low, high]), digits=2)

    def claims(self) -> tuple[str, str, str]:
        """Three texts: the mean square by √2 per sublayer, by 2·√2 per layer, and the measured one.

        At ``top``, from the last re-norm before it, or from the embedding.
        """
        v, kinds = self.steps["mean_square"], self.steps["kind"]
        since = max((row for row in self.resets if row < self.top), default=0)
        start = math.log10(v[since]) if v[since] > 0 else -math.inf
        blocks = int((kinds[since + 1 : self.top + 1] == "mlp").sum())
        said = (start + 2 * blocks * math.log10(2), start + blocks * math.log10(8))
        sqrt2, layer = ("0" if math.isinf(x) else power_of_ten(x) for x in said)
        return sqrt2, layer, short(v[self.top])

    def law(self, name: str) -> Mapping[str, Any]:
        """A law's fit: its status and log_error, None for one that isn't about this placement."""
        found: Mapping[str, Any] = self.summary["theories"][self.name][name]
        return found

    @property
    def ends(self) -> str | None:
        """``ends_of`` its job."""
        return ends_of(self.summary)

    @property
    def agreement(self) -> Agreement | None:
        """How it agrees with theory; None where nothing is predicted."""
        held = self.verdict.get("theory")
        return Agreement(**held) if held and held["largest"] is not None else None


def ends_of(summary: Mapping[str, Any]) -> str | None:
    """Why a job's predicted curve ends before the model, or why there is none; None for a whole one."""
    return (summary.get("mean_field") or {}).get("ends")


def span(values: pd.Series, digits: int = 3) -> str:
    """``12 to 13.1``: the least and the largest value, one where both are written alike."""
    low, high = (short(float(value), digits) for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def swept_curves(jobs: Sequence[SweptJob]) -> Iterator[SweptCurve]:
    """The curves of the jobs that have ended, but those that overflow within their first block."""
    for each in jobs:
        if each.frame is None or each.summary is None:
            continue
        for name, rows in each.frame.groupby("curve", sort=False):
            curve = SweptCurve(str(name), each.summary, rows)
            if (curve.steps["block"] == 0).any():
                yield curve


def in_markdown(text: str) -> str:
    """A text for Markdown, where the stars of a formula would be marks: then as code."""
    return f"`{text}`" if "*" in text else text


def around_text(summary: Mapping[str, Any]) -> str:
    """`` with \\<s> first``: the special tokens around a job's text, in Markdown; or nothing."""
    special = str(summary.get("special_tokens") or "")
    return f" with {special}".replace("<", "\\<") if special else ""


def listed(texts: Sequence[str]) -> str:
    """``A, B and C``."""
    return " and ".join(([", ".join(texts[:-1])] if texts[:-1] else []) + list(texts[-1:]))


def of_each(
    curves: Sequence[SweptCurve], text_of: Callable[[SweptCurve], str], whole: bool = False
) -> str:
    """``1.99 (7B and 13B) and 2 (32B)``: a text of each curve, equal ones once.

    whole: a text of them all needs no labels.
    """
    labels: dict[str, list[str]] = {}
    for curve in curves:
        labels.setdefault(text_of(curve), []).append(curve.label)
    if len(labels) == 1 and whole:
        return next(iter(labels))
    return listed([f"{text} ({listed(names)})" for text, names in labels.items()])


STATUSES = {
    "agrees": "is what is measured, to chance; largest departure of the mean square: {}",
    "near": "is near, but beyond chance off by {}",
    "chance": f"is {UNDECIDED}, off by {{}}, which may be chance",
    "fails": "fails, off by {}",
}


def theory_said(curves: Sequence[SweptCurve]) -> Iterator[str]:
    """How theory agrees with what is measured; where its curve is short or missing, why."""
    held: dict[str, list[str]] = {}
    missing: dict[tuple[str, str], list[str]] = {}
    for c in curves:
        who = c.label if c.norms in c.label.split() else f"{c.label} {in_markdown(c.norms)}"
        found = c.agreement
        if found:
            size = off_by(found.log_error)
            held.setdefault(STATUSES[found.status], []).append(f"{size} ({who})")
        if c.ends:
            known = "ends before the model" if found or c.name == "theory" else "has no curve"
            missing.setdefault((known, c.ends), []).append(who)
    said = [words.format(listed(who)) for words, who in held.items()]
    said += [f"{known} for {listed(who)}: {why}" for (known, why), who in missing.items()]
    if said:
        yield (
            "**Theory**, a mean-field recursion that is given the config and the tokens alone, "
            f"{'. It '.join(said)}."
        )


def missing_said(jobs: Sequence[SweptJob], curves: Sequence[SweptCurve]) -> Iterator[str]:
    """A paragraph on the jobs that gave no curve, if there are any: which, and why."""
    texts = []
    for each in jobs:
        if each.summary is None:
            who = " ".join(in_markdown(str(v)) for v in each.values.values() if v is not None)
            texts.append(f"{who} ({printable(each.error) or 'not finished'})")
        elif not any(c.summary is each.summary for c in curves):
            ends = ends_of(each.summary) if each.summary["engine"] == "theory" else None
            why = f"theory: {ends}" if ends else "its curves overflow at once"
            texts.append(f"{each.summary['config']['model']['name']} ({why})")
    if texts:
        yield f"**Missing here:** {'; '.join(texts)}."
