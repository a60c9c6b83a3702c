"""The two norms. Arithmetic is in float32 whatever the dtype; gains multiply before casting back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = g · x / √(mean(x²) + eps), over the last dimension (arXiv 1910.07467).

    The root holds eps, so y's mean square is m / (m + eps) for g = 1, with m = ``moment(x)``.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape (…, dim) to the same shape and dtype."""
        x32 = x.float()
        y = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * y).to(x.dtype)

    @staticmethod
    def moment(x: Tensor) -> Tensor:
        """The square of the norm's divisor, without eps: (…, dim) to (…)."""
        return torch.linalg.vector_norm(x, dim=-1).square() / x.shape[-1]


class LayerNorm(RMSNorm):
    """y = g · (x − mean(x)) / √(var(x) + eps), without a bias (arXiv 1607.06450)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape (…, dim) to the same shape and dtype."""
        weight = self.weight.float()
        y = nn.functional.layer_norm(x.float(), weight.shape, weight, None, self.eps)
        return y.to(x.dtype)

    @staticmethod
    def moment(x: Tensor) -> Tensor:
        """The variance over the last dimension: (…, dim) to (…)."""
        return x.var(-1, correction=0)


NORMS: dict[str, Callable[[int, float], RMSNorm]] = {"rms": RMSNorm, "layer": LayerNorm}
