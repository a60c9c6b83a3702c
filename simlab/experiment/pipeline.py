"""The pipeline: a checked config to measured curves, held against the laws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from simlab.analysis.compare import with_outside
from simlab.analysis.curve import GIVEN, Curves
from simlab.analysis.verdict import Verdict, judge
from simlab.config import RunConfig
from simlab.experiment.prepare import Prepared, prepare
from simlab.experiment.summary import summarise, weight_table
from simlab.experiment.theory import predicted, predicted_curve
from simlab.measurement.frame import Cuts, to_frame, vector_rows

if TYPE_CHECKING:
    from simlab.experiment.batches import MeasuredCurves


@dataclass(frozen=True)
class RunResult:
    """The result of ``simlab.experiment.run``.

    Attributes:
        config: The config that was measured; a checkpoint's shape is filled in.
        curve: The rows of curve.csv.
        summary: The content of summary.json.
        verdicts: A verdict per kind of curve: random, checkpoint or theory.
        weights: The rows of weights.csv, a checkpoint's tensors.
        streams: The rows of streams.csv, of a placement that carries several vectors.
    """

    config: RunConfig
    curve: pd.DataFrame
    summary: dict[str, Any]
    verdicts: dict[str, Verdict]
    weights: pd.DataFrame | None = None
    streams: pd.DataFrame | None = None


def run(config: RunConfig) -> RunResult:
    """Everything from a config to its verdict. Raises ConfigError."""
    return measure(prepare(config))


def measure(
    ready: Prepared,
    on_block: Callable[[], None] = lambda: None,
    curves_of: Callable[..., MeasuredCurves] | None = None,
) -> RunResult:
    """Measure every curve of a run, predict the random inits', and judge.

    on_block: called after each block of each curve. curves_of: measures the curves, by default
    ``measured_curves``; a sweep gives one that shares work between jobs (``sharing``).
    With ``source.keep=false`` the checkpoint's files are closed then, and the downloaded ones removed.
    """
    try:
        return _result(ready, on_block, curves_of)
    finally:
        if ready.checkpoint and not ready.config.source.keep:
            ready.checkpoint.release()


def _result(
    ready: Prepared,
    on_block: Callable[[], None],
    curves_of: Callable[..., MeasuredCurves] | None,
) -> RunResult:
    config = ready.config
    measured = _measured(ready, on_block, curves_of) if config.measures else []
    # After measuring, so that its memory isn't part of the measurement's peak.
    theory = predicted(ready, on_block) if config.seeds else None
    frame, cuts = pd.DataFrame(), Cuts([], [])
    verdicts: dict[str, Verdict] = {}
    streams = None
    if measured:
        frame, by_curve, cuts = to_frame(measured, ready.entries, theory)
        verdicts = judge_all(frame, by_curve, config.dtype)
        streams = vector_rows(measured, frame)
    instead = theory if config.engine == "theory" else None
    if instead:
        rows, curve = predicted_curve(ready, instead)
        frame = pd.concat([frame, rows], ignore_index=True)
        verdicts["theory"] = judge(curve, "float64", "theory", prediction=instead)
    if ready.checkpoint:
        frame = with_outside(frame, instead)
    summary = summarise(ready, measured, frame, cuts, verdicts, theory)
    return RunResult(ready.config, frame, summary, verdicts, weight_table(ready), streams)


def judge_all(
    frame: pd.DataFrame, by_curve: Mapping[str, Curves], dtype: str
) -> dict[str, Verdict]:
    """A verdict per kind of measured curve. frame, by_curve: from ``to_frame``."""
    outliers = set(frame.loc[frame["massive"] == 1, "curve"]) & {*GIVEN}
    return {
        name: judge(of_curve, dtype, name, massive=name in outliers)
        for name, of_curve in by_curve.items()
    }


def _measured(
    ready: Prepared,
    on_block: Callable[[], None],
    curves_of: Callable[..., MeasuredCurves] | None,
) -> MeasuredCurves:
    from simlab.experiment.batches import measured_curves  # late: it needs torch

    return (curves_of or measured_curves)(ready, on_block)
