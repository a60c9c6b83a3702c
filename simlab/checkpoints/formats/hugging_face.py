"""Hugging Face's layout: config.json beside model.safetensors, or shards and their index."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simlab.checkpoints.formats import hugging_face_gemma as gemma
from simlab.checkpoints.formats import hugging_face_gpt as gpt
from simlab.checkpoints.formats.hugging_face_experts import read_experts, with_experts
from simlab.checkpoints.formats.hugging_face_keys import TEXT_PARTS, read_family, read_values
from simlab.checkpoints.formats.hugging_face_rope import (
    LAYER_TYPES,
    read_rotary,
    read_transformers_rope,
)
from simlab.checkpoints.formats.layouts import (
    INDEX,
    refuse_beside,
    refuse_prefixed,
    unread,
    unwrapped,
)
from simlab.checkpoints.formats.opened import Opened, layers, read_heads
from simlab.checkpoints.formats.own_init import OwnInit, transformers_init
from simlab.checkpoints.formats.weight_files import tensors, weight_files
from simlab.checkpoints.storage import StoredTensor, check_pieces
from simlab.checkpoints.untrusted.files import fields_of, read_json
from simlab.checkpoints.untrusted.safetensors import WHOLE_DTYPES
from simlab.config import ConfigError, ModelConfig, NormConfig
from simlab.config.errors import NotComputed
from simlab.config.fields import Fields, brief
from simlab.schemes.rope import inverse_frequencies

# Ours to theirs; {} is the block. What every model type has, and then its norms.
_SHARED = {
    "embedding.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "blocks.{}.attention.sublayer.q_proj.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.{}.attention.sublayer.k_proj.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.{}.attention.sublayer.v_proj.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.{}.attention.sublayer.o_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.{}.mlp.sublayer.gate_proj.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.{}.mlp.sublayer.up_proj.weight": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.mlp.sublayer.down_proj.weight": "model.layers.{}.mlp.down_proj.weight",
}
_FINAL_NORM = {"norm.weight": "model.norm.weight"}
_QK_NORM = {
    "blocks.{}.attention.sublayer.q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "blocks.{}.attention.sublayer.k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
}
_NORMS_OUT = {
    "blocks.{}.attention.norm_out.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.mlp.norm_out.weight": "model.layers.{}.post_feedforward_layernorm.weight",
}
_NORMS_IN = {  # the second is "post attention" because it comes after: it is the MLP's input norm
    "blocks.{}.attention.norm_in.weight": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.mlp.norm_in.weight": "model.layers.{}.post_attention_layernorm.weight",
}
_QKV_BIAS = {
    f"blocks.{{}}.attention.sublayer.{name}_proj.bias": f"model.layers.{{}}.self_attn.{name}_proj.bias"
    for name in "qkv"
}
_NORM_BIASES = {
    name.replace(".weight", ".bias"): theirs.replace(".weight", ".bias")
    for name, theirs in (_NORMS_IN | _FINAL_NORM).items()
}
# Phi-3's, of whose fused matrices ours are rows, in this order.
_FUSED = {
    ours: re.sub(r"[qkv]_proj", "qkv_proj", re.sub("gate_proj|up_proj", "gate_up_proj", theirs))
    for ours, theirs in _SHARED.items()
}
_BUFFER = ".rotary_emb.inv_freq"  # not learned: it follows from the config
# Of models for classification and for questions, in place of lm_head.
_OTHER_HEADS = ("score.weight", "score.bias", "qa_outputs.weight", "qa_outputs.bias")
KEYS = _SHARED | _FINAL_NORM | _QK_NORM | _NORMS_OUT  # OLMo 2 and 3


@dataclass(frozen=True)
class Architecture:
    """A model type: its architecture, and transformers' defaults for keys that its config omits.

    eps_key: None where the family's code has its own eps. scaled: False where scaled RoPE is refused.
    rotary: the share of a head's channels that RoPE turns, of a family whose configs say it. Which keys
    there may be: ``hugging_face_keys``.
    """

    keys: dict[str, str]
    placement: str
    qk_norm: str
    norm_type: str = "rms"
    eps: float = 1e-6
    eps_key: str | None = "rms_norm_eps"
    theta: float = 10_000.0
    head_dim: int | None = None
    kv_heads: int | None = None
    qkv_bias: bool = False
    window: int | None = None  # of a family that has the key sliding_window
    scaled: bool = True
    rotary: float | None = None


ARCHITECTURES = {
    # LayerNorm without parameters: norms that no key names have gain 1.
    "olmo": Architecture(_SHARED, "pre", "none", norm_type="layer", eps=1e-5, eps_key=None),
    "olmo2": Architecture(KEYS, "reordered", "full", eps=1e-5),
    "olmo3": Architecture(KEYS, "reordered", "full", eps=1e-5, theta=500_000.0, window=4096),
    # transformers rounds to bfloat16 before the gain in these two and in float32 after it in OLMo's;
    # simlab always after. In float32 there is no difference.
    "llama": Architecture(_SHARED | _FINAL_NORM | _NORMS_IN, "pre", "none"),
    "qwen3": Architecture(
        _SHARED | _FINAL_NORM | _NORMS_IN | _QK_NORM, "pre", "per_head", head_dim=128, kv_heads=32
    ),
    "qwen2": Architecture(
        _SHARED | _FINAL_NORM | _NORMS_IN | _QKV_BIAS, "pre", "none", kv_heads=32, qkv_bias=True
    ),
    "mistral": Architecture(
        _SHARED | _FINAL_NORM | _NORMS_IN, "pre", "none", kv_heads=8, window=4096
    ),
    "mixtral": Architecture(
        _SHARED | _FINAL_NORM | _NORMS_IN, "pre", "none", eps=1e-5, theta=1e6, kv_heads=8
    ),
    "olmoe": Architecture(
        _SHARED | _FINAL_NORM | _NORMS_IN | _QK_NORM, "pre", "full", eps=1e-5
    ),
    "phi3": Architecture(
        _FUSED | _FINAL_NORM | _NORMS_IN, "pre", "none", eps=1e-5, scaled=False, rotary=1.0
    ),
    "stablelm": Architecture(
        _SHARED | _FINAL_NORM | _NORMS_IN | _NORM_BIASES, "pre", "none", norm_type="layer_bias",
        eps=1e-5, eps_key="layer_norm_eps", kv_heads=32, rotary=0.25
    ),
}  # fmt: skip


# Readers of the families whose config or tensors have other names.
_READERS = {**gpt.READERS, **gemma.GEMMA_READERS}


def _windows(fields: Fields, kind: str, depth: int) -> tuple[int | None, tuple[int, ...]]:
    """The window, and of a model that has one the layers that see every token. Raises ConfigError."""
    if kind in ("mistral", "mixtral", "phi3"):
        return fields.integer("sliding_window", default=None), ()
    window = fields.integer("sliding_window") if kind == "olmo3" else None
    kinds = fields.take("layer_types")
    if kinds is None:  # transformers' rule for OLMo 3: every fourth layer sees everything
        return window, tuple(range(3, depth, 4)) if window else ()
    allowed = LAYER_TYPES if window else LAYER_TYPES[:1]
    if not isinstance(kinds, list) or len(kinds) != depth or any(k not in allowed for k in kinds):
        raise ConfigError(f"{fields.prefix}layer_types: must be {depth} of {', '.join(allowed)}")
    full = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
    return window, full if window else ()


def read_config(path: Path, tensors: int) -> tuple[ModelConfig, dict[str, str], OwnInit]:
    """The architecture from a Hugging Face config.json, its key map and its init.

    tensors: how many the checkpoint holds; more blocks than that are refused. A missing key
    has transformers' default for that model type. Raises ConfigError for an architecture or a
    value that simlab doesn't compute, and for a key that it doesn't know.
    """
    values = read_values(path)
    kind = read_family(values, fields_of(values, path))
    if kind in _READERS:
        fields = fields_of(values, path)
        read, names = _READERS[kind](fields, path.parent.name, tensors)
        return read, names, transformers_init(fields, kind)
    its = ARCHITECTURES[kind]
    defaults = {"head_dim": its.head_dim, "sliding_window": its.window}
    fields = fields_of({k: v for k, v in defaults.items() if v} | values, path)
    fields.computed("hidden_act", ("silu",), "silu")
    heads = read_heads(
        fields,
        ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
        None if "num_key_value_heads" in values else its.kv_heads,
    )
    depth = layers(fields, "num_hidden_layers", tensors)
    window, full = _windows(fields, kind, depth)
    rotary = 1.0
    if its.rotary is not None:
        rotary = read_rotary(fields, "partial_rotary_factor", its.rotary, heads["head_dim"])
    theta, yarn, llama3 = read_transformers_rope(
        fields, its.theta, by_layer=kind == "olmo3", partial=its.rotary is not None
    )
    if not its.scaled and (yarn or llama3):
        raise NotComputed(f"{path}: scaled RoPE is not supported for {kind}")
    # simlab scales full attention alone.
    if window and kind in ("mistral", "mixtral") and (yarn or llama3):
        why = "not supported with scaled RoPE; allowed: null"
        raise NotComputed(str(fields.fail("sliding_window", window, why)))
    eps = fields.number(its.eps_key, 0.0, default=its.eps) if its.eps_key else its.eps
    routed = read_experts(fields, kind, tensors)
    qkv_bias = fields.boolean("use_qkv_bias", its.qkv_bias)
    model = ModelConfig(
        name=path.parent.name,
        depth=depth,
        **heads,
        d_ff=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        norm=NormConfig(its.placement, type=its.norm_type, eps=eps),
        qk_norm=its.qk_norm,
        rope_theta=theta,
        yarn=yarn,
        llama3=llama3,
        window=window,
        full_attention=full,
        tied=fields.boolean("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        rotary=rotary,
        **routed,
    )
    keys = with_experts(its.keys | (_QKV_BIAS if qkv_bias else {}), kind, routed)
    return model, keys, transformers_init(fields, kind)


def matches(folder: Path) -> bool:
    """True if the folder has this layout's files."""
    names = ("config.json", "model.safetensors", "model.safetensors.index.json")
    return any((folder / name).is_file() for name in names)


