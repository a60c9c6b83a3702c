"""What a checkpoint's curve costs: python scripts/benchmark_checkpoint.py FOLDER [overrides].

FOLDER: an OLMo-2 checkpoint in Hugging Face's layout, for instance of scripts/write_random.py. Whole
processes, alternating: simlab; two floors, reading the bytes of the files that a curve needs, and the
bare matrix products of the same sizes in the same dtype; and transformers in the checkpoint's dtype,
loading it and asking for hidden states. 64 tokens. A file that is in the system's cache is read from
there by all of them.
"""

from __future__ import annotations

import argparse
import json

from benchmarks.timing import CURVE, median, process

READ = """
import torch
from simlab.checkpoints.checkpoint import Checkpoint
from simlab.checkpoints.storage import READ
from simlab.checkpoints.streamed import row_runs
opened = Checkpoint(sys.argv[1])
start = time.perf_counter()
total = 0
for name in opened.names():
    if not name.startswith(("norm", "head")):
        stored, start, stop = opened.stored(name)
        for run in row_runs(stored, start, stop):
            rows = stored.rows(*run, READ.empty((run[1] - run[0], *stored.shape[1:]), stored.dtype))
            data = rows.reshape(-1).view(torch.int16)
            total += int(data[: data.numel() // 4 * 4].view(torch.int64).sum())
"""
PRODUCTS = """
import json, torch
depth, tokens, dtype, sizes = json.loads(sys.argv[1])
dtype = getattr(torch, dtype)
pairs = [(torch.randn(tokens, i).to(dtype), torch.randn(o, i).to(dtype)) for i, o in sizes]
start = time.perf_counter()
with torch.no_grad():
    for _ in range(depth):
        for x, w in pairs:
            torch.nn.functional.linear(x, w)
"""
TRANSFORMERS = """
import torch, transformers
start = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
with torch.no_grad():
    ids = torch.randint(model.config.vocab_size, (1, 64))
    hidden = model(ids, output_hidden_states=True).hidden_states
curve = [float(h.double().pow(2).mean()) for h in hidden]
"""


def products(folder: str, dtype: str) -> str:
    """The argument of PRODUCTS: depth, tokens, dtype and the blocks' matrices as (d_in, d_out)."""
    from simlab.checkpoints.checkpoint import Checkpoint, parameter_shapes

    model = Checkpoint(folder).model
    sizes = [
        s[::-1] for role, s in parameter_shapes(model).items() if role.endswith("_proj.weight")
    ]
    return json.dumps([model.depth, 64, dtype, sizes])


def main() -> None:
    """Measure, print a table and the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument(
        "overrides", nargs="*", help="of every simlab run, e.g. source.weights=false"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-transformers", action="store_true")
    args = parser.parse_args()
    common = ["source=checkpoint", f"source.path={args.folder}", "seeds=0", "device=cpu"]
    common += ["inputs.length=64", *args.overrides]
    half, full = products(args.folder, "bfloat16"), products(args.folder, "float32")
    runs = {
        "reading the bytes": (READ, [args.folder]),
        "bfloat16 products": (PRODUCTS, [half]),
        "float32 products": (PRODUCTS, [full]),
        "simlab, bfloat16": (CURVE, [*common, "dtype=bfloat16"]),
        "simlab, float32": (CURVE, [*common, "dtype=float32"]),
    }
    measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, (body, given) in runs.items():
            measured[name].append(process(body, *given))
    if not args.without_transformers:  # last: it may push the file out of the system's cache
        measured["transformers"] = [process(TRANSFORMERS, args.folder) for _ in range(2)]
    rows = {name: median(values) for name, values in measured.items()}
    print("                      whole process    work alone      peak")
    for name, row in rows.items():
        print(f"{name:20s} {row[0]:10.2f} s {row[1]:12.2f} s {row[2]:8.0f} MiB", flush=True)
    for dtype in ("bfloat16", "float32"):
        ours = rows[f"simlab, {dtype}"]
        floors = [rows["reading the bytes"], rows[f"{dtype} products"]]
        ratios = [ours[i] / max(floor[i] for floor in floors) for i in (0, 1)]
        print(f"{dtype} / larger floor: whole {ratios[0]:.2f}, work {ratios[1]:.2f}")
        if "transformers" in rows:
            times = [rows["transformers"][i] / ours[i] for i in (0, 1)]
            print(f"transformers / {dtype}: whole {times[0]:.1f}, work {times[1]:.1f}")


if __name__ == "__main__":
    main()
