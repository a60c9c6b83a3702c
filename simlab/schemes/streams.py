"""Placements that carry n streams: a sublayer reads a mix of them and writes to all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simlab.config import ModelConfig
from simlab.schemes.scheme import Add, Map, Scheme, V


def total(vectors: Sequence[V]) -> V:
    """The sum of vectors."""
    first, *others = vectors
    for other in others:
        first = first + other
    return first


class HyperConnections(Scheme):
    """x_j + F(N(x_r)) for each of n streams x_j, r = k mod n in sublayer k: hyper-connections' init.

    arXiv 2409.19606, §2: the streams start as copies of the embedding. Sublayer k reads Σ a_j·x_j, a
    one-hot at k mod n, and makes Σ_i A_ij·x_i + b_j·F of stream j, A = I and b = 1; the final norm gets
    the streams' sum. What the paper adds to a, A and b for each token, s·tanh(N(x_j)·W), is exactly 0
    at init, where W = 0, and so is its gradient with respect to x_j. So each stream is ``pre``'s.
    """

    norms = ("norm_in",)

    @staticmethod
    def start(x: V, norm: Map[V], config: ModelConfig) -> tuple[V, ...]:
        """(x, …, x), the embedding n times."""
        return (x,) * (config.norm.streams or 4)

    def step(self, state: tuple[V, ...], F: Map[V], add: Add[V], norm_in: Map[V]) -> tuple[V, ...]:
        first, *others = state
        branch = F(norm_in(state[int(self.scales[0]) % len(state)]))
        return add(first, branch), *(x + branch for x in others)

    @staticmethod
    def scales_of(config: ModelConfig, layer: int, kind: str) -> tuple[float, ...]:
        """k, the sublayer counted from 0."""
        return (2.0 * layer + (kind == "mlp"),)

    @staticmethod
    def pull(gradients: Sequence[V]) -> V:
        """The sum: each stream is written to."""
        return total(gradients)

    @staticmethod
    def finish(state: Any, norm: Map[Any], config: ModelConfig) -> Any:
        """The streams' sum."""
        return total(state)