def open_folder(folder: Path) -> Opened:
    """Raises ConfigError for what is missing, malformed or not supported."""
    path = folder / "config.json"
    values = read_values(path)
    # First: there is no use in looking for its weights.
    kind = read_family(values, fields_of(values, path))
    refuse_beside(folder)
    files = weight_files(folder)
    others: list[str] = []
    if kind in gpt.READERS:
        held = gpt.by_full_name(kind, unwrapped(tensors(files, WHOLE_DTYPES), folder), folder)
    else:
        held = unwrapped(tensors(files), folder)
        if read_json(path).get("model_type") in TEXT_PARTS:
            held, others = gemma.text_part(held, folder)
        held = _by_full_name(held, folder)
        refuse_prefixed(held, folder)
    model, keys, init = read_config(path, len(held))
    learned = {name: t for name, t in held.items() if not name.endswith(_BUFFER)}
    for name in sorted(held.keys() - learned.keys()):
        _check_frequencies(held[name], model, path)
    if kind in gpt.READERS:
        learned = gpt.arranged(learned, model, folder)
    heads = [learned.pop(name).name for name in _OTHER_HEADS if name in learned]
    index = [] if None in files.values() else [INDEX]
    lines = [unread(folder, [*index, *(file.name for file in files)])]
    if others:
        lines.append(
            f"not used: {len(others)} tensors beside the text model, {brief(others[0])} first"
        )
    return Opened(
        "hugging_face", model, keys, learned, path, init, other_head=" ".join(heads),
        unread="; ".join(filter(None, lines)),
        model_type=kind,
    )  # fmt: skip


