"""Measures any PyTorch decoder layer whose residual steps a layout names, and checks the layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simlab.config import ConfigError
from simlab.measurement.block_probe import BlockProbe
from simlab.measurement.layout import Sublayer, submodule, submodules
from simlab.measurement.layout_search import (
    DEEPEST,
    CallRecord,
    add_up,
    as_stream,
    attention_weights,
    find_steps,
    first_argument,
    first_output,
    imbalance,
    is_light,
    matrices,
    passes_on,
    same,
)
from simlab.measurement.norm_probe import Held, Norm, held_by, identify_norm
from simlab.measurement.statistics import Step, sequences, wide
from simlab.model.norms import RMSNorm

if TYPE_CHECKING:
    from simlab.measurement.gradient_taps import Tap


def wide_copy(x: Tensor) -> Tensor:
    """A copy in float64, safe from the model's later in-place operations."""
    return wide(x.detach().clone())


class LayoutProbe(BlockProbe):
    """``with LayoutProbe(block, name, sublayers): block(x)``, then ``results()``.

    On every batch every step is checked: stream + branch must equal the stream after it, to rounding.
    Without ``sublayers`` the first batch finds them. If none are found, only the block's output is
    measured, a step of kind ``block``.

    Args:
        block: The block that is probed.
        name: Its path in the model.
        sublayers: Its residual steps; None to find them.
        found: The steps of blocks that were searched, for a block whose first batch isn't finite.

    Raises ConfigError for a missing submodule, and during the forward call for a step that fails the
    check.
    """

    def __init__(
        self,
        block: nn.Module,
        name: str,
        sublayers: tuple[Sublayer, ...] | None = None,
        found: dict[Any, tuple[Sublayer, ...]] | None = None,
    ) -> None:
        # A gain of 1, as at init: the laws take a trained model's gains as that too.
        super().__init__(block, [], [], gain=1.0)
        self.name, self.found = name, {} if found is None else found
        self.sublayers: tuple[Sublayer, ...] | None = None
        self.modules: dict[str, nn.Module] = {}
        self.norms: dict[int, Norm | None] = {}
        # Of the first batch, where the steps aren't known yet.
        self.record: CallRecord | None = None
        self.shape = torch.Size()  # of the stream, (B, T, D), or of several
        self.stream: Tensor | None = None  # before the next step, wide
        self.outputs: dict[str, Tensor] = {}  # wide
        self.reads: dict[str, Tensor] = {}  # what modules get, of those where it is known
        self.rounding: dict[str, float] = {}  # of each output, in the dtype that the model gave it
        self.attention: dict[str, dict[str, Tensor] | None] = {}
        self.held: dict[str, Held] = {}  # by norms, on the first batch
        # Likewise: by a module and what it gets or gives.
        self.tapped: dict[tuple[str, str], Tap] = {}
        if sublayers is not None:
            self._adopt(sublayers)

    def _adopt(self, sublayers: tuple[Sublayer, ...]) -> None:
        self.sublayers = sublayers
        where = f"{self.name} ({type(self.block).__name__})"
        paths = {
            n for s in sublayers for n in (*s.raws, *s.branches, s.sum, s.norm, s.weights) if n
        }
        self.modules = {path: submodule(self.block, path, where) for path in sorted(paths)}
        self.set_steps(
            [s.kind for s in sublayers] or ["block"], [s.normalises for s in sublayers] or [None]
        )

    def listen(self) -> None:
        """Hooks on the block and on the submodules that the layout names."""
        self._before(self.block, self._start)
        self._after(self.block, self._close)
        if self.sublayers is None:
            self._listen_to_all()
            return
        for path in sorted({s.norm for s in self.sublayers if s.norm}):
            self._first_after(self.modules[path], partial(self._hold, path))
        for path in sorted({path for s in self.sublayers for path in s.raws}):
            self._before(self.modules[path], partial(self._read, path))
        for path in sorted({path for s in self.sublayers for path in outputs(s)}):
            self._after(self.modules[path], partial(self._keep, path))
        for path in sorted({s.weights for s in self.sublayers if s.weights}):
            self._after(self.modules[path], partial(self._weigh, path))
        for i, sublayer in enumerate(self.sublayers):
            if sublayer.sum is None:
                continue  # the block's output
            at = self.modules[sublayer.sum]
            if sublayer.normalises == "stream":
                self._after(at, partial(self._on_norm, i))
            else:
                self._before(at, partial(self._on_sum, i))

    def _before(self, module: nn.Module, call: Callable[[Tensor], None]) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call(first_argument(args, kwargs))

        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: nn.Module, call: Callable[[Tensor, Any], None]) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            call(first_argument(args, kwargs), out)

        self.handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def _first_after(self, module: nn.Module, call: Callable[[nn.Module, Any], None]) -> None:
        """Before other hooks, such as FSDP 2's, which takes the weights away again."""

        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            call(module, first_output(out))

        self.handles.append(module.register_forward_hook(hook, prepend=True))

    def _start(self, x: Any) -> None:
        several = self.axis is not None and not self.sublayers
        if not isinstance(x, Tensor) or x.ndim != 3 + several or not x.is_floating_point():
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ConfigError(
                f"probe: {self.name} ({type(self.block).__name__}) gets {shape}: must be one stream"
                " (batch, length, width)"
            )
        if several and self.sublayers is None:  # whose blocks add to none of them alone
            self._adopt(())
        self.shape = x.shape
        self.outputs.clear()
        self.reads.clear()
        self.attention.clear()
        self.tapped.clear()
        self.stream = wide_copy(x)
        self.record = CallRecord(x.detach().clone()) if self.sublayers is None else None

    def _listen_to_all(self) -> None:
        for path, module in submodules(self.block).items():
            if path and path.count(".") <= DEEPEST and not passes_on(module):
                self._before(module, partial(self._begin_call, path))
                self._first_after(module, partial(self._hold_light, path))
                self._after(module, partial(self._end_call, path, module))

    def _begin_call(self, path: str, x: Any) -> None:
        if self.record is not None:  # else the block has not started
            stream = as_stream(x, self.shape)
            self.record.begin(path, stream)
            self._tap(path, "gets", x if stream is not None else None)

    def _tap(self, path: str, what: str, x: Tensor | None) -> None:
        if self.taps and x is not None:
            self.tapped[path, what] = self.taps.tap(x)

    def _end_call(self, path: str, module: nn.Module, _: Any, out: Any) -> None:
        if self.record is None:
            return
        y = as_stream(first_output(out), self.shape)
        if y is not None and path not in self.held and (norm := self.record.around(path, y)):
            self.held[path] = self.held[norm]
        if y is not None:
            self._tap(path, "gives", first_output(out))
            self.attention[path] = attention_weights(out)
        attends = bool(self.attention.get(path))
        self.record.end(path, type(module).__name__, y, path in self.held, attends)

    def _read(self, path: str, x: Any) -> None:
        stream = as_stream(x, self.shape)
        if stream is not None and matrices(self.modules[path]) > 1:
            self.reads[path] = stream.detach().clone()  # the model may change it in place

    def _keep(self, path: str, _: Any, out: Any) -> None:
        y = first_output(out)
        stream = as_stream(y, self.shape)
        self.outputs[path] = wide_copy(y if stream is None else stream)
        self.rounding[path] = torch.finfo(y.dtype).eps
        self.attention[path] = attention_weights(out)

    def _hold_light(self, path: str, module: nn.Module, y: Any) -> None:
        if self.record is not None and is_light(module) and as_stream(y, self.shape) is not None:
            self.held[path] = held_by(module)

    def _weigh(self, path: str, _: Any, out: Any) -> None:
        self.attention[path] = attention_weights(out)

    def _hold(self, path: str, module: nn.Module, _: Any) -> None:
        assert self.sublayers is not None
        of = [i for i, sublayer in enumerate(self.sublayers) if sublayer.norm == path]
        if any(i not in self.norms for i in of):
            self.held[path] = held_by(module)

    def _on_norm(self, i: int, x: Any, out: Any) -> None:
        y = first_output(out)
        self._finish(i, self._seen(x), self._seen(y), self.tap(y))

    def _on_sum(self, i: int, x: Any) -> None:
        self._finish(i, self._seen(x), self._seen(x), self.tap(x))

    def _seen(self, x: Any) -> Tensor:
        stream = as_stream(x, self.shape)
        seen: Tensor = x if stream is None else stream
        return seen

    def _close(self, _: Any, out: Any) -> None:
        """The block's end: its last step's, if the layout is known; else the layout is looked for."""
        y = first_output(out)
        if not isinstance(y, Tensor) or y.shape != self.shape:
            shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ConfigError(
                f"probe: {self.name} ({type(self.block).__name__}) gets {tuple(self.shape)} and gives"
                f" {shape}: must be the stream again"
            )
        if self.record is not None:
            self._settle(self.record, y)
        elif not self.sublayers:
            self.add(0, Step(after=wide(sequences(y, self.axis))), self.tap(y))
        elif self.sublayers[-1].sum is None:
            self._finish(len(self.sublayers) - 1, y, y, self.tap(y))
        elif self.stream is not None:
            self._check_end(y)
        self.stream = None
        self.held.clear()

    def _settle(self, record: CallRecord, y: Tensor) -> None:
        """Find the steps in the record of the first batch, then measure them."""
        self.record = None
        alike = tuple((name, type(module)) for name, module in self.block.named_modules())
        if record.x.isfinite().all() and y.isfinite().all():
            constants = [value for value in vars(self.block).values() if isinstance(value, float)]
            # accelerate may move the stream to the block's device within the block.
            steps = find_steps(record.once(), record.x.to(y.device), y, constants)
            if steps is None and self.found.get(alike) and self._hooked():
                raise self._wrong(self.found[alike][0], "no sums as in the blocks before it")
            self.found.setdefault(alike, steps or ())
        else:
            steps = self.found.get(alike)
        self._adopt(steps or ())
        calls = {call.path: call for call in record.calls}
        for sublayer in steps or ():
            for path in outputs(sublayer):
                self.outputs[path] = wide(calls[path].out)
                self.rounding[path] = torch.finfo(calls[path].out.dtype).eps
            for path in sublayer.raws:
                self._read(path, calls[path].x)
        for i, sublayer in enumerate(steps or ()):
            total = y if sublayer.sum is None else calls[sublayer.sum].x
            assert total is not None
            after, what = total, "gets"
            if sublayer.sum and sublayer.normalises == "stream":
                after, what = calls[sublayer.sum].out, "gives"
            tap = self.tapped.get((sublayer.sum, what)) if sublayer.sum else self.tap(y)
            self._finish(i, total, after, tap)
        if not steps:
            self.add(0, Step(after=wide(y)), self.tap(y))
        self.outputs.clear()
        self.reads.clear()
        self.attention.clear()
        self.tapped.clear()

    def _check_end(self, y: Tensor) -> None:
        """Check that the block gives the stream after its last step."""
        assert self.sublayers is not None
        assert self.stream is not None
        last, total = self.sublayers[-1], wide(y)
        off, allowed = imbalance(self.stream, [], 1.0, total, torch.finfo(y.dtype).eps)
        if (off > allowed).any():
            raise self._wrong(last, "the stream after it isn't what the block gives")

    @torch.no_grad()
    def _finish(self, i: int, total: Tensor, after: Tensor, tap: Tap | None) -> None:
        """Add step i. total: stream + branch (B, T, D); after, tap: of the stream after it."""
        assert self.sublayers is not None
        sublayer, skip = self.sublayers[i], self.stream
        if missing := [path for path in outputs(sublayer) if path not in self.outputs]:
            raise self._wrong(
                sublayer, f"{', '.join(missing)} gave nothing before its sum was seen"
            )
        assert skip is not None  # with outputs, the block has started
        skip = skip.to(total.device)
        raw = add_up([self.outputs[path] for path in sublayer.raws])
        branches = [self.outputs[path] for path in sublayer.branches]
        rounding = torch.finfo(total.dtype).eps
        total, after = wide(total), wide_copy(after)
        self._check(sublayer, skip, branches, total, rounding)
        if i not in self.norms:
            self.norms[i] = self._norm(sublayer, skip, raw, total, after, rounding)
        norm, moment = self.norms[i], None
        if norm is not None:
            # Of a norm on the way in, as in ``observe``: what a norm of the branch would divide by.
            of = norm.moment if sublayer.normalises else RMSNorm.moment
            moment = of(total if sublayer.normalises == "stream" else raw)
        weights = [self.attention.get(path) for path in (sublayer.weights, *sublayer.raws) if path]
        step = Step(
            after=after,
            skip=skip,
            branch=add_up(branches)
            if sublayer.multiplier == 1
            else sublayer.multiplier * add_up(branches),
            raw=raw,
            read=self._read_by(sublayer),
            moment=moment,
            eps=norm.eps if norm else 0.0,
            gain=norm.gain if norm else None,
            attention=next((weight for weight in weights if weight), None),
        )
        self.add(i, step, tap)
        for path in sublayer.raws:
            self.reads.pop(path, None)
        self.stream = after
        for path in outputs(sublayer):
            del self.outputs[path]

    def _read_by(self, sublayer: Sublayer) -> Tensor | None:
        """The input (B, T, D) of a sublayer's modules, if it is known and all get the same one.

        It is known of a module with two matrices or more, such as an attention or an MLP: one matrix
        alone is a sublayer's last projection, which gets something else.
        """
        got = [self.reads.get(path) for path in sublayer.raws]
        return got[0] if all(x is got[0] or same(x, got[0]) for x in got) else None

    def _check(
        self,
        sublayer: Sublayer,
        skip: Tensor,
        branches: list[Tensor],
        total: Tensor,
        rounding: float,
    ) -> None:
        """Check that stream and branches add up to the named sum, and that outputs have its shape."""
        for path in outputs(sublayer):
            if self.outputs[path].shape != total.shape:
                shape = tuple(self.outputs[path].shape)
                raise self._wrong(
                    sublayer, f"{path} gives {shape}, the stream is {tuple(total.shape)}"
                )
        if sublayer.multiplier != 1:  # the product is rounded in the branch's dtype
            rounding = max(rounding, *(self.rounding[path] for path in sublayer.branches))
        off, allowed = imbalance(skip, branches, sublayer.multiplier, total, rounding)
        if (off > allowed).any():  # not where a NaN or an infinity is: that is for the rows to say
            place = f"what {sublayer.sum} gets" if sublayer.sum else "what the block gives"
            most, rms = off.amax().item(), total.square().mean().sqrt().item()
            raise self._wrong(
                sublayer,
                f"stream + {sublayer.added} isn't {place}: off by {most:.2g} where"
                f" the rms is {rms:.2g}",
            )

    def _hooked(self) -> list[str]:
        """The classes of the modules in the block that have somebody else's forward hooks."""
        return [
            type(module).__name__
            for module in self.block.modules()
            for hook in module._forward_hooks.values()
            if not getattr(getattr(hook, "func", hook), "__module__", "").startswith("simlab.")
        ]

    def _wrong(self, sublayer: Sublayer, what: str) -> ConfigError:
        advice = (
            "pass a layout of this model, whose branches are the submodules that give what is added,"
            " as it is added (a multiplier of the branch is allowed, one of the stream isn't)"
        )
        if hooked := self._hooked():
            advice = (
                f"a forward hook on {hooked[0]}, which isn't simlab's, may change it: remove it"
            )
        return ConfigError(f"probe: {self.name}, {sublayer.kind}: {what}; {advice}")

    def _norm(
        self,
        sublayer: Sublayer,
        skip: Tensor,
        raw: Tensor,
        total: Tensor,
        after: Tensor,
        rounding: float,
    ) -> Norm | None:
        """The sublayer's norm, identified from its input and output."""
        if sublayer.norm is None:
            return None
        if (held := self.held.get(sublayer.norm)) is None:  # within a wrapper, on a batch with NaNs
            return None
        if sublayer.normalises == "stream":
            return identify_norm(held, total, after, rounding)
        x, within = skip, [sublayer.norm]
        if sublayer.normalises == "branch":
            x, within = raw, [sublayer.norm, *sublayer.raws]
        # Under autocast a branch is bfloat16 where the stream is float32: its norm rounds to that.
        rounding = max(rounding, *(self.rounding[path] for path in within))
        return identify_norm(held, x, self.outputs[sublayer.norm], rounding)


def outputs(sublayer: Sublayer) -> list[str]:
    """The submodules whose outputs must have been recorded before the sum."""
    norm = () if sublayer.norm is None or sublayer.normalises == "stream" else (sublayer.norm,)
    return list(dict.fromkeys((*sublayer.raws, *sublayer.branches, *norm)))
