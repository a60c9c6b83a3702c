"""RoPE's θ and scaling from either of transformers' spellings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simlab.checkpoints.formats.fields import ABOVE_1, brief, number, only, positive, section
from simlab.config import ConfigError, Llama3RopeConfig, YarnConfig

ROPE_TYPES = ("default", "yarn", "llama3")


def read_rope(
    values: dict[str, Any], path: Path, default_theta: float
) -> tuple[float, YarnConfig | None, Llama3RopeConfig | None]:
    """``rope_theta`` and ``rope_scaling`` before transformers 5, ``rope_parameters`` since.

    For OLMo 3 the latter are by layer type, and only full attention is scaled. Raises ConfigError
    for scaling that simlab doesn't compute.
    """
    new = section(values, "rope_parameters", path)
    full = section(new, "full_attention", path) or ({} if "sliding_attention" in new else new)
    scaling = full or section(values, "rope_scaling", path)
    theta = number(scaling, "rope_theta", path, values.get("rope_theta", default_theta), ABOVE_1)
    sliding = section(new, "sliding_attention", path)
    if number(sliding, "rope_theta", path, theta) != theta:
        raise ConfigError(f"{path}: rope_theta differs between layer types, which is not supported")
    for rope in (values, scaling, sliding):
        only(rope, path, partial_rotary_factor=1.0)
    only(sliding, path, rope_type="default")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ConfigError(f"{path}: rope_type={brief(kind)}: allowed: {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return theta, None, None
    original = positive(
        scaling, "original_max_position_embeddings", path, values.get("max_position_embeddings")
    )
    factor = number(scaling, "factor", path, low=1.0)
    if kind == "llama3":
        return theta, None, read_llama3(scaling, path, factor, original)
    only(scaling, path, truncate=True, mscale=None, mscale_all_dim=None)
    given = scaling.get("attention_factor")
    yarn = YarnConfig(
        factor=factor,
        original_length=original,
        beta_fast=number(scaling, "beta_fast", path, 32.0, 1e-6),
        beta_slow=number(scaling, "beta_slow", path, 1.0, 1e-6),
        attention_factor=None
        if given is None
        else number(scaling, "attention_factor", path, low=1e-6),
    )
    return theta, yarn, None


def read_llama3(
    scaling: dict[str, Any], path: Path, factor: float, original: int
) -> Llama3RopeConfig:
    """Llama 3's scaling, whose two factors bound the pairs that are between. Raises ConfigError."""
    low = number(scaling, "low_freq_factor", path, low=1e-6)
    high = number(scaling, "high_freq_factor", path, low=1e-6)
    if not low < high:
        raise ConfigError(
            f"{path}: low_freq_factor={low:g}: must be below high_freq_factor={high:g}"
        )
    return Llama3RopeConfig(factor, low, high, original)
