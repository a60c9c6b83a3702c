"""What a curve can't do without: its random numbers and its products of matrices, bare."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def draw(count: int, threads: int) -> None:
    """Draw ``count`` float32 normals on some threads, into buffers that a core's cache holds."""
    piece = 1 << 16
    buffers = [np.empty(piece, np.float32) for _ in range(threads)]
    generators = [np.random.Generator(np.random.SFC64(i)) for i in range(threads)]

    def share(i: int) -> None:
        for _ in range(max(1, count // piece // threads)):
            generators[i].standard_normal(out=buffers[i], dtype=np.float32)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(threads)))


def bare(depth: int, tokens: int, d_ins: Sequence[int], d_outs: Sequence[int]) -> None:
    """A weightless forward's unavoidable operations: normals, Gram matrices, Cholesky, products."""
    import torch

    draw(depth * tokens * sum(d_outs), torch.get_num_threads())
    inputs = [torch.randn(tokens, d) for d in d_ins]
    drawn = [torch.randn(tokens, d) for d in d_outs]
    lower = torch.eye(tokens)
    for _ in range(depth):
        for x in inputs:
            wide = x.double()
            square = wide @ wide.T
            torch.linalg.cholesky(square)
        for z in drawn:
            lower @ z


def sizes(overrides: Sequence[str]) -> dict[str, object]:
    """The arguments of ``bare`` for a config."""
    from simlab import compose
    from simlab.budget.cost import matrix_groups

    config = compose(overrides)
    blocks = matrix_groups(config.shape, gradients=False)
    assert config.inputs.batch is not None
    assert config.inputs.length is not None
    return {
        "depth": config.shape.depth,
        "tokens": config.inputs.batch * config.inputs.length,
        "d_ins": [d_in for _, _, d_in, _ in blocks],
        "d_outs": [d_out for *_, d_outs in blocks for d_out in d_outs],
    }
