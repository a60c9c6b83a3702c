"""A function of each entry in a norm's place, y = g·φ(αx): its kernel, its slopes, its noise.

x_i and x_j are Gaussian per entry, with kernel K, once fresh matrices have made them. For φ = erf
(Williams, Neural Computation 10, 1998), and by its derivatives (Price's theorem),

    H_ij = g²·E φ(αx_i)φ(αx_j) = (2/π)·g²·asin(u/√v),   u = 2α²K_ij,  v = (1 + 2α²K_ii)(1 + 2α²K_jj),
    E y'(x_i)·y'(x_j) = ∂H_ij/∂K_ij = (2/π)·g²·2α²/√(v − u²).

tanh is a sum of such erf's: a logistic variable is a Gaussian one of a random scale (Andrews & Mallows,
JRSS B 36, 1974), tanh(x) = E erf(x/(k√2)), k Kolmogorov's. So H_ij is a sum over pairs of them, with
2αα'K_ij for u and (1 + 2α²K_ii)(1 + 2α'²K_jj) for v.

y is not linear in x, so it is a new base vector of a step; its correlation with x is never asked for
where sublayers alone get it (``limits``). Given K̂, Ĥ varies by the part of y_i·y_j that isn't
linear in the products x_i·x_j.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from simlab.config import ModelConfig
from simlab.theory.laws import Array
from simlab.theory.mean_field.averages import Expansion, at_nodes, expand
from simlab.theory.mean_field.branch import TINY, Input
from simlab.theory.mean_field.kernels import (
    KernelStep,
    KernelVector,
    Term,
    correlation,
    outer_square,
)
from simlab.theory.mean_field.mlp import RELATIVE_STEP

# φ(x) = Σ_p weight·erf(scale·x), by norm type. Of tanh: Gauss's quadrature over ln k, k Kolmogorov's,
# with 6 nodes; off by 3·10⁻⁶ at most, and its slope by 1.1·10⁻⁵.
MIXTURES: dict[str, tuple[tuple[float, float], ...]] = {
    "dyt": (
        (1.84259243, 0.00748472), (1.35224553, 0.13130283), (0.98249334, 0.39785672),
        (0.70307276, 0.35767482), (0.50393205, 0.10042087), (0.36381496, 0.00526004),
    ),
    "derf": ((1.0, 1.0),),
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """One pair of erf's in E y_i·y_j, all (N, N): H_ij, ∂H/∂K_ij, ∂²H/∂K_ij², and ∂H/∂K_ii."""

    kernel: Array
    slope: Array
    curvature: Array
    tilt: Array

    def __add__(self, other: Pair) -> Pair:
        return Pair(
            self.kernel + other.kernel, self.slope + other.slope,
            self.curvature + other.curvature, self.tilt + other.tilt,
        )  # fmt: skip


@dataclass(frozen=True)
class Squash:
    """One element-wise norm. alpha, gain: α and g."""

    type: str
    alpha: float
    gain: float

    @classmethod
    def of(cls, model: ModelConfig, kind: str) -> Squash:
        """The one of a model's ``attention`` or ``mlp``, or its ``final`` one, whose gain is 1."""
        norm = model.norm
        return cls(norm.type, norm.squash_alpha(kind), 1.0 if kind == "final" else norm.gain)

    @property
    def parts(self) -> Iterator[tuple[float, float]]:
        """y = Σ weight·erf(scale·x): scales and weights."""
        for scale, weight in MIXTURES[self.type]:
            yield self.alpha * scale, self.gain * weight

    def values(self, h: Array) -> Array:
        """y at the nodes of the average over inputs of mean square h (N,): (N, NODES)."""
        from scipy.special import erf  # late: for this alone

        return at_nodes(lambda z: sum(w * erf(s * z) for s, w in self.parts), h)

    def mean_square(self, h: Array) -> Array:
        """H_ii (N,) of inputs with mean square h."""
        out = np.zeros_like(h)
        for s, weight in self.parts:
            for t, other in self.parts:
                v = (1 + 2 * s * s * h) * (1 + 2 * t * t * h)
                out += weight * other * 2 / math.pi * np.arcsin(2 * s * t * h / np.sqrt(v))
        return out

    def pairs(self, kernel: Array) -> Pair:
        """H and its derivatives of K (N, N)."""
        h = np.maximum(kernel.diagonal(), 0)
        found = [self._pair(kernel, h, *one, *other) for one in self.parts for other in self.parts]
        return sum(found[1:], found[0])

    @staticmethod
    def _pair(k: Array, h: Array, s: float, weight: float, t: float, other: float) -> Pair:
        own = 1 + 2 * s * s * h
        u, v = 2 * s * t * k, np.outer(own, 1 + 2 * t * t * h)
        factor, rest = weight * other * 2 / math.pi, np.sqrt(v - u * u)
        slope = factor * 2 * s * t / rest
        return Pair(
            factor * np.arcsin(u / np.sqrt(v)), slope, slope * u * 2 * s * t / rest**2,
            -factor * u * s * s / own[:, None] / rest,
        )  # fmt: skip

    def linear(self, kernel: Array) -> Array:
        """E y'(x_i) (N,): the number of x_i in y_i."""
        h = kernel.diagonal()
        parts = (w * s / np.sqrt(1 + 2 * s * s * h) for s, w in self.parts)
        out: Array = 2 / math.sqrt(math.pi) * sum(parts, np.zeros_like(h))
        return out

    def __call__(self, v: Input, width: int) -> SquashBranch:
        """Its outputs for inputs v of a width."""
        h = np.maximum(v.kernel.diagonal(), TINY)
        pair, step = self.pairs(v.kernel), RELATIVE_STEP * h
        out = pair.kernel + 0.5 * pair.curvature * outer_square(v.kernel) * v.correlation_variance
        square, above, below = (self.mean_square(x) for x in (h, h + step, h - step))
        second = (above - 2 * square + below) / RELATIVE_STEP**2
        np.fill_diagonal(out, square + 0.5 * second * np.minimum(v.relative_variance, 1.0))
        own, number = self._noise(h, correlation(v.kernel)) / width, self.linear(v.kernel)
        linear = np.outer(number, number) * v.kernel
        return SquashBranch(v.kernel, out, own, pair.slope, pair.tilt, linear, width)

    def _noise(self, h: Array, rho: Array) -> Array:
        """Cov(y_i², y_j²) of an entry (N, N), without the part that is linear in K̂_ii and K̂_jj."""
        squares = expand(self.values(h) ** 2)
        coefficients = squares.coefficients.copy()
        coefficients[:, [0, 2]] = 0
        rest = np.maximum(squares.square - (squares.coefficients**2).sum(1), 0)
        (out,) = Expansion(coefficients, (coefficients**2).sum(1) + rest).kernel(rho)
        return out


