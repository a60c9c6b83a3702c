"""Trained checkpoints, each beside its own random inits: a row of numbers for each (families.csv).

Where few tokens make a checkpoint's mean square, its departure is that of its median token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Any

import numpy as np
import pandas as pd

from simlab.analysis.compare import Departure, departure, of_median_token
from simlab.analysis.massive import most_massive
from simlab.analysis.tokens import largest, skewed, token_place
from simlab.config import printable
from simlab.report.swept import SweptCurve, SweptJob


@dataclass(frozen=True, eq=False)
class Surveyed:
    """A checkpoint and its random inits, from the files of its job. label: what it is called here."""

    label: str
    frame: pd.DataFrame
    summary: Mapping[str, Any]

    @cached_property
    def curves(self) -> dict[str, SweptCurve]:
        """The curves that get through the first block, by name: checkpoint, random (or theory)."""
        groups = self.frame.groupby("curve", sort=False)
        all_of_them = (SweptCurve(str(n), self.summary, rows, self.label) for n, rows in groups)
        return {c.name: c for c in all_of_them if (c.steps["block"] == 0).any()}

    @property
    def depth(self) -> int:
        """Its blocks."""
        return int(self.summary["config"]["model"]["depth"])

    @property
    def about(self) -> Mapping[str, str]:
        """How it was read, as ``Checkpoint.about``."""
        found: Mapping[str, str] = self.summary["checkpoint"]
        return found

    @property
    def read(self) -> str:
        """``native, bfloat16``, ``streamed, float16`` or ``GGUF, Q4_1``."""
        how = "native" if self.about["computed_by"] == "simlab" else "streamed"
        return f"{'GGUF' if self.about['format'] == 'gguf' else how}, {self.about['stored_in']}"

    @property
    def guess(self) -> bool:
        """True if the random inits' init is a guess: neither its files nor the user says it."""
        return self.about["init"] == "a guess" and "init_origin" in self.summary

    @cached_property
    def few(self) -> bool:
        """True if few tokens make the checkpoint's mean square, so that its median token is told."""
        return skewed(self.frame)

    @cached_property
    def left(self) -> Departure | None:
        """Where it leaves its random inits' band, None with too few of them."""
        return departure(of_median_token(self.frame) if self.few else self.frame)

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The checkpoint's steps."""
        return self.frame[self.frame["curve"] == "checkpoint"]

    def grown(self, name: str, column: str = "mean_square") -> float:
        """A curve's value after the last block over that after the first; NaN where there is none."""
        curve = self.curves.get(name)
        if curve is None or column not in curve.steps:
            return float("nan")
        values = curve.steps[column]
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.float64(values.iloc[-1]) / values[curve.first])

    @property
    def inits(self) -> str:
        """The curves of its random inits: measured, predicted, or none."""
        return next((name for name in ("random", "theory") if name in self.curves), "")

    def row(self) -> dict[str, Any]:
        """Its row of families.csv: sizes without a unit, blocks from 1."""
        seeds = self.frame.loc[self.frame["curve"] == "random", "seed"].nunique()
        left, held = self.left, self.curves[self.inits].agreement if self.inits else None
        law = "mean_square" if self.inits == "theory" else "law_mean_field"
        return {
            "checkpoint": self.label,
            "path": self.summary["config"]["source"]["path"],
            **{key: text for key, text in self.about.items() if key != "init"},
            "read": self.read,
            "init_is_a_guess": self.guess,
            "depth": self.depth,
            "parameters": self.summary["parameters"],
            "seeds": seeds,
            "growth_random": self.grown("random"),
            "growth_theory": self.grown(self.inits, law),
            "theory": held.status if held else None,
            "theory_error": held.log_error if held else None,
            "growth_trained": self.grown("checkpoint"),
            "growth_median": self.grown("checkpoint", "mean_square_median"),
            "ratio": left.ratio if left else None,
            "ratio_of": "median" if self.few else "mean",
            "leaves_sublayer": left.sublayer if left else None,
            "leaves_block": _block(left.block) if left and left.sublayer is not None else None,
            **self._massive(),
        }

    def _massive(self) -> dict[str, Any]:
        """Massive activations: how many steps, from which block to which, the largest and its token."""
        rows, tokens = self.rows, self.summary["tokens"]
        top, among = most_massive(rows), rows[rows["massive"] == 1]
        found: dict[str, Any] = {"massive_steps": len(among)}
        found |= {"max_abs": float(top["max_abs"]), "median_abs": float(top["median_abs"])}
        if among.empty:
            return found
        token, every = (v[rows.index.get_loc(top.name)] for v in largest(rows, *tokens))
        whole = bool(every and tokens[0] > 1)
        return found | {
            "massive_from": _block(among.iloc[0]["block"]),
            "massive_to": _block(among.iloc[-1]["block"]),
            "massive_token": token_place(int(token), whole, *tokens),
        }


def _block(block: Any) -> int:
    """A block from 1; 0 is the embedding."""
    return 0 if block is None or pd.isna(block) else int(block) + 1


def surveyed(jobs: Sequence[SweptJob]) -> list[Surveyed]:
    """The checkpoints of the jobs that have ended with a curve of theirs, by names that differ."""
    done = [
        (each, each.frame, each.summary)
        for each in jobs
        if each.frame is not None and each.summary is not None and "checkpoint" in each.summary
    ]
    paths = [str(summary["config"]["source"]["path"]) for _, _, summary in done]
    revisions = [summary["config"]["source"]["revision"] for _, _, summary in done]
    found = []
    for name, (_, frame, summary) in zip(told_apart(paths, revisions), done, strict=True):
        one = Surveyed(name, frame, summary)
        if "checkpoint" in one.curves:
            found.append(one)
    return found


def told_apart(paths: Sequence[str], revisions: Sequence[str | None]) -> list[str]:
    """The last part of each path, and as many before it as tell them apart; of equal ones numbers."""
    parts = [PurePath(path).parts for path in paths]
    for count in range(1, max(map(len, parts), default=1) + 1):
        told = ["/".join(p[-count:]).removesuffix(".gguf") for p in parts]
        told = [t if r is None else f"{t}@{r}" for t, r in zip(told, revisions, strict=True)]
        if len(set(told)) == len(told):
            return told
    return [f"{name} ({number})" for number, name in enumerate(told)]


@dataclass(frozen=True, eq=False)
class Survey:
    """Checkpoints, at least one. table: the rows of families.csv. failed: a line per failed job."""

    members: Sequence[Surveyed]
    table: pd.DataFrame
    failed: Sequence[str]

    @property
    def records(self) -> list[dict[str, Any]]:
        """The table's rows."""
        return [{str(k): v for k, v in row.items()} for row in self.table.to_dict("records")]


def survey(jobs: Sequence[SweptJob]) -> Survey | None:
    """The checkpoints of a sweep's jobs; None where none was measured."""
    members = surveyed(jobs)
    failed = [line for job in jobs if (line := _failed(job))]
    table = pd.DataFrame([member.row() for member in members])
    return Survey(members, table, failed) if members else None


def _failed(job: SweptJob) -> str:
    """Why a job has no curve, in a line; empty where it has one, or isn't finished."""
    who = " ".join(str(value) for value in job.values.values() if value is not None)
    named = job.error if who in job.error else f"{who}: {job.error}"
    return f"Not measured: {printable(named)}" if job.error else ""
