"""Turns measured curves into the tidy rows of curve.csv."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from simlab.analysis.curve import Curves, curves_of, with_laws
from simlab.analysis.massive import massive
from simlab.theory.mean_field import Prediction

if TYPE_CHECKING:
    from simlab.measurement.engine import Measured


@dataclass(frozen=True)
class Cuts:
    """Where curves were cut, a mapping for each cut as summary.json has it.

    overflow: the first row that isn't finite; the curve ends before it. gradients: the last sublayer
    with a gradient that isn't finite; the gradients from there down to the input are left empty.
    """

    overflow: list[dict[str, Any]]
    gradients: list[dict[str, Any]]


def to_frame(
    measured: list[tuple[str, int, Measured]], entries: int, theory: Prediction | None = None
) -> tuple[pd.DataFrame, dict[str, Curves], Cuts]:
    """The rows of curve.csv, the same as arrays by kind of curve, and where curves were cut.

    measured: (name, seed, rows) of each curve. entries: numbers in a residual stream, tokens ×
    width. theory: the predicted curve of the random inits.
    """
    frame, overflow = cut(tidy(measured, entries))
    frame["massive"] = massive(frame)
    frame, lost = cut_gradients(frame, overflow)
    whole = {name: one for name, _, one in measured}
    by_curve = {
        name: curves_of(
            frame,
            name,
            whole[name].gain,
            whole[name].normalises,
            theory if name == "random" else None,
        )
        for name in frame["curve"].unique()
    }
    return with_laws(frame, by_curve), by_curve, Cuts(overflow, lost)


def tidy(measured: list[tuple[str, int, Measured]], entries: int) -> pd.DataFrame:
    """One row per curve × seed × step. The only place where the host waits for the device.

    entries: of one stream, tokens × width, for the variance over both, as torch.var takes it.
    """
    import torch  # late: a run that measures nothing needs neither

    from simlab.measurement.statistics import GRADIENT_STATISTICS, STATISTICS

    rows = [(name, seed, row) for name, seed, curve in measured for row in curve.rows]
    entries *= max(curve.stream_count for *_, curve in measured)
    values = torch.stack([row.values for *_, row in rows]).cpu().to(torch.float64).numpy()
    frame = pd.DataFrame(values, columns=list(STATISTICS)).astype({"max_token": np.int64})
    gradients = [row.gradient for *_, row in rows if row.gradient is not None]
    if gradients:
        values = torch.stack(gradients).cpu().to(torch.float64).numpy()
        frame[list(GRADIENT_STATISTICS)] = values
    spread = frame["mean_square"] - frame["mean"] ** 2
    frame.insert(2, "variance", spread * (entries / (entries - 1)))
    keys = {
        "curve": [name for name, *_ in rows],
        "seed": [seed for _, seed, _ in rows],
        "sublayer": [row.sublayer for *_, row in rows],
        "block": pd.array([row.block for *_, row in rows], dtype="Int64"),
        "kind": [row.kind for *_, row in rows],
    }
    return pd.concat([pd.DataFrame(keys), frame], axis=1)


def vector_rows(
    measured: list[tuple[str, int, Measured]], frame: pd.DataFrame
) -> pd.DataFrame | None:
    """The rows of streams.csv, one per curve × seed × step × vector; None where no state has several.

    A step whose state is the stream alone has one row. frame: from ``to_frame``, whose curves may end
    early.
    """
    from simlab.measurement.statistics import STATISTICS, VECTOR_STATISTICS  # late, as in ``tidy``

    known = [name for name in VECTOR_STATISTICS if name in STATISTICS]
    at = [list(STATISTICS).index(name) for name in known]
    kept = frame.value_counts(["curve", "seed"])
    records = []
    for name, seed, curve in measured:
        if all(row.vectors is None for row in curve.rows):
            continue
        for row in curve.rows[: kept.get((name, seed), 0)]:
            keys = name, seed, row.sublayer, row.block, row.kind
            if row.vectors is not None:
                values = row.vectors.cpu().tolist()
            else:
                alone = row.values.cpu()[at].tolist()
                values = [[*alone, float(alone[known.index("norm")] > 0)]]
            records += [(*keys, i, *each) for i, each in enumerate(values)]
    if not records:
        return None
    columns = ["curve", "seed", "sublayer", "block", "kind", "stream", *VECTOR_STATISTICS]
    return pd.DataFrame(records, columns=columns).astype({"block": "Int64"})


def cut(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """End each curve before its first non-finite value, and say where that was."""
    keys = ["curve", "seed"]
    bad = frame["non_finite"] > 0
    overflowed = bad.groupby([frame[key] for key in keys], sort=False).cummax()
    first = frame[bad].groupby(keys, sort=False).head(1)[[*keys, "sublayer", "block", "kind"]]
    overflow = [
        {str(key): None if pd.isna(value) else value for key, value in row.items()}
        for row in first.to_dict("records")
    ]
    return frame[~overflowed].drop(columns="non_finite").reset_index(drop=True), overflow


def cut_gradients(
    frame: pd.DataFrame, overflow: list[dict[str, Any]]
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Empty the gradients from the last non-finite one down to the input, and say where that is.

    overflow: the curves that ended early: they have no gradients, and are listed there already.
    """
    columns = [name for name in frame if str(name).startswith("gradient_")]
    if not columns:
        return frame, []
    frame, lost = frame.copy(), []
    ended = {(row["curve"], row["seed"]) for row in overflow}
    for (name, seed), rows in frame.groupby(["curve", "seed"], sort=False):
        bad = rows.index[~np.isfinite(rows[columns].to_numpy()).all(axis=1)]
        if len(bad):
            frame.loc[rows.index[0] : bad[-1], columns] = np.nan
        if len(bad) and (name, seed) not in ended:
            last = rows.loc[bad[-1]]
            lost.append({"curve": name, "seed": seed, "sublayer": int(last["sublayer"])})
    return frame, lost
