"""Vectors as theory keeps them: what a residual scheme's formula runs on in place of tensors.

A step's vectors are linear in a few base vectors, the incoming stream x and each sublayer's output:
v_i = Σ_t D_t,i b_t,i for token i, with a diagonal D_t over tokens (numbers, and norms' factors). A
sublayer's last matrix is fresh, so base vectors are uncorrelated, and the kernel
K(v)_ij = E⟨v_i, v_j⟩/d = Σ D_t,i K(b_t)_ij D_t',j over terms t, t' with the same base. ``KernelStep``
records the norms and the sublayers in the order in which the formula uses them; the band and the
gradient go through the record backwards. So a new scheme needs no theory of its own.

Besides, a vector carries to first order in 1/d how its Gram matrix K̂ varies between seeds:
square (S), Cov(K̂_ii, K̂_jj), and cross (V), Var(K̂_ij) for i ≠ j. Each is the sum of an own part and
of one that leans on x's: δK̂_ii = lean_i δK̂(x)_ii; ``lean_cross`` is a std that moves as x's does.

Shapes: N tokens; (N, N) kernels, (N,) diagonals, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from simlab.theory.laws import Array
from simlab.theory.mean_field.averages import saturation
from simlab.theory.mean_field.branch import TINY, Branch, Input


def outer_square(kernel: Array) -> Array:
    """K_ii·K_jj (N, N)."""
    m = kernel.diagonal()
    return m[:, None] * m


def correlation(kernel: Array) -> Array:
    """ρ_ij = K_ij/√(K_ii K_jj), in [−1, 1]."""
    root = np.sqrt(np.maximum(kernel.diagonal(), TINY))
    rho = kernel / (root[:, None] * root)
    np.minimum(rho, 1, out=rho)
    return np.maximum(rho, -1, out=rho)


def shrink(rho: Array) -> Array:
    """Var(ρ̂_ij)·m_i·m_j over Var(K̂_ij), for Gaussian vectors: (1 − ρ²)²/(1 + ρ²)."""
    return (1 - rho**2) ** 2 / (1 + rho**2)


@dataclass(frozen=True)
class Term:
    """scale · Π norms' factors · base: one summand of a vector."""

    base: int
    scale: float
    norms: tuple[int, ...] = ()


Terms = tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class KernelVector:
    """A vector per token, as in the module's docstring.

    normed: True if a norm fixes its mean squares, so that ``square`` and ``cross`` are those of unit
    vectors.
    """

    step: KernelStep
    terms: Terms
    kernel: Array
    square: Array
    cross: Array
    lean: Array
    lean_cross: Array
    normed: bool = False

    def __rmul__(self, scale: float) -> KernelVector:
        terms = tuple(replace(term, scale=scale * term.scale) for term in self.terms)
        second, fourth = scale**2, scale**4
        return replace(
            self, terms=terms, kernel=second * self.kernel, square=fourth * self.square,
            cross=fourth * self.cross, lean=second * self.lean, lean_cross=second * self.lean_cross,
        )  # fmt: skip

    def __truediv__(self, scale: float) -> KernelVector:
        return (1 / scale) * self

    def __add__(self, other: KernelVector) -> KernelVector:
        return self.step.total(self, other)

    @cached_property
    def total_square(self) -> Array:
        """S (N, N): Cov(K̂_ii, K̂_jj) between seeds."""
        return self.square + self.lean[:, None] * self.step.start.square * self.lean[None, :]

    @cached_property
    def total_cross(self) -> Array:
        """V (N, N): Var(K̂_ij) between seeds, i ≠ j."""
        return self.cross + self.lean_cross**2

    @cached_property
    def relative_variance(self) -> Array:
        """Var(K̂_ii)/K_ii² (N,)."""
        return self.total_square.diagonal() / np.maximum(self.kernel.diagonal() ** 2, TINY)

    @cached_property
    def correlation_variance(self) -> Array:
        """τ² (N, N): Var(ρ̂_ij) between seeds."""
        rho = correlation(self.kernel)
        variance = self.total_cross / np.maximum(outer_square(self.kernel), TINY)
        return variance if self.normed else variance * shrink(rho)


@dataclass(frozen=True, eq=False)
class UsedNorm:
    """A norm that a formula used; (N,) each. terms: of its input.

    factor: g/√(m + eps). divisor: m + eps. saturation: E m/(m + eps) over seeds. spread: the relative
    variance of m between seeds.
    """

    terms: Terms
    factor: Array
    divisor: Array
    saturation: Array
    spread: Array


