"""The result of opening a checkpoint folder, and the parts of a config that every format reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from simlab.checkpoints.formats.own_init import OwnInit
from simlab.checkpoints.storage import StoredTensor
from simlab.config import ConfigError, ModelConfig, divides
from simlab.config.fields import LARGEST_INTEGER, Fields


@dataclass(frozen=True)
class Opened:
    """A checkpoint's shape, and where its tensors lie.

    keys: our parameter names to the file's, {} standing for the block. Several of ours with one of
    theirs are stacked in it by rows, in the map's order (a fused q‖k‖v). A norm without an entry has
    no gain: it is 1. tensors: the file's names to where their bytes are, optimizer state left out.
    config: the file that says the shape. init: how its weights were drawn before training. head: the
    one that the files hold although it is tied. other_head: tensors of another task's head. unread: a
    line on what is in or beside these files and could be taken for what is measured, but isn't; empty
    where there is nothing. stored_as: a line on how the weights are quantised, of a format that may.
    model_type: what the config calls this kind of model, of a format whose configs do.
    """

    format: str
    model: ModelConfig
    keys: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]
    config: Path
    init: OwnInit
    head: StoredTensor | None = None
    other_head: str = ""
    unread: str = ""
    stored_as: str = ""
    model_type: str = ""


def layers(fields: Fields, key: str, tensors: int) -> int:
    """The number of blocks. Raises ConfigError if it is larger than the number of tensors."""
    depth = fields.integer(key)
    if depth > tensors:
        raise ConfigError(
            f"{fields.prefix}{key}={depth}, but the checkpoint holds {tensors} tensors"
        )
    return depth


class Heads(TypedDict):
    """Fields of ModelConfig."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int


def read_heads(
    fields: Fields, names: tuple[str, str, str, str], kv_default: int | None = None
) -> Heads:
    """Width, heads, kv_heads and head_dim; the last two default to what the first two imply.

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
    return Heads(width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
