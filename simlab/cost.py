"""What a curve costs in each engine, and the choice that ``engine=auto`` makes.

A matrix of a block (d_out × d_in) meets N tokens. Operations, with multiply-adds counted as two:

| engine                | random numbers | products           | Gram matrix, Cholesky    |
|-----------------------|----------------|--------------------|--------------------------|
| dense                 | d_in·d_out     | 2·N·d_in·d_out     |                          |
| weightless, N < d_in  | N·d_out        | 2·N²·d_out         | 2·N²·d_in + N³/3, float64 |
| weightless, N ≥ d_in  | as dense       | as dense           |                          |

The Gram matrix is counted once for matrices with the same input. With gradients, dense draws twice
and multiplies three times; weightless draws twice, and N·d_in more, and see ``_weightless``. One
float64 operation counts as two, and a random number as ``DRAW``.
"""

from __future__ import annotations

from dataclasses import dataclass

from simlab.config import ModelConfig

# What one random number costs in float32 operations: of a dense weight, of a weightless normal. CPU:
# scripts/benchmark.py crossover. CUDA draws weights on the device but normals on the CPU; these two
# are estimates from data sheets. MPS draws everything on the CPU.
DRAW = {"cpu": (600.0, 600.0), "cuda": (1000.0, 25000.0), "mps": (5000.0, 5000.0)}


@dataclass(frozen=True)
class Cost:
    """Random numbers, and float32 operations (float64 ones count as two)."""

    numbers: float
    operations: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.numbers + other.numbers, self.operations + other.operations)


def groups(model: ModelConfig, gradients: bool) -> list[tuple[int, int, list[int]]]:
    """How often, d_in and the d_outs of the matrices that share an input."""
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    block = [
        (model.depth, model.width, [q, kv, kv]),
        (model.depth, q, [model.width]),
        (model.depth, model.width, [model.d_ff, model.d_ff]),
        (model.depth, model.d_ff, [model.width]),
    ]
    return [*block, (1, model.width, [model.vocab_size])] if gradients else block


def _dense(n: int, d_in: int, d_out: int, gradients: bool) -> Cost:
    draws, products = (2, 3) if gradients else (1, 1)
    return Cost(draws * d_in * d_out, products * 2 * n * d_in * d_out)


def _weightless(n: int, d_in: int, d_out: int, gradients: bool) -> Cost:
    if n >= d_in:
        return _dense(n, d_in, d_out, gradients)
    gram, cholesky = 4 * n * n * d_in, 2 * n**3 / 3
    if not gradients:
        return Cost(n * d_out, 2 * n * n * d_out + gram + cholesky)
    # Forward twice; then GZᵀ and GGᵀ, and for the input a triangular solve and three products.
    forward = 2 * (2 * n * n * d_out + gram + cholesky)
    back = 2 * n * n * d_out + 4 * n * n * d_out + cholesky + 2 * n * n * d_in + 6 * n * n * d_in
    return Cost(2 * n * d_out + n * d_in, forward + back)


def costs(model: ModelConfig, tokens: int, gradients: bool) -> dict[str, Cost]:
    """One curve's cost by engine."""
    total = {"dense": Cost(0, 0), "weightless": Cost(0, 0)}
    for times, d_in, d_outs in groups(model, gradients):
        for name, cost in (("dense", _dense), ("weightless", _weightless)):
            one = cost(tokens, d_in, sum(d_outs), gradients)
            total[name] += Cost(times * one.numbers, times * one.operations)
    return total


def choose(model: ModelConfig, tokens: int, gradients: bool, device: str) -> tuple[str, float]:
    """The engine with the lower estimate for random curves, and how many times lower it is.

    device: its type, a key of DRAW.
    """
    cost = costs(model, tokens, gradients)
    total = {
        name: cost[name].numbers * draw + cost[name].operations
        for name, draw in zip(("dense", "weightless"), DRAW[device], strict=True)
    }
    best = min(total, key=lambda name: total[name])
    return best, max(total.values()) / total[best]


def compute_threads(model: ModelConfig, tokens: int, gradients: bool, threads: int) -> int:
    """Of a CPU's threads, how many a weightless curve's products get while the rest draw normals.

    In proportion to the work, at least one. Measured on 2 cores for olmo2_32b at 64 tokens: 2.2 s
    with one beside the drawing, 3.4 s when both take turns.
    """
    cost = costs(model, tokens, gradients)["weightless"]
    drawing = cost.numbers * DRAW["cpu"][1]
    return max(1, round(threads * cost.operations / (cost.operations + drawing)))
