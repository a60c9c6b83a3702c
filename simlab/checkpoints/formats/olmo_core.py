"""OLMo-core's layout: config.json, and a torch distributed checkpoint in model_and_optim/.

Also that folder alone, with config.json in it or beside it. The tensors' places: ``untrusted.dcp``.
Meaning and defaults of config.json's keys: ai2-olmo-core 3.0.0, olmo_core/nn. A key that isn't in the
lists of ``olmo_core_keys`` is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from simlab.checkpoints.formats import olmo_core_keys as keys
from simlab.checkpoints.formats.olmo_core_rope import Rope, read_olmo_core_rope
from simlab.checkpoints.formats.opened import Opened, layers, read_heads
from simlab.checkpoints.formats.own_init import OwnInit, olmo_core_init
from simlab.checkpoints.untrusted import dcp
from simlab.checkpoints.untrusted.files import fields_of, read_json
from simlab.config import ConfigError, ModelConfig, NormConfig
from simlab.config.fields import Fields, brief

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
_QK_NORM_KEYS = {
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
_BLOCK_TYPES = {
    "reordered_norm": ("reordered", _norm_keys("norm_out", "attention_norm", "feed_forward_norm")),
    "default": ("pre", _IN),
    "peri_norm": (
        "peri",
        _IN | _norm_keys("norm_out", "post_attention_norm", "post_feed_forward_norm"),
    ),
}
# Implementations of one norm, which differ in how they round.
_NORM_TYPES = {
    "rms": "rms", "fused_rms": "rms", "cute_rms": "rms", "qwen_rms": "rms", "nemotron_rms": "rms",
    "default": "layer",
}  # fmt: skip
STATE = "model_and_optim"


def no_bias(fields: Fields) -> None:
    """Refuse a bias, which is the trainer's default. Raises ConfigError."""
    if fields.boolean("bias", True):
        raise fields.fail("bias", True, "not supported; allowed: false")


def read_norm_section(fields: Fields, key: str) -> tuple[str, float, bool]:
    """A norm's type, its eps, True if it has a gain. Raises ConfigError for a bias, another norm."""
    norm = fields.node(key, {})
    if not norm.values:
        raise ConfigError(f"{fields.prefix}{key}=null: a model without it is not supported")
    keys.NORM.check(norm)
    gain = norm.boolean("elementwise_affine", True)
    if gain:
        no_bias(norm)
    kind = _NORM_TYPES[norm.choice("name", _NORM_TYPES, "default")]
    return kind, norm.number("eps", 0.0, default=1e-5), gain


def read_windows(attention: Fields, depth: int) -> list[int | None]:
    """Each layer's attention window by the pattern, None where it sees every token."""
    window = attention.node("sliding_window", {})
    if not window.values:
        return [None] * depth
    keys.WINDOW.check(window)
    pattern = window.take("pattern")
    sizes = pattern if isinstance(pattern, list) else []
    if not sizes or any(type(n) is not int or not (n == -1 or 0 < n <= 10**9) for n in sizes):
        raise window.fail("pattern", pattern, "must be window sizes, -1 for none")
    first = window.boolean("force_full_attention_on_first_layer", True)
    last = window.boolean("force_full_attention_on_last_layer", True)
    # Where the first layer is set apart, the pattern starts at the second.
    windows = [sizes[(layer - first) % len(sizes)] for layer in range(depth)]
    if first:
        windows[0] = -1
    if last:
        windows[-1] = -1
    return [None if n == -1 else n for n in windows]


def block_sections(fields: Fields, depth: int) -> list[Fields]:
    """Each layer's block: one for all, with overrides by layer, or named ones in a pattern."""
    block, overrides = fields.node("block", {}), fields.node("block_overrides", {})
    pattern = fields.take("block_pattern")
    if pattern is None:
        blocks = [block] * depth
        for layer in overrides.values:
            if not (layer.isascii() and layer.isdigit() and len(layer) < 10 and int(layer) < depth):
                raise ConfigError(f"{overrides.prefix}{brief(layer)}: must be a layer")
            blocks[int(layer)] = overrides.node(layer)
        return blocks
    if overrides.values:
        raise ConfigError(
            f"{fields.prefix}block_overrides: must be null where a block_pattern is given"
        )
    names = pattern if isinstance(pattern, list) else []
    if not names or any(not isinstance(n, str) or n not in block.values for n in names):
        raise fields.fail("block_pattern", pattern, "must be names of blocks")
    named = {name: block.node(name) for name in set(names)}
    return [named[names[layer % len(names)]] for layer in range(depth)]


