"""Estimates a run's peak memory, and refuses a run that doesn't fit.

A block's activations are read off a run of it on a few tokens (``trace``). Added to them are the
weights, the products' workspace, the statistics, the loss and the embedding. The estimate and its
constants are measured on a CPU (``python scripts/benchmark_estimates.py`` does it again); of other
devices they are guesses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from simlab.analysis.numbers import gigabytes
from simlab.budget.cost import Curve, curves_to_measure
from simlab.budget.families import family_peak
from simlab.budget.machine import MIB, available
from simlab.budget.trace import trace
from simlab.checkpoints import streamed
from simlab.config import ConfigError, FamilyConfig, RunConfig
from simlab.model.attention import HEADS_AT_ONCE
from simlab.model.describe import Matrix, describe, describe_end
from simlab.weights.base import COLUMNS_AT_ONCE
from simlab.weights.weightless import AHEAD, GRAM_COLUMNS

STREAMED = streamed.RUN_BYTES  # bytes of a checkpoint's weight that a thread takes

INTERPRETER = 295 * MIB  # measured: resident once torch, pandas and simlab.experiment are imported
ROW = 8000  # bytes of one row of a curve, a tensor of some 27 numbers, measured; as much for gradients
LIBRARIES = 40 * MIB  # thread pools, kernels' workspaces
AUTOGRAD = 20 * MIB  # modules that torch imports for its first gradient
_STATISTICS_BYTES = 3 * 8 + 4 * 4  # bytes per entry of the stream: copies in float64 and in float32
_VECTOR_BYTES = 2 * 8 + 2 * 4  # likewise of one more vector of a state at a time
# Heap fragmentation: two thirds of the memory outside large mmapped blocks, at most 400 MiB. It differs
# from run to run by as much.
FRAGMENTED, MOST_FRAGMENTED = 2 / 3, 400 * MIB
# Of a gradient through steps that have parts, whose small tensors lie between several vectors: a larger
# limit (measured on AltUp, 2 to 16 blocks), and through Sinkhorn's iteration, which has many, more.
MIXED_FRAGMENTED, MOST_MIXED_FRAGMENTED = 1.1, 800 * MIB


def peak(curve: Curve) -> int:
    """Peak bytes that a curve needs on its device, beyond INTERPRETER.

    Measured on 2 cores, before a state's vectors were counted each and the loss's tensors freed: 39
    runs that peak above 1 GB (up to 5.4), 0.93 to 1.27 of the peak; 26 smaller ones, 0.77 to 1.85,
    where libraries and heap fragmentation are most. Measured since, olmo2_1b at 64 tokens, weightless,
    with 16 ``hyper_connections``, ``mhc`` or ``siamese_norm`` (211 to 374 MiB): 1.23 to 1.43.
    """
    if isinstance(curve.model, FamilyConfig):
        return family_peak(curve, curve.model)
    rows = curve.seeds * 2 * curve.model.depth * ROW * (1 + curve.gradients)
    live = curve.batch_seeds * live_bytes(curve) + rows + LIBRARIES
    live += AUTOGRAD * curve.gradients
    mapped = _weights(curve)
    if curve.together * curve.length**2 > HEADS_AT_ONCE:
        mapped += _attention_statistics(curve)
    share, most = FRAGMENTED, MOST_FRAGMENTED
    traced = trace(curve.model, curve.dtype, curve.gradients)
    if curve.gradients and traced.parts and traced.fresh > 1:
        most = MOST_MIXED_FRAGMENTED
        share = MIXED_FRAGMENTED if curve.model.norm.mix_streams else FRAGMENTED
    else:
        mapped += curve.batch_seeds * _alike(curve)
    return int(live + min(share * max(0, live - mapped), most))


def live_bytes(curve: Curve) -> float:
    """The most bytes of a seed's tensors at a time."""
    phases = [_embedding(curve), _forward(curve)]
    if curve.gradients:
        phases += [_loss(curve), _finish(curve), _backward(curve)]
    return max(phases)


def _alike(curve: Curve) -> int:
    """A state's vectors but one, before every block and within one: they fill each other's holes."""
    more = max(0, trace(curve.model, curve.dtype, curve.gradients).fresh - 1)
    return more * ((curve.model.depth if curve.gradients else 1) + 2) * curve.stream


def _embedding(curve: Curve) -> int:
    """Each different id's row, the stream that is made of them, and what the first state takes."""
    rows = min(curve.tokens, curve.model.vocab_size) * curve.model.width * curve.size
    traced = trace(curve.model, curve.dtype, curve.gradients)
    start = curve.together * curve.length * traced.start + _end_weights(curve, "start")
    return rows + curve.stream + int(start)


def _end_weights(curve: Curve, end: str) -> int:
    """The matrices of the placement's start or finish, or the normals in their place."""
    matrices = describe_end(curve.model, end).matrices
    if not curve.weightless:
        return curve.size * sum(matrix.d_in * matrix.d_out for matrix in matrices)
    n = curve.tokens
    return sum(4 * min(n, matrix.d_in) * matrix.d_out for matrix in matrices)


