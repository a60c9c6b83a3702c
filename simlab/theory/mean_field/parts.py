"""The parts of placements (``model/parts.py``) as theory has them: maps of vectors, by kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from simlab.config import ModelConfig
from simlab.schemes.gemma3n import ALTUP_STREAMS
from simlab.schemes.placement import placement_of
from simlab.schemes.streams import mix_shape
from simlab.theory.laws import Array
from simlab.theory.mean_field import sides
from simlab.theory.mean_field.branch import TINY, Input
from simlab.theory.mean_field.drawing import Context
from simlab.theory.mean_field.kernels import KernelStep, KernelVector, outer_square
from simlab.theory.mean_field.mixing import mixing


@dataclass(frozen=True, eq=False)
class LowRankBranch:
    """R·L·h of rank r, as ``kernels.Branch`` has it: B = r·σ_R²·d·σ_L²·H, exactly.

    Beside the last matrix's width, r Gaussian hidden units vary between seeds.
    """

    input: Input
    scale: float
    units: int

    @property
    def kernel(self) -> Array:
        """B (N, N)."""
        return self.scale * self.input.kernel

    @property
    def square(self) -> Array:
        """Of r hidden units, and of an un-normed input."""
        own: Array = 2 * self.kernel**2 / self.units
        return own if self.input.normed else own + self.scale**2 * self.input.square

    @property
    def cross(self) -> Array:
        """Of r hidden units."""
        return (outer_square(self.kernel) + self.kernel**2) / self.units

    @property
    def lean(self) -> Array | None:
        """None: an un-normed input's noise is in ``square``, as of attention."""
        return None

    @property
    def slope(self) -> Array:
        """dB_ij/dρ_ij."""
        return self.scale * np.sqrt(np.maximum(outer_square(self.input.kernel), TINY))

    def covariance(self, functionals: Any) -> Array:
        """0: the hidden units are Gaussian."""
        return np.zeros((len(functionals), len(functionals)))

    def pull(self, functionals: Any) -> Any:
        """δB = scale·δH."""
        return self.scale * functionals

    def pull_gradient(self, gradient: Array) -> Array:
        """The map is linear, and its transpose's kernel is the same multiple."""
        return self.scale * gradient


def _low_rank(context: Context, stds: Mapping[str, float], step: KernelStep) -> VectorMap:
    model = context.model
    rank = _rank(model)
    scale = rank * stds["right_proj"] ** 2 * model.width * stds["left_proj"] ** 2
    return step.feed(lambda h: LowRankBranch(h, scale, rank), part=True)


def _rank(model: ModelConfig) -> int:
    assert model.norm.laurel_rank is not None
    return model.norm.laurel_rank


VectorMap = Callable[[KernelVector], Any]  # to a vector, or to coefficients that a formula uses


@dataclass(frozen=True)
class PartKernel:
    """A part, on paper.

    of: from the context, the stds of matrices by role, and the step that it is used in, to the map that
    the scheme's formula calls. parameters: how many it has. refuse: of a part of ``start``, why a curve
    ends before its first sublayer, by the stds; None where it doesn't. Other parts' isn't asked.
    """

    of: Callable[[Context, Mapping[str, float], KernelStep], VectorMap]
    parameters: Callable[[ModelConfig], int]
    refuse: Callable[[ModelConfig, Mapping[str, float]], str | None] = lambda model, stds: None


def _mix_parameters(model: ModelConfig) -> int:
    streams, outputs = mix_shape(model.norm)
    return streams * model.width * outputs


def _side_parameters(model: ModelConfig) -> int:
    return (ALTUP_STREAMS - 1) * model.width**2


def _router_parameters(outputs: int) -> Callable[[ModelConfig], int]:
    return lambda model: ALTUP_STREAMS * (model.width + outputs)


def _gate_parameters(model: ModelConfig) -> int:
    streams, _ = mix_shape(model.norm)
    return streams * model.width * streams


PART_KERNELS: dict[str, PartKernel] = {
    "laurel": PartKernel(_low_rank, lambda model: 2 * model.width * _rank(model)),
    "mix": PartKernel(mixing, _mix_parameters),
    "gates": PartKernel(mixing, _gate_parameters),  # the same gates, of which a head writes nothing
    "embed_sides": PartKernel(sides.embed_sides, _side_parameters, sides.too_large),
    "unembed_sides": PartKernel(sides.unembed_sides, _side_parameters),
    "predict": PartKernel(sides.predict_same, _router_parameters(ALTUP_STREAMS**2)),
    "correct": PartKernel(sides.correct_alike, _router_parameters(ALTUP_STREAMS)),
}


def part_maps(
    names: Iterable[str], context: Context, stds: Mapping[str, float], step: KernelStep
) -> dict[str, Any]:
    """A scheme's parts by name, as its formula takes them in a step."""
    return {name: PART_KERNELS[name].of(context, stds, step) for name in names}


def refused(model: ModelConfig, stds: Mapping[str, float]) -> str | None:
    """Why a curve ends before its first sublayer, by a placement's parts; None where it doesn't."""
    reasons = (PART_KERNELS[name].refuse(model, stds) for name in placement_of(model).start_parts)
    return next(filter(None, reasons), None)


def end_parameters(model: ModelConfig) -> int:
    """Parameters of the parts of a placement's start and finish."""
    placement = placement_of(model)
    names = (*placement.start_parts, *placement.finish_parts)
    return sum(PART_KERNELS[name].parameters(model) for name in names)
