"""Hugging Face's layout: config.json beside model.safetensors, or shards and their index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from simlab.config import ConfigError, ModelConfig, NormConfig, YarnConfig, divides, nearest
from simlab.weights.formats.fields import brief, number, positive, read_json
from simlab.weights.formats.opened import Opened
from simlab.weights.formats.stored import Stored, whole

FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
ABOVE_1 = 1.000001  # the least useful rope_theta

# Ours to theirs; {} is the block.
KEYS = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "blocks.{}.attention.sublayer.q_proj.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.{}.attention.sublayer.k_proj.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.{}.attention.sublayer.v_proj.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.{}.attention.sublayer.o_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.{}.attention.sublayer.q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "blocks.{}.attention.sublayer.k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    "blocks.{}.attention.norm_out.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.mlp.sublayer.gate_proj.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.{}.mlp.sublayer.up_proj.weight": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.mlp.sublayer.down_proj.weight": "model.layers.{}.mlp.down_proj.weight",
    "blocks.{}.mlp.norm_out.weight": "model.layers.{}.post_feedforward_layernorm.weight",
}


def _rope(values: dict[str, Any], path: Path) -> tuple[float, YarnConfig | None]:
    """θ and YaRN from either of transformers' spellings.

    ``rope_theta`` and ``rope_scaling`` before version 5, ``rope_parameters`` since, by layer type
    for OLMo 3.
    """
    new = values.get("rope_parameters") or {}
    if not isinstance(new, dict):
        raise ConfigError(f"{path}: rope_parameters={brief(new)}: must be an object")
    full = new.get("full_attention") or ({} if "sliding_attention" in new else new)
    scaling = full or values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ConfigError(f"{path}: rope_scaling={brief(scaling)}: must be an object")
    theta = number(scaling, "rope_theta", path, values.get("rope_theta", 500_000.0), ABOVE_1)
    sliding = new.get("sliding_attention") or {}
    if not isinstance(sliding, dict):
        raise ConfigError(f"{path}: sliding_attention={brief(sliding)}: must be an object")
    if number(sliding, "rope_theta", path, theta) != theta:
        raise ConfigError(f"{path}: rope_theta differs between layer types, which is not supported")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ConfigError(f"{path}: rope_type={brief(kind)}: allowed: default, yarn")
    given = scaling.get("attention_factor")
    return theta, YarnConfig(
        factor=number(scaling, "factor", path, low=1.0),
        original_length=positive(scaling, "original_max_position_embeddings", path),
        beta_fast=number(scaling, "beta_fast", path, 32.0, 1e-6),
        beta_slow=number(scaling, "beta_slow", path, 1.0, 1e-6),
        attention_factor=None
        if given is None
        else number(scaling, "attention_factor", path, low=1e-6),
    )


def _full_layers(values: dict[str, Any], depth: int, path: Path) -> tuple[int, ...]:
    kinds = values.get("layer_types")
    if kinds is None:  # transformers' rule for OLMo 3: every fourth layer sees everything
        return tuple(range(3, depth, 4))
    allowed = ("sliding_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != depth or any(k not in allowed for k in kinds):
        raise ConfigError(f"{path}: layer_types: must be {depth} of {', '.join(allowed)}")
    return tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")


def read_config(path: Path) -> tuple[ModelConfig, dict[str, str]]:
    """The architecture from a Hugging Face config.json, and its key map.

    Values it leaves out take transformers' defaults for that model type. Raises ConfigError for an
    architecture or a value that simlab doesn't compute.
    """
    values = read_json(path)
    kind = values.get("model_type")
    if kind not in ("olmo2", "olmo3"):
        hint = nearest(str(kind), ("olmo2", "olmo3"))
        raise ConfigError(f"{path}: model_type={brief(kind)}: allowed: olmo2, olmo3{hint}")
    if values.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{path}: hidden_act={brief(values['hidden_act'])}: allowed: silu")
    if values.get("attention_bias", False) is not False:
        raise ConfigError(f"{path}: attention_bias: biases are not supported")
    depth, width = (positive(values, k, path) for k in ("num_hidden_layers", "hidden_size"))
    heads = positive(values, "num_attention_heads", path)
    kv_heads = positive(values, "num_key_value_heads", path, heads)
    divides(f"{path}: num_key_value_heads", kv_heads, "num_attention_heads", heads)
    if values.get("head_dim") is None:
        divides(f"{path}: num_attention_heads", heads, "hidden_size", width)
    head_dim = positive(values, "head_dim", path, width // heads or 1)
    if head_dim % 2:
        raise ConfigError(f"{path}: head_dim={head_dim}: must be even, RoPE turns pairs")
    tied = values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ConfigError(f"{path}: tie_word_embeddings={brief(tied)}: must be true or false")
    window = positive(values, "sliding_window", path, 4096) if kind == "olmo3" else None
    theta, yarn = _rope(values, path)
    model = ModelConfig(
        name=path.parent.name,
        depth=depth,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        d_ff=positive(values, "intermediate_size", path),
        vocab_size=positive(values, "vocab_size", path),
        head_dim=head_dim,
        norm=NormConfig("reordered", eps=number(values, "rms_norm_eps", path, 1e-5)),
        rope_theta=theta,
        yarn=yarn,
        window=window,
        full_attention=_full_layers(values, depth, path) if window else (),
        tied=tied,
    )
    return model, KEYS


def found(folder: Path) -> bool:
    """Whether a folder looks like this layout."""
    names = ("config.json", "model.safetensors", "model.safetensors.index.json")
    return any((folder / name).is_file() for name in names)


def open_folder(folder: Path) -> Opened:
    """Raises ConfigError for what is missing, malformed or not supported."""
    path = folder / "config.json"
    model, keys = read_config(path)
    return Opened("hugging_face", model, keys, tensors(folder), path, "num_hidden_layers")


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a checkpoint folder and the tensors that its index puts in each.

    None stands for "whatever is in it" (a single file, without an index). Raises ConfigError.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if not index.is_file():
        raise ConfigError(f"{folder}: holds neither {single.name} nor {index.name}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index}: has no weight_map")
    files: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        plain = isinstance(file, str) and Path(file).name == file and not {"\\", "\0"} & set(file)
        if not plain or not file.endswith(".safetensors"):
            raise ConfigError(f"{index}: {name} is in {brief(file)}, which is not a file name")
        names = files.setdefault(folder / file, set())
        assert names is not None
        names.add(name)
    return files


def tensors(folder: Path) -> dict[str, Stored]:
    """Where every tensor of the folder lies. Raises ConfigError."""
    found: dict[str, Stored] = {}
    for path, claimed in weight_files(folder).items():
        held = read_header(path)
        for name in sorted((claimed or set()) - held.keys()):
            raise ConfigError(f"{path}: {name} is missing, which the index puts there")
        found |= {n: t for n, t in held.items() if claimed is None or n in claimed}
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file: 8 bytes of length, a JSON header, the tensors' bytes.

    The safetensors library checks the header first: its size, its JSON, that the tensors fill the
    file without a gap or an overlap, and that each has as many bytes as its shape and dtype need.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path}: not a readable safetensors file ({reason})") from error
    header.pop("__metadata__", None)
    held = {}
    for name, about in header.items():
        if about["dtype"] not in FLOATS:
            raise ConfigError(
                f"{path}: tensor {name} is {about['dtype']}; allowed: {', '.join(FLOATS)}"
            )
        offset = 8 + size + about["data_offsets"][0]
        held[name] = whole(name, tuple(about["shape"]), FLOATS[about["dtype"]], path, offset)
    return held
