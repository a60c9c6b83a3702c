"""The contents of a run's summary.json and weights.csv."""

from __future__ import annotations

import functools
import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from simlab.analysis.compare import departure, sentences
from simlab.analysis.exponents import exponents
from simlab.analysis.resampling import Estimate, jackknife
from simlab.analysis.verdict import Verdict
from simlab.config import FamilyConfig
from simlab.config.title import title
from simlab.experiment.prepare import Prepared
from simlab.schemes.init import Gaussian, distribution
from simlab.store import config_hash
from simlab.theory.mean_field import Prediction

if TYPE_CHECKING:
    from simlab.experiment.batches import MeasuredCurves
    from simlab.measurement.frame import Cuts


def summarise(
    ready: Prepared,
    measured: MeasuredCurves,
    frame: pd.DataFrame,
    cuts: Cuts,
    verdicts: dict[str, Verdict],
    theory: Prediction | None = None,
) -> dict[str, Any]:
    """The content of summary.json: config, environment and results. frame: from ``to_frame``.

    theory: the random inits' predicted curve.
    """
    config, depth = ready.config, ready.config.shape.depth
    several = streams_of(measured)
    tokens = several.get("streams", 1) * ready.tokens.shape[0], ready.tokens.shape[1]
    summary: dict[str, Any] = {
        "title": title(config),
        "config": asdict(config),
        "config_hash": config_hash(config),
        "engine": config.engine if config.seeds else "dense",
        "engines": ready.engines,
        "engine_reason": ready.reason,
        **({"init_origin": ready.init_origin} if ready.init_origin else {}),
        "device": config.device,
        "dtype": config.dtype,
        "versions": versions(),
        "parameters": ready.parameters,
        "tokens": list(tokens),
        **several,
        "token_unit": ready.unit,
        **({"special_tokens": ready.special} if ready.special else {}),
        "seeds": list(config.seeds),
        **(ready.checkpoint.identity() if ready.checkpoint else {}),
        **({"checkpoint": ready.checkpoint.about} if ready.checkpoint else {}),
        **verdict_values(frame, cuts, verdicts, depth, theory),
    }
    if theory:
        rows, ends = len(theory.rows), theory.ends
        summary["mean_field"] = {"rows": rows, "ends": ends, "no_gradient": theory.no_gradient}
    if ready.checkpoint:
        last = last_sublayer(measured) or 2 * depth
        if last != 2 * depth:
            summary["sublayers"] = last
        summary |= comparison(frame, tokens, last)
    if config.gradients:
        summary |= {"loss": losses(measured), "gradient_overflow": cuts.gradients}
    return summary


def verdict_values(
    frame: pd.DataFrame,
    cuts: Cuts,
    verdicts: dict[str, Verdict],
    depth: int,
    theory: Prediction | None = None,
) -> dict[str, Any]:
    """The part of a summary that describes each kind of curve. depth: the number of blocks."""
    return {
        "overflow": cuts.overflow,
        "theories": {
            name: {law: asdict(fit) for law, fit in verdict.laws.items()}
            for name, verdict in verdicts.items()
        },
        "verdict": {
            name: {
                "sentence": verdict.sentence,
                **asdict(verdict.growth),
                "fit": asdict(verdict.shape),
                "theory": asdict(verdict.agreement) if verdict.agreement else None,
            }
            for name, verdict in verdicts.items()
        },
        "lambda": {
            name: plain_exponents(frame, name, depth, theory if name == "random" else None)
            for name in verdicts
        },
    }


def comparison(frame: pd.DataFrame, tokens: tuple[int, int], last: int) -> dict[str, Any]:
    """The part of a summary that compares a given model with random inits. last: its last sublayer."""
    left = departure(frame)
    return {
        "departure": asdict(left) if left else None,
        "comparison": sentences(left, frame, tokens, last),
    }


def last_sublayer(measured: MeasuredCurves) -> int:
    """The last sublayer of whole curves; 0 where nothing was measured."""
    return max((row.sublayer for *_, curve in measured for row in curve.rows), default=0)


def streams_of(measured: MeasuredCurves) -> dict[str, int]:
    """How many residual streams the model has, if several: their sequences count among ``tokens``."""
    streams = max((curve.stream_count for *_, curve in measured), default=1)
    return {"streams": streams} if streams > 1 else {}


def plain_exponents(
    frame: pd.DataFrame, name: str, depth: int, theory: Prediction | None
) -> dict[str, Any]:
    """The exponents λ of one kind of curve, as JSON takes them."""
    return {
        key: asdict(value) if isinstance(value, Estimate) else value
        for key, value in exponents(frame, name, depth, theory).items()
    }


def losses(measured: MeasuredCurves) -> dict[str, Any]:
    """The next-token loss of each kind of curve, in nats: the seeds' mean with its interval."""
    intervals: dict[str, Any] = {}
    for name in dict.fromkeys(name for name, *_ in measured):
        values = [float(m.loss) for kind, _, m in measured if kind == name and m.loss is not None]
        intervals[name] = asdict(jackknife(np.array(values)[:, None], lambda mean: mean[:, 0]))
    return intervals


@functools.cache
def versions() -> dict[str, str]:
    """The versions of Python, simlab, torch and NumPy, on which a result's numbers depend."""
    names = ("simlab", "torch", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def weight_table(ready: Prepared) -> pd.DataFrame | None:
    """A checkpoint's tensors, each beside the std with which ``init`` would draw it."""
    if ready.checkpoint is None or not ready.config.source.weights:
        return None
    frame = pd.DataFrame(ready.checkpoint.table())
    if isinstance(ready.config.shape, FamilyConfig):  # its init is code
        return frame.assign(init_std=float("nan"))
    laws = [distribution(ready.config.shape, ready.config.init, name) for name in frame["tensor"]]
    frame["init_std"] = [law.std if isinstance(law, Gaussian) else 0.0 for law in laws]
    return frame
