"""AltUp's side streams (``schemes.gemma3n.AltUp``) as theory has them.

The three side streams are exchangeable, and only the last projections read them, each by a fresh
matrix: theory keeps one of them, x_1, and the head reads it three times. The gradient with respect to
it is then the sum of the three's. The small coefficients of prediction and correction are taken for 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simlab.config import ModelConfig
from simlab.schemes.gemma3n import ALTUP_STREAMS, LEAST_SQUARE
from simlab.theory.laws import Array
from simlab.theory.mean_field.branch import Input
from simlab.theory.mean_field.drawing import Context
from simlab.theory.mean_field.kernels import KernelStep, KernelVector
from simlab.theory.mean_field.mixing import ReadBranch

# A coefficient's std from which theory ends: over four streams, a block adds four of its squares.
MOST = 0.03


@dataclass(frozen=True, eq=False)
class SideBranch(ReadBranch):
    """s·W·y as ``branch.Branch`` has it, without noise. root: s·√(d·σ²) (N,), σ the std of W."""

    root: Array = field(kw_only=True)

    def pull_gradient(self, gradient: Array) -> Array:
        """Through W and s; what s itself passes on is of order 1/d."""
        return gradient * np.outer(self.root, self.root)


def _side(
    step: KernelStep, stds: Mapping[str, float], y: KernelVector, like: KernelVector
) -> KernelVector:
    """s·W·y by a fresh W, s such that it has the mean square of ``like``."""
    gain = step.width * stds["side_proj"] ** 2

    def branch(h: Input) -> SideBranch:
        size = np.maximum(gain * h.kernel.diagonal(), LEAST_SQUARE)
        root = np.sqrt(gain * like.kernel.diagonal() / size)
        return SideBranch(h.kernel * np.outer(root, root), root=root)

    return step.feed(branch, part=True)(y)


def embed_sides(context: Context, stds: Mapping[str, float], step: KernelStep) -> Any:
    """The part of ``start``: one side stream, for three."""
    return lambda state: (_side(step, stds, state[0], state[0]),)


def unembed_sides(context: Context, stds: Mapping[str, float], step: KernelStep) -> Any:
    """The part of ``finish``: three projections of the one side stream."""
    return lambda state: tuple(
        _side(step, stds, state[1], state[0]) for _ in range(ALTUP_STREAMS - 1)
    )


def predict_same(context: Context, stds: Mapping[str, float], step: KernelStep) -> Any:
    """The part ``predict``: streams as they are."""
    return lambda state: state


def correct_alike(context: Context, stds: Mapping[str, float], step: KernelStep) -> Any:
    """The part ``correct``: 0 for each of the two streams that theory has."""
    return lambda x: (0.0, 0.0)


def too_large(model: ModelConfig, stds: Mapping[str, float]) -> str | None:
    """Why a model's curve ends at its start, whose coefficients have a std beyond MOST, else None."""
    tanh = min(stds["mode_proj"] / math.sqrt(model.width), 1.0)
    std = stds["coef_proj"] * math.sqrt(ALTUP_STREAMS) * tanh
    if std <= MOST:
        return None
    return (
        f"from sublayer 1 on side streams are mixed by coefficients of std {std:.2g}, "
        f"and theory leaves out those up to {MOST}"
    )
