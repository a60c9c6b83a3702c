"""Tensors of GGUF files: numbers in blocks of a few bits each, and rows in another order.

A few rows of them are read, made float32 and put in order at a time, as a tensor's that has its numbers
in the file; nothing else of simlab knows of them. Their hash is of what is made of them: a quantised
model has the hash of its dequantised weights in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from simlab.checkpoints.storage import READ_BYTES, Piece, Scratch, StoredTensor, bytes_of

_RAW = Scratch()


@dataclass(frozen=True)
class Packing:
    """How a row lies in a file: blocks of ``entries`` numbers in ``size`` bytes each.

    unpack: makes rows' bytes (R, B) uint8 numbers (R, C) of the tensor's dtype.
    """

    name: str
    entries: int
    size: int
    unpack: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """A matrix (R, C) whose rows are packed. C is a multiple of the packing's entries.

    head_dim: above 0, the rows of a head (as many) are two halves that the file has interleaved: row
    2i + j of a head there is its row j·head_dim/2 + i here.
    """

    packing: Packing
    head_dim: int = 0

    @property
    def kind(self) -> str:
        """The name of its packing."""
        return self.packing.name

    def size_of(self, shape: tuple[int, ...]) -> int:
        """Bytes that some of its entries take in a file."""
        return math.prod(shape) // self.packing.entries * self.packing.size

    def _read(
        self, piece: Piece, start: int, out: Tensor, seen: Callable[[memoryview], object] | None
    ) -> None:
        """The rows from ``start`` on, as many as ``out`` has."""
        width, group = self.shape[1], self.head_dim or 1
        row, stop = self.size_of((1, width)), start + len(out)
        # Whole heads, as few as fill a core's cache: unpacking makes several copies of them.
        step = max(1, READ_BYTES // (4 * width * group)) * group
        for a in range(start - start % group, stop, step):
            b = min(a + step, self.shape[0])
            raw = _RAW.empty((b - a, row), torch.uint8)
            piece.file.read_into(bytes_of(raw.view(-1)), piece.offset + a * row)
            rows = self.packing.unpack(raw)
            if self.head_dim:
                pairs = rows.view(-1, self.head_dim // 2, 2, width)
                rows = pairs.transpose(1, 2).reshape(b - a, width)
            first, last = max(a, start), min(b, stop)
            rows = rows[first - a : last - a]
            if seen is not None:
                seen(bytes_of(rows.reshape(-1)))
            out[first - start : last - start] = rows
