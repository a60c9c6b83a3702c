"""The pipeline: a checked config to measured curves, held against the laws.

What needs torch is imported when it is asked for: a predicted curve needs none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simlab.experiment.pipeline import RunResult, measure, run
from simlab.experiment.prepare import Prepared, prepare
from simlab.experiment.summary import summarise, versions, weight_table

if TYPE_CHECKING:
    from simlab.experiment.batches import ENGINE_WEIGHTS, MeasuredCurves, measured_curves
    from simlab.experiment.build import build_model, open_checkpoint

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

_HOMES = dict.fromkeys(("ENGINE_WEIGHTS", "MeasuredCurves", "measured_curves"), "batches")
_HOMES |= dict.fromkeys(("build_model", "open_checkpoint"), "build")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'simlab.experiment' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"simlab.experiment.{_HOMES[name]}"), name)
