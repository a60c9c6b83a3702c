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
from simlab.theory.mean_field.branch import TINY
from simlab.theory.mean_field.kernels import KernelStep, State, Terms, pairs_of

# Of a row's functional, in units of its std: what leaving out directions of the basis may change.
CUT = 1e-5


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


def pull_correlation(functionals: Any, slope: Array, kernel: Array) -> tuple[Any, Array]:
    """From functionals (J, N, N) of ρ̂_ij to those of Ĥ: i ≠ j, and the diagonals (J, N).

    slope: dA/dρ. δρ_ij = δH_ij/√(H_iiH_jj) − ½ρ_ij(δH_ii/H_ii + δH_jj/H_jj).
    """
    h = np.maximum(kernel.diagonal(), TINY)
    slope = slope / np.sqrt(np.outer(h, h))
    np.fill_diagonal(slope, 0.0)
    out = functionals * slope
    diagonal = -np.einsum("rij,ij->ri", out, kernel) / h
    return out, diagonal


class Pullback:
    """Pulls functionals (J, N, N) of a step's output back to its input, and adds up their covariance.

    outs: the vectors after the step; of n of them, functionals (J, nN, nN) of their joint Gram matrix,
    and such ones come out if several vectors came in. own: functionals of a base's Gram matrix. pairs:
    of two bases' cross Gram matrix, which the symmetric functional has twice. logs: derivatives in the
    logarithms of a norm's factors (J, N).
    """

    def __init__(self, step: KernelStep, outs: Sequence[Terms], functionals: Any) -> None:
        self.step = step
        self.covariance = np.zeros((len(functionals), len(functionals)))
        self.own: dict[int, Any] = {}
        self.pairs: dict[tuple[int, int], Any] = {}
        self.logs: defaultdict[int, Any] = defaultdict(int)
        for a, b, one, other in pairs_of(outs, len(step.start.kernel)):
            self._pair(one, other, functionals[:, a, b])
        for kind, index in reversed(step.events):
            if kind == "norm":
                self._norm(index)
            elif kind == "branch":
                self._branch(index)
            else:
                self._squash(index)
        self.functionals = self._joint(np.zeros((len(functionals), *step.start.kernel.shape)))

    def _joint(self, nothing: Any) -> Any:
        """The functionals (J, nN, nN) of the incoming vectors' joint Gram matrix."""
        starts = range(self.step.starts)
        own = [self.own.get(base, nothing) for base in starts]
        if len(own) == 1:
            return own[0]
        pair = {(a, b): self.pairs.get((a, b), nothing) for b in starts for a in range(b)}
        pair |= {(b, a): block.swapaxes(1, 2) for (a, b), block in pair.items()}
        return np.block([[own[a] if a == b else pair[a, b] for b in starts] for a in starts])

    def _pair(self, first: Terms, second: Terms, functionals: Any) -> None:
        """From the cross Gram matrix of two vectors, or of one, to bases' and to norms' factors."""
        for one in first:
            for other in second:
                kernel = self.step.between(one.base, other.base) if one.norms else None
                if one.base > other.base and kernel is None:
                    continue
                factors = self.step.factor(one)[:, None] * self.step.factor(other)[None, :]
                scaled = functionals * factors
                if kernel is not None:
                    moved = 2 * np.einsum("rij,ij->ri", scaled, kernel)
                    for norm in one.norms:
                        self.logs[norm] = self.logs[norm] + moved
                key = one.base, other.base
                if one.base < other.base:
                    self.pairs[key] = self.pairs[key] + scaled if key in self.pairs else scaled
                elif one.base == other.base:
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
        self._pair(norm.terms, norm.terms, diagonal)

    def _branch(self, index: int) -> None:
        """The variance that the branch's fresh matrices add, and on to its input."""
        branch, terms = self.step.branches[index]
        width = self.step.width
        crosses = {base: self.pairs.pop((base, index), None) for base in range(index)}
        for base, cross in crosses.items():
            for other, beside in crosses.items():
                kernel = self.step.between(other, base)
                if cross is not None and beside is not None and kernel is not None:
                    left, right = kernel @ cross, products(beside, branch.kernel)
                    self.covariance += 4 / width * traces(left, right)
        functionals = self.own.pop(index, None)
        if functionals is None:
            return
        product = products(functionals, branch.kernel)
        wishart = 2 * traces(product, product.swapaxes(1, 2))
        self.covariance += wishart * (1 / width + 1 / branch.units)
        self.covariance += branch.covariance(functionals)
        self._pair(terms, terms, branch.pull(functionals))

    def _squash(self, index: int) -> None:
        """The variance that a function of each entry adds, and on to its input."""
        branch, terms = self.step.branches[index]
        functionals = self.own.pop(index, None)
        if functionals is not None:
            self.covariance += branch.covariance(functionals)
            self._pair(terms, terms, branch.pull(functionals))


def reduced(coefficients: Array, basis: Any, state: State) -> tuple[Array, Any]:
    """Coefficients (R, J') and a basis (J', N, N) of no more directions than the rows need.

    A direction counts by what it says of K̂, so entries are weighed by their std between seeds. By
    singular values of the rows, each of size 1; what is left out is at most CUT of a row.
    """
    weighed = (basis * np.sqrt(state.spread)).reshape(len(basis), -1)
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
    steps: Sequence[tuple[KernelStep, Sequence[Terms]]], start: Array, ids: NDArray[np.int64],
    fourth: float, width: int, on_step: Callable[[], None] = lambda: None,
    others: Sequence[tuple[NDArray[np.int64], float]] = (),
    watched: Sequence[Sequence[float]] | None = None,
    first: tuple[KernelStep, Sequence[Terms]] | None = None,
) -> Array:  # fmt: skip
    """Std between seeds of every row's mean square, (rows,), the embedding's first.

    watched: each row's stream as a sum of the state's vectors, by their numbers; None: there is one.
    first: the step that makes the first state of the embedding, None where that is the embedding.
    start: the embedding's kernel (N, N). ids (N,). fourth: (κ − 3)·σ⁴ of an embedding's entries, κ
    their kurtosis. on_step: called after each step, from the last to the first. others: of
    further embeddings that are added, as of positions, ids (N,) and what fourth is of theirs.
    """
    rows = len(steps) + 1

    def asked(row: int) -> tuple[Array, Any]:  # a row's coefficients, and its functional
        weights = [1.0] if watched is None else watched[row]
        mean_square = np.kron(np.outer(weights, weights), np.eye(len(start)) / len(start))
        return np.ones((1, 1)), mean_square[None]

    coefficients, basis = asked(rows - 1)
    variance = np.zeros(rows)
    for taken, (step, outs) in enumerate(reversed(steps), 1):
        pulled = Pullback(step, outs, basis)
        variance[:taken] += ((coefficients @ pulled.covariance) * coefficients).sum(1)
        both = [(coefficients, pulled.functionals), asked(rows - 1 - taken)]
        coefficients, basis = reduced(*_joined(both), step.start)
        on_step()
    if first is not None:
        basis = Pullback(*first, basis).functionals
    functionals = np.tensordot(coefficients, basis, 1)
    product = products(functionals, start)
    variance += 2 * np.einsum("rij,rji->r", product, product) / width
    for each, own_fourth in ((ids, fourth), *others):
        for token in np.unique(each):  # a truncated embedding's kurtosis is below 3
            same = np.flatnonzero(each == token)
            sums = functionals[:, same][:, :, same].sum((1, 2))
            variance += own_fourth / width * sums**2
    return np.sqrt(np.maximum(variance, 0))[::-1]
