"""The cost of a curve in each engine: ``engine=auto`` chooses by it, and it estimates the time.

A matrix of a block (d_out × d_in) meets N tokens. Operations, with multiply-adds counted as two:

| engine                | random numbers | products           | Gram matrix, Cholesky    |
|-----------------------|----------------|--------------------|--------------------------|
| dense                 | d_in·d_out     | 2·N·d_in·d_out     |                          |
| weightless, N < d_in  | N·d_out        | 2·N²·d_out         | 2·N²·d_in + N³/3, float64 |
| weightless, N ≥ d_in  | as dense       | as dense           |                          |

The Gram matrix is counted once for matrices with the same input. With gradients, dense draws twice
and multiplies three times; weightless draws twice, and N·d_in more, and see ``_weightless``. One
float64 operation counts as two, and a random number as ``DRAW``.

``seconds`` is an estimate too. Its constants are measured on a CPU, and so is how far off it is
(``python scripts/benchmark_estimates.py`` does it again); of other devices they are guesses.
"""

from __future__ import annotations

from dataclasses import dataclass

from simlab.budget.families import family_seconds
from simlab.budget.machine import Rates, calibrate
from simlab.budget.trace import trace
from simlab.config import FamilyConfig, ModelConfig, RunConfig
from simlab.model.describe import describe, describe_end
from simlab.weights.base import Weights
from simlab.weights.dense import rows_per_piece
from simlab.weights.weightless import together

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


def matrix_groups(model: ModelConfig, gradients: bool) -> list[tuple[int, float, int, list[int]]]:
    """Count, share of the tokens, d_in, d_outs of each group of matrices with one input.

    With gradients also the head's. An expert gets its average share. A placement's start counts as if
    the gradient went through it.
    """
    block = describe(model)
    groups = [
        (model.depth, share, d_in, d_outs)
        for share, (d_in, d_outs) in zip(block.shares, block.groups, strict=True)
    ]
    for end in ("start", "finish")[: 1 + gradients]:
        groups += [(1, 1.0, d_in, d_outs) for d_in, d_outs in describe_end(model, end).groups]
    return [*groups, (1, 1.0, model.width, [model.vocab_size])] if gradients else groups


def _dense(n: float, d_in: int, d_out: int, gradients: bool) -> Cost:
    draws, products = (2, 3) if gradients else (1, 1)
    return Cost(draws * d_in * d_out, products * 2 * n * d_in * d_out)


def _weightless(n: float, d_in: int, d_out: int, gradients: bool) -> Cost:
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
    for times, share, d_in, d_outs in matrix_groups(model, gradients):
        for name, cost in (("dense", _dense), ("weightless", _weightless)):
            one = cost(share * tokens, d_in, sum(d_outs), gradients)
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


def drawing_threads(model: ModelConfig, tokens: int, gradients: bool, threads: int) -> int:
    """The number of ``threads`` that draw a weightless run's normals while the others multiply.

    In proportion to the work, and at least one multiplies. With one thread it is 0: that thread does
    both. Measured on 2 cores for olmo2_32b at 64 tokens: 2.2 s with one thread for each, 3.4 s when
    both threads do both.
    """
    cost = costs(model, tokens, gradients)["weightless"]
    drawing = cost.numbers * DRAW["cpu"][1]
    return threads - max(1, round(threads * cost.operations / (cost.operations + drawing)))


