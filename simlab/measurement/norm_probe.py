"""Recognises other people's norms by what they do, and reads their gains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from simlab.config import ConfigError
from simlab.measurement.statistics import wide
from simlab.model.norms import LayerNorm, RMSNorm

EPS = ("eps", "variance_epsilon", "epsilon")  # what norms call it


@dataclass(frozen=True)
class Norm:
    """A norm: its eps, its gain (D,), and the function (…, D) → (…) of the moment it divides by."""

    eps: float
    gain: Tensor
    moment: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Held:
    """What a norm holds during its forward call: eps, and weight and bias (D,), wide."""

    eps: float | None
    weight: Tensor | None
    bias: Tensor | None


def held_by(norm: nn.Module) -> Held:
    """Read a norm in its own hook, when sharded parameters (FSDP) are whole. Raises ConfigError."""
    eps = next((value for name in EPS if (value := getattr(norm, name, None)) is not None), None)
    with loaded(norm):
        weight, bias = whole(norm, "weight"), whole(norm, "bias")
    return Held(
        eps if isinstance(eps, float) else None,
        None if weight is None else wide(weight).clone(),
        None if bias is None else wide(bias).clone(),
    )


def identify_norm(held: Held, x: Tensor, y: Tensor, rounding: float) -> Norm | None:
    """Find out which norm maps x to y (B, T, D; wide); None if no candidate does, to some roundings.

    The candidates are RMSNorm and LayerNorm, each with gain weight or 1 + weight (Gemma).
    """
    if held.eps is None:
        return None
    x, y, eps = x[:1], y[:1], held.eps
    gains = [x.new_ones(x.shape[-1])] if held.weight is None else [held.weight, 1 + held.weight]
    shift = 0.0 if held.bias is None else held.bias
    matches = []
    for moment, mean in ((RMSNorm.moment, 0.0), (LayerNorm.moment, x.mean(-1, keepdim=True))):
        unit = (x - mean) / (moment(x) + eps).sqrt()[..., None]
        for gain in gains:
            error = (unit * gain + shift - y).abs().amax().item()
            matches.append((error, Norm(eps, gain, moment)))
    error, best = min(matches, key=lambda pair: pair[0])
    return best if error <= 8 * rounding * y.abs().amax().item() else None


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """With the weights that accelerate loads for the module's forward alone, and drops after it."""
    hook = getattr(module, "_hf_hook", None)  # an accelerate.hooks.ModelHook
    if hook is None or not any(p.is_meta for p in module.parameters(recurse=False)):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def whole(module: nn.Module, name: str) -> Tensor | None:
    """A module's tensor, gathered where it is sharded (FSDP 2). Raises ConfigError if it is away."""
    value = getattr(module, name, None)
    if not isinstance(value, Tensor):
        return None
    if (gather := getattr(value, "full_tensor", None)) is not None:  # a DTensor's, slow to import
        value = gather()
    if value.is_meta:
        raise ConfigError(
            f"probe: {type(module).__name__}'s {name} is on the meta device while the norm runs: load"
            " the model whole"
        )
    return value
