"""The averages over mHC's coefficients (``model/mix.py``), Gaussian logits u of each token.

W is fresh, so the logits are independent of each other and of the streams; between tokens they have the
correlation ρ of the flattened streams. In law the n streams are exchangeable: x_t = x̄ + δ_t with
E⟨δ_t,i, δ_s,j⟩/d = (1[t = s] − 1/n)·Δ_ij. Theory keeps x̄ as its one vector and Δ beside it:

    written   x̄' = x̄ + q̄·F: a branch of kernel Q∘B, Q = E q̄q̄' = 1 + 4 Cov(σ(u), σ(u'))/n, exactly;
    apart     Δ' = κ(ρ)∘Δ + 4 Cov(σ, σ')∘B, κ = (n E Σ_j c_jt c'_jt − 1)/(n − 1), as c is doubly
              stochastic, or 1 where it is the identity;
    read      Σ p_j x_j/Σ p_j = x̄ + Σ w_j δ_j: a second vector of kernel R(ρ)∘Δ, R = E Σ w_j w'_j − 1/n.

Left out is that norms see one seed's coefficients, not their averages: measured at std 2.5, it makes
token cosines some 3 % too large, mean squares by less than seeds tell (1 %). κ and R are averages over
fixed draws. ``mixing_gradient`` goes backward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from simlab.config import ModelConfig
from simlab.schemes.streams import doubly_stochastic, mix_shape, read_logit
from simlab.theory.laws import Array
from simlab.theory.mean_field.averages import at_nodes, expand, sigmoid
from simlab.theory.mean_field.branch import Branch
from simlab.theory.mean_field.drawing import Context
from simlab.theory.mean_field.kernels import KernelStep, KernelVector, correlation

PAIRS, GRID = 2048, np.linspace(-1, 1, 33)  # draws of two tokens' logits, and their correlations
NODES, STEP = np.array([-1, -0.5, 0, 0.4, 0.7, 0.85, 0.95, 1]), 1e-4  # of their slopes


def logits_std(model: ModelConfig) -> float:
    """The std of u: s·σ·√(nd) of streams of rms 1 behind their norm; 0 without coefficients."""
    norm = model.norm
    inputs = (norm.streams or 0) * model.width
    return (norm.mix_scale or 0.0) * (norm.mix_std or 0.0) * math.sqrt(inputs)


@lru_cache(64)
def _drawn(streams: int, std: float, bias: float, mixes: bool) -> tuple[Array, Array]:
    """κ and R at the correlations of GRID."""
    generator = np.random.default_rng(0)
    count = streams * streams if mixes else 0
    z, fresh = generator.standard_normal((2, PAIRS, streams + count))
    kept, read = np.ones_like(GRID), np.empty_like(GRID)
    one = _coefficients(std * z, streams, bias)
    for i, rho in enumerate(GRID):
        other = _coefficients(std * (rho * z + math.sqrt(1 - rho**2) * fresh), streams, bias)
        read[i] = (one[0] * other[0]).sum(1).mean() - 1 / streams
        if mixes:
            kept[i] = ((one[1] * other[1]).sum((1, 2)).mean() - 1) / (streams - 1)
    return kept, read


@lru_cache(64)
def _slopes(streams: int, std: float, bias: float, mixes: bool) -> tuple[Array, Array]:
    """κ̇ and Ṙ, slopes in ρ, at NODES: std²·E Σ_k ∂_k c·∂_k c', along one direction of each draw."""
    generator = np.random.default_rng(1)
    count = streams * streams if mixes else 0
    z, fresh, way = generator.standard_normal((3, PAIRS, streams + count))

    def along(u: Array) -> tuple[Array, Array]:
        above, below = (_coefficients(u + h * way, streams, bias) for h in (STEP, -STEP))
        return (above[0] - below[0]) / (2 * STEP), (above[1] - below[1]) / (2 * STEP)

    kept, read = np.zeros_like(NODES), np.empty_like(NODES)
    one = along(std * z)
    for i, rho in enumerate(NODES):
        other = along(std * (rho * z + math.sqrt(1 - rho**2) * fresh))
        read[i] = std**2 * (one[0] * other[0]).sum(1).mean()
        if mixes:
            kept[i] = std**2 * (one[1] * other[1]).sum((1, 2)).mean() / (streams - 1)
    return kept, read


def _coefficients(u: Array, streams: int, bias: float) -> tuple[Array, Array]:
    """w (…, n) and c (…, n, n) of logits (…, n) and (…, n·n)."""
    p = sigmoid(u[:, :streams] + bias)
    rest = u[:, streams:].reshape(len(u), -1, streams)
    c = np.exp(rest - rest.max(-1, keepdims=True, initial=-np.inf))
    if c.size:
        c = doubly_stochastic(c / c.sum(-1, keepdims=True))
    return p / p.sum(1, keepdims=True), c


