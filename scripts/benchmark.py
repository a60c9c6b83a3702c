"""Speed and memory, each beside its floor: python scripts/benchmark.py WHAT [overrides].

weightless    whole processes: OLMo-2-32B at 64 tokens, forward and with gradients, beside the bare
              normals, Gram matrices, Cholesky factors and products of the same sizes; depth doubled
transformers  whole processes: a 1B curve beside building the model in transformers and asking for
              hidden states
crossover     at which token count dense becomes cheaper, measured, and where engine=auto puts it
truncation    what matching a truncated init by its variance changes, over many seeds
memory        peak of dense olmo2_1b at depth 16 and 64
dense         one dense curve beside drawing as many numbers and the bare matrix products
theory        engine=theory of OLMo-2-32B: the recursion, the verdict on the screen and the whole
              process beside ``import torch``; then a sweep of CONFIGS shapes of width 4096

Machines are noisy: alternating repeats, and figures of one call compare, those of two don't.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PEAK = """
import resource, sys, time
start = time.perf_counter()
{body}
unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
print("RESULT", time.perf_counter() - start, peak)
"""
CURVE = """
from simlab.budget.process import tune_process
tune_process()  # as the command does
from simlab import compose
from simlab.experiment import run
config = compose(sys.argv[1:])
start = time.perf_counter()
run(config)
"""
FLOOR = """
from simlab.budget.process import tune_process
tune_process()
import json, torch
sys.path.insert(0, sys.argv[1])
import benchmark
sizes = json.loads(sys.argv[2])
start = time.perf_counter()
benchmark.bare(**sizes)
"""
TRANSFORMERS = """
import json, torch, transformers
shape = json.loads(sys.argv[1])
start = time.perf_counter()
torch.manual_seed(0)
model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**shape)).eval()
with torch.no_grad():
    hidden = model(torch.randint(shape["vocab_size"], (1, 64)), output_hidden_states=True).hidden_states
curve = [float(h.double().pow(2).mean()) for h in hidden]
"""


PREDICT = """
from simlab import compose
from simlab.inputs import make_tokens
from simlab.theory.mean_field import predict
config = compose(sys.argv[2:])
ids = make_tokens(config.inputs, config.shape.vocab_size, config.seed, None)
start = time.perf_counter()
predict(config.shape, config.init, ids, with_band=sys.argv[1] == "band")
"""
SHAPES = ["depth=32", "width=4096", "inputs.length=32", "norm=reordered,pre,peri,post"]
CONFIGS = 100  # of the sweep: these placements, times as many stds as it takes


def process(body: str, *args: str) -> tuple[float, float, float]:
    """Run a body in a fresh Python: seconds of the whole process, of the work, and peak MiB."""
    command = [sys.executable, "-c", PEAK.format(body=body), *args]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    whole = time.perf_counter() - start
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    work, peak = map(float, line.split()[1:])
    return whole, work, peak


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median(rows: Sequence[tuple[float, float, float]]) -> list[float]:
    """Column by column."""
    return [statistics.median(column) for column in zip(*rows, strict=True)]


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
        "d_ins": [d_in for _, d_in, _ in blocks],
        "d_outs": [d_out for *_, d_outs in blocks for d_out in d_outs],
    }


def weightless(overrides: Sequence[str], repeats: int = 3) -> None:
    """A weightless curve, forward and with gradients, beside its floor; then at twice the depth."""
    common = [*overrides, "seeds=1", "device=cpu", "engine=weightless"]
    size = sizes(common)
    folder = str(Path(__file__).resolve().parent)
    kinds: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(repeats):
        for name, work in (
            ("floor", lambda: process(FLOOR, folder, json.dumps(size))),
            ("forward", lambda: process(CURVE, *common)),
            ("both", lambda: process(CURVE, *common, "gradients=true")),
            ("deep", lambda: process(CURVE, *common, f"depth={2 * int(str(size['depth']))}")),
        ):
            kinds.setdefault(name, []).append(work())
    floor, forward, both, deep = (median(rows) for rows in kinds.values())
    print(f"{' '.join(overrides)}: depth {size['depth']}, {size['tokens']} tokens, one seed, CPU")
    print("                      whole process    work alone      peak")
    for name, row in (
        ("floor", floor), ("forward", forward), ("forward + backward", both), ("twice the depth", deep)
    ):  # fmt: skip
        print(f"{name:20s} {row[0]:10.2f} s {row[1]:12.2f} s {row[2]:8.0f} MiB")
    print(f"forward / floor:     {forward[0] / floor[0]:10.2f}   {forward[1] / floor[1]:12.2f}")
    print(f"both / forward:      {both[0] / forward[0]:10.2f}   {both[1] / forward[1]:12.2f}")
    print(f"twice the depth / 1: {deep[0] / forward[0]:10.2f}   {deep[1] / forward[1]:12.2f}")


def against_transformers(overrides: Sequence[str]) -> None:
    """One curve of 64 tokens, beside transformers building the model and giving hidden states."""
    import torch
    from write_random import hugging_face_config

    from simlab import compose

    common = [*overrides, "inputs.batch=1", "inputs.length=64", "seeds=1", "device=cpu"]
    model = compose(common).shape
    shape = hugging_face_config(model, torch.float32)
    ours, theirs = [], []
    for _ in range(2):
        ours.append(process(CURVE, *common))
        theirs.append(process(TRANSFORMERS, json.dumps(shape)))
    a, b = median(ours), median(theirs)
    print(f"{model.name}, 64 tokens   whole process    work alone      peak")
    for name, row in (("simlab", a), ("transformers", b)):
        print(f"{name:20s} {row[0]:10.2f} s {row[1]:12.2f} s {row[2]:8.0f} MiB")
    print(f"times {b[0] / a[0]:24.1f} {b[1] / a[1]:14.1f} {b[2] / a[2]:13.1f}")


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

                    def work(weights: object = weights) -> object:
                        return measure_curves(
                            weights,  # type: ignore[arg-type]
                            ids,  # noqa: B023 (called within the loop's own turn)
                            torch.device("cpu"),
                            torch.float32,
                            gradients,  # noqa: B023 (as above)
                        )

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


def memory() -> None:
    """Peak memory must not grow with depth."""
    peaks = {}
    for depth in (16, 64):
        overrides = ["model=olmo2_1b", f"depth={depth}", "seeds=1", "device=cpu", "engine=dense"]
        seconds, _, peaks[depth] = process(CURVE, *overrides)
        print(
            f"olmo2_1b depth {depth:3d}: peak {peaks[depth]:7.0f} MiB  ({seconds:.0f} s)",
            flush=True,
        )
    print(f"ratio {peaks[64] / peaks[16]:.3f}")


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


def command(folder: str, *args: str) -> tuple[float, float]:
    """Run simlab.run in a folder: seconds until the verdict's first line, and of the whole process."""
    command = [sys.executable, "-m", "simlab.run", *args]
    start, said = time.perf_counter(), 0.0
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if "ean square " in line and not said:
                said = time.perf_counter() - start
    if run.returncode:
        raise SystemExit(run.returncode)
    return said, time.perf_counter() - start


