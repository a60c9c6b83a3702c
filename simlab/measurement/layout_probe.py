"""Measures any PyTorch decoder layer whose residual steps a layout names, and checks the layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from simlab.config import ConfigError
from simlab.measurement.block_probe import BlockProbe
from simlab.measurement.layout import Sublayer, submodule
from simlab.measurement.statistics import Step, wide
from simlab.model.norms import LayerNorm, RMSNorm

EPS = ("eps", "variance_epsilon", "epsilon")  # what norms call it


def wide_copy(x: Tensor) -> Tensor:
    """A copy in float64, safe from the model's later in-place operations."""
    return wide(x.detach().clone())


def first_output(out: Any) -> Tensor:
    """A module's output, or the first of several."""
    tensor: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return tensor


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A module's first argument, by position or by name."""
    tensor: Tensor = args[0] if args else next(iter(kwargs.values()))
    return tensor


@dataclass(frozen=True)
class Norm:
    """A norm: its eps, its gain (D,), and the function (…, D) → (…) of the moment it divides by."""

    eps: float
    gain: Tensor
    moment: Callable[[Tensor], Tensor]


def identify_norm(norm: nn.Module, x: Tensor, y: Tensor, rounding: float) -> Norm | None:
    """Find out which norm maps x to y (B, T, D; wide); None if no candidate does, to some roundings.

    The candidates are RMSNorm and LayerNorm, each with gain weight or 1 + weight (Gemma).
    """
    eps = next((value for name in EPS if (value := getattr(norm, name, None)) is not None), None)
    if not isinstance(eps, float):
        return None
    x, y = x[:1], y[:1]
    weight, bias = whole(norm, "weight"), whole(norm, "bias")
    gains = [x.new_ones(x.shape[-1])] if weight is None else [wide(weight), 1 + wide(weight)]
    shift = 0.0 if bias is None else wide(bias)
    matches = []
    for moment, mean in ((RMSNorm.moment, 0.0), (LayerNorm.moment, x.mean(-1, keepdim=True))):
        unit = (x - mean) / (moment(x) + eps).sqrt()[..., None]
        for gain in gains:
            error = (unit * gain + shift - y).abs().amax().item()
            matches.append((error, Norm(eps, gain, moment)))
    error, best = min(matches, key=lambda pair: pair[0])
    return best if error <= 8 * rounding * y.abs().amax().item() else None


def whole(module: nn.Module, name: str) -> Tensor | None:
    """A module's parameter, gathered where it is sharded (FSDP 2). Raises ConfigError if it is away."""
    value: Tensor | None = getattr(module, name, None)
    if (gather := getattr(value, "full_tensor", None)) is not None:  # a DTensor's, slow to import
        value = gather()
    if value is not None and value.is_meta:
        raise ConfigError(
            f"probe: {type(module).__name__}'s {name} is offloaded (accelerate's hooks, device_map): "
            "load the model whole"
        )
    return value


def attention_weights(out: Any) -> dict[str, Tensor] | None:
    """Statistics (B, T) of the weights (B, H, T, T), if they are an attention's second output.

    As in ``statistics.attention_statistics``, but ``max_logit`` is NaN: the logits aren't returned.
    """
    if not isinstance(out, (tuple, list)) or len(out) < 2 or not isinstance(out[1], Tensor):
        return None
    length = out[0].shape[1]
    if out[1].ndim != 4 or out[1].shape[2:] != (length, length):
        return None
    a = out[1].detach().float()
    entropy = torch.special.entr(a).sum(-1).mean(1)
    nan = torch.full_like(entropy, torch.nan)
    return {"entropy": entropy, "max_logit": nan, "first": a[..., 0].mean(1)}


