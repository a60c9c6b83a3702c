"""Whole processes: a weightless curve, one in transformers, and the memory of a dense one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.floors import sizes
from benchmarks.timing import CURVE, median, process

FLOOR = """
from simlab.budget.process import tune_process
tune_process()
import json, torch
sys.path.insert(0, sys.argv[1])
from benchmarks.floors import bare
sizes = json.loads(sys.argv[2])
start = time.perf_counter()
bare(**sizes)
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


def weightless(overrides: Sequence[str], repeats: int = 3) -> None:
    """A weightless curve, forward and with gradients, beside its floor; then at twice the depth."""
    common = [*overrides, "seeds=1", "device=cpu", "engine=weightless"]
    size = sizes(common)
    folder = str(Path(__file__).resolve().parents[1])
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
