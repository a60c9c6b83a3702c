"""What heads are drawn from: fixed random numbers, roots of kernels, RoPE's tables and masks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simlab.config import ModelConfig
from simlab.schemes.rope import inverse_frequencies
from simlab.theory.laws import Array
from simlab.theory.mean_field.branch import TINY

Array32 = NDArray[np.float32]
POOL = 1 << 21
COPIED = 1 << 20  # entries of drawn heads' kernels of which a copy is made at a time


@cache
def _pool(seed: int) -> tuple[Array32, Any]:
    """POOL standard normals, and the generator's state after them."""
    generator = np.random.default_rng(seed)
    pool = generator.standard_normal(POOL, dtype=np.float32)
    pool.setflags(write=False)
    return pool, generator.bit_generator.state


class Draws:
    """Fixed standard normals, in float32: a pool drawn once, read from changing places."""

    def __init__(self, seed: int = 0) -> None:
        self.pool, state = _pool(seed)
        self.generator = np.random.default_rng()
        self.generator.bit_generator.state = state

    def __call__(self, *shape: int) -> Array32:
        """Normals of a shape."""
        n = math.prod(shape)
        if n > POOL // 2:
            return self.generator.standard_normal(n, dtype=np.float32).reshape(shape)
        start = int(self.generator.integers(POOL - n))
        return self.pool[start : start + n].reshape(shape)


def cholesky(kernel: Array) -> Array:
    """L with LLᵀ = kernel; of one that is singular or not quite positive, by its eigenvectors."""
    root = np.sqrt(np.maximum(kernel.diagonal(), TINY))
    unit = kernel / np.outer(root, root)
    try:
        return root[:, None] * np.linalg.cholesky(unit + 1e-10 * np.eye(len(unit)))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(unit)
        out: Array = root[:, None] * vectors * np.sqrt(np.maximum(values, 0))
        return out


@dataclass(frozen=True, eq=False)
class Context:
    """The parts that every layer's attention uses: the model, the fixed draws and RoPE's tables.

    batch, length: B sequences of T tokens. ids: theirs (B, T), which value embeddings need.
    tables: cos and sin (R/2, N) by ``scaled``, made on demand.
    """

    model: ModelConfig
    batch: int
    length: int
    ids: NDArray[np.int64] | None = None
    draws: Draws = field(default_factory=Draws)
    memory: dict[str, Array32] = field(default_factory=dict)
    tables: dict[bool, tuple[Array32, Array32]] = field(default_factory=dict)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The number (N,) of each token's id among the different ones."""
        assert self.ids is not None
        return np.unique(self.ids.reshape(-1), return_inverse=True)[1].reshape(-1)

    def rope(self, scaled: bool) -> tuple[Array32, Array32]:
        """cos and sin (R/2, N) of the R channels that turn, with long-context scaling or without."""
        if scaled not in self.tables:
            model = self.model
            angles, factor = inverse_frequencies(
                np.arange(model.turned // 2, dtype=np.float64), model.turned,
                *model.rope_of(local=not scaled),
            )  # fmt: skip
            turns = np.outer(angles, np.tile(np.arange(self.length), self.batch))
            self.tables[scaled] = (
                (factor * np.cos(turns)).astype(np.float32),
                (factor * np.sin(turns)).astype(np.float32),
            )
        return self.tables[scaled]

    def scratch(self, name: str, *shape: int) -> Array32:
        """An array of a shape to write to: the same memory for every layer, still in the cache."""
        size = math.prod(shape)
        if name not in self.memory or self.memory[name].size < size:
            self.memory[name] = np.empty(size, np.float32)
        return self.memory[name][:size].reshape(shape)

    def sequences(self, x: Array32) -> Array32:
        """A view (…, B, T, C) of (…, C, N)."""
        split = x.reshape(*x.shape[:-1], self.batch, self.length)
        return np.moveaxis(split, -3, -1)

    def mask(self, window: int | None) -> Array32:
        """0 (T, T) where a query may look, −∞ elsewhere."""
        causal = np.tril(np.ones((self.length, self.length), dtype=bool))
        seen = causal if window is None else causal & ~np.tril(causal, -window)
        return np.where(seen, np.float32(0), np.float32(-np.inf))


def turn(x: Array32, table: tuple[Array32, Array32], out: Array32 | None = None) -> Array32:
    """RoPE on halves (…, C, N), with tables of cos and sin (R/2, N) for the first R channels."""
    cos, sin = table
    half = len(cos)
    out = np.empty_like(x) if out is None else out
    first, second = x[..., :half, :], x[..., half : 2 * half, :]
    left, right = out[..., :half, :], out[..., half : 2 * half, :]
    np.multiply(first, cos, out=left)
    left -= second * sin
    np.multiply(second, cos, out=right)
    right += first * sin
    out[..., 2 * half :, :] = x[..., 2 * half :, :]
    return out


def pieces(count: int, entries: int) -> Iterator[slice]:
    """Slices that divide ``count`` rows into groups of at most COPIED numbers, or of eight rows.

    entries: numbers in a row. Every group but the last has a multiple of eight rows.
    """
    rows = max(8, COPIED // entries // 8 * 8)
    return (slice(first, first + rows) for first in range(0, count, rows))
