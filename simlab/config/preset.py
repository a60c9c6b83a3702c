"""The differences between a run's shape and the preset in conf/model/ that it is named after."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Any

from omegaconf import OmegaConf

from simlab.config.schema import CONF_DIR, ModelConfig


def changed(model: ModelConfig) -> dict[str, Any]:
    """The fields that differ from conf/model/NAME.yaml, with the run's values.

    Empty where they are the preset's, and where no preset has that name.
    """
    paths = {path.stem: path for path in (CONF_DIR / "model").glob("*.yaml")}
    if model.name not in paths:
        return {}
    preset = OmegaConf.load(paths[model.name])
    plain: Any = OmegaConf.to_container(preset)
    for other in ("defaults", "norm"):  # of its norm and init, which every title names itself
        plain.pop(other, None)
    for key, value in plain.items():  # kv_heads: ${heads} is to follow the run's heads
        if isinstance(value, int):
            preset[key] = getattr(model, key)
    followed: Any = OmegaConf.to_container(preset, resolve=True)
    base: dict[str, Any] = {k: v if isinstance(v, int) else followed[k] for k, v in plain.items()}
    base |= base["model"]
    if base["head_dim"] is None:
        base["head_dim"] = model.width // model.heads
    own = {key: getattr(model, key) for key in base if hasattr(model, key)}
    # is_dataclass is also true of classes, which mypy then holds against asdict; these are instances.
    values = {key: asdict(v) if is_dataclass(v) else v for key, v in own.items()}  # type: ignore[arg-type]
    return {key: own[key] for key in own if values[key] != base[key]}
