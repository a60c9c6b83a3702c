"""A curve's rows as the numbers that a page draws, in JSON's types: lists, texts, floats, None."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from simlab.analysis import LAWS
from simlab.analysis.curve import basis, laws_in
from simlab.analysis.exponents import per_block
from simlab.report.colours import LABELS
from simlab.report.page.quantities import BY_BLOCK, BY_SUBLAYER
from simlab.report.seeds import SeedArray, SeedTable, longest, over_seeds, x_of

PAGE_DIGITS = 5  # significant, of every number in a page
# Of these columns a law speaks too: what it says of the mean square v, at width d.
FROM_LAW: dict[str, Callable[[SeedArray, int], SeedArray]] = {
    "mean_square": lambda v, d: v,
    "rms": lambda v, d: np.sqrt(v),
    "norm": lambda v, d: np.sqrt(v * d),
}


@dataclass(frozen=True)
class Drawn:
    """What of a curve goes into a page. seeds: each seed's values too. columns: which quantities."""

    seeds: bool = True
    columns: Sequence[str] = tuple(BY_SUBLAYER | BY_BLOCK)


def rounded(values: SeedArray) -> list[float | None]:
    """A row of numbers at PAGE_DIGITS significant digits; None for those that aren't finite."""
    return [_short(value) for value in values.tolist()]


def _short(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    text = float(f"{value:.{PAGE_DIGITS - 1}e}")
    return int(text) if text == int(text) and abs(text) < 1e15 else text


def steps_of(rows: pd.DataFrame) -> dict[str, list[Any]]:
    """The steps of a curve that is longest: x on the axis, sublayer, kind, block (from 1; 0: none)."""
    steps = longest(rows)
    return {
        "x": x_of(steps).tolist(),
        "sublayer": steps["sublayer"].tolist(),
        "kind": steps["kind"].tolist(),
        "block": (steps["block"].astype("float64") + 1).fillna(0).astype(int).tolist(),
    }


def curve_values(
    frame: pd.DataFrame, name: str, blocks: pd.DataFrame, drawn: Drawn
) -> dict[str, Any]:
    """One kind of curve: of every quantity the seeds' mean, least and most, and each seed's values.

    blocks: from ``per_block``. Of a predicted curve least and most are two std of a seed away.
    """
    rows = frame[frame["curve"] == name]
    if "mean_square" in rows:
        rows = rows.assign(rms=np.sqrt(rows["mean_square"]))
    of_rows = SeedTable(rows)
    seeds = of_rows.seeds
    tables = {q: of_rows[q] for q in BY_SUBLAYER if q in drawn.columns and q in rows}
    for q in (q for q in BY_BLOCK if q in drawn.columns):
        of = "gradient" if q.endswith("_gradient") else "activation"
        part = blocks[(blocks["curve"] == name) & (blocks["of"] == of)]
        if len(part):
            of_blocks = SeedTable(part)[q.removesuffix("_gradient")]
            tables[q] = of_blocks[:, 1:]  # of block 1 there is none
    tables = {q: table for q, table in tables.items() if np.isfinite(table).any()}
    values: dict[str, Any] = {"mean": {}, "low": {}, "high": {}, "count": len(seeds)}
    for q, table in tables.items():
        mean = over_seeds(np.nanmean, table)
        values["mean"][q] = rounded(mean)
        if name == "theory" and q == "mean_square":
            band = 2 * rows["band_mean_field"].to_numpy(np.float64)
            values["low"][q], values["high"][q] = (
                rounded(np.maximum(mean - band, 0)),
                rounded(mean + band),
            )
        elif len(seeds) > 1:
            values["low"][q] = rounded(over_seeds(np.nanmin, table))
            values["high"][q] = rounded(over_seeds(np.nanmax, table))
    if drawn.seeds and len(seeds) > 1:
        values["seeds"] = [
            {"seed": int(seed), "values": {q: rounded(table[i]) for q, table in tables.items()}}
            for i, seed in enumerate(seeds)
        ]
    return values


def law_values(frame: pd.DataFrame, blocks: pd.DataFrame, width: int) -> list[dict[str, Any]]:
    """The laws that say something of a frame's curves, each quantity's values as ``curve_values`` has.

    Theory has a band, of two std of a seed; it isn't a law's where the curve is theory itself.
    """
    if frame.empty:
        return []
    found = []
    name = basis(frame)
    rows = SeedTable(frame[frame["curve"] == name])
    kinds = longest(rows.rows)["kind"]
    renorms = [i for i, kind in enumerate(kinds) if kind == "renorm"]
    for law in laws_in(frame):
        if name == "theory" and law is LAWS["mean_field"]:
            continue
        v = over_seeds(np.nanmean, rows[law.column])
        label = law.label
        if renorms and not law.expected:  # √2 per sublayer would start anew at each
            v = np.where(np.arange(len(v)) < renorms[0], v, np.nan)
            label += ", until the first re-norm"
        law_is: dict[str, Any] = {
            "key": law.name,
            "label": label,
            "mean": {},
            "low": {},
            "high": {},
        }
        with np.errstate(over="ignore"):
            law_is["mean"] = {q: rounded(says(v, width)) for q, says in FROM_LAW.items()}
            if law is LAWS["mean_field"]:
                band = 2 * over_seeds(np.nanmean, rows["band_mean_field"])
                for q, says in FROM_LAW.items():
                    law_is["low"][q] = rounded(says(np.maximum(v - band, 0), width))
                    law_is["high"][q] = rounded(says(v + band, width))
                if "law_gradient_rms" in frame:
                    gradient = over_seeds(np.nanmean, rows["law_gradient_rms"])
                    law_is["mean"]["gradient_rms"] = rounded(gradient)
        if law.expected:  # √2 per sublayer's λ would be the axis
            part = blocks[blocks["curve"] == law.column]
            for q in ("lambda_pairwise", "lambda_from_first"):
                if len(part):
                    law_is["mean"][q] = rounded(over_seeds(np.nanmean, SeedTable(part)[q])[1:])
        law_is["mean"] = {q: v for q, v in law_is["mean"].items() if any(x is not None for x in v)}
        found.append(law_is)
    return found


def job_values(frame: pd.DataFrame, summary: Mapping[str, Any], drawn: Drawn) -> dict[str, Any]:
    """A run's curves and laws: what ``curve_values`` and ``law_values`` say, with their axes."""
    model = summary["config"]["model"]
    blocks = per_block(frame, model["depth"])
    curves = []
    for name in frame["curve"].unique():
        rows = frame[frame["curve"] == name]
        curve = curve_values(frame, name, blocks, drawn)
        curves.append({"name": name, "label": LABELS[name], "steps": steps_of(rows), **curve})
    return {
        "curves": curves,
        "laws": law_values(frame, blocks, model["width"]),
        "depth": model["depth"],
        "sublayers": summary.get("sublayers") or 2 * model["depth"],
    }
