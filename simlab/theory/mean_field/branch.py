"""A sublayer as theory has it: a map from its input's kernel to its output's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from simlab.theory.laws import Array

TINY = 1e-300


@dataclass(frozen=True, eq=False)
class Input:
    """A sublayer's input: its kernel H, and the variance between seeds of its Gram matrix Ĥ.

    kernel: H (N, N). square: Cov(Ĥ_ii, Ĥ_jj) (N, N). correlation_variance: τ² = Var(ρ̂_ij) (N, N).
    normed: True if a norm fixes H_ii.
    """

    kernel: Array
    square: Array
    correlation_variance: Array
    normed: bool

    @property
    def relative_variance(self) -> Array:
        """Var(Ĥ_ii)/H_ii² (N,)."""
        return self.square.diagonal() / np.maximum(self.kernel.diagonal() ** 2, TINY)


class Branch(Protocol):
    """A sublayer's output, as ``attention`` and ``mlp`` compute it from its input's kernel H.

    ``square`` and ``cross`` are the vector's own parts, given the input and without what the last
    matrix's width adds.
    """

    @property
    def kernel(self) -> Array:
        """B_ij = E⟨b_i, b_j⟩/d (N, N)."""
        ...

    @property
    def units(self) -> int:
        """How many independent terms an output entry sums: hidden units, entries of values."""
        ...

    @property
    def square(self) -> Array:
        """Cov(B̂_ii, B̂_jj) between seeds (N, N)."""
        ...

    @property
    def cross(self) -> Array:
        """Var(B̂_ij) between seeds (N, N)."""
        ...

    @property
    def lean(self) -> Array | None:
        """dB_ii/dH_ii (N,) of an input whose mean square no norm fixes, else None."""
        ...

    @property
    def slope(self) -> Array:
        """dB_ij/dρ_ij (N, N)."""
        ...

    def covariance(self, functionals: Any) -> Array:
        """Cov(⟨A_i, B̂⟩, ⟨A_j, B̂⟩) (J, J) given the input, beyond Gaussian units' 2 tr(ABAB)/units."""
        ...

    def pull(self, functionals: Any) -> Any:
        """Symmetric functionals (J, N, N) of the input's Gram matrix, to which A reduces linearly."""
        ...

    def pull_gradient(self, gradient: Array) -> Array:
        """The kernel of the gradient at the input (N, N), from that at the output."""
        ...