class LayoutProbe(BlockProbe):
    """``with LayoutProbe(block, name, sublayers): block(x)``, then ``results()``.

    The first batch checks every step: stream + branch must equal the stream after it, to rounding.
    Raises ConfigError for a missing submodule, and during the forward call for a step that fails the
    check.
    """

    def __init__(self, block: nn.Module, name: str, sublayers: tuple[Sublayer, ...]) -> None:
        kinds = [sublayer.kind for sublayer in sublayers]
        # A gain of 1, as at init: the laws take a trained model's gains as that too.
        super().__init__(block, kinds, [sublayer.normalises for sublayer in sublayers], gain=1.0)
        self.name, self.sublayers = name, sublayers
        where = f"{name} ({type(block).__name__})"
        paths = {n for s in sublayers for n in (*s.raws, *s.branches, s.sum, s.norm) if n}
        self.modules = {path: submodule(block, path, where) for path in sorted(paths)}
        self.norms: dict[int, Norm | None] = {}
        self.stream: Tensor | None = None  # before the next step, wide
        self.outputs: dict[str, Tensor] = {}  # wide
        self.rounding: dict[str, float] = {}  # of each output, in the dtype that the model gave it
        self.attention: dict[str, dict[str, Tensor] | None] = {}

    def listen(self) -> None:
        """Hooks on the block and on the submodules that the layout names."""
        self._before(self.block, self._start)
        for path in sorted({path for s in self.sublayers for path in outputs(s)}):
            self._after(self.modules[path], partial(self._keep, path))
        for i, sublayer in enumerate(self.sublayers):
            at = self.block if sublayer.sum is None else self.modules[sublayer.sum]
            if sublayer.normalises == "stream":
                self._after(at, partial(self._on_norm, i))
            elif sublayer.sum is not None:
                self._before(at, partial(self._on_sum, i))
            else:
                self._after(at, partial(self._on_end, i))

    def _before(self, module: nn.Module, call: Callable[[Tensor], None]) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call(first_argument(args, kwargs))

        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: nn.Module, call: Callable[[Tensor, Any], None]) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            call(first_argument(args, kwargs), out)

        self.handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def _start(self, x: Tensor) -> None:
        self.stream = wide_copy(x)
        self.outputs.clear()
        self.attention.clear()

    def _keep(self, path: str, _: Tensor, out: Any) -> None:
        self.outputs[path] = wide_copy(first_output(out))
        self.rounding[path] = torch.finfo(first_output(out).dtype).eps
        self.attention[path] = attention_weights(out)

    def _on_norm(self, i: int, x: Tensor, out: Any) -> None:
        self._finish(i, x, first_output(out))

    def _on_sum(self, i: int, x: Tensor) -> None:
        self._finish(i, x, x)

    def _on_end(self, i: int, _: Tensor, out: Any) -> None:
        self._finish(i, first_output(out), first_output(out))

    @torch.no_grad()
    def _finish(self, i: int, total: Tensor, after: Tensor) -> None:
        """Add step i to its reducer. total: stream + branch (B, T, D); after: the stream after it."""
        sublayer, skip = self.sublayers[i], self.stream
        if missing := [path for path in outputs(sublayer) if path not in self.outputs]:
            raise self._wrong(
                sublayer, f"{', '.join(missing)} gave nothing before its sum was seen"
            )
        assert skip is not None  # with outputs, the block has started
        raw = add_up([self.outputs[path] for path in sublayer.raws])
        branches = [self.outputs[path] for path in sublayer.branches]
        rounding = torch.finfo(total.dtype).eps
        total, after = wide(total), wide_copy(after)
        if i not in self.norms:
            self._check(sublayer, [skip, *branches], total, rounding)
            self.norms[i] = self._norm(sublayer, skip, raw, total, after, rounding)
        norm, moment = self.norms[i], None
        if norm is not None:
            # Of a norm on the way in, as in ``observe``: what a norm of the branch would divide by.
            of = norm.moment if sublayer.normalises else RMSNorm.moment
            moment = of(total if sublayer.normalises == "stream" else raw)
        weights = [self.attention[path] for path in sublayer.raws]
        step = Step(
            after=after,
            skip=skip,
            branch=add_up(branches),
            raw=raw,
            moment=moment,
            eps=norm.eps if norm else 0.0,
            gain=norm.gain if norm else None,
            attention=next((weight for weight in weights if weight), None),
        )
        self.reducers[i].add(step)
        self.stream = None if sublayer is self.sublayers[-1] else after  # a block's is not kept
        for path in outputs(sublayer):
            del self.outputs[path]

    def _check(
        self, sublayer: Sublayer, terms: list[Tensor], total: Tensor, rounding: float
    ) -> None:
        """Check that stream and branches add up to the named sum, and that outputs have its shape."""
        for path in outputs(sublayer):
            if self.outputs[path].shape != total.shape:
                shape = tuple(self.outputs[path].shape)
                raise self._wrong(
                    sublayer, f"{path} gives {shape}, the stream is {tuple(total.shape)}"
                )
        off = (add_up(terms) - total).abs()
        allowed = 4 * rounding * add_up([term.abs() for term in terms])
        if (off > allowed).any():  # not where a NaN or an infinity is: that is for the rows to say
            place = f"what {sublayer.sum} gets" if sublayer.sum else "what the block gives"
            most, rms = off.amax().item(), total.square().mean().sqrt().item()
            raise self._wrong(
                sublayer,
                f"stream + {' + '.join(sublayer.branches)} isn't {place}: off by {most:.2g} where"
                f" the rms is {rms:.2g}",
            )

    def _wrong(self, sublayer: Sublayer, what: str) -> ConfigError:
        ours = {handle.id for handle in self.handles}
        hooked = [
            type(module).__name__
            for module in self.block.modules()
            if module._forward_hooks.keys() - ours
        ]
        advice = (
            "pass a layout of this model, whose branches are the submodules that give what is added,"
            " as it is added (a model that scales stream or branch between modules can't be probed)"
        )
        if hooked:
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
        module = self.modules[sublayer.norm]
        if sublayer.normalises == "stream":
            return identify_norm(module, total, after, rounding)
        x, within = skip, [sublayer.norm]
        if sublayer.normalises == "branch":
            x, within = raw, [sublayer.norm, *sublayer.raws]
        # Under autocast a branch is bfloat16 where the stream is float32: its norm rounds to that.
        rounding = max(rounding, *(self.rounding[path] for path in within))
        return identify_norm(module, x, self.outputs[sublayer.norm], rounding)


def add_up(terms: list[Tensor]) -> Tensor:
    """The sum of the terms."""
    return reduce(torch.add, terms)


def outputs(sublayer: Sublayer) -> list[str]:
    """The submodules whose outputs must have been recorded before the sum."""
    norm = () if sublayer.norm is None or sublayer.normalises == "stream" else (sublayer.norm,)
    return list(dict.fromkeys((*sublayer.raws, *sublayer.branches, *norm)))
