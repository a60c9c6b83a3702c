"""Placements that carry n streams: a sublayer reads a mix of them and writes to all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from simlab.config import ModelConfig, NormConfig
from simlab.schemes.scheme import Add, Map, Scheme, V

C = TypeVar("C")
SINKHORN_EPS, SINKHORN_ITERATIONS = 1e-6, 20  # transformers' hc_eps and hc_sinkhorn_iters


def total(vectors: Sequence[V]) -> V:
    """The sum of vectors."""
    first, *others = vectors
    for other in others:
        first = first + other
    return first


def doubly_stochastic(c: Any) -> Any:
    """Softmax's (…, n, n) to positive matrices whose rows sum to about 1 too, the columns to 10⁻⁶.

    Sinkhorn and Knopp's iteration, SINKHORN_ITERATIONS times, on an array or a tensor.
    """
    c = c + SINKHORN_EPS
    c = c / (c.sum(-2, keepdims=True) + SINKHORN_EPS)
    for _ in range(SINKHORN_ITERATIONS - 1):
        c = c / (c.sum(-1, keepdims=True) + SINKHORN_EPS)
        c = c / (c.sum(-2, keepdims=True) + SINKHORN_EPS)
    return c


def weighted(shares: Sequence[Any], vectors: Sequence[Any]) -> Any:
    """Σ share · vector."""
    return total([share * x for share, x in zip(shares, vectors, strict=True)])


class Streams(Scheme):
    """n streams, which start as copies of the embedding and are all written to."""

    norms = ("norm_in",)

    @staticmethod
    def start(x: V, norm: Map[V], config: ModelConfig) -> tuple[V, ...]:
        """(x, …, x), the embedding n times."""
        return (x,) * (config.norm.streams or 4)

    @staticmethod
    def pull(gradients: Sequence[V], layer: int | None) -> V:
        """The sum: a write moves each stream."""
        return total(gradients)


class HyperConnections(Streams):
    """x_j + F(N(x_r)) for each of n streams x_j, r = k mod n in sublayer k: hyper-connections' init.

    arXiv 2409.19606, §2: the streams start as copies of the embedding. Sublayer k reads Σ a_j·x_j, a
    one-hot at k mod n, and makes Σ_i A_ij·x_i + b_j·F of stream j, A = I and b = 1; the final norm gets
    the streams' sum. What the paper adds to a, A and b for each token, s·tanh(N(x_j)·W), is exactly 0
    at init, where W = 0, and so is its gradient with respect to x_j. So each stream is ``pre``'s.
    """

    def step(self, state: tuple[V, ...], F: Map[V], add: Add[V], norm_in: Map[V]) -> tuple[V, ...]:
        first, *others = state
        branch = F(norm_in(state[int(self.scales[0]) % len(state)]))
        return add(first, branch), *(x + branch for x in others)

    @staticmethod
    def scales_of(config: ModelConfig, layer: int, kind: str) -> tuple[float, ...]:
        """k, the sublayer counted from 0."""
        return (2.0 * layer + (kind == "mlp"),)

    @staticmethod
    def finish(state: Any, norm: Map[Any], config: ModelConfig) -> Any:
        """The streams' sum."""
        return total(state)


@dataclass(frozen=True)
class Coefficients(Generic[C]):
    """A step's coefficients of n streams: numbers, or one for each token.

    gates: p_j (n). write: q_t (n). kept: c_t, the shares (n) of each stream in what stream t was; None
    for the identity.
    """

    gates: tuple[C, ...]
    write: tuple[C, ...]
    kept: tuple[tuple[C, ...], ...] | None

    def read(self, state: tuple[Any, ...]) -> Any:
        """Σ p_j·x_j."""
        return weighted(self.gates, state)


def mix_shape(norm: NormConfig) -> tuple[int, int]:
    """n, and how many coefficients a token has."""
    n = norm.streams or 4
    return n, n * (n + 2) if norm.mix_streams else 2 * n


def read_logit(norm: NormConfig) -> float:
    """The logit of ``norm.read_gate``: what a gate's argument is where its coefficients are 0."""
    gate = norm.read_gate or 0.5
    return math.log(gate) - math.log1p(-gate)


class ManifoldHyperConnections(Streams):
    """x_t' = Σ_j c_jt·x_j + q_t·F(N(Σ p_j·x_j)), with p, q and c of each token: mHC.

    arXiv 2512.24880, §4.2, as in transformers' ``deepseek_v4/modeling_deepseek_v4.py``. Its scales s
    start at 1 there (``norm=mhc``), at 0.01 in the paper (Table 5; ``mhc_paper``), and DeepSeek-V4's
    report says "initialized to small values" of them. No source says how W starts. ``model/mix.py`` has
    the coefficients. The streams start as copies of the embedding. The stream that is reported is
    their mean, x' = x + q̄·F, as c's rows sum to 1 (Sinkhorn's iteration leaves some 10⁻³ where its
    logits are large); a branch is q̄·F. So at infinite width m' = m + (1 + 4 Var σ(u)/n)·B, u the
    logits. The final norm gets the streams' mean, as in transformers' ``glm5_next``.
    """

    parts = ("mix",)

    def step(
        self, state: tuple[Any, ...], F: Map[Any], add: Add[Any], norm_in: Map[Any], mix: Any
    ) -> tuple[Any, ...]:
        by = mix(state)
        branch = F(norm_in(by.read(state)))
        kept = state if by.kept is None else [weighted(shares, state) for shares in by.kept]
        add(total(kept) / len(state), (total(by.write) / len(state)) * branch)  # to be measured
        return tuple(x + q * branch for x, q in zip(kept, by.write, strict=True))

    @staticmethod
    def watch(state: Any) -> Any:
        """The streams' mean."""
        return total(state) / len(state)

    @staticmethod
    def finish(state: Any, norm: Map[Any], config: ModelConfig) -> Any:
        """The streams' mean."""
        return total(state) / len(state)


class GatedHead(ManifoldHyperConnections):
    """mHC whose final norm gets Σ p_j·x_j, p = σ(u + logit r) of each token: DeepSeek-V4's head.

    From transformers' ``deepseek_v4/modeling_deepseek_v4.py``, whose u is of a fresh matrix as the
    steps' is. The stream is ``mhc``'s in law, and so is its gradient as long as u is small. The head of
    ``hy_v4/modeling_hy_v4.py`` (``norm=hy_v4``) is the same, with the scale and the bias of its steps.
    """

    finish_parts = ("gates",)

    @staticmethod
    def finish(state: Any, norm: Map[Any], config: ModelConfig, gates: Any = None) -> Any:
        """The streams, weighed."""
        return gates(state).read(state)
