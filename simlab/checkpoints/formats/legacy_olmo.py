"""The layout of the old OLMo trainer, unsharded: config.yaml beside model.safetensors or model.pt.

Meaning and defaults of the keys: allenai/OLMo, olmo/config.py and olmo/model.py.
"""

from __future__ import annotations

from pathlib import Path

from simlab.checkpoints.formats.keys import Keys
from simlab.checkpoints.formats.opened import Opened, layers, read_heads
from simlab.checkpoints.formats.own_init import OwnInit, legacy_olmo_init
from simlab.checkpoints.untrusted.files import fields_of
from simlab.checkpoints.untrusted.safetensors import read_header
from simlab.checkpoints.untrusted.torch_zip import read_torch_file
from simlab.checkpoints.untrusted.yaml import read_section
from simlab.config import ConfigError, ModelConfig, NormConfig
from simlab.config.fields import Fields

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
_QK_NORM_KEYS = {
    "blocks.{}.attention.sublayer.q_norm.weight": "transformer.blocks.{}.q_norm.weight",
    "blocks.{}.attention.sublayer.k_norm.weight": "transformer.blocks.{}.k_norm.weight",
}
# Every key of the ``model`` section: olmo/config.py's ModelConfig, and keys of its older versions.
SECTION = Keys(
    "d_model n_heads n_kv_heads head_dim n_layers mlp_ratio mlp_hidden_size activation_type block_type "
    "multi_query_attention attention_layer_norm attention_layer_norm_with_affine layer_norm_type "
    "layer_norm_with_affine layer_norm_eps norm_after rope_theta vocab_size embedding_size "
    "weight_tying",
    "rope_full_precision alibi_bias_max flash_attention attention_dropout residual_dropout "
    "embedding_dropout max_sequence_length eos_token_id pad_token_id precision low_cpu_fsdp "
    "init_device init_fn init_std init_cutoff_factor emb_init_std scale_emb_init",
    {
        "rope": True,
        "alibi": False,
        "include_bias": False,
        "bias_for_layer_norm": False,
        "clip_qkv": None,
        "scale_logits": False,
        "embedding_layer_norm": False,
        "block_group_size": 1,
    },
)
_NORM_TYPES = {"rms": "rms", "default": "layer", "low_precision": "layer"}


def _norm_keys(where: str) -> dict[str, str]:
    return {
        "norm.weight": "transformer.ln_f.weight",
        f"blocks.{{}}.attention.{where}.weight": "transformer.blocks.{}.attn_norm.weight",
        f"blocks.{{}}.mlp.{where}.weight": "transformer.blocks.{}.ff_norm.weight",
    }


def _hidden(fields: Fields, width: int) -> int:
    """d_ff from the size of gate and up together."""
    ratio = fields.integer("mlp_ratio", default=4)
    both = fields.integer("mlp_hidden_size", default=ratio * width)
    if both % 2:
        raise fields.fail("mlp_hidden_size", both, "must be even, it is gate and up together")
    return both // 2


def _kv_heads(fields: Fields, path: Path) -> int | None:
    """The default of ``n_kv_heads``; with both spellings given they must agree."""
    multi = fields.boolean("multi_query_attention", False)
    if multi and fields.values.get("n_kv_heads") not in (None, 1):
        raise ConfigError(f"{path}: multi_query_attention=true: n_kv_heads must be 1 or null")
    return 1 if multi else None


def read_config(path: Path, tensors: int) -> tuple[ModelConfig, dict[str, str], OwnInit]:
    """The architecture from the ``model`` section of a config.yaml, its key map and its init.

    tensors: how many the checkpoint holds; more blocks than that are refused. Raises ConfigError for
    what is malformed or not computed by simlab.
    """
    values = read_section(path, "model")
    # Of these two the trainer's own defaults aren't computed: they are to be given.
    fields = fields_of({"rope": False, "include_bias": True} | values, path)
    fields.choice("activation_type", ("swiglu",), "swiglu")
    fields.choice("block_type", ("sequential",), "sequential")
    SECTION.check(fields)
    if fields.values["include_bias"] is None:
        raise ConfigError(f"{path}: include_bias: must be false")
    affine = fields.boolean("layer_norm_with_affine", True)
    qk_norm = fields.boolean("attention_layer_norm", False)
    where = "norm_out" if fields.boolean("norm_after", False) else "norm_in"
    keys = KEYS | (_norm_keys(where) if affine else {})
    if qk_norm and fields.boolean("attention_layer_norm_with_affine", True):
        keys |= _QK_NORM_KEYS
    heads = read_heads(
        fields, ("d_model", "n_heads", "n_kv_heads", "head_dim"), _kv_heads(fields, path)
    )
    if heads["head_dim"] * heads["heads"] != heads["width"]:
        raise fields.fail("head_dim", heads["head_dim"], "must be d_model / n_heads")
    vocab_size = fields.integer("vocab_size")
    rows = fields.integer("embedding_size", default=vocab_size)
    if "embedding_size" not in values:
        rows = 50304  # the trainer's default; null is vocab_size
    model = ModelConfig(
        name=path.parent.name,
        depth=layers(fields, "n_layers", tensors),
        **heads,
        d_ff=_hidden(fields, heads["width"]),
        vocab_size=rows,
        norm=NormConfig(
            "reordered" if where == "norm_out" else "pre",
            type=_NORM_TYPES[fields.choice("layer_norm_type", _NORM_TYPES, "default")],
            eps=fields.number("layer_norm_eps", 0.0, default=1e-5),
        ),
        qk_norm="full" if qk_norm else "none",
        rope_theta=fields.number("rope_theta", 1.0, above=True, default=10_000.0),
        tied=fields.boolean("weight_tying", True),
    )
    return model, keys, legacy_olmo_init(fields)


def matches(folder: Path) -> bool:
    """True if the folder has this layout's files."""
    return (folder / "config.yaml").is_file()


def open_folder(folder: Path) -> Opened:
    """Raises ConfigError for what is missing, malformed or not supported."""
    path = folder / "config.yaml"
    single, pickled = folder / "model.safetensors", folder / "model.pt"
    if not single.is_file() and not pickled.is_file():
        raise ConfigError(f"{folder}: holds neither {single.name} nor {pickled.name}")
    tensors = read_header(single) if single.is_file() else read_torch_file(pickled)
    model, keys, init = read_config(path, len(tensors))
    return Opened("legacy_olmo", model, keys, tensors, path, init)
