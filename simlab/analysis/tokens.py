"""Where a few tokens make the mean over tokens: which one, and how much of it is its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from simlab.analysis.curve import GIVEN

SKEWED = (
    5.0  # from this ratio of mean to median token on, the median token is what is told and drawn
)


def skewed(frame: pd.DataFrame) -> bool:
    """True for a checkpoint of whose tokens a few are far larger than the median, at some step.

    frame: the rows of curve.csv.
    """
    if "mean_square_median" not in frame or "curve" not in frame:
        return False
    rows = frame[frame["curve"].isin(GIVEN)]
    return bool((rows["mean_square"] > SKEWED * rows["mean_square_median"]).any())


def largest(rows: pd.DataFrame, sequences: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Each step's largest token, and whether position 0 of every sequence is about as large.

    Of B mean squares of which none is above m, with a mean of (1 - 1/2B)m, each is at least m/2.
    rows: all steps of one curve. sequences, length: the batch's shape.
    """
    token, most, first = (
        rows[name].to_numpy() for name in ("max_token", "mean_square_max", "mean_square_first")
    )
    return token, (token % length == 0) & (first >= (1 - 0.5 / sequences) * most)


def token_place(token: int, every: bool, sequences: int, length: int) -> str:
    """``position 13``, ``position 13 of sequence 2 (of 3)``, ``position 0 of every sequence``."""
    sequence, position = divmod(token, length)
    if sequences == 1:
        return f"position {position}"
    return f"position {position} of " + (
        "every sequence" if every else f"sequence {sequence + 1} (of {sequences})"
    )


@dataclass(frozen=True)
class Apart:
    """A checkpoint's largest token at its end, or where mean and median differ most if not there.

    place: as in ``token_place``. every: position 0 of every sequence is about as large. share: the part
    of the mean over tokens that these tokens make together. ends: True if it is so at the curve's end.
    others: a lower bound on the number of further tokens above SKEWED medians, at the end or at some
    step, without which the mean would be smaller.
    """

    place: str
    every: bool
    share: float
    ends: bool
    others: int = 0

    @property
    def subject(self) -> str:
        """``one token, at position 13,`` or ``position 0 of every sequence``, and if there are more."""
        if self.every:
            return self.place + (f" (at least {self.others} more large)" if self.others else "")
        if self.others:
            return f"the largest of at least {1 + self.others} large tokens, at {self.place},"
        return f"{'one' if self.share > 0.5 else 'the largest'} token, at {self.place},"

    @property
    def sentence(self) -> str:
        """``one token, at position 13, makes 94 % of the mean over tokens``, no full stop."""
        part = math.floor(1000 * self.share) / 10  # never more than it is
        size = f"{'' if self.ends else 'up to '}{part:g} %"
        return f"{self.subject} makes {size} of the mean over tokens"


@np.errstate(divide="ignore", invalid="ignore")
def token_apart(frame: pd.DataFrame, tokens: tuple[int, int]) -> Apart:
    """The token that stands apart of a checkpoint that is ``skewed``.

    frame: the rows of curve.csv. tokens: the batch's sequences and their length.
    """
    rows = frame[frame["curve"].isin(GIVEN)]
    sequences, length = tokens
    ratio = (rows["mean_square"] / rows["mean_square_median"]).to_numpy(np.float64)
    ends = bool(ratio[-1] > SKEWED)
    at = -1 if ends else int(np.nan_to_num(ratio, nan=0.0, posinf=math.inf).argmax())
    token, every = (values[at] for values in largest(rows, sequences, length))
    all_of_them = bool(every and sequences > 1)
    own = rows["mean_square_max"].where(rows["max_token"] == rows["max_token"].iloc[at])
    if all_of_them:
        own = rows["mean_square_first"] * sequences
    shares = own / (rows["mean_square"] * sequences * length)
    share = float(shares.iloc[at] if ends else shares.max())  # "up to": over all rows
    # No other token is larger than the largest, and one of SKEWED medians isn't large.
    rest = rows["mean_square"] * sequences * length - own
    usual = SKEWED * rows["mean_square_median"] * (sequences * length - 1)
    more = ((rest - usual) / rows["mean_square_max"]).to_numpy(np.float64)
    most = float(more[at] if ends else np.nanmax(more))
    others = max(0, math.ceil(most - 1e-6)) if math.isfinite(most) else 0
    place = token_place(int(token), all_of_them, *tokens)
    return Apart(place, all_of_them, share, ends, others)
