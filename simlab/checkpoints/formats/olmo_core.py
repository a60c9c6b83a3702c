"""OLMo-core's layout: config.json, and a torch distributed checkpoint in model_and_optim/.

Also that folder alone, with config.json in it or beside it. Which tensors there are and where:
``untrusted.dcp``. What the keys of config.json mean and what it leaves out: ai2-olmo-core 3.0.0,
olmo_core/nn. What changes what is computed and isn't among the keys below is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simlab.checkpoints.formats.fields import (
    brief,
    choice,
    flag,
    head_shape,
    layers,
    number,
    only,
    positive,
    read_json,
    section,
)
from simlab.checkpoints.formats.olmo_core_rope import Rope, read_rope
from simlab.checkpoints.formats.opened import Opened
from simlab.checkpoints.untrusted import dcp
from simlab.config import ConfigError, ModelConfig, NormConfig

# Ours to theirs; {} is the block. What every block type has, and then its norms.
KEYS = {
    "embedding.weight": "model.embeddings.weight",
    "norm.weight": "model.lm_head.norm.weight",
    "head.weight": "model.lm_head.w_out.weight",
    "blocks.{}.attention.sublayer.q_proj.weight": "model.blocks.{}.attention.w_q.weight",
    "blocks.{}.attention.sublayer.k_proj.weight": "model.blocks.{}.attention.w_k.weight",
    "blocks.{}.attention.sublayer.v_proj.weight": "model.blocks.{}.attention.w_v.weight",
    "blocks.{}.attention.sublayer.o_proj.weight": "model.blocks.{}.attention.w_out.weight",
    "blocks.{}.mlp.sublayer.gate_proj.weight": "model.blocks.{}.feed_forward.w1.weight",
    "blocks.{}.mlp.sublayer.up_proj.weight": "model.blocks.{}.feed_forward.w3.weight",
    "blocks.{}.mlp.sublayer.down_proj.weight": "model.blocks.{}.feed_forward.w2.weight",
}
QK_NORM = {
    "blocks.{}.attention.sublayer.q_norm.weight": "model.blocks.{}.attention.q_norm.weight",
    "blocks.{}.attention.sublayer.k_norm.weight": "model.blocks.{}.attention.k_norm.weight",
}


def _norm_keys(end: str, attention: str, mlp: str) -> dict[str, str]:
    return {
        f"blocks.{{}}.attention.{end}.weight": f"model.blocks.{{}}.{attention}.weight",
        f"blocks.{{}}.mlp.{end}.weight": f"model.blocks.{{}}.{mlp}.weight",
    }


_IN = _norm_keys("norm_in", "attention_norm", "feed_forward_norm")
# The block types, as simlab's placements, with their norms' keys.
BLOCKS = {
    "reordered_norm": ("reordered", _norm_keys("norm_out", "attention_norm", "feed_forward_norm")),
    "default": ("pre", _IN),
    "peri_norm": (
        "peri",
        _IN | _norm_keys("norm_out", "post_attention_norm", "post_feed_forward_norm"),
    ),
}
# Implementations of one norm, which differ in how they round.
NORM_TYPES = {
    "rms": "rms", "fused_rms": "rms", "cute_rms": "rms", "qwen_rms": "rms", "nemotron_rms": "rms",
    "default": "layer",
}  # fmt: skip
DEPTH_KEY, STATE = "n_layers", "model_and_optim"
IRRELEVANT = ("_CLASS_", "dtype", "init_device", "dropout")  # to what is computed, in float32


def known(values: dict[str, Any], path: Path, what: str, keys: str) -> None:
    """Refuse keys of a section that aren't read and aren't off. Raises ConfigError."""
    for key, value in values.items():
        if key not in IRRELEVANT and key not in keys.split() and value not in (None, False):
            raise ConfigError(f"{path}: {what}: {brief(key)}={brief(value)}: not supported")


def read_norm(values: dict[str, Any], key: str, path: Path) -> tuple[str, float, bool]:
    """A norm's type, eps and whether it has a gain. Raises ConfigError for a bias or another norm."""
    norm = section(values, key, path)
    if not norm:
        raise ConfigError(f"{path}: {key}=null: a model without it is not supported")
    known(norm, path, key, "name eps bias elementwise_affine full_precision")
    gain = flag(norm, "elementwise_affine", path, True)
    if gain and flag(norm, "bias", path, True):  # the trainer's default
        raise ConfigError(f"{path}: {key}: bias=true: not supported; allowed: false")
    kind = NORM_TYPES[choice(norm, "name", path, NORM_TYPES, "default")]
    return kind, number(norm, "eps", path, 1e-5), gain


