"""A hash of weights, fast enough to be taken of all that is read.

Of each row, as 64-bit words w_i, Σ r_i·w_i modulo 2^64 with fixed random odd r_i (multilinear hashing,
Carter & Wegman 1979). A row with one word changed always has another value, rows that differ in more
agree with a chance of about 2^-63; a stranger who tried could make two that agree, so this recognises
weights and doesn't authenticate them. Cryptographic hashes run at 1 to 2 GB/s here, this at 20.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

WORD = 8  # bytes


class Fingerprints:
    """One number per row of every parameter that was shown. Threads may share it."""

    def __init__(self) -> None:
        self.found: dict[str, dict[int, Tensor]] = {}
        self.odd = torch.empty(0, dtype=torch.int64)
        self.lock = threading.Lock()

    def of(self, name: str) -> Callable[[int, Tensor], None]:
        """What is to be called with each few rows of a parameter and the first one's index.

        The same rows are always taken together; shown again, they are not taken again.
        """
        seen = self.found.setdefault(name, {})

        def take(row: int, rows: Tensor) -> None:
            if row not in seen:
                seen[row] = self._hash(rows)

        return take

    def take(self, name: str, tensor: Tensor) -> None:
        """A whole parameter."""
        self.of(name)(0, tensor)

    def has(self, name: str) -> bool:
        """Whether a parameter was shown."""
        return bool(self.found.get(name))

    def bytes_of(self, name: str) -> bytes:
        """A parameter's rows' numbers in order, however they were grouped."""
        parts = self.found[name]
        return b"".join(parts[row].numpy().tobytes() for row in sorted(parts))

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
