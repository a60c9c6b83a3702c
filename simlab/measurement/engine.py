"""Moves the token batch through the blocks, one block's weights at a time, and back again.

A block's weights are made, every batch of sequences passes through the block, and the weights are
freed: memory holds one block and the residual stream, whatever the depth. With gradients the engine
keeps the stream before every block, then makes and runs the blocks again from the last to the first.
Statistics stay on the device until the run ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from simlab.config import ConfigError, ModelConfig
from simlab.measurement.block_probe import Probe, Reducer, StepResult, VectorReducers
from simlab.measurement.loss import next_token
from simlab.measurement.statistics import GRADIENT_STATISTICS, STATISTICS, Step, wide
from simlab.model.placement import Carried, finished, start, tensors_of
from simlab.model.transformer import Block
from simlab.schemes.placement import placement_of
from simlab.schemes.scheme import Scheme
from simlab.weights.base import Weights


@dataclass(frozen=True)
class Row:
    """One row of a curve: the step it describes, and its statistics.

    values: one number per STATISTICS entry. gradient: one per GRADIENT_STATISTICS entry; None for a
    run without gradients. Both have shape (S, entries) while S curves are measured together, and
    (entries,) in the rows that ``measure_curves`` returns. normalises, gain: of the step's last norm,
    as in ``StepResult``. vectors: likewise; (n, entries) in the rows that are returned.
    """

    sublayer: int
    block: int | None
    kind: str
    values: Tensor
    normalises: str | None = None
    gain: float = 1.0
    vectors: Tensor | None = None
    gradient: Tensor | None = None

    def of(self, curve: int) -> Row:
        """The row of curve number ``curve`` (0 … S − 1)."""
        gradient = None if self.gradient is None else self.gradient[curve]
        vectors = None if self.vectors is None else self.vectors[curve]
        return replace(self, values=self.values[curve], vectors=vectors, gradient=gradient)


Gradients = tuple[Tensor, ...]  # with respect to a state's vectors


@dataclass(frozen=True)
class Measured:
    """One curve: its rows, and with gradients the loss (a scalar, nats per predicted token).

    stream_count: n, of a model with several residual streams: the rows are over all, as if each were a
    sequence.
    """

    rows: list[Row]
    loss: Tensor | None = None
    stream_count: int = 1

    @property
    def normalises(self) -> list[str | None]:
        """Each row's norm target: ``branch``, ``stream`` or None."""
        return [row.normalises for row in self.rows]

    @property
    def gain(self) -> list[float]:
        """Each row's last norm's gain at init."""
        return [row.gain for row in self.rows]

    def first(self, depth: int) -> Measured:
        """The rows of the first ``depth`` blocks, with the whole model's loss."""
        rows = [row for row in self.rows if row.block is None or row.block < depth]
        return replace(self, rows=rows)


