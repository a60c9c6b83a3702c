"""The pipeline: a checked config to measured curves, held against the laws."""

from simlab.experiment.batches import ENGINE_WEIGHTS, MeasuredCurves, measured_curves
from simlab.experiment.pipeline import RunResult, measure, run
from simlab.experiment.prepare import Prepared, build_model, open_checkpoint, prepare
from simlab.experiment.summary import summarise, versions, weight_table

__all__ = [
    "ENGINE_WEIGHTS",
    "MeasuredCurves",
    "Prepared",
    "RunResult",
    "build_model",
    "measure",
    "measured_curves",
    "open_checkpoint",
    "prepare",
    "run",
    "summarise",
    "versions",
    "weight_table",
]
