"""A checkpoint beside random inits of its shape: where it leaves them, how far, and why."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pandas as pd

from simlab.analysis.curve import GIVEN, basis, given_in
from simlab.analysis.massive import massive_sentences, place
from simlab.analysis.numbers import beside, short
from simlab.analysis.resampling import MIN_SEEDS, t_quantile
from simlab.analysis.tokens import skewed, token_apart
from simlab.theory.laws import Array
from simlab.theory.mean_field import Prediction

OUTSIDE = 0.99  # the share of random inits within the prediction interval
ALIGNED = 0.05  # from which share of its branches' size on a curve's alignment is called one


@dataclass(frozen=True)
class Split:
    """A curve's growth of the mean square as the two sums of Δ‖x‖²/d = ‖b‖²/d + 2⟨x, b⟩/d.

    Of several seeds the mean. low, high: the seeds' smallest and largest alignment.
    """

    branches: float
    alignment: float
    low: float
    high: float


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


def outside_prediction(value: Array, theory: Prediction) -> np.ndarray:
    """True for each entry of a curve (R,) beyond the OUTSIDE interval of predicted random inits.

    ln mean ± z·band/mean (Gaussian ln v), and the prediction's own error more. R: at most its rows.
    """
    mean, band = (theory.column(name, len(value)) for name in ("mean_square", "band"))
    reach = NormalDist().inv_cdf((1 + OUTSIDE) / 2) * band / mean + theory.accuracy
    with np.errstate(divide="ignore"):
        far: np.ndarray = np.abs(np.log(value / mean)) > reach
    return far


def with_outside(frame: pd.DataFrame, theory: Prediction | None = None) -> pd.DataFrame:
    """Add the column ``outside``: of a checkpoint's steps 1 where it is outside the random inits.

    Empty for random inits, with fewer than MIN_SEEDS of them, and beyond the shortest's end. theory: a
    predicted curve that stands in place of measured ones.
    """
    frame = frame.assign(outside=np.nan)
    rows = frame[frame["curve"].isin(GIVEN)]
    drawn = frame[frame["curve"] == "random"]
    if theory is not None:
        index = rows.index[: len(theory.rows)]
        value = rows.loc[index, "mean_square"].to_numpy(np.float64)
        frame.loc[index, "outside"] = outside_prediction(value, theory).astype(float)
        return frame
    if rows.empty or drawn["seed"].nunique() < MIN_SEEDS:
        return frame
    step = drawn.groupby("seed").cumcount()
    table = drawn.assign(step=step).pivot(index="seed", columns="step", values="mean_square")
    seeds = table.dropna(axis=1).to_numpy(np.float64)
    length = min(len(rows), seeds.shape[1])
    value = rows["mean_square"].to_numpy(np.float64)[:length]
    frame.loc[rows.index[:length], "outside"] = outside(value, seeds[:, :length]).astype(float)
    return frame


def of_median_token(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with the median token's mean square in place of the mean over tokens, and ``outside``.

    A predicted curve has the mean alone: it keeps it, and nothing is outside of it.
    """
    median = frame["mean_square_median"].fillna(frame["mean_square"])
    return with_outside(frame.assign(mean_square=median))


def departure(frame: pd.DataFrame) -> Departure | None:
    """Compare a run's checkpoint with its random inits, once ``with_outside`` has marked it."""
    rows = frame[frame["curve"].isin(GIVEN) & frame["outside"].notna()]
    drawn = frame[frame["curve"] == basis(frame)]
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


def end_ratio(frame: pd.DataFrame) -> tuple[float, int]:
    """A checkpoint's mean square over the random inits' mean at the last sublayer that all reach.

    Also that sublayer. NaN where there is none of both.
    """
    ends = frame.groupby(["curve", "seed"])["sublayer"].max()
    rows = frame[frame["sublayer"] == int(ends.min())]
    rows = rows[rows["kind"] == rows["kind"].iloc[-1]]  # a re-norm comes after its sublayer
    mean = rows.groupby("curve")["mean_square"].mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.float64(mean[given_in(frame)]) / mean[basis(frame)]
    return float(ratio), int(ends.min())


def split(rows: pd.DataFrame) -> Split | None:
    """Sum the two terms over a curve's sublayers (the seeds' mean); None if they aren't its growth.

    They aren't where the stream changes between the adds: post and deepnorm norm the sum, a re-norm
    or a residual scale changes its size.
    """
    width = float((rows["delta_branch"] / rows["branch_mean_square"]).median())
    by_seed = rows.groupby("seed")
    branches = by_seed["delta_branch"].sum().mean() / width
    alignments = by_seed["delta_cross"].sum() / width
    alignment = alignments.mean()
    grown = float((by_seed["mean_square"].last() - by_seed["mean_square"].first()).mean())
    # Each add rounds the stream, in bfloat16 by up to 2⁻⁹ of its size, up or down; a norm or a scale on
    # the stream is off by as much as the terms themselves.
    if not abs(branches + alignment - grown) <= 2**-9 * (branches + abs(alignment)):
        return None
    extremes = float(alignments.min()), float(alignments.max())
    return Split(float(branches), float(alignment), *extremes)


