"""RoPE's θ and scaling from OLMo-core's config."""

from __future__ import annotations

import math
from dataclasses import dataclass

from simlab.checkpoints.formats.olmo_core_keys import ROPE, SCALINGS
from simlab.config import ConfigError, Llama3RopeConfig, YarnConfig
from simlab.config.fields import Fields


@dataclass(frozen=True)
class Rope:
    """A block's RoPE."""

    theta: float
    yarn: YarnConfig | None = None
    llama3: Llama3RopeConfig | None = None


def read_olmo_core_rope(attention: Fields, head_dim: int) -> Rope:
    """From an attention's section. Raises ConfigError for what simlab doesn't compute."""
    rope = attention.node("rope", {})
    if not rope.values:
        raise ConfigError(f"{attention.prefix}rope=null: attention without RoPE is not supported")
    rope.choice("name", ("default",), "default")
    ROPE.check(rope)
    theta = rope.number("theta", 1.0, above=True, default=500_000.0)
    scaling = rope.node("scaling", {})
    if not scaling.values:
        return Rope(theta)
    name = scaling.take("_CLASS_")
    kind = name.rpartition(".")[2] if isinstance(name, str) else ""
    if kind not in SCALINGS:
        raise scaling.fail("_CLASS_", name, f"allowed: {', '.join(SCALINGS)}")
    SCALINGS[kind].check(scaling)
    if kind == "YaRNRoPEScalingConfig":
        return Rope(theta, yarn=_yarn(scaling, theta, head_dim))
    if kind == "ABFRoPEScalingConfig":  # only another θ
        return Rope(scaling.number("new_theta", 1.0, above=True, default=8_000_000.0))
    low = scaling.number("low_freq_proportion", 0.0, default=0.0)
    high = scaling.number("high_freq_proportion", 1e-6, default=0.25)
    if not low < 1 - high:
        raise scaling.fail("low_freq_proportion", low, "must be below 1 − high")
    return Rope(
        theta,
        llama3=Llama3RopeConfig(
            factor=scaling.number("factor", 1.0, default=32.0),
            low_freq_factor=1 / (1 - low),
            high_freq_factor=1 / high,
            original_length=scaling.integer("old_context_len", default=8192),
        ),
    )


def _yarn(scaling: Fields, theta: float, head_dim: int) -> YarnConfig:
    yarn = YarnConfig(
        factor=scaling.number("factor", 1.0, default=8.0),
        original_length=scaling.integer("old_context_len", default=8192),
        beta_fast=scaling.number("beta_fast", 1e-6, default=32.0),
        beta_slow=scaling.number("beta_slow", 1e-6, default=1.0),
    )
    turns = yarn.original_length / (yarn.beta_slow * 2 * math.pi)
    last = math.ceil(head_dim * math.log(turns) / (2 * math.log(theta)))
    if last > head_dim // 2 - 1:  # where OLMo-core's ramp ends early and transformers' doesn't
        raise scaling.fail(
            "old_context_len",
            yarn.original_length,
            f"YaRN's ramp must end within head_dim / 2 pairs, which takes a theta above {theta:g}",
        )
    return yarn