@dataclass(frozen=True, eq=False)
class State:
    """The stream between two steps: its kernel, and ``square`` and ``cross`` as a vector has them.

    others: further vectors that are carried along. between: for each two of all, a < b, the cross
    kernel E⟨x_a,i, x_b,j⟩/d (N, N). copies: how often the state has the stream, where that is all.
    apart: how far streams lie from their mean, which is the stream: Δ (N, N), as ``mixing`` has it.
    """

    kernel: Array
    square: Array
    cross: Array
    others: tuple[State, ...] = ()
    between: Mapping[tuple[int, int], Array] = field(default_factory=dict)
    copies: int = 1
    apart: Array | None = None

    @property
    def vectors(self) -> tuple[State, ...]:
        """Each vector alone."""
        return (self, *self.others)

    @property
    def arrays(self) -> Iterator[Array]:
        """All numbers."""
        for one in self.vectors:
            yield from (one.kernel, one.square, one.cross)
        yield from self.between.values()

    @property
    def spread(self) -> Array:
        """Variances (nN, nN) of the joint Gram matrix's entries; roughly, of cross kernels."""
        parts = []
        for one in self.vectors:
            own = one.cross + np.abs(one.square)
            np.fill_diagonal(own, one.square.diagonal())
            parts.append(own)
        if len(parts) == 1:
            return parts[0]
        roots = [np.sqrt(own) for own in parts]
        out: Array = np.block([[one * other for other in roots] for one in roots])
        return out


@dataclass
class KernelStep:
    """One residual step. Its ``x``, ``norm``, ``feed`` and ``add`` are what a scheme's formula takes.

    width: d. eps, gain: of the norms. moment: a norm's m over the mean square, 1, or 1 − 1/d of a
    LayerNorm, whose variance an isotropic vector's mean takes away from.
    """

    start: State
    width: int
    eps: float
    gain: float
    moment: float = 1.0
    norms: list[UsedNorm] = field(default_factory=list)
    kernels: list[Array] = field(init=False)  # of the base vectors; the first is x's
    branches: dict[int, tuple[Branch, Terms]] = field(default_factory=dict)
    raw: KernelVector | None = None  # the sublayer's output
    events: list[tuple[str, int]] = field(default_factory=list)
    added: Array | None = None  # the kernel of what was added last
    read: Array | None = None  # the kernel of what the last sublayer got
    written: Callable[[Branch], Branch] = lambda branch: branch  # what coefficients make of it
    apart: Array | None = None  # of the state after it
    mixed: Callable[[], Any] | None = None  # its mixed streams, as ``mixing_gradient`` needs them

    def __post_init__(self) -> None:
        self.kernels = [one.kernel for one in self.start.vectors]
        self.starts = len(self.kernels)

    @property
    def x(self) -> KernelVector:
        """The incoming stream, base vector 0, where nothing else is carried along."""
        nothing = np.zeros_like(self.start.kernel)
        lean = np.ones(len(nothing))
        root = np.sqrt(self.start.cross)
        return KernelVector(self, (Term(0, 1.0),), self.start.kernel, nothing, nothing, lean, root)

    @property
    def state(self) -> Any:
        """The incoming state, as a scheme takes it: ``x``, or several vectors.

        Of several, each has all its noise as its own: how branches lean on it, of order 1/d and
        small behind a norm, is left out.
        """
        if self.starts == 1:
            return self.x if self.start.copies == 1 else (self.x,) * self.start.copies
        nothing = np.zeros_like(self.start.kernel)
        return tuple(
            KernelVector(
                self, (Term(base, 1.0),), one.kernel, one.square, one.cross, nothing[0], nothing
            )
            for base, one in enumerate(self.start.vectors)
        )

    def between(self, one: int, other: int) -> Array | None:
        """E⟨b_one,i, b_other,j⟩/d (N, N) of two base vectors; None where they are uncorrelated."""
        if one == other:
            return self.kernels[one]
        kernel = self.start.between.get((min(one, other), max(one, other)))
        return kernel if kernel is None or one < other else kernel.T

    def shares(self, v: KernelVector) -> tuple[float, ...]:
        """v as a sum of the incoming vectors: their numbers, of a v that is no more than that."""
        scales = [(term.base, term.scale) for term in v.terms]
        return tuple(sum(scale for base, scale in scales if base == i) for i in range(self.starts))

    def cross_kernel(self, v: KernelVector, w: KernelVector) -> Array:
        """E⟨v_i, w_j⟩/d (N, N)."""
        out = np.zeros_like(self.start.kernel)
        for one in v.terms:
            for other in w.terms:
                shared = self.between(one.base, other.base)
                if shared is not None:
                    out += np.outer(self.factor(one), self.factor(other)) * shared
        return out

    def inner(self, v: Terms, w: Terms) -> Array:
        """E⟨v_i, w_i⟩/d (N,)."""
        out = np.zeros(len(self.start.kernel))
        for one, other in product(v, w):
            shared = self.between(one.base, other.base)
            if shared is not None:
                out += self.factor(one) * self.factor(other) * shared.diagonal()
        return out

    def norm(self, v: KernelVector) -> KernelVector:
        """g·v/√(m + eps), with m = ``moment`` times the mean square."""
        mean_square = np.maximum(v.kernel.diagonal(), TINY)
        m = self.moment * mean_square
        saturated = saturation(m, v.relative_variance, self.eps)
        factor = self.gain * np.sqrt(saturated / mean_square)
        index = len(self.norms)
        self.norms.append(UsedNorm(v.terms, factor, m + self.eps, saturated, v.relative_variance))
        self.events.append(("norm", index))
        terms = tuple(replace(term, norms=(*term.norms, index)) for term in v.terms)
        # A mean square of m/(m + eps) moves by (1 − m/(m + eps)) of m's relative change.
        single = factor**2 * (1 - saturated)
        both = np.outer(factor, factor)
        reduced = np.ones_like(both) if v.normed else shrink(correlation(v.kernel))
        return KernelVector(
            self, terms, both * v.kernel, np.outer(single, single) * v.square,
            both**2 * v.cross * reduced, single * v.lean, both * v.lean_cross * np.sqrt(reduced), True,
        )  # fmt: skip

    def feed(
        self, sublayer: Callable[[Input], Branch], part: bool = False
    ) -> Callable[[KernelVector], KernelVector]:
        """A sublayer as a formula calls it: from a vector to a new base vector. part: it is a part."""

        def apply(v: KernelVector) -> KernelVector:
            inner = sublayer(Input(v.kernel, v.total_square, v.correlation_variance, v.normed))
            branch = inner if part else self.written(inner)
            index = len(self.kernels)
            self.kernels.append(branch.kernel)
            self.branches[index] = branch, v.terms
            self.events.append(("branch", index))
            wishart = 2 * branch.kernel**2 / self.width
            cross = (outer_square(branch.kernel) + branch.kernel**2) / self.width
            lean = np.zeros(len(cross)) if branch.lean is None else branch.lean * v.lean
            out = KernelVector(
                self, (Term(index, 1.0),), branch.kernel, branch.square + wishart,
                branch.cross + cross, lean, branch.slope * np.sqrt(v.correlation_variance),
            )  # fmt: skip
            if not part:
                self.read = v.kernel
                raw_square = inner.square + 2 * inner.kernel**2 / self.width
                self.raw = replace(out, kernel=inner.kernel, square=raw_square)
            return out

        return apply

    def add(self, skip: KernelVector, branch: KernelVector) -> KernelVector:
        """skip + branch."""
        self.added = branch.kernel
        return self.total(skip, branch)

    def total(self, skip: KernelVector, branch: KernelVector) -> KernelVector:
        """The sum of two vectors. Without a common base they are uncorrelated."""
        multiple = _multiple(skip.terms, branch.terms)
        if multiple is not None:
            return (1 + multiple) * skip
        kernel = skip.kernel + branch.kernel
        for one in skip.terms:
            for other in branch.terms:
                known = self.between(one.base, other.base)
                if known is not None:
                    factors = np.outer(self.factor(one), self.factor(other))
                    shared = factors * known
                    kernel = kernel + shared + shared.T
        a, b = skip.kernel, branch.kernel
        ends = np.outer(a.diagonal(), b.diagonal())
        square = skip.square + branch.square + 4 * a * b / self.width
        cross = skip.cross + branch.cross + (ends + ends.T + 2 * a * b) / self.width
        if self.starts > 1:  # what they share, as of Gaussian vectors
            apart = a + b
            # Below 0 where they cancel and an embedding's kurtosis is less than a Gaussian's.
            square = np.maximum(square + 2 * (kernel**2 - apart**2) / self.width, 0)
            more = outer_square(kernel) - outer_square(apart) + kernel**2 - apart**2
            cross = np.maximum(cross + more / self.width, 0)
        return KernelVector(
            self, skip.terms + branch.terms, kernel, square, cross,
            skip.lean + branch.lean, skip.lean_cross + branch.lean_cross,
        )  # fmt: skip

    def factor(self, term: Term) -> Array:
        """D_t (N,): a term's number times the factors of its norms."""
        factor = np.full(len(self.start.kernel), term.scale)
        for norm in term.norms:
            factor = factor * self.norms[norm].factor
        return factor


