"""Massive activations: which token jumps where, by how much, and where it is erased.

Of each step curve.csv knows the largest token (``mean_square_max``, ``max_token``) and position 0
(``mean_square_first``): a token that jumps in the shadow of a larger one isn't seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from simlab.analysis.numbers import short
from simlab.analysis.tokens import largest, token_place

MASSIVE, TIMES_MEDIAN = 100.0, 1000.0  # Sun et al. 2024 (arXiv 2402.17762), §2
# How much more than the median token's a token's mean square must grow at a step to be told as a jump.
# One entry of 1000 medians makes the mean square of d Gaussian ones 4.5e5/d times as large, at width
# 4096 110 times. Random inits with norms (12 placements, all inits, 48 tokens) have steps of up to 18.
JUMP = 30.0
# The token itself must change by as much at least: where the median alone grows, nothing falls.
OWN = 10.0
TOLD = 4  # tokens in a sentence each


@dataclass(frozen=True)
class Change:
    """A step at which the largest token's mean square jumps or falls, by far more than the median's.

    sublayer, block (from 0), kind: the step. sequence, position: the token, from 0. every: position 0
    of every sequence does it, if there are several. factor: after/before, of that token. bound: another
    token was the largest before (of a fall: after), so the factor is at least (at most) that. median:
    the median token's factor. massive: there are massive activations after the step.
    """

    sublayer: int
    block: int | None
    kind: str
    sequence: int
    position: int
    every: bool
    factor: float
    bound: bool
    median: float
    massive: bool

    @property
    def token(self) -> tuple[int, int, bool]:
        """The token's identity; position 0 of all sequences counts as one token if ``every``."""
        return (0 if self.every else self.sequence, self.position, self.every)

    @property
    def falls(self) -> bool:
        """True if the token falls, False if it jumps."""
        return self.factor < self.median

    @property
    def size(self) -> str:
        """``5458-fold``, ``at least 12-fold``: how far it jumps or falls."""
        fold = 1 / self.factor if self.falls and self.factor else self.factor
        return f"{'at least ' if self.bound else ''}{short(fold)}-fold"


def massive(frame: pd.DataFrame) -> pd.Series:
    """1 if a step has massive activations (max|x| > 100, and at least 1000 × the median |x|), or 0."""
    high = frame["max_abs"] > MASSIVE
    return (high & (frame["max_abs"] >= TIMES_MEDIAN * frame["median_abs"])).astype(int)


def most_massive(rows: pd.DataFrame) -> pd.Series:
    """The step with the largest |x| of those with massive activations; of all, where none has them."""
    among = rows[rows["massive"] == 1] if (rows["massive"] == 1).any() else rows
    return among.sort_values("max_abs", kind="stable").iloc[-1]


@np.errstate(divide="ignore", invalid="ignore")
def token_changes(rows: pd.DataFrame, sequences: int, length: int) -> list[Change]:
    """The jumps and falls of a curve with massive activations, in the order of its steps.

    rows: all steps of one curve. sequences, length: the batch's shape.
    """
    if not rows["massive"].any():
        return []
    by_name = {n: rows[f"mean_square_{n}"].to_numpy(np.float64) for n in ("max", "median", "first")}
    token, every = largest(rows, sequences, length)
    ratio = {name: value[1:] / value[:-1] for name, value in by_name.items()}
    found = []
    for k, (_, step) in enumerate(rows.iloc[1:].iterrows()):
        median = ratio["median"][k]
        for of, other in ((k + 1, k), (k, k + 1)):  # the largest token after the step, and before
            same = token[of] == token[other]
            factor = ratio["first" if every[of] and not same else "max"][k]
            beyond = factor / median if of > other else median / factor
            own = (
                factor if of > other else 1 / factor
            )  # by how much the token itself jumps or falls
            if beyond >= JUMP and OWN <= own < math.inf:
                sequence, position = divmod(int(token[of]), length)
                found.append(
                    Change(
                        int(step["sublayer"]), None if pd.isna(step["block"]) else int(step["block"]),
                        str(step["kind"]), sequence, position, bool(every[of] and sequences > 1),
                        float(factor), not (same or every[of]), float(median),
                        bool(step["massive"]),
                    )
                )  # fmt: skip
                break
    return found


def place(sublayer: int, block: int | None, kind: str) -> str:
    """``sublayer 24 (the MLP of block 12)``, the block counted from 1; or the embedding, a re-norm."""
    if block is None:
        return f"the {kind}"
    if kind == "renorm":
        return f"the re-norm after block {block + 1}"
    return f"sublayer {sublayer} (the {'MLP' if kind == 'mlp' else kind} of block {block + 1})"


