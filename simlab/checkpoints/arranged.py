"""Tensors whose numbers a file has in another order than a linear layer: turned, or head by head.

They are read like any other, some rows at a time, and have the hash of the same weights in simlab's
order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from simlab.checkpoints.storage import READ_BYTES, Piece, Scratch, StoredTensor, bytes_of

TURNED_BYTES = 8 << 20  # of rows that are turned together
# Of a file's row that is read whole although few of its columns are wanted: a call costs 10 µs.
WHOLE_BYTES = 32 << 10
_COLUMNS, _ROWS = Scratch(), Scratch()


@dataclass(frozen=True)
class TurnedTensor(StoredTensor):
    """A matrix (d_out, d_in) that its file has as (d_in, d_out), in one piece: GPT-2's Conv1D."""

    def _read(
        self, piece: Piece, start: int, out: Tensor, seen: Callable[[memoryview], object] | None
    ) -> None:
        """The rows from ``start`` on, as many as ``out`` has: some columns of each row of the file."""
        d_out, d_in = self.shape
        size = self.dtype.itemsize
        step = max(1, TURNED_BYTES // (d_in * size))
        for a in range(0, len(out), step):
            part = out[a : a + step]
            count = len(part)
            rows = part if part.dtype == self.dtype else _ROWS.empty(part.shape, self.dtype)
            whole = d_out * size <= WHOLE_BYTES
            left, width = (0, d_out) if whole else (start + a, count)
            most = max(1, READ_BYTES // (width * size))
            for first in range(0, d_in, most):
                columns = _COLUMNS.empty((min(most, d_in - first), width), self.dtype)
                runs = [columns.view(-1)] if whole else columns
                for i, run in enumerate(runs, start=first):
                    piece.file.read_into(bytes_of(run), piece.offset + (i * d_out + left) * size)
                skip = start + a - left
                rows[:, first : first + len(columns)] = columns[:, skip : skip + count].T
            if seen is not None:
                seen(bytes_of(rows.view(-1)))
            if rows is not part:
                part.copy_(rows)


def turned(stored: StoredTensor) -> StoredTensor:
    """The transpose of a stored matrix in one piece."""
    (piece,) = stored.pieces
    shape = stored.shape[::-1]
    return TurnedTensor(stored.name, shape, stored.dtype, (replace(piece, shape=shape),))


def by_head(stored: StoredTensor, heads: int, parts: int) -> list[StoredTensor]:
    """A stored tensor's parts, of which its rows have every head's one after another.

    stored: (heads · parts · C, …) in one piece, C rows of a head's first part, C of its second, and so
    on. Returns as many tensors (heads · C, …) as there are parts.
    """
    (piece,) = stored.pieces
    rest = stored.shape[1:]
    rows = stored.shape[0] // (heads * parts)
    size = stored.size_of((rows, *rest))
    return [
        replace(
            stored,
            shape=(heads * rows, *rest),
            pieces=tuple(
                Piece(
                    piece.file,
                    piece.offset + (head * parts + part) * size,
                    (head * rows, *(0 for _ in rest)),
                    (rows, *rest),
                )
                for head in range(heads)
            ),
        )
        for part in range(parts)
    ]