def _weights(curve: Curve) -> int:
    """One block's weights, in the form in which they are in memory."""
    if curve.weightless:
        return 0  # ``_normals`` counts what takes their place
    matrices = describe(curve.model).matrices
    if curve.stored and curve.device == "cpu":
        # Each thread's rows and their copy; backward, the rows that all threads share.
        largest = 4 * max(matrix.d_in * matrix.d_out for matrix in matrices)
        shared = curve.gradients * min(largest, streamed.COLUMN_SHARES * STREAMED)
        return shared + 3 * STREAMED * curve.threads
    # Pieces are drawn in float32: on a CPU 1 MiB with its masks for each thread, elsewhere a matrix.
    whole = 4 * max(matrix.d_in * matrix.d_out for matrix in matrices) if curve.size == 2 else 0
    drawn = MIB * curve.threads if curve.device == "cpu" else whole
    return curve.size * describe(curve.model).entries + drawn


def _value_rows(curve: Curve) -> int:
    """A value embedding's rows of different ids, of which each token gets a copy in ``trace``."""
    model = curve.model
    if model.value_embeddings == "none":
        return 0
    ids = min(curve.together * curve.length, model.vocab_size)
    return ids * model.kv_heads * model.head_dim * curve.size


def _attention_statistics(curve: Curve) -> int:
    """Logits, masked logits, weights and a product of the two, in float32, of some heads; the mask."""
    square = curve.together * curve.length**2
    heads = min(curve.model.heads, max(1, HEADS_AT_ONCE // square))
    return 16 * heads * square + 2 * curve.length**2


def _normals(curve: Curve) -> int:
    """Weightless: the normals Z, in float32, of the layer that computes and of the next ones."""
    if not curve.weightless:
        return 0
    matrices = describe(curve.model).matrices
    met = [math.ceil(curve.tokens * m.share) for m in matrices]
    few = [4 * n * m.d_out * (n < m.d_in) for n, m in zip(met, matrices, strict=True)]
    many = [4 * m.d_in * m.d_out for n, m in zip(met, matrices, strict=True) if n >= m.d_in]
    turns = few + few  # the next block's follow
    ahead = max(sum(turns[i : i + 1 + AHEAD]) for i in range(len(few)))
    return ahead + max(many, default=0)  # those as large as the matrix are drawn one at a time


def _product(curve: Curve, matrix: Matrix) -> int:
    """A layer's output, and what it takes besides while it computes."""
    n = math.ceil(curve.together * curve.length * matrix.share)
    size = n * matrix.d_out * curve.size
    if curve.stored:  # input and output, turned
        size += n * (matrix.d_in + matrix.d_out) * curve.size
    if curve.weightless and curve.size == 2:  # computed in float32
        size += 4 * n * matrix.d_out
    if curve.weightless and n < matrix.d_in:
        # Before there is an output: some columns of the input in float64; the Gram matrix, two scaled
        # copies and L in float64; L and σL in float32.
        size = max(size, 8 * n * min(GRAM_COLUMNS, matrix.d_in) + 40 * n * n)
    return size


def _forward(curve: Curve) -> float:
    """A block, the states and one stream, and the largest moment of the tokens that pass together."""
    n, traced = curve.together * curve.length, trace(curve.model, curve.dtype, curve.gradients)
    statistics = _STATISTICS_BYTES + (_VECTOR_BYTES if traced.state > 1 else 0)
    moments = [
        n * traced.forward,
        n * traced.attention + _attention_statistics(curve),
        n * (traced.step + statistics * curve.model.width),
    ]
    for matrix in describe(curve.model).matrices:
        if matrix.name in traced.matrices:
            moments.append(n * traced.matrices[matrix.name] + _product(curve, matrix))
    block = _weights(curve) + _normals(curve) + _value_rows(curve)
    return block + max(moments) + _kept(curve) + curve.stream


def _backward(curve: Curve) -> float:
    """Every state, its gradient, a block and what autograd keeps of it."""
    described, n = describe(curve.model), curve.together * curve.length
    matrices, traced = described.matrices, trace(curve.model, curve.dtype, True)
    block, normals = n * traced.backward, 0
    if curve.weightless:  # every Z until its turn comes back, and what each input's gradient draws
        normals = 4 * sum(
            min(math.ceil(n * matrix.share), matrix.d_in) * matrix.d_out for matrix in matrices
        )
        for share, (d_in, _) in zip(described.shares, described.groups, strict=True):
            met = math.ceil(n * share)
            if met < d_in:
                normals += 8 * met * d_in
                block += 12 * met * met  # L in float64 and in float32
    if curve.stored:  # products and their sums in float32, before they are turned
        block += n * max(matrix.d_in for matrix in matrices) * (curve.size + 4)
    if curve.model.attention_softcap is not None:  # attention's matrices, made and kept
        block += 16 * curve.model.heads * curve.together * curve.length**2
    states = _kept(curve) + (traced.state + 1) * curve.stream
    moment = max(block, _attention_statistics(curve))
    made = _weights(curve) + _normals(curve) + _value_rows(curve)
    return made + normals + states + moment


def _loss(curve: Curve) -> int:
    """Every state, the last one's norm and gradients, and some columns of the logits."""
    model, size, n = curve.model, curve.size, curve.tokens
    columns = min(COLUMNS_AT_ONCE, model.vocab_size)
    total = n * model.width * (3 * size + 3 * 4)  # joined, normed, copied; sums in float32
    total += n * columns * (3 * 4 + size % 4)  # logits, less their largest, exponentials
    if curve.weightless:
        total += 4 * columns * min(n, model.width)  # Z of these columns
        total += 32 * n * n if n < model.width else 0  # Gram matrix and factor, as in ``_product``
    else:
        total += columns * model.width * (size + 4)  # the head's rows
    last = trace(model, curve.dtype, True).fresh * curve.stream
    return total + _kept(curve) + last


def _finish(curve: Curve) -> float:
    """Every state, the gradient, and what it takes through the placement's finish."""
    n, traced = curve.together * curve.length, trace(curve.model, curve.dtype, True)
    widths = [matrix.d_in for matrix in describe_end(curve.model, "finish").matrices]
    made = _end_weights(curve, "finish")
    if curve.weightless:  # as in ``_backward``
        made += sum(8 * n * d_in + 12 * n * n for d_in in widths if n < d_in)
    last = (traced.fresh + 1) * curve.stream
    return made + n * traced.finish + last + _kept(curve)


def _kept(curve: Curve) -> int:
    """The state before a block; with gradients those before every block, which the backward needs."""
    traced = trace(curve.model, curve.dtype, curve.gradients)
    if not curve.gradients:
        return traced.state * curve.stream
    return (traced.first + (curve.model.depth - 1) * traced.fresh) * curve.stream


def needed(config: RunConfig, threads: int) -> int:
    """Peak bytes of a run: its curves are measured one after another."""
    return max(peak(curve) for curve in curves_to_measure(config, threads))


def refuse(config: RunConfig, threads: int, share: int = 1, beside: int = 0) -> None:
    """Raise ConfigError for a run that needs more memory than there is, naming what would fit.

    share: among how many runs at a time the memory is divided. beside: bytes that each of them takes
    besides.
    """
    free = available(config.device, share)
    free = None if free is None else max(0, free - beside)
    if free is None or (need := needed(config, threads)) <= free:
        return
    options = [text for text, _ in fitting(config, threads, free)][:2]
    would = f"{' or '.join(options)} would fit" if options else "nothing of this model fits"
    has = f"needs about {gigabytes(need)}, {gigabytes(free)} are free"
    raise ConfigError(f"{_asked(config)}: {has}; {would}")


def fitting(config: RunConfig, threads: int, free: int) -> list[tuple[str, RunConfig]]:
    """Changes that make a run fit, as overrides, nearest first; pairs only where none alone does."""
    single = list(_changes(config))
    fewer = _fewer(config, threads, free)
    whole = [(text, changed) for text, changed in single if needed(changed, threads) <= free]
    at = len([text for text, _ in whole if not text.startswith("gradients")])
    changes = [*whole[:at], *fewer, *whole[at:]]
    return changes or [
        (f"{text} {few}", least)
        for text, changed in single
        for few, least in _fewer(changed, threads, free)
    ]


def _changes(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Overrides that lower memory and differ from the run: other engine, bfloat16, no gradients."""
    if config.seeds and not isinstance(config.shape, FamilyConfig):
        engine = "weightless" if config.engine == "dense" else "dense"
        yield f"engine={engine}", replace(config, engine=engine)
    if config.dtype == "float32":
        yield "dtype=bfloat16", replace(config, dtype="bfloat16")
    if config.gradients:
        yield "gradients=false", replace(config, gradients=False)


def _fewer(config: RunConfig, threads: int, free: int) -> list[tuple[str, RunConfig]]:
    """The run with fewer sequences, or if one is too many, shorter ones: the largest power of two."""
    least = 1 + config.gradients
    batch, length = config.inputs.batch or 1, config.inputs.length or 1
    options = [(f"inputs.batch={b}", b, length) for b in _powers(batch)]
    text = "inputs.batch=1 " if batch > 1 else ""
    options += [(f"{text}inputs.length={t}", 1, t) for t in _powers(length) if t >= least]
    for text, b, t in options:
        changed = replace(config, inputs=replace(config.inputs, batch=b, length=t))
        if needed(changed, threads) <= free:
            return [(text, changed)]
    return []


def _powers(below: int) -> list[int]:
    """Powers of two below a number, the largest first."""
    return [1 << i for i in reversed(range((below - 1).bit_length()))]


def _asked(config: RunConfig) -> str:
    source = (
        f"source={config.source.kind}" if config.source.stored else f"model={config.shape.name}"
    )
    words = [source, f"engine={config.engine}"]
    words += [f"inputs.batch={config.inputs.batch}", f"inputs.length={config.inputs.length}"]
    words += ["gradients=true"] if config.gradients else []
    return " ".join(words + ([f"dtype={config.dtype}"] if config.dtype != "float32" else []))
