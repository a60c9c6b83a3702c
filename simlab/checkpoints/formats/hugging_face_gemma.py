"""Gemma 2 and the text part of Gemma 3 in Hugging Face's layout.

After transformers 5.23 (``models/gemma2``, ``models/gemma3``) and the config.json that older versions
wrote. Their norms store w, the gain is 1 + w.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from simlab.checkpoints.formats.hugging_face_rope import (
    LAYER_TYPES,
    read_layered_rope,
    read_transformers_rope,
)
from simlab.checkpoints.formats.opened import layers, read_heads
from simlab.checkpoints.storage import StoredTensor
from simlab.config import ConfigError, ModelConfig, NormConfig
from simlab.config.errors import NotComputed
from simlab.config.fields import Fields

_PARTS = {  # ours to theirs
    "attention.norm_in": "input_layernorm",
    "attention.norm_out": "post_attention_layernorm",
    "mlp.norm_in": "pre_feedforward_layernorm",
    "mlp.norm_out": "post_feedforward_layernorm",
} | {
    f"{step}.sublayer.{name}_proj": f"{theirs}.{name}_proj"
    for step, theirs, names in (
        ("attention", "self_attn", "qkvo"),
        ("mlp", "mlp", ("gate", "up", "down")),
    )
    for name in names
}
_QK_NORM = {f"attention.sublayer.{name}_norm": f"self_attn.{name}_norm" for name in "qk"}
_ENDS = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
# transformers' defaults; the 4B's config.json on the hub leaves out half of these.
_DEFAULTS: Mapping[str, object] = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
}  # fmt: skip
_OWN_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "gemma2": {
        "vocab_size": 256_000, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {"vocab_size": 262_208},
}  # fmt: skip
# Of the text part's tensors in a model with an image encoder, by old and new versions' names.
_TEXT = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(.+)")


def _names(*parts: Mapping[str, str]) -> dict[str, str]:
    return _ENDS | {
        f"blocks.{{}}.{ours}.weight": f"model.layers.{{}}.{theirs}.weight"
        for part in parts
        for ours, theirs in part.items()
    }


def _read(kind: str, fields: Fields, name: str, tensors: int) -> tuple[ModelConfig, dict[str, str]]:
    """The model of a config.json, and its key map. Raises ConfigError."""
    fields.values = {**_DEFAULTS, **_OWN_DEFAULTS[kind], **fields.values}
    fields.computed("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    heads = read_heads(
        fields, ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    depth = layers(fields, "num_hidden_layers", tensors)
    local, linear = None, None
    every = 2
    if kind == "gemma2":
        theta, *scalings = read_transformers_rope(fields, 10_000.0)
        if any(scalings):  # which would be of every layer
            raise NotComputed(f"{fields.prefix}rope_parameters: scaled RoPE is not supported")
    else:
        every = fields.integer("sliding_window_pattern", default=6)
        theta, local, linear = read_layered_rope(fields)
    model = ModelConfig(
        name=name,
        depth=depth,
        **heads,
        d_ff=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        norm=NormConfig("peri", "rms_plus_one", fields.number("rms_norm_eps", 0.0)),
        qk_norm="none" if kind == "gemma2" else "per_head",
        rope_theta=theta,
        window=fields.integer("sliding_window"),
        full_attention=_full_layers(fields, depth, every),
        tied=fields.boolean("tie_word_embeddings", True),
        mlp="geglu",
        embedding_scale=math.sqrt(heads["width"]),
        query_pre_attn_scalar=fields.number("query_pre_attn_scalar", 0.0, above=True),
        attention_softcap=fields.number("attn_logit_softcapping", 0.0, above=True, default=None),
        logit_softcap=fields.number("final_logit_softcapping", 0.0, above=True, default=None),
        rope_local_theta=local,
        rope_linear=linear,
    )
    return model, _names(_PARTS) if kind == "gemma2" else _names(_PARTS, _QK_NORM)


def _full_layers(fields: Fields, depth: int, every: int) -> tuple[int, ...]:
    """The layers that see every token: as listed, else each ``every``-th. Raises ConfigError."""
    kinds = fields.take("layer_types")
    if kinds is None:
        return tuple(range(every - 1, depth, every))
    if (
        not isinstance(kinds, list)
        or len(kinds) != depth
        or any(k not in LAYER_TYPES for k in kinds)
    ):
        raise ConfigError(
            f"{fields.prefix}layer_types: must be {depth} of {', '.join(LAYER_TYPES)}"
        )
    return tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")


# A model type's reader: fields, the model's name and how many tensors there are.
GEMMA_READERS: Mapping[str, Callable[[Fields, str, int], tuple[ModelConfig, dict[str, str]]]] = {
    "gemma2": lambda *given: _read("gemma2", *given),
    "gemma3_text": lambda *given: _read("gemma3_text", *given),
}


def text_part(
    held: Mapping[str, StoredTensor], folder: Path
) -> tuple[dict[str, StoredTensor], list[str]]:
    """A Gemma 3 with an image encoder: its text part's tensors by their names in a text model.

    And the names of the other tensors. Raises ConfigError for two tensors that are one in a model.
    """
    found: dict[str, StoredTensor] = {}
    others = []
    for name, stored in held.items():
        match = _TEXT.fullmatch(name)
        if match is None and name != "lm_head.weight":
            others.append(name)
            continue
        own = match[1] if match else name
        full = own if own == "lm_head.weight" else f"model.{own}"
        if full in found:
            raise ConfigError(f"{folder}: tensors {found[full].name} and {name} are one in a model")
        found[full] = stored
    return found, others
