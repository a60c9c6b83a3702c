"""RoPE's θ and scaling from OLMo-core's config."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simlab.checkpoints.formats.fields import (
    ABOVE_1,
    brief,
    choice,
    number,
    only,
    positive,
    section,
)
from simlab.config import ConfigError, Llama3RopeConfig, YarnConfig

SCALINGS = ("YaRNRoPEScalingConfig", "StepwiseRoPEScalingConfig", "ABFRoPEScalingConfig")


@dataclass(frozen=True)
class Rope:
    """A block's RoPE."""

    theta: float
    yarn: YarnConfig | None = None
    llama3: Llama3RopeConfig | None = None


def read_rope(attention: dict[str, Any], head_dim: int, path: Path) -> Rope:
    """From an attention's section. Raises ConfigError for what simlab doesn't compute."""
    rope = section(attention, "rope", path)
    if not rope:
        raise ConfigError(f"{path}: rope=null: attention without RoPE is not supported")
    choice(rope, "name", path, ("default",), "default")
    only(rope, path, no_global_rope=False, partial_rotary_factor=1.0)
    theta = number(rope, "theta", path, 500_000.0, ABOVE_1)
    scaling = section(rope, "scaling", path)
    if not scaling:
        return Rope(theta)
    kind = str(scaling.get("_CLASS_")).rpartition(".")[2]
    if kind not in SCALINGS:
        raise ConfigError(f"{path}: scaling: {brief(kind)}: allowed: {', '.join(SCALINGS)}")
    if kind == "YaRNRoPEScalingConfig":
        return Rope(theta, yarn=_yarn(scaling, theta, head_dim, path))
    only(scaling, path, attention_rescale_factor=1.0)
    if kind == "ABFRoPEScalingConfig":  # only another θ
        return Rope(number(scaling, "new_theta", path, 8_000_000.0, ABOVE_1))
    low = number(scaling, "low_freq_proportion", path, 0.0)
    high = number(scaling, "high_freq_proportion", path, 0.25, 1e-6)
    if not low < 1 - high:
        raise ConfigError(f"{path}: low_freq_proportion={low:g}: must be below 1 − high")
    return Rope(
        theta,
        llama3=Llama3RopeConfig(
            factor=number(scaling, "factor", path, 32.0, 1.0),
            low_freq_factor=1 / (1 - low),
            high_freq_factor=1 / high,
            original_length=positive(scaling, "old_context_len", path, 8192),
        ),
    )


def _yarn(scaling: dict[str, Any], theta: float, head_dim: int, path: Path) -> YarnConfig:
    yarn = YarnConfig(
        factor=number(scaling, "factor", path, 8.0, 1.0),
        original_length=positive(scaling, "old_context_len", path, 8192),
        beta_fast=number(scaling, "beta_fast", path, 32.0, 1e-6),
        beta_slow=number(scaling, "beta_slow", path, 1.0, 1e-6),
    )
    turns = yarn.original_length / (yarn.beta_slow * 2 * math.pi)
    last = math.ceil(head_dim * math.log(turns) / (2 * math.log(theta)))
    if last > head_dim // 2 - 1:  # where OLMo-core's ramp ends early and transformers' doesn't
        raise ConfigError(
            f"{path}: old_context_len={yarn.original_length}: YaRN's ramp must end within "
            f"head_dim / 2 pairs, which takes a rope theta above {theta:g}"
        )
    return yarn
