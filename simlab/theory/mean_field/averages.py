"""Averages of an activation over Gaussian inputs, by an expansion in Hermite polynomials.

φ(√a·z) = Σ_k c_k(a) h_k(z), h_k the normalised probabilists' Hermite polynomials, so that for two
standard normals with correlation ρ (Mehler's formula; Daniely et al., arXiv 1602.05897, §4)

    E φ(√a z)·φ(√b z') = Σ_k c_k(a)·c_k(b)·ρ^k.

The sum stops at DEGREE; what is missing of E φ² at ρ = 1 is given to the next power.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from simlab.theory.laws import Array

DEGREE = 24
NODES, FINEST, FARTHEST = 160, 0.15, 13.0  # of ``_quadrature``


def _quadrature() -> tuple[Array, Array]:
    """Nodes and weights (NODES,) of an average over a standard normal.

    The trapezoidal rule in t, z = FINEST·sinh(t) (Trefethen & Weideman, SIAM Review 56, 2014, §14): its
    nodes are densest at 0, where an activation of a large variance a bends within 1/√a. There 120
    nodes of Gauss–Hermite were off by 1 % of E gelu'² at a = 30 and 5 % at 100; these are by less than
    10⁻¹¹ up to a = 3000, 10⁻⁵ at 10⁴ and 0.2 % beyond, and by 10⁻⁹ of polynomials' products.
    """
    t = np.linspace(-1, 1, NODES) * math.asinh(FARTHEST / FINEST)
    z = FINEST * np.sinh(t)
    weights = np.exp(-(z**2) / 2) * np.cosh(t)
    return z, weights / weights.sum()


def _polynomials(z: Array) -> Array:
    """h_0 … h_DEGREE at z: (DEGREE + 1, n)."""
    values = [np.ones_like(z), z]
    for k in range(1, DEGREE):
        values.append((z * values[k] - math.sqrt(k) * values[k - 1]) / math.sqrt(k + 1))
    return np.stack(values)


Z, WEIGHTS = _quadrature()
HERMITE = _polynomials(Z)


def silu(z: Array) -> Array:
    """z·σ(z)."""
    return z * sigmoid(z)


def sigmoid(z: Array) -> Array:
    """1/(1 + e^−z), by tanh, which doesn't overflow."""
    out: Array = 0.5 * (1 + np.tanh(0.5 * z))
    return out


def silu_slope(z: Array) -> Array:
    """d silu/dz."""
    s = sigmoid(z)
    return s * (1 + z * (1 - s))


def gelu(z: Array) -> Array:
    """GELU in its tanh approximation (arXiv 1606.08415, §2)."""
    return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def gelu_slope(z: Array) -> Array:
    """d gelu/dz."""
    root = math.sqrt(2 / math.pi)
    t = np.tanh(root * (z + 0.044715 * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * root * (1 + 3 * 0.044715 * z**2)


def _normal_cdf(z: Array) -> Array:
    """Φ(z)."""
    from scipy.special import ndtr  # late: for these two alone

    out: Array = ndtr(z)
    return out


def gelu_exact(z: Array) -> Array:
    """z·Φ(z)."""
    return z * _normal_cdf(z)


def gelu_exact_slope(z: Array) -> Array:
    """d gelu_exact/dz = Φ(z) + z·φ(z)."""
    out: Array = _normal_cdf(z) + z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return out


def relu2(z: Array) -> Array:
    """max(z, 0)²."""
    return np.maximum(z, 0) ** 2


def relu2_slope(z: Array) -> Array:
    """d relu2/dz."""
    return 2 * np.maximum(z, 0)


@dataclass(frozen=True)
class Expansion:
    """Of φ(√a_i·z) for N variances a. coefficients (N, DEGREE + 1); square (N): E φ²."""

    coefficients: Array
    square: Array

    def kernel(self, rho: Array, extra: int = 0, derivatives: int = 0) -> list[Array]:
        """D_ij = ρ_ij^extra · E φ(√a_i z)·φ(√a_j z'), and up to two derivatives in ρ. (N, N) each.

        Horner's scheme for the value and the derivatives at once.
        """
        rest = np.sqrt(np.maximum(self.square - (self.coefficients**2).sum(1), 0))
        columns = [None] * extra + [c if c.any() else None for c in self.coefficients.T]
        parts = [rest[:, None] * rest, *np.zeros((derivatives, *rho.shape))]
        for column in reversed(columns):
            for n in range(derivatives, 0, -1):
                parts[n] *= rho
                parts[n] += parts[n - 1]
            parts[0] *= rho
            if column is not None:
                parts[0] += column[:, None] * column
        return [part * math.factorial(n) for n, part in enumerate(parts)]


def expand(values: Array) -> Expansion:
    """The expansion of φ(√a_i·z) from its values at the nodes Z, (N, NODES).

    silu and gelu are half their argument and an even function: no other odd terms but rounding's.
    """
    coefficients, square = (values * WEIGHTS) @ HERMITE.T, (values * values) @ WEIGHTS
    coefficients[:, (coefficients**2 < 1e-20 * square[:, None]).all(0)] = 0
    return Expansion(coefficients, square)


def at_nodes(phi: Callable[[Array], Array], a: Array) -> Array:
    """φ(√a_i·z) (N, NODES) for variances a (N,)."""
    return phi(np.sqrt(a)[:, None] * Z)


LOGNORMAL = np.polynomial.hermite_e.hermegauss(16)


def saturation(mean: Array, relative_variance: Array, eps: float) -> Array:
    """E[m/(m + eps)] (N,) of lognormal m with the given means and relative variances."""
    z, weights = LOGNORMAL
    sigma = np.sqrt(np.log1p(np.maximum(relative_variance, 0)))[:, None]
    m = mean[:, None] * np.exp(sigma * z - sigma**2 / 2)
    out: Array = (m / (m + eps)) @ weights / weights.sum()
    return out
