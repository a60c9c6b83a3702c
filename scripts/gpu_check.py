"""Test and measure simlab on one CUDA GPU: make gpu, or python scripts/gpu_check.py [--only PART …].

Runs the tests marked gpu, then each benchmark below, in at most 8 minutes. Prints a table, and writes
it to outputs/gpu.md (to be committed under docs/) and all numbers to outputs/gpu.json.

dense_32b_bfloat16   OLMo-2-32B drawn block by block, forward
dense_1b_float32     OLMo-2-1B drawn block by block, forward
dense_1b_gradients   the same, with gradients
weightless_32b       OLMo-2-32B without weights, forward
checkpoint           a random 1B checkpoint written to disk in bfloat16, then streamed from it
probe                simlab.probe on transformers' Olmo2 of 1B, or on simlab's own without transformers

Every part is a process of its own, so that one that fails or hangs leaves the others alone; its ceiling
is the matrix product rate of the same card, measured in the same process. Parts that the time budget
doesn't reach are skipped. Exit status 1 if a part failed, 2 without a GPU.

The Python that runs this needs torch 2.11 or newer built for CUDA, which stays as it is, and beside it
simlab (pip install --no-deps .) with hydra-core, omegaconf, antlr4-python3-runtime (published as
source: for a machine that is offline, make a wheel of it first), numpy, pandas, scipy, safetensors,
huggingface_hub, PyYAML, rich, threadpoolctl, xxhash and pytest. transformers is optional.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.timing import timed

if TYPE_CHECKING:
    import torch

    from simlab.config import RunConfig
    from simlab.weights.base import Weights

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 460.0  # seconds of all parts: with Python's start and the last part's end below 8 minutes
LEAST = 15.0  # seconds below which no part is begun
MODULES = {  # what the machine's Python must have, and which package has it
    "torch": "torch", "simlab": "simlab", "hydra": "hydra-core", "omegaconf": "omegaconf",
    "antlr4": "antlr4-python3-runtime", "numpy": "numpy", "pandas": "pandas", "scipy": "scipy",
    "safetensors": "safetensors", "huggingface_hub": "huggingface_hub", "yaml": "PyYAML",
    "rich": "rich", "threadpoolctl": "threadpoolctl", "xxhash": "xxhash", "pytest": "pytest",
}  # fmt: skip
SMALL = ["depth=2", "width=64", "heads=4", "kv_heads=4", "d_ff=128", "vocab_size=500"]
MARK = "GPU_CHECK "  # begins the line in which a part's process prints its numbers
Numbers = dict[str, Any]


class Bench:
    """What a part measures with: the device, its clock, its peak memory and its ceiling."""

    def __init__(self, device: str, small: bool) -> None:
        import torch

        self.torch, self.device, self.small = torch, torch.device(device), small
        self.cuda = self.device.type == "cuda"

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds of a call, until the device has done all of it. Peak memory is counted from here."""
        if self.cuda:
            self.torch.cuda.synchronize()
            self.torch.cuda.reset_peak_memory_stats()

        def whole() -> None:
            work()
            if self.cuda:
                self.torch.cuda.synchronize()

        return timed(whole)

    def peak_gib(self) -> float:
        """GiB: of CUDA what tensors took at most since ``seconds`` began; of a CPU, the process's."""
        if self.cuda:
            return self.torch.cuda.max_memory_allocated() / 2**30
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

    def ceiling(self, dtype: torch.dtype) -> float:
        """TFLOP/s of one large matrix product, the best of five."""
        n = 256 if self.small else 8192
        a, b = (self.torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
        return 2 * n**3 / min(self.seconds(lambda: a @ b) for _ in range(5)) / 1e12

    def config(self, *overrides: str) -> RunConfig:
        """A config, of the small shape in a smoke test."""
        from simlab import compose

        return compose([*overrides, "seeds=1", *(SMALL if self.small else [])])

    def ids(self, vocabulary: int, batch: int, length: int) -> torch.Tensor:
        """Random token ids (batch, length) on the CPU; a few of them in a smoke test."""
        if self.small:
            batch, length = min(batch, 2), min(length, 16)
        generator = self.torch.Generator().manual_seed(0)
        return self.torch.randint(vocabulary, (batch, length), generator=generator)

    def curve(self, config: RunConfig, weights: Weights, ids: torch.Tensor) -> Numbers:
        """Measure a curve; a first one, of the same weights, has started the libraries."""
        from simlab.budget.memory import needed
        from simlab.measurement.engine import measure_curves
        from simlab.model.describe import describe

        inputs = replace(config.inputs, batch=len(ids), length=ids.shape[-1])
        asked = replace(config, device=self.device.type, inputs=inputs)
        model, dtype = weights.model, getattr(self.torch, config.dtype)

        def work() -> None:
            curves = measure_curves(weights, ids, self.device, dtype, config.gradients)
            assert curves[0].rows[-1].values[0].isfinite(), "the curve overflowed"

        weights.model = replace(model, depth=1)
        work()
        weights.model = model
        seconds = self.seconds(work)
        peak = self.peak_gib()
        entries = model.depth * describe(model).entries
        products = 3 if config.gradients else 1  # the backward runs every block again
        ceiling = self.ceiling(dtype)
        done = products * 2 * ids.numel() * entries / 1e12
        return {
            "seconds": seconds, "peak_gib": peak, "parameters": entries,
            "estimated_gib": needed(asked, self.torch.get_num_threads()) / 2**30,
            "tokens": ids.numel(), "ceiling_tflops": ceiling, "product_tflops": done / seconds,
            "of_ceiling": done / seconds / ceiling,
        }  # fmt: skip


def dense(bench: Bench, *overrides: str) -> Numbers:
    """A curve whose weights are drawn block by block; every number drawn counts once."""
    from simlab.weights.dense import RandomWeights

    config = bench.config("engine=dense", *overrides)
    weights = RandomWeights(config.shape, config.init, 0)
    ids = bench.ids(config.shape.vocab_size, 4, 512)
    found = bench.curve(config, weights, ids)
    size = getattr(bench.torch, config.dtype).itemsize
    drawn = found["parameters"] * size * (1 + config.gradients)
    return found | {"drawn_gb_per_s": drawn / found["seconds"] / 1e9}


def weightless(bench: Bench) -> Numbers:
    """A weightless curve. Its normals are drawn on the CPU; its products aren't a matrix's."""
    from simlab.weights.weightless import GaussianWeights

    config = bench.config("engine=weightless", "model=olmo2_32b")
    weights = GaussianWeights(config.shape, config.init, 0)
    ids = bench.ids(config.shape.vocab_size, 1, 64)
    found = bench.curve(config, weights, ids)
    keys = ("seconds", "peak_gib", "estimated_gib", "tokens", "ceiling_tflops")
    return {key: found[key] for key in keys}


def checkpoint(bench: Bench) -> Numbers:
    """A random checkpoint is written, opened and measured; the files are in the system's cache."""
    from write_random import write

    from simlab.checkpoints.checkpoint import Checkpoint

    config = bench.config("model=olmo2_1b", "dtype=bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        written = timed(lambda: write(Path(folder), config))
        weights = Checkpoint(folder)
        found = bench.curve(config, weights, bench.ids(config.shape.vocab_size, 4, 512))
        hashed = timed(weights.identity)
    read = 2 * found["parameters"] / found["seconds"] / 1e9
    return found | {"written_s": written, "read_gb_per_s": read, "hash_s": hashed}


def probe(bench: Bench) -> Numbers:
    """A model's forward pass alone, and with the probe."""
    import simlab
    from simlab.weights.base import materialise_model
    from simlab.weights.dense import RandomWeights

    torch = bench.torch
    config = bench.config("model=olmo2_1b", "dtype=bfloat16")
    shape, name = config.shape, "simlab's"
    if importlib.util.find_spec("transformers"):
        import transformers
        from write_random import hugging_face_config

        name = "transformers'"
        values = hugging_face_config(shape, torch.bfloat16)
        with torch.device(bench.device):
            model: Any = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**values))
        model = model.to(bench.device, torch.bfloat16).eval()
    else:
        weights = RandomWeights(shape, config.init, 0)
        model = materialise_model(shape, weights, bench.device, torch.bfloat16)
    ids = bench.ids(shape.vocab_size, 4, 512).to(bench.device)

    def bare() -> None:
        with torch.no_grad():
            model(ids)

    def probed() -> None:
        rows = simlab.probe(model, ids).rows()
        assert rows["mean_square"].notna().all()

    for work in (bare, probed):
        work()
    alone, seconds = bench.seconds(bare), bench.seconds(probed)
    found = {"model": name, "seconds": seconds, "peak_gib": bench.peak_gib(), "bare_s": alone}
    ceiling = bench.ceiling(torch.bfloat16)
    return found | {"tokens": ids.numel(), "ceiling_tflops": ceiling}


