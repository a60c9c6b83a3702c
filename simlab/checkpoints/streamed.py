"""Linear layers whose weights stay in their files and are multiplied a few rows at a time.

A few rows of a weight are read, converted to the run's dtype while they are in a core's cache,
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

from simlab.checkpoints.fingerprint import Fingerprints
from simlab.checkpoints.storage import READ, SCRATCH, StoredTensor

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
            row = run[0] - self.start
            hashed = self.fingerprints.started(self.name, row)
            # Moments are of the file's values or float32's: rows for a narrower product are kept.
            narrow = x.dtype not in (torch.float32, self.stored.dtype)
            shape = (run[1] - run[0], *self.stored.shape[1:])
            rows = READ.empty(shape, self.stored.dtype if narrow else x.dtype)
            with torch.no_grad():
                self.stored.rows(*run, rows, hashed.update if hashed else None)
                weight = SCRATCH.copy(rows, x.dtype) if narrow else rows
                torch.mm(weight, turned, out=out[row : row + len(weight)])
                self.fingerprints.add(self.name, row, hashed, rows, self.stored.dtype)

        for _ in self.threads.map(work, row_runs(self.stored, self.start, self.stop)):
            pass
        return out.T.contiguous()

    def back(self, g: Tensor) -> Tensor:
        """g W: (N, d_out) to (N, d_in), in g's dtype.

        A thread sums some columns over all rows, so that the order of the sums is always the same.
        """
        d_in, dtype = self.stored.shape[1], self.stored.dtype
        out = torch.zeros(len(g), d_in)
        step = max(1, -(-d_in // COLUMN_SHARES))
        most = max(1, RUN_BYTES // (step * dtype.itemsize))
        for a in range(self.start, self.stop, most):
            b = min(a + most, self.stop)
            part, some = READ.empty((b - a, d_in), dtype), g[:, a - self.start : b - self.start]

            def read(run: tuple[int, int], part: Tensor = part, a: int = a) -> None:
                self.stored.rows(*run, part[run[0] - a : run[1] - a])

            def work(column: int, part: Tensor = part, some: Tensor = some) -> None:
                columns = slice(column, column + step)
                with torch.no_grad():
                    out[:, columns] += some @ SCRATCH.copy(part[:, columns], g.dtype)

            for _ in self.threads.map(read, row_runs(self.stored, a, b)):
                pass
            for _ in self.threads.map(work, range(0, d_in, step)):
                pass
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
    """A linear layer, (…, d_in) to (…, d_out), whose weight ``bind`` sets; its bias is a parameter."""

    matrix: StreamedMatrix

    def __init__(self, d_in: int, d_out: int, bias: bool = False) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def bind(self, matrix: StreamedMatrix) -> None:
        """Set the weight."""
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) to (…, d_out), in x's dtype."""
        out: Tensor = _Product.apply(x.flatten(0, -2), self.matrix)
        if self.bias is not None:
            out = out + self.bias
        return out.unflatten(0, x.shape[:-1])
