"""The curve of any PyTorch decoder, from hooks on its blocks: what ``simlab.probe`` measures with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from simlab.config import ConfigError
from simlab.measurement.batch_checks import (
    Batch,
    Stream,
    arguments,
    evaluated,
    named_arguments,
    refuse_cache,
    refuse_padding,
)
from simlab.measurement.block_probe import BlockProbe, Probe, Reducer, VectorReducers
from simlab.measurement.engine import Measured, rows_of
from simlab.measurement.gradient_taps import GradientTaps, backward_through, loss_of
from simlab.measurement.layout import Layout, Sublayer, blocks_at, inside, no_blocks, stacks
from simlab.measurement.layout_probe import LayoutProbe
from simlab.measurement.layout_search import first_argument, first_output
from simlab.measurement.statistics import (
    GRADIENT_STATISTICS,
    STATISTICS,
    Step,
    sequences,
    wide,
)
from simlab.model.transformer import Block

# In the rows' ``attrs``, where a curve was cut: its first sublayer that isn't finite. pandas keeps it
# in the rows of several seeds that end at the same sublayer.
NOT_FINITE_FROM = "not_finite_from"
LAYOUT = "layout"  # likewise: where the residual stream is, in words


class ModelProbe:
    """A context manager that measures forward calls of a model.

    The blocks' hooks exist only during a forward call of the model, so a block that gradient
    checkpointing runs again in the backward is not counted twice.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout | None = None,
        curve: str = "model",
        seed: int = 0,
        gradients: bool = False,
        whole: Collection[int] = (),
    ) -> None:
        """whole: Of which blocks only the output is measured: another curve's ``whole_blocks``."""
        if not isinstance(model, nn.Module):
            raise ConfigError(f"probe: model is a {type(model).__name__}: must be an nn.Module")
        if not isinstance(layout, (Layout, type(None))):
            raise ConfigError(
                f"probe: layout is a {type(layout).__name__}: must be a simlab.Layout, or left out"
            )
        self.model, self.curve, self.seed = model, curve, seed
        self.stacks = block_probes(model, layout, whole)
        # The decoder's: the only one, or else the one that the first call passes through.
        self.path = next(iter(self.stacks)) if len(self.stacks) == 1 else None
        self.left: tuple[int, Tensor] | None = None  # of the last block: its place and its output
        self.embedding, self.vectors = Reducer(STATISTICS), VectorReducers()
        self.size: tuple[int, int] | None = None  # T, D
        self.stream_count = 1  # n, each of whose sequences is measured as one of its own
        self.dtype = self.device = ""  # of the stream
        self.on_block: Callable[[], None] = lambda: None  # called after each block's forward
        self.given, self.stream = layout is not None, Stream({}, False)
        self.outer, self.inner = ExitStack(), ExitStack()  # hooks of the with block, of a call
        self.taps = GradientTaps() if gradients else None
        self.embedding_gradient = Reducer(GRADIENT_STATISTICS)
        self.loss: Tensor | None = None
        for probes in self.stacks.values():
            for each in probes:
                each.taps = self.taps

    def measure(self, batch: Batch) -> ModelProbe:
        """Pass a batch through the model in eval mode, and with gradients its loss back. Itself."""
        args, kwargs = arguments(batch)
        back = self.taps is not None
        recording = torch.inference_mode(False) if back else nullcontext()
        with evaluated(self.model), recording, torch.set_grad_enabled(back), self:
            out = self.model(*args, **kwargs)
            if self.taps is not None and self.size is not None:
                self.loss = loss_of(out, self.stream.ids, self.size[1])
                backward_through(self.loss, self.taps, self.embedding.tokens)
                self.loss = self.loss.detach()
        return self

    def __enter__(self) -> ModelProbe:
        begin = self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        end = self.model.register_forward_hook(self._end, always_call=True)
        self.outer.callback(begin.remove)
        self.outer.callback(end.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self.inner.close()
        self.outer.close()
        if self.taps:
            self.taps.end_call()
            self.taps.start = None

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = named_arguments(model, args, kwargs)
        refuse_padding(inputs)
        refuse_cache(inputs)
        self.stream = Stream(inputs, self.given)
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it is slow to import
            self.inner.enter_context(torch.compiler.set_stance("force_eager"))
        self.left = None
        self.inner.enter_context(self.stream.watch(model))
        for path in [self.path] if self.path else self.stacks:
            for i, probe in enumerate(self.stacks[path]):
                begins, ends = partial(self._begins, path, i), partial(self._ends, i)
                begun = probe.block.register_forward_pre_hook(begins, with_kwargs=True)
                self.inner.callback(begun.remove)
                self.inner.enter_context(probe)
                self.inner.callback(probe.block.register_forward_hook(ends).remove)

    def _end(self, model: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self.left = None
        self.inner.close()
        if self.taps:
            self.taps.end_call()

    def _ends(self, i: int, block: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self.on_block()
        if i + 1 < len(self.probes):
            self.left = i, first_output(own_stream(block, out)).detach().clone()

    def _begins(
        self, path: str, i: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = first_argument(args, kwargs)
        if isinstance(block, Block) and isinstance(x, tuple):  # simlab's own, which carries a state
            state, x = x, own_stream(block, x)
            if self.taps:
                raise ConfigError(
                    "probe: gradients=True: the model carries several vectors from block to block:"
                    " measure it by its config, with gradients=true"
                )
            if i == 0:
                self.vectors.add(state, Step(after=x))
        if self.path not in (None, path):
            raise ConfigError(
                f"probe: {type(self.model).__name__} has blocks at {self.path}, {path}: probe one of"
                " the models it is made of, or pass a layout"
            )
        self.path = path
        refuse_padding(named_arguments(inside(block), args, kwargs))
        if i == 0:
            self._embedded(x)
            if self.taps and torch.is_grad_enabled():
                if not x.requires_grad:  # frozen parameters made it
                    x, given = x.detach().requires_grad_().clone(), x
                    args = tuple(x if each is given else each for each in args)
                    kwargs = {name: x if each is given else each for name, each in kwargs.items()}
                value = wide(sequences(x, self.stream.axis))
                self.taps.follow(self.taps.tap(x), value, self.embedding_gradient)
            return args, kwargs
        before, out = self.left or (None, x)
        if before != i - 1:
            raise ConfigError(
                f"probe: {path}.{i} isn't called right after block {i - 1}: a stream passes each block"
                " once, in their order"
            )
        if not passed_on(out, x):
            raise ConfigError(
                f"probe: {path}.{i} doesn't get what block {i - 1} gives: the model changes the stream"
                " between its blocks"
            )
        return args, kwargs

    def _embedded(self, x: Any) -> None:
        if not isinstance(x, Tensor) or x.ndim not in (3, 4):
            got = (
                f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            )
            raise ConfigError(
                f"probe: the first block gets {got}: must be a tensor (batch, length, width), or of 4"
                " dimensions with several streams"
            )
        if not x.numel():
            raise ConfigError(f"probe: a batch of shape {tuple(x.shape)}: holds no token")
        self.stream.begin(x)
        axis = self.stream.axis
        streams, (length, width) = (
            1 if axis is None else x.shape[axis],
            sequences(x, axis).shape[1:],
        )
        if self.size not in (None, (length, width)):
            raise ConfigError(
                f"probe: a batch of length {length} after one of {self.size[0]}: batches of a curve"
                " have sequences of one length"
            )
        if self.size and streams != self.stream_count:
            raise ConfigError(
                f"probe: a batch of {streams} streams after one of {self.stream_count}: batches of a"
                " curve have as many streams"
            )
        self.size, self.stream_count = (length, width), streams
        for probe in self.probes:
            probe.axis = axis
        if self.taps:
            self.taps.axis = axis
        self.dtype, self.device = str(x.dtype).removeprefix("torch."), str(x.device)
        self.embedding.add(Step(after=wide(sequences(x, axis))))

    @property
    def probes(self) -> list[BlockProbe]:
        """The blocks' probes; of a model with several lists of blocks, empty before the first call."""
        return self.stacks[self.path] if self.path else []

    @property
    def layout(self) -> str:
        """Where the residual stream is, in one line: the blocks' steps, by the names of submodules."""
        blocks: dict[str, list[int]] = {}
        for i, probe in enumerate(self.probes):
            steps = probe.sublayers if isinstance(probe, LayoutProbe) else ()
            how = ", ".join(map(str, steps or ())) or ", ".join(probe.kinds)
            if self.stream_count > 1:
                how += f" over {self.stream_count} streams, as if they were sequences"
            blocks.setdefault(how, []).append(i)
        return "; ".join(f"{self.path} {spans(of)}: {how}" for how, of in blocks.items())

    def measured(self) -> Measured:
        """The curve, as ``measure_curves`` gives it.

        Raises ConfigError where no forward call was seen, or one that didn't pass every step.
        """
        if self.size is None:
            raise ConfigError(
                f"probe: no forward call of {type(self.model).__name__} was seen: call the model"
                " itself within the with block, or give a batch"
            )
        tokens = self.embedding.tokens
        for i, probe in enumerate(self.probes):
            steps = zip(probe.kinds, probe.reducers, strict=True)
            for kind, reducer in steps if probe.kinds else [("the output", Reducer({}))]:
                if reducer.tokens != tokens:
                    raise ConfigError(
                        f"probe: {kind} of block {i} saw {reducer.tokens} of {tokens} tokens: a"
                        " forward call failed or went around it, or the layout isn't this model's"
                    )
        blocks = [
            [
                step._replace(values=step.values[0].cpu(), vectors=_first(step.vectors))
                for step in probe.results()
            ]
            for probe in self.probes
        ]
        embedded = _first(self.vectors.result())
        rows = rows_of(self.embedding.result()[0].cpu(), blocks, embedded)
        if self.taps is None:
            return Measured(rows, stream_count=self.stream_count)
        gradients = [self.embedding_gradient, *chain(*(probe.gradients for probe in self.probes))]
        for row, reducer in zip(rows, gradients, strict=True):
            if reducer.tokens != tokens:
                raise ConfigError(
                    f"probe: gradients=True: at sublayer {row.sublayer} the gradient of"
                    f" {reducer.tokens} of {tokens} tokens was seen: call loss.backward() once for each"
                    " forward call;"
                    " reentrant gradient checkpointing (use_reentrant=True) hides steps"
                )
        if self.taps.repeated:  # as often as another call had none
            raise ConfigError(
                "probe: gradients=True: two backwards went through one forward call: call"
                " loss.backward() once for each forward call"
            )
        values = [reducer.result()[0].cpu() for reducer in gradients]
        rows = [replace(row, gradient=g) for row, g in zip(rows, values, strict=True)]
        return Measured(rows, self.loss, self.stream_count)


def _first(values: Tensor | None) -> Tensor | None:
    """The first of several curves' numbers, on the CPU."""
    return None if values is None else values[0].cpu()


def whole_blocks(measured: Measured) -> list[int]:
    """The blocks in which no steps were found: of a curve beside this one they are measured so, too.

    A residual scale that is 1 at init is found then, and no longer when it is trained (Doge).
    """
    return [row.block for row in measured.rows if row.kind == "block" and row.block is not None]


def block_probes(
    model: nn.Module, layout: Layout | None, whole: Collection[int]
) -> dict[str, list[BlockProbe]]:
    """A probe for each block in order, by the path of every list that may be the decoder's."""
    if layout is not None:
        lists = {layout.blocks: blocks_at(model, layout.blocks)}
    elif not (lists := stacks(model)):
        raise no_blocks(model)
    for path, blocks in lists.items():
        if len(set(blocks)) < len(blocks):
            raise ConfigError(
                f"probe: {path} holds a block more than once: can't tell its calls apart"
            )
    steps = layout.sublayers if layout else None
    found: dict[Any, tuple[Sublayer, ...]] = {}
    return {
        path: [
            Probe(block)
            if layout is None and isinstance(block, Block)
            else LayoutProbe(block, f"{path}.{i}", () if i in whole else steps, found)
            for i, block in enumerate(blocks)
        ]
        for path, blocks in lists.items()
    }


def own_stream(block: nn.Module, x: Any) -> Any:
    """The stream of a state that a block of simlab's own takes or gives; else x itself."""
    return block.placement.watch(x) if isinstance(block, Block) and isinstance(x, tuple) else x


def passed_on(given: Tensor, got: Any) -> bool:
    """Whether a block got what the one before gave, to rounding where the dtype changes in between."""
    if not isinstance(got, Tensor) or got.shape != given.shape:
        return False
    if got.dtype == given.dtype:
        return bool(((got == given) | (got.isnan() & given.isnan())).all())
    rounding = max(torch.finfo(x.dtype).eps for x in (given, got))
    return not ((wide(got) - wide(given)).abs() > rounding * wide(given).abs()).any()


def spans(numbers: list[int]) -> str:
    """Rising numbers in words: ``0-2, 4``."""
    ends = [i for i in numbers if i + 1 not in numbers]
    starts = [i for i in numbers if i - 1 not in numbers]
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True))
