"""Listens to a block's residual adds and reduces every step to its statistics, on the device."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.utils.hooks import RemovableHandle

from simlab.model.attention import Attention
from simlab.model.norms import RMSNorm
from simlab.model.placement import Placement, Renorm
from simlab.model.transformer import Block
from simlab.statistics import REDUCE, STATISTICS, Statistic, Step, attention_statistics


def wide(x: Tensor) -> Tensor:
    """float64: squares of any float32 fit, and sums keep their digits. MPS has float32 only."""
    return x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64)


class Reducer:
    """Statistics of one step of S curves over the token batches that pass through it.

    A batch (S·B, T, …) has B sequences of each curve, and a curve's lie together.
    """

    def __init__(self, statistics: Mapping[str, Statistic], curves: int = 1) -> None:
        self.statistics, self.curves = list(statistics.values()), curves
        self.values: list[list[Tensor]] = [[] for _ in self.statistics]
        self.tokens = 0

    def add(self, step: Step) -> None:
        """Take in one batch's step: numbers of each statistic per token, on its device."""
        for statistic, values in zip(self.statistics, self.values, strict=True):
            value = statistic.of(step).unflatten(0, (self.curves, -1))
            values.append(value.sum((1, 2)) if statistic.reduce == "vector" else value)
        self.tokens += step.after.shape[:2].numel() // self.curves

    def result(self) -> Tensor:
        """A curve's number per statistic, in their order, on the device: (S, len(statistics))."""
        found: dict[int, Tensor] = {}
        alike: dict[str, list[int]] = {}  # what is reduced alike is reduced at once
        for i, statistic in enumerate(self.statistics):
            alike.setdefault(statistic.reduce, []).append(i)
        for reduce, which in alike.items():
            kind = self.values[0][0].dtype
            each = [torch.cat(self.values[i], 1).to(kind) for i in which if reduce != "vector"]
            for i in which if reduce == "vector" else ():
                found[i] = vector_norm(torch.stack(self.values[i]).sum(0) / self.tokens, dim=-1)
            if each:
                found |= dict(zip(which, REDUCE[reduce](torch.stack(each)), strict=True))
        return torch.stack([found[i] for i in range(len(self.statistics))], -1)


class Probe:
    """``with Probe(block) as probe: block(x)``; then ``probe.results()``. Changes no output.

    curves: S, whose sequences lie one curve's after another's in x (S·B, T, D).
    """

    def __init__(self, block: Block, curves: int = 1) -> None:
        self.steps = list(block.steps())
        self.reducers = [Reducer(STATISTICS, curves) for _ in self.steps]
        self.handles: list[RemovableHandle] = []
        self.seen: dict[str, Tensor] = {}
        self.attention: dict[str, Tensor] | None = None

    def __enter__(self) -> Probe:
        for (_, step), reducer in zip(self.steps, self.reducers, strict=True):
            self._listen(step, reducer)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _listen(self, step: Placement | Renorm, reducer: Reducer) -> None:
        def on_sublayer(_: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            self.seen["raw"] = out

        def on_attend(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            self.attention = attention_statistics(args[0], args[1], args[3])

        def on_add(_: nn.Module, args: tuple[Tensor, Tensor], out: Tensor) -> None:
            self.seen |= {"skip": args[0], "branch": args[1], "sum": out}

        def on_step(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            reducer.add(observe(step, args[0], out, self.seen, self.attention))
            self.seen, self.attention = {}, None

        if isinstance(step, Placement):
            self.handles.append(step.sublayer.register_forward_hook(on_sublayer))
            self.handles.append(step.add.register_forward_hook(on_add))
            if isinstance(step.sublayer, Attention):
                self.handles.append(step.sublayer.attend.register_forward_hook(on_attend))
        self.handles.append(step.register_forward_hook(on_step))

    def results(self) -> list[tuple[str, Tensor]]:
        """Kind and statistics (S, entries) of every step of the block, in the order they happened."""
        kinds = (kind for kind, _ in self.steps)
        return [(kind, r.result()) for kind, r in zip(kinds, self.reducers, strict=True)]


def observe(
    step: Placement | Renorm,
    before: Tensor,
    after: Tensor,
    seen: dict[str, Tensor],
    attention: dict[str, Tensor] | None = None,
) -> Step:
    """A residual step's tensors, widened. ``eps_factor`` is about the norm that acts last.

    Where a placement norms neither branch nor stream (pre, lns, none …) it is the factor that a
    norm of the branch would have: the additive law is then a claim that the measurement can refute.
    """
    if isinstance(step, Renorm):
        norm = step.norm_out
        moment = norm.moment(wide(before))
        return Step(after=wide(after), moment=moment, eps=norm.eps, gain=wide(norm.weight))
    raw, total = wide(seen["raw"]), seen["sum"]
    if step.normalises is None:
        moment, eps = RMSNorm.moment(raw), step.options.eps
    else:
        norm = step.norm_out
        moment = norm.moment(wide(total) if step.normalises == "stream" else raw)
        eps = norm.eps
    norms = [getattr(step, name) for name in step.norms]
    return Step(
        after=wide(after),
        skip=wide(seen["skip"]),
        branch=wide(seen["branch"]),
        raw=raw,
        moment=moment,
        eps=eps,
        gain=wide(norms[-1].weight) if norms else None,
        attention=attention,
    )
