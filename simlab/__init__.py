"""simlab: how activations grow with depth, for random-init and pretrained transformers.

    from simlab import build_model, compose, probe
    from simlab.experiment import run
    config = compose(["model=small", "norm=swin_renorm"])
    result = run(config)            # .curve (a DataFrame), .summary, .verdicts
    model = build_model(config)     # such a model, as one nn.Module
    rows = probe(model, ids).rows() # the same rows, of any PyTorch decoder

Imports are late, so that ``--help`` and tab completion don't wait for torch.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing takes 20 ms, in which Ctrl-C is Python's, before simlab handles it
if TYPE_CHECKING:
    from typing import Any

    from simlab.config import ConfigError, RunConfig
    from simlab.config.validate import compose
    from simlab.experiment import RunResult, build_model
    from simlab.measurement.layout import Layout, Sublayer
    from simlab.measurement.model_probe import probe

__version__: str  # of the package that is installed
__all__ = [
    "ConfigError",
    "Layout",
    "RunConfig",
    "RunResult",
    "Sublayer",
    "__version__",
    "build_model",
    "compose",
    "probe",
]

_HOMES = {
    "ConfigError": "simlab.config",
    "RunConfig": "simlab.config",
    "compose": "simlab.config.validate",
    "RunResult": "simlab.experiment",
    "build_model": "simlab.experiment",
    "probe": "simlab.measurement.model_probe",
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
