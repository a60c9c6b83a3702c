"""The norms. Arithmetic is in float32 whatever the dtype; gains multiply before casting back."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

LARGE = 2.0**30


def squarable(x: Tensor) -> Tensor:
    """x (…, D), float32, each vector with an entry beyond ±LARGE divided by a power of two.

    A norm gives the same of both, to the bit where the squares fitted: eps is nothing beside them.
    From |x| = 1.8e19 on float32 can't hold the squares, and a norm of x itself gives 0; from 1e13 on it
    can't hold 1/rms³, and RMSNorm's gradient lacks a term (at rms 2e15 its error is 12 %).
    """
    if x.device.type == "cpu":  # elsewhere the host would wait for the device
        low, high = torch.aminmax(x.detach())
        if low >= -LARGE and high <= LARGE:
            return x
    most = x.detach().abs().amax(-1, keepdim=True)
    return x * torch.where(most > LARGE, torch.exp2((LARGE / most).log2().floor()), 1.0)


class RMSNorm(nn.Module):
    """y = g · x / √(mean(x²) + eps), over the last dimension (arXiv 1910.07467).

    The root holds eps, so y's mean square is m / (m + eps) for g = 1, with m = ``moment(x)``.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    @property
    def gain(self) -> Tensor:
        """g (dim,), in float32."""
        return self.weight.float()

    def forward(self, x: Tensor) -> Tensor:
        """Any shape (…, dim) to the same shape and dtype."""
        x32 = squarable(x.float())
        y = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.gain * y).to(x.dtype)

    @staticmethod
    def moment(x: Tensor) -> Tensor:
        """The square of the norm's divisor, without eps: (…, dim) to (…)."""
        return torch.linalg.vector_norm(x, dim=-1).square() / x.shape[-1]


class PlusOneRMSNorm(RMSNorm):
    """RMSNorm with g = 1 + w, w the parameter: Gemma (arXiv 2403.08295)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps)
        self.weight = nn.Parameter(torch.zeros(dim))

    @property
    def gain(self) -> Tensor:
        """g (dim,), in float32."""
        return 1 + self.weight.float()


class LayerNorm(RMSNorm):
    """y = g · (x − mean(x)) / √(var(x) + eps), without a bias (arXiv 1607.06450)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape (…, dim) to the same shape and dtype."""
        weight = self.gain
        y = nn.functional.layer_norm(
            squarable(x.float()), weight.shape, weight, self._shift(), self.eps
        )
        return y.to(x.dtype)

    def _shift(self) -> Tensor | None:
        return None

    @staticmethod
    def moment(x: Tensor) -> Tensor:
        """The variance over the last dimension: (…, dim) to (…)."""
        return x.var(-1, correction=0)


class BiasedLayerNorm(LayerNorm):
    """LayerNorm + b, the bias b a parameter: GPT-2, GPT-NeoX."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps)
        self.bias = nn.Parameter(torch.zeros(dim))

    def _shift(self) -> Tensor:
        return self.bias.float()


class DynamicTanh(RMSNorm):
    """y = g · tanh(αx) + b, entry by entry, in a norm's place: DyT (arXiv 2503.10622).

    α is one number, a parameter. As jiachenzhu/DyT has it, and zlab-princeton/Derf (language model);
    there is no eps.
    """

    squash: ClassVar[Callable[[Tensor], Tensor]] = torch.tanh

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps)
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.bias = nn.Parameter(torch.zeros(dim))

    def inner(self, x: Tensor) -> Tensor:
        """αx, in float32."""
        return self.alpha.float() * x.float()

    def forward(self, x: Tensor) -> Tensor:
        """Any shape (…, dim) to the same shape and dtype."""
        return (self.gain * type(self).squash(self.inner(x)) + self.bias.float()).to(x.dtype)


class DynamicErf(DynamicTanh):
    """y = g · erf(αx + s) + b, s one number: Derf (zlab-princeton/Derf, language model)."""

    squash = torch.erf

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps)
        self.shift = nn.Parameter(torch.zeros(1))

    def inner(self, x: Tensor) -> Tensor:
        """αx + s, in float32."""
        return super().inner(x) + self.shift.float()


NORMS: dict[str, Callable[[int, float], RMSNorm]] = {
    "rms": RMSNorm,
    "rms_plus_one": PlusOneRMSNorm,
    "layer": LayerNorm,
    "layer_bias": BiasedLayerNorm,
    "dyt": DynamicTanh,
    "derf": DynamicErf,
}
