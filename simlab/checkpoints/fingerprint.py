"""What is learned of weights as they pass by: a hash of each tensor, and its statistics.

The hash has, of every row as 64-bit words w_i, the sum Σ w_i, and of every MIXED-th row Σ r_i·w_i with
fixed random odd r_i (multilinear hashing, Carter & Wegman 1979), modulo 2^64. Any one changed weight
changes it, so do rows in another order and columns in another order; what is left is a rearrangement of
words within a row that isn't mixed. It recognises weights; a stranger could make two that agree, so it
doesn't authenticate them. Measured on a 7B checkpoint in bfloat16: 0.9 s of 3.4 s of work. Mixing every
row takes 1.2 s; SHA-256, at 1.5 GB/s a core, would take 4.6.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WORD = 8  # bytes
MIXED = 64  # rows from one that is mixed to the next; the first is
AT_ONCE = 1 << 20  # bytes whose moments are taken at a time: they stay in a core's cache


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
    """Of a tensor of about a million entries at most, in its dtype. Overwrites it with its squares."""
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
    """Every parameter's hash, of those that were shown; its moments too where they are asked for.

    Threads may share it.
    """

    def __init__(self, with_moments: bool) -> None:
        self.with_moments = with_moments
        self.scratch = Scratch()
        self.sums: dict[str, Tensor] = {}
        self.odd = torch.empty(0, dtype=torch.int64)
        self.parts: dict[str, dict[int, list[Moments]]] = {}
        self.lock = threading.Lock()

    def of(self, name: str, count: int) -> Callable[[int, Tensor, Tensor | None], None]:
        """What is to be called with some rows of a parameter of ``count`` rows.

        It takes the first one's index, the rows, and the same in float32 if that is at hand and may
        be overwritten. The same rows are always taken together; shown again, they are not taken again.
        A parameter of one dimension is one row.
        """
        if name not in self.parts:
            self.sums[name], self.parts[name] = torch.zeros(2, count, dtype=torch.int64), {}
        sums, parts = self.sums[name], self.parts[name]

        def take(row: int, rows: Tensor, wide: Tensor | None = None) -> None:
            if row in parts:
                return
            flat = rows.reshape(len(rows), -1) if rows.ndim > 1 else rows.reshape(1, -1)
            self._hash(flat, row, sums[:, row : row + len(flat)])
            found = []
            if self.with_moments and rows.numel():
                step = max(1, AT_ONCE // (flat.shape[1] * flat.itemsize))
                for start in range(0, len(flat), step):
                    if rows.ndim == 1:  # gains lie close together: mean² would swallow their spread
                        few = self.scratch.copy(flat[start : start + step], torch.float64)
                    elif wide is None:
                        few = self.scratch.copy(flat[start : start + step], torch.float32)
                    else:
                        few = wide.view(flat.shape)[start : start + step]
                    found.append(moments(few))
            parts[row] = found

        return take

    def has(self, name: str) -> bool:
        """Whether a parameter was shown."""
        return bool(self.parts.get(name))

    def bytes_of(self, name: str) -> bytes:
        """A parameter's hash, 16 bytes a row."""
        return self.sums[name].numpy().tobytes()

    def statistics(self, name: str) -> dict[str, float]:
        """A parameter's statistics; see Moments."""
        parts = [part for _, found in sorted(self.parts[name].items()) for part in found]
        return sum(parts[1:], parts[0]).statistics()

    def _hash(self, flat: Tensor, row: int, out: Tensor) -> None:
        """Rows (R, C), the first of which is ``row``, to sums and, of some, mixed sums (2, R)."""
        data = flat.contiguous().view(torch.uint8)
        if data.shape[1] % WORD or data.data_ptr() % WORD:
            data = torch.nn.functional.pad(data, (0, -data.shape[1] % WORD)).clone()
        words = data.view(torch.int64)
        out[0] = words.sum(1)
        first = -row % MIXED
        for i in range(first, len(words), MIXED):
            out[1, i] = torch.dot(words[i], self._multipliers(words.shape[1]))

    def _multipliers(self, count: int) -> Tensor:
        with self.lock:
            if len(self.odd) < count:
                generator = np.random.Generator(np.random.SFC64(0))
                size = max(count, 2 * len(self.odd))
                drawn = generator.integers(-(2**63), 2**63 - 1, size, np.int64, endpoint=True)
                self.odd = torch.from_numpy(drawn | 1)
            return self.odd[:count]
