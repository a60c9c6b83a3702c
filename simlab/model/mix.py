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


class Mix(nn.Module):
    """Streams x_1 … x_n to the coefficients of a step (``schemes.streams.ManifoldHyperConnections``).

    With u = s·W·N(x) of the flattened streams, s ``norm.mix_scale``: p = σ(u + logit r), r
    ``norm.read_gate``; q = 2σ(u); c doubly stochastic of u, or with ``norm.mix_streams`` false the
    identity. From transformers' ``deepseek_v4/modeling_deepseek_v4.py``, whose three scales and whose
    biases are parameters that start as one number each; without c from its
    ``hy_v4/modeling_hy_v4.py``.
    """

    def __init__(self, config: ModelConfig, linear: Linear) -> None:
        super().__init__()
        norm = config.norm
        self.streams, outputs = mix_shape(norm)
        self.scale, self.eps = norm.mix_scale or 0.0, norm.eps
        self.bias = read_logit(norm)
        self.mix_proj = linear(self.streams * config.width, outputs, False)

    def forward(self, state: tuple[Tensor, ...]) -> Coefficients[Tensor]:
        """n streams (B, T, D) to coefficients (B, T, 1), in their dtype.

        They are computed in float64 where there is one: rounded again, they have the same bits whatever
        the batch, which float32's exponentials don't.
        """
        n, x = self.streams, torch.cat(state, -1)
        normed = nn.functional.rms_norm(squarable(x.float()), x.shape[-1:], None, self.eps)
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        u = self.scale * self.mix_proj(normed.to(x.dtype)).to(wide)

        def columns(values: Tensor) -> tuple[Tensor, ...]:
            return values.to(x.dtype).split(1, -1)

        read = torch.sigmoid(u[..., :n] + self.bias) + SINKHORN_EPS
        write = 2 * torch.sigmoid(u[..., n : 2 * n])
        kept = None
        if u.shape[-1] > 2 * n:
            c = doubly_stochastic(u[..., 2 * n :].unflatten(-1, (n, n)).softmax(-1))
            kept = tuple(columns(c[..., t]) for t in range(n))
        return Coefficients(columns(read), columns(write), kept)
