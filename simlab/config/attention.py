"""Attention's own options: the ``model`` keys about its logits, gate and value embeddings."""

from __future__ import annotations

from typing import TypedDict

from simlab.config.fields import Fields
from simlab.config.schema import ATTENTION_GATES, VALUE_EMBEDDINGS


class Attending(TypedDict):
    """Fields of ModelConfig."""

    qkv_bias: bool
    query_pre_attn_scalar: float | None
    attention_softcap: float | None
    attention_gate: str
    value_embeddings: str
    value_embedding_scale: float


def read_attention(node: Fields) -> Attending:
    """The checked keys. Configs written before some of them existed haven't got these."""
    gated = "attention_gate" in node.values
    embedded = "value_embeddings" in node.values
    return Attending(
        qkv_bias=node.boolean("qkv_bias") if "qkv_bias" in node.values else False,
        query_pre_attn_scalar=node.number("query_pre_attn_scalar", 0.0, above=True, default=None),
        attention_softcap=node.number("attention_softcap", 0.0, above=True, default=None),
        attention_gate=node.choice("attention_gate", ATTENTION_GATES) if gated else "none",
        value_embeddings=(
            node.choice("value_embeddings", VALUE_EMBEDDINGS) if embedded else "none"
        ),
        value_embedding_scale=node.number("value_embedding_scale", 0.0, 1e6, default=1.5),
    )
