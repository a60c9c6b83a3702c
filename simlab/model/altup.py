"""AltUp as Gemma 3n has it: side streams, and what predicts and corrects all streams of a block.

From transformers' ``gemma3n/modeling_gemma3n.py``, with stream 0 as the active one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simlab.config import ModelConfig
from simlab.model.attention import Linear
from simlab.model.norms import squarable
from simlab.schemes.gemma3n import ALTUP_STREAMS, LEAST_SQUARE


class SideMap(nn.Module):
    """s·W·y, s such that it has the rms of another vector x."""

    def __init__(self, config: ModelConfig, linear: Linear) -> None:
        super().__init__()
        self.side_proj = linear(config.width, config.width, False)

    def forward(self, y_BTD: Tensor, x_BTD: Tensor) -> Tensor:
        """Two tensors (B, T, D) to (B, T, D). A W·y of mean square below LEAST_SQUARE stays smaller."""
        out: Tensor = self.side_proj(y_BTD).float()
        size = out.square().mean(-1, keepdim=True).clamp(min=LEAST_SQUARE).sqrt()
        rms = x_BTD.float().square().mean(-1, keepdim=True).sqrt()
        return (out * rms / size).to(x_BTD.dtype)


class Sides(nn.Module):
    """Of n streams, n − 1 vectors: stream k ≥ 1 by a matrix of its own, with the rms of stream 0."""

    def __init__(self, config: ModelConfig, linear: Linear) -> None:
        super().__init__()
        for k in range(1, ALTUP_STREAMS):  # a list of modules would look like the model's blocks
            setattr(self, f"side_{k}", SideMap(config, linear))

    def forward(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """n streams (B, T, D) to n − 1 tensors (B, T, D)."""
        active, *others = state
        return tuple(getattr(self, f"side_{k}")(y, active) for k, y in enumerate(others, start=1))


class ModeRouter(nn.Module):
    """x to coefficients A·tanh(W·N(x)/d) of each token. outputs: how many."""

    def __init__(self, config: ModelConfig, linear: Linear, outputs: int) -> None:
        super().__init__()
        self.eps = config.norm.eps
        self.mode_proj = linear(config.width, ALTUP_STREAMS, False)
        self.coef_proj = linear(ALTUP_STREAMS, outputs, False)

    def coefficients(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (B, T, D) to ``outputs`` tensors (B, T, 1). tanh as in ``Gates.logits``."""
        normed = nn.functional.rms_norm(squarable(x.float()), x.shape[-1:], None, self.eps)
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        u: Tensor = self.mode_proj(normed.to(x.dtype)).to(wide) / x.shape[-1]
        out: Tensor = self.coef_proj(u.tanh().to(x.dtype))
        return out.split(1, -1)


class Predict(ModeRouter):
    """Streams to their predictions x_j + Σ_i a_ji·x_i, a of the active stream."""

    def __init__(self, config: ModelConfig, linear: Linear) -> None:
        super().__init__(config, linear, ALTUP_STREAMS**2)

    def forward(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """n streams (B, T, D) to n."""
        a = self.coefficients(state[0])
        out = []
        for j, x in enumerate(state):
            row = a[ALTUP_STREAMS * j : ALTUP_STREAMS * (j + 1)]
            out.append(x + sum(share * y for share, y in zip(row, state, strict=True)))
        return tuple(out)


class Correct(ModeRouter):
    """The active stream after a block to c, by which corrections differ from 1."""

    def __init__(self, config: ModelConfig, linear: Linear) -> None:
        super().__init__(config, linear, ALTUP_STREAMS)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, T, D) to n tensors (B, T, 1)."""
        return self.coefficients(x)