@dataclass(frozen=True, eq=False)
class WrittenBranch:
    """q̄·F as ``branch.Branch`` has it, of F's ``inner`` and Q; Q_ij − 1 is Cov(q̄_i, q̄_j)."""

    inner: Branch
    average: Array

    @property
    def kernel(self) -> Array:
        """Q∘B."""
        return self.average * self.inner.kernel

    @property
    def units(self) -> int:
        """F's."""
        return self.inner.units

    @property
    def relative_variance(self) -> Array:
        """Of q̄_i² between tokens and seeds (N,)."""
        q = self.average.diagonal()
        return (4 * (q - 1) + 2 * (q - 1) ** 2) / q**2

    @property
    def square(self) -> Array:
        """Cov of q̄_i²·B̂_ii: B̂'s, and with Gaussian q̄ Cov(q̄_i², q̄_j²) = 4c + 2c², c = Q − 1."""
        c, m, q = self.average - 1, self.inner.kernel.diagonal(), self.average.diagonal()
        return np.outer(q, q) * self.inner.square + np.outer(m, m) * (4 * c + 2 * c**2)

    @property
    def cross(self) -> Array:
        """Var of q̄_i·q̄_j·B̂_ij."""
        c = self.average - 1
        ends = np.add.outer(c.diagonal(), c.diagonal())
        return self.average**2 * self.inner.cross + self.inner.kernel**2 * (ends + 2 * c + c**2)

    @property
    def lean(self) -> Array | None:
        """Q_ii times F's."""
        return None if self.inner.lean is None else self.average.diagonal() * self.inner.lean

    @property
    def slope(self) -> Array:
        """Q times F's."""
        return self.average * self.inner.slope

    def covariance(self, functionals: Any) -> Array:
        """F's, and that of Σ A_ij·q̄_i·q̄_j·B_ij, whose part linear in q̄ − 1 is 2 Σ_i (A∘B)1_i·q̄_i."""
        c = self.average - 1
        weighed = functionals * self.inner.kernel
        rows, own = weighed.sum(2), np.einsum("jii->ji", weighed)
        out: Array = self.inner.covariance(functionals * self.average)
        return out + 4 * rows @ c @ rows.T + 2 * own @ c**2 @ own.T

    def pull(self, functionals: Any) -> Any:
        """Through Q."""
        return self.inner.pull(functionals * self.average)

    def pull_gradient(self, gradient: Array) -> Array:
        """Through Q."""
        return self.inner.pull_gradient(gradient * self.average)


@dataclass(frozen=True, eq=False)
class ReadBranch:
    """Σ w_j·δ_j as ``branch.Branch`` has it: a vector whose kernel is taken as it is."""

    kernel: Array
    units: int = 10**9  # a kernel without noise
    lean: Array | None = None

    @property
    def square(self) -> Array:
        """0."""
        return np.zeros_like(self.kernel)

    cross = slope = square

    def covariance(self, functionals: Any) -> Array:
        """0."""
        return np.zeros((len(functionals), len(functionals)))

    def pull(self, functionals: Any) -> Any:
        """0."""
        return np.zeros_like(functionals)

    def pull_gradient(self, gradient: Array) -> Array:
        """0."""
        return np.zeros_like(gradient)


@dataclass(frozen=True, eq=False)
class MixedStreams:
    """A step's n streams and coefficients, as ``mixing_gradient`` needs them.

    mean, square: mean squares (N,) of x̄ and of the streams. apart: Δ. kept: κ. read: R. write:
    Cov(q, q'). Slopes are those in ρ; (N, N).
    """

    n: int
    mean: Array
    square: Array
    apart: Array
    kept: Array
    read: Array
    write: Array
    kept_slope: Array
    read_slope: Array
    write_slope: Array


@dataclass(frozen=True, eq=False)
class MeanCoefficients:
    """As ``schemes.streams.Coefficients``, of streams that stand for their mean, and F for q̄·F."""

    step: KernelStep
    write: tuple[float, ...]
    noise: Array | None
    kept: None = None

    def read(self, state: tuple[KernelVector, ...]) -> KernelVector:
        """x̄ + Σ w_j·δ_j, of the scale of x̄: a norm acts next."""
        mean, noise = state[0], self.noise
        if noise is None:
            return mean
        return mean + self.step.feed(lambda _: ReadBranch(noise), part=True)(mean)


def mixing(context: Context, stds: Mapping[str, float], step: KernelStep) -> Any:
    """The part ``mix`` in a step."""
    norm = context.model.norm
    n, _ = mix_shape(norm)

    def mix(state: tuple[KernelVector, ...]) -> MeanCoefficients:
        mean = step.start.kernel
        apart = np.zeros_like(mean) if step.start.apart is None else step.start.apart
        streams = mean + (1 - 1 / n) * apart
        square = streams.diagonal()
        variances = logits_std(context.model) ** 2 * square / (square + norm.eps)
        rho = correlation(streams)
        products, slope = expand(at_nodes(sigmoid, variances)).kernel(rho, derivatives=1)
        covariance = 4 * (products - 0.25)
        std = float(f"{math.sqrt(variances.mean()):.3g}")
        bias = read_logit(norm)
        kept, read = (np.interp(rho, GRID, v) for v in _drawn(n, std, bias, bool(norm.mix_streams)))

        def mixed() -> MixedStreams:
            slopes = _slopes(n, std, bias, bool(norm.mix_streams))
            own = (*(np.interp(rho, NODES, v) for v in slopes), 4 * slope)
            return MixedStreams(n, mean.diagonal(), square, apart, kept, read, covariance, *own)

        step.mixed = mixed

        def written(branch: Branch) -> Branch:
            step.apart = kept * apart + covariance * branch.kernel
            return WrittenBranch(branch, 1 + covariance / n)

        step.written = written
        noise = read * apart
        small = np.abs(noise).max() < 1e-6 * mean.diagonal().mean()
        return MeanCoefficients(step, (1.0,) * n, None if small else noise)

    return mix
