"""RoPE's θ and scaling from either of transformers' spellings."""

from __future__ import annotations

from simlab.config import ConfigError, Llama3RopeConfig, YarnConfig
from simlab.config.fields import REQUIRED, Fields
from simlab.config.rope import llama3_scaling

_ORIGINAL = "original_max_position_embeddings"
# The scalings, and the keys of each; transformers ignores another's keys, and warns.
ROPE_KEYS = {
    "default": "",
    "yarn": f"factor {_ORIGINAL} attention_factor beta_fast beta_slow truncate mscale mscale_all_dim",
    "llama3": f"factor {_ORIGINAL} low_freq_factor high_freq_factor",
}
LAYER_TYPES = ("full_attention", "sliding_attention")


def read_transformers_rope(
    fields: Fields,
    default_theta: float,
    by_layer: bool = False,
    top: str = "rope_theta",
    partial: bool = False,
) -> tuple[float, YarnConfig | None, Llama3RopeConfig | None]:
    """``rope_theta`` and ``rope_scaling`` before transformers 5, ``rope_parameters`` since.

    by_layer: the latter may be by layer type, of which full attention alone is scaled (OLMo 3). top:
    the family's name of the θ that is beside them. partial: ``read_rotary`` reads the share of the
    channels that RoPE turns, which is else all. A file
    may have both spellings, if they don't contradict each other. Of such a file transformers 5.23
    forgets the θ in ``rope_parameters``, and of an OLMo 3 with ``rope_theta`` it gives that θ to full
    attention alone: here the config's θ holds, for every layer. Raises ConfigError for scaling that
    simlab doesn't compute.
    """
    new, old = fields.node("rope_parameters", {}), fields.node("rope_scaling", {})
    full, sliding = new, Fields({})
    beside = fields.number(top, 1.0, above=True, default=None)
    default = None
    if by_layer and not new.values.keys().isdisjoint(LAYER_TYPES):
        new.only("RoPE by layer type", LAYER_TYPES)
        full, sliding = (new.node(name, {}) for name in LAYER_TYPES)
        default = beside or default_theta
    sections = (full, old, sliding)
    if not partial:
        for section in sections:
            section.must_be(partial_rotary_factor=1.0)
    kinds = [_kind(section) for section in sections]
    if kinds[2] != "default":
        raise sliding.fail("rope_type", kinds[2], "not supported; allowed: default")
    thetas = {
        section.number("rope_theta", 1.0, above=True, default=default)
        for section in (full, sliding)
    }
    thetas = (thetas | {beside, old.number("rope_theta", 1.0, above=True, default=None)}) - {None}
    if len(thetas) > 1:
        raise ConfigError(
            f"{fields.prefix}{top} differs between sections or layer types, which is not supported"
        )
    theta = next(iter(thetas), None) or default_theta
    scaled = [(s, kind) for s, kind in zip((full, old), kinds, strict=False) if kind != "default"]
    if not scaled:
        return theta, None, None
    if len(scaled) > 1 and _scaling(full) != _scaling(old):
        raise ConfigError(
            f"{fields.prefix}rope_parameters and rope_scaling scale RoPE in different ways: leave one"
        )
    scaling, kind = scaled[0]
    longest = fields.take("max_position_embeddings")
    original = scaling.integer(_ORIGINAL, default=longest or REQUIRED)
    factor = scaling.number("factor", 1.0)
    if kind == "llama3":
        return theta, None, llama3_scaling(scaling, factor, original)
    yarn = YarnConfig(
        factor=factor,
        original_length=original,
        beta_fast=scaling.number("beta_fast", 1e-6, default=32.0),
        beta_slow=scaling.number("beta_slow", 1e-6, default=1.0),
        attention_factor=scaling.number("attention_factor", 1e-6, default=None),
    )
    return theta, yarn, None


def read_layered_rope(fields: Fields) -> tuple[float, float, float | None]:
    """Gemma 3's θ of full attention and of layers with a window, and the factor that scales the former.

    ``rope_parameters`` by layer type, or ``rope_theta``, ``rope_local_base_freq`` and ``rope_scaling``
    before transformers 5; a section's θ counts before one beside it. Raises ConfigError for scaling
    that simlab doesn't compute.
    """
    sections = fields.node("rope_parameters", {})
    sections.only("RoPE by layer type", LAYER_TYPES)
    full, sliding = (sections.node(name, {}) for name in LAYER_TYPES)
    full.values |= fields.node("rope_scaling", {}).values
    thetas = []
    for section, name, default in (
        (full, "rope_theta", 1_000_000.0),
        (sliding, "rope_local_base_freq", 10_000.0),
    ):
        beside = fields.number(name, 1.0, above=True, default=default)
        thetas.append(section.number("rope_theta", 1.0, above=True, default=beside))
        kinds = {section.values.get(key) for key in ("rope_type", "type")} - {None}
        allowed = ("default", "linear") if section is full else ("default",)
        for key in ("rope_type", "type"):
            section.computed(key, allowed, "default")
        if len(kinds) > 1:
            raise section.fail("type", section.values["type"], "must be what rope_type is")
        scaled = "factor" if "linear" in kinds else ""
        section.only("RoPE", ("rope_type", "type", "rope_theta", *scaled.split()))
    linear = full.values.get("rope_type", full.values.get("type")) == "linear"
    return thetas[0], thetas[1], full.number("factor", 1.0) if linear else None


def read_rotary(fields: Fields, top: str, default: float, head_dim: int) -> float:
    """The share of a head's channels that RoPE turns, in RoPE's sections or beside them.

    top: the family's name of the one beside them. Raises ConfigError where they differ, and where the
    channels aren't pairs.
    """
    found = {fields.number(top, 0.0, 1.0, default=None)}
    for name in ("rope_parameters", "rope_scaling"):
        section = fields.node(name, {})
        found.add(section.number("partial_rotary_factor", 0.0, 1.0, default=None))
    shares = [share for share in found if share is not None] or [default]
    if len(shares) > 1:
        raise ConfigError(f"{fields.prefix}{top} differs between sections, which is not supported")
    if int(head_dim * shares[0]) % 2:
        raise fields.fail(top, shares[0], "an odd number of a head's channels; must be even")
    return shares[0]


def _scaling(section: Fields) -> dict[str, object]:
    kind = {"type": section.values.get("rope_type") or section.values.get("type")}
    return {k: v for k, v in section.values.items() if k not in ("rope_theta", "rope_type")} | kind


def _kind(section: Fields) -> str:
    """A section's type of RoPE, after a check of its keys. Raises ConfigError."""
    section.must_be(truncate=True, mscale=None, mscale_all_dim=None)
    named = [key for key in ("rope_type", "type") if section.values.get(key) is not None]
    kinds = [section.computed(key, ROPE_KEYS) for key in named]
    if len(set(kinds)) > 1:
        raise section.fail("type", kinds[1], f"must be rope_type={kinds[0]}, or not be there")
    kind = kinds[0] if kinds else "default"
    there = {key: value for key, value in section.values.items() if value is not None}
    known = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE_KEYS[kind].split())
    Fields(there, section.prefix, section.shown).only(f"rope_type={kind}", known)
    return kind
