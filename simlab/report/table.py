"""The run's table, for an 80-column terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table

from simlab.analysis import LAWS
from simlab.analysis.curve import laws_in
from simlab.analysis.numbers import plus_minus, short
from simlab.analysis.resampling import Estimate
from simlab.analysis.tokens import skewed

DIGITS = 4
DEEP = 24  # sublayers; beyond, a row per block
_MOST_ROWS = 34  # rows; beyond, every n-th block
FALL = 0.8  # of the mean square before: a step that leaves less is shown, with the row before it


def growth_table(frame: pd.DataFrame, name: str, width: int = 80) -> Table:
    """Mean square after each sublayer (each block of a deep model), beside the laws' predictions.

    width: of the terminal. Where columns don't fit, those of LEAST_NEEDED are left out, in its order:
    no number is cut. A column without a number is left out, too.
    """
    frame = frame[frame["curve"] == name]
    others = {law.column: (law.column, "mean") for law in laws_in(frame)}
    if "gradient_rms" in frame:
        others["gradient"] = ("gradient_rms", "mean")
    steps = _steps(frame, **others)
    if name == "theory":  # one row per step: the band is predicted
        steps["spread"] = frame["band_mean_field"].to_numpy()
    shown = _shown(steps)
    columns = {"mean_square": "mean square", "spread": "± seeds", "branch": "added"}
    columns |= {law.column: law.head for law in laws_in(frame)} | {"gradient": "grad. rms"}
    return _fitting(shown, columns, width)


def beside_table(frame: pd.DataFrame, width: int = 80) -> Table:
    """A checkpoint's mean square beside that of random inits, by block. As ``growth_table``."""
    tables = {name: _steps(frame[frame["curve"] == name]) for name in frame["curve"].unique()}
    base = next(name for name in tables if name != "checkpoint")
    if base == "theory":
        tables[base]["spread"] = frame.loc[frame["curve"] == base, "band_mean_field"].to_numpy()
    keys = ["sublayer", "kind"]
    inits = tables[base][[*keys, "mean_square", "spread"]]
    inits = inits.rename(columns={"mean_square": "inits", "spread": "inits_spread"})
    steps = tables["checkpoint"].merge(inits, on=keys, how="left")
    steps["ratio"] = steps["mean_square"] / steps["inits"]
    median = (
        frame[frame["curve"] == "checkpoint"].groupby(keys, sort=False)["mean_square_median"].mean()
    )
    steps["median"] = median.to_numpy()
    head = "random init" if base == "random" else "theory"
    columns = {
        "mean_square": "checkpoint", "median": "median token", "inits": head, "inits_spread": "± seeds",
        "ratio": "× random",
    }  # fmt: skip
    # Where one token makes the checkpoint's mean, its ratio to random inits says least.
    least = ("ratio", "inits_spread") if skewed(frame) else LEAST_NEEDED
    return _fitting(_shown(steps), columns, width, least)


LEAST_NEEDED = (
    "law_sqrt2",
    "branch",
    "spread",
    "median",
    "law_mean_field",
    "law_additive",
    "inits_spread",
)


def _steps(frame: pd.DataFrame, **others: tuple[str, str]) -> pd.DataFrame:
    """One row per step of one kind of curve: the seeds' mean, their std, and ``others``.

    Rows of one step share (sublayer, kind): a re-norm has the number of the sublayer before it.
    """
    by_step = frame.groupby(["sublayer", "kind"], sort=False)
    return by_step.agg(
        block=("block", "first"),
        mean_square=("mean_square", "mean"),
        spread=("mean_square", "std"),
        branch=("branch_mean_square", "mean"),
        **others,
    ).reset_index()


def _fitting(
    shown: pd.DataFrame, columns: Mapping[str, str], width: int, least: Sequence[str] = LEAST_NEEDED
) -> Table:
    """Steps as a table with these heads; within ``width`` by leaving out columns of ``least``."""
    cells = {
        name: [short(number, DIGITS) for number in shown[name].to_numpy(float)]
        for name in columns if name in shown and shown[name].notna().any()
    }  # fmt: skip
    blocks = ["" if pd.isna(block) else str(block + 1) for block in shown["block"]]
    kinds = shown["kind"].tolist()

    def size() -> int:
        own = [max(map(len, [columns[name], *texts])) + 1 for name, texts in cells.items()]
        return len("block ") + max(map(len, ["after", *kinds])) + 1 + sum(own)

    for name in least:
        if size() <= width:
            break
        cells.pop(name, None)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("block", justify="right", no_wrap=True)
    table.add_column("after", no_wrap=True)
    for name in cells:
        table.add_column(columns[name], justify="right", no_wrap=True, min_width=len(columns[name]))
    for block, kind, *row in zip(blocks, kinds, *cells.values(), strict=True):
        table.add_row(block, kind, *row)
    return table


