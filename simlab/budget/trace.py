"""How much memory a block's activations take, and how many numbers it writes, read off a run of it.

The block is run on a few tokens, with zeros for what its matrices would give, and a dispatch mode
sees every operation. What that takes is in proportion to the tokens; what the engines' products and the
statistics take besides is ``memory``'s to add. A new shape takes a few milliseconds.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simlab.config import ModelConfig
from simlab.model.attention import Attend
from simlab.model.describe import PaperLinear, first_block, paper_block
from simlab.model.placement import ResidualStep
from simlab.model.transformer import Block

TOKENS = (
    8  # the more, the less of a token's share is what doesn't depend on them: a gain in float32
)


class Live(TorchDispatchMode):
    """Counts, in its ``with`` block, the bytes of the tensors that were made in it and still live.

    now: their sum; peak: the largest it was. written: the entries of all tensors that were made. A view
    of a tensor isn't made, and what is written in place isn't counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.written = 0
        self.sizes: dict[int, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing here is compiled, and skipping it would import the compiler, for 0.8 s."""
        return False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and id(tensor.untyped_storage()) not in given:
                self._made(tensor)
        return out

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        self.written += tensor.numel()
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@dataclass(frozen=True)
class Trace:
    """Of a block, per token: bytes beside the block's input, and numbers that operations write.

    forward: the most at a time. matrices: what lives when each gets its input, in the order of their
    use. attention: when it has its output. step: when a residual step ends, with what a probe holds.
    backward: the most at a time with gradients: what autograd keeps, then the backward; 0 where there
    are none. written: by the forward, beside the matrices' products.
    """

    forward: float
    matrices: tuple[float, ...]
    attention: float
    step: float
    backward: float
    written: float


def trace(model: ModelConfig, dtype: str, gradients: bool) -> Trace:
    """A block's, the same in every layer."""
    return _trace(first_block(model), getattr(torch, dtype), gradients)


@functools.lru_cache(1024)
def _trace(model: ModelConfig, dtype: torch.dtype, gradients: bool) -> Trace:
    block, one = paper_block(model, dtype)
    x = one.repeat(TOKENS, 1, 1)  # sequences of one token: none is longer than a window
    backward = _backward(block, x.clone()) if gradients else 0
    moments: dict[str, list[int]] = {"matrix": [], "attention": [], "step": []}
    held: list[Any] = []  # as the probe holds a step's tensors until its end
    with torch.no_grad(), Live() as live:

        def note(kind: str) -> Callable[..., None]:
            return lambda *args: moments[kind].append(live.now)

        def hold(module: nn.Module, args: Any, out: Tensor) -> None:
            held.append((args, out))

        for module in block.modules():
            if isinstance(module, PaperLinear):
                module.register_forward_pre_hook(note("matrix"))
            elif isinstance(module, Attend):
                module.register_forward_hook(note("attention"))
            elif isinstance(module, ResidualStep):
                module.sublayer.register_forward_hook(hold)
                module.add.register_forward_hook(hold)
        for _, step in block.steps():
            x = step(x)
            note("step")()
            held.clear()
    products = sum(m.weight.shape[0] for m in block.modules() if isinstance(m, PaperLinear))
    return Trace(
        forward=live.peak / TOKENS,
        matrices=tuple(size / TOKENS for size in moments["matrix"]),
        attention=max(moments["attention"], default=0) / TOKENS,
        step=max(moments["step"]) / TOKENS,
        backward=backward / TOKENS,
        written=live.written / TOKENS - products,
    )


@torch.enable_grad()
def _backward(block: Block, x: Tensor) -> int:
    """The most bytes at a time while the gradient goes through a block, as the engine takes it."""
    passed, gradient = [x.requires_grad_()], torch.zeros_like(x)
    with Live() as live:
        for _, step in block.steps():
            passed.append(step(passed[-1]))
        torch.autograd.grad(passed[-1], passed[:-1], gradient)
    return live.peak
