"""The kernel of an MLP's output, its noise between seeds, and its linear response.

A hidden unit sees two Gaussians per token, gate and up, with variances a_i = d·σ_gate²·H_ii and
u_i = d·σ_up²·H_ii and the input's correlation ρ. So with F units

    B_ij = F·σ_down²·√(u_i u_j)·ρ·E φ(√a_i z)φ(√a_j z'),

and without a gate, φ acting on up, B_ij = F·σ_down²·E φφ. At a finite width ρ̂ varies by τ² between
seeds: E D(ρ̂) = D(ρ) + ½D''(ρ)τ². The diagonal is exact where a norm fixes H_ii; else it gets
½B''(m)·Var(m) too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from simlab.config import ModelConfig
from simlab.theory.laws import Array
from simlab.theory.mean_field import averages
from simlab.theory.mean_field.averages import at_nodes, expand
from simlab.theory.mean_field.band import pull_correlation
from simlab.theory.mean_field.branch import TINY, Input
from simlab.theory.mean_field.kernels import correlation, outer_square

RELATIVE_STEP = 0.02  # relative, of the numerical derivative in the input's mean square


@dataclass(frozen=True)
class Unit:
    """A hidden unit: its activation φ and φ', and if φ(gate) multiplies up."""

    phi: Callable[[Array], Array]
    slope: Callable[[Array], Array]
    gated: bool


UNITS = {
    "swiglu": Unit(averages.silu, averages.silu_slope, True),
    "geglu": Unit(averages.gelu, averages.gelu_slope, True),
    "gelu": Unit(averages.gelu, averages.gelu_slope, False),
    "gelu_exact": Unit(averages.gelu_exact, averages.gelu_exact_slope, False),
    "relu2": Unit(averages.relu2, averages.relu2_slope, False),
}


@dataclass(frozen=True, eq=False)
class MLPKernel:
    """One layer's MLP, called with a vector; ``stds``: by role, the true (truncated) ones."""

    model: ModelConfig
    stds: Mapping[str, float]

    @property
    def unit(self) -> Unit:
        """Its hidden unit."""
        return UNITS[self.model.mlp]

    def gain(self, role: str) -> float:
        """d·σ² of an input matrix: the variance of its output over the input's mean square."""
        return self.model.width * self.stds[role] ** 2

    @property
    def scale(self) -> float:
        """F·σ_down², times d·σ_up² of a gated unit: the output over E of the unit's square."""
        down = self.model.d_ff * self.stds["down_proj"] ** 2
        return down * self.gain("up_proj") if self.unit.gated else down

    def activated(self, h: Array) -> Array:
        """Variances (N,) of what φ acts on, for inputs with mean square h."""
        return self.gain("gate_proj" if self.unit.gated else "up_proj") * h

    def ends(self, h: Array) -> Array:
        """√(H_ii H_jj) of a gated unit, which is linear in up; 1 of a plain one."""
        root = np.sqrt(h)
        return np.outer(root, root) if self.unit.gated else np.ones((len(h), len(h)))

    def mean_square(self, h: Array) -> Array:
        """B_ii (N,) for inputs with mean square h."""
        square = at_nodes(self.unit.phi, self.activated(h)) ** 2 @ averages.WEIGHTS
        return self.scale * square * (h if self.unit.gated else 1.0)

    def __call__(self, v: Input) -> MLPBranch:
        """The MLP's output for inputs v."""
        unit, kernel = self.unit, v.kernel
        h, rho = np.maximum(kernel.diagonal(), TINY), correlation(kernel)
        values = at_nodes(unit.phi, self.activated(h))
        expansion = expand(values)
        value, slope, curvature = expansion.kernel(rho, int(unit.gated), derivatives=2)
        ends = self.scale * self.ends(h)
        out = ends * (value + 0.5 * curvature * v.correlation_variance)
        mean_square, lean = self.mean_square(h), None
        if not v.normed:
            step = RELATIVE_STEP * h
            above, below = self.mean_square(h + step), self.mean_square(h - step)
            lean = (above - below) / (2 * step)
            second = (above - 2 * mean_square + below) / RELATIVE_STEP**2
            mean_square = mean_square + 0.5 * second * np.minimum(v.relative_variance, 1.0)
        np.fill_diagonal(out, mean_square)
        return MLPBranch(self, kernel, rho, out, self._noise(h, rho, values), lean, ends * slope)

    def _noise(self, h: Array, rho: Array, values: Array) -> Array:
        """Cov of the units' squares of two tokens, over F: that of B̂_ii and B̂_jj (N, N).

        values: φ at the nodes. E up_i²up_j² = u_i u_j (1 + 2ρ²).
        """
        squares = expand(values**2)
        (product,) = squares.kernel(rho)
        fourth = 1 + 2 * rho**2 if self.unit.gated else 1.0
        mean = squares.coefficients[:, 0]
        return (
            (self.scale * self.ends(h)) ** 2
            * (product * fourth - np.outer(mean, mean))
            / self.model.d_ff
        )


@dataclass(frozen=True, eq=False)
class MLPBranch:
    """An MLP's output, as ``kernels.Branch`` has it. input: H (N, N). rho: its correlations."""

    mlp: MLPKernel
    input: Array
    rho: Array
    kernel: Array
    square: Array
    lean: Array | None
    slope: Array

    @property
    def units(self) -> int:
        """F."""
        return self.mlp.model.d_ff

    @property
    def cross(self) -> Array:
        """Var(B̂_ij) of F units: Wishart's."""
        return (outer_square(self.kernel) + self.kernel**2) / self.units

    def covariance(self, functionals: Any) -> Array:
        """On the diagonal the units' own fourth moments, in place of Gaussian units'."""
        diagonal = functionals.diagonal(axis1=1, axis2=2)
        own = self.square - 2 * self.kernel**2 / self.units
        out: Array = diagonal @ own @ diagonal.T
        return out

    def pull(self, functionals: Any) -> Any:
        """Through the correlations, and the lean on δH_ii."""
        out, diagonal = pull_correlation(functionals, self.slope, self.input)
        if self.lean is not None:
            # B_ij goes with √(B_iiB_jj): half of each token's response on either side.
            share = self.lean / np.maximum(self.kernel.diagonal(), TINY)
            diagonal = diagonal + np.einsum("rij,ij->ri", functionals, self.kernel) * share
        index = np.arange(len(self.input))
        out[:, index, index] += diagonal
        return out

    def pull_gradient(self, gradient: Array) -> Array:
        """G_h = d·σ_down²·G; of a gated unit du = G_h·E φφ, dg = G_h·E φ'φ'·d·σ_up²·H."""
        mlp, unit, stds = self.mlp, self.mlp.unit, self.mlp.stds
        a = mlp.activated(np.maximum(self.input.diagonal(), TINY))
        hidden = mlp.gain("down_proj") * gradient
        (slopes,) = expand(at_nodes(unit.slope, a)).kernel(self.rho)
        if not unit.gated:
            return mlp.model.d_ff * stds["up_proj"] ** 2 * hidden * slopes
        up = hidden * expand(at_nodes(unit.phi, a)).kernel(self.rho)[0]
        gate = hidden * slopes * mlp.gain("up_proj") * self.input
        return mlp.model.d_ff * (stds["up_proj"] ** 2 * up + stds["gate_proj"] ** 2 * gate)
