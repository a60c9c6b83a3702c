"""Gemma 2 and 3 in GGUF files: what llama.cpp's code has for them and their files don't say.

After llama.cpp (``src/models/gemma2.cpp``, ``gemma3.cpp``, ``src/llama-model.cpp``). Its converter adds
1 to the norms' weights, so that a file holds the gains.
"""

from __future__ import annotations

import math

from simlab.checkpoints.formats.keys import Keys
from simlab.checkpoints.formats.opened import Heads
from simlab.config import ModelConfig, NormConfig
from simlab.config.fields import Fields

_WINDOW = Keys("attention.sliding_window attention.sliding_window_pattern")
GEMMA_KEYS = {
    "gemma2": _WINDOW | Keys("attn_logit_softcapping final_logit_softcapping"),
    "gemma3": _WINDOW
    | Keys(
        "rope.freq_base_swa",
        fixed={"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
}
# Blocks of the 27B models, the only ones whose logits aren't divided by √head_dim.
_BLOCKS_OF_27B = {"gemma2": 46, "gemma3": 62}
_EVERY = {"gemma2": 2, "gemma3": 6}


def gemma_model(
    kind: str, fields: Fields, name: str, heads: Heads, depth: int, rows: int, tied: bool
) -> ModelConfig:
    """The architecture; rows: of the embedding. Raises ConfigError."""
    every = fields.integer("attention.sliding_window_pattern", default=_EVERY[kind])
    own = heads["width"] // heads["heads"]
    linear = _linear(fields)
    if kind == "gemma2" and linear is not None:
        raise fields.fail("rope.scaling.factor", linear, "not supported; allowed: 1")
    second, third = kind == "gemma2", kind == "gemma3"

    def cap(key: str, default: float) -> float | None:
        return fields.number(key, 0.0, above=True, default=default) if second else None

    return ModelConfig(
        name=name,
        depth=depth,
        **heads,
        d_ff=fields.integer("feed_forward_length"),
        vocab_size=fields.integer("vocab_size", default=rows),
        norm=NormConfig("peri", eps=fields.number("attention.layer_norm_rms_epsilon", 0.0)),
        qk_norm="none" if second else "per_head",
        rope_theta=fields.number("rope.freq_base", 1.0, above=True, default=10_000.0),
        window=fields.integer("attention.sliding_window"),
        full_attention=tuple(range(every - 1, depth, every)),
        tied=tied,
        mlp="geglu",
        embedding_scale=math.sqrt(heads["width"]),
        query_pre_attn_scalar=float(own if depth == _BLOCKS_OF_27B[kind] else heads["head_dim"]),
        attention_softcap=cap("attn_logit_softcapping", 50.0),
        logit_softcap=cap("final_logit_softcapping", 30.0),
        rope_local_theta=fields.number("rope.freq_base_swa", 1.0, above=True, default=10_000.0)
        if third
        else None,
        rope_linear=linear,
    )


def _linear(fields: Fields) -> float | None:
    """The divisor of RoPE's angles in layers without a window; None for 1. Raises ConfigError."""
    kind = fields.choice("rope.scaling.type", ("none", "linear"), "linear")
    factor = fields.number("rope.scaling.factor", 1.0, default=1.0)
    return factor if kind == "linear" and factor != 1 else None