PARTS: dict[str, Callable[[Bench], Numbers]] = {
    "dense_32b_bfloat16": lambda bench: dense(bench, "model=olmo2_32b", "dtype=bfloat16"),
    "dense_1b_float32": lambda bench: dense(bench, "model=olmo2_1b"),
    "dense_1b_gradients": lambda bench: dense(bench, "model=olmo2_1b", "gradients=true"),
    "weightless_32b": weightless,
    "checkpoint": checkpoint,
    "probe": probe,
}
COLUMNS = {  # of the table: heading, key, format
    "seconds": ("seconds", ".2f"), "peak GiB": ("peak_gib", ".2f"),
    "estimated": ("estimated_gib", ".2f"), "tokens": ("tokens", "d"),
    "TFLOP/s of products": ("product_tflops", ".1f"), "ceiling TFLOP/s": ("ceiling_tflops", ".1f"),
    "drawn GB/s": ("drawn_gb_per_s", ".1f"), "read GB/s": ("read_gb_per_s", ".2f"),
    "without probe, s": ("bare_s", ".3f"),
}  # fmt: skip


def part(name: str, command: Sequence[str], limit: float) -> Numbers:
    """Run a part's process for at most ``limit`` seconds: its status, its numbers, its last words."""
    start = time.perf_counter()
    paths = [str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0",  # as simlab's own commands set it
    }
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"part": name, "status": "failed", "why": f"not done after {limit:.0f} s"}
    lines = (done.stdout + "\n" + done.stderr).strip().splitlines()
    numbers = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
    found: Numbers = {"part": name, "status": "failed" if done.returncode else "passed"}
    found |= {"process_s": time.perf_counter() - start}
    found |= json.loads(numbers[-1]) if numbers else {}
    if done.returncode:
        found["why"] = next((line for line in reversed(lines) if line.strip()), "no output")
        found["output"] = lines[-60:]
    elif name == "tests":
        found["why"] = next((line for line in reversed(lines) if " in " in line), "")
    return found


