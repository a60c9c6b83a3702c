"""Linear layers whose weights stay in their files and are multiplied a few rows at a time.

A few rows of a weight are mapped, converted to the run's dtype while they are in a core's cache,
multiplied and dropped: no matrix is ever whole in memory. Measured for 64 tokens and a 7B checkpoint
in bfloat16, in the system's cache, on 2 cores: 5.0 s of work in float32 and 2.9 in bfloat16, where bare
products with resident matrices take 3.4 and 0.9, and reading the bytes 0.6
(scripts/benchmark_checkpoint.py).
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simlab.checkpoints.fingerprint import SCRATCH, Fingerprints
from simlab.checkpoints.storage import MappedFiles, StoredTensor

# Bytes of a weight that one thread takes: measured, 1 MiB is a fifth slower. Weight hashes are made
# run by run: another value changes those of larger matrices.
RUN_BYTES = 8 << 20
COLUMN_SHARES = 8


def pool() -> ThreadPoolExecutor:
    """A pool of one thread per core, each with one torch thread.

    torch makes a thread's setting the default of threads started later; all of ours set the same.
    """
    return ThreadPoolExecutor(
        torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)
    )


def row_runs(stored: StoredTensor, start: int, stop: int) -> list[tuple[int, int]]:
    """Rows start … stop − 1 in runs of about RUN_BYTES bytes."""
    row = max(1, math.prod(stored.shape[1:]) * stored.dtype.itemsize)
    step = max(1, RUN_BYTES // row)
    return [(a, min(a + step, stop)) for a in range(start, stop, step)]


@dataclass(frozen=True)
class StreamedMatrix:
    """The weight W (d_out × d_in) of the parameter ``name``: rows start … stop − 1 of a stored tensor.

    Its rows are added to ``fingerprints`` as they are read.
    """

    name: str
    files: MappedFiles
    stored: StoredTensor
    start: int
    stop: int
    threads: ThreadPoolExecutor
    fingerprints: Fingerprints

    def times(self, x: Tensor) -> Tensor:
        """x Wᵀ: (N, d_in) to (N, d_out), in x's dtype."""
        out = x.new_empty(self.stop - self.start, len(x))
        turned = x.T.contiguous()

        def work(run: tuple[int, int]) -> None:
            with torch.no_grad():
                row = run[0] - self.start
                rows = self.files.rows(self.stored, *run)
                copied = rows.dtype != x.dtype
                weight = SCRATCH.copy(rows, x.dtype) if copied else rows
                torch.mm(weight, turned, out=out[row : row + len(rows)])
                wide = weight if copied and x.dtype is torch.float32 else None
                self.fingerprints.add(self.name, row, rows, wide)

        for _ in self.threads.map(work, row_runs(self.stored, self.start, self.stop)):
            pass
        self.files.release(self.stored)
        return out.T.contiguous()

    def back(self, g: Tensor) -> Tensor:
        """g W: (N, d_out) to (N, d_in), in g's dtype.

        A thread sums some columns over all rows, so that the order of the sums is always the same.
        """
        d_in = self.stored.shape[1]
        out = torch.zeros(len(g), d_in)
        step = max(1, -(-d_in // COLUMN_SHARES))
        rows = max(1, RUN_BYTES // (step * self.stored.dtype.itemsize))

        def work(column: int) -> None:
            columns = slice(column, column + step)
            with torch.no_grad():
                for a in range(self.start, self.stop, rows):
                    b = min(a + rows, self.stop)
                    part = self.files.rows(self.stored, a, b)[:, columns]
                    weight = SCRATCH.copy(part, g.dtype)
                    out[:, columns] += g[:, a - self.start : b - self.start] @ weight

        for _ in self.threads.map(work, range(0, d_in, step)):
            pass
        self.files.release(self.stored)
        return out.to(g.dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ, and back: gW. W itself asks for no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: StreamedMatrix) -> Tensor:
        ctx.matrix = matrix
        return matrix.times(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.matrix.back(gradients[0]), None


class StreamedLinear(nn.Module):
    """A linear layer without bias, (…, d_in) to (…, d_out), whose weight ``bind`` sets."""

    matrix: StreamedMatrix

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()

    def bind(self, matrix: StreamedMatrix) -> None:
        """Set the weight."""
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) to (…, d_out), in x's dtype."""
        out: Tensor = _Product.apply(x.flatten(0, -2), self.matrix)
        return out.unflatten(0, x.shape[:-1])
