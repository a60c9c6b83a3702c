"""Speed and memory, each beside its floor: python scripts/benchmark.py [memory|dense] …

memory: peak memory of whole processes for olmo2_1b at depth 16 and 64, one seed.
dense:  seconds of one dense curve, beside the floor: drawing as many normals on as many threads,
        and the bare matrix products of the same shapes, in the same process.

Machines are noisy: compare figures of one run, not of two.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

ONE = """
import resource, sys
from simlab import compose
from simlab.experiment import run
run(compose(sys.argv[1:]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_mib(*overrides: str) -> float:
    """Peak resident memory of a process that runs one config, in MiB."""
    command = [sys.executable, "-c", ONE, *overrides]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return int(done.stdout) * unit / 2**20


def memory() -> None:
    """Peak memory must not grow with depth."""
    peaks = {}
    for depth in (16, 64):
        start = time.perf_counter()
        peaks[depth] = peak_mib("model=olmo2_1b", f"depth={depth}", "seeds=1", "device=cpu")
        seconds = time.perf_counter() - start
        print(
            f"olmo2_1b depth {depth:3d}: peak {peaks[depth]:7.0f} MiB  ({seconds:.0f} s)",
            flush=True,
        )
    print(f"ratio {peaks[64] / peaks[16]:.3f}")


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def dense(overrides: list[str]) -> None:
    """One dense curve against drawing its numbers and multiplying its matrices."""
    import torch

    from simlab import compose
    from simlab.experiment import prepare, run
    from simlab.model.transformer import Block
    from simlab.weights.random import PIECE

    config = compose([*overrides, "seeds=1", "device=cpu"])
    tokens = prepare(config).tokens.numel()
    with torch.device("meta"):
        matrices = [p.shape for p in Block(config.shape, 0).parameters() if p.ndim == 2]
    count = sum(shape.numel() for shape in matrices)
    threads = torch.get_num_threads()

    def draw() -> None:
        buffers = [np.empty(PIECE, np.float32) for _ in range(threads)]
        generators = [np.random.Generator(np.random.SFC64(i)) for i in range(threads)]

        def share(i: int) -> None:
            for _ in range(count // PIECE // threads):
                generators[i].standard_normal(out=buffers[i], dtype=np.float32)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(share, range(threads)))

    pairs = [(torch.randn(tokens, d_in), torch.randn(d_out, d_in)) for d_out, d_in in matrices]

    def multiply() -> None:
        for x, w in pairs:
            x @ w.T

    multiply()
    depth = config.shape.depth
    whole = timed(lambda: run(config))
    floor_draw, floor_multiply = depth * timed(draw), depth * timed(multiply)
    floor = floor_draw + floor_multiply
    print(
        f"{config.shape.name} depth {depth}, {tokens} tokens, {depth * count / 1e6:.0f} M weights"
    )
    print(f"run {whole:6.2f} s   floor {floor:6.2f} s   ratio {whole / floor:.2f}")
    print(f"  floor: draws {floor_draw:.2f} s, matrix products {floor_multiply:.2f} s")
    print(f"  peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("memory", "dense"))
    parser.add_argument("overrides", nargs="*", help="for dense: config overrides")
    args = parser.parse_args()
    if args.what == "memory":
        memory()
    else:
        dense(args.overrides or ["model=olmo2_1b", "inputs.batch=1"])


if __name__ == "__main__":
    main()
