"""The kernel of experts that a router picks from, its noise between seeds, and its linear response.

A token's output is Σ_e w_e·f_e(x), f_e independent MLPs, w the shares that the router gives. The logits
of an expert are Gaussian, with variance a = d·σ_router²·H_ii and the input's correlation ρ, independent
from expert to expert. With K the kernel of one MLP's output (``mlp``), and averages over the logits,

    B_ij = R(ρ)·K_ij,    R = E Σ_e w_e w'_e.

Backward, the gradient G at the output comes through the experts, and through w, whose derivatives in
the logits are w_e'·(δ_e'e − p_e) (p: the softmax over all experts, or w where it is renormalised):

    R·(what an MLP gives of G) + d·σ_router²·T·K∘G,    T = E Σ_e w_e w'_e (1 − p_e − p'_e + Σ p p').

Between seeds Σ_e w_e² varies, at every width, and of the noise of one MLP's units there is
E Σ_e w_e²w'_e². The averages are functions of the angle arccos ρ and of a alone. They are taken over
fixed draws, at ANGLES and at values of ln a that are LN_STEP apart, and interpolated: picking makes
them linear in the angle near 0.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from simlab.theory.laws import Array
from simlab.theory.mean_field.branch import TINY, Input
from simlab.theory.mean_field.drawing import Array32
from simlab.theory.mean_field.mlp import MLPBranch, MLPKernel

LOGITS = 1 << 20  # logits per angle: E Σ w² is known to 0.3 % with 64 experts, 0.05 % with 8
ANGLES = np.linspace(0, math.pi, 17)
LN_STEP = 0.1
NARROW = 0.02  # the least sine of the angle, by which the slope in ρ diverges


@dataclass(frozen=True)
class Router:
    """experts, per_token: how many there are, and picked. renormalised: the picked ones sum to 1."""

    experts: int
    per_token: int
    renormalised: bool

    def shares(self, logits: Array32) -> tuple[Array32, Array32]:
        """w and p (M, E) of logits (M, E)."""
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        if self.per_token == self.experts:
            return p, p
        cut = np.partition(p, -self.per_token, axis=1)[:, -self.per_token, None]
        w = np.where(p >= cut, p, 0)
        if not self.renormalised:
            return w, p
        w /= w.sum(1, keepdims=True)
        return w, w


@functools.lru_cache(64)
def _table(router: Router, step: int) -> Array:
    """The averages (5, ANGLES) where ln a is ``step`` · LN_STEP, in the order of ``Averages``."""
    generator = np.random.default_rng(0)
    size = max(2, LOGITS // router.experts), router.experts
    one, other = (generator.standard_normal(size, dtype=np.float32) for _ in range(2))
    root = np.float32(math.exp(step * LN_STEP / 2))
    w, p = router.shares(root * one)
    square = (w * w).sum(1)
    columns = []
    for angle in ANGLES:
        turned = np.float32(math.cos(angle)) * one + np.float32(math.sin(angle)) * other
        v, q = router.shares(root * turned)
        both = w * v
        sums = both.sum(1)
        through = (both * (1 - p - q)).sum(1) + sums * (p * q).sum(1)
        spread = np.mean(square * (v * v).sum(1)) - np.mean(square) * np.mean((v * v).sum(1))
        columns.append(
            [sums.mean(), (both * both).sum(1).mean(), spread, sums.var(), through.mean()]
        )
    return np.array(columns, dtype=np.float64).T


@dataclass(frozen=True, eq=False)
class Averages:
    """Functions of two tokens' logits, (N, N) each, and R's derivative in ρ.

    overlap: R. fourth: E Σ w²w'². square: Cov(Σ w², Σ w'²). cross: Var(Σ w w'). through: T.
    """

    overlap: Array
    fourth: Array
    square: Array
    cross: Array
    through: Array
    slope: Array


def averages_of(router: Router, variance: float, rho: Array) -> Averages:
    """The averages for logits of a variance and tokens of correlations ρ (N, N)."""
    place = math.log(max(variance, 1e-6)) / LN_STEP
    low = math.floor(place)
    part = place - low
    table = (1 - part) * _table(router, low) + part * _table(router, low + 1)
    angle = np.arccos(rho)
    values = [np.interp(angle, ANGLES, row) for row in table]
    right, left = (np.clip(angle + w, 0, math.pi) for w in (ANGLES[1] / 2, -ANGLES[1] / 2))
    rise = np.interp(right, ANGLES, table[0]) - np.interp(left, ANGLES, table[0])
    slope = -rise / (right - left) / np.maximum(np.sin(angle), NARROW)
    overlap, fourth, square, cross, through = values
    return Averages(overlap, fourth, square, cross, through, slope)


@dataclass(frozen=True, eq=False)
class ExpertsKernel:
    """One layer's experts, each an MLP as ``mlp`` says, called with a normed vector."""

    mlp: MLPKernel

    def __call__(self, v: Input) -> ExpertsBranch:
        """The experts' output for inputs v."""
        one, model = self.mlp(v), self.mlp.model
        assert model.experts is not None
        assert model.experts_per_token is not None
        router = Router(model.experts, model.experts_per_token, model.renormalise_experts)
        variance = self.mlp.gain("router") * float(v.kernel.diagonal().mean())
        rho = one.rho.copy()
        np.fill_diagonal(rho, 1.0)
        of = averages_of(router, variance, rho)
        diagonal = one.kernel.diagonal()
        return ExpertsBranch(
            self.mlp, one.input, one.rho, of.overlap * one.kernel,
            of.fourth * one.square + of.square * np.outer(diagonal, diagonal), None,
            of.overlap * one.slope + of.slope * one.kernel, one, of,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class ExpertsBranch(MLPBranch):
    """The experts' output. one: that of one MLP in their place. averages: over the router."""

    one: MLPBranch
    averages: Averages

    @property
    def units(self) -> int:
        """F times the number of experts of one share with the same E Σ w⁴/(E Σ w²)²."""
        overlap = float(self.averages.overlap.diagonal().mean())
        fourth = float(self.averages.fourth.diagonal().mean())
        return max(1, round(self.mlp.model.d_ff * overlap**2 / max(fourth, TINY)))

    @property
    def cross(self) -> Array:
        """Var(B̂_ij): of the units that both tokens see, and of what the tokens share."""
        return self.averages.fourth * self.one.cross + self.averages.cross * self.one.kernel**2

    def pull_gradient(self, gradient: Array) -> Array:
        """Through the experts and through their shares; see the module's docstring."""
        logits = self.mlp.gain("router") * self.averages.through * self.one.kernel * gradient
        return self.averages.overlap * self.one.pull_gradient(gradient) + logits
