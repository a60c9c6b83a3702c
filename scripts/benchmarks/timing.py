"""Times: of a call here, or of a body in a fresh process, with its peak."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

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
import simlab.experiment.batches  # and with it torch, whose import isn't the work
from simlab import compose
from simlab.experiment import run
config = compose(sys.argv[1:])
start = time.perf_counter()
run(config)
"""


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
