"""Attention's own options: the ``model`` keys about its logits and its output gate."""

from __future__ import annotations

from typing import TypedDict

from simlab.config.fields import Fields
from simlab.config.schema import ATTENTION_GATES


class Attending(TypedDict):
    """Fields of ModelConfig."""

    qkv_bias: bool
    query_pre_attn_scalar: float | None
    attention_softcap: float | None
    attention_gate: str


def read_attention(node: Fields) -> Attending:
    """The checked keys. Configs written before some of them existed haven't got these."""
    gated = "attention_gate" in node.values
    return Attending(
        qkv_bias=node.boolean("qkv_bias") if "qkv_bias" in node.values else False,
        query_pre_attn_scalar=node.number("query_pre_attn_scalar", 0.0, above=True, default=None),
        attention_softcap=node.number("attention_softcap", 0.0, above=True, default=None),
        attention_gate=node.choice("attention_gate", ATTENTION_GATES) if gated else "none",
    )
