"""A run in one line: which model, norm and init it is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from functools import cache
from typing import Any

from simlab.config.choices import file_of, is_choice, namesakes
from simlab.config.fields import Fields, as_typed
from simlab.config.norm import read_own
from simlab.config.preset import changed
from simlab.config.schema import ELEMENTWISE, FamilyConfig, RunConfig

# The fields of NormConfig that every placement has; the others are a placement's own.
COMMON_NORM_KEYS = ("placement", "type", "eps", "gain")
FEW_KEYS = 2  # of a placement, up to which a title has them all


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
    norm, own = norm_name(asdict(model.norm))
    if not config.seeds:
        return f"{shape}, norm {norm}"
    rule = init.rule + (f"({', '.join(std + cut)})" if std or cut else "")
    constants = "".join(f" {key} {_written(value)}" for key, value in own.items())
    drawn = "random init" if config.source.stored else "init"
    return f"{shape}, norm {norm}{constants}, {drawn} {rule}"


def norm_name(norm: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The choice in conf/norm that a NormConfig's fields are, and its own keys that a title needs.

    All keys of a placement that has one or two; of one with more, those with another value than the
    choice's.
    """
    placement, kind = norm["placement"], norm["type"]
    own = {k: v for k, v in norm.items() if k not in COMMON_NORM_KEYS and v is not None}
    own = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}
    if kind in ELEMENTWISE:
        name = kind if placement == "pre" else f"{placement} {kind}"
        return name, {k: v for k, v in own.items() if v != file_of("norm", kind).get(k)}
    alike = [placement, *namesakes(placement)]
    name = next((each for each in alike if _own_keys(each) == own), placement)
    if name == placement and len(own) <= FEW_KEYS:
        return name, own
    return name, {k: v for k, v in own.items() if v != _own_keys(name).get(k)}


@cache
def _own_keys(name: str) -> dict[str, Any]:
    """The fields of NormConfig that a choice of norm sets besides the common ones.

    None of a placement that isn't a choice: a family's, which transformers computes.
    """
    read = read_own(Fields(file_of("norm", name))) if is_choice("norm", name) else {}
    return {k: v for k, v in read.items() if v is not None}


def _written(value: str | float | tuple[float, ...]) -> str:
    """A placement's constant: two ends that are one number as that number."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return as_typed(value)
    ends = dict.fromkeys(value if isinstance(value, tuple) else [value])
    text = ",".join(f"{end:g}" for end in ends)
    return f"[{text}]" if len(ends) > 1 else text
