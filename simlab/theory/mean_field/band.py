"""The standard deviation between seeds of a row's mean square, to first order in 1/width.

A functional ⟨A, K̂⟩ of the stream's Gram matrix after some step, A = I/N for the mean square, is pulled
back step by step, through the record of the scheme's formula (``kernels``). On its way it collects the
variance of every fresh matrix: of the cross terms x·b/d, 4 tr(A_x·B·A_xᵀ·K)/d, of the last matrix,
2 tr(ABAB)/d, and of the sublayer's own parts. This is the adjoint of the linearised recursion:
deterministic, O(rows · steps · N³). docs/theory.md derives it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simlab.theory.laws import Array
from simlab.theory.mean_field.kernels import KernelStep, Term

# Of functionals: half of the time. Right after a norm of the stream, where only eps lets the mean
# square vary at all, float32's rounding is some 10 % of the band.
FLOAT = np.float32


Terms = tuple[Term, ...]


def add_diagonal(functionals: Any, diagonal: Any) -> None:
    """Add (R, N) to the diagonals of (R, N, N), in place."""
    places = np.arange(diagonal.shape[-1])
    functionals[:, places, places] += diagonal


def times(functionals: Any, kernel: Array) -> Any:
    """A·K of every functional, as one product of matrices."""
    flat = functionals.reshape(-1, len(kernel)) @ kernel.astype(FLOAT)
    return flat.reshape(functionals.shape)


class Pullback:
    """Pulls functionals (R, N, N) of a step's output back to its input, and adds up their variance.

    own: functionals of a base's Gram matrix. pairs: of two bases' cross Gram matrix, which the
    symmetric functional has twice. logs: derivatives in the logarithms of a norm's factors (R, N).
    """

    def __init__(self, step: KernelStep, out: Terms, functionals: Any) -> None:
        self.step = step
        self.variance = np.zeros(len(functionals))
        self.own: dict[int, Any] = {}
        self.pairs: dict[tuple[int, int], Any] = {}
        self.logs: defaultdict[int, Any] = defaultdict(int)
        self._terms(out, functionals)
        for kind, index in reversed(step.events):
            if kind == "norm":
                self._norm(index)
            else:
                self._branch(index)
        self.functionals = self.own.pop(0, None)
        if self.functionals is None:
            self.functionals = np.zeros_like(functionals)

    def _terms(self, terms: Terms, functionals: Any) -> None:
        """From a vector's Gram matrix to the bases', and to the factors of its norms."""
        factors = [self.step.factor(term).astype(FLOAT) for term in terms]
        for i, one in enumerate(terms):
            for j, other in enumerate(terms):
                if one.base > other.base:
                    continue
                scaled = functionals * (factors[i][:, None] * factors[j][None, :])
                if one.base != other.base:
                    key = one.base, other.base
                    self.pairs[key] = self.pairs[key] + scaled if key in self.pairs else scaled
                    continue
                if one.norms:
                    kernel = self.step.kernels[one.base].astype(FLOAT)
                    moved = 2 * np.einsum("rij,ij->ri", scaled, kernel)
                    for norm in one.norms:
                        self.logs[norm] = self.logs[norm] + moved
                present = self.own.get(one.base)
                self.own[one.base] = scaled if present is None else present + scaled

    def _norm(self, index: int) -> None:
        """δ ln factor = −½·δm/(m + eps), m a multiple of the input's mean square."""
        moved = self.logs.pop(index, None)
        if moved is None:
            return
        norm = self.step.norms[index]
        rate = (-0.5 * self.step.moment / norm.divisor).astype(FLOAT)
        diagonal = np.zeros((*moved.shape, moved.shape[-1]), FLOAT)
        add_diagonal(diagonal, moved * rate)
        self._terms(norm.terms, diagonal)

    def _branch(self, index: int) -> None:
        """The variance that the branch's fresh matrices add, and on to its input."""
        branch, terms = self.step.branches[index]
        kernels, width = self.step.kernels, self.step.width
        for earlier in range(index):
            cross = self.pairs.pop((earlier, index), None)
            if cross is not None:
                left = np.matmul(kernels[earlier].astype(FLOAT), cross)
                self.variance += (
                    4 / width * np.einsum("rij,rij->r", left, times(cross, branch.kernel))
                )
        functionals = self.own.pop(index, None)
        if functionals is None:
            return
        product = times(functionals, branch.kernel)
        wishart = 2 * np.einsum("rij,rji->r", product, product)
        self.variance += wishart * (1 / width + 1 / branch.units) + branch.variance(functionals)
        self._terms(terms, branch.pull(functionals))


def band(
    steps: list[tuple[KernelStep, Terms]], start: Array, ids: NDArray[np.int64], fourth: float
) -> Array:
    """Std between seeds of every row's mean square, (rows,), the embedding's first.

    start: the embedding's kernel (N, N). ids (N,). fourth: (κ − 3)·σ⁴ of an embedding's entries, κ
    their kurtosis.
    """
    tokens = len(start)
    row = np.eye(tokens, dtype=FLOAT)[None] / FLOAT(tokens)
    functionals, variance = np.zeros((0, tokens, tokens), FLOAT), np.zeros(0)
    width = steps[0][0].width
    for step, out in reversed(steps):
        functionals, variance = np.concatenate([functionals, row]), np.append(variance, 0.0)
        pulled = Pullback(step, out, functionals)
        functionals, variance = pulled.functionals, variance + pulled.variance
    functionals, variance = np.concatenate([functionals, row]), np.append(variance, 0.0)
    product = times(functionals, start)
    variance = variance + 2 * np.einsum("rij,rji->r", product, product) / width
    for token in np.unique(ids):  # a truncated embedding's kurtosis is below 3
        same = np.flatnonzero(ids == token)
        sums = functionals[:, same][:, :, same].sum((1, 2))
        variance = variance + fourth / width * sums**2
    return np.sqrt(np.maximum(variance, 0))[::-1]