def _multiple(terms: Terms, others: Terms) -> float | None:
    """m, if the vector of ``others`` is m times that of ``terms``, else None."""
    if [(t.base, t.norms) for t in terms] != [(o.base, o.norms) for o in others]:
        return None
    pairs = zip(terms, others, strict=True)
    first, *ratios = (o.scale / t.scale if t.scale else math.inf for t, o in pairs)
    same = math.isfinite(first) and all(math.isclose(first, ratio) for ratio in ratios)
    return first if same else None


def pairs_of(vectors: Sequence[Terms], tokens: int) -> Iterator[tuple[slice, slice, Terms, Terms]]:
    """For each two of n vectors, as rows and as columns: their blocks of (nN, nN), and their terms."""
    places = [slice(i * tokens, (i + 1) * tokens) for i in range(len(vectors))]
    for (a, one), (b, other) in product(zip(places, vectors, strict=True), repeat=2):
        yield a, b, one, other


def state_of(*v: KernelVector) -> State:
    """The stream with which the next step starts, and what is carried along."""
    first, *others = (State(one.kernel, one.total_square, one.total_cross) for one in v)
    between = {(a, b): v[a].step.cross_kernel(v[a], v[b]) for b in range(len(v)) for a in range(b)}
    return replace(first, others=tuple(others), between=between)
