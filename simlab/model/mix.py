"""Hyper-connections' mixing coefficients, computed for each token from its streams."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simlab.config import ModelConfig
from simlab.model.attention import Linear
from simlab.model.norms import squarable
from simlab.schemes.streams import (
    SINKHORN_EPS,
    Coefficients,
    doubly_stochastic,
    mix_shape,
    read_logit,
)


class Gates(nn.Module):
    """Streams x_1 … x_n to the weights p = σ(u + logit r) with which DeepSeek-V4's head reads them.

    u = s·W·N(x) of the flattened streams, s ``norm.mix_scale``, r ``norm.read_gate``. It is
    DeepseekV4HyperHead of transformers' ``deepseek_v4/modeling_deepseek_v4.py``, whose logits have a
    scale and a bias that start as one number each. outputs: how many logits there are; None: n.
    """

    def __init__(self, config: ModelConfig, linear: Linear, outputs: int | None = None) -> None:
        super().__init__()
        norm = config.norm
        self.streams, _ = mix_shape(norm)
        self.scale, self.eps = norm.mix_scale or 0.0, norm.eps
        self.bias = read_logit(norm)
        self.mix_proj = linear(self.streams * config.width, outputs or self.streams, False)

    def logits(self, state: tuple[Tensor, ...]) -> Tensor:
        """u of n streams (B, T, D).

        In float64 where there is one: what is made of it and rounded again has the same bits whatever
        the batch, which float32's exponentials don't.
        """
        x = torch.cat(state, -1)
        normed = nn.functional.rms_norm(squarable(x.float()), x.shape[-1:], None, self.eps)
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        u: Tensor = self.scale * self.mix_proj(normed.to(x.dtype)).to(wide)
        return u

    def gates(self, u: Tensor) -> Tensor:
        """p (B, T, n) of logits, the first of which are the gates'."""
        return torch.sigmoid(u[..., : self.streams] + self.bias) + SINKHORN_EPS

    def forward(self, state: tuple[Tensor, ...]) -> Coefficients[Tensor]:
        """n streams (B, T, D) to their gates (B, T, 1), in their dtype. Nothing is written or kept."""
        return Coefficients(_columns(self.gates(self.logits(state)), state[0]), (), None)


class Mix(Gates):
    """Streams x_1 … x_n to the coefficients of a step (``schemes.streams.ManifoldHyperConnections``).

    With u = s·W·N(x) of the flattened streams, s ``norm.mix_scale``: p = σ(u + logit r), r
    ``norm.read_gate``; q = 2σ(u); c doubly stochastic of u, or with ``norm.mix_streams`` false the
    identity. From transformers' ``deepseek_v4/modeling_deepseek_v4.py``, whose three scales and whose
    biases are parameters that start as one number each; without c from its
    ``hy_v4/modeling_hy_v4.py``.
    """

    def __init__(self, config: ModelConfig, linear: Linear) -> None:
        super().__init__(config, linear, mix_shape(config.norm)[1])

    def forward(self, state: tuple[Tensor, ...]) -> Coefficients[Tensor]:
        """n streams (B, T, D) to coefficients (B, T, 1), in their dtype."""
        n, u = self.streams, self.logits(state)
        write = 2 * torch.sigmoid(u[..., n : 2 * n])
        kept = None
        if u.shape[-1] > 2 * n:
            c = doubly_stochastic(u[..., 2 * n :].unflatten(-1, (n, n)).softmax(-1))
            kept = tuple(_columns(c[..., t], state[0]) for t in range(n))
        return Coefficients(_columns(self.gates(u), state[0]), _columns(write, state[0]), kept)


def _columns(values: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    return values.to(like.dtype).split(1, -1)
