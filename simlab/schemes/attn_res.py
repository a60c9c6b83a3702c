"""Attention residuals: sublayers attend over what earlier ones wrote, instead of reading its sum."""

from __future__ import annotations

import math
from typing import Any

from simlab.config import ModelConfig
from simlab.schemes.scheme import Add, Map, Scheme, vectors


class AttnRes(Scheme):
    """x + F(N(x/n)), x the sum of n sources: attention residuals at their init (arXiv 2603.15031).

    There sublayer k (from 0) reads Σ a_i·v_i of its sources, a = softmax_i(w_k·N(v_i)), and so does the
    output. "All pseudo-query vectors must be initialized to zero" (§5): w = 0, so a_i is 1/n for every
    token, and the gradient through a_i is 0 too. This is that init's function exactly, forward and
    backward; a trained w isn't simulated. It is ``pre``'s, except that eps counts n² times as much.

    Full (§3.1): the sources are the embedding and every branch so far, n = 1 + k. By block (§3.2), S =
    ``norm.block_size`` sublayers: the embedding, a sum for every S branches, and the open sum of the
    latest ones, n = 1 + ⌈k/S⌉; S = 1 is full. Where S is at least the number of sublayers, as Kimi K3's
    is in a small model, one sum is left beside the embedding.

    The stream is x, which nobody stores: Δ‖x‖² = ‖b‖² + 2⟨x, b⟩. By block the state is (x, open sum);
    the open sum starts again every S sublayers, as the paper's Fig. 5b has it.
    """

    norms = ("norm_in",)

    @staticmethod
    def start(x: Any, norm: Map[Any], config: ModelConfig) -> Any:
        """(x, x), or x alone where no sums are kept. The embedding is the first sum."""
        return x if config.norm.block_size is None else (x, x)

    def step(self, state: Any, F: Map[Any], add: Add[Any], norm_in: Map[Any]) -> Any:
        x, *open_sum = vectors(state)
        sources, starts = self.scales
        branch = F(norm_in(x / sources))
        out = add(x, branch)
        if not open_sum:
            return out
        return out, branch if starts else open_sum[0] + branch

    @staticmethod
    def scales_of(config: ModelConfig, layer: int, kind: str) -> tuple[float, ...]:
        """n, and 1.0 where a sum starts."""
        sublayer = 2 * layer + (kind == "mlp")
        starts = sublayer % (config.norm.block_size or 1) == 0
        return _sources(config, sublayer), float(starts)

    @staticmethod
    def finish(state: Any, norm: Map[Any], config: ModelConfig) -> Any:
        """The mean of all sources, which the output reads."""
        return vectors(state)[0] / _sources(config, 2 * config.depth)


def _sources(config: ModelConfig, sublayer: int) -> float:
    return 1.0 + math.ceil(sublayer / (config.norm.block_size or 1))
