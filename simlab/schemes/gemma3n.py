"""Gemma 3n's residual scheme: sandwich norms, and LAuReL beside attention."""

from __future__ import annotations

import math

from simlab.config import ModelConfig
from simlab.schemes.plain import Peri
from simlab.schemes.scheme import Add, Map, Scheme, V


class Laurel(Scheme):
    """(x + h + N(RLh) + N(F(h)))/√2, h = N(x), RL of low rank: LAuReL-LR beside attention."""

    norms, parts = ("norm_in", "norm_laurel", "norm_out"), ("laurel",)

    def step(
        self, x: V, F: Map[V], add: Add[V], norm_in: Map[V], norm_laurel: Map[V], norm_out: Map[V],
        laurel: Map[V],
    ) -> V:  # fmt: skip
        read = norm_in(x)
        skip = x + read + norm_laurel(laurel(read))
        return add(skip / math.sqrt(2), norm_out(F(read)) / math.sqrt(2))


class Gemma3n(Scheme):
    """y = (x + h + N(RLh) + N(A(h)))/√2, h = N(x), then x' = y + N(M(N(y))): Gemma 3n's active stream.

    From transformers' ``gemma3n/modeling_gemma3n.py``. Behind norms of gain 1, m_y = ((√m + 1)² + 2)/2
    and m' = m_y + 1, which rests at m = (1 + √6)² = 11.90. What is left out does nothing to this
    stream at transformers' init: AltUp's prediction and correction coefficients are a small matrix
    times tanh(W N(x)/d), about 2·10⁻⁵ at width 2048 and std 0.02, and the other streams, to which
    per-layer embeddings are added (0 at init, by ``correct_output_scale``), are read after the last
    block only: projected and scaled, they are averaged with this one. Each gets x' − x of every block
    as it is, so what the loss's gradient gets through them is the same at every depth. That part isn't
    here.
    """

    @classmethod
    def select(cls, config: ModelConfig, layer: int, kind: str) -> type[Scheme]:
        """LAuReL beside attention, the MLP between two norms."""
        return Laurel if kind == "attention" else Peri