def read_windows(attention: dict[str, Any], depth: int, path: Path) -> list[int | None]:
    """Each layer's attention window by the pattern, None where it sees every token."""
    window = section(attention, "sliding_window", path)
    if not window:
        return [None] * depth
    pattern = window.get("pattern")
    sizes = pattern if isinstance(pattern, list) else []
    if not sizes or any(type(n) is not int or not (n == -1 or 0 < n <= 10**9) for n in sizes):
        raise ConfigError(f"{path}: pattern={brief(pattern)}: must be window sizes, -1 for none")
    first = flag(window, "force_full_attention_on_first_layer", path, True)
    last = flag(window, "force_full_attention_on_last_layer", path, True)
    # Where the first layer is set apart, the pattern starts at the second.
    windows = [sizes[(layer - first) % len(sizes)] for layer in range(depth)]
    if first:
        windows[0] = -1
    if last:
        windows[-1] = -1
    return [None if n == -1 else n for n in windows]


def blocks(values: dict[str, Any], depth: int, path: Path) -> list[dict[str, Any]]:
    """Each layer's block: one for all, with overrides by layer, or named ones in a pattern."""
    block = section(values, "block", path)
    pattern, overrides = values.get("block_pattern"), section(values, "block_overrides", path)
    if pattern is None:
        found = [block] * depth
        for layer, override in overrides.items():
            if not (layer.isascii() and layer.isdigit() and len(layer) < 10 and int(layer) < depth):
                raise ConfigError(f"{path}: block_overrides: {brief(layer)}: must be a layer")
            found[int(layer)] = override
    else:
        names = pattern if isinstance(pattern, list) else []
        if not names or any(not isinstance(n, str) or n not in block for n in names):
            raise ConfigError(f"{path}: block_pattern={brief(pattern)}: must be names of blocks")
        found = [block[names[layer % len(names)]] for layer in range(depth)]
    if not all(isinstance(one, dict) for one in found):
        raise ConfigError(f"{path}: block: must be an object")
    return found


@dataclass(frozen=True)
class Block:
    """What a block computes, as a model of such blocks; its key map, RoPE, and window by layer."""

    model: ModelConfig
    keys: dict[str, str]
    rope: Rope
    windows: list[int | None]


def read_block(block: dict[str, Any], model: dict[str, Any], depth: int, path: Path) -> Block:
    """One block's section. Raises ConfigError for what simlab doesn't compute."""
    known(
        block, path, "block",
        "name sequence_mixer attention layer_norm feed_forward attention_residual_alpha "
        "feed_forward_residual_alpha",
    )  # fmt: skip
    only(block, path, attention_residual_alpha=1.0, feed_forward_residual_alpha=1.0)
    placement, keys = BLOCKS[choice(block, "name", path, BLOCKS, "default")]
    mixer = "attention" if block.get("attention") is not None else "sequence_mixer"
    attention = section(block, mixer, path)
    known(
        attention, path, mixer,
        "name type n_heads n_kv_heads head_dim bias rope qk_norm use_head_qk_norm sliding_window "
        "backend use_flash use_recompute_qkv_prep mxfp8_save_qkv_for_backward",
    )  # fmt: skip
    choice(attention, "type", path, ("attention",), "attention")
    choice(attention, "name", path, ("default",), "default")
    mlp = section(block, "feed_forward", path)
    known(mlp, path, "feed_forward", "name hidden_size bias activation")
    choice(mlp, "name", path, ("default",), "default")
    choice(mlp, "activation", path, ("silu",), "silu")
    for part, name in ((attention, mixer), (mlp, "feed_forward"), (model["lm_head"], "lm_head")):
        if flag(part, "bias", path, True):  # the trainer's default
            raise ConfigError(f"{path}: {name}: bias=true: not supported; allowed: false")
    norm = read_norm(block, "layer_norm", path)
    qk_norm = "none"
    norms = {
        "layer_norm": norm,
        "lm_head.layer_norm": read_norm(model["lm_head"], "layer_norm", path),
    }
    if attention.get("qk_norm") is not None:
        norms["qk_norm"] = read_norm(attention, "qk_norm", path)
        per_head = flag(attention, "use_head_qk_norm", path, False)
        qk_norm = "per_head" if per_head else "full"
    for name, other in norms.items():
        if other[:2] != norm[:2]:
            raise ConfigError(f"{path}: {name}: must be the norm that layer_norm is, and its eps")
    present = KEYS | (keys if norm[2] else {})
    if "qk_norm" in norms and norms["qk_norm"][2]:
        present |= QK_NORM
    if not norms["lm_head.layer_norm"][2]:
        del present["norm.weight"]
    width, heads, kv_heads, head_dim = head_shape(
        attention | {"d_model": model.get("d_model")},
        path,
        ("d_model", "n_heads", "n_kv_heads", "head_dim"),
    )
    rope = read_rope(attention, head_dim, path)
    one = ModelConfig(
        name=path.parent.name,
        depth=depth,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        d_ff=positive(mlp, "hidden_size", path),
        vocab_size=positive(model, "vocab_size", path),
        head_dim=head_dim,
        norm=NormConfig(placement, type=norm[0], eps=norm[1]),
        qk_norm=qk_norm,
        rope_theta=rope.theta,
        tied=flag(model, "tie_word_embeddings", path, False),
    )
    return Block(one, present, rope, read_windows(attention, depth, path))


