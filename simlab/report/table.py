"""The run's table, for an 80-column terminal."""

from __future__ import annotations

import math

import pandas as pd
from rich.table import Table

DEEP = 24  # sublayers; beyond, a row per block
MOST = 34  # rows; beyond, every n-th block


def growth_table(frame: pd.DataFrame, name: str) -> Table:
    """Mean square after each sublayer (each block, when deep), beside what the laws say."""
    frame = frame[frame["curve"] == name].copy()
    # Rows of one step share (sublayer, kind): a re-norm has the number of the sublayer before it.
    by_step = frame.groupby(["sublayer", "kind"], sort=False)
    steps = by_step.agg(
        block=("block", "first"),
        mean_square=("mean_square", "mean"),
        spread=("mean_square", "std"),
        branch=("branch_mean_square", "mean"),
        additive=("law_additive", "mean"),
        sqrt2=("law_sqrt2", "mean"),
    ).reset_index()
    shown = _shown(steps)
    table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    table.add_column("block", justify="right")
    table.add_column("after")
    for head in ("mean square", "± seeds", "added", "additive", "√2 law"):
        table.add_column(head, justify="right")
    numbers = shown[["mean_square", "spread", "branch", "additive", "sqrt2"]].to_numpy(float)
    blocks = ["" if pd.isna(block) else str(block + 1) for block in shown["block"]]
    for block, kind, row in zip(blocks, shown["kind"], numbers, strict=True):
        table.add_row(block, kind, *map(_short, row))
    return table


def _shown(steps: pd.DataFrame) -> pd.DataFrame:
    """All steps of a shallow curve; the embedding and the blocks' last steps of a deep one."""
    if len(steps) <= DEEP:
        return steps
    ends = steps.groupby("block").tail(1)
    ends = steps[(steps["kind"] == "embedding") | steps.index.isin(ends.index)]
    every = math.ceil(len(ends) / MOST)
    keep = (ends["block"].fillna(-1) + 1) % every == 0
    keep.iloc[-1] = True
    return ends[keep]


def _short(value: float) -> str:
    """Four digits; an exponent beyond 10^5 or below 10^-3."""
    if pd.isna(value):
        return ""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:.4g}"
