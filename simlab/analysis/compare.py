"""A checkpoint beside random inits of its shape: where it leaves them, how far, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from simlab.analysis.resampling import MIN_SEEDS, t_quantile
from simlab.theory.laws import Array

OUTSIDE = 0.99  # the share of random inits within the prediction interval
MASSIVE, TIMES_MEDIAN = 100.0, 1000.0  # Sun et al. 2024 (arXiv 2402.17762), §2


@dataclass(frozen=True)
class Split:
    """A curve's growth of the mean square as the two sums of Δ‖x‖²/d = ‖b‖²/d + 2⟨x, b⟩/d."""

    branches: float
    alignment: float


@dataclass(frozen=True)
class Departure:
    """Where a checkpoint's mean square leaves the random inits', and the two terms of its growth.

    first: the first sublayer outside, or None. sublayer, block (from 0), kind: the step from which on
    all are outside, or None. last: the last sublayer that every curve reaches. ratio: the mean square
    there over the random inits' mean. growth: the mean square there less the first one.
    """

    first: int | None
    sublayer: int | None
    block: int | None
    kind: str | None
    ratio: float
    growth: float
    last: int
    checkpoint: Split | None
    random: Split | None


def outside(value: Array, seeds: Array) -> np.ndarray:
    """True for each entry of a curve (R,) that random inits (S, R), S ≥ 2, don't explain.

    Such an entry lies beyond all seeds and beyond the OUTSIDE prediction interval for one more draw of
    ln v: mean ± t·s·√(1 + 1/S), t Student's with S − 1 degrees of freedom (Gaussian ln v).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        log_value, logs = np.log(value), np.log(seeds)
        count = len(seeds)
        reach = t_quantile((1 + OUTSIDE) / 2, count - 1) * np.sqrt(1 + 1 / count)
        far = np.abs(log_value - logs.mean(0)) > reach * logs.std(0, ddof=1)
    return far & ((value > seeds.max(0)) | (value < seeds.min(0)))


def with_outside(frame: pd.DataFrame) -> pd.DataFrame:
    """Add the column ``outside``: of a checkpoint's steps 1 where it is outside the random inits.

    Empty for random inits, with fewer than MIN_SEEDS of them, and beyond the shortest's end.
    """
    frame = frame.assign(outside=np.nan)
    rows = frame[frame["curve"] == "checkpoint"]
    drawn = frame[frame["curve"] == "random"]
    if rows.empty or drawn["seed"].nunique() < MIN_SEEDS:
        return frame
    step = drawn.groupby("seed").cumcount()
    table = drawn.assign(step=step).pivot(index="seed", columns="step", values="mean_square")
    seeds = table.dropna(axis=1).to_numpy(np.float64)
    length = min(len(rows), seeds.shape[1])
    value = rows["mean_square"].to_numpy(np.float64)[:length]
    frame.loc[rows.index[:length], "outside"] = outside(value, seeds[:, :length]).astype(float)
    return frame


def departure(frame: pd.DataFrame) -> Departure | None:
    """Compare a run's checkpoint with its random inits, once ``with_outside`` has marked it."""
    rows = frame[(frame["curve"] == "checkpoint") & frame["outside"].notna()]
    drawn = frame[frame["curve"] == "random"]
    if len(rows) < 2:
        return None
    away = rows["outside"].to_numpy() == 1
    inside = np.flatnonzero(~away)
    good = int(inside[-1]) + 1 if len(inside) else 0
    at = rows.iloc[good] if good < len(rows) else None
    last = rows.iloc[-1]
    beside = drawn[(drawn["sublayer"] == last["sublayer"]) & (drawn["kind"] == last["kind"])]
    return Departure(
        first=int(rows["sublayer"].to_numpy()[away][0]) if away.any() else None,
        sublayer=None if at is None else int(at["sublayer"]),
        block=None if at is None or pd.isna(at["block"]) else int(at["block"]),
        kind=None if at is None else str(at["kind"]),
        ratio=float(last["mean_square"] / beside["mean_square"].mean()),
        growth=float(last["mean_square"] - rows.iloc[0]["mean_square"]),
        last=int(last["sublayer"]),
        checkpoint=split(rows),
        random=split(drawn[drawn.groupby("seed").cumcount() < len(rows)]),
    )


