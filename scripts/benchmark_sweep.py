"""Speed of sweeps: python scripts/benchmark_sweep.py WHAT.

transformers  96 jobs (4 depths × 3 stds × 8 seeds, width 1024, 64 tokens) as one command: in a process,
              by joblib, and with the seeds within 12 jobs; beside a loop over transformers models,
              of which one seed's are timed: the others' take as long.
              In one process jobs share depths (simlab/experiment/sharing.py)
overhead      what a job costs beside its computation, and the peak memory of 50 and of 500 jobs
commands      --help, tab completion and --cfg job

Machines are noisy: figures of one call compare, those of two don't.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from benchmarks.timing import process

SHAPE = ["model=small", "width=1024", "heads=16", "kv_heads=16", "d_ff=4096", "vocab_size=50304"]
INPUTS = ["inputs.batch=1", "inputs.length=64", "device=cpu"]
DEPTHS, STDS, SEEDS = (8, 16, 32, 64), (0.01, 0.02, 0.04), 8
TRANSFORMERS = """
start = time.perf_counter()
import torch, transformers
ids = torch.randint(50304, (1, 64), generator=torch.Generator().manual_seed(0))
for depth in map(int, sys.argv[1].split(",")):
    for std in map(float, sys.argv[2].split(",")):
        for seed in range(int(sys.argv[3])):
            torch.manual_seed(seed)
            model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(
                vocab_size=50304, hidden_size=1024, intermediate_size=4096, num_hidden_layers=depth,
                num_attention_heads=16, num_key_value_heads=16, initializer_range=std)).eval()
            with torch.no_grad():
                hidden = model(ids, output_hidden_states=True).hidden_states
            curve = [float(h.double().pow(2).mean()) for h in hidden]
"""
TRIVIAL = [
    "model=small", "depth=1", "width=32", "heads=2", "kv_heads=2", "d_ff=64", "vocab_size=64",
    "inputs.batch=1", "inputs.length=8", "device=cpu", "seeds=1",
]  # fmt: skip
COMPUTE = """
from simlab.budget.process import tune_process
tune_process()
from simlab import compose
from simlab.experiment import measure, prepare
ready = prepare(compose(sys.argv[2:]))
measure(ready)
start = time.perf_counter()
for _ in range(int(sys.argv[1])):
    measure(ready)
"""
SWEEP = """
from simlab import run
sys.argv[0] = "simlab.run"
sys.stdout = open("/dev/null", "w")
try:
    run.main()
except SystemExit as end:
    assert not end.code, end.code
sys.stdout = sys.__stdout__
"""


def swept(values: Sequence[object]) -> str:
    """Values of a sweep as Hydra takes them: 8,16,32."""
    return ",".join(map(str, values))


def command(*args: str) -> float:
    """Seconds of ``python -m simlab.run`` in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "simlab.run", *args], cwd=folder, check=True, capture_output=True
        )
        return time.perf_counter() - start


def against_transformers() -> None:
    """Whole processes, the report included."""
    sweep = ["-m", *SHAPE, *INPUTS, f"depth={swept(DEPTHS)}", f"init.std={swept(STDS)}"]
    each = [f"seed={swept(range(SEEDS))}", "seeds=1"]
    kinds = {
        "96 jobs, one process": [*sweep, *each],
        "96 jobs, joblib": [*sweep, *each, "hydra/launcher=joblib"],
        "12 jobs of 8 seeds, one process": [*sweep, f"seeds={SEEDS}"],
        "12 jobs of 8 seeds, joblib": [*sweep, f"seeds={SEEDS}", "hydra/launcher=joblib"],
    }
    one_seed, _, peak = process(TRANSFORMERS, swept(DEPTHS), swept(STDS), "1")
    theirs = one_seed * SEEDS
    models = len(DEPTHS) * len(STDS)
    print(
        f"transformers, {models} models × {SEEDS} seeds: {theirs:.1f} s, {peak:.0f} MiB", flush=True
    )
    for name, args in kinds.items():
        seconds = command(*args)
        print(f"{name:34s} {seconds:8.1f} s   {theirs / seconds:6.1f} times faster", flush=True)


def overhead() -> None:
    """Seconds a job from the difference of two sweeps' lengths, beside the bare computation."""
    seconds, peaks = {}, {}
    here = os.getcwd()
    for count in (50, 500):
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            seconds[count], _, peaks[count] = process(SWEEP, "-m", *TRIVIAL, f"seed=range({count})")
            os.chdir(here)
    _, work, _ = process(COMPUTE, "450", *TRIVIAL)
    a_job = (seconds[500] - seconds[50]) / 450
    print(f"a job {1e3 * a_job:.1f} ms, its computation {1e3 * work / 450:.1f} ms,", end=" ")
    print(f"so beside it {1e3 * (a_job - work / 450):.1f} ms")
    print(f"peak of 50 jobs {peaks[50]:.0f} MiB, of 500 jobs {peaks[500]:.0f} MiB")


def commands() -> None:
    """What a shell waits for."""
    line = "simlab-run norm="
    env = os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    completion = "import sys; sys.argv[0] = 'simlab-run'; from simlab.run import main; main()"
    kinds = {
        "--help": [sys.executable, "-m", "simlab.run", "--help"],
        "tab completion": [sys.executable, "-c", completion, "-sc", "query=bash"],
        "--cfg job": [sys.executable, "-m", "simlab.run", "--cfg", "job"],
        "a typo": [sys.executable, "-m", "simlab.run", "norm=swinrenorm"],
    }
    for name, args in kinds.items():
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run(args, env=env, check=False, capture_output=True)
            seconds.append(time.perf_counter() - start)
        print(f"{name:16s} {statistics.median(seconds):.2f} s")


BENCHMARKS: dict[str, Callable[[], None]] = {
    "transformers": against_transformers,
    "overhead": overhead,
    "commands": commands,
}


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=BENCHMARKS)
    BENCHMARKS[parser.parse_args().what]()


if __name__ == "__main__":
    main()
