"""What is measured at each step of the residual stream: small named functions of one step.

Each takes a ``Step`` of float64 tensors (float32 where the device has no float64) and gives one
number per token; the probe reduces over tokens with the statistic's ``reduce``. What several of
them need is computed once, by the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.linalg import vecdot, vector_norm


@dataclass(frozen=True)
class Step:
    """One step of the residual stream, as the probe saw it. All tensors (B, T, D), D = d_model.

    ``after`` is the stream after the step; where something was added, ``skip`` and ``branch`` are
    what the add got and ``raw`` the sublayer's output before any norm. ``moment`` (B, T) is the
    mean square (LayerNorm: variance) that the step's last norm divides by, ``eps`` its eps.
    """

    after: Tensor
    skip: Tensor | None = None
    branch: Tensor | None = None
    raw: Tensor | None = None
    moment: Tensor | None = None
    eps: float = 0.0

    @property
    def width(self) -> int:
        """D."""
        return self.after.shape[-1]

    @cached_property
    def norm(self) -> Tensor:
        """‖x‖ (B, T)."""
        return vector_norm(self.after, dim=-1)

    @cached_property
    def square(self) -> Tensor:
        """‖x‖² (B, T). A norm's square: measured, four times as fast as a dot product with itself."""
        return self.norm.square()

    @cached_property
    def max_abs(self) -> Tensor:
        """max |x_i| (B, T)."""
        return self.after.abs().amax(-1)

    @cached_property
    def nan(self) -> Tensor:
        """NaN (B, T), for what this step hasn't."""
        return torch.full_like(self.after[..., 0], torch.nan)

    @cached_property
    def branch_square(self) -> Tensor:
        """‖b‖² (B, T), NaN where nothing is added."""
        return self.nan if self.branch is None else vector_norm(self.branch, dim=-1).square()

    @cached_property
    def cross(self) -> Tensor:
        """⟨x, b⟩ (B, T), x being what b is added to; NaN where nothing is added."""
        if self.skip is None or self.branch is None:
            return self.nan
        return vecdot(self.skip, self.branch)


def _cosine(step: Step) -> Tensor:
    if step.skip is None:
        return step.nan
    return step.cross / (vector_norm(step.skip, dim=-1) * step.branch_square.sqrt())


def _gradient_cosine(step: Step) -> Tensor:
    """0 where the gradient is 0, as it is at a sequence's last token, which predicts nothing."""
    return torch.where(step.branch_square == 0, 0.0, _cosine(step))


def _raw_mean_square(step: Step) -> Tensor:
    return step.nan if step.raw is None else vector_norm(step.raw, dim=-1).square() / step.width


def _eps_factor(step: Step) -> Tensor:
    return step.nan if step.moment is None else step.moment / (step.moment + step.eps)


@dataclass(frozen=True)
class Statistic:
    """A function of a step to a number per token (B, T), and how tokens are reduced.

    reduce: mean; max; rms, the root of the mean; or vector, for which the function gives a vector
    per token (B, T, D) and the result is the norm of their mean.
    """

    of: Callable[[Step], Tensor]
    reduce: str = "mean"


_norm = Statistic(lambda s: s.norm)
_mean_vector_norm = Statistic(lambda s: s.after, "vector")

STATISTICS: dict[str, Statistic] = {
    # Of the stream x after the step.
    "norm": _norm,
    "mean_square": Statistic(lambda s: s.square / s.width),
    "mean": Statistic(lambda s: s.after.mean(-1)),
    "mean_abs": Statistic(lambda s: vector_norm(s.after, 1, dim=-1) / s.width),
    "max_abs": Statistic(lambda s: s.max_abs, "max"),
    "mean_vector_norm": _mean_vector_norm,
    # Of what was added: b after all norms, raw before any.
    "branch_mean_square": Statistic(lambda s: s.branch_square / s.width),
    "branch_raw_mean_square": Statistic(_raw_mean_square),
    "cosine": Statistic(_cosine),
    # Δ‖x‖² = ‖b‖² + 2⟨x, b⟩.
    "delta_branch": Statistic(lambda s: s.branch_square),
    "delta_cross": Statistic(lambda s: 2 * s.cross),
    # m / (m + eps): the mean square that a norm of gain 1 gives by its definition.
    "eps_factor": Statistic(_eps_factor),
    # 1 where a token's stream holds an inf or a NaN.
    "non_finite": Statistic(lambda s: (~s.max_abs.isfinite()).to(s.after.dtype), "max"),
}

# Of the loss's gradient g with respect to the stream x: a step's ``after`` and ``branch`` are then g,
# its ``skip`` x.
GRADIENT_STATISTICS: dict[str, Statistic] = {
    "gradient_norm": _norm,
    "gradient_rms": Statistic(lambda s: s.square / s.width, "rms"),
    "gradient_mean_vector_norm": _mean_vector_norm,
    "gradient_cosine": Statistic(_gradient_cosine),
}