def _by_full_name(held: dict[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """A base model's tensors (``AutoModel.save_pretrained``) by the names in a model with a head.

    Also those of a model for questions, whose base is ``transformer``. Raises ConfigError where the
    files hold two models.
    """
    base = next((b for b in ("", "transformer.") if f"{b}embed_tokens.weight" in held), None)
    if base is None:
        return held
    for name in sorted(name for name in held if name.startswith("model.")):
        raise ConfigError(
            f"{folder}: holds {base}embed_tokens.weight beside {name}, as if it were two models: leave "
            "one model's tensors"
        )
    heads = ("lm_head.", *_OTHER_HEADS)
    return {
        n if n.startswith(heads) else f"model.{n.removeprefix(base)}": t for n, t in held.items()
    }


def _check_frequencies(stored: StoredTensor, model: ModelConfig, path: Path) -> None:
    """Refuse a stored RoPE that isn't the config's. Files of before 2023 hold this buffer."""
    check_pieces([stored])
    theirs = stored.rows(0, *stored.shape) if len(stored.shape) == 1 else None
    pairs = torch.arange(model.turned / 2)
    ours, _ = inverse_frequencies(pairs, model.turned, model.rope_theta, model.yarn, model.llama3)
    if theirs is None or theirs.shape != ours.shape or not same_but_rounded(theirs, ours):
        raise ConfigError(f"{path}: its RoPE isn't that of the tensor {stored.name} in the files")


def same_but_rounded(theirs: Tensor, ours: Tensor) -> bool:
    """True if stored frequencies are ours but for rounding to their dtype.

    A number rounds by half of the dtype's eps, near 0 by half of its smallest number. Frequencies that
    are computed in float32 err themselves: at most log θ times its eps, some 2e-6.
    """
    about = torch.finfo(theirs.dtype)
    return theirs.double().allclose(ours.double(), max(about.eps, 1e-5), about.tiny * about.eps)
