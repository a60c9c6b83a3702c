"""Which figures a sweep gets, that nothing swept is averaged unsaid, and tables of 80 columns."""

import itertools
import math
import time

import matplotlib
import pandas as pd

from simlab.experiment import run
from simlab.validation import compose

matplotlib.use("Agg")

SHAPE = ["model=small", "width=64", "heads=4", "kv_heads=4", "d_ff=128", "vocab_size=512"]
BASE = [*SHAPE, "inputs.length=32", "device=cpu", "seeds=3"]


def sweep(base, **axes):
    """A sweep's two frames and its axes, as ``python -m simlab.run -m`` gives them.

    axes: override's key with __ for a dot: its values.
    """
    keys = [key.replace("__", ".") for key in axes]
    named = ["norm_placement" if key == "norm" else key for key in keys]
    frames, rows = [], []
    for job, values in enumerate(itertools.product(*axes.values())):
        began = time.perf_counter()
        overrides = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
        result = run(compose([*base, *overrides]))
        of_job = {"job": job} | dict(zip(named, values, strict=True))
        frame = result.curve.copy()
        for key, value in reversed(of_job.items()):
            if key != "seed":
                frame.insert(0, key, value)
        frames.append(frame)
        for name in result.verdicts:
            rows.append(of_job | row_of(result, name, time.perf_counter() - began))
    swept = {
        name: list(values)
        for name, values in zip(named, axes.values(), strict=True)
        if len(values) > 1 and name != "seed"
    }
    return pd.concat(frames, ignore_index=True), pd.DataFrame(rows), swept


def row_of(result, name, seconds):
    shape, summary = result.config.shape, result.summary
    verdict = summary["verdict"][name]
    of = result.curve[result.curve["curve"] == name]
    found = {"curve": name, "depth": shape.depth, "width": shape.width}
    found["mean_square"] = of.groupby("seed")["mean_square"].last().mean()
    found["per_sublayer"] = verdict["per_sublayer"]["value"]
    found["exponent"], found["rate"] = (
        verdict["exponent"]["value"],
        verdict["rate"]["value"],
    )
    found["shape"] = verdict["shape"]
    for key, value in summary["lambda"][name].items():
        if key.startswith(("lambda_paper", "lambda_token")) and not key.endswith(
            ("additive", "sqrt2")
        ):
            for part, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
                number = value and value[part]
                found[key + suffix] = math.nan if number is None else number
    if "loss" in summary:
        found["loss"] = summary["loss"][name]["value"]
    laws = summary["theories"][name]
    found |= {law: laws[law]["status"] for law in ("additive", "sqrt2")}
    found["additive_error"] = laws["additive"]["log_error"]
    found["sentence"] = verdict["sentence"]
    found["overflow"] = sum(row["curve"] == name for row in summary["overflow"])
    return found | {"seconds": seconds}
