"""The kernel of attention whose output is gated, o ← o·sigmoid(W_g x), its noise and linear response.

A gate's argument u is Gaussian with variance a_i = d·σ_g²·H_ii and the input's correlation ρ, and
independent of heads' weights and values. So with O the kernel without gates (``attention``) and
D(ρ) = E σ(u_i)σ(u_j), σ the sigmoid,

    B_ij = O_ij·D(ρ_ij), at a finite width O·(D + ½D''·Var ρ̂).

Backward, of a gradient with the kernel G at the output, the heads get D∘G, and a gate's argument σ'(u)
times its entries' o and gradient:

    (what attention gives of D∘G) + d·σ_g²·O∘G∘E σ'(u_i)σ'(u_j).

Between seeds the mean over gates of σ_i² varies, by F − e over their number, F = E σ_i²σ_j² and
e = E σ_i²·E σ_j². A gate multiplies an entry's square, of which E o_i²o_j² = O_iiO_jj + 2O_ij² is not
common to other entries, or a whole head's, whose values' noise is 2O_ij²/C:

    Cov(B̂_ii, B̂_jj) = e·Cov(Ô_ii, Ô_jj) + (F − e)·((O_iiO_jj + between heads)/gates + 2O_ij²/HC),

and likewise of B̂_ij with e = D². Both are exact at infinite width; of a functional's entries off the
diagonal only what moves with B_ii and B_jj is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from simlab.theory.laws import Array
from simlab.theory.mean_field.attention import AttentionBranch, AttentionKernel
from simlab.theory.mean_field.averages import at_nodes, expand, sigmoid
from simlab.theory.mean_field.band import pull_correlation
from simlab.theory.mean_field.branch import TINY, Branch, Input
from simlab.theory.mean_field.drawing import Context
from simlab.theory.mean_field.kernels import correlation, outer_square
from simlab.theory.mean_field.mlp import RELATIVE_STEP


def _square(z: Array) -> Array:
    """sigmoid(z)²."""
    return sigmoid(z) ** 2


def _slope(z: Array) -> Array:
    """d sigmoid/dz."""
    s = sigmoid(z)
    return s * (1 - s)


@dataclass(frozen=True, eq=False)
class GatedKernel:
    """One layer's attention with its output gate, called with a vector."""

    attention: AttentionKernel

    @property
    def gain(self) -> float:
        """d·σ_g²: the variance of a gate's argument over the input's mean square."""
        return self.attention.context.model.width * self.attention.stds["g_proj"] ** 2

    def dual(self, of: Callable[[Array], Array], h: Array) -> Any:
        """The expansion of a function of a gate's argument, for inputs with mean squares h (N,)."""
        return expand(at_nodes(of, self.gain * h))

    def __call__(self, v: Input) -> GatedBranch:
        """The gated output for inputs v."""
        h, rho = np.maximum(v.kernel.diagonal(), TINY), correlation(v.kernel)
        value, slope, curvature = self.dual(sigmoid, h).kernel(rho, derivatives=2)
        gates = value + 0.5 * curvature * v.correlation_variance
        own, lean = self.dual(sigmoid, h).square, None
        if not v.normed:
            step = RELATIVE_STEP * h
            above, below = (self.dual(sigmoid, x).square for x in (h + step, h - step))
            lean = (above - below) / (2 * step)
            second = (above - 2 * own + below) / RELATIVE_STEP**2
            own = own + 0.5 * second * np.minimum(v.relative_variance, 1.0)
        np.fill_diagonal(gates, own)
        (fourth,) = self.dual(_square, h).kernel(rho)
        (slopes,) = self.dual(_slope, h).kernel(rho)
        return GatedBranch(self, self.attention(v), gates, fourth, slopes, slope, lean)


@dataclass(frozen=True, eq=False)
class GatedBranch:
    """Gated attention's output, as ``kernels.Branch`` has it.

    one: attention without gates. gates: D. fourth: F. slopes: E σ'σ'. gate_slope: dD/dρ. (N, N) each.
    gate_lean: dD_ii/dH_ii (N,) of an input that no norm fixes, else None.
    """

    gated: GatedKernel
    one: AttentionBranch
    gates: Array
    fourth: Array
    slopes: Array
    gate_slope: Array
    gate_lean: Array | None

    @cached_property
    def kernel(self) -> Array:
        """B_ij (N, N)."""
        return self.one.kernel * self.gates

    @property
    def units(self) -> int:
        """Entries of all value heads, as without gates."""
        return self.one.units

    def _of_gates(self, apart: Array, values: Array) -> Array:
        """The factor of F − e: apart/gates + values/HC."""
        model = self.one.attention.context.model
        return apart / model.gates + values / (model.heads * model.head_dim)

    @property
    def _square_of_gates(self) -> Array:
        kernel = self.one.kernel
        apart = outer_square(kernel) + self.one.between_square
        return (self.fourth - outer_square(self.gates)) * self._of_gates(apart, 2 * kernel**2)

    @property
    def square(self) -> Array:
        """Cov(B̂_ii, B̂_jj): of heads and values, and of gates."""
        return outer_square(self.gates) * self.one.square + self._square_of_gates

    @property
    def cross(self) -> Array:
        """Var(B̂_ij), likewise."""
        kernel, mean = self.one.kernel, self.gates**2
        apart = kernel**2 + self.one.between_cross
        of_gates = self._of_gates(apart, outer_square(kernel) + kernel**2)
        return mean * self.one.cross + (self.fourth - mean) * of_gates

    @property
    def lean(self) -> Array | None:
        """Of the token's own gates alone."""
        return None if self.gate_lean is None else self.one.kernel.diagonal() * self.gate_lean

    @property
    def slope(self) -> Array:
        """dB_ij/dρ_ij, of the gates alone."""
        return self.one.kernel * self.gate_slope

    def covariance(self, functionals: Any) -> Array:
        """Between heads, of gates, and where two tokens' gates differ, of values."""
        ends = outer_square(self.gates)
        kernel, units = self.one.kernel, self.units
        out = self.one.covariance(functionals * self.gates)
        diagonal = functionals.diagonal(axis1=1, axis2=2)
        out += diagonal @ (2 * kernel**2 * (ends - self.gates**2) / units) @ diagonal.T
        halves = np.einsum("rij,ij->ri", functionals, self.kernel)
        halves /= np.maximum(self.kernel.diagonal(), TINY)
        out += halves @ self._square_of_gates @ halves.T
        return out

    def pull(self, functionals: Any) -> Any:
        """Through attention with its gates at their means, and through the gates."""
        out = self.one.pull(functionals * self.gates)
        of_gates, diagonal = pull_correlation(functionals, self.slope, self.one.input.kernel)
        if self.lean is not None:
            # B_ij goes with √(D_iiD_jj): half of each token's response on either side.
            share = self.lean / np.maximum(self.kernel.diagonal(), TINY)
            diagonal = diagonal + np.einsum("rij,ij->ri", functionals, self.kernel) * share
        out += of_gates
        index = np.arange(len(self.gates))
        out[:, index, index] += diagonal
        return out

    def pull_gradient(self, gradient: Array) -> Array:
        """Through attention and through the gates; see the module's docstring."""
        own = self.gated.gain * self.slopes * self.one.kernel * gradient
        return self.one.pull_gradient(self.gates * gradient) + own


def attention_of(
    context: Context, layer: int, stds: Mapping[str, float]
) -> Callable[[Input], Branch]:
    """A layer's attention, with its output gate where the model has one."""
    attention = AttentionKernel(context, layer, stds)
    return attention if context.model.attention_gate == "none" else GatedKernel(attention)
