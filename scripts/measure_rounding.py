"""How far rounding moves a curve: python scripts/measure_rounding.py.

Machines differ in thread counts and instruction sets. Each setting runs in a process for each of these,
and the largest relative difference of any number from the first of them is printed: ``RTOL`` in
simlab/regress/gates.py is chosen from it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from simlab.config import DTYPES
from simlab.regress.gates import QUANTITIES, RTOL, SIGNED, relative_error

SMALL = ["model=small", "depth=64", "width=256", "heads=4", "kv_heads=2", "d_ff=1024", "seeds=2"]
SETTINGS = {
    "dense, depth 64": [*SMALL, "engine=dense"],
    "dense, depth 64, pre": [*SMALL, "engine=dense", "norm=pre"],
    "weightless, depth 64": [*SMALL, "engine=weightless"],
    "weightless, OLMo-2-7B": ["model=olmo2_7b", "engine=weightless", "seeds=2", "inputs.batch=1"],
    "demo": ["source=demo", "seeds=0"],
}
SETTINGS = {
    f"{name}, {dtype}": [*args, f"dtype={dtype}", "device=cpu"]
    + (["inputs.length=64"] if "demo" not in name else [])
    for name, args in SETTINGS.items()
    for dtype in DTYPES
}
MACHINES: dict[str, dict[str, str]] = {
    "as it is": {},
    "one thread": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
             "MKL_ENABLE_INSTRUCTIONS": "AVX2", "OPENBLAS_CORETYPE": "Haswell"},
    "SSE": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41",
            "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "OPENBLAS_CORETYPE": "Nehalem"},
    "SSE, reproducible MKL": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE",
                              "OMP_NUM_THREADS": "1"},
}  # fmt: skip
CODE = """
import sys
from simlab.budget.process import tune_process
tune_process()
from simlab import compose
from simlab.experiment import run
run(compose(sys.argv[2:])).curve.to_pickle(sys.argv[1])
"""


def curve(args: list[str], env: dict[str, str]) -> pd.DataFrame:
    """A run's rows, measured in a process with this environment."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curve"
        subprocess.run(
            [sys.executable, "-c", CODE, str(path), *args], env=os.environ | env, check=True
        )
        rows = pd.read_pickle(path)
    assert isinstance(rows, pd.DataFrame)
    return rows


def apart(a: pd.DataFrame, b: pd.DataFrame, quantity: str) -> float:
    """The largest difference, as the exact gate takes it."""
    pairs = zip(a.groupby("seed"), b.groupby("seed"), strict=True)
    return max(
        float(relative_error(old[quantity], new[quantity], quantity in SIGNED).max())
        for (_, old), (_, new) in pairs
    )


def main() -> None:
    """Measure, and print a line per setting and machine."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    worst = dict.fromkeys(DTYPES, 0.0)
    for name, args in SETTINGS.items():
        first, *others = MACHINES.items()
        reference = curve(args, first[1])
        for machine, env in others:
            if "SSE" in machine and "float32" not in name:
                continue  # torch's attention of half precision asks oneDNN for what that lacks
            other = curve(args, env)
            by = {q: apart(reference, other, q) for q in QUANTITIES}
            top = max(by, key=lambda q: by[q])
            dtype = next(d for d in DTYPES if f"dtype={d}" in args)
            worst[dtype] = max(worst[dtype], by[top])
            print(f"{name:36s} {machine:22s} {by[top]:.1e} ({top})", flush=True)
    for dtype, most in worst.items():
        print(f"{dtype}: at most {most:.1e}; RTOL {RTOL[dtype]:.0e}")


if __name__ == "__main__":
    main()