_LAMBDAS = {
    "lambda_paper": "λ of the mean vector (paper)",
    "lambda_token": "λ of the tokens' mean norm",
    "lambda_paper_gradient": "λ of the gradient's mean vector",
    "lambda_token_gradient": "λ of the gradient's mean norm",
}


def lambda_table(values: Mapping[str, Any], head: str = "measured") -> Table:
    """The growth exponents from the first block to the last, beside the laws' where they have one.

    values: one curve's entry of ``lambda`` in summary.json. head: of the curve's own column.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("growth exponent")
    shown = [law for law in LAWS.values() if values.get(f"lambda_token_{law.name}") is not None]
    for name in (head, *(law.head for law in shown)):
        table.add_column(name, justify="right")
    for key, label in _LAMBDAS.items():
        if values.get(key):  # none with a single block, or without gradients
            laws = [values.get(f"{key}_{law.name}") for law in shown]  # of lambda_token alone
            cells = (short(value, DIGITS) for value in laws)
            table.add_row(label, plus_minus(Estimate(**values[key])), *cells)
    return table


def departures_table(jobs: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row per job with a checkpoint that was held against random inits: where it went, and why.

    jobs: summaries by job.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("job", justify="right")
    table.add_column("checkpoint")
    for head in ("growth", "‖b‖²", "2⟨x, b⟩", "× random", "outside from"):
        table.add_column(head, justify="right")
    for job, summary in jobs.items():
        left = summary.get("departure")
        if left:
            split = left["checkpoint"] or {"branches": math.nan, "alignment": math.nan}
            numbers = (left["growth"], split["branches"], split["alignment"], left["ratio"])
            end = "" if left["sublayer"] is None else str(left["sublayer"])
            name = str(summary["config"]["model"]["name"])
            table.add_row(job, name, *(short(number, DIGITS) for number in numbers), end)
    return table


MOST_BLOCKS = 12  # rows of the table of λ by block


def block_table(values: Mapping[str, Any]) -> Table:
    """λ by block: from the block before and from the first one.

    Beyond MOST_BLOCKS some, as in ``shown_rows``. values: one curve's entry of ``lambda`` in
    summary.json. No rows where there is a single block.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("block", justify="right")
    columns = []
    for suffix, of in (("", ""), ("_gradient", "gradient ")):
        for key, head in (("pairwise", "λ pairwise"), ("from_first", "λ from first")):
            if values.get(f"lambda_{key}{suffix}"):
                columns.append(values[f"lambda_{key}{suffix}"])
                table.add_column(f"{of}{head}", justify="right")
    blocks = len(columns[0]) + 1 if columns else 0
    if not blocks:
        return table
    grown = np.exp(2 * blocks * np.array(values["lambda_from_first"], float))  # of the mean square
    for i in shown_rows(grown, range(len(grown)), fallen(grown), MOST_BLOCKS):
        table.add_row(str(i + 2), *(short(column[i], DIGITS) for column in columns))
    return table


def _shown(steps: pd.DataFrame) -> pd.DataFrame:
    """All steps of a shallow curve; of a deep one the blocks' ends, as in ``shown_rows``."""
    if len(steps) <= DEEP:
        return steps
    v = steps["mean_square"].to_numpy(float)
    last_of_block = ~steps["block"].duplicated(keep="last").to_numpy()
    resets = np.flatnonzero(steps["kind"] == "renorm")
    falls = sorted({*resets.tolist(), *fallen(v)})
    return steps.iloc[shown_rows(v, np.flatnonzero(last_of_block).tolist(), falls, _MOST_ROWS)]


def fallen(v: np.ndarray) -> list[int]:
    """The rows of a curve v (R,) that leave less than FALL of the row before."""
    return (np.flatnonzero(v[1:] < FALL * v[:-1]) + 1).tolist()


def shown_rows(v: np.ndarray, ends: Sequence[int], falls: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of a curve's rows, so that peaks and resets show.

    The first, the last and the largest; each fall with the row before it, or every n-th fall where
    there are too many; in the room that is left every n-th of ``ends``. v (R,).
    """
    last = len(v) - 1
    always = {0, last, int(np.nanargmax(v)) if np.isfinite(v).any() else 0}
    always |= {last - 1} if last in falls else set()
    n = 1
    while len(always | (pairs := {j for i in falls[::n] for j in (i - 1, i)})) > most:
        n += 1
    rows = always | pairs
    rest = [i for i in ends if i not in rows and i not in falls]  # no reset without its peak
    if rest and len(rows) < most:
        every = math.ceil(len(rest) / (most - len(rows)))
        rows |= set(rest[every - 1 :: every])
    return sorted(rows)
