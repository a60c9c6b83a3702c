"""A block's matrices and activations, read off a block without weights that runs on one token.

Cost, memory, the weightless engine and checkpoints ask here which matrices there are. So a new MLP or
another attention is written once, in ``simlab.model``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from simlab.config import ModelConfig
from simlab.model.placement import end_parts, finished, start
from simlab.model.transformer import Block

LARGEST = 1 << 20  # a dimension above which one token's activations aren't made


class _Zeros(torch.autograd.Function):
    """(…, d_in) to zeros (…, d_out), and back. Like a product with a weight, it keeps nothing of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d_out: int) -> Tensor:
        ctx.d_in = x.shape[-1]
        return x.new_zeros(*x.shape[:-1], d_out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (g,) = gradients
        return g.new_zeros(*g.shape[:-1], ctx.d_in), None


class PaperLinear(nn.Module):
    """A linear layer whose parameters have a shape and no storage; its output is zeros."""

    def __init__(self, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in, device="meta"), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(d_out, device="meta"), False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) to (…, d_out)."""
        out: Tensor = _Zeros.apply(x, len(self.weight))
        return out


@dataclass(frozen=True)
class Matrix:
    """A matrix of a block. name: of its layer, in the block. Those of a ``group`` share their input.

    share: of the tokens that it meets, on average over experts.
    """

    name: str
    d_in: int
    d_out: int
    group: int
    share: float = 1.0


@dataclass(frozen=True)
class Description:
    """A block's matrices, in the order in which they are used."""

    matrices: tuple[Matrix, ...]

    @property
    def widest(self) -> int:
        """The largest dimension that a matrix takes or gives."""
        return max(max(matrix.d_in, matrix.d_out) for matrix in self.matrices)

    @property
    def entries(self) -> int:
        """The number of entries of all matrices together."""
        return sum(matrix.d_in * matrix.d_out for matrix in self.matrices)

    @property
    def groups(self) -> list[tuple[int, list[int]]]:
        """d_in, and the d_outs, of the matrices that share an input, in the order of their use."""
        inputs_outputs: dict[int, tuple[int, list[int]]] = {}
        for matrix in self.matrices:
            inputs_outputs.setdefault(matrix.group, (matrix.d_in, []))[1].append(matrix.d_out)
        return list(inputs_outputs.values())

    @property
    def shares(self) -> list[float]:
        """The share of the tokens that each of ``groups`` meets."""
        return list({matrix.group: matrix.share for matrix in self.matrices}.values())


def describe(model: ModelConfig) -> Description:
    """A block's matrices, the same in every layer."""
    return _describe(first_block(model))


def describe_end(model: ModelConfig, end: str) -> Description:
    """The matrices of a placement's ``start`` or ``finish``, which most have none of."""
    return _describe_end(first_block(model), end)


def shapes(model: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """The shape of every parameter of a block, by name. Nothing is run, so any size may be claimed."""
    return _shapes(first_block(model))


def first_block(model: ModelConfig) -> ModelConfig:
    """A model's first block, without keys that don't change its shapes: a description's cache key."""
    return replace(
        model, name="", depth=1, vocab_size=1, positions=None, window=None, full_attention=(),
        embedding_scale=1.0, logit_softcap=None,
    )  # fmt: skip


def paper_block(model: ModelConfig, dtype: torch.dtype) -> tuple[Block, Tensor]:
    """A first block that can run without weights, and its stream of one token, (1, 1, d_model).

    On the CPU, where that takes a few milliseconds; on ``meta``, for which torch first imports its
    compiler (0.8 s), only where a token's activations are too large to be made.
    """
    largest = max(max(shape) for shape in shapes(model).values())
    device = "cpu" if largest <= LARGEST else "meta"
    with torch.device(device):
        block = Block(model, 0, PaperLinear).to(dtype).requires_grad_(False)
        return block, torch.zeros(1, 1, model.width, dtype=dtype)


@functools.lru_cache(1024)
def _shapes(model: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    with torch.device("meta"):
        block = Block(model, 0, PaperLinear)
    return {name: tuple(value.shape) for name, value in block.named_parameters()}


@functools.lru_cache(1024)
def _describe(model: ModelConfig) -> Description:
    # The one token passes through every expert.
    block, x = paper_block(replace(model, experts_per_token=model.experts), torch.float32)
    state = start(x, model, end_parts("start", model, PaperLinear))
    ids = torch.zeros(x.shape[:2], dtype=torch.int64)
    return _used(block, lambda: block(state, ids), model.expert_share)


@functools.lru_cache(1024)
def _describe_end(model: ModelConfig, end: str) -> Description:
    with torch.device("cpu" if model.width <= LARGEST else "meta"):
        parts, others = end_parts(end, model, PaperLinear), end_parts("start", model, PaperLinear)
        if not parts:
            return Description(())
        x = torch.zeros(1, 1, model.width)
        if end == "start":
            return _used(parts, lambda: start(x, model, parts))
        state = start(x, model, others)
        return _used(parts, lambda: finished(state, model, parts))


def _used(module: nn.Module, run: Callable[[], Any], expert_share: float = 1.0) -> Description:
    """The matrices that a module uses in a run of one token, in that order."""
    inputs: list[Tensor] = []  # different ones; kept, so that none takes another's place
    matrices: list[Matrix] = []

    def used(name: str, layer: PaperLinear, x: Tensor) -> None:
        if not inputs or inputs[-1] is not x:
            inputs.append(x)
        d_out, d_in = layer.weight.shape
        share = expert_share if ".experts." in name else 1.0
        matrices.append(Matrix(name, d_in, d_out, len(inputs), share))

    for name, part in module.named_modules():
        if isinstance(part, PaperLinear):
            part.register_forward_pre_hook(
                lambda layer, args, name=name: used(name, layer, args[0])
            )
    with torch.no_grad():
        run()
    return Description(tuple(matrices))
