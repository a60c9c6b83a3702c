"""GPT-2 and GPT-NeoX (Pythia) in Hugging Face's layout: names, and fused queries, keys and values.

After transformers 5.23 (``models/gpt2``, ``models/gpt_neox``) and the files that older versions wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from simlab.checkpoints.arranged import by_head, turned
from simlab.checkpoints.formats.hugging_face_rope import read_rotary, read_transformers_rope
from simlab.checkpoints.formats.opened import layers, read_heads
from simlab.checkpoints.storage import StoredTensor
from simlab.config import ConfigError, ModelConfig, NormConfig
from simlab.config.fields import Fields

_ENDS = ("weight", "bias")
_GPT2_PARTS = {  # ours to theirs
    "attention.norm_in": "ln_1",
    "attention.sublayer.q_proj": "attn.c_attn",  # one matrix: rows of q, then k, then v
    "attention.sublayer.k_proj": "attn.c_attn",
    "attention.sublayer.v_proj": "attn.c_attn",
    "attention.sublayer.o_proj": "attn.c_proj",
    "mlp.norm_in": "ln_2",
    "mlp.sublayer.up_proj": "mlp.c_fc",
    "mlp.sublayer.down_proj": "mlp.c_proj",
}
_GPT_NEOX_PARTS = {
    "attention.norm_in": "input_layernorm",
    "attention.sublayer.q_proj": "attention.query_key_value.q",  # ``by_head`` makes these three
    "attention.sublayer.k_proj": "attention.query_key_value.k",
    "attention.sublayer.v_proj": "attention.query_key_value.v",
    "attention.sublayer.o_proj": "attention.dense",
    "mlp.norm_in": "post_attention_layernorm",
    "mlp.sublayer.up_proj": "mlp.dense_h_to_4h",
    "mlp.sublayer.down_proj": "mlp.dense_4h_to_h",
}


def _keys(ends: dict[str, str], parts: dict[str, str], blocks: str) -> dict[str, str]:
    """Our keys to theirs: of the model's ends as they stand, and of every block's parts."""
    of_blocks = {
        f"blocks.{{}}.{ours}.{end}": f"{blocks}.{{}}.{theirs}.{end}"
        for ours, theirs in parts.items()
        for end in _ENDS
    }
    return ends | of_blocks


_GPT2 = _keys(
    {
        "embedding.weight": "transformer.wte.weight",
        "position.weight": "transformer.wpe.weight",
        "norm.weight": "transformer.ln_f.weight",
        "norm.bias": "transformer.ln_f.bias",
        "head.weight": "lm_head.weight",
    },
    _GPT2_PARTS,
    "transformer.h",
)
_GPT_NEOX = _keys(
    {
        "embedding.weight": "gpt_neox.embed_in.weight",
        "norm.weight": "gpt_neox.final_layer_norm.weight",
        "norm.bias": "gpt_neox.final_layer_norm.bias",
        "head.weight": "embed_out.weight",
    },
    _GPT_NEOX_PARTS,
    "gpt_neox.layers",
)
# The GELUs by transformers' names. The first three are one formula with as many digits of √(2/π).
_GELU = {
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_exact",
}
_BASES = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}
_INNER = {"gpt2": ("wte.", "wpe.", "h.", "ln_f."), "gpt_neox": ("embed_in.", "layers.", "final_")}
# Causal masks and their number, which older files hold; transformers makes them anew.
_MASK = re.compile(r"(.*\.)?(attn|attention)\.(masked_)?bias")
_CONV = re.compile(
    r"transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight"
)
_FUSED = re.compile(r"gpt_neox\.layers\.\d+\.attention\.query_key_value\.(weight|bias)")


def _gpt2(fields: Fields, name: str, tensors: int) -> tuple[ModelConfig, dict[str, str]]:
    heads = read_heads(fields, ("n_embd", "n_head", "num_key_value_heads", "head_dim"))
    model = ModelConfig(
        name=name,
        depth=layers(fields, "n_layer", tensors),
        **heads,
        d_ff=fields.integer("n_inner", default=4 * heads["width"]),
        vocab_size=fields.integer("vocab_size"),
        norm=NormConfig(
            "pre", "layer_bias", fields.number("layer_norm_epsilon", 0.0, default=1e-5)
        ),
        qk_norm="none",
        rope_theta=10_000.0,  # of no effect
        tied=fields.boolean("tie_word_embeddings", True),
        mlp=_GELU[fields.computed("activation_function", _GELU, "gelu_new")],
        bias=True,
        rotary=0.0,
        positions=fields.integer("n_positions", default=1024),
    )
    return model, _GPT2


def _gpt_neox(fields: Fields, name: str, tensors: int) -> tuple[ModelConfig, dict[str, str]]:
    theta, yarn, llama3 = read_transformers_rope(
        fields, 10_000.0, top="rotary_emb_base", partial=True
    )
    heads = read_heads(
        fields, ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    parallel = fields.boolean("use_parallel_residual", True)
    model = ModelConfig(
        name=name,
        depth=layers(fields, "num_hidden_layers", tensors),
        **heads,
        d_ff=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        norm=NormConfig(
            "parallel" if parallel else "pre",
            "layer_bias",
            fields.number("layer_norm_eps", 0.0, default=1e-5),
        ),
        qk_norm="none",
        rope_theta=theta,
        yarn=yarn,
        llama3=llama3,
        tied=fields.boolean("tie_word_embeddings", False),
        mlp=_GELU[fields.computed("hidden_act", _GELU, "gelu")],
        bias=True,
        rotary=read_rotary(fields, "rotary_pct", 0.25, heads["head_dim"]),
    )
    return model, _GPT_NEOX


# A model type's reader: fields, the model's name and how many tensors there are.
READERS: Mapping[str, Callable[[Fields, str, int], tuple[ModelConfig, dict[str, str]]]] = {
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}


def by_full_name(
    kind: str, held: Mapping[str, StoredTensor], folder: Path
) -> dict[str, StoredTensor]:
    """The files' tensors by their names in a model with a head, without masks. Raises ConfigError.

    ``AutoModel.save_pretrained`` and the first GPT-2 files leave out the base model's name.
    """
    found: dict[str, StoredTensor] = {}
    for name, stored in held.items():
        if _MASK.fullmatch(name):
            continue
        full = f"{_BASES[kind]}{name}" if name.startswith(_INNER[kind]) else name
        if kind == "gpt_neox" and name == "lm_head.weight":
            full = "embed_out.weight"
        if full in found:
            raise ConfigError(f"{folder}: tensors {found[full].name} and {name} are one in a model")
        if not stored.dtype.is_floating_point:
            raise ConfigError(f"{folder}: tensor {name} is {stored.kind}; allowed: floating point")
        found[full] = stored
    return found


def arranged(
    held: Mapping[str, StoredTensor], model: ModelConfig, folder: Path
) -> dict[str, StoredTensor]:
    """The tensors as the model has them: Conv1D's weights turned, fused ones of GPT-NeoX by head.

    Raises ConfigError for a fused tensor of another shape than the model's.
    """
    return dict(_arranged(held, model, folder))


def _arranged(
    held: Mapping[str, StoredTensor], model: ModelConfig, folder: Path
) -> Iterator[tuple[str, StoredTensor]]:
    for name, stored in held.items():
        if fused := _FUSED.fullmatch(name):
            implied = (3 * model.width, model.width)[: 2 if fused[1] == "weight" else 1]
            if stored.shape != implied:
                raise ConfigError(
                    f"{folder}: tensor {stored.name} has shape {stored.shape}, but config.json implies "
                    f"{implied}"
                )
            start = name.removesuffix(fused[1])
            for part, own in zip("qkv", by_head(stored, model.heads, 3), strict=True):
                yield f"{start}{part}.{fused[1]}", own
        elif _CONV.fullmatch(name) and len(stored.shape) == 2:
            yield name, turned(stored)
        else:
            yield name, stored
