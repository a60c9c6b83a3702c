"""The pipeline: a checked config to measured curves, held against the laws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from simlab.analysis.compare import with_outside
from simlab.analysis.verdict import Verdict, judge
from simlab.config import RunConfig
from simlab.experiment.batches import MeasuredCurves, measured_curves
from simlab.experiment.prepare import Prepared, prepare
from simlab.experiment.summary import summarise, weight_table
from simlab.experiment.theory import predicted
from simlab.measurement.frame import to_frame


@dataclass(frozen=True)
class RunResult:
    """A run's curves (the rows of curve.csv), its summary (summary.json) and its verdicts.

    weights: the rows of weights.csv, a checkpoint's tensors.
    """

    config: RunConfig
    curve: pd.DataFrame
    summary: dict[str, Any]
    verdicts: dict[str, Verdict]
    weights: pd.DataFrame | None = None


def run(config: RunConfig) -> RunResult:
    """Everything from a config to its verdict. Raises ConfigError."""
    return measure(prepare(config))


def measure(
    ready: Prepared,
    on_block: Callable[[], None] = lambda: None,
    curves_of: Callable[..., MeasuredCurves] = measured_curves,
) -> RunResult:
    """Measure every curve of a run, predict the random inits', and judge.

    on_block: called after each block of each curve. curves_of: measures the curves; a sweep gives one
    that shares work between jobs (``sharing``).
    """
    measured = curves_of(ready, on_block)
    theory = predicted(ready) if ready.config.seeds else None
    frame, by_curve, cuts = to_frame(measured, ready.entries, theory)
    if ready.checkpoint:
        frame = with_outside(frame)
    verdicts = {
        name: judge(of_curve, ready.config.dtype, drawn=name == "random")
        for name, of_curve in by_curve.items()
    }
    summary = summarise(ready, measured, frame, cuts, verdicts, theory)
    return RunResult(ready.config, frame, summary, verdicts, weight_table(ready))
