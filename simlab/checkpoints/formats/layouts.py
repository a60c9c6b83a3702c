"""Layouts that are the same model under other names, and what to use instead of those that aren't."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from simlab.checkpoints.storage import StoredTensor
from simlab.config import ConfigError
from simlab.config.fields import brief

# Modules around a model, or around its layers, that torch.compile, DDP, FSDP, checkpointing and
# DeepSpeed leave in the names of a state dict.
_WRAPPERS = {
    "_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module",
}  # fmt: skip
SHARDS, INDEX = "model-*-of-*.safetensors", "model.safetensors.index.json"
_MERGE = (
    "merge it into its base model (peft's merge_and_unload), and give the folder saved from that"
)
# What a folder without readable weights may hold, and what to do; the first that is there is named.
_INSTEAD = (
    (
        SHARDS,
        "a shard, and model.safetensors.index.json isn't there: get that too",
    ),
    ("adapter_model.*", f"an adapter alone: {_MERGE}"),
    ("adapter_config.json", f"an adapter alone: {_MERGE}"),
    (
        "pytorch_model-*-of-*.bin",
        "a shard, and pytorch_model.bin.index.json isn't there: get that too",
    ),
    (
        "consolidated*.pth",
        "Meta's layout: use the repository whose name ends in -hf, or transformers'",
    ),
    ("*.gguf", "for llama.cpp: give that file itself, as source.path=FOLDER/NAME.gguf"),
    ("*.safetensors", "under another name: simlab reads model.safetensors"),
    ("tf_model.h5", "TensorFlow's: load it with transformers and save it from there"),
    ("flax_model.msgpack", "Flax's: load it with transformers and save it from there"),
)
# What comes before the names of a model that is a part of another one, as far as the names tell.
_PREFIX = re.compile(r"((?:\w+\.)*?)(?:model\.)?(?:embed_tokens|layers\.\d+)\.")
_PARTS = {"base_model.model.": f"a model with an adapter (peft): {_MERGE}"}
_PART = "they are a part of another model: save that part alone, and give its folder"
# Files beside the weights with which they aren't the model any more.
BESIDE = {
    "adapter_config.json": f"an adapter beside the weights, which transformers applies: {_MERGE}",
    "quantize_config.json": "says that the weights are quantised: use the repository that isn't",
    "quant_config.json": "says that the weights are quantised: use the repository that isn't",
    "hf_quant_config.json": "says that the weights are quantised: use the repository that isn't",
}


def instead(names: Iterable[str]) -> str:
    """``"; NAME is …"`` for the first telling one of a folder's file names, else an empty string."""
    there = sorted(names)
    for pattern, advice in _INSTEAD:
        for name in fnmatch.filter(there, pattern):
            return f"; {brief(name)} is {advice}"
    return ""


def refuse_beside(folder: Path) -> None:
    """Refuse files beside the weights that change what a model computes. Raises ConfigError."""
    for name, why in BESIDE.items():
        if (folder / name).is_file():
            raise ConfigError(f"{folder / name}: {why}")


def refuse_prefixed(names: Iterable[str], folder: Path) -> None:
    """Refuse the tensors of a part of another model. Raises ConfigError."""
    prefixes = {match[1] for match in map(_PREFIX.match, names) if match}
    if prefixes and "" not in prefixes:
        prefix = min(prefixes)
        raise ConfigError(
            f"{folder}: the tensors' names begin with {prefix}: {_PARTS.get(prefix, _PART)}"
        )


def unread(folder: Path, read: Iterable[str]) -> str:
    """A line on weights in Hugging Face's layout beside those that are read; "" if there are none."""
    files = {entry.name for entry in folder.iterdir()}
    others = sorted({*fnmatch.filter(files, SHARDS), *files & {INDEX}} - {*read})
    if not others:
        return ""
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return (
        f"not read: {brief(others[0])[1:-1]}{more}, which the weights that are read don't belong to"
    )


def unwrapped(tensors: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """The tensors by the names that they have in an unwrapped model. Raises ConfigError for doubles."""
    plain: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if short in plain:
            raise ConfigError(
                f"{folder}: tensors {plain[short].name} and {name} are one in a model"
            )
        plain[short] = tensor
    return plain
