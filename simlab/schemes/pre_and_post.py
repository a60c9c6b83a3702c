"""Placements that carry a pre-norm and a post-norm stream side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from simlab.config import ModelConfig
from simlab.schemes.scheme import Add, Map, Scheme, V


class ResiDual(Scheme):
    """x' = N(x + b), r' = r + b, b = F(x); then x + N(r): ResiDual (arXiv 2304.14802).

    As in microsoft/ResiDual, resi_dual_layers.py and resi_dual.py, with their scales of 1. The state is
    (r, x), both the embedding at first. The stream is r, the sum of all that sublayers add, which
    nothing norms: Δ‖r‖² = ‖b‖² + 2⟨r, b⟩. x is post-norm, of mean square 1 from the first step on. The
    source has no norm after x + N(r); simlab's final norm scales that by about 1/√2.
    """

    norms = ("norm_out",)

    @staticmethod
    def start(x: Any, norm: Map[Any], config: ModelConfig) -> Any:
        """(r, x)."""
        return x, x

    def step(self, state: tuple[V, V], F: Map[V], add: Add[V], norm_out: Map[V]) -> tuple[V, V]:
        r, x = state
        branch = F(x)
        return add(r, branch), norm_out(x + branch)

    @staticmethod
    def pull(gradients: Sequence[V], layer: int | None) -> V:
        """The sum: of a shift of r and, behind its norm, of x, the same for both."""
        return gradients[0] + gradients[1]

    @staticmethod
    def finish(state: Any, norm: Map[Any], config: ModelConfig) -> Any:
        """x + N(r)."""
        r, x = state
        return x + norm(r)


class SiameseNorm(Scheme):
    """x' = n + z/c, y' = y + z, n = N(x), z = F(N(n + N(y))), c = √(2l), l the block from 1.

    SiameseNorm (arXiv 2602.08064), post-pre: Qwen-Applications/SiameseNorm, deit-model-siamesenorm.py.
    The final norm gets N(x) + N(y). The state is (y, x), both the embedding at first. The stream is y:
    all that sublayers add is added to it whole, and nothing norms it: Δ‖y‖² = ‖z‖² + 2⟨y, z⟩. The
    gradient with respect to z is y's plus 1/c of x's. x has the mean square 1 + B/c² after a sublayer
    of mean square B.
    """

    norms = ("norm_out", "norm_stream", "norm_in")

    @staticmethod
    def start(x: Any, norm: Map[Any], config: ModelConfig) -> Any:
        """(y, x)."""
        return x, x

    def step(
        self, state: tuple[V, V], F: Map[V], add: Add[V], norm_out: Map[V], norm_stream: Map[V],
        norm_in: Map[V],
    ) -> tuple[V, V]:  # fmt: skip
        y, x = state
        normed = norm_out(x)
        branch = F(norm_in(normed + norm_stream(y)))
        return add(y, branch), normed + branch / math.sqrt(2 * (self.layer + 1))

    @staticmethod
    def pull(gradients: Sequence[V], layer: int | None) -> V:
        """A branch is added to y, and over c to x; the embedding to both."""
        c = 1.0 if layer is None else math.sqrt(2 * (layer + 1))
        return gradients[0] + gradients[1] / c

    @staticmethod
    def finish(state: Any, norm: Map[Any], config: ModelConfig) -> Any:
        """N(x) + N(y)."""
        y, x = state
        return norm(x) + norm(y)
