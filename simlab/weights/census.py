"""What is learned of weights as they pass by: a hash of every row, and each tensor's statistics.

The hash of a row, as 64-bit words w_i, is Σ r_i·w_i modulo 2^64 with fixed random odd r_i (multilinear
hashing, Carter & Wegman 1979). A row with one word changed always has another value, rows that differ
in more agree with a chance of about 2^-63; a stranger who tried could make two that agree, so this
recognises weights and doesn't authenticate them. Cryptographic hashes run at 1 to 2 GB/s on a core,
this at 20.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WORD = 8  # bytes


@dataclass(frozen=True)
class Moments:
    """Sums over some entries w: how many, Σw, Σw², Σw⁴, Σ|w|, and the extremes."""

    count: int
    sums: tuple[float, float, float, float]
    low: float
    high: float

    def __add__(self, other: Moments) -> Moments:
        sums = [a + b for a, b in zip(self.sums, other.sums, strict=True)]
        low, high = min(self.low, other.low), max(self.high, other.high)
        return Moments(self.count + other.count, (sums[0], sums[1], sums[2], sums[3]), low, high)

    def statistics(self) -> dict[str, float]:
        """min, max, mean, std (over all entries), mean_abs, and kurtosis: 3 for a Gaussian."""
        first, second, fourth, absolute = (total / self.count for total in self.sums)
        variance = max(second - first**2, 0.0)
        return {
            "min": self.low,
            "max": self.high,
            "mean": first,
            "std": variance**0.5,
            "mean_abs": absolute,
            "kurtosis": fourth / second**2 if second else float("nan"),
        }


def moments(w: Tensor) -> Moments:
    """Of a float32 tensor, about a million entries at most. Overwrites it with its squares."""
    low, high = torch.aminmax(w)
    total, squares = w.sum(), torch.linalg.vector_norm(w)
    absolute = w.abs_().sum()  # measured, a third of vector_norm(w, 1)'s time
    fourths = torch.linalg.vector_norm(w.square_())
    found = torch.stack([total, squares, fourths, absolute, low, high]).double().tolist()
    sums = (found[0], found[1] ** 2, found[2] ** 2, found[3])
    return Moments(w.numel(), sums, found[4], found[5])


class Scratch(threading.local):
    """A thread's buffers, one per dtype, used again and again.

    Thousands of short-lived megabytes on several threads, with small results between them, fragment
    glibc's arenas: measured, a 7B checkpoint left 20 GB behind.
    """

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}

    def copy(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x in another dtype, valid until this thread's next call for that dtype."""
        buffer = self.buffers.get(dtype)
        if buffer is None or buffer.numel() < x.numel():
            buffer = self.buffers[dtype] = torch.empty(x.numel(), dtype=dtype)
        return buffer[: x.numel()].view(x.shape).copy_(x)


class Census:
    """A number per row of every parameter that was shown; its moments too where they are asked for.

    Threads may share it.
    """

    def __init__(self, with_moments: bool) -> None:
        self.with_moments = with_moments
        self.scratch = Scratch()
        self.hashes: dict[str, Tensor] = {}
        self.parts: dict[str, dict[int, Moments | None]] = {}
        self.odd = torch.empty(0, dtype=torch.int64)
        self.lock = threading.Lock()

    def of(self, name: str, count: int) -> Callable[[int, Tensor, Tensor | None], None]:
        """What is to be called with each few rows of a parameter of ``count`` rows.

        It takes the first one's index, the rows, and the same in float32 if that is at hand and may
        be overwritten. The same rows are always taken together; shown again, they are not taken again.
        A parameter of one dimension is one row.
        """
        if name not in self.parts:
            self.hashes[name], self.parts[name] = torch.empty(count, dtype=torch.int64), {}
        hashes, parts = self.hashes[name], self.parts[name]

        def take(row: int, rows: Tensor, wide: Tensor | None = None) -> None:
            if row in parts:
                return
            flat = rows.reshape(len(rows), -1) if rows.ndim > 1 else rows.reshape(1, -1)
            self._hash(flat, hashes[row : row + len(flat)])
            found = None
            if self.with_moments and rows.numel():
                found = moments(self.scratch.copy(rows, torch.float32) if wide is None else wide)
            parts[row] = found

        return take

    def has(self, name: str) -> bool:
        """Whether a parameter was shown."""
        return bool(self.parts.get(name))

    def bytes_of(self, name: str) -> bytes:
        """A parameter's rows' numbers."""
        return self.hashes[name].numpy().tobytes()

    def statistics(self, name: str) -> dict[str, float]:
        """A parameter's statistics; see Moments."""
        parts = [part for _, part in sorted(self.parts[name].items()) if part is not None]
        return sum(parts[1:], parts[0]).statistics()

    def _hash(self, flat: Tensor, out: Tensor) -> None:
        """(R, C) to (R,) int64."""
        data = flat.contiguous().view(torch.uint8)
        if data.shape[1] % WORD or data.data_ptr() % WORD:
            data = torch.nn.functional.pad(data, (0, -data.shape[1] % WORD)).clone()
        words = data.view(torch.int64)
        torch.mv(words, self._multipliers(words.shape[1]), out=out)

    def _multipliers(self, count: int) -> Tensor:
        with self.lock:
            if len(self.odd) < count:
                generator = np.random.Generator(np.random.SFC64(0))
                size = max(count, 2 * len(self.odd))
                drawn = generator.integers(-(2**63), 2**63 - 1, size, np.int64, endpoint=True)
                self.odd = torch.from_numpy(drawn | 1)
            return self.odd[:count]
