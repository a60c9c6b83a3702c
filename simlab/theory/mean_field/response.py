"""How the gradient's mean squares move with the stream's, which vary between seeds by order 1/d.

A seed whose stream is short has small divisors in all its norms, of which the gradient has the product:
the factors vary together, so the mean of the product isn't that of the means. Carried back beside G is
the response R_ij = ∂G_ii/∂m_j to the mean squares m of the stream at that point. A factor whose
logarithm moves by L_i·δm multiplies G_ii: with S_ij = Cov(m_i, m_j), to first order in 1/d,

    G_ii ← G_ii·(1 + own) + (R S Lᵀ)_ii,    R ← R + diag(G)·L.

For a norm's f², L = −dm_v/dm_x/(m_v + eps), and ``own`` is the spread of its divisor. An MLP whose
input no norm fixes has an output b of degree λ = d ln m_b/d ln m_x. So what comes back through it goes
as m_b/m_x, by degree λ − 1: L = (λ − 1)/m_x·dm_x, own = ½(λ − 1)(λ − 2)·Var m_x/m_x². Behind N(F(x))
the two leave 1/m_x, the scale of F's output being gone.

Left out: what a kernel's entries off the diagonal vary, and the noise of a step's own matrices, which
later norms feel. Both are of order 1/d.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from simlab.theory.laws import Array
from simlab.theory.mean_field.attention import AttentionBranch
from simlab.theory.mean_field.branch import TINY, Branch
from simlab.theory.mean_field.gates import GatedBranch
from simlab.theory.mean_field.kernels import KernelStep, Terms

LEAST_CORRECTION = -0.5  # of a correction of G_ii, relative: the first order in 1/d says no more


def carries(step: KernelStep, outs: Sequence[Terms]) -> bool:
    """True for a step from one vector to one: of several, nothing is carried."""
    start = step.start
    return step.starts == len(outs) == start.copies == 1 and start.apart is step.apart is None


class Moves:
    """Derivatives (N, N) in the mean squares of a step's incoming stream."""

    def __init__(self, step: KernelStep) -> None:
        self.step = step
        self.bases = {0: np.eye(len(step.start.kernel))}  # of a base vector's mean squares
        self.norms: dict[int, Array] = {}  # of the logarithms of a norm's squared factors
        self.inputs: dict[int, Array] = {}  # of the mean squares that a branch gets
        for kind, index in step.events:
            if kind == "norm":
                norm = step.norms[index]
                self.norms[index] = -(step.moment / norm.divisor)[:, None] * self.of(norm.terms)
            else:
                branch, terms = step.branches[index]
                self.inputs[index] = self.of(terms)
                self.bases[index] = _response(branch) @ self.inputs[index]

    def of(self, terms: Terms) -> Array:
        """Of a vector's mean squares."""
        out = np.zeros_like(self.step.start.kernel)
        for one, other in product(terms, terms):
            shared = self.step.between(one.base, other.base)
            if shared is None:
                continue
            factors = (self.step.factor(one) * self.step.factor(other))[:, None]
            for norm in (*one.norms, *other.norms):
                out += factors * shared.diagonal()[:, None] * self.norms[norm] / 2
            if one.base == other.base:
                out += factors * self.bases[one.base]
        return out

    def together(self, response: Array, moved: Array) -> Array:
        """(R S Lᵀ)_ii (N,)."""
        out: Array = np.vecdot(response @ self.step.start.square, moved)
        return out

    def through_norm(self, index: int, response: Array, gradient: Array) -> tuple[Array, Array]:
        """R before a norm, and what G_ii gets, from those behind it. gradient: G_ii before it (N,)."""
        moved = self.norms[index]
        more = np.maximum(self.together(response, moved), LEAST_CORRECTION * gradient)
        return response + gradient[:, None] * moved, more

    def through_branch(
        self, index: int, response: Array, upstream: Array, pulled: Array
    ) -> tuple[Array, Array]:
        """Likewise of a sublayer, from G at its output and at its input (N, N)."""
        branch, gradient = self.step.branches[index][0], pulled.diagonal()
        reach = _weights(branch, upstream, backward=True)
        of_diagonal = reach @ upstream.diagonal()
        response = (gradient / np.maximum(of_diagonal, TINY))[:, None] * (reach @ response)
        if branch.lean is None or _attention(branch) or ("branch", index) not in self.step.events:
            return response, np.zeros_like(gradient)
        m, moved = self.mean_square(index), self.inputs[index]
        beyond = branch.lean * m / np.maximum(branch.kernel.diagonal(), TINY) - 1  # λ − 1
        variance = self.together(moved, moved) / m**2
        logarithm = (beyond / m)[:, None] * moved
        more = self.together(response, logarithm) + beyond * (beyond - 1) / 2 * variance * gradient
        return response + gradient[:, None] * logarithm, np.maximum(
            more, LEAST_CORRECTION * gradient
        )

    def mean_square(self, index: int) -> Array:
        """That of a branch's input (N,)."""
        terms = self.step.branches[index][1]
        out = np.zeros(len(self.step.start.kernel))
        for one, other in product(terms, terms):
            shared = self.step.between(one.base, other.base)
            if shared is not None:
                out += self.step.factor(one) * self.step.factor(other) * shared.diagonal()
        return np.maximum(out, TINY)


def _attention(branch: Branch) -> AttentionBranch | None:
    one = branch.one if isinstance(branch, GatedBranch) else branch
    return one if isinstance(one, AttentionBranch) else None


def _weights(branch: Branch, kernel: Array, backward: bool = False) -> Array:
    """How much of each token's K_jj a token's Σ_jk E[a_j a_k]·K_jk has (N, N).

    K_jk counts as half of either end's. backward: of aᵀ, as the values' gradient has it. The identity
    where tokens don't mix.
    """
    attention = _attention(branch)
    if attention is None:
        return np.eye(len(kernel))
    mean, second = _blocks(attention.mean), _blocks(attention.second)
    if backward:
        mean, second = mean.T, second.T
    ends = np.maximum(kernel.diagonal(), TINY)
    out: Array = second - mean**2 + mean * (mean @ kernel) / ends
    return out


def _response(branch: Branch) -> Array:
    """dB_ii/dH_jj (N, N)."""
    attention = _attention(branch)
    lean = np.zeros(len(branch.kernel)) if branch.lean is None else branch.lean
    if attention is None or attention.attention.context.model.v_norm:
        return np.diag(lean)
    kernel = attention.input.kernel
    gates = branch.gates.diagonal() if isinstance(branch, GatedBranch) else np.ones(len(kernel))
    out: Array = (gates * attention.attention.scale)[:, None] * _weights(branch, kernel)
    return out + np.diag(lean)


def _blocks(weights: Array) -> Array:
    """Weights (B, T, T) of B sequences as (N, N)."""
    batch, length, _ = weights.shape
    out = np.zeros((batch, length, batch, length))
    places = np.arange(batch)
    out[places, :, places, :] = weights
    return out.reshape(batch * length, -1)
