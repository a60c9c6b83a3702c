"""The residual schemes without a constant: where the norms sit, and nothing else."""

from __future__ import annotations

from simlab.schemes.scheme import Add, Map, Scheme, V


class NoNorm(Scheme):
    """x + F(x)."""

    def step(self, x: V, F: Map[V], add: Add[V]) -> V:
        return add(x, F(x))


class Pre(Scheme):
    """x + F(N(x)): GPT-2, Llama."""

    norms = ("norm_in",)

    def step(self, x: V, F: Map[V], add: Add[V], norm_in: Map[V]) -> V:
        return add(x, F(norm_in(x)))


class Post(Scheme):
    """N(x + F(x)): arXiv 1706.03762."""

    norms, normalises = ("norm_out",), "stream"

    def step(self, x: V, F: Map[V], add: Add[V], norm_out: Map[V]) -> V:
        return norm_out(add(x, F(x)))


class Peri(Scheme):
    """x + N(F(N(x))): Peri-LN (arXiv 2502.02732), Gemma 2 and 3's sandwich."""

    norms, normalises = ("norm_in", "norm_out"), "branch"

    def step(self, x: V, F: Map[V], add: Add[V], norm_in: Map[V], norm_out: Map[V]) -> V:
        return add(x, norm_out(F(norm_in(x))))


class Reordered(Scheme):
    """x + N(F(x)): OLMo 2 (arXiv 2501.00656, §2.1)."""

    norms, normalises = ("norm_out",), "branch"

    def step(self, x: V, F: Map[V], add: Add[V], norm_out: Map[V]) -> V:
        return add(x, norm_out(F(x)))