def read_config(path: Path, tensors: int) -> tuple[ModelConfig, dict[str, str]]:
    """The architecture from a config.json, and its key map.

    tensors: how many the checkpoint holds; more blocks than that are refused before any is read.
    Raises ConfigError for what is malformed or not computed by simlab.
    """
    values = read_json(path)
    model = values if "d_model" in values else section(values, "model", path)
    if not model:
        raise ConfigError(f"{path}: has no model: not a config of OLMo-core")
    choice(model, "name", path, ("default",), "default")
    only(model, path, embedding_norm=None, embed_scale=1.0)
    head = section(model, "lm_head", path)
    known(head, path, "lm_head", "name layer_norm bias loss_implementation")
    choice(head, "name", path, ("default",), "default")
    depth = layers(model, DEPTH_KEY, path, tensors)
    read: dict[int, Block] = {}
    each = []
    for block in blocks(model, depth, path):
        if id(block) not in read:
            read[id(block)] = read_block(block, model | {"lm_head": head}, depth, path)
        each.append(read[id(block)])
    return _merged(each, path), each[0].keys


def _merged(each: list[Block], path: Path) -> ModelConfig:
    """One model of all blocks, which may differ in their window and in what RoPE scaling needs it."""
    if any(block.model != each[0].model or block.keys != each[0].keys for block in each):
        raise ConfigError(f"{path}: block_overrides: blocks may differ in their RoPE scaling only")
    windows = [block.windows[layer] for layer, block in enumerate(each)]
    full = [layer for layer, window in enumerate(windows) if window is None]
    sizes = {window for window in windows if window is not None}
    if len(sizes) > 1:
        raise ConfigError(f"{path}: pattern: windows of more than one size are not supported")
    plain = Rope(each[0].rope.theta)
    if any(each[layer].rope != plain for layer in set(range(len(each))) - set(full)):
        raise ConfigError(f"{path}: scaling: RoPE is scaled in layers without a window only")
    scaled = each[full[0]].rope if full else plain
    if any(each[layer].rope != scaled for layer in full):
        raise ConfigError(f"{path}: scaling: must be the same in every layer without a window")
    return replace(
        each[0].model,
        yarn=scaled.yarn,
        llama3=scaled.llama3,
        window=sizes.pop() if sizes else None,
        full_attention=tuple(full) if len(full) < len(each) else (),
    )


def _folders(folder: Path) -> tuple[Path, Path]:
    """Where the tensors are, and where config.json is."""
    if (folder / dcp.METADATA).is_file():
        beside = folder if (folder / "config.json").is_file() else folder.parent
        return folder, beside / "config.json"
    return folder / STATE, folder / "config.json"


def matches(folder: Path) -> bool:
    """True if the folder has this layout's files."""
    return (folder / dcp.METADATA).is_file() or (folder / STATE).is_dir()


def open_folder(folder: Path) -> Opened:
    """Raises ConfigError for what is missing, malformed or not supported."""
    state, config = _folders(folder)
    if not config.is_file():
        raise ConfigError(
            f"{folder}: a distributed checkpoint without its config.json, here or above"
        )
    tensors = dcp.read_tensors(state, without=("optim.",))
    model, keys = read_config(config, len(tensors))
    if model.tied:  # a tied head is the embedding, and not read
        tensors.pop(KEYS["head.weight"], None)
    return Opened("olmo_core", model, keys, tensors, config, DEPTH_KEY)
