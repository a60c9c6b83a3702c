"""The gradient with respect to the stream after each step of a block that a layout describes."""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from simlab.measurement.layout import Sublayer
from simlab.measurement.layout_search import as_stream, first_argument, first_output


class StepTensors:
    """``with StepTensors(block, sublayers, shape) as steps: block(x)`` under autograd; then ``before``.

    The stream x + m·b after a step is a tensor that a block's own code makes, and later parts may get
    views or copies of it. Its gradient is that of the branch b divided by m, and b is what a submodule
    gives; after a norm of the stream it is that of what the norm gives. The last step's is the block's
    output.

    Args:
        block: The block. sublayers: Its steps, () where only its output is known.
        shape: Of the stream, (B, T, D).
    """

    def __init__(
        self, block: nn.Module, sublayers: tuple[Sublayer, ...], shape: torch.Size
    ) -> None:
        self.block, self.steps, self.shape = block, sublayers[:-1], shape
        self.differentiable: dict[int, Tensor] = {}
        self.streams: dict[int, Tensor] = {}
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for i, step in enumerate(self.steps):
            total = self.block.get_submodule(str(step.sum))
            if step.normalises == "stream":
                self.handles.append(total.register_forward_hook(partial(self._normed, i)))
                continue
            branch = self.block.get_submodule(step.branches[0])
            self.handles += [
                branch.register_forward_hook(partial(self._branch, i)),
                total.register_forward_pre_hook(partial(self._total, i), with_kwargs=True),
            ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _branch(self, i: int, _: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self.differentiable[i] = first_output(out)

    def _total(self, i: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.streams[i] = self._stream(first_argument(args, kwargs)).clone()

    def _normed(self, i: int, _: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self.differentiable[i] = first_output(out)
        self.streams[i] = self._stream(first_output(out)).clone()

    def _stream(self, x: Any) -> Tensor:
        stream = as_stream(x.detach(), self.shape)
        assert stream is not None  # the forward call's layout was found in the same shapes
        return stream

    def gradients(self, out: Tensor, x: Tensor, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The stream before each step of the block, with its gradient, the block's input first.

        out: what the block gives for x, and ``gradient`` with respect to it (B, T, D).
        """
        wanted = [x, *(self.differentiable[i] for i in range(len(self.steps)))]
        first, *rest = torch.autograd.grad(out, wanted, gradient)
        found = [(x.detach(), first)]
        for i, (step, g) in enumerate(zip(self.steps, rest, strict=True)):
            factor = 1.0 if step.normalises == "stream" else step.multiplier
            found.append((self.streams[i], self._stream(g) / factor))
        return found