def machine(device: str) -> Numbers:
    """What the numbers were measured on."""
    import torch

    names = ("torch", "simlab", "numpy")
    found: Numbers = {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found |= {
            "device": about.name,
            "memory_gib": about.total_memory / 2**30,
            "multiprocessors": about.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found


def table(about: Numbers, parts: Sequence[Numbers]) -> str:
    """All parts as a markdown table, under a line about the machine."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [f"{about['device']}, {about['threads']} CPU threads; {versions}", ""]
    lines += ["| part | " + " | ".join(COLUMNS) + " | |", "|---" * (len(COLUMNS) + 2) + "|"]
    for row in parts:
        cells = [f"{row[key]:{form}}" if key in row else "" for key, form in COLUMNS.values()]
        said = row["status"] if row["status"] != "passed" else ""
        why = ": ".join(text for text in (said, row.get("why", row.get("model", ""))) if text)
        lines.append(f"| {row['part']} | {' | '.join(cells)} | {why.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def check(args: argparse.Namespace) -> int:
    """Run the parts one after another as far as the budget goes; the exit status."""
    from simlab.store import write_json, write_text

    args.output.mkdir(parents=True, exist_ok=True)
    about, end = machine(args.device), time.perf_counter() + args.budget
    me = [sys.executable, str(Path(__file__).resolve()), "--device", args.device]
    me += ["--small"] if args.small else []
    commands = {"tests": [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]}
    commands |= {name: [*me, "--part", name] for name in PARTS}
    results: list[Numbers] = []
    for name in args.only or commands:
        left = end - time.perf_counter()
        if left < LEAST:
            print(f"{name}: skipped, the {args.budget:.0f} s are used up", flush=True)
            results.append({"part": name, "status": "skipped", "why": "no time was left"})
        else:
            results.append(part(name, commands[name], min(left, args.budget / 2)))
            row = results[-1]
            print(f"{name}: {row['status']} {row.get('why', '')}".rstrip(), flush=True)
        written = {"machine": about, "parts": results}
        write_json(args.output / "gpu.json", written)
        write_text(args.output / "gpu.md", table(about, results))
    print(f"\n{table(about, results)}\n{args.output / 'gpu.json'}")
    return int(any(row["status"] == "failed" for row in results))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line; run all parts, or in a part's own process that part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models: tests this script")
    parser.add_argument("--only", nargs="+", choices=("tests", *PARTS), metavar="PART")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds (default: %(default)g)"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "outputs")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    missing = [package for name, package in MODULES.items() if not importlib.util.find_spec(name)]
    if missing:
        print(f"gpu_check: {sys.executable} lacks {', '.join(missing)}", file=sys.stderr)
        return 2
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu_check: no CUDA device for torch {torch.__version__}; --device cpu --small tests the"
            " script alone",
            file=sys.stderr,
        )
        return 2
    if args.part:
        print(MARK + json.dumps(PARTS[args.part](Bench(args.device, args.small))))
        return 0
    return check(args)


if __name__ == "__main__":
    sys.exit(main())
