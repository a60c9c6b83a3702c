"""Checkpoints in Hugging Face's safetensors layout, of the OLMo-2 and OLMo-3 family.

A folder holds config.json and either model.safetensors or model.safetensors.index.json with its
shards. Everything is checked when the checkpoint is opened, from headers alone: every tensor that
the architecture has must be there, with its shape, and nothing else. Files come from strangers:
nothing in them runs, no name in them leads out of the folder, and no size that they claim is
believed (safetensors checks its header against the file's length).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from simlab.config import ConfigError, ModelConfig, NormConfig, YarnConfig, divides, nearest
from simlab.weights.source import Shape, Weights

FLOATS = ("F64", "F32", "F16", "BF16")
MOST, ABOVE_1 = 10**9, 1.000001  # of any number in a config.json; the least useful rope_theta
JSON_LIMIT = 64 << 20  # bytes; an index of a million tensors is smaller

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


def their_name(name: str) -> str:
    """Our parameter name to the one in the file."""
    parts = name.split(".")
    if parts[0] != "blocks":
        return KEYS[name]
    layer, parts[1] = parts[1], "{}"
    return KEYS[".".join(parts)].format(layer)


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a file of this architecture holds, by its name there, and its shape."""
    d, q, kv = model.width, model.heads * model.head_dim, model.kv_heads * model.head_dim
    by_role: dict[str, tuple[int, ...]] = {
        "embedding": (model.vocab_size, d),
        "head": (model.vocab_size, d),
        "norm": (d,),
        "norm_out": (d,),
        "q_norm": (q,),
        "k_norm": (kv,),
        "q_proj": (q, d),
        "k_proj": (kv, d),
        "v_proj": (kv, d),
        "o_proj": (d, q),
        "gate_proj": (model.d_ff, d),
        "up_proj": (model.d_ff, d),
        "down_proj": (d, model.d_ff),
    }
    every = [range(model.depth) if "{}" in name else range(1) for name in KEYS]
    return {
        theirs.format(layer): by_role[name.split(".")[-2]]
        for (name, theirs), layers in zip(KEYS.items(), every, strict=True)
        for layer in layers
        if not (model.tied and name == "head.weight")
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
        if path.stat().st_size > JSON_LIMIT:
            raise ConfigError(
                f"{path}: larger than {JSON_LIMIT >> 20} MiB, not a config or an index"
            )
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return values


def _positive(values: dict[str, Any], key: str, path: Path, default: Any = None) -> int:
    value = values.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise ConfigError(f"{path}: {key}={brief(value)}: must be an integer from 1 to {MOST}")
    return value


def _number(
    values: dict[str, Any], key: str, path: Path, default: Any = None, low: float = 0.0
) -> float:
    value = values.get(key)
    value = default if value is None else value
    bad = isinstance(value, bool) or not isinstance(value, int | float)
    if bad or not low <= value <= MOST:  # which no NaN is
        raise ConfigError(
            f"{path}: {key}={brief(value)}: must be a number from {low:g} to {MOST:g}"
        )
    return float(value)


def brief(value: object) -> str:
    """A stranger's value as it can be shown: its first 60 characters, without control codes."""
    text = (
        repr(value)[:60] if not isinstance(value, int) or abs(value) < 10**60 else "a huge integer"
    )
    return text if len(text) < 60 else text + "…"


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
    theta = _number(scaling, "rope_theta", path, values.get("rope_theta", 500_000.0), ABOVE_1)
    sliding = new.get("sliding_attention") or {}
    if not isinstance(sliding, dict):
        raise ConfigError(f"{path}: sliding_attention={brief(sliding)}: must be an object")
    if _number(sliding, "rope_theta", path, theta) != theta:
        raise ConfigError(f"{path}: rope_theta differs between layer types, which is not supported")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ConfigError(f"{path}: rope_type={brief(kind)}: allowed: default, yarn")
    given = scaling.get("attention_factor")
    return theta, YarnConfig(
        factor=_number(scaling, "factor", path, low=1.0),
        original_length=_positive(scaling, "original_max_position_embeddings", path),
        beta_fast=_number(scaling, "beta_fast", path, 32.0, 1e-6),
        beta_slow=_number(scaling, "beta_slow", path, 1.0, 1e-6),
        attention_factor=None
        if given is None
        else _number(scaling, "attention_factor", path, low=1e-6),
    )


def _full_layers(values: dict[str, Any], depth: int, path: Path) -> tuple[int, ...]:
    kinds = values.get("layer_types")
    if kinds is None:  # transformers' rule for OLMo 3: every fourth layer sees everything
        return tuple(range(3, depth, 4))
    allowed = ("sliding_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != depth or any(k not in allowed for k in kinds):
        raise ConfigError(f"{path}: layer_types: must be {depth} of {', '.join(allowed)}")
    return tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")


def read_config(path: Path) -> ModelConfig:
    """The architecture from a Hugging Face config.json.

    Values it leaves out take transformers' defaults for that model type. Raises ConfigError for an
    architecture or a value that simlab doesn't compute.
    """
    values = _read_json(path)
    kind = values.get("model_type")
    if kind not in ("olmo2", "olmo3"):
        hint = nearest(str(kind), ("olmo2", "olmo3"))
        raise ConfigError(f"{path}: model_type={brief(kind)}: allowed: olmo2, olmo3{hint}")
    if values.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{path}: hidden_act={brief(values['hidden_act'])}: allowed: silu")
    if values.get("attention_bias", False) is not False:
        raise ConfigError(f"{path}: attention_bias: biases are not supported")
    depth, width = (_positive(values, k, path) for k in ("num_hidden_layers", "hidden_size"))
    heads = _positive(values, "num_attention_heads", path)
    kv_heads = _positive(values, "num_key_value_heads", path, heads)
    divides(f"{path}: num_key_value_heads", kv_heads, "num_attention_heads", heads)
    if values.get("head_dim") is None:
        divides(f"{path}: num_attention_heads", heads, "hidden_size", width)
    head_dim = _positive(values, "head_dim", path, width // heads or 1)
    if head_dim % 2:
        raise ConfigError(f"{path}: head_dim={head_dim}: must be even, RoPE turns pairs")
    tied = values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ConfigError(f"{path}: tie_word_embeddings={brief(tied)}: must be true or false")
    window = _positive(values, "sliding_window", path, 4096) if kind == "olmo3" else None
    theta, yarn = _rope(values, path)
    return ModelConfig(
        name=path.parent.name,
        depth=depth,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        d_ff=_positive(values, "intermediate_size", path),
        vocab_size=_positive(values, "vocab_size", path),
        head_dim=head_dim,
        norm=NormConfig("reordered", eps=_number(values, "rms_norm_eps", path, 1e-5)),
        rope_theta=theta,
        yarn=yarn,
        window=window,
        full_attention=_full_layers(values, depth, path) if window else (),
        tied=tied,
    )


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a checkpoint folder and the tensors that its index puts in each.

    None stands for "whatever is in it" (a single file, without an index). Raises ConfigError.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if not index.is_file():
        raise ConfigError(f"{folder}: holds neither {single.name} nor {index.name}")
    weight_map = _read_json(index).get("weight_map")
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


class Checkpoint(Weights):
    """An opened checkpoint: its shape, and its tensors by name, read from the file when asked for.

    path: a folder or a hub id; revision: a hub branch, tag or commit.
    """

    def __init__(self, path: str, revision: str | None = None) -> None:
        from simlab.weights.hub import locate  # late: random runs need no hub

        self.folder = locate(path, revision)
        self.model = read_config(self.folder / "config.json")
        self.files = self._check()
        self.hashes: dict[str, bytes] = {}

    @property
    def tokenizer(self) -> Path | None:
        """The checkpoint's tokenizer.json, where it has one."""
        path = self.folder / "tokenizer.json"
        return path if path.is_file() else None

    def _check(self) -> dict[str, Path]:
        """Every tensor's file, having compared names, shapes and dtypes with the architecture's."""
        found: dict[str, Path] = {}
        held: dict[str, tuple[tuple[int, ...], str]] = {}
        for path, claimed in weight_files(self.folder).items():
            with _open(path) as file:
                names = set(file.keys())
                for name in sorted((claimed or set()) - names):
                    raise ConfigError(f"{path}: {name} is missing, which the index puts there")
                for name in sorted(names if claimed is None else names & claimed):
                    part = file.get_slice(name)
                    found[name], held[name] = path, (tuple(part.get_shape()), part.get_dtype())
        if self.model.depth > len(found):  # before any list of that length is made
            raise ConfigError(
                f"{self.folder / 'config.json'}: num_hidden_layers={self.model.depth}, "
                f"but the checkpoint holds {len(found)} tensors"
            )
        expected = shapes(self.model)
        for name in sorted(expected.keys() - found.keys()):
            raise ConfigError(f"{self.folder}: tensor {name} is missing")
        for name in sorted(found.keys() - expected.keys()):
            raise ConfigError(f"{found[name]}: tensor {name} is not part of this architecture")
        for name, shape in expected.items():
            has, dtype = held[name]
            if has != shape:
                raise ConfigError(
                    f"{found[name]}: tensor {name} has shape {has}, but config.json implies {shape}"
                )
            if dtype not in FLOATS:
                raise ConfigError(
                    f"{found[name]}: tensor {name} is {dtype}; allowed: {', '.join(FLOATS)}"
                )
        return found

    def _read(self, name: str) -> Tensor:
        theirs = their_name(name)
        with _open(self.files[theirs]) as file:
            tensor: Tensor = file.get_tensor(theirs)
        if theirs not in self.hashes and name not in ("norm.weight", "head.weight"):
            digest = hashlib.sha256(f"{theirs} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            self.hashes[theirs] = digest.digest()
        return tensor

    def tensor(self, name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The whole parameter, in the dtype asked for."""
        if name == "head.weight" and self.model.tied:
            name = "embedding.weight"
        return self._read(name).to(device, dtype)

    def rows(
        self, name: str, shape: Shape, ids: Tensor, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Rows of a matrix by id; the file is mapped, not loaded."""
        if name == "head.weight" and self.model.tied:
            name = "embedding.weight"
        return self._read(name)[ids.cpu()].to(device, dtype)

    def identity(self) -> dict[str, str]:
        """``weight_hash``: SHA-256 over name, dtype, shape and bytes of every tensor read so far.

        Final norm and head stay out, which only gradients read: one checkpoint, one hash.
        """
        whole = hashlib.sha256()
        for name in sorted(self.hashes):
            whole.update(self.hashes[name])
        return {"weight_hash": whole.hexdigest()}


def _open(path: Path) -> Any:
    """A safetensors file, mapped; its header is checked against its length."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path}: not a readable safetensors file ({reason})") from error
