"""The interface of every source of weights, and blocks, heads and whole models made from one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simlab.config import ModelConfig
from simlab.model.placement import end_parts
from simlab.model.transformer import Block, Transformer, dense_linear, scaled

Shape = Sequence[int]
COLUMNS_AT_ONCE = 4096  # of the head: bounds what is held of it, and of the logits


@dataclass(frozen=True)
class Columns:
    """Some of the logits of S curves' N tokens, as ``coordinates @ c`` for every c of ``chunks()``.

    coordinates: (S, N, r), a function of the head's input that autograd knows. c: (S, r, columns),
    the same every time. tap: receives the Gram matrix of the logits' gradient (see weights.weightless).
    """

    coordinates: Tensor
    chunks: Callable[[], Iterator[Tensor]]
    tap: Tensor | None = None


class TokenRows(nn.Module):
    """An embedding of which the rows of a batch's tokens are made, and nothing else."""

    def __init__(self, rows: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) to (S·B, T, columns), a curve's sequences together."""
        return self.rows(ids)


class Weights(ABC):
    """Parameters by name, one at a time; asking twice gives the same numbers."""

    model: ModelConfig
    curves: int = 1  # S: models whose curves are measured together, their sequences one batch
    tokens_at_once: int = 2048  # whole sequences are grouped up to this: bounds the activations

    @abstractmethod
    def tensor(self, name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The whole parameter ``name``, which must have this shape."""

    @abstractmethod
    def rows(
        self, name: str, shape: Shape, ids: Tensor, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Rows ``ids`` (any shape) of the matrix ``name``: (*ids.shape, columns)."""

    def embedded(self, ids: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The stream before the first block for ids (B, T) in every curve, where the embedding is
        scaled and learned positions are added: (S·B, T, D), a curve's sequences together.
        """
        positions = self.model.positions
        x = scaled(self.vectors(ids, device, dtype), self.model.embedding_scale)
        if positions is None:
            return x
        places = torch.arange(ids.shape[-1])
        shape = (positions, self.model.width)
        return x + self.rows("position.weight", shape, places, device, dtype)

    def vectors(self, ids: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The embedding's rows of ids, in one curve: (*ids.shape, D)."""
        shape = (self.model.vocab_size, self.model.width)
        return self.rows("embedding.weight", shape, ids, device, dtype)

    def value_rows(
        self, name: str, ids: Tensor, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Rows of a layer's value embedding for ids (B, T), in every curve: (S·B, T, K·C)."""
        shape = (self.model.vocab_size, self.model.kv_heads * self.model.head_dim)
        return self.rows(name, shape, ids, device, dtype)

    def linear(self, d_in: int, d_out: int, bias: bool) -> nn.Module:
        """A linear layer of a block, by default ``nn.Linear``."""
        return dense_linear(d_in, d_out, bias)

    def block(self, layer: int, device: torch.device, dtype: torch.dtype) -> Block:
        """One block with its weights on the device, in eval mode; no weight requires a gradient."""
        with torch.device("meta"):
            block = Block(self.model, layer, self.linear)
        if self.model.embeds_values(layer):
            name = f"blocks.{layer}.attention.sublayer.value_embedding.weight"
            block.attention.sublayer.value_embedding = TokenRows(
                lambda ids: self.value_rows(name, ids, device, dtype)
            )
        fill_parameters(block, self, f"blocks.{layer}.", device, dtype)
        return block.eval().requires_grad_(False)

    def end_parts(self, end: str, device: torch.device, dtype: torch.dtype) -> nn.ModuleDict:
        """The parts of the placement's ``start`` or ``finish``, with their weights, like a block."""
        with torch.device("meta"):
            parts = end_parts(end, self.model, self.linear)
        fill_parameters(parts, self, f"{end}_parts.", device, dtype)
        return parts.eval().requires_grad_(False)

    def head(self, x: Tensor, ids: Tensor) -> tuple[list[Columns], Tensor]:
        """The head's logits for x, in parts of columns, and the columns of the next tokens.

        x (S, B·(T − 1), D): the final norm's output at every position but a sequence's last.
        ids: (B, T). The parts' columns together are the vocabulary, in any order.
        """
        shape, dtype = (self.model.vocab_size, self.model.width), x.dtype

        def chunks() -> Iterator[Tensor]:
            for rows in torch.arange(shape[0]).split(COLUMNS_AT_ONCE):
                yield self.rows("head.weight", shape, rows, x.device, dtype).T[None]

        return [Columns(x, chunks)], ids[:, 1:].flatten()


def fill_parameters(
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


def materialise_model(
    model: ModelConfig, weights: Weights, device: torch.device, dtype: torch.dtype
) -> Transformer:
    """The whole model with its weights on the device."""
    with torch.device("meta"):
        transformer = Transformer(model)
    fill_parameters(transformer, weights, "", device, dtype)
    if model.tied:
        transformer.head.weight = transformer.embedding.weight
    for layer in range(model.distinct, model.depth):
        of = transformer.blocks[layer % model.distinct]
        for name, parameter in of.named_parameters():
            owner, _, last = name.rpartition(".")
            setattr(transformer.blocks[layer].get_submodule(owner), last, parameter)
    return transformer.eval()
