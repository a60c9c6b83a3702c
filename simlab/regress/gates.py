"""Gates between recorded curves and new ones: ``exact`` and ``statistical`` (``law`` needs no record).

exact        the same seeds: every number within RTOL of the recorded one.
statistical  other seeds: mean curves within chance, by a permutation test.

A gate that fails names the first row that is off, by how much, and the component to blame.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from simlab.analysis.numbers import short
from simlab.analysis.resampling import deals_for, limit, permuted
from simlab.analysis.verdict import ROUNDING
from simlab.regress.blame import NormsOf, blame, first_row_off, told_of
from simlab.theory.laws import Array

# How far rounding may move a number of a curve, relative to its size. With other thread counts and
# instruction sets the same run differs by up to 6.6e-6, 8.1e-3 and 4.3e-2, the cosine at depth 64 most
# (scripts/measure_rounding.py): some six times as much, for machines not at hand.
RTOL = {"float64": 1e-6, "float32": 5e-5, "float16": 5e-2, "bfloat16": 2e-1}
# Columns that may be negative: their rounding is in units of the column's rms, not of the number.
SIGNED = ("mean", "cosine", "delta_cross", "token_cosine", "attention_max_logit", "gradient_cosine")
QUANTITIES = (
    "norm", "branch_raw_mean_square", "branch_mean_square", "cosine", "attention_entropy",
    "token_cosine",
)  # fmt: skip
_LEAST_SIZE = 1e-6  # of |v| in ln |v|: below is rounding, as of the mean that LayerNorm subtracts
GATE_ALPHA = 1e-3  # how often a run of the statistical gate, all cases together, is a false alarm
ROW_KEYS = ["curve", "seed", "sublayer", "block", "kind"]
STEP = ["sublayer", "block", "kind"]


@dataclass(frozen=True)
class Finding:
    """Where new curves first leave the recorded ones.

    size: the difference, in standard errors, or relative (exact); limit: the largest size that passes.
    blame: embedding, attention, mlp, norm, residual add, or structure (other steps than recorded); two
    of them, as ``attention or its norm``, where the curve can't tell; if only gradients differ, ``loss
    or head`` or ``mlp or its norm, backward``. against: a law's column, if ``expected`` is its value.
    """

    sublayer: int
    block: int | None
    kind: str
    quantity: str
    expected: float
    got: float
    size: float
    limit: float
    blame: str
    against: str | None = None

    @property
    def where(self) -> str:
        """``sublayer 7, the attention of block 4``, the block counted from 1."""
        if self.block is None:
            return f"sublayer {self.sublayer}, the {self.kind}"
        return f"sublayer {self.sublayer}, the {self.kind} of block {self.block + 1}"


@dataclass(frozen=True)
class Outcome:
    """A gate's result: ``short`` is its figure (``3.1/6.0``), ``why`` the sentence of a failure."""

    gate: str
    passed: bool
    short: str
    why: str = ""
    finding: Finding | None = None


def failed(gate: str, short: str, finding: Finding, size: str) -> Outcome:
    """The outcome of a failed gate, with its sentence. size: the difference in words."""
    f = finding
    why = (
        f"first at {f.where}: {f.quantity} is {f.got:.6g}, not {f.expected:.6g}, {size};"
        f" to blame: {f.blame}"
    )
    return Outcome(gate, False, short, why, finding)


def structure(expected: pd.DataFrame, got: pd.DataFrame, gate: str) -> Outcome | None:
    """The outcome of a failed gate if the curves' steps differ from the recorded ones, else None."""
    want: dict[str, list[tuple[Any, ...]]] = {}  # the longest curve's steps, by the curves' name
    for (name, _), steps in _steps(expected).items():
        want[name] = max(want.get(name, []), steps, key=len)
    for (name, seed), steps in _steps(got).items():
        if name not in want:
            why = f"there is a curve {name!r}, which isn't recorded"
            return Outcome(gate, False, "other curves", why)
        if steps == want[name]:
            continue
        paired = itertools.zip_longest(want[name], steps)
        index, (old, new) = next((i, p) for i, p in enumerate(paired) if p[0] != p[1])
        sublayer, block, kind = old or new
        finding = Finding(
            int(sublayer), None if pd.isna(block) else int(block), str(kind), "step",
            math.nan, math.nan, math.inf, 0.0, "structure",
        )  # fmt: skip
        why = (
            f"first at step {index} of seed {seed}: it is {_step(new)}, not {_step(old)};"
            " to blame: the structure, or an overflow that ends the curve"
        )
        return Outcome(gate, False, "other steps", why, finding)
    return None


