"""Both engines in this process: where the cheaper one changes, what they draw, what dense costs."""

from __future__ import annotations

import resource
import statistics
from collections.abc import Sequence
from functools import partial

import numpy as np

from benchmarks.floors import draw
from benchmarks.timing import timed


def crossover(overrides: Sequence[str]) -> None:
    """Seconds of a two-block curve by engine and token count, beside the rule of engine=auto."""
    import torch

    from simlab import compose
    from simlab.budget.cost import choose
    from simlab.experiment import ENGINE_WEIGHTS, prepare
    from simlab.measurement.engine import measure_curves

    torch.set_grad_enabled(True)
    print("gradients  tokens    dense  weightless  cheaper by  auto takes, by")
    for gradients in (False, True):
        for tokens in (64, 256, 512, 1024, 1536):
            config = compose([*overrides, "depth=2", f"inputs.length={tokens}", "device=cpu"])
            ready = prepare(config)
            ids = torch.from_numpy(ready.tokens)
            seconds: dict[str, float] = {}
            for _ in range(2):
                for name, engine in ENGINE_WEIGHTS.items():
                    weights = engine(config.shape, config.init, 0)

                    cpu, dtype = torch.device("cpu"), torch.float32
                    work = partial(measure_curves, weights, ids, cpu, dtype, gradients)
                    seconds[name] = min(timed(work), seconds.get(name, np.inf))
            rule, times = choose(config.shape, tokens, gradients, "cpu")
            a, b = seconds["dense"], seconds["weightless"]
            best = f"{'dense' if a < b else 'weightless'} {max(a, b) / min(a, b):.2f}"
            print(
                f"{gradients!s:9s} {tokens:7d} {a:8.2f} {b:11.2f}  {best:14s} {rule} {times:.2f}",
                flush=True,
            )


def truncation(overrides: Sequence[str], seeds: int = 1000) -> None:
    """Paired z of every statistic's mean and variance: dense, cut at 3σ, against weightless."""
    import torch

    from simlab import compose
    from simlab.experiment import ENGINE_WEIGHTS, prepare
    from simlab.measurement.engine import measure_curves

    torch.set_num_threads(1)
    for width in (32, 64, 128):
        shape = [f"width={width}", "heads=4", "kv_heads=4", f"d_ff={2 * width}", "vocab_size=500"]
        small = ["depth=2", "inputs.length=16", "device=cpu", "init.std=0.05", "init.truncate=3"]
        ready = prepare(compose([*shape, *small, *overrides]))
        ids, samples = torch.from_numpy(ready.tokens), []
        for engine in ENGINE_WEIGHTS.values():
            curves = []
            for seed in range(seeds):
                weights = engine(ready.config.shape, ready.config.init, seed)
                (m,) = measure_curves(weights, ids, torch.device("cpu"), torch.float32, True)
                rows = [
                    torch.cat([r.values, r.gradient]) for r in m.rows[1:] if r.gradient is not None
                ]
                curves.append(torch.cat(rows).numpy())
            sample = np.stack(curves)
            samples.append(sample)
        varies = (samples[0] - samples[1]).std(0) > 1e-9 * np.abs(samples[0]).mean(0)
        samples = [sample[:, varies] for sample in samples]
        scores = []
        for power in (1, 2):
            x, y = ((s - (power - 1) * s.mean(0)) ** power for s in samples)
            differences = x - y  # in pairs: both engines draw the same embedding from a seed
            error = differences.std(0, ddof=1) / np.sqrt(seeds)
            scores.append(np.abs(differences.mean(0)) / error)
        bound = statistics.NormalDist().inv_cdf(1 - 0.01 / (4 * len(scores[0])))
        print(
            f"width {width:4d}, {seeds} seeds each: largest z of means {scores[0].max():.2f}, of "
            f"variances {scores[1].max():.2f}; chance alone passes {bound:.2f} in 1 of 100 runs",
            flush=True,
        )


def dense(overrides: Sequence[str]) -> None:
    """One dense curve against drawing its numbers and multiplying its matrices."""
    import torch

    from simlab import compose
    from simlab.experiment import prepare, run
    from simlab.model.describe import describe

    config = compose([*overrides, "seeds=1", "device=cpu", "engine=dense"])
    tokens = prepare(config).tokens.size
    block = describe(config.shape)
    count = block.entries
    pairs = [(torch.randn(tokens, m.d_in), torch.randn(m.d_out, m.d_in)) for m in block.matrices]

    def multiply() -> None:
        for x, w in pairs:
            x @ w.T

    multiply()
    depth = config.shape.depth
    whole = timed(lambda: run(config))
    floor_draw = depth * timed(lambda: draw(count, torch.get_num_threads()))
    floor_multiply = depth * timed(multiply)
    floor = floor_draw + floor_multiply
    print(
        f"{config.shape.name} depth {depth}, {tokens} tokens, {depth * count / 1e6:.0f} M weights"
    )
    print(f"run {whole:6.2f} s   floor {floor:6.2f} s   ratio {whole / floor:.2f}")
    print(f"  floor: draws {floor_draw:.2f} s, matrix products {floor_multiply:.2f} s")
    print(f"  peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
