"""The layout of the old OLMo trainer, unsharded: config.yaml beside model.safetensors or model.pt.

What the keys mean and what a config leaves out: allenai/OLMo, olmo/config.py and olmo/model.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simlab.checkpoints.formats.fields import (
    ABOVE_1,
    choice,
    flag,
    head_shape,
    layers,
    number,
    only,
    positive,
)
from simlab.checkpoints.formats.opened import Opened
from simlab.checkpoints.untrusted.safetensors import read_header
from simlab.checkpoints.untrusted.torch_zip import read_tensors
from simlab.checkpoints.untrusted.yaml import read_section
from simlab.config import ConfigError, ModelConfig, NormConfig

# Ours to theirs. q‖k‖v and up‖gate are stacked by rows, in that order.
KEYS = {
    "embedding.weight": "transformer.wte.weight",
    "head.weight": "transformer.ff_out.weight",
    "blocks.{}.attention.sublayer.q_proj.weight": "transformer.blocks.{}.att_proj.weight",
    "blocks.{}.attention.sublayer.k_proj.weight": "transformer.blocks.{}.att_proj.weight",
    "blocks.{}.attention.sublayer.v_proj.weight": "transformer.blocks.{}.att_proj.weight",
    "blocks.{}.attention.sublayer.o_proj.weight": "transformer.blocks.{}.attn_out.weight",
    "blocks.{}.mlp.sublayer.up_proj.weight": "transformer.blocks.{}.ff_proj.weight",
    "blocks.{}.mlp.sublayer.gate_proj.weight": "transformer.blocks.{}.ff_proj.weight",
    "blocks.{}.mlp.sublayer.down_proj.weight": "transformer.blocks.{}.ff_out.weight",
}
QK_NORM = {
    "blocks.{}.attention.sublayer.q_norm.weight": "transformer.blocks.{}.q_norm.weight",
    "blocks.{}.attention.sublayer.k_norm.weight": "transformer.blocks.{}.k_norm.weight",
}
DEPTH_KEY = "n_layers"
NORM_TYPES = {"rms": "rms", "default": "layer", "low_precision": "layer"}


def _norm_keys(where: str) -> dict[str, str]:
    return {
        "norm.weight": "transformer.ln_f.weight",
        f"blocks.{{}}.attention.{where}.weight": "transformer.blocks.{}.attn_norm.weight",
        f"blocks.{{}}.mlp.{where}.weight": "transformer.blocks.{}.ff_norm.weight",
    }


def _hidden(values: dict[str, Any], width: int, path: Path) -> int:
    """d_ff from the size of gate and up together."""
    both = positive(values, "mlp_hidden_size", path, positive(values, "mlp_ratio", path, 4) * width)
    if both % 2:
        raise ConfigError(
            f"{path}: mlp_hidden_size={both}: must be even, it is gate and up together"
        )
    return both // 2


def _kv_heads(values: dict[str, Any], path: Path) -> int | None:
    """The default of ``n_kv_heads``; with both spellings given they must agree."""
    multi = flag(values, "multi_query_attention", path, False)
    if multi and values.get("n_kv_heads") not in (None, 1):
        raise ConfigError(f"{path}: multi_query_attention=true: n_kv_heads must be 1 or null")
    return 1 if multi else None


def read_config(path: Path, tensors: int) -> tuple[ModelConfig, dict[str, str]]:
    """The architecture from the ``model`` section of a config.yaml, and its key map.

    tensors: how many the checkpoint holds; more blocks than that are refused. Raises ConfigError for
    what is malformed or not computed by simlab.
    """
    values = read_section(path, "model")
    choice(values, "activation_type", path, ("swiglu",), "swiglu")
    choice(values, "block_type", path, ("sequential",), "sequential")
    only(
        {"rope": False, "include_bias": True} | values,  # the trainer's own defaults
        path,
        rope=True,
        alibi=False,
        include_bias=False,
        bias_for_layer_norm=False,
        clip_qkv=None,
        scale_logits=False,
        embedding_layer_norm=False,
        scale_emb_init=False,
        block_group_size=1,
    )
    for name in ("rope", "include_bias"):
        if values.get(name) is None:
            raise ConfigError(f"{path}: {name}: must be {'true' if name == 'rope' else 'false'}")
    affine = flag(values, "layer_norm_with_affine", path, True)
    qk_norm = flag(values, "attention_layer_norm", path, False)
    where = "norm_out" if flag(values, "norm_after", path, False) else "norm_in"
    keys = KEYS | (_norm_keys(where) if affine else {})
    if qk_norm and flag(values, "attention_layer_norm_with_affine", path, True):
        keys |= QK_NORM
    width, heads, kv_heads, head_dim = head_shape(
        values, path, ("d_model", "n_heads", "n_kv_heads", "head_dim"), _kv_heads(values, path)
    )
    if head_dim * heads != width:
        raise ConfigError(f"{path}: head_dim={head_dim}: must be d_model / n_heads")
    vocab_size = positive(values, "vocab_size", path)
    rows = positive(values, "embedding_size", path, vocab_size)
    if "embedding_size" not in values:
        rows = 50304  # the trainer's default; null is vocab_size
    model = ModelConfig(
        name=path.parent.name,
        depth=layers(values, DEPTH_KEY, path, tensors),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        d_ff=_hidden(values, width, path),
        vocab_size=rows,
        head_dim=head_dim,
        norm=NormConfig(
            "reordered" if where == "norm_out" else "pre",
            type=NORM_TYPES[choice(values, "layer_norm_type", path, NORM_TYPES, "default")],
            eps=number(values, "layer_norm_eps", path, 1e-5),
        ),
        qk_norm="full" if qk_norm else "none",
        rope_theta=number(values, "rope_theta", path, 10_000.0, ABOVE_1),
        tied=flag(values, "weight_tying", path, True),
    )
    return model, keys


def matches(folder: Path) -> bool:
    """True if the folder has this layout's files."""
    return (folder / "config.yaml").is_file()


def open_folder(folder: Path) -> Opened:
    """Raises ConfigError for what is missing, malformed or not supported."""
    path = folder / "config.yaml"
    single, pickled = folder / "model.safetensors", folder / "model.pt"
    if not single.is_file() and not pickled.is_file():
        raise ConfigError(f"{folder}: holds neither {single.name} nor {pickled.name}")
    tensors = read_header(single) if single.is_file() else read_tensors(pickled)
    model, keys = read_config(path, len(tensors))
    if model.tied:  # a tied head is the embedding, and not read
        tensors.pop(KEYS["head.weight"], None)
    return Opened("legacy_olmo", model, keys, tensors, path, DEPTH_KEY)
