"""Listens to a block's residual adds and reduces every step to its statistics, on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.utils.hooks import RemovableHandle

from simlab.measurement.statistics import (
    GRADIENT_STATISTICS,
    REDUCE,
    STATISTICS,
    VECTOR_STATISTICS,
    Statistic,
    Step,
    attention_statistics,
    wide,
)
from simlab.model.attention import Attend, Attention
from simlab.model.norms import RMSNorm
from simlab.model.placement import Carried, Renorm, ResidualStep
from simlab.model.transformer import Block

if TYPE_CHECKING:
    from simlab.measurement.gradient_taps import GradientTaps, Tap


class Reducer:
    """Statistics of one step of S curves over the token batches that pass through it.

    A batch (S·B, T, …) has B sequences of each curve, and a curve's lie together.
    """

    def __init__(self, statistics: Mapping[str, Statistic], curves: int = 1) -> None:
        self.curves = curves
        self.alike: dict[str, list[tuple[int, Statistic]]] = {}  # what is reduced alike, at once
        for i, statistic in enumerate(statistics.values()):
            self.alike.setdefault(statistic.reduce, []).append((i, statistic))
        self.values: dict[str, list[Tensor]] = {reduce: [] for reduce in self.alike}
        self.tokens = 0

    @torch.no_grad()
    def add(self, step: Step) -> None:
        """Add one batch: compute every statistic per token and keep the numbers on the device."""
        for reduce, statistics in self.alike.items():
            values = [s.of(step).unflatten(0, (self.curves, -1)) for _, s in statistics]
            if reduce == "vector":
                values = [value.sum((1, 2)) for value in values]
            self.values[reduce].append(torch.stack([value.to(step.wide) for value in values]))
        self.tokens += step.after.shape[:2].numel() // self.curves

    def result(self) -> Tensor:
        """One number per curve and statistic, (S, entries), in the statistics' order, on the device."""
        reduced = []
        for reduce, values in self.values.items():
            if reduce == "vector":
                reduced.append(vector_norm(torch.stack(values).sum(0) / self.tokens, dim=-1))
            else:
                reduced.append(REDUCE[reduce](torch.cat(values, 2)))
        order = [i for statistics in self.alike.values() for i, _ in statistics]
        by_place = dict(zip(order, torch.cat(reduced).unbind(), strict=True))
        return torch.stack([by_place[i] for i in range(len(order))], -1)


class VectorReducers:
    """The statistics of each vector of a state after one step, of S curves."""

    def __init__(self, curves: int = 1) -> None:
        self.curves = curves
        self.reducers: list[Reducer] = []

    def add(self, state: Carried, stream: Step) -> None:
        """Add one batch. stream: the step with the stream that is reported. One vector adds nothing."""
        if not isinstance(state, tuple):
            return
        while len(self.reducers) < len(state):
            self.reducers.append(Reducer(VECTOR_STATISTICS, self.curves))
        for reducer, y in zip(self.reducers, state, strict=True):
            y = stream.wide if y is stream.after else y
            reducer.add(Step(after=y, skip=stream.wide, branch=y))

    def result(self) -> Tensor | None:
        """Numbers per curve, vector and statistic (S, n, entries); None where there was one vector."""
        found = [reducer.result() for reducer in self.reducers]
        return torch.stack(found, 1) if found else None


class StepResult(NamedTuple):
    """A step's kind, its statistics (S, entries), and the facts about its last norm that laws use.

    normalises: ``branch``, ``stream`` or None, as in ``Scheme``. gain: the norm's gain at init.
    vectors: of a state of n vectors, VECTOR_STATISTICS of each (S, n, entries).
    """

    kind: str
    values: Tensor
    normalises: str | None
    gain: float
    vectors: Tensor | None = None


