"""The parts of placements: maps with parameters of their own, beside norms and the sublayer.

A scheme names its parts, and ``step``, ``start`` or ``finish`` takes each as a keyword argument. Every
matrix comes from ``linear``, used once per forward; its name is its role in the table of
``simlab/schemes/init.py``. What theory makes of a part stands in ``theory/mean_field/parts.py``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from simlab.config import ModelConfig
from simlab.model.altup import Correct, Predict, Sides
from simlab.model.attention import Linear
from simlab.model.mix import Gates, Mix


class LowRank(nn.Module):
    """right(left(x)), of rank ``norm.laurel_rank``: LAuReL-LR's BA (arXiv 2411.07501, §2.1)."""

    def __init__(self, config: ModelConfig, linear: Linear) -> None:
        super().__init__()
        assert config.norm.laurel_rank is not None
        self.left_proj = linear(config.width, config.norm.laurel_rank, False)
        self.right_proj = linear(config.norm.laurel_rank, config.width, False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        out: Tensor = self.right_proj(self.left_proj(x_BTD))
        return out


PARTS: dict[str, Callable[[ModelConfig, Linear], nn.Module]] = {
    "laurel": LowRank,
    "mix": Mix,
    "gates": Gates,
    "embed_sides": Sides,
    "unembed_sides": Sides,
    "predict": Predict,
    "correct": Correct,
}