@dataclass(frozen=True)
class Curve:
    """A kind of curve and how many ``seeds`` of it are measured. Its sizes are in bytes.

    engine: dense or weightless. stored: a checkpoint's, which is dense. device: cpu, cuda or mps.
    threads: of the CPU.
    """

    model: ModelConfig
    batch: int
    length: int
    gradients: bool
    engine: str
    dtype: str
    device: str = "cpu"
    threads: int = 1
    stored: bool = False
    seeds: int = 1

    @property
    def weightless(self) -> bool:
        """True if its matrices are never drawn."""
        return self.engine == "weightless" and not self.stored

    @property
    def size(self) -> int:
        """Bytes of one number of the stream."""
        return 4 if self.dtype == "float32" else 2

    @property
    def tokens(self) -> int:
        """Tokens of a seed's batch."""
        return self.batch * self.length

    @property
    def together(self) -> int:
        """How many sequences pass through a block at a time."""
        return (
            self.batch
            if self.weightless
            else min(self.batch, max(1, Weights.tokens_at_once // self.length))
        )

    @property
    def batch_seeds(self) -> int:
        """How many of the seeds pass through the blocks as one batch."""
        if not self.weightless:
            return 1
        return together(self.model, self.tokens, self.gradients, self.seeds)

    @property
    def drawing(self) -> int:
        """Extra threads that draw random numbers meanwhile; 0: the computing threads draw."""
        if not self.weightless:
            return 0
        if self.device != "cpu":
            return self.threads
        return drawing_threads(self.model, self.tokens, self.gradients, self.threads)

    @property
    def computing(self) -> int:
        """Threads that torch multiplies with."""
        return self.threads if self.device != "cpu" else self.threads - self.drawing

    @property
    def stream(self) -> int:
        """Bytes of the residual stream of all tokens of a seed."""
        return self.tokens * self.model.width * self.size


# Passes over a large tensor, as Rates.entry counts them; measured.
STEP_PASSES = 12  # of the stream's statistics, a residual step
ATTENTION_PASSES = 5  # of the attention matrices' statistics
LOGIT_PASSES = 6
CALLS = 3000  # Rates.call of a group of sequences in a block, with its statistics
# Rates.number: of a dense weight, cut at ±3σ and written; of a weightless normal (weights.rng).
WEIGHT, NORMAL = 1.4, 0.35


def seconds(curve: Curve, rates: Rates | None = None) -> float:
    """Time that measuring all ``seeds`` of a curve takes, without imports, tables and figures.

    rates: by default this machine's, measured now, so other processes on it shift the estimate.
    Measured on 29 runs of 0.3 to 43 s: 0.71 to 1.30 of the processor's time on one thread (of 18 on
    another machine 0.66 to 1.34, and 2.0 of a checkpoint in bfloat16; of 8 on a third 0.75 to 1.31); of
    the clock's, on two cores that others used too, 0.41 to 2.16, three of them beyond a factor of 2.
    bfloat16 products on a CPU without instructions for them are estimated up to 4.4 times too long.
    """
    model, n = curve.model, curve.tokens
    rates = rates or calibrate(curve.dtype, curve.device)
    if isinstance(model, FamilyConfig):
        return family_seconds(curve, model, rates)
    counted = costs(model, n, curve.gradients)["weightless" if curve.weightless else "dense"]
    d, traced = model.width, trace(model, curve.dtype, curve.gradients)
    there, back = 1, 2 * curve.gradients  # the backward runs every block again
    # Of the embedding, drawn for one token's sake.
    rows = rows_per_piece("embedding.weight", (model.vocab_size, d), curve.device)
    numbers = WEIGHT * min(n * rows, model.vocab_size) * d
    columns = model.kv_heads * model.head_dim
    rows = rows_per_piece("value_embedding.weight", (model.vocab_size, columns), curve.device)
    embedded = sum(model.embeds_values(layer) for layer in range(model.depth)) * (there + back)
    numbers += embedded * WEIGHT * min(n * rows, model.vocab_size) * columns
    entries = model.depth * n * (d * 2 * STEP_PASSES + traced.written) * (there + back)
    entries += model.depth * n * curve.length * model.heads * ATTENTION_PASSES
    entries += n * model.vocab_size * LOGIT_PASSES * curve.gradients
    # Half of attention's pairs are causal. The statistics multiply once more, a backward three times.
    attention = model.depth * n * curve.length * traced.pair / 2 * (2 + 1.5 * back)
    if curve.stored:
        # Widened and hashed.
        entries += 2 * model.depth * describe(model).entries * (there + back)
        numbers = 0
    else:
        numbers += counted.numbers * (NORMAL if curve.weightless else WEIGHT)
    passes = -(-curve.batch // curve.together) * model.depth * (there + back)
    one = counted.operations * (rates.wide if curve.weightless else rates.product)
    one += attention * rates.product + numbers * rates.number
    one += entries * rates.entry + passes * CALLS * rates.call / curve.batch_seeds
    return curve.seeds * one


def curves_to_measure(config: RunConfig, threads: int) -> list[Curve]:
    """A run's curves, the checkpoint's first. Its engine must have been chosen, its inputs be known."""
    batch, length = config.inputs.batch or 1, config.inputs.length or 1
    device = config.device.partition(":")[0]
    curves = []
    for engine, stored, seeds in (
        ("dense", True, int(config.source.stored)),
        (config.engine, False, len(config.seeds) if config.engine != "theory" else 0),
    ):
        if seeds:
            curves.append(
                Curve(
                    config.shape, batch, length, config.gradients, engine, config.dtype,
                    device, threads, stored, seeds,
                )
            )  # fmt: skip
    return curves
