"""RoPE's θ and scaling from either of transformers' spellings."""

from __future__ import annotations

from simlab.config import ConfigError, Llama3RopeConfig, YarnConfig
from simlab.config.fields import REQUIRED, Fields

ROPE_TYPES = ("default", "yarn", "llama3")


def read_transformers_rope(
    fields: Fields, default_theta: float
) -> tuple[float, YarnConfig | None, Llama3RopeConfig | None]:
    """``rope_theta`` and ``rope_scaling`` before transformers 5, ``rope_parameters`` since.

    For OLMo 3 the latter are by layer type, and only full attention is scaled. Raises ConfigError
    for scaling that simlab doesn't compute.
    """
    new = fields.node("rope_parameters", {})
    scaling, sliding = new.node("full_attention", {}), new.node("sliding_attention", {})
    if not scaling.values and "sliding_attention" not in new.values:
        scaling = new
    if not scaling.values:
        scaling = fields.node("rope_scaling", {})
    given = fields.take("rope_theta", default_theta)
    theta = scaling.number("rope_theta", 1.0, above=True, default=given)
    if sliding.number("rope_theta", 1.0, above=True, default=theta) != theta:
        raise ConfigError(
            f"{new.prefix}rope_theta differs between layer types, which is not supported"
        )
    for rope in (fields, scaling, sliding):
        rope.must_be(partial_rotary_factor=1.0)
    sliding.must_be(rope_type="default")
    spelling = "rope_type" if "rope_type" in scaling.values else "type"
    kind = scaling.choice(spelling, ROPE_TYPES, "default")
    if kind == "default":
        return theta, None, None
    longest = fields.take("max_position_embeddings")
    original = scaling.integer("original_max_position_embeddings", default=longest or REQUIRED)
    factor = scaling.number("factor", 1.0)
    if kind == "llama3":
        return theta, None, read_llama3(scaling, factor, original)
    scaling.must_be(truncate=True, mscale=None, mscale_all_dim=None)
    yarn = YarnConfig(
        factor=factor,
        original_length=original,
        beta_fast=scaling.number("beta_fast", 1e-6, default=32.0),
        beta_slow=scaling.number("beta_slow", 1e-6, default=1.0),
        attention_factor=scaling.number("attention_factor", 1e-6, default=None),
    )
    return theta, yarn, None


def read_llama3(scaling: Fields, factor: float, original: int) -> Llama3RopeConfig:
    """Llama 3's scaling, whose two factors bound the pairs that are between. Raises ConfigError."""
    low = scaling.number("low_freq_factor", 1e-6)
    high = scaling.number("high_freq_factor", 1e-6)
    if not low < high:
        raise scaling.fail("low_freq_factor", low, f"must be below high_freq_factor={high:g}")
    return Llama3RopeConfig(factor, low, high, original)
