"""nGPT: a stream that every step leaves on a sphere."""

from __future__ import annotations

from typing import Any

from simlab.config import ModelConfig
from simlab.schemes.scheme import Add, Map, Scheme, V


class NGPT(Scheme):
    """n(x + a(n(F(x)) − x)): nGPT (arXiv 2410.01131; NVIDIA/ngpt, model.py).

    nGPT's n gives unit length, and n here rms 1: this stream is nGPT's times √d. A normed branch is the
    same: attention norms q and k, and the MLP of nGPT multiplies u and v by √d. nGPT's logits are
    √C·⟨q̂, k̂⟩, of unit vectors times s_qk = 1. Of vectors of rms 1 they are ⟨q, k⟩/√C, those of QK-norm
    of each head (``norm.qk_norm``), before RoPE or after it. Its embedding's rows have unit length, as
    ``start`` makes them. Its a is a parameter per channel, ``norm.alpha`` at init. Its norms have no
    gains; these have, of 1.

    Branches are uncorrelated with the stream at infinite width: the mean square is 1, and the cosine of
    x after k steps with the embedding is ((1 − a)/√((1 − a)² + a²))^k, 0.978 at 16.
    """

    norms, normalises = ("norm_branch", "norm_out"), "stream"

    @staticmethod
    def start(x: Any, norm: Map[Any], config: ModelConfig) -> Any:
        """The embedding, normed."""
        return norm(x)

    def step(self, x: V, F: Map[V], add: Add[V], norm_branch: Map[V], norm_out: Map[V]) -> V:
        return norm_out(add((1 - self.alpha) * x, self.alpha * norm_branch(F(x))))

    @staticmethod
    def alpha_of(config: ModelConfig) -> float:
        """a."""
        return 0.05 if config.norm.alpha is None else config.norm.alpha
