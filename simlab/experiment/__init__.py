"""The pipeline: a checked config to measured curves, held against theory."""

from simlab.experiment.pipeline import (
    ENGINES,
    Curves,
    Prepared,
    RunResult,
    build_model,
    measure,
    measured_curves,
    open_checkpoint,
    prepare,
    run,
    summarise,
    threads,
    versions,
    weight_table,
)

__all__ = [
    "ENGINES",
    "Curves",
    "Prepared",
    "RunResult",
    "build_model",
    "measure",
    "measured_curves",
    "open_checkpoint",
    "prepare",
    "run",
    "summarise",
    "threads",
    "versions",
    "weight_table",
]