def split(rows: pd.DataFrame) -> Split | None:
    """Sum the two terms over a curve's sublayers (the seeds' mean); None if they aren't its growth.

    They aren't where the stream changes between the adds: post and deepnorm norm the sum, a re-norm
    or a residual scale changes its size.
    """
    width = float((rows["delta_branch"] / rows["branch_mean_square"]).median())
    by_seed = rows.groupby("seed")
    branches, alignment = (by_seed[c].sum().mean() / width for c in ("delta_branch", "delta_cross"))
    grown = float((by_seed["mean_square"].last() - by_seed["mean_square"].first()).mean())
    # Each add rounds the stream, in bfloat16 by up to 2⁻⁹ of its size, up or down; a norm or a scale on
    # the stream is off by as much as the terms themselves.
    if not abs(branches + alignment - grown) <= 2**-9 * (branches + abs(alignment)):
        return None
    return Split(float(branches), float(alignment))


def massive(frame: pd.DataFrame) -> pd.Series:
    """True if a step has massive activations: max|x| > 100 and at least 1000 times the median |x|."""
    high = frame["max_abs"] > MASSIVE
    return (high & (frame["max_abs"] >= TIMES_MEDIAN * frame["median_abs"])).astype(int)


def _where(left: Departure, whole: bool) -> str:
    if left.first is None:
        return "stays within the random inits' band"
    if left.ratio in (0, math.inf):
        side = f"far {'above' if left.ratio else 'below'}"
    else:
        side = f"{left.ratio:.3g}× above" if left.ratio > 1 else f"{1 / left.ratio:.3g}× below"
    if left.sublayer is None:
        return f"leaves the random inits' band at sublayer {left.first}, and ends within it"
    step = "the embedding"
    if left.block is not None:
        step = f"sublayer {left.sublayer} ({left.kind} of block {left.block + 1})"
    again = f" for good (first at sublayer {left.first})" if left.first != left.sublayer else ""
    end = "ends" if whole else f"at sublayer {left.last}, before a curve overflows, is"
    return f"leaves the random inits' band at {step}{again} and {end} {side} them"


def sentences(left: Departure | None, frame: pd.DataFrame) -> list[str]:
    """Sentences that compare a checkpoint with random inits."""
    lines = []
    rows = frame[frame["curve"] == "checkpoint"]
    seeds = frame.loc[frame["curve"] == "random", "seed"].nunique()
    if 0 < seeds < MIN_SEEDS:
        inits = "1 random init is" if seeds == 1 else f"{seeds} random inits are"
        lines.append(
            f"{inits} too few to tell where the checkpoint leaves them ({MIN_SEEDS} needed)."
        )
    if left is not None:
        whole = left.last == rows["sublayer"].max()
        lines.append(f"The checkpoint {_where(left, whole)}.")
        if left.checkpoint is not None:
            beside = ""
            if left.random is not None:
                drawn = left.random
                beside = f" (random inits: {drawn.branches:.3g} and {drawn.alignment:.3g})"
            lines.append(
                f"Of its growth by {left.growth:.3g}, {left.checkpoint.branches:.3g} is the size of"
                f" branches, ‖b‖², and {left.checkpoint.alignment:.3g} their alignment with the"
                f" stream, 2⟨x, b⟩{beside}."
            )
    if rows.empty:  # it overflowed at the embedding
        return lines
    top = rows.sort_values("max_abs", kind="stable").iloc[-1]
    times = top["max_abs"] / top["median_abs"] if top["median_abs"] else math.inf
    size = f"max |x| = {top['max_abs']:.3g}, {times:.3g}× the median |x|"
    size += f", at sublayer {top['sublayer']}"
    count = int(rows["massive"].sum())
    lines.append(
        f"Massive activations at {count} of {len(rows)} steps ({size})."
        if count
        else f"No massive activations ({size})."
    )
    return lines