@dataclass(frozen=True)
class ReadBlock:
    """A block's architecture (as a model of such blocks), key map, RoPE, and window by layer."""

    model: ModelConfig
    keys: dict[str, str]
    rope: Rope
    windows: list[int | None]


def read_block(block: Fields, model: Fields, head: Fields, depth: int, name: str) -> ReadBlock:
    """One block's section; name: the model's. Raises ConfigError for what simlab doesn't compute."""
    keys.BLOCK.check(block)
    placement, norm_keys = _BLOCK_TYPES[block.choice("name", _BLOCK_TYPES, "default")]
    mixers = [key for key in ("attention", "sequence_mixer") if block.values.get(key) is not None]
    if len(mixers) > 1:
        raise ConfigError(
            f"{block.prefix}attention: is sequence_mixer's old name: leave one of them"
        )
    mixer = mixers[0] if mixers else "sequence_mixer"
    attention = block.node(mixer, {})
    keys.ATTENTION.check(attention)
    attention.choice("type", ("attention",), "attention")
    attention.choice("name", ("default",), "default")
    mlp = block.node("feed_forward", {})
    keys.MLP.check(mlp)
    mlp.choice("name", ("default",), "default")
    mlp.choice("activation", ("silu",), "silu")
    for part in (attention, mlp, head):
        no_bias(part)
    norm, qk_norm = read_norm_section(block, "layer_norm"), "none"
    norms = {"layer_norm": norm, "lm_head.layer_norm": read_norm_section(head, "layer_norm")}
    if attention.values.get("qk_norm") is not None:
        norms["qk_norm"] = read_norm_section(attention, "qk_norm")
        qk_norm = "per_head" if attention.boolean("use_head_qk_norm", False) else "full"
    for which, other in norms.items():
        if other[:2] != norm[:2]:
            raise ConfigError(
                f"{model.prefix}{which}: must be the norm that layer_norm is, and its eps"
            )
    present = KEYS | (norm_keys if norm[2] else {})
    if "qk_norm" in norms and norms["qk_norm"][2]:
        present |= _QK_NORM_KEYS
    if not norms["lm_head.layer_norm"][2]:
        del present["norm.weight"]
    heads = read_heads(
        Fields(
            attention.values | {"d_model": model.values.get("d_model")},
            attention.prefix,
            attention.shown,
        ),
        ("d_model", "n_heads", "n_kv_heads", "head_dim"),
    )
    rope = read_olmo_core_rope(attention, heads["head_dim"])
    one = ModelConfig(
        name=name,
        depth=depth,
        **heads,
        d_ff=mlp.integer("hidden_size"),
        vocab_size=model.integer("vocab_size"),
        norm=NormConfig(placement, type=norm[0], eps=norm[1]),
        qk_norm=qk_norm,
        rope_theta=rope.theta,
        tied=model.boolean("tie_word_embeddings", False),
    )
    return ReadBlock(one, present, rope, read_windows(attention, depth))


def read_config(path: Path, tensors: int) -> tuple[ModelConfig, dict[str, str], OwnInit]:
    """The architecture from a config.json, its key map and its init.

    tensors: how many the checkpoint holds; more blocks than that are refused before any is read.
    Raises ConfigError for what is malformed or not computed by simlab.
    """
    model = fields_of(read_json(path), path)
    if "d_model" not in model.values:
        model = model.node("model", {})
    if not model.values:
        raise ConfigError(f"{path}: has no model: not a config of OLMo-core")
    model.choice("name", ("default",), "default")
    keys.MODEL.check(model)
    head = model.node("lm_head", {})
    keys.HEAD.check(head)
    head.choice("name", ("default",), "default")
    depth = layers(model, "n_layers", tensors)
    read: dict[int, ReadBlock] = {}
    each = []
    for block in block_sections(model, depth):
        if id(block) not in read:
            read[id(block)] = read_block(block, model, head, depth, path.parent.name)
        each.append(read[id(block)])
    return _merged(each, path), each[0].keys, olmo_core_init(model)


def _merged(each: list[ReadBlock], path: Path) -> ModelConfig:
    """One model of all blocks, which may differ in window, and in RoPE scaling with the window."""
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
    tensors = dcp.read_distributed_checkpoint(state, without=("optim.",))
    model, keys, init = read_config(config, len(tensors))
    return Opened("olmo_core", model, keys, tensors, config, init)