def massive_sentences(rows: pd.DataFrame, sequences: int, length: int, whole: bool) -> list[str]:
    """Sentences on a curve's massive activations, if it has any.

    rows, sequences, length: as in ``token_changes``. whole: False if the curve ends early.
    """
    top = most_massive(rows)
    times = top["max_abs"] / top["median_abs"] if top["median_abs"] else math.inf
    size = f"{short(top['max_abs'])}, {short(times)}× the median |x|, at sublayer {top['sublayer']}"
    count = int(rows["massive"].sum())
    if not count:
        return [f"No massive activations (max |x| = {size})."]
    lines = [f"Massive activations at {count} of {len(rows)} steps (the largest: |x| = {size})."]
    stories: list[list[Change]] = []  # a token's jumps, then its falls
    for change in token_changes(rows, sequences, length):
        story = stories[-1] if stories else []
        if story and story[-1].token == change.token and story[-1].falls <= change.falls:
            story.append(change)
        else:
            stories.append([change])
    if not stories or rows.iloc[0]["massive"]:
        lines.append(_at_first(rows, sequences, length, whole))
    for i, story in enumerate(stories[:TOLD]):
        lines.append(_story(story, sequences, length))
        if i + 1 == len(stories) and not story[-1].falls:
            lines[-1] += _end(rows, sequences, length, story[-1], whole)
        lines[-1] += "."
    if len(stories) > TOLD:
        lines.append(f"{len(stories) - TOLD} more such changes follow.")
    if not stories:
        lines.append(_no_jump(rows))
    return lines


def _story(story: Sequence[Change], sequences: int, length: int) -> str:
    """A token's jumps and falls, in one sentence without its full stop."""
    first = story[0]
    at = token_place(first.sequence * length + first.position, first.every, sequences, length)
    who = f"P{at[1:]}" if first.every else f"The token at {at}"
    jumps = [change for change in story if not change.falls]
    said = []
    for change in story:
        where = place(change.sublayer, change.block, change.kind)
        if change.falls and change is story[-1] and not change.massive:
            said.append(f"is erased at {where}, where it falls {change.size}")
        else:
            said.append(f"{'falls' if change.falls else 'jumps'} {change.size} at {where}")
        if change in jumps[-1:]:
            said[-1] += f", where the median token's factor is {short(change.median)}"
    *before, last = said
    return f"{who} {', '.join(before)}{', and ' if before else ''}{last}"


def _end(rows: pd.DataFrame, sequences: int, length: int, jump: Change, whole: bool) -> str:
    """How a token that nothing erases goes on after its last jump."""
    last = rows.iloc[-1]
    if not last["massive"]:
        after = rows.loc[rows["massive"] == 1, "sublayer"].iloc[-1]
        return f"; after sublayer {after} no activation is massive any more"
    token, every = (values[-1] for values in largest(rows, sequences, length))
    if not (every if jump.every else divmod(token, length) == (jump.sequence, jump.position)):
        return ""
    return f", and stays the largest {_until(rows, whole)}"


def _until(rows: pd.DataFrame, whole: bool) -> str:
    end = "to the end, sublayer" if whole else "until the curve ends at sublayer"
    return f"{end} {rows.iloc[-1]['sublayer']}"


@np.errstate(divide="ignore", invalid="ignore")
def _at_first(rows: pd.DataFrame, sequences: int, length: int, whole: bool) -> str:
    """The sentence that names the largest token of the first step with massive activations."""
    k = int((rows["massive"] == 1).to_numpy().argmax())
    first = rows.iloc[k]
    block = None if pd.isna(first["block"]) else int(first["block"])
    where = place(int(first["sublayer"]), block, str(first["kind"]))
    token, every = largest(rows, sequences, length)
    whole_column = bool(every[k] and sequences > 1)
    at = token_place(int(token[k]), whole_column, sequences, length)
    text = f"At {where}, the first step with them, {at if whole_column else f'the token at {at}'}"
    text += " is the largest"
    times = float(np.float64(first["mean_square_max"]) / first["mean_square_median"])
    if math.isfinite(times):
        text += f", its mean square {short(times)} times the median token's"
    stays = every[k:].all() if whole_column else (token[k:] == token[k]).all()
    if stays and k + 1 < len(rows):
        text += f"; it stays the largest {_until(rows, whole)}"
    return text + "."


@np.errstate(divide="ignore", invalid="ignore")
def _no_jump(rows: pd.DataFrame) -> str:
    """The sentence for massive activations that no jump of a token's mean square explains."""
    beside = (rows["mean_square_max"] / rows["mean_square_median"]).to_numpy(np.float64)
    ratio = np.nan_to_num(beside[1:] / beside[:-1], posinf=0.0)
    text = "No token jumps at one step"
    if len(ratio) and ratio.max() > 1:
        step = rows.iloc[int(ratio.argmax()) + 1]
        block = None if pd.isna(step["block"]) else int(step["block"])
        where = place(int(step["sublayer"]), block, str(step["kind"]))
        text += (
            f": the largest grows at most {short(ratio.max())} times as much as the median token"
        )
        text += f", at {where}"
    return text + "."
