"""A streamed decoder's curve with gradients: forward block by block, then back, one held at a time.

The decoder's own forward call runs without autograd in its blocks; what a block got is kept, and the
stream before it. After the last block autograd records: the final norm, then the head, some columns at
a time. Backward each block is called again with what it got, from the last to the first.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from simlab.checkpoints.families.skeleton import Skeleton, Source
from simlab.checkpoints.families.sources import rows_at_once
from simlab.config import ConfigError
from simlab.measurement.block_probe import BlockProbe, Reducer
from simlab.measurement.engine import Measured, gradient_step, near_one
from simlab.measurement.layout_gradient import StepTensors
from simlab.measurement.layout_probe import LayoutProbe
from simlab.measurement.layout_search import first_argument, first_output
from simlab.measurement.loss import summed_loss
from simlab.measurement.model_probe import ModelProbe, passed_on
from simlab.measurement.statistics import GRADIENT_STATISTICS, sequences, wide


class Calls:
    """``with Calls(skeleton) as calls:`` a forward call of the decoder under autograd, to be gone back.

    streams: what each block got, and at the end what the last one gave, for autograd a leaf. Raises
    ConfigError in a forward call where another argument of a block depends on the stream: the gradient
    would go by it, too.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.paths = skeleton.blocks()
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.streams: list[Tensor] = []
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        handles = [table.register_forward_hook(_mark) for table in self.skeleton.tables.values()]
        for path in self.paths:
            block = self.skeleton.units[path]
            before = partial(self._before, path)
            handles += [
                block.register_forward_pre_hook(before, with_kwargs=True),
                block.register_forward_hook(self._after),
            ]
        for handle in handles:
            self.stack.callback(handle.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def _before(
        self, path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        x = first_argument(args, kwargs)
        if any(one.requires_grad and one is not x for one in _tensors([args, kwargs])):
            raise ConfigError(
                f"{self.skeleton.where}: gradients=true: {path} gets, beside the stream, more that "
                "is computed from the embedding; simlab goes back along the stream alone"
            )
        self.arguments.append((args, kwargs))
        if isinstance(x, Tensor):
            self.streams.append(x.detach())
        torch.set_grad_enabled(False)  # until the block's end

    def _after(self, _: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        torch.set_grad_enabled(True)
        last = first_output(out).requires_grad_()
        if len(self.arguments) == len(self.paths):
            self.streams.append(last)

    def again(self, i: int, x: Tensor) -> Tensor:
        """The output of block i for the stream x (B, T, D), other arguments as in its first call."""
        args, kwargs = self.arguments[i]
        if args:
            args = (x, *args[1:])
        else:
            name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            kwargs = kwargs | {name: x}
        out: Tensor = first_output(self.skeleton.units[self.paths[i]](*args, **kwargs))
        return out


def _mark(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    return out.requires_grad_()  # what is computed from it shows


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def with_gradients(
    skeleton: Skeleton,
    source: Source,
    batches: Sequence[Tensor],
    on_unit: Callable[[str], None],
    whole: Collection[int],
) -> Measured:
    """A curve with its loss and gradients. batches: token ids (B, T) of whole sequences.

    whole: as of ``ModelProbe``.

    Each batch passes forward and back before the next one does. The loss is the mean over the tokens
    of all that have a predecessor. Raises ConfigError, also for a head that can't be read by rows.
    """
    rows, width = skeleton.model.get_submodule(skeleton.head).weight.shape
    predicted = sum(ids[:, 1:].numel() for ids in batches)
    total = torch.zeros((), device=skeleton.device)
    reducers: defaultdict[tuple[int, int], Reducer] = defaultdict(_reducer)
    with skeleton.filled(source, on_unit) as decoder:
        result = ModelProbe(decoder, whole=whole)
        for ids in batches:
            with torch.enable_grad(), Calls(skeleton) as calls, result:
                out = decoder(input_ids=ids, use_cache=False)
            last: Tensor = out[0]

            def logits(x: Tensor, start: int, stop: int, out: Any = out) -> Tensor:
                return skeleton.logits(source, _with_last(out, x), start, stop)

            loss, top = summed_loss(logits, last.detach()[:, :-1], ids, rows, rows_at_once(width))
            total += loss
            top, power = near_one(nn.functional.pad(top, (0, 0, 0, 1))[None], last.dtype)
            scale = wide(power) * predicted
            for place, *found in _back(calls, result.probes, last, top[0]):
                x, gradient = (sequences(each, result.stream.axis) for each in found)
                reducers[place].add(gradient_step(x, gradient, scale))
    measured = result.measured()
    values = [reducers[place].result()[0].cpu() for place in sorted(reducers)]
    rows = [replace(row, gradient=g) for row, g in zip(measured.rows, values, strict=True)]
    return replace(measured, rows=rows, loss=total / predicted)


def _back(
    calls: Calls, probes: list[BlockProbe], last: Tensor, gradient: Tensor
) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
    """From the decoder's last stream down: a block and a step, the stream before it, its gradient.

    last: what the decoder gives, a function of ``calls.streams[-1]`` for autograd; gradient: with
    respect to it. The number of blocks, and step 0, stand for the end.
    """
    x = calls.streams.pop()
    (gradient,) = torch.autograd.grad(last, x, gradient)
    yield (len(probes), 0), x, gradient
    for i, of_block in reversed(list(enumerate(probes))):
        sublayers = of_block.sublayers if isinstance(of_block, LayoutProbe) else None
        given, x = x, calls.streams.pop().requires_grad_()
        with torch.enable_grad(), StepTensors(of_block.block, sublayers or (), x.shape) as steps:
            out = calls.again(i, x)
        if not passed_on(given, out):
            raise ConfigError(
                f"{calls.skeleton.where}: gradients=true: {calls.paths[i]}, called again with what it "
                "got, gives other numbers: the model keeps something between its calls"
            )
        found = steps.gradients(out, x, gradient)
        gradient = found[0][1]
        for step, (stream, at) in reversed(list(enumerate(found))):
            yield (i, step), stream, at


def _with_last(out: Any, x: Tensor) -> Any:
    """A decoder's output with another last stream."""
    if isinstance(out, tuple):
        return (x, *out[1:])
    changed = copy.copy(out)
    changed.last_hidden_state = x
    return changed


def _reducer() -> Reducer:
    return Reducer(GRADIENT_STATISTICS)
