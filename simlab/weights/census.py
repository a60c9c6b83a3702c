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


def moments(entries: Tensor) -> Moments:
    """Of a tensor, summed in float32 (float64 for float64) over about a million entries at most."""
    w = entries.reshape(-1)
    w = w if w.dtype is torch.float64 else w.float()
    low, high = torch.aminmax(w)
    squares = torch.linalg.vector_norm(w).double() ** 2
    fourths = torch.linalg.vector_norm(w * w).double() ** 2
    absolute = torch.linalg.vector_norm(w, 1)
    sums = torch.stack([w.sum().double(), squares, fourths, absolute.double()]).tolist()
    return Moments(w.numel(), (sums[0], sums[1], sums[2], sums[3]), float(low), float(high))


class Census:
    """One number per row of every parameter that was shown; its moments too where they are asked for.

    Threads may share it.
    """

    def __init__(self, with_moments: bool) -> None:
        self.with_moments = with_moments
        self.rows: dict[str, dict[int, Tensor]] = {}
        self.parts: dict[str, dict[int, Moments]] = {}
        self.odd = torch.empty(0, dtype=torch.int64)
        self.lock = threading.Lock()

    def of(self, name: str) -> Callable[[int, Tensor], None]:
        """What is to be called with each few rows of a parameter and the first one's index.

        The same rows are always taken together; shown again, they are not taken again.
        """
        seen, parts = self.rows.setdefault(name, {}), self.parts.setdefault(name, {})

        def take(row: int, rows: Tensor) -> None:
            if row not in seen:
                seen[row] = self._hash(rows)
                if self.with_moments and rows.numel():
                    parts[row] = moments(rows)

        return take

    def has(self, name: str) -> bool:
        """Whether a parameter was shown."""
        return bool(self.rows.get(name))

    def bytes_of(self, name: str) -> bytes:
        """A parameter's rows' numbers in order, however they were grouped."""
        parts = self.rows[name]
        return b"".join(parts[row].numpy().tobytes() for row in sorted(parts))

    def statistics(self, name: str) -> dict[str, float]:
        """A parameter's statistics; see Moments."""
        parts = self.parts[name]
        total, *rest = (parts[row] for row in sorted(parts))
        for part in rest:
            total += part
        return total.statistics()

    def _hash(self, rows: Tensor) -> Tensor:
        """(R, …) to (R,) int64; of one dimension, all as one row: (1,)."""
        flat = rows.reshape(len(rows), -1) if rows.ndim > 1 else rows.reshape(1, -1)
        data = flat.contiguous().view(torch.uint8)
        if data.shape[1] % WORD or data.data_ptr() % WORD:
            data = torch.nn.functional.pad(data, (0, -data.shape[1] % WORD)).clone()
        words = data.view(torch.int64)
        return torch.mv(words, self._multipliers(words.shape[1]))

    def _multipliers(self, count: int) -> Tensor:
        with self.lock:
            if len(self.odd) < count:
                generator = np.random.Generator(np.random.SFC64(0))
                size = max(count, 2 * len(self.odd))
                drawn = generator.integers(-(2**63), 2**63 - 1, size, np.int64, endpoint=True)
                self.odd = torch.from_numpy(drawn | 1)
            return self.odd[:count]