def _steps(frame: pd.DataFrame) -> dict[tuple[str, int], list[tuple[Any, ...]]]:
    """Each curve's steps, by its name and seed."""
    steps = list(frame[STEP].itertuples(index=False, name=None))
    of_curve: dict[tuple[str, int], list[tuple[Any, ...]]] = {}
    for name, seed, step in zip(frame["curve"], frame["seed"], steps, strict=True):
        of_curve.setdefault((name, seed), []).append(step)
    return of_curve


def _step(step: tuple[Any, ...] | None) -> str:
    if step is None:
        return "the end"
    sublayer, block, kind = step
    of = "" if pd.isna(block) else f" of block {int(block) + 1}"
    return f"{kind}{of} (sublayer {sublayer})"


def exact(
    expected: pd.DataFrame,
    got: pd.DataFrame,
    quantities: Sequence[str],
    dtype: str,
    norms: NormsOf | None = None,
) -> Outcome:
    """Same curves, same numbers: |got − expected| ≤ RTOL·size, at every row and quantity.

    The size is |expected|; of a quantity in SIGNED, its rms over the curve. Either has the other's
    curves and seeds. norms: the model's, for ``blame``.
    """
    expected, got = (frame.reset_index(drop=True) for frame in (expected, got))
    other = structure(expected, got, "exact")
    if other:
        return other
    by_curve, new = (
        dict(list(frame.groupby(["curve", "seed"], sort=False))) for frame in (expected, got)
    )
    for name, seed in sorted(set(by_curve) ^ set(new)):
        there = "isn't recorded" if (name, seed) in new else "is recorded and wasn't measured"
        return Outcome("exact", False, "other curves", f"{name} of seed {seed} {there}")
    if not new:
        return Outcome("exact", False, "no curve", "there is no curve to compare")
    allowed = RTOL[dtype]
    off = {
        key: np.stack([relative_error(by_curve[key][q], rows[q], q in SIGNED) for q in quantities])
        for key, rows in new.items()
    }  # (Q, R) each
    figure = f"{max(float(of_curve.max()) for of_curve in off.values()):.0e}"
    beyond = [
        (key, int(row), quantities[which])
        for key, of_curve in off.items()
        for which, row in np.argwhere(of_curve > allowed)
    ]
    if not beyond:
        return Outcome("exact", True, figure)
    row = first_row_off([r for _, r, _ in beyond], [q for *_, q in beyond])
    key = next(key for key, r, q in beyond if r == row and q in told_of([b[2] for b in beyond]))
    here = told_of([q for of, r, q in beyond if (of, r) == (key, row)])
    size, worst = max((float(off[key][quantities.index(q), row]), q) for q in here)
    old, rows = by_curve[key], new[key]
    to = blame(old, rows, row, here, dtype, norms)
    finding = finding_at(old, rows, row, worst, size, allowed, to)
    return failed("exact", figure, finding, f"off by {size:.1e} (limit {allowed:.0e})")


def relative_error(old: pd.Series, new: pd.Series, signed: bool) -> Array:
    """The relative difference of each number (R,); 0 where both are missing, inf where one is."""
    a, b = old.to_numpy(np.float64), new.to_numpy(np.float64)
    size = np.sqrt(np.nanmean(a**2)) if signed and not np.isnan(a).all() else np.abs(a)
    with np.errstate(divide="ignore", invalid="ignore"):
        off = np.where(a == b, 0.0, np.abs(a - b) / size)
    off[np.isnan(a) & np.isnan(b)] = 0.0
    return np.where(np.isnan(off), np.inf, off)


def finding_at(
    old: pd.DataFrame,
    new: pd.DataFrame,
    row: int,
    quantity: str,
    size: float,
    limit: float,
    to: str,
) -> Finding:
    """The finding in a row of two curves, the recorded and the new one."""
    step = old.iloc[row]
    return Finding(
        int(step["sublayer"]), None if pd.isna(step["block"]) else int(step["block"]),
        str(step["kind"]), quantity, float(step[quantity]), float(new[quantity].iloc[row]),
        float(size), float(limit), to,
    )  # fmt: skip


