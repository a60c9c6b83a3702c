"""The SwiGLU MLP."""

from __future__ import annotations

from torch import Tensor, nn

from simlab.config import ModelConfig
from simlab.model.attention import Linear


class FeedForward(nn.Module):
    """down(silu(gate(x)) · up(x)), without biases (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, linear: Linear) -> None:
        super().__init__()
        self.gate_proj = linear(config.width, config.d_ff)
        self.up_proj = linear(config.width, config.d_ff)
        self.down_proj = linear(config.d_ff, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        out: Tensor = self.down_proj(
            nn.functional.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD)
        )
        return out
