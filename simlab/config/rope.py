"""RoPE's long-context scalings from checked fields."""

from __future__ import annotations

from simlab.config.errors import ConfigError
from simlab.config.fields import Fields
from simlab.config.schema import Llama3RopeConfig, YarnConfig


def read_yarn(model: Fields) -> YarnConfig | None:
    """YaRN's keys, of a run's ``model.yarn``. Raises ConfigError."""
    node = _section(model, "yarn")
    if node is None:
        return None
    yarn = YarnConfig(
        factor=node.number("factor", 1.0),
        original_length=node.integer("original_length"),
        beta_fast=node.number("beta_fast", 1e-6),
        beta_slow=node.number("beta_slow", 1e-6),
        attention_factor=node.number("attention_factor", 0.0, above=True, default=None),
    )
    node.done()
    return yarn


def read_llama3(model: Fields) -> Llama3RopeConfig | None:
    """Llama 3.1's keys, of a run's ``model.llama3``. Raises ConfigError, also for YaRN beside them."""
    node = _section(model, "llama3")
    if node is None:
        return None
    if model.values.get("yarn") is not None:
        raise ConfigError("model.llama3 and model.yarn both scale RoPE: one of them must be null")
    llama3 = llama3_scaling(node, node.number("factor", 1.0), node.integer("original_length"))
    node.done()
    return llama3


def read_linear(model: Fields) -> float | None:
    """``model.rope_linear``, a factor by which all angles are divided. Raises ConfigError."""
    linear = model.number("rope_linear", 1.0, default=None)
    if linear is not None:
        for other in ("yarn", "llama3"):
            if model.values.get(other) is not None:
                why = f"model.{other} scales RoPE too: one of them must be null"
                raise model.fail("rope_linear", linear, why)
    return linear


def llama3_scaling(node: Fields, factor: float, original: int) -> Llama3RopeConfig:
    """Llama 3's scaling, whose two factors bound the pairs that are between. Raises ConfigError."""
    low = node.number("low_freq_factor", 1e-6)
    high = node.number("high_freq_factor", 1e-6)
    if not low < high:
        raise node.fail("low_freq_factor", low, f"must be below high_freq_factor={high:g}")
    return Llama3RopeConfig(factor, low, high, original)


def _section(model: Fields, key: str) -> Fields | None:
    """The keys below a key that may be null."""
    if model.values.get(key) is None:
        model.take(key)
        return None
    return model.node(key)
