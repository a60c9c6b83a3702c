"""Moves the token batch through the blocks, one block's weights at a time, and back again.

A block's weights are made, every batch of sequences passes through the block, and the weights are
freed: memory holds one block and the residual stream, whatever the depth. With gradients the engine
keeps the stream before every block, then makes and runs the blocks again from the last to the first.
Statistics stay on the device until the run ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simlab.config import ConfigError
from simlab.measurement.block_probe import Probe, Reducer, StepResult
from simlab.measurement.loss import next_token
from simlab.measurement.statistics import GRADIENT_STATISTICS, STATISTICS, Step, wide
from simlab.model.transformer import Block
from simlab.weights.base import Weights


@dataclass(frozen=True)
class Row:
    """One row of a curve: the step it describes, and its statistics.

    values: one number per STATISTICS entry. gradient: one per GRADIENT_STATISTICS entry; None for a
    run without gradients. Both have shape (S, entries) while S curves are measured together, and
    (entries,) in the rows that ``measure_curves`` returns. normalises, gain: of the step's last norm,
    as in ``StepResult``.
    """

    sublayer: int
    block: int | None
    kind: str
    values: Tensor
    normalises: str | None = None
    gain: float = 1.0
    gradient: Tensor | None = None

    def of(self, curve: int) -> Row:
        """The row of curve number ``curve`` (0 … S − 1)."""
        gradient = None if self.gradient is None else self.gradient[curve]
        return replace(self, values=self.values[curve], gradient=gradient)


@dataclass(frozen=True)
class Measured:
    """One curve: its rows, and with gradients the loss (a scalar, nats per predicted token)."""

    rows: list[Row]
    loss: Tensor | None = None

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


def rows_of(embedding: Tensor, blocks: list[list[StepResult]]) -> list[Row]:
    """The rows of a curve, from the embedding's statistics and every block's steps."""
    rows, sublayer = [Row(0, None, "embedding", embedding)], 0
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

    rows, streams = forward(weights, ids, device, dtype, gradients, passed)
    if not gradients:
        return [Measured([row.of(i) for row in rows]) for i in range(weights.curves)]
    losses, values = backward(weights, ids, streams, passed)
    rows = [replace(row, gradient=value) for row, value in zip(rows, values, strict=True)]
    return [Measured([row.of(i) for row in rows], loss) for i, loss in enumerate(losses)]


@torch.no_grad()
def forward(
    weights: Weights,
    ids: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    keep: bool,
    on_block: Callable[[], None],
) -> tuple[list[Row], list[list[Tensor]]]:
    """The rows, and the streams in batches of sequences: before every block if ``keep``, and last."""
    model, curves = weights.model, weights.curves
    embedded = weights.embedded(ids, device, dtype)
    streams = list(embedded.split(weights.tokens_at_once // ids.shape[-1] or 1))
    del embedded
    embedding = Reducer(STATISTICS, curves)
    for stream in streams:
        embedding.add(Step(after=stream))
    blocks: list[list[StepResult]] = []
    before: list[list[Tensor]] = []
    for layer in range(model.depth):
        if keep:
            before.append(list(streams))
        block = weights.block(layer, device, dtype)
        with Probe(block, curves) as probe:
            for i, stream in enumerate(streams):
                streams[i] = block(stream)
        blocks.append(probe.results())
        del block, probe  # before the next one is made: one block's weights at a time
        on_block()
    return rows_of(embedding.result(), blocks), [*before, streams]


def backward(
    weights: Weights, ids: Tensor, streams: list[list[Tensor]], on_block: Callable[[], None]
) -> tuple[Tensor, list[Tensor]]:
    """The losses (S,), and the gradient's statistics for every row, embedding first.

    streams: as ``forward`` returns them; the list is emptied. The gradient of the summed loss is
    multiplied by a power of two that brings its largest entry near 1, since float16 would lose small
    entries; ``scale`` takes that out again.
    """
    last, curves = streams.pop(), weights.curves
    loss, top = next_token(weights, torch.cat(last), ids)
    scaled, power = near_one(top.unflatten(0, (curves, -1)), top.dtype)
    scaled, scale = scaled.flatten(0, 1), wide(power) * ids[:, 1:].numel()
    gradients = list(scaled.split([len(stream) for stream in last]))
    reducer = Reducer(GRADIENT_STATISTICS, curves)
    for stream, gradient in zip(last, gradients, strict=True):
        reducer.add(gradient_step(stream, gradient, scale))
    values = [reducer.result()]
    for layer in reversed(range(weights.model.depth)):
        before = streams.pop()
        reducers = _back_through(
            weights.block(layer, top.device, top.dtype), before, gradients, scale
        )
        values += [reducer.result() for reducer in reversed(reducers)]
        on_block()
    return loss, values[::-1]


def near_one(gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each curve's gradient (S, B, T, D) times the power of two (S, 1, 1, 1) that brings its largest
    entry near 1, in a dtype; and that power.
    """
    power = torch.exp2(-gradient.abs().amax((1, 2, 3), keepdim=True).float().log2().round())
    power = torch.where(power.isfinite(), power, 1.0)
    return (gradient.float() * power).to(dtype), power


@torch.enable_grad()
def _back_through(
    block: Block, streams: list[Tensor], gradients: list[Tensor], scale: Tensor
) -> list[Reducer]:
    """Run a block again and replace ``gradients`` by those before the block; a reducer per step.

    The block and the tensors that autograd saved are freed when this call returns.
    """
    reducers = [Reducer(GRADIENT_STATISTICS, len(scale)) for _ in block.steps()]
    for i, stream in enumerate(streams):
        passed = [stream.requires_grad_()]
        for _, step in block.steps():
            passed.append(step(passed[-1], passed[0]))
        *before, out = passed
        gradients_before = torch.autograd.grad(out, before, gradients[i])
        gradients[i] = gradients_before[0]
        for reducer, x, gradient in zip(reducers, before, gradients_before, strict=True):
            reducer.add(gradient_step(x, gradient, scale))
    return reducers


def gradient_step(x: Tensor, gradient: Tensor, scale: Tensor) -> Step:
    """A stream and the gradient with respect to it, times its curve's ``scale`` (S, 1, 1, 1)."""
    g = (wide(gradient).unflatten(0, (len(scale), -1)) / scale).flatten(0, 1)
    return Step(after=g, skip=x, branch=g)
