"""The MLPs: one small class each, one dict that names them (config key ``model.mlp``).

CONTRIBUTING.md says how to add one. Cost, memory and the weightless engine read its matrices off it
(``simlab.model.describe``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
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


class SquaredReLU(PlainGELU):
    """down(relu(up(x))²): Primer (arXiv 2109.08668), Nemotron, nanochat."""

    activate = staticmethod(lambda x: nn.functional.relu(x).square())


class Experts(nn.Module):
    """Σ p_e·MLP_e(x) over the experts e with the k largest of p = softmax(router(x)).

    As in OLMoE (arXiv 2409.02060, §2) and, with ``renormalise_experts``, in Mixtral (2401.04088, §2.1),
    which divides these p_e by their sum. The gradient goes through p; the choice of experts has none.
    N: tokens, K: experts of a token, E: all experts.
    """

    def __init__(self, config: ModelConfig, linear: Linear) -> None:
        super().__init__()
        assert config.experts is not None
        assert config.experts_per_token is not None
        self.chosen, self.renormalise = config.experts_per_token, config.renormalise_experts
        self.router = linear(config.width, config.experts, False)
        make = MLPS[config.mlp]
        self.experts = nn.ModuleList(make(config, linear) for _ in range(config.experts))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        p_NK, expert_NK = self.route(self.router(x_BTD).flatten(0, 1))
        x_ND = x_BTD.flatten(0, 1)
        out_ND = torch.zeros_like(x_ND)
        for number, expert in enumerate(self.experts):
            token, place = (expert_NK == number).nonzero(as_tuple=True)
            if len(token):  # an expert that no token reaches isn't multiplied, nor read from a file
                branch = p_NK[token, place, None] * expert(x_ND[token])
                out_ND.index_add_(0, token, branch.to(out_ND.dtype))
        return out_ND.view_as(x_BTD)

    def route(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        """p of each token's experts, in float32, and the experts' numbers: (N, K) both."""
        p_NK, expert_NK = logits_NE.float().softmax(-1).topk(self.chosen)
        if self.renormalise:
            p_NK = p_NK / p_NK.sum(-1, keepdim=True)
        return p_NK, expert_NK


MLPS: dict[str, Callable[[ModelConfig, Linear], nn.Module]] = {
    "swiglu": SwiGLU,
    "geglu": GeGLU,
    "gelu": PlainGELU,
    "gelu_exact": ExactGELU,
    "relu2": SquaredReLU,
}


def feed_forward(config: ModelConfig, linear: Linear) -> nn.Module:
    """A block's MLP, or its experts."""
    return (Experts if config.experts else MLPS[config.mlp])(config, linear)
