"""A run in one line: which model, norm and init it is about."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass

from simlab.config.fields import as_typed
from simlab.config.preset import changed
from simlab.config.schema import FamilyConfig, RunConfig

# The fields of NormConfig that every placement has; the others are a placement's own.
COMMON_NORM_KEYS = ("placement", "type", "eps", "gain")


def title(config: RunConfig) -> str:
    """One line that says which model, norm and init a run is about.

    Where overrides change the preset's shape it says what: ``olmo2_7b with depth 64, width 512``.
    """
    model, init = config.shape, config.init
    std = [f"{init.std:g}"] if init.std is not None else []
    cut = [f"±{init.truncate:g}σ"] if init.truncate is not None else []
    shape = f"{model.name}: depth {model.depth}, width {model.width}"
    other = {} if config.source.stored else changed(model)
    if other:
        differences = [k if is_dataclass(v) else f"{k} {as_typed(v)}" for k, v in other.items()]
        shape = f"{model.name} with {', '.join(differences)}"
    if isinstance(model, FamilyConfig):
        family = "" if model.family == model.name else f", {model.family}"
        return shape + family + ", random init as transformers draws it" * bool(config.seeds)
    norm = model.norm.placement + f" {model.norm.type}" * model.norm.elementwise
    if not config.seeds:
        return f"{shape}, norm {norm}"
    rule = init.rule + (f"({', '.join(std + cut)})" if std or cut else "")
    own = {k: v for k, v in asdict(model.norm).items() if k not in COMMON_NORM_KEYS}
    own = {k: _written(v) for k, v in own.items() if v is not None}
    constants = "".join(f" {key} {value}" for key, value in own.items())
    drawn = "random init" if config.source.stored else "init"
    return f"{shape}, norm {norm}{constants}, {drawn} {rule}"


def _written(value: str | float | tuple[float, ...]) -> str:
    """A placement's constant: two ends that are one number as that number."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return as_typed(value)
    ends = dict.fromkeys(value if isinstance(value, tuple) else [value])
    text = ",".join(f"{end:g}" for end in ends)
    return f"[{text}]" if len(ends) > 1 else text