def statistical(
    expected: pd.DataFrame,
    got: pd.DataFrame,
    quantities: Sequence[str],
    dtype: str,
    alpha: float = GATE_ALPHA,
    norms: NormsOf | None = None,
) -> Outcome:
    """Other seeds, same law: mean curves as near as chance brings them, at every row at once.

    The statistic is max over rows and quantities of t = (|Δ mean| − floor)₊ / joint standard error,
    of the columns that ``stack`` makes; floor is what rounding explains of a mean. Its distribution
    comes from dealing the curves anew into two groups (all ways, or many random ones), so the rows may
    depend on each other and have any law: a false alarm has probability ≤ alpha, for all rows and
    quantities together (Westfall & Young 1993, §2.3: max-T). Where t > the limit, that row is off.
    """
    expected, got = (frame.reset_index(drop=True) for frame in (expected, got))
    other = structure(expected, got, "statistical")
    if other:
        return other
    old, new, floor, labels = stack(expected, got, quantities, ROUNDING[dtype])
    if not old.size or not new.size:
        return Outcome("statistical", False, "no number", "there is no number to compare")
    lost = np.isnan(old).any(0) | np.isnan(new).any(0)
    row_of, names = labels
    t, most = np.full(old.shape[1], np.inf), 0.0
    if not lost.all():
        t[~lost], maxima = permuted(old[:, ~lost], new[:, ~lost], floor[~lost], deals_for(alpha))
        most = limit(maxima, alpha)
    figure = f"{short(t.max(), 2)}/{short(most, 2)}"
    if not (t > most).any():
        return Outcome("statistical", True, figure)
    row = first_row_off(row_of[t > most], [names[i] for i in np.flatnonzero(t > most)])
    here = row_of == row
    beyond = told_of([names[i] for i in np.flatnonzero(here & (t > most))])
    worst = max(np.flatnonzero(here), key=lambda i: (names[i] in beyond, t[i]))
    before, after = mean(expected), mean(got)
    to = blame(before, after, row, beyond, dtype, norms)
    finding = finding_at(before, after, row, names[worst], t[worst], most, to)
    size = f"{short(finding.size, 2)} standard errors (limit {short(most, 2)})"
    return failed("statistical", figure, finding, size)


def mean(frame: pd.DataFrame) -> pd.DataFrame:
    """The mean curve: a row per step, with its keys."""
    step = frame.groupby(["curve", "seed"], sort=False).cumcount()
    numbers = frame.drop(columns=ROW_KEYS).groupby(step).mean()
    return frame.loc[step.drop_duplicates().index, STEP].reset_index(drop=True).join(numbers)


def stack(
    expected: pd.DataFrame, got: pd.DataFrame, quantities: Sequence[str], rtol: float
) -> tuple[Array, Array, Array, tuple[np.ndarray, list[str]]]:
    """Both sets of curves as (S, C), the floor of each column, its row and its quantity.

    A quantity has a column per row where it is measured, of ln v; one that may be negative two, of v
    and of ln |v|: a spread that changes about 0 leaves the mean.
    """
    old, new, floors, row_of, names = [], [], [], [], []

    def add(a: Array, b: Array, floor: float, quantity: str) -> None:
        rows = np.flatnonzero(~(np.isnan(a).all(0) & np.isnan(b).all(0)))  # an MLP has no attention
        old.append(a[:, rows])
        new.append(b[:, rows])
        floors.append(np.full(len(rows), floor))
        row_of.append(rows)
        names.extend([quantity] * len(rows))

    measured_SRQ = []
    for frame in (expected, got):
        values = frame[list(quantities)].to_numpy(np.float64)
        rows_of_curves = frame.groupby(["curve", "seed"]).indices.values()
        measured_SRQ.append(np.stack([values[rows] for rows in rows_of_curves]))
    for i, q in enumerate(quantities):
        a, b = (every[..., i].copy() for every in measured_SRQ)
        a[np.isinf(a)], b[np.isinf(b)] = np.nan, np.nan
        signed = q in SIGNED or (a <= 0).any() or (b <= 0).any()
        if signed and not np.isnan(a).all():
            add(a, b, rtol * float(np.sqrt(np.nanmean(np.concatenate([a, b]) ** 2))), q)
        least = _LEAST_SIZE if signed else 0.0
        add(np.log(np.maximum(np.abs(a), least)), np.log(np.maximum(np.abs(b), least)), rtol, q)
    columns = (np.concatenate(old, 1), np.concatenate(new, 1), np.concatenate(floors))
    return *columns, (np.concatenate(row_of), names)