def rows_of(
    embedding: Tensor, blocks: list[list[StepResult]], vectors: Tensor | None = None
) -> list[Row]:
    """The rows of a curve, from the embedding's statistics and every block's steps.

    vectors: of the state before the first block, as in ``StepResult``.
    """
    rows, sublayer = [Row(0, None, "embedding", embedding, vectors=vectors)], 0
    for block, steps in enumerate(blocks):
        for step in steps:
            sublayer += step.kind != "renorm"
            rows.append(Row(sublayer, block, *step))
    return rows


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda[:N]`` or ``mps`` to a device that is there.

    Raises ConfigError for a device that isn't.
    """
    if name == "auto":
        best = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device("mps" if torch.backends.mps.is_available() else best)
    here = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here = ["cpu", *(["cuda"] if here else []), *here]
    here += ["mps"] if torch.backends.mps.is_available() else []
    if name not in here:
        raise ConfigError(f"device={name}: not on this machine, which has {', '.join(here)}")
    return torch.device(name)


def measure_curves(
    weights: Weights,
    ids: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    gradients: bool = False,
    on_block: Callable[[], None] = lambda: None,
) -> list[Measured]:
    """Measure the residual stream after the embedding and after every step of every block.

    Args:
        weights: The weights of S models. Their sequences pass as one batch (S·B, T, D), in which
            the sequences of a model are adjacent.
        ids: Token ids (B, T).
        gradients: Also measure the loss's gradient with respect to the stream.
        on_block: Called once per curve and block, forward and again backward.

    Returns S curves, in the order of the weights' models.
    """

    def passed() -> None:
        for _ in range(weights.curves):
            on_block()

    rows, states = forward(weights, ids, device, dtype, gradients, passed)
    if not gradients:
        return [Measured([row.of(i) for row in rows]) for i in range(weights.curves)]
    losses, values = backward(weights, ids, states, passed)
    rows = [replace(row, gradient=value) for row, value in zip(rows, values, strict=True)]
    return [Measured([row.of(i) for row in rows], loss) for i, loss in enumerate(losses)]


def in_parts(weights: Weights, batch: Tensor) -> tuple[Tensor, ...]:
    """Token ids (B, T), or their stream (S·B, T, D), in batches of sequences that pass together."""
    return batch.split(weights.tokens_at_once // batch.shape[1] or 1)


@torch.no_grad()
def forward(
    weights: Weights,
    ids: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    keep: bool,
    on_block: Callable[[], None],
) -> tuple[list[Row], list[list[Carried]]]:
    """The rows, and the states in batches of sequences: before every block if ``keep``, and last."""
    model, curves = weights.model, weights.curves
    parts = in_parts(weights, weights.embedded(ids, device, dtype))
    made = weights.end_parts("start", device, dtype)
    states = [start(part, model, made) for part in parts]
    del parts, made
    embedding, watch = Reducer(STATISTICS, curves), placement_of(model).watch
    first = VectorReducers(curves)
    for state in states:
        embedding.add(step := Step(after=watch(state)))
        first.add(state, step)
    del state, step  # with the copies that a step keeps
    blocks: list[list[StepResult]] = []
    before: list[list[Carried]] = []
    for layer in range(model.depth):
        if keep:
            before.append(list(states))
        block = weights.block(layer, device, dtype)
        with Probe(block, curves) as probe:
            for i, (state, some) in enumerate(zip(states, in_parts(weights, ids), strict=True)):
                states[i] = block(state, some)
        blocks.append(probe.results())
        del block, probe  # before the next one is made: one block's weights at a time
        on_block()
    return rows_of(embedding.result(), blocks, first.result()), [*before, states]


def backward(
    weights: Weights, ids: Tensor, states: list[list[Carried]], on_block: Callable[[], None]
) -> tuple[Tensor, list[Tensor]]:
    """The losses (S,), and the gradient's statistics for every row, embedding first.

    states: as ``forward`` returns them; the list is emptied. The gradient of the summed loss is
    multiplied by a power of two that brings its largest entry near 1, since float16 would lose small
    entries; ``scale`` takes that out again.
    """
    loss, gradients, scale, of_last = _of_loss(weights, ids, states.pop())
    values, dtype = [of_last], tensors_of(states[-1][0])[0].dtype
    for layer in reversed(range(weights.model.depth)):
        before = states.pop()
        reducers = _back_through(
            weights.block(layer, scale.device, dtype),
            before,
            in_parts(weights, ids),
            gradients,
            scale,
            layer,
        )
        values += [reducer.result() for reducer in reversed(reducers)]
        on_block()
    return loss, values[::-1]


def _of_loss(
    weights: Weights, ids: Tensor, last: list[Carried]
) -> tuple[Tensor, list[Gradients], Tensor, Tensor]:
    """The losses (S,), the gradients with respect to the last states, their scale (S, 1, 1, 1), and the
    statistics of the last row. What else was made is freed when this call returns.
    """
    curves, model, first = weights.curves, weights.model, tensors_of(last[0])[0]
    made = weights.end_parts("finish", first.device, first.dtype)
    loss, top = next_token(
        weights, torch.cat([finished(state, model, made) for state in last]), ids
    )
    scaled, power = near_one(top.unflatten(0, (curves, -1)), top.dtype)
    scaled, scale = scaled.flatten(0, 1), wide(power) * ids[:, 1:].numel()
    parts = scaled.split([len(tensors_of(state)[0]) for state in last])
    gradients = [_through_finish(model, made, *pair) for pair in zip(last, parts, strict=True)]
    reducer = Reducer(GRADIENT_STATISTICS, curves)
    for state, gradient in zip(last, gradients, strict=True):
        reducer.add(_watched(placement_of(model), state, gradient, scale, model.depth - 1))
    return loss, gradients, scale, reducer.result()


def near_one(gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each curve's gradient (S, B, T, D) times the power of two (S, 1, 1, 1) that brings its largest
    entry near 1, in a dtype; and that power.
    """
    power = torch.exp2(-gradient.abs().amax((1, 2, 3), keepdim=True).float().log2().round())
    power = torch.where(power.isfinite(), power, 1.0)
    return (gradient.float() * power).to(dtype), power


