"""A predicted curve beside ``import torch``."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from benchmarks.timing import process, timed

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
