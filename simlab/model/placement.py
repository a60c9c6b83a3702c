"""Runs a residual scheme (``schemes/placement.py``) on tensors: its sublayer, its norms, its add."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from simlab.config import ModelConfig
from simlab.model.attention import Attention, Linear
from simlab.model.norms import NORMS, DynamicTanh, RMSNorm
from simlab.model.parts import PARTS
from simlab.schemes.placement import placement_of
from simlab.schemes.scheme import Scheme

Carried = Tensor | tuple[Tensor, ...]


def tensors_of(state: Carried) -> tuple[Tensor, ...]:
    """A state's tensors: the residual stream, or all that a placement carries from step to step."""
    return state if isinstance(state, tuple) else (state,)


ENDS = ("start", "finish")  # where a model has parts outside its blocks


def end_parts(end: str, config: ModelConfig, linear: Linear) -> nn.ModuleDict:
    """The parts of a placement's ``start`` or ``finish``, by name."""
    placement = placement_of(config)
    names = placement.start_parts if end == "start" else placement.finish_parts
    return nn.ModuleDict({name: PARTS[name](config, linear) for name in names})


def start(x: Tensor, config: ModelConfig, parts: nn.ModuleDict | None = None) -> Carried:
    """The state before the first block, of the embedding (B, T, D)."""

    def norm(x: Tensor) -> Tensor:
        out: Tensor = RMSNorm(config.width, config.norm.eps).to(x.device)(x)
        return out

    return placement_of(config).start(x, norm, config, **dict((parts or {}).items()))


def finished(state: Carried, config: ModelConfig, parts: nn.ModuleDict | None = None) -> Tensor:
    """The final norm's input (B, T, D), of the state after the last block."""

    def norm(x: Tensor) -> Tensor:
        made = NORMS[config.norm.type](config.width, config.norm.eps).requires_grad_(False)
        if isinstance(made, DynamicTanh):
            nn.init.constant_(made.alpha, config.norm.squash_alpha("final"))
        out: Tensor = made.to(x.device)(x)
        return out

    out: Tensor = placement_of(config).finish(state, norm, config, **dict((parts or {}).items()))
    return out


class ResidualAdd(nn.Module):
    """skip + branch. It exists so that hooks can attach to the residual stream."""

    def forward(self, skip: Tensor, branch: Tensor) -> Tensor:
        """Two tensors of one shape to their sum."""
        return skip + branch


class ResidualStep(nn.Module):
    """One residual step x → x', around a sublayer, as the scheme's formula has it.

    Its children are the sublayer, ``add``, to which the probe listens, and the norms and the parts that
    the scheme names.
    """

    norm_out: RMSNorm

    def __init__(
        self, sublayer: nn.Module, scheme: Scheme, config: ModelConfig, linear: Linear
    ) -> None:
        super().__init__()
        self.sublayer, self.add = sublayer, ResidualAdd()
        self.scheme, self.options = scheme, config.norm
        for name in scheme.norms:
            setattr(self, name, NORMS[config.norm.type](config.width, config.norm.eps))
        for name in scheme.parts:
            setattr(self, name, PARTS[name](config, linear))

    @property
    def normalises(self) -> str | None:
        """As in ``Scheme``, but for a norm that sets no rms: None, or ``skip`` where it bends x."""
        target = self.scheme.normalises
        if self.options.elementwise:
            return "skip" if target in ("stream", "skip") else None
        return target

    @property
    def norms(self) -> dict[str, RMSNorm]:
        """The scheme's norms by name, in the order they act."""
        return {name: getattr(self, name) for name in self.scheme.norms}

    def forward(self, state: Carried, ids: Tensor | None = None) -> Carried:
        """(B, T, D) to (B, T, D), or a state to a state. ids (B, T): as Attention takes them."""
        reads_ids = isinstance(self.sublayer, Attention) and self.sublayer.embeds_values
        sublayer = partial(self.sublayer, ids=ids) if reads_ids else self.sublayer
        parts = {name: getattr(self, name) for name in self.scheme.parts}
        out: Carried = self.scheme.step(state, sublayer, self.add, **self.norms, **parts)
        return out


class Renorm(nn.Module):
    """x ← N(x) on the residual stream itself."""

    normalises: ClassVar[str | None] = "stream"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_out = NORMS[config.norm.type](config.width, config.norm.eps)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D). ids: not needed."""
        out: Tensor = self.norm_out(x)
        return out
