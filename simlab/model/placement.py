"""Where the norms sit: one small class per placement, one dict that names them.

Each is one residual step x → x' around a sublayer F (attention or MLP), with N a norm. The sum is
made by ``self.add``, a module without parameters to which the probe listens. To add a placement:
a class here, its entry in ``PLACEMENTS``, a file conf/norm/NAME.yaml and a test.
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn

from simlab.config import ModelConfig
from simlab.model.norms import NORMS, RMSNorm


class ResidualAdd(nn.Module):
    """skip + branch. It exists so that hooks can attach to the residual stream."""

    def forward(self, skip: Tensor, branch: Tensor) -> Tensor:
        """Two tensors of one shape to their sum."""
        return skip + branch


class Placement(nn.Module):
    """One residual step. Subclasses say which norms they have and differ in ``forward``.

    ``normalises`` is what the step's last norm acts on: the ``branch`` before it is added, the
    whole ``stream`` after, or None when the branch is added as it comes. The additive law needs it.
    """

    norms: ClassVar[tuple[str, ...]] = ()
    normalises: ClassVar[str | None] = None

    norm_in: RMSNorm
    norm_out: RMSNorm

    def __init__(self, sublayer: nn.Module, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.sublayer, self.add = sublayer, ResidualAdd()
        self.layer, self.options = layer, config.norm
        self.alpha = self.alpha_of(config)
        for name in self.norms:
            setattr(self, name, NORMS[config.norm.type](config.width, config.norm.eps))

    @staticmethod
    def alpha_of(config: ModelConfig) -> float:
        """The placement's constant ``self.alpha``: what ``forward`` knows of the model's depth."""
        return 1.0

    @staticmethod
    def init_scale(role: str, depth: int) -> float:
        """A factor on the init's std of the matrix ``role`` (``q_proj`` … ``down_proj``)."""
        return 1.0

    @staticmethod
    def renorm_after(config: ModelConfig, layer: int) -> Renorm | None:
        """A re-norm of the residual stream after this block, where the placement has one."""
        return None


class Reordered(Placement):
    """x + N(F(x)): OLMo 2 (arXiv 2501.00656, §2.1)."""

    norms, normalises = ("norm_out",), "branch"

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.add(x, self.norm_out(self.sublayer(x)))


class Renorm(nn.Module):
    """x ← N(x) on the residual stream itself."""

    normalises: ClassVar[str | None] = "stream"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_out = NORMS[config.norm.type](config.width, config.norm.eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        out: Tensor = self.norm_out(x)
        return out


class SwinRenorm(Reordered):
    """``reordered``, and x ← N(x) after every ``norm.every`` blocks (Swin V2, arXiv 2111.09883)."""

    @staticmethod
    def renorm_after(config: ModelConfig, layer: int) -> Renorm | None:
        """A re-norm after blocks every, 2·every, … (counted from 1)."""
        every = config.norm.every or 6
        return Renorm(config) if (layer + 1) % every == 0 else None


class Pre(Placement):
    """x + F(N(x))."""

    norms = ("norm_in",)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.add(x, self.sublayer(self.norm_in(x)))


class Post(Placement):
    """N(x + F(x)): arXiv 1706.03762."""

    norms, normalises = ("norm_out",), "stream"

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.norm_out(self.add(x, self.sublayer(x)))


class Peri(Placement):
    """x + N(F(N(x))): Peri-LN (arXiv 2502.02732), Gemma 2 and 3's sandwich."""

    norms, normalises = ("norm_in", "norm_out"), "branch"

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.add(x, self.norm_out(self.sublayer(self.norm_in(x))))


class LNS(Pre):
    """x + F(N(x)/√l), l the block counted from 1: LayerNorm Scaling (arXiv 2502.05795)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.add(x, self.sublayer(self.norm_in(x) / math.sqrt(self.layer + 1)))


class DeepNorm(Placement):
    """N(αx + F(x)), α = (2L)^¼, and β = (8L)^−¼ on the init (arXiv 2203.00555, decoder-only)."""

    norms, normalises = ("norm_out",), "stream"

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.norm_out(self.add(self.alpha * x, self.sublayer(x)))

    @staticmethod
    def alpha_of(config: ModelConfig) -> float:
        """α."""
        return (2 * config.depth) ** 0.25

    @staticmethod
    def init_scale(role: str, depth: int) -> float:
        """β on the value and output projections and on the MLP's matrices, 1 on q and k."""
        scaled = ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        return (8 * depth) ** -0.25 if role in scaled else 1.0


class NoNorm(Placement):
    """x + F(x)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.add(x, self.sublayer(x))


class ResidualScale(Pre):
    """λx + βF(N(x)), λ² = 1 − 2/sublayers, λ² + β² = 1: DeepScaleLM (arXiv 2403.09635)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        branch = self.sublayer(self.norm_in(x))
        return self.add(math.sqrt(1 - self.alpha) * x, math.sqrt(self.alpha) * branch)

    @staticmethod
    def alpha_of(config: ModelConfig) -> float:
        """β²: 2/sublayers, and a block has two."""
        return 1 / config.depth


class LayerScale(Pre):
    """x + αF(N(x)), α small and smaller for deep models (arXiv 2103.17239, §2)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.add(x, self.alpha * self.sublayer(self.norm_in(x)))

    @staticmethod
    def alpha_of(config: ModelConfig) -> float:
        """α: as given, else by depth."""
        if config.norm.alpha is not None:
            return config.norm.alpha
        return 0.1 if config.depth <= 18 else 1e-5 if config.depth <= 24 else 1e-6


class ReZero(LayerScale):
    """x + αF(N(x)), α = 0 at init: the identity (arXiv 2003.04887)."""

    @staticmethod
    def alpha_of(config: ModelConfig) -> float:
        """α: as given, else 0."""
        return config.norm.alpha or 0.0


PLACEMENTS: dict[str, type[Placement]] = {
    "reordered": Reordered,
    "swin_renorm": SwinRenorm,
    "pre": Pre,
    "post": Post,
    "peri": Peri,
    "lns": LNS,
    "deepnorm": DeepNorm,
    "none": NoNorm,
    "residual_scale": ResidualScale,
    "rezero": ReZero,
    "layerscale": LayerScale,
}
