"""How much memory a run needs, and its refusal where there isn't so much.

Sums of what lives at a time, term by term as the code has it: in a block's forward and backward, in the
loss, in the embedding. Measured on a CPU, as is how far off they are (``python
scripts/benchmark_estimates.py`` does it again); of other devices they are guesses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from simlab.budget.cost import Curve, curves, groups
from simlab.budget.machine import MIB, available
from simlab.checkpoints import checkpoint, streamed
from simlab.config import ConfigError, RunConfig
from simlab.measurement.statistics import HEADS_AT_ONCE
from simlab.weights.base import COLUMNS_AT_ONCE
from simlab.weights.weightless import AHEAD

STREAMED = streamed.RUN_BYTES  # bytes of a checkpoint's weight that a thread takes
HASHED = checkpoint.RUNS_AT_ONCE * STREAMED  # of the embedding, mapped while it is hashed

INTERPRETER = 295 * MIB  # measured: resident once torch, pandas and simlab.experiment are imported
ROW = 8000  # bytes of one row of a curve, a tensor of some 27 numbers, measured; as much for gradients
LIBRARIES = 40 * MIB  # thread pools, kernels' workspaces
# Activations that each further seed of a batch has at a time, forward and backward: 43 and 92 MiB
# measured for three more at width 1024, 64 tokens.
BESIDE = {False: 15, True: 30}
# malloc's holes: of what lives beside the largest matrices, so much and at most. One run differs from
# the next by as much.
HOLES, MOST_HOLES = 2 / 3, 400 * MIB


def peak(curve: Curve) -> int:
    """Peak bytes that a curve needs on its device, beyond INTERPRETER.

    Measured on 2 cores, 39 runs that peak above 1 GB (up to 5.4): 0.93 to 1.27 of the peak. 26 smaller
    ones: 0.77 to 1.85 of it, where libraries and malloc's holes are most.
    """
    phases = [_embedding(curve), _forward(curve)]
    if curve.gradients:
        phases += [_loss(curve), _backward(curve)]
    hashed = min(HASHED, 4 * curve.model.vocab_size * curve.model.width) * curve.stored
    phases.append(hashed)
    rows = curve.seeds * 2 * curve.model.depth * ROW * (1 + curve.gradients)
    beside = BESIDE[curve.gradients] * (curve.batch_seeds - 1) * curve.tokens * curve.widest * 4
    live = max(phases) + beside + rows + LIBRARIES
    whole = max(hashed, _weights(curve))  # these are mapped for themselves
    if curve.together * curve.length**2 > HEADS_AT_ONCE:
        whole += _attention_statistics(curve)
    return int(live + min(HOLES * max(0, live - whole), MOST_HOLES))


def _embedding(curve: Curve) -> int:
    """Each id's row once, and the stream that is made of them."""
    return min(curve.tokens, curve.model.vocab_size) * curve.model.width * curve.size + curve.stream


def _weights(curve: Curve) -> int:
    """Of one block, as it is held."""
    if curve.weightless:
        return 0  # counted as Z
    if curve.stored and curve.device == "cpu":
        # Pages of one matrix, and of all the head's rows, as if in float32; each thread's copy of rows.
        head = curve.gradients * curve.model.vocab_size * curve.model.width
        pages = max(d_in * d_out for d_in, d_out in curve.layers) + head
        return 4 * pages + 3 * STREAMED * curve.threads
    # Pieces are drawn in float32, with their masks: 1 MiB for each thread.
    return curve.size * sum(d_in * d_out for d_in, d_out in curve.layers) + MIB * curve.threads


