"""What every source of weights offers, and how a block is filled from one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from simlab.config import ModelConfig
from simlab.model.transformer import Block, Transformer

Shape = Sequence[int]


class Weights(Protocol):
    """Parameters by name, one at a time; asking twice gives the same numbers."""

    def tensor(self, name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The whole parameter ``name``, which must have this shape."""
        ...

    def rows(
        self, name: str, shape: Shape, ids: Tensor, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Rows ``ids`` (any shape) of the matrix ``name``: (*ids.shape, columns)."""
        ...


def fill(
    module: nn.Module, weights: Weights, prefix: str, device: torch.device, dtype: torch.dtype
) -> None:
    """Give every parameter of a module built on ``meta`` its numbers.

    No uninitialised memory ever exists: parameters go straight from no storage to their values.
    """
    values = {
        name: weights.tensor(prefix + name, tuple(parameter.shape), device, dtype)
        for name, parameter in module.state_dict().items()
    }
    module.load_state_dict(values, strict=True, assign=True)


def materialise_block(
    model: ModelConfig, layer: int, weights: Weights, device: torch.device, dtype: torch.dtype
) -> Block:
    """One block with its weights on the device, ready to run."""
    with torch.device("meta"):
        block = Block(model, layer)
    fill(block, weights, f"blocks.{layer}.", device, dtype)
    return block.eval()


def materialise_model(
    model: ModelConfig, weights: Weights, device: torch.device, dtype: torch.dtype
) -> Transformer:
    """The whole model with its weights on the device."""
    with torch.device("meta"):
        transformer = Transformer(model)
    fill(transformer, weights, "", device, dtype)
    if model.tied:
        transformer.head.weight = transformer.embedding.weight
    return transformer.eval()
