"""Listens to a block's residual adds and reduces every step to its statistics, on the device."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from simlab.model.norms import RMSNorm
from simlab.model.placement import Placement, Renorm
from simlab.model.transformer import Block
from simlab.statistics import STATISTICS, Statistic, Step


def wide(x: Tensor) -> Tensor:
    """float64: squares of any float32 fit, and sums keep their digits. MPS has float32 only."""
    return x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64)


class Reducer:
    """Statistics of one step, summed over the token batches that pass through it."""

    def __init__(self, statistics: Mapping[str, Statistic]) -> None:
        self.tokens = 0
        self.statistics = list(statistics.values())
        self.values: list[Tensor] | None = None

    def add(self, step: Step) -> None:
        """Take in one batch's step. Nothing is copied to the host."""
        new = []
        for statistic in self.statistics:
            value = statistic.of(step)
            if statistic.reduce == "vector":
                new.append(value.sum((0, 1)))
            else:
                new.append(value.amax() if statistic.reduce == "max" else value.sum())
        self.tokens += step.after[..., 0].numel()
        if self.values is None:
            self.values = new
        else:
            triples = zip(self.statistics, self.values, new, strict=True)
            self.values = [
                torch.maximum(a, b) if s.reduce == "max" else a + b for s, a, b in triples
            ]

    def result(self) -> Tensor:
        """One number per statistic, in their order, on the device: (len(statistics),)."""
        assert self.values is not None
        finish = {
            "mean": lambda total: total / self.tokens,
            "max": lambda most: most,
            "rms": lambda total: (total / self.tokens).sqrt(),
            "vector": lambda total: (total / self.tokens).norm(),
        }
        pairs = zip(self.statistics, self.values, strict=True)
        return torch.stack([finish[s.reduce](value) for s, value in pairs])


class Probe:
    """``with Probe(block) as probe: block(x)``; then ``probe.results()``. Changes no output."""

    def __init__(self, block: Block) -> None:
        self.steps = list(block.steps())
        self.reducers = [Reducer(STATISTICS) for _ in self.steps]
        self.handles: list[RemovableHandle] = []
        self.seen: dict[str, Tensor] = {}

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

        def on_add(_: nn.Module, args: tuple[Tensor, Tensor], out: Tensor) -> None:
            self.seen |= {"skip": args[0], "branch": args[1], "sum": out}

        def on_step(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            reducer.add(observe(step, args[0], out, self.seen))
            self.seen = {}

        if isinstance(step, Placement):
            self.handles.append(step.sublayer.register_forward_hook(on_sublayer))
            self.handles.append(step.add.register_forward_hook(on_add))
        self.handles.append(step.register_forward_hook(on_step))

    def results(self) -> list[tuple[str, Tensor]]:
        """Kind and statistics of every step of the block, in the order they happened."""
        kinds = (kind for kind, _ in self.steps)
        return [(kind, r.result()) for kind, r in zip(kinds, self.reducers, strict=True)]


def observe(
    step: Placement | Renorm, before: Tensor, after: Tensor, seen: dict[str, Tensor]
) -> Step:
    """A residual step's tensors, widened. ``eps_factor`` is about the norm that acts last.

    Where a placement norms neither branch nor stream (pre, lns, none …) it is the factor that a
    norm of the branch would have: the additive law is then a claim that the measurement can refute.
    """
    if isinstance(step, Renorm):
        norm = step.norm_out
        return Step(after=wide(after), moment=norm.moment(wide(before)), eps=norm.eps)
    raw, total = wide(seen["raw"]), seen["sum"]
    if step.normalises is None:
        moment, eps = RMSNorm.moment(raw), step.options.eps
    else:
        norm = step.norm_out
        moment = norm.moment(wide(total) if step.normalises == "stream" else raw)
        eps = norm.eps
    return Step(
        after=wide(after),
        skip=wide(seen["skip"]),
        branch=wide(seen["branch"]),
        raw=raw,
        moment=moment,
        eps=eps,
    )
