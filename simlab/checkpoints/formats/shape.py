"""A checkpoint's depth and heads, with the checks that every layout needs."""

from __future__ import annotations

from simlab.config import ConfigError, divides
from simlab.config.fields import LARGEST_INTEGER, Fields


def layers(fields: Fields, key: str, tensors: int) -> int:
    """The number of blocks, which the tensors' number bounds before anything is made per block."""
    depth = fields.integer(key)
    if depth > tensors:
        raise ConfigError(
            f"{fields.prefix}{key}={depth}, but the checkpoint holds {tensors} tensors"
        )
    return depth


def head_shape(
    fields: Fields,
    names: tuple[str, str, str, str],
    kv_default: int | None = None,
) -> tuple[int, int, int, int]:
    """Width, heads, key/value heads and head_dim, of which the first two decide the others' defaults.

    names: what the format calls them. kv_default: where it isn't one key/value head per head. Raises
    ConfigError where they don't divide.
    """
    width, heads = fields.integer(names[0]), fields.integer(names[1])
    kv_heads = fields.integer(names[2], default=kv_default or heads)
    divides(f"{fields.prefix}{names[2]}", kv_heads, names[1], heads)
    if fields.values.get(names[3]) is None:
        divides(f"{fields.prefix}{names[1]}", heads, names[0], width)
    head_dim = fields.integer(names[3], default=width // heads or 1)
    if head_dim % 2:
        raise fields.fail(names[3], head_dim, "must be even, RoPE turns pairs")
    if heads * head_dim > LARGEST_INTEGER:
        raise fields.fail(
            names[1], heads, f"with {names[3]}={head_dim} together at most {LARGEST_INTEGER}"
        )
    return width, heads, kv_heads, head_dim
