"""What is measured at each step of the residual stream: small named functions of one step.

Each takes a ``Step`` of float64 tensors (float32 where the device has no float64) and gives one
number per token; the probe reduces over tokens with the statistic's ``reduce``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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


def _of_branch(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Step], Tensor]:
    """A statistic of (skip, branch), NaN where nothing is added."""

    def statistic(step: Step) -> Tensor:
        if step.skip is None or step.branch is None:
            return torch.full_like(step.after[..., 0], torch.nan)
        return function(step.skip, step.branch)

    return statistic


def _cosine(skip: Tensor, branch: Tensor) -> Tensor:
    return (skip * branch).sum(-1) / (skip.norm(dim=-1) * branch.norm(dim=-1))


def _raw_mean_square(step: Step) -> Tensor:
    if step.raw is None:
        return torch.full_like(step.after[..., 0], torch.nan)
    return step.raw.pow(2).mean(-1)


def _eps_factor(step: Step) -> Tensor:
    if step.moment is None:
        return torch.full_like(step.after[..., 0], torch.nan)
    return step.moment / (step.moment + step.eps)


@dataclass(frozen=True)
class Statistic:
    """A function of a step to one number per token (B, T), and how tokens are reduced."""

    per_token: Callable[[Step], Tensor]
    reduce: str = "mean"  # mean | max


STATISTICS: dict[str, Statistic] = {
    # Of the stream x after the step.
    "norm": Statistic(lambda s: s.after.norm(dim=-1)),
    "mean_square": Statistic(lambda s: s.after.pow(2).mean(-1)),
    "mean": Statistic(lambda s: s.after.mean(-1)),
    "mean_abs": Statistic(lambda s: s.after.abs().mean(-1)),
    "max_abs": Statistic(lambda s: s.after.abs().amax(-1), "max"),
    # Of what was added: b after all norms, raw before any.
    "branch_mean_square": Statistic(_of_branch(lambda x, b: b.pow(2).mean(-1))),
    "branch_raw_mean_square": Statistic(_raw_mean_square),
    "cosine": Statistic(_of_branch(_cosine)),
    # Δ‖x‖² = ‖b‖² + 2⟨x, b⟩.
    "delta_branch": Statistic(_of_branch(lambda x, b: b.pow(2).sum(-1))),
    "delta_cross": Statistic(_of_branch(lambda x, b: 2 * (x * b).sum(-1))),
    # m / (m + eps): the mean square that a norm of gain 1 gives by its definition.
    "eps_factor": Statistic(_eps_factor),
    # 1 where a token's stream holds an inf or a NaN.
    "non_finite": Statistic(lambda s: (~s.after.isfinite()).any(-1).to(s.after.dtype), "max"),
}
