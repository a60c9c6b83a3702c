"""How the gradient's mean squares move with the stream's, which vary between seeds by order 1/d.

A seed whose stream is short has small divisors in all its norms, of which the gradient has the product:
the factors vary together, so the mean of the product isn't that of the means. Carried back beside G is
the response R_ij = ∂G_ii/∂m_j to the mean squares m of the stream at that point. A factor f whose
logarithm moves by δ ln f_i = Σ_j L_ij·δm_j multiplies G_ii: with S_ij = Cov(m_i, m_j), to first order
in 1/d,

    G_ii ← G_ii·(1 + own) + (R S Lᵀ)_ii,    R ← R + diag(G)·L,

where ``own`` is what f's own variance adds to its mean. x is the stream, v a norm's input, b a
sublayer's output, and dm_v the row of derivatives of m_v in the stream's m_j:

    norm        its squared factor is f ∝ 1/(m_v + eps): L = −dm_v/(m_v + eps), own its divisor's
                relative variance;
    MLP         whose input v no norm fixes, with an output of degree λ = d ln m_b/d ln m_v: what comes
                back goes as m_b/m_v, by degree λ − 1, so that L = (λ − 1)/m_v·dm_v and
                own = ½(λ − 1)(λ − 2)·Var m_v/m_v². Behind N(F(x)) norm and MLP leave 1/m_x, the scale
                of F's output being gone.

Left out, both of order 1/d: how a kernel's entries off the diagonal vary, and the noise of a step's own
matrices, which later norms feel. Measured in the embedding's row, 16 sublayers from the loss at width
64 (600 seeds; docs/theory.md): ``reordered`` is 1 to 2 % high and ``pre`` 3 to 4 % low, where without
responses they are 5 % high and 5 to 6 % low.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from simlab.theory.laws import Array
from simlab.theory.mean_field.branch import TINY, Branch
from simlab.theory.mean_field.gates import GatedBranch, attention_in
from simlab.theory.mean_field.kernels import KernelStep, Terms

# No correction takes away more of G_ii than this share: the first order in 1/d isn't good for more.
LEAST_CORRECTION = -0.5


def carries(step: KernelStep, outs: Sequence[Terms]) -> bool:
    """True for a step from one vector, or copies of it, to one: of several, nothing is carried."""
    mixed = step.start.apart is not None or step.apart is not None
    return step.starts == len(outs) == 1 and not mixed


class Derivatives:
    """Derivatives (N, N) of a step's numbers (rows) in the mean squares m_j of its incoming stream."""

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
        """Those of a vector's mean squares."""
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
        # Attention's gradient comes from other tokens, and an element-wise norm has no degree.
        sublayer = ("branch", index) in self.step.events
        if branch.lean is None or attention_in(branch) or not sublayer:
            return response, np.zeros_like(gradient)
        terms, moved = self.step.branches[index][1], self.inputs[index]
        m = np.maximum(self.step.inner(terms, terms), TINY)
        beyond = branch.lean * m / np.maximum(branch.kernel.diagonal(), TINY) - 1  # λ − 1
        variance = self.together(moved, moved) / m**2
        logarithm = (beyond / m)[:, None] * moved
        more = self.together(response, logarithm) + beyond * (beyond - 1) / 2 * variance * gradient
        return response + gradient[:, None] * logarithm, np.maximum(
            more, LEAST_CORRECTION * gradient
        )


def _weights(branch: Branch, kernel: Array, backward: bool = False) -> Array:
    """w (N, N) with Σ_j w_ij·K_jj = Σ_jk E[a_ij a_ik]·K_jk, a attention's weights, K a kernel (N, N).

    So w_ij is how the sum moves with K_jj, if K_jk is taken to move by half with either end. backward:
    of aᵀ, by which the values' gradient comes back. The identity of a sublayer that doesn't mix tokens.
    """
    attention = attention_in(branch)
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
    attention = attention_in(branch)
    lean = np.zeros(len(branch.kernel)) if branch.lean is None else branch.lean
    if attention is None or attention.attention.context.model.v_norm:
        return np.diag(lean)  # V-norm: values don't move with the input's mean squares
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