class BlockProbe(ABC):
    """Measures a block's residual steps with hooks that exist only inside its ``with`` block.

    Args:
        block: The block whose forward calls are measured.
        kinds: The steps' kinds, in the order in which they happen.
        normalises: For each step, ``branch``, ``stream`` or None: the input of its last norm.
        gain: The gain at init of the sublayers' norms.
        curves: S, the number of curves in a batch (S·B, T, D); a curve's sequences are adjacent.
    """

    def __init__(
        self,
        block: nn.Module,
        kinds: Sequence[str],
        normalises: Sequence[str | None],
        gain: float,
        curves: int = 1,
    ) -> None:
        self.block, self.gain, self.curves = block, gain, curves
        self.taps: GradientTaps | None = None  # where gradients are measured
        self.axis: int | None = None  # along which several streams lie
        self.set_steps(kinds, normalises)
        self.handles: list[RemovableHandle] = []

    def set_steps(self, kinds: Sequence[str], normalises: Sequence[str | None]) -> None:
        """Say which steps the block has."""
        self.kinds, self.normalises = kinds, normalises
        self.gains = [1.0 if kind == "renorm" else self.gain for kind in kinds]
        self.reducers = [Reducer(STATISTICS, self.curves) for _ in kinds]
        self.vectors = [VectorReducers(self.curves) for _ in kinds]
        self.gradients = [Reducer(GRADIENT_STATISTICS, self.curves) for _ in kinds]

    def tap(self, x: Tensor) -> Tap | None:
        """A tap of a tensor that may be the stream, if gradients are measured."""
        return self.taps.tap(x) if self.taps else None

    def add(self, i: int, step: Step, tap: Tap | None) -> None:
        """Add step i. tap: of the stream after it."""
        self.reducers[i].add(step)
        if self.taps and tap:
            self.taps.follow(tap, step.after, self.gradients[i])

    def __enter__(self) -> Self:
        self.listen()
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @abstractmethod
    def listen(self) -> None:
        """Register hooks that add every step to its reducer; append their handles to ``handles``."""

    def results(self) -> list[StepResult]:
        """Every step of the block, in the order they happened."""
        values = [reducer.result() for reducer in self.reducers]
        vectors = [reducers.result() for reducers in self.vectors]
        steps = zip(self.kinds, values, self.normalises, self.gains, vectors, strict=True)
        return [StepResult(*step) for step in steps]


class Probe(BlockProbe):
    """``with Probe(block) as probe: block(x)``; then ``probe.results()``. Changes no output."""

    def __init__(self, block: Block, curves: int = 1) -> None:
        kinds, self.steps = zip(*block.steps(), strict=True)
        normalises = [step.normalises for step in self.steps]
        super().__init__(block, kinds, normalises, block.attention.options.gain, curves)
        self.watch = block.placement.watch
        self.tensors: dict[str, Tensor] = {}
        self.last: tuple[Tensor, Tensor] | None = None  # the stream after a step, and wide
        self.attention: dict[str, Tensor] | None = None

    def listen(self) -> None:
        """Hooks on sublayers, adds, attention and the steps themselves."""
        for i, step in enumerate(self.steps):
            self._listen(i, step)

    def _listen(self, i: int, step: ResidualStep | Renorm) -> None:
        def on_sublayer(_: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            self.tensors |= {"read": args[0], "raw": out}

        def on_attend(attend: Attend, args: tuple[Tensor, ...], out: Tensor) -> None:
            q, k, _, mask = args
            self.attention = attention_statistics(q, k, mask, attend.divisor, attend.softcap)

        def on_add(_: nn.Module, args: tuple[Tensor, Tensor], out: Tensor) -> None:
            skip, branch = args
            alone = skip is self.tensors["read"]  # the module reads what it writes to
            if self.last is not None and skip is self.last[0]:
                skip = self.last[1]
            if alone:
                self.tensors["read"] = skip
            self.tensors |= {"skip": skip, "branch": branch, "sum": out}

        def on_step(module: nn.Module, args: Any, out: Carried) -> None:
            after: Tensor = self.watch(out)
            observed = observe(step, args[0], after, self.tensors, self.attention)
            self.add(i, observed, self.tap(after))
            self.vectors[i].add(out, observed)
            self.last = None if step is self.steps[-1] else (after, observed.wide)
            self.tensors, self.attention = {}, None

        if isinstance(step, ResidualStep):
            self.handles.append(step.sublayer.register_forward_hook(on_sublayer))
            self.handles.append(step.add.register_forward_hook(on_add))
            if isinstance(step.sublayer, Attention):
                self.handles.append(step.sublayer.attend.register_forward_hook(on_attend))
        self.handles.append(step.register_forward_hook(on_step))


def observe(
    step: ResidualStep | Renorm,
    before: Tensor,
    after: Tensor,
    tensors: dict[str, Tensor],
    attention: dict[str, Tensor] | None = None,
) -> Step:
    """A residual step's tensors. ``eps_factor`` is about the norm that acts last.

    Where a placement norms neither branch nor stream (pre, lns, none …) it is the factor that a
    norm of the branch would have: the additive law is then a claim that the measurement can refute.
    """
    if isinstance(step, Renorm):
        norm = step.norm_out
        moment = norm.moment(wide(before))
        return Step(after=after, moment=moment, eps=norm.eps, gain=wide(norm.gain))
    raw, total = wide(tensors["raw"]), tensors["sum"]
    if step.normalises not in ("branch", "stream"):
        moment, eps = RMSNorm.moment(raw), step.options.eps
    else:
        norm = step.norm_out
        moment = norm.moment(wide(total) if step.normalises == "stream" else raw)
        eps = norm.eps
    norms = list(step.norms.values())
    return Step(
        after=after,
        skip=tensors["skip"],
        branch=tensors["branch"],
        raw=raw,
        read=tensors["read"],
        moment=moment,
        eps=eps,
        gain=wide(norms[-1].gain) if norms else None,
        attention=attention,
    )