@dataclass(frozen=True, eq=False)
class SquashBranch:
    """An element-wise norm's output, as ``kernels.Branch`` has it. input: K (N, N).

    between: ∂H_ij/∂K_ij = E y'(x_i)·y'(x_j). tilt: ∂H_ij/∂K_ii. linear: the kernel of the part of y
    that is linear in x. All (N, N).
    """

    input: Array
    kernel: Array
    square: Array
    between: Array
    tilt: Array
    linear: Array
    units: int

    @property
    def lean(self) -> Array:
        """dH_ii/dK_ii (N,)."""
        out: Array = self.between.diagonal() + 2 * self.tilt.diagonal()
        return out

    @property
    def slope(self) -> Array:
        """∂H_ij/∂ρ_ij."""
        return self.between * np.sqrt(outer_square(self.input))

    @property
    def cross(self) -> Array:
        """Var(Ĥ_ij) given K̂, i ≠ j: as if the part that isn't linear in x were Gaussian."""
        both = outer_square(self.kernel) + self.kernel**2
        return np.maximum(both - outer_square(self.linear) - self.linear**2, 0) / self.units

    def covariance(self, functionals: Any) -> Array:
        """Cov(⟨A_i, Ĥ⟩, ⟨A_j, Ĥ⟩) (J, J) given K̂; exact on the diagonal of Ĥ, else as ``cross``."""
        out = np.zeros((len(functionals), len(functionals)))
        for kernel, sign in ((self.kernel, 2), (self.linear, -2)):
            product = functionals @ kernel
            flat = product.reshape(len(out), -1), product.swapaxes(1, 2).reshape(len(out), -1)
            out += sign / self.units * (flat[0] @ flat[1].T)
        diagonal = functionals.diagonal(axis1=1, axis2=2)
        own = self.square - 2 * (self.kernel**2 - self.linear**2) / self.units
        total: Array = out + diagonal @ own @ diagonal.T
        return total

    def pull(self, functionals: Any) -> Any:
        """Through K_ij, and through K_ii and K_jj."""
        out = functionals * self.between
        index = np.arange(len(self.input))
        out[:, index, index] += 2 * np.einsum("rij,ij->ri", functionals, self.tilt)
        return out

    def pull_gradient(self, gradient: Array) -> Array:
        """G_ij·E y'(x_i)·y'(x_j)."""
        return gradient * self.between


def norm_of(
    step: KernelStep, model: ModelConfig, kind: str
) -> Callable[[KernelVector], KernelVector]:
    """A step's norm as a formula calls it. kind: ``attention`` or ``mlp``."""
    return squashed(step, Squash.of(model, kind)) if model.norm.elementwise else step.norm


def squashed(step: KernelStep, squash: Squash) -> Callable[[KernelVector], KernelVector]:
    """A step's element-wise norm as a formula calls it: to a new base vector, for sublayers alone.

    It has no fresh matrix: given the input's Gram matrix, its output varies less than a sublayer's.
    """

    def apply(v: KernelVector) -> KernelVector:
        spread = v.total_square, v.correlation_variance
        branch = squash(Input(v.kernel, *spread, v.normed), step.width)
        index, lean = len(step.kernels), branch.lean
        step.kernels.append(branch.kernel)
        step.branches[index] = branch, v.terms
        step.events.append(("squash", index))
        return KernelVector(
            step, (Term(index, 1.0),), branch.kernel,
            branch.square + lean[:, None] * v.square * lean, branch.cross, lean * v.lean,
            branch.slope * np.sqrt(v.correlation_variance),
        )  # fmt: skip

    return apply