def _attention_statistics(curve: Curve) -> int:
    """Logits, masked logits, weights and a product of the two, in float32, of some heads; the mask."""
    square = curve.together * curve.length**2
    heads = min(curve.model.heads, max(1, HEADS_AT_ONCE // square))
    return 16 * heads * square + 2 * curve.length**2


def _normals(curve: Curve) -> int:
    """Weightless: what is held of Z, in float32."""
    if not curve.weightless:
        return 0
    few = [4 * curve.tokens * d_out * (curve.tokens < d_in) for d_in, d_out in curve.layers]
    many = [4 * d_in * d_out for d_in, d_out in curve.layers if curve.tokens >= d_in]
    turns = few + few  # the next block's follow
    ahead = max(sum(turns[i : i + 1 + AHEAD]) for i in range(len(few)))
    return ahead + max(many, default=0)  # those as large as the matrix one at a time


def _forward(curve: Curve) -> int:
    """The stream, a block, and the largest of its moments, for the tokens that pass together."""
    model, size, n = curve.model, curve.size, curve.together * curve.length
    (q, kv), d = curve.heads_dim, curve.model.width
    gram = 0
    if curve.weightless and curve.tokens < max(d, q, model.d_ff):
        widest = min(COLUMNS_AT_ONCE, max(d, q, model.d_ff))
        # A few columns in float64; the square, two scaled copies, L; L and σL in float32.
        gram = 8 * n * widest + 40 * n * n
    moments = [
        n * d * (3 * 8 + 4 * 4 + 4 * size),  # statistics: float64, float32, and the stream itself
        n * (2 * (q + kv) * size + 4 * 4 * q),  # a norm's or a rotation's float32 copies of queries
        n * (4 * q + d) * size + _attention_statistics(curve),  # queries, keys, values, output
        n * (3 * model.d_ff + 2 * d) * size,  # gate, up and their product
        n * (model.d_ff + 2 * d) * size + gram,
    ]
    if curve.stored:  # a product, before it's turned
        moments[3] += n * model.d_ff * size
    if curve.weightless and size == 2:  # computed in float32
        moments[3] += 4 * n * model.d_ff
    kept = model.depth if curve.gradients else 1  # the backward needs the stream before every block
    return _weights(curve) + _normals(curve) + max(moments) + (kept + 1) * curve.stream


def _backward(curve: Curve) -> int:
    """Every stream, the gradient twice, a block and what autograd keeps of it."""
    model, size, n = curve.model, curve.size, curve.together * curve.length
    (q, kv), d, wide = curve.heads_dim, curve.model.width, 4  # norms keep float32
    saved = n * ((q + kv) * wide + 4 * q * size)  # before the norms; queries, keys, values, output
    saved += n * (2 * d * wide + 2 * d * size + 3 * model.d_ff * size)  # branches, streams; the MLP
    gradients = n * (3 * model.d_ff + 2 * d) * size
    normals = 0
    if curve.weightless:  # every Z until its turn comes back, and what each input's gradient draws
        normals = 4 * sum(min(n, d_in) * d_out for d_in, d_out in curve.layers)
        inputs = [d_in for _, d_in, _ in groups(model, False) if n < d_in]
        normals += 8 * n * sum(inputs)
        saved += 12 * n * n * len(inputs)  # L in float64 and in float32
    if curve.stored:  # products and their sums in float32, before they are turned
        gradients += n * model.d_ff * (size + wide)
    block = max(saved + gradients, _attention_statistics(curve))
    streams = (model.depth + 3) * curve.stream
    return _weights(curve) + _normals(curve) + normals + streams + block


def _loss(curve: Curve) -> int:
    """Every stream, the last one's norm and gradients, and some columns of the logits."""
    model, size, n = curve.model, curve.size, curve.tokens
    columns = min(COLUMNS_AT_ONCE, model.vocab_size)
    found = n * model.width * (3 * size + 3 * 4)  # joined, normed, copied; float32 sums
    found += n * columns * (3 * 4 + size % 4)  # logits, less their largest, exponentials
    found += columns * model.width * (size + 4)  # the head's rows
    if curve.weightless:
        found += 4 * columns * min(n, model.width)
        found += 32 * n * n if n < model.width else 0  # as in ``_forward``
    return found + (model.depth + 1) * curve.stream


def needed(config: RunConfig, threads: int) -> int:
    """Peak bytes of a run: its curves are measured one after another."""
    return max(peak(curve) for curve in curves(config, threads))


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
    has = f"needs about {_gigabytes(need)}, {_gigabytes(free)} are free"
    raise ConfigError(f"{_asked(config)}: {has}; {would}")


def fitting(config: RunConfig, threads: int, free: int) -> list[tuple[str, RunConfig]]:
    """Changes that make a run fit, as overrides, nearest first; pairs only where none alone does."""
    single = list(_changes(config))
    fewer = _fewer(config, threads, free)
    whole = [(text, changed) for text, changed in single if needed(changed, threads) <= free]
    at = len([text for text, _ in whole if not text.startswith("gradients")])
    found = [*whole[:at], *fewer, *whole[at:]]
    return found or [
        (f"{text} {few}", least)
        for text, changed in single
        for few, least in _fewer(changed, threads, free)
    ]


def _changes(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Other engine, fewer bytes, no gradients: those that the run hasn't."""
    if config.seeds:
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
    named = f"source={config.source.kind}" if config.source.stored else f"model={config.shape.name}"
    words = [named, f"engine={config.engine}"]
    words += [f"inputs.batch={config.inputs.batch}", f"inputs.length={config.inputs.length}"]
    words += ["gradients=true"] if config.gradients else []
    return " ".join(words + ([f"dtype={config.dtype}"] if config.dtype != "float32" else []))


def _gigabytes(size: int) -> str:
    gigabytes = size / 1e9
    return f"{gigabytes:,.0f} GB" if gigabytes >= 10 else f"{gigabytes:.2g} GB"
