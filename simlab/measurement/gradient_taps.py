"""Gradients of a loss with respect to the stream, from hooks on the tensors of a forward call.

The gradient with respect to the stream after a step is the one that autograd gives at the tensor that
is the stream there. Whether it is the whole stream is checked in autograd's graph: no later step may
reach an earlier one around it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from simlab.config import ConfigError
from simlab.measurement.block_probe import Reducer
from simlab.measurement.engine import gradient_step
from simlab.measurement.statistics import sequences


class Tap:
    """Waits for the gradient with respect to a tensor; ``measure`` says where it goes.

    edge: the tensor's place in autograd's graph, None where it has no gradient.
    """

    def __init__(self, x: Tensor, taps: GradientTaps) -> None:
        self.dtype, self.taps = x.dtype, taps
        self.value: Tensor | None = None
        self.reducer: Reducer | None = None
        self.received = False
        self.edge: GradientEdge | None = None
        if x.requires_grad:
            self.edge = get_gradient_edge(x)
            x.register_hook(self.receive)

    def measure(self, value: Tensor, reducer: Reducer) -> None:
        """The tensor is the stream after a step, with this value (B, T, D)."""
        self.value, self.reducer = value.detach().to(self.dtype, copy=True), reducer

    @torch.no_grad()
    def receive(self, gradient: Tensor) -> None:
        """Autograd gives the gradient."""
        self.taps.repeated |= self.received
        self.received = True
        if self.value is not None and self.reducer is not None:
            scale = torch.full((1, 1, 1, 1), self.taps.scale, device=gradient.device)
            gradient = sequences(gradient, self.taps.axis).reshape(self.value.shape)
            self.reducer.add(gradient_step(self.value, gradient, scale))


class GradientTaps:
    """The taps of a model's forward calls, in the order of its steps.

    scale: the number by which the loss is multiplied before its backward. start: the place of the
    embedding in autograd's graph, from a forward call's begin until ``clear``. repeated: whether two
    backwards went through one forward call. axis: along which several streams lie.
    """

    def __init__(self) -> None:
        self.scale = 1.0
        self.repeated = False
        self.axis: int | None = None
        self.start: GradientEdge | None = None
        self.all: list[Tap] = []  # of this call
        self.followed: list[Tap] = []  # of this call: the last three

    def tap(self, x: Tensor) -> Tap:
        """A tap of a tensor that may turn out to be the stream."""
        tap = Tap(x, self)
        self.all.append(tap)
        return tap

    def follow(self, tap: Tap, value: Tensor, reducer: Reducer) -> None:
        """A tap's tensor is the stream after the next step. Raises ConfigError if it isn't whole."""
        tap.measure(value, reducer)
        if not self.followed:
            self.start = tap.edge
        self.followed = [*self.followed[-2:], tap]
        edges = [each.edge for each in self.followed if each.edge]
        if len(edges) == 3 and bypassed(*edges):
            raise ConfigError(
                "probe: gradients=True: a step goes around the tensor that is taken for the stream, so"
                " the gradient there is a part of the stream's: pass a layout, or leave out gradients"
            )

    def end_call(self) -> None:
        """Let go of the graph, whose hooks hold the taps: Python can't collect such a circle."""
        for tap in self.all:
            tap.edge = None
        self.all, self.followed = [], []


def bypassed(before: GradientEdge, at: GradientEdge, after: GradientEdge) -> bool:
    """Whether ``after`` was computed from ``before`` in some other way than through ``at``."""
    todo, seen = [after.node], {after.node}
    while todo:
        for node, number in todo.pop().next_functions:
            if node is None or (node is at.node and number == at.output_nr):
                continue
            if node is before.node and number == before.output_nr:
                return True
            if node not in seen:
                seen.add(node)
                todo.append(node)
    return False


def backward_through(loss: Tensor, taps: GradientTaps, tokens: int) -> None:
    """Give the taps their gradients; no parameter gets one. Raises ConfigError.

    The loss is multiplied by about its number of tokens, a power of two: float16 would lose the small
    gradients of a mean.
    """
    if taps.start is None or not loss.requires_grad:
        raise ConfigError(
            "probe: gradients=True: autograd sees no way from the model's loss to its stream; reentrant"
            " gradient checkpointing (use_reentrant=True) hides it"
        )
    taps.scale = 2.0 ** round(math.log2(tokens))
    scale = torch.full_like(loss, taps.scale)
    torch.autograd.grad(loss, taps.start, scale, allow_unused=True)


def loss_of(out: Any, ids: Tensor | None, width: int) -> Tensor:
    """The loss of a forward call, a scalar: the model's own, else that of the next tokens.

    out: what the model gave: its ``loss``, or the one scalar of a tuple; else logits (B, T, vocabulary)
    of ids (B, T), whose cross entropy is the mean over the B·(T − 1) tokens that have a predecessor.
    width: of the stream, which aren't logits. Raises ConfigError that says what is missing.
    """
    loss = _named(out, "loss")
    if loss is None and isinstance(out, tuple):
        scalars = [x for x in out if isinstance(x, Tensor) and x.ndim == 0]
        loss = scalars[0] if len(scalars) == 1 else None
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ConfigError(
                f"probe: gradients=True: the model's loss has shape {tuple(loss.shape)}: must be one"
                " number"
            )
        return loss.reshape(())
    logits = _named(out, "logits")
    if logits is None:
        parts = out if isinstance(out, tuple) else (out,)
        logits = next((x for x in parts if isinstance(x, Tensor) and x.shape[-1] != width), None)
    own = "call loss.backward() in a with block for a loss of your own"
    if ids is None:
        raise ConfigError(
            "probe: gradients=True: the model gives no loss, and the batch has no token ids to predict:"
            f" put labels into the batch, or {own}"
        )
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        raise ConfigError(
            "probe: gradients=True: the model gives neither a loss nor logits (batch, length,"
            f" vocabulary): put labels into the batch, or {own}"
        )
    if (most := int(ids.max())) >= logits.shape[-1]:
        raise ConfigError(
            f"probe: gradients=True: {logits.shape[-1]} logits per token for a token id {most}: these"
            f" don't predict tokens: {own}"
        )
    if ids.shape[1] < 2:
        raise ConfigError("probe: gradients=True: a sequence of one token has none to predict")
    last, targets = logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten().to(logits.device)
    return torch.nn.functional.cross_entropy(last, targets)


def _named(out: Any, name: str) -> Any:
    return out.get(name) if isinstance(out, Mapping) else getattr(out, name, None)