def processor() -> float:
    """Seconds of the processor that this process's children have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def theory(overrides: Sequence[str], repeats: int = 3) -> None:
    """A predicted curve beside ``import torch``, by turns; then a sweep."""
    times: dict[str, list[float]] = {}
    spent: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            recursion = [process(PREDICT, band, *overrides)[1] for band in ("mean", "band")]
            before = processor()
            torch = timed(
                lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True)
            )
            between = processor()
            row = (torch, *recursion, *command(folder, *overrides, "engine=theory"))
            spent.append([between - before, processor() - between])
            names = ("import torch", "recursion", "with the band", "verdict", "whole process")
            for name, seconds in zip(names, row, strict=True):
                times.setdefault(name, []).append(seconds)
        stds = ",".join(f"{0.01 + 0.001 * i:g}" for i in range(CONFIGS // 4))
        _, sweep = command(folder, "-m", "engine=theory", *SHAPES, f"init.std={stds}")
    unit = times["import torch"]
    print(
        f"{' '.join(overrides)}, {repeats} times by turns: median, least; median over import torch's"
    )
    for name, measured in times.items():
        ratio = statistics.median(a / b for a, b in zip(measured, unit, strict=True))
        print(
            f"{name:14s} {statistics.median(measured):6.2f} s {min(measured):6.2f} s {ratio:6.2f}"
        )
    torch, whole = (min(seconds) for seconds in zip(*spent, strict=True))
    print(
        f"of the processor, least: {torch:.2f} s, whole process {whole:.2f} s, {whole / torch:.2f}"
    )
    each = sweep / CONFIGS
    print(
        f"{CONFIGS} configs of width 4096, depth 32, 32 tokens, with their report: {each:.2f} s each, "
        f"{each / statistics.median(unit):.3f} of import torch"
    )


BENCHMARKS: dict[str, tuple[Callable[[Sequence[str]], None], list[str]]] = {
    "weightless": (weightless, ["model=olmo2_32b"]),
    "transformers": (against_transformers, ["model=olmo2_1b"]),
    "crossover": (crossover, ["model=olmo2_1b"]),
    "truncation": (truncation, []),
    "memory": (lambda _: memory(), []),
    "dense": (dense, ["model=olmo2_1b"]),
    "theory": (theory, ["model=olmo2_32b"]),
}


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=BENCHMARKS)
    parser.add_argument(
        "overrides", nargs="*", help="config overrides, instead of the default model"
    )
    args = parser.parse_args()
    run, default = BENCHMARKS[args.what]
    run(args.overrides or default)


if __name__ == "__main__":
    main()