@torch.enable_grad()
def _back_through(
    block: Block, states: list[Carried], ids: Sequence[Tensor], gradients: list[Gradients],
    scale: Tensor, layer: int,
) -> list[Reducer]:  # fmt: skip
    """Run a block again and replace ``gradients`` by those before the block; a reducer per step.

    The block and the tensors that autograd saved are freed when this call returns.
    """
    reducers = [Reducer(GRADIENT_STATISTICS, len(scale)) for _ in block.steps()]
    for i, (state, some) in enumerate(zip(states, ids, strict=True)):
        passed = [as_leaves(state)]
        for _, step in block.steps():
            passed.append(with_own_names(step(passed[-1], some)))
        *before, out = passed
        wanted = [x for each in before for x in tensors_of(each)]
        found = iter(
            torch.autograd.grad(tensors_of(out), wanted, gradients[i], materialize_grads=True)
        )
        by_step = [tuple(next(found) for _ in tensors_of(each)) for each in before]
        gradients[i] = by_step[0]
        by = layer - 1 if layer else None  # whose step made the state
        for reducer, each, gradient in zip(reducers, before, by_step, strict=True):
            reducer.add(_watched(block.placement, each, gradient, scale, by))
            by = layer
    return reducers


def as_leaves(state: Carried) -> Carried:
    """The same numbers as leaves of autograd's graph, one for each vector of the state."""
    if not isinstance(state, tuple):
        return state.requires_grad_()
    return tuple(x.detach().requires_grad_() for x in state)


def with_own_names(state: Carried) -> Carried:
    """The state, with a tensor of its own for what a step hands on: it has a gradient of its own."""
    return tuple(x.view_as(x) for x in state) if isinstance(state, tuple) else state


@torch.enable_grad()
def _through_finish(
    model: ModelConfig, made: nn.ModuleDict, state: Carried, gradient: Tensor
) -> Gradients:
    """The gradients with respect to the last state, from that with respect to what the norm gets."""
    leaves = as_leaves(state)
    out = finished(leaves, model, made)
    return torch.autograd.grad(out, tensors_of(leaves), gradient, materialize_grads=True)


def _watched(
    placement: type[Scheme], state: Carried, gradient: Gradients, scale: Tensor, layer: int | None
) -> Step:
    """The stream, and the gradient with respect to a shift of it by the write that made the state."""
    if not isinstance(state, tuple):
        return gradient_step(state, gradient[0], scale)
    return gradient_step(placement.watch(state), placement.pull(gradient, layer), scale)


def gradient_step(x: Tensor, gradient: Tensor, scale: Tensor) -> Step:
    """A stream and the gradient with respect to it, times its curve's ``scale`` (S, 1, 1, 1)."""
    g = (wide(gradient).unflatten(0, (len(scale), -1)) / scale).flatten(0, 1)
    return Step(after=g, skip=x, branch=g)
