"""Growth exponents λ: three definitions, each by its name.

With n blocks, x_i the stream after block i (from 1; a re-norm at a block's end included), and ⟨·⟩
the mean over the batch's tokens:

- ``lambda_paper`` = ln(‖⟨x_n⟩‖ / ‖⟨x_1⟩‖) / n: of the one mean vector (arXiv 2501.00656, §3.2)
- ``lambda_token`` = ln(⟨‖x_n‖⟩ / ⟨‖x_1‖⟩) / n: of the mean norm (allenai/OLMo issue 797)
- ``lambda_pairwise``, block i: ln(⟨‖x_{i+1}‖⟩ / ⟨‖x_i‖⟩) / n; ``lambda_from_first``, block i:
  ln(⟨‖x_i‖⟩ / ⟨‖x_1‖⟩) / n (the same thread)

With ``_gradient`` at the end, the same of the loss's gradient with respect to x_i: negative where
gradients are larger near the input. The norm of a mean vector is not the mean of norms: with mean
token cosine ρ its square is about ρ + (1 − ρ)/N of the tokens', so rank collapse raises λ_paper.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from simlab.analysis.curve import basis
from simlab.analysis.resampling import Estimate, jackknife
from simlab.theory.laws import LAWS, Array
from simlab.theory.mean_field import Prediction

KINDS = {
    "": ("norm", "mean_vector_norm"),
    "_gradient": ("gradient_norm", "gradient_mean_vector_norm"),
}


def block_ends(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows of the curve ``name`` after each block, re-norm included."""
    rows = frame[(frame["curve"] == name) & frame["block"].notna()]
    return rows.groupby(["seed", "block"], sort=True).tail(1)


def _law_columns(frame: pd.DataFrame) -> list[str]:
    return [law.column for law in LAWS.values() if law.column in frame]


def _by_seed(ends: pd.DataFrame, column: str, depth: int) -> Array:
    """ln of a column, (seeds, depth); NaN where a curve ends early or the value is 0."""
    seeds = pd.Categorical(ends["seed"])  # ascending
    table = np.full((len(seeds.categories), depth), np.nan)
    table[seeds.codes, ends["block"].to_numpy(np.int64)] = ends[column]
    with np.errstate(divide="ignore"):
        logs = np.log(table)
    return np.where(np.isfinite(logs), logs, np.nan)


def per_block(frame: pd.DataFrame, depth: int) -> pd.DataFrame:
    """λ by block of every curve and of the laws, tidy.

    Columns: curve, seed, block (from 1), of (activation, gradient), lambda_pairwise (from the block
    before), lambda_from_first, lambda_paper (from the first, of the mean vector). A law's curve has
    its column's name and stands for the random inits, if there are any; it has no lambda_paper.
    """
    names = list(frame["curve"].unique())
    columns = [("activation", *KINDS[""], 1.0), ("gradient", *KINDS["_gradient"], 1.0)]
    parts: list[tuple[str, str, str, str, str | None, float]] = [
        (name, name, *column) for name in names for column in columns if column[1] in frame
    ]
    parts += [(c, basis(frame), "activation", c, None, 0.5) for c in _law_columns(frame)]
    tables = []
    for curve, name, of, column, vector, power in parts:
        ends = block_ends(frame, name)
        seeds = sorted(ends["seed"].unique())
        logs = power * _by_seed(ends, column, depth)
        known = vector is not None and vector in ends  # theory has none of gradients
        mean = _by_seed(ends, str(vector), depth) if known else np.full_like(logs, np.nan)
        values = {
            "curve": curve,
            "seed": np.repeat(seeds, depth),
            "block": np.tile(np.arange(1, depth + 1), len(seeds)),
            "of": of,
            "lambda_pairwise": (np.diff(logs, axis=1, prepend=np.nan) / depth).ravel(),
            "lambda_from_first": ((logs - logs[:, :1]) / depth).ravel(),
            "lambda_paper": ((mean - mean[:, :1]) / depth).ravel(),
        }
        tables.append(pd.DataFrame(values))
    return pd.concat(tables, ignore_index=True)


def _first_to_last(logs: Array) -> Estimate | None:
    depth = logs.shape[1]
    if depth < 2 or np.isnan(logs[:, [0, -1]]).any():
        return None
    return jackknife((logs[:, -1:] - logs[:, :1]) / depth, lambda values: values[:, 0])


def exponents(
    frame: pd.DataFrame, name: str, depth: int, theory: Prediction | None = None
) -> dict[str, Any]:
    """Every λ of the curve ``name``: the seeds' mean with its interval, or a list by block.

    None where there are fewer than two blocks or a curve ends early; empty where none reaches the
    first block's end. The laws' ``lambda_token`` is of their mean squares. theory: adds its λ's, of
    predicted norms, as ``lambda_…_mean_field``.
    """
    ends = block_ends(frame, name)
    values: dict[str, Any] = {}
    if ends.empty:  # every curve overflowed before its first block's end
        return values
    for suffix, (norm, vector) in KINDS.items():
        if norm not in ends:
            continue
        logs = _by_seed(ends, norm, depth)
        if vector in ends:
            values[f"lambda_paper{suffix}"] = _first_to_last(_by_seed(ends, vector, depth))
        values[f"lambda_token{suffix}"] = _first_to_last(logs)
        mean = logs.mean(0)
        values[f"lambda_pairwise{suffix}"] = (np.diff(mean) / depth).tolist()
        values[f"lambda_from_first{suffix}"] = ((mean[1:] - mean[0]) / depth).tolist()
    for column in _law_columns(frame):
        by_law = _first_to_last(_by_seed(ends, column, depth) / 2)
        values[f"lambda_token_{column.removeprefix('law_')}"] = (
            None if by_law is None else by_law.value
        )
    return values | (_predicted(theory, depth) if theory else {})


def _predicted(theory: Prediction, depth: int) -> dict[str, float | None]:
    """λ from the first block to the last of each predicted norm; None where theory doesn't say."""
    last = {row.block: row for row in theory.rows}  # a block's last row
    values: dict[str, float | None] = {}
    for suffix, norms in KINDS.items():
        for key, column in zip(("lambda_token", "lambda_paper"), norms, strict=True):
            ends = [getattr(last.get(block), column, math.nan) for block in (0, depth - 1)]
            if suffix and math.isnan(ends[0]):
                continue
            known = depth > 1 and all(end > 0 for end in ends)
            rate = math.log(ends[1] / ends[0]) / depth if known else None
            values[f"{key}{suffix}_mean_field"] = rate
    return values