def _where(left: Departure, end: str) -> str:
    """The clause that says where the checkpoint leaves. end: empty for a curve that is whole."""
    if left.first is None:
        return f"stays within the random inits' band{f' until {end}' if end else ''}"
    if left.sublayer is None:
        back = f"is back inside when {end}" if end else "ends within it"
        return f"leaves the random inits' band at {_step(left.first)}, and {back}"
    side = beside(left.ratio)
    step = place(left.sublayer, left.block, str(left.kind))
    again = ""
    if left.first != left.sublayer:
        before = f"first at {_step(left.first)}"
        again = f", {before}," if end else f" for good ({before})"
    last = f"is {side} them when {end}" if end else f"ends {side} them"
    return f"leaves the random inits' band at {step}{again} and {last}"


def _step(sublayer: int) -> str:
    return f"sublayer {sublayer}" if sublayer else "the embedding"


def _direction(of: Split) -> str:
    """Where branches point on the whole, by alignment / branches: 2Σ⟨x, b⟩ / Σ‖b‖²."""
    share = of.alignment / of.branches
    if abs(share) < ALIGNED:
        return "are at right angles to"
    return f"point {'slightly ' if abs(share) < 0.5 else ''}{'along' if share > 0 else 'against'}"


def _percent(share: float) -> str:
    """A share in per cent: two digits, and whole beyond 100, where two would need an exponent."""
    return f"{100 * share:{'.2g' if abs(share) < 0.995 else '.0f'}}"


def _terms(own: Split, drawn: Split | None) -> str:
    """A sentence on how the branches' alignment changes the growth, beside that of random inits."""

    def change(of: Split, size: str) -> str:
        aligned = short(abs(of.alignment))
        return f"adds {aligned} to {size}" if of.alignment > 0 else f"takes {aligned} from {size}"

    where, share = _direction(own), own.alignment / own.branches
    as_drawn = drawn is not None and drawn.low <= share * drawn.branches <= drawn.high
    if drawn is not None and as_drawn and abs(share) >= ALIGNED:
        low, high = (_percent(x / drawn.branches) for x in (drawn.low, drawn.high))
        return (
            "branches lie to the stream as those of random inits do: their alignment "
            f"{change(own, f'the {short(own.branches)} of their size')}, {_percent(share)} % of it, "
            f"where single seeds have {low} to {high} %."
        )
    if where.startswith("are"):
        effect = change(own, f"the {short(own.branches)} of their size")
        text = f"branches {where} the stream on the whole: their alignment {effect}"
    else:
        effect = change(own, f"the {short(own.branches)} that their size alone would add")
        text = f"branches {where} the stream, which {effect}"
    if drawn is not None:
        where = _direction(drawn)
        effect = f"which {change(drawn, short(drawn.branches))}"
        if where.startswith("are"):
            effect = f"{short(drawn.alignment)} of {short(drawn.branches)}"
        seeds = f"single seeds: {short(drawn.low)} to {short(drawn.high)}"
        text += f"; those of random inits {where} it ({effect}; {seeds})"
    return text + "."


def sentences(
    left: Departure | None, frame: pd.DataFrame, tokens: tuple[int, int], whole: int
) -> list[str]:
    """Sentences that compare a checkpoint with random inits.

    tokens: the batch's sequences and their length. whole: the model's last sublayer, which a curve that
    ends early doesn't reach.
    """
    lines: list[str] = []
    rows = frame[frame["curve"].isin(GIVEN)]
    if rows.empty:  # it overflowed at the embedding
        return lines
    theory, given = basis(frame) == "theory", given_in(frame)
    seeds = frame.loc[frame["curve"] == "random", "seed"].nunique()
    if 0 < seeds < MIN_SEEDS:
        inits = "1 random init is" if seeds == 1 else f"{seeds} random inits are"
        lines.append(f"{inits} too few to tell where the {given} leaves them ({MIN_SEEDS} needed).")
    last = int(rows["sublayer"].max())
    if left is not None:
        end = ""
        if left.last < whole:
            inits = "the prediction" if theory else "a random init's curve"
            end = f"{'it' if left.last == last else inits} ends at sublayer {left.last}"
        where = _where(left, end)
        where = where.replace("band", "predicted band") if theory else where
        if skewed(frame):  # where it leaves them is on the mean over tokens
            where += f"; {token_apart(frame, tokens).sentence}"
        lines.append(f"The {given} {where}.")
        if left.checkpoint is not None:
            its = f"Up to sublayer {left.last} its" if end else "Its"
            lines.append(f"{its} {_terms(left.checkpoint, left.random)}")
    return lines + massive_sentences(rows, *tokens, whole=last == whole)
