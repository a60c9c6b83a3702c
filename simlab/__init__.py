"""simlab: how activations grow with depth, for random-init and pretrained transformers.

    import simlab
    r = simlab.measure("olmo2_7b", norm="swin_renorm", seeds=8)   # .curves, .verdict, .plot("norm")
    simlab.compare(r, simlab.measure("olmo2_7b", norm="pre"))
    simlab.multirun({"depth": [8, 16, 32]}, "small")              # .frame, .table, .plot()
    simlab.load("outputs/…")                                      # a finished run or sweep again
    simlab.probe(model, ids, random=8)                            # the same of any decoder in memory
    model = simlab.build_model(simlab.compose(["model=small"]))   # such a model, as one nn.Module

Imports are late, so that ``--help`` and tab completion don't wait for torch.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing takes 20 ms, in which Ctrl-C is Python's, before simlab handles it
if TYPE_CHECKING:
    from typing import Any

    from simlab.api import compare, load, load_run, load_sweep, measure, multirun, probe
    from simlab.config import ConfigError, RunConfig
    from simlab.config.validate import compose
    from simlab.experiment import RunResult, build_model
    from simlab.measurement.layout import Layout, Sublayer
    from simlab.report.plot import plot
    from simlab.results import Comparison, Result, SweepResult
    from simlab.results.probed import Probed

__version__: str  # of the package that is installed
__all__ = [
    "Comparison",
    "ConfigError",
    "Layout",
    "Probed",
    "Result",
    "RunConfig",
    "RunResult",
    "Sublayer",
    "SweepResult",
    "__version__",
    "build_model",
    "compare",
    "compose",
    "load",
    "load_run",
    "load_sweep",
    "measure",
    "multirun",
    "plot",
    "probe",
]

_HOMES = {
    "measure": "simlab.api",
    "compare": "simlab.api",
    "multirun": "simlab.api",
    "load": "simlab.api",
    "load_run": "simlab.api",
    "load_sweep": "simlab.api",
    "plot": "simlab.report.plot",
    "Result": "simlab.results",
    "SweepResult": "simlab.results",
    "Comparison": "simlab.results",
    "ConfigError": "simlab.config",
    "RunConfig": "simlab.config",
    "compose": "simlab.config.validate",
    "RunResult": "simlab.experiment",
    "build_model": "simlab.experiment",
    "probe": "simlab.api",
    "Probed": "simlab.results.probed",
    "Layout": "simlab.measurement.layout",
    "Sublayer": "simlab.measurement.layout",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("simlab")
    if name not in _HOMES:
        raise AttributeError(f"module 'simlab' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    hidden = {"Any", "TYPE_CHECKING", "annotations"}  # imported for the types above
    return sorted({*globals(), *__all__} - hidden)
