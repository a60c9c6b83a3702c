"""A probed model's curves, beside its random inits', as a run's: rows, verdicts, a summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import nn

from simlab.analysis.compare import with_outside
from simlab.analysis.curve import GIVEN, INITS
from simlab.config import ConfigError
from simlab.experiment.batches import MeasuredCurves
from simlab.experiment.pipeline import judge_all
from simlab.experiment.summary import (
    comparison,
    last_sublayer,
    losses,
    streams_of,
    verdict_values,
    versions,
)
from simlab.measurement.batch_checks import Batch
from simlab.measurement.engine import Measured
from simlab.measurement.frame import to_frame, vector_rows
from simlab.measurement.layout import Layout, inside, without_wrappers
from simlab.measurement.model_probe import ModelProbe, whole_blocks

Factory = Callable[[], nn.Module]


def random_curves(
    probe: ModelProbe, batch: Batch, layout: Layout | None, count: int, factory: Factory | None
) -> MeasuredCurves:
    """The curves of random inits of a probed model, seeds 0 to count − 1, one in memory at a time.

    Raises ConfigError for a model that nobody can draw, and for a factory whose models aren't random
    inits of it.
    """
    make, whose = factory or own_factory(inside(probe.model)), probe.measured()
    curves: MeasuredCurves = []
    for seed in range(count):
        made = drawn(make, probe.model, seed)
        whole = whole_blocks(whose)
        other = ModelProbe(made, layout, gradients=probe.taps is not None, whole=whole)
        other.on_block = probe.on_block
        found = other.measure(batch).measured()
        del made, other  # before the next one is drawn
        refuse_other(found, whose, seed)
        for name, before in (
            ("the model itself", whose),
            *((f"seed {s}", c) for _, s, c in curves),
        ):
            if all(equal(a.values, b.values) for a, b in zip(found.rows, before.rows, strict=True)):
                raise ConfigError(
                    f"probe: random={count}: the random init of seed {seed} is the same as {name}:"
                    " factory must draw new weights with torch's generator each time"
                )
        curves.append(("random", seed, found))
    return curves


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two rows have the same numbers, NaN included."""
    return torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))


def refuse_other(found: Measured, whose: Measured, seed: int) -> None:
    """Raise ConfigError if a random init's steps aren't the model's."""
    steps, own = ([(row.block, row.kind) for row in each.rows] for each in (found, whose))
    if steps != own:
        raise ConfigError(
            f"probe: the random init of seed {seed} has other steps ({len(steps)}) than the model"
            f" ({len(own)}): factory must give the same model, or pass a layout"
        )


def own_factory(model: nn.Module) -> Factory:
    """A function that makes a random init of a transformers model, by its class's own init.

    Raises ConfigError for another model.
    """
    import sys

    transformers = sys.modules.get("transformers")  # a model of it can't be without
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        raise ConfigError(
            f"probe: random: simlab doesn't know how a {type(model).__name__} is drawn: give factory, a"
            " function that gives a new one, such as factory=lambda: MyModel(config)"
        )
    own: Any = model
    config = type(own.config).from_dict(own.config.to_dict())
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    attention = own.config._attn_implementation

    def make() -> nn.Module:
        made: nn.Module = type(own)._from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
        return made

    return make


def drawn(make: Factory, model: nn.Module, seed: int) -> nn.Module:
    """A random init on the device and in the dtypes of the model's parameters. Raises ConfigError."""
    own = {without_wrappers(name): p for name, p in model.named_parameters()}
    first = next(iter(own.values()), None)
    with seeded(seed, first):
        made = make()
    if not isinstance(made, nn.Module):
        raise ConfigError(f"probe: factory gives a {type(made).__name__}: must give an nn.Module")
    here = {p.data_ptr() for p in own.values() if p.numel()}
    if any(p.data_ptr() in here for p in made.parameters() if p.numel()):
        raise ConfigError("probe: factory gives a model with the probed model's own parameters")
    if first is not None:
        made.to(first.device)
    for name, p in made.named_parameters():
        like = own.get(without_wrappers(name))
        if p.is_floating_point() and like is not None and like.is_floating_point():
            p.data = p.data.to(like.device, like.dtype)
    return made


@contextmanager
def seeded(seed: int, like: torch.Tensor | None) -> Iterator[None]:
    """torch's generators begun by a seed; afterwards they are where they were."""
    on_gpu = like is not None and like.device.type == "cuda"
    with torch.random.fork_rng(devices=[like.device] if like is not None and on_gpu else []):
        torch.manual_seed(seed)
        yield


def probed_result(
    probe: ModelProbe, inits: MeasuredCurves, call: str
) -> tuple[pd.DataFrame, dict[str, Any], pd.DataFrame | None]:
    """The rows of curve.csv, the content of summary.json as far as it is known, rows of streams.csv.

    The model's curve is called ``model``, unless the probe's name says that it is a random init or a
    checkpoint. inits: from ``random_curves``. call: what makes it again, in Python.
    """
    name = probe.curve if probe.curve in (*GIVEN, INITS[0]) else "model"
    measured = [(name, probe.seed, probe.measured()), *inits]
    assert probe.size is not None  # measured
    length, width = probe.size
    tokens = probe.embedding.tokens // length, length
    frame, by_curve, cuts = to_frame(measured, probe.embedding.tokens // probe.stream_count * width)
    verdicts = judge_all(frame, by_curve, probe.dtype)
    if inits:
        frame = with_outside(frame)
    depth, kind = len(probe.probes), type(probe.model).__name__
    summary = {
        "title": f"{kind}: depth {depth}, width {width}",
        "config": {"model": {"name": kind, "depth": depth, "width": width}},
        "call": call,
        "layout": probe.layout,
        "sublayers": last_sublayer(measured),
        "device": probe.device,
        "dtype": probe.dtype,
        "versions": versions(),
        "parameters": sum(p.numel() for p in probe.model.parameters()),
        "tokens": list(tokens),
        **streams_of(measured),
        "seeds": [seed for _, seed, _ in inits] or [probe.seed],
        **verdict_values(frame, cuts, verdicts, depth),
    }
    if inits:
        summary |= comparison(frame, tokens, summary["sublayers"])
    if probe.taps is not None:
        known = all(one.loss is not None for *_, one in measured)  # not of a loss of the user's own
        summary |= {"loss": losses(measured)} if known else {}
        summary["gradient_overflow"] = cuts.gradients
    return frame, summary, vector_rows(measured, frame)
