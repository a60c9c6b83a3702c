"""Estimates of memory and time beside what runs take: python scripts/benchmark_estimates.py [WORD].

Each case is a fresh process with the settings of the command's, one after another on the CPU. Memory:
the peak beyond the interpreter with everything imported. Time: of measuring and predicting, against the
rates that the machine has in the second before. Ratios are estimate to measured. WORD: only cases that
contain it. All of them take about ten minutes on two cores that nobody else uses.

--timed: other, shorter cases, for the time; --one-thread: it is then the processor's, on one thread,
which others on the machine disturb little.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CASE = """
import dataclasses, json, resource, sys, time
from simlab.budget.process import tune_process
tune_process()
import torch
from simlab import compose, experiment
from simlab.budget import cost, memory
from simlab.budget.machine import calibrate
unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
before = peak()
if sys.argv[1] == "alone":
    torch.set_num_threads(1)
ready = experiment.prepare(compose(sys.argv[2:]))
clock = time.process_time if sys.argv[1] == "alone" else time.perf_counter
rates = calibrate(ready.config.dtype, clock=clock)
curves = cost.curves_to_measure(ready.config, torch.get_num_threads())
start = clock()
experiment.measure(ready)
took = clock() - start
print("RESULT", json.dumps({
    "interpreter": before,
    "peak": peak() - before,
    "memory": max(ready.prediction[0], *map(memory.peak, curves)),
    "took": took,
    "seconds": ready.prediction[1] + sum(cost.seconds(curve, rates) for curve in curves),
    "rates": dataclasses.asdict(rates),
}))
"""
SHAPES = {
    "256": "model=small width=256 heads=4 kv_heads=4 d_ff=704",
    "512": "model=small",
    "1024": "model=small width=1024 heads=16 kv_heads=16 d_ff=2816 vocab_size=32000",
    "8192": "model=small width=8192 heads=64 kv_heads=8 d_ff=22016 vocab_size=32000",
    "1b": "model=olmo2_1b",
    "7b": "model=olmo2_7b",
    "32b": "model=olmo2_32b",
    "window": "model=olmo3_7b",
    "tiny": "model=small width=64 heads=2 kv_heads=2 d_ff=128 vocab_size=100",
    "file": "source=checkpoint source.path={folder} seeds=0",
}
# Shape, depth (0: its own), batch × length, engine, then overrides.
CASES = [
    "256 64 1x64 dense",
    "256 2 1x8192 dense",
    "256 2 1x8192 dense gradients=true",
    "512 16 64x64 dense seeds=2",
    "512 64 64x64 dense gradients=true",
    "512 16 4x256 weightless gradients=true",
    "512 8 512x16 weightless seeds=2",
    "1024 2 16x1024 dense",
    "1024 2 16x1024 dense gradients=true",
    "1024 2 16x1024 dense gradients=true dtype=bfloat16",
    "1024 1 1x16384 dense",
    "1024 2 16x1024 weightless",
    "1024 4 1024x8 weightless gradients=true",
    "1024 4 4x1024 dense gradients=true norm=peri",
    "1b 0 1x64 weightless",
    "1b 8 1x512 dense",
    "1b 2 1x2048 dense gradients=true",
    "1b 4 1x1024 weightless gradients=true",
    "1b 1 1x8192 dense dtype=bfloat16",
    "1b 1 2x4096 dense gradients=true",
    "7b 0 1x64 weightless",
    "7b 0 1x64 weightless gradients=true",
    "7b 2 1x64 dense",
    "7b 2 4x512 dense dtype=bfloat16 gradients=true",
    "7b 2 8x512 dense",
    "7b 2 32x32 weightless gradients=true",
    "7b 1 1x3072 weightless",
    "window 1 1x8192 dense",
    "32b 0 1x64 weightless",
    "32b 0 1x64 weightless gradients=true",
    "32b 4 1x1024 weightless",
    "32b 2 1x1024 weightless gradients=true",
    "32b 2 1x512 weightless dtype=bfloat16",
    "32b 2 1x64 dense gradients=true",
    "8192 2 1x64 dense",
    "8192 2 1x64 dense dtype=bfloat16",
    "8192 1 1x1024 dense gradients=true",
    "8192 1 1x3072 weightless",
    "tiny 2000 1x16 weightless gradients=true",
    "file 0 1x64 dense",
    "file 0 1x64 dense dtype=bfloat16",
    "file 0 4x512 dense gradients=true",
    "file 0 1x4096 dense",
]
# Of other sizes and shorter, for the time.
TIMED = [
    "256 64 1x64 dense",
    "tiny 1000 1x16 weightless gradients=true",
    "256 1 1x4096 dense",
    "256 1 1x4096 dense gradients=true",
    "512 8 64x64 dense",
    "512 8 32x64 dense gradients=true",
    "512 8 4x256 weightless gradients=true",
    "1024 1 16x1024 dense",
    "1024 2 4x512 dense gradients=true",
    "1024 2 4x512 dense gradients=true dtype=bfloat16",
    "1024 2 4x512 weightless",
    "1b 0 1x64 weightless",
    "1b 8 1x512 dense",
    "1b 2 1x512 weightless gradients=true",
    "1b 2 1x1024 dense gradients=true",
    "7b 0 1x64 weightless",
    "7b 8 1x64 weightless gradients=true",
    "7b 2 1x64 dense",
    "7b 1 4x256 dense",
    "7b 1 4x256 dense dtype=bfloat16",
    "7b 2 32x32 weightless",
    "32b 16 1x64 weightless",
    "32b 16 1x64 weightless gradients=true",
    "32b 2 1x512 weightless",
    "8192 1 1x64 dense",
    "8192 1 1x64 dense gradients=true",
    "file 0 1x64 dense",
    "file 0 1x64 dense dtype=bfloat16",
    "file 0 4x256 dense gradients=true",
]


def overrides(case: str, folder: Path) -> list[str]:
    """The overrides that a case stands for."""
    shape, depth, tokens, engine, *rest = case.split()
    batch, length = tokens.split("x")
    common = ["seeds=1", *SHAPES[shape].format(folder=folder).split(), "device=cpu"]
    given = [f"inputs.batch={batch}", f"inputs.length={length}", f"engine={engine}"]
    given = [*common, *given, *([f"depth={depth}"] if int(depth) else []), *rest]
    return list({item.partition("=")[0]: item for item in given}.values())  # the last of each


def measured(case: str, folder: Path, threads: str = "all") -> dict[str, float] | None:
    """A case in a fresh process; None where it has been killed, or refused.

    threads: all, or alone.
    """
    command = [sys.executable, "-c", CASE, threads, *overrides(case, folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        print(f"{case}: {(done.stderr.splitlines() or ['killed'])[-1]}", flush=True)
        return None
    row: dict[str, float] = json.loads(lines[0].removeprefix("RESULT"))
    return row


def main() -> None:
    """Run the cases and print a table, then the range of the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("word", nargs="?", default="")
    parser.add_argument("--timed", action="store_true")
    parser.add_argument("--one-thread", action="store_true")
    args = parser.parse_args()
    threads = "alone" if args.one_thread else "all"
    cases = [case for case in (TIMED if args.timed else CASES) if args.word in case]
    large, all_of_them, times = [], [], []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "checkpoint"
        if any(case.startswith("file") for case in cases):
            writer = [sys.executable, str(Path(__file__).with_name("write_random.py")), str(folder)]
            shape = ["model=olmo2_1b", "depth=8", "dtype=bfloat16"]
            subprocess.run([*writer, *shape], check=True, capture_output=True)
        print("   MiB estimate ratio   seconds estimate ratio   case")
        for case in cases:
            if (row := measured(case, folder, threads)) is None:
                continue
            ratio, time = row["memory"] / row["peak"], row["seconds"] / row["took"]
            print(
                f"{row['peak'] / 2**20:6.0f} {row['memory'] / 2**20:8.0f} {ratio:5.2f} "
                f"{row['took']:9.2f} {row['seconds']:8.2f} {time:5.2f}   {case}",
                flush=True,
            )
            all_of_them.append(ratio)
            times.append(time)
            if row["peak"] > 1e9:
                large.append(ratio)
    for name, ratios in (
        ("memory", all_of_them), ("memory, peaks above 1 GB", large), ("seconds", times)
    ):  # fmt: skip
        if ratios:
            print(f"{name}: {min(ratios):.2f} to {max(ratios):.2f} of the measured")


if __name__ == "__main__":
    main()
