"""The MLPs: one small class each, one dict that names them (config key ``model.mlp``).

CONTRIBUTING.md says how to add one. Cost, memory and the weightless engine read its matrices off it
(``simlab.model.describe``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn

from simlab.config import ModelConfig
from simlab.model.attention import Linear

# 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))): the approximation of arXiv 1606.08415 (§2), which GPT-2's
# and Gemma's code compute. It differs from x·Φ(x) by at most 5e-4.
gelu_tanh = functools.partial(nn.functional.gelu, approximate="tanh")


class GatedMLP(nn.Module):
    """down(φ(gate(x)) · up(x)), arXiv 2002.05202. Subclasses say φ, as ``activate``."""

    activate: Callable[[Tensor], Tensor]

    def __init__(self, config: ModelConfig, linear: Linear) -> None:
        super().__init__()
        self.gate_proj = linear(config.width, config.d_ff, config.bias)
        self.up_proj = linear(config.width, config.d_ff, config.bias)
        self.down_proj = linear(config.d_ff, config.width, config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        out: Tensor = self.down_proj(self.activate(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return out


class SwiGLU(GatedMLP):
    """φ = SiLU: Llama, OLMo."""

    activate = staticmethod(nn.functional.silu)


class GeGLU(GatedMLP):
    """φ = GELU in its tanh approximation: Gemma (arXiv 2403.08295), T5 1.1."""

    activate = staticmethod(gelu_tanh)


class PlainGELU(nn.Module):
    """down(gelu(up(x))), GELU in its tanh approximation: GPT-2, StarCoder 2 (arXiv 2402.19173)."""

    activate: Callable[[Tensor], Tensor] = staticmethod(gelu_tanh)

    def __init__(self, config: ModelConfig, linear: Linear) -> None:
        super().__init__()
        self.up_proj = linear(config.width, config.d_ff, config.bias)
        self.down_proj = linear(config.d_ff, config.width, config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        out: Tensor = self.down_proj(self.activate(self.up_proj(x_BTD)))
        return out


class ExactGELU(PlainGELU):
    """down(gelu(up(x))), gelu(x) = x·Φ(x): GPT-NeoX, Pythia (arXiv 2304.01373)."""

    activate = staticmethod(nn.functional.gelu)


MLPS: dict[str, Callable[[ModelConfig, Linear], nn.Module]] = {
    "swiglu": SwiGLU,
    "geglu": GeGLU,
    "gelu": PlainGELU,
    "gelu_exact": ExactGELU,
}
