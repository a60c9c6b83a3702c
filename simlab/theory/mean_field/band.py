"""The standard deviation between seeds of a row's mean square, to first order in 1/width.

A functional ⟨A, K̂⟩ of the stream's Gram matrix after some step, A = I/N for the mean square, is pulled
back step by step, through the record of the scheme's formula (``kernels``). On its way it collects the
variance of every fresh matrix: of the cross terms x·b/d, 4 tr(A_x·B·A_xᵀ·K)/d, of the last matrix,
2 tr(ABAB)/d, and of the sublayer's own parts. This is the adjoint of the linearised recursion, and
deterministic. docs/theory.md derives it.

All rows' functionals are pulled back together. They span few dimensions, since a stream that is added
to hardly changes what it is asked: kept are a basis E (J, N, N) and each row's coefficients c (R, J).
A step's variance is a quadratic form, so it takes a matrix (J, J) over the basis, and row r has cᵀQc.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simlab.theory.laws import Array
from simlab.theory.mean_field.kernels import TINY, KernelStep, State, Term

# Of a row's functional, in units of its std: what leaving out directions of the basis may change.
CUT = 1e-5

Terms = tuple[Term, ...]


def add_diagonal(functionals: Any, diagonal: Any) -> None:
    """Add (J, N) to the diagonals of (J, N, N), in place."""
    places = np.arange(diagonal.shape[-1])
    functionals[:, places, places] += diagonal


def products(functionals: Any, kernel: Array) -> Any:
    """A·K of every functional, as one product of matrices."""
    return (functionals.reshape(-1, len(kernel)) @ kernel).reshape(functionals.shape)


def traces(left: Any, right: Any) -> Array:
    """tr(L_i·R_jᵀ) (J, J) of all pairs of two stacks (J, N, N)."""
    out: Array = left.reshape(len(left), -1) @ right.reshape(len(right), -1).T
    return out


class Pullback:
    """Pulls functionals (J, N, N) of a step's output back to its input, and adds up their covariance.

    own: functionals of a base's Gram matrix. pairs: of two bases' cross Gram matrix, which the
    symmetric functional has twice. logs: derivatives in the logarithms of a norm's factors (J, N).
    """

    def __init__(self, step: KernelStep, out: Terms, functionals: Any) -> None:
        self.step = step
        self.covariance = np.zeros((len(functionals), len(functionals)))
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
        factors = [self.step.factor(term) for term in terms]
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
                    kernel = self.step.kernels[one.base]
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
        rate = -0.5 * self.step.moment / norm.divisor
        diagonal = np.zeros((*moved.shape, moved.shape[-1]))
        add_diagonal(diagonal, moved * rate)
        self._terms(norm.terms, diagonal)

    def _branch(self, index: int) -> None:
        """The variance that the branch's fresh matrices add, and on to its input."""
        branch, terms = self.step.branches[index]
        kernels, width = self.step.kernels, self.step.width
        for earlier in range(index):
            cross = self.pairs.pop((earlier, index), None)
            if cross is not None:
                left, right = kernels[earlier] @ cross, products(cross, branch.kernel)
                self.covariance += 4 / width * traces(left, right)
        functionals = self.own.pop(index, None)
        if functionals is None:
            return
        product = products(functionals, branch.kernel)
        wishart = 2 * traces(product, product.swapaxes(1, 2))
        self.covariance += wishart * (1 / width + 1 / branch.units)
        self.covariance += branch.covariance(functionals)
        self._terms(terms, branch.pull(functionals))


def reduced(coefficients: Array, basis: Any, state: State) -> tuple[Array, Any]:
    """Coefficients (R, J') and a basis (J', N, N) of no more directions than the rows need.

    A direction counts by what it says of K̂, so entries are weighed by their std between seeds. By
    singular values of the rows, each of size 1; what is left out is at most CUT of a row.
    """
    spread = state.cross + np.abs(state.square)
    np.fill_diagonal(spread, state.square.diagonal())
    weighed = (basis * np.sqrt(spread)).reshape(len(basis), -1)
    lengths = np.sqrt(np.maximum(np.vecdot(weighed, weighed), TINY))
    weighed /= lengths[:, None]
    values, vectors = np.linalg.eigh(weighed @ weighed.T)
    roots = np.sqrt(np.maximum(values, 0))
    rows = coefficients * lengths @ (vectors * roots)  # in an orthonormal basis
    sizes = np.sqrt(np.maximum(np.vecdot(rows, rows), TINY))
    unit = rows / sizes[:, None]
    squares, directions = np.linalg.eigh(unit.T @ unit)  # of singular values, from the least on
    kept = directions[:, min(int((np.cumsum(squares) < CUT**2).sum()), len(basis) - 1) :].T
    if len(kept) == len(basis):
        return coefficients, basis
    inverse = np.divide(1, roots, out=np.zeros_like(roots), where=roots > 1e-7)
    back = kept @ (vectors * inverse).T / lengths
    return rows @ kept.T, (back @ basis.reshape(len(basis), -1)).reshape(-1, *basis.shape[1:])


def _joined(parts: Sequence[tuple[Array, Any]]) -> tuple[Array, Any]:
    """Coefficients (R, J) and a basis (J, N, N) of all rows of some, each over a basis of its own."""
    basis = np.concatenate([functionals for _, functionals in parts])
    coefficients = np.zeros((sum(len(c) for c, _ in parts), len(basis)))
    row = column = 0
    for part, _ in parts:
        coefficients[row : row + len(part), column : column + part.shape[1]] = part
        row, column = row + len(part), column + part.shape[1]
    return coefficients, basis


def band(
    steps: list[tuple[KernelStep, Terms]], start: Array, ids: NDArray[np.int64], fourth: float,
    width: int, on_step: Callable[[], None] = lambda: None,
    others: Sequence[tuple[NDArray[np.int64], float]] = (),
) -> Array:  # fmt: skip
    """Std between seeds of every row's mean square, (rows,), the embedding's first.

    start: the embedding's kernel (N, N). ids (N,). fourth: (κ − 3)·σ⁴ of an embedding's entries, κ
    their kurtosis. on_step: called after each step, from the last to the first. others: of
    further embeddings that are added, as of positions, ids (N,) and what fourth is of theirs.
    """
    tokens, rows = len(start), len(steps) + 1
    mean_square = np.eye(tokens)[None] / tokens
    own = np.ones((1, 1)), mean_square  # a row's coefficients, and what it is asked
    coefficients, basis = own
    variance, later = np.zeros(rows), []
    for taken, (step, out) in enumerate(reversed(steps), 1):
        pulled = Pullback(step, out, basis)
        here = slice(taken - len(coefficients), taken)
        variance[here] += ((coefficients @ pulled.covariance) * coefficients).sum(1)
        later.append((coefficients, pulled.functionals))
        if taken < len(steps) and steps[-taken - 1][0].start is step.start:
            coefficients, basis = own  # the step before is beside this one: no later row passes it
        else:
            coefficients, basis = reduced(*_joined([*later, own]), step.start)
            later = []
        on_step()
    functionals = np.tensordot(coefficients, basis, 1)
    product = products(functionals, start)
    variance += 2 * np.einsum("rij,rji->r", product, product) / width
    for each, own_fourth in ((ids, fourth), *others):
        for token in np.unique(each):  # a truncated embedding's kurtosis is below 3
            same = np.flatnonzero(each == token)
            sums = functionals[:, same][:, :, same].sum((1, 2))
            variance += own_fourth / width * sums**2
    return np.sqrt(np.maximum(variance, 0))[::-1]
