"""The pipeline: a checked config to measured curves, held against theory."""

from __future__ import annotations

import dataclasses
import functools
import math
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from simlab.analysis import LAWS
from simlab.analysis.compare import departure, massive, sentences, with_outside
from simlab.analysis.curve import curves, with_laws
from simlab.analysis.exponents import exponents
from simlab.analysis.resampling import Estimate
from simlab.analysis.verdict import Verdict, judge
from simlab.budget.cost import choose, seconds
from simlab.budget.cost import curves as costs_of
from simlab.budget.memory import INTERPRETER, needed, refuse
from simlab.checkpoints.checkpoint import Checkpoint
from simlab.config import ConfigError, ModelConfig, RunConfig, SourceConfig
from simlab.inputs import make_tokens
from simlab.measurement.engine import Measured, measure_curves, resolve_device
from simlab.measurement.frame import cut, cut_gradients, losses, tidy
from simlab.model.transformer import Transformer, parameter_count
from simlab.schemes.init import Gaussian, distribution
from simlab.store import config_hash
from simlab.weights.base import Weights, materialise_model
from simlab.weights.dense import RandomWeights
from simlab.weights.weightless import GaussianWeights

Curves = list[tuple[str, int, Measured]]  # name, seed, rows
ENGINES = {"dense": RandomWeights, "weightless": GaussianWeights}  # of random inits


@dataclass(frozen=True)
class Prepared:
    """A run that can start: everything the user named has been found, opened and checked.

    ``config.engine`` is then the random inits' engine, and ``reason`` says why it is that one.
    """

    config: RunConfig
    tokens: Tensor
    checkpoint: Checkpoint | None
    device: torch.device
    reason: str

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return parameter_count(self.config.shape)

    @property
    def unit(self) -> str:
        """What the token ids are: of random ids tokens, of text bytes where there's no tokenizer."""
        tokenizer = self.checkpoint.tokenizer if self.checkpoint else None
        return "bytes" if self.config.inputs.kind == "text" and tokenizer is None else "tokens"

    @property
    def blocks(self) -> int:
        """How many blocks the run will pass through, over all its curves, forward and backward."""
        curves = len(self.config.seeds) + (self.checkpoint is not None)
        return self.config.shape.depth * curves * (1 + self.config.gradients)

    @property
    def estimate(self) -> tuple[int, float]:
        """Peak bytes of the process, and seconds of measuring on this machine; both are estimates.

        NaN seconds where this machine hasn't the device.
        """
        threads = torch.get_num_threads()
        size = needed(self.config, threads) + INTERPRETER
        try:
            resolve_device(str(self.device))
        except ConfigError:
            return size, math.nan
        return size, sum(map(seconds, costs_of(self.config, threads)))

    @property
    def engines(self) -> dict[str, str]:
        """The engine of each kind of curve: a checkpoint has its weights, so it is always dense."""
        found = {"checkpoint": "dense"} if self.checkpoint else {}
        return found | ({"random": self.config.engine} if self.config.seeds else {})


@dataclass(frozen=True)
class RunResult:
    """A run's curves (the rows of curve.csv), its summary (summary.json) and its verdicts.

    weights: the rows of weights.csv, a checkpoint's tensors.
    """

    config: RunConfig
    curve: pd.DataFrame
    summary: dict[str, Any]
    verdicts: dict[str, Verdict]
    weights: pd.DataFrame | None = None


def open_checkpoint(source: SourceConfig) -> Checkpoint:
    """The checkpoint of a source that has one. Raises ConfigError."""
    checkpoint = Checkpoint(source.location, source.revision, statistics=source.weights)
    if source.kind == "demo":
        name = f"demo ({checkpoint.folder.name.replace('-', ' ')})"
        checkpoint.model = dataclasses.replace(checkpoint.model, name=name)
    return checkpoint


def prepare(
    config: RunConfig,
    tokens_of: Callable[..., Tensor] = make_tokens,
    device: torch.device | None = None,
) -> Prepared:
    """Open the checkpoint, make the tokens, find the device, see that it fits. Raises ConfigError.

    tokens_of: as ``make_tokens``, which it may remember. device: where it will run, which then isn't
    looked at, nor whether it has the memory.
    """
    known = device is not None
    device = device or resolve_device(config.device)
    checkpoint = None
    if config.source.stored:
        checkpoint = open_checkpoint(config.source)
        config = dataclasses.replace(config, model=checkpoint.model)
    tokenizer = checkpoint.tokenizer if checkpoint else None
    tokens = tokens_of(config.inputs, config.shape.vocab_size, config.seed, tokenizer)
    inputs = dataclasses.replace(config.inputs, batch=tokens.shape[0], length=tokens.shape[1])
    if config.gradients and inputs.length == 1:
        raise ConfigError(
            "gradients=true: predicts next tokens, so inputs.length must be at least 2"
        )
    engine, reason = config.engine, "as asked"
    if not config.seeds:
        engine, reason = "dense", "a checkpoint has its weights"
    elif engine == "auto":
        engine, times = choose(config.shape, tokens.numel(), config.gradients, device.type)
        size = f"{times:.1f}" if times < 10 else f"{times:.0f}"
        other = "weightless" if engine == "dense" else "dense"
        reason = f"auto: by estimate {size}× cheaper than {other}"
    config = dataclasses.replace(config, inputs=inputs, device=str(device), engine=engine)
    if not known:
        refuse(config, torch.get_num_threads())
    return Prepared(config, tokens, checkpoint, device, reason)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(config: RunConfig) -> RunResult:
    """Everything from a config to its verdict. Raises ConfigError."""
    return measure(prepare(config))


def measured_curves(ready: Prepared, on_block: Callable[[], None] = lambda: None) -> Curves:
    """Every curve of a run, the checkpoint's first. ``on_block`` is called after each block.

    Weightless seeds are measured several at a time, as one batch (``weights.weightless.together``).
    """
    config, dtype = ready.config, getattr(torch, ready.config.dtype)

    def measured(weights: Weights) -> list[Measured]:
        return measure_curves(
            weights, ready.tokens, ready.device, dtype, config.gradients, on_block
        )

    found: Curves = []
    if ready.checkpoint:
        found += [("checkpoint", config.seed, curve) for curve in measured(ready.checkpoint)]
    if config.seeds:
        cost = costs_of(config, torch.get_num_threads())[-1]
        with threads(cost.computing):
            for start in range(0, len(config.seeds), cost.batch_seeds):
                seeds = config.seeds[start : start + cost.batch_seeds]
                weights = ENGINES[config.engine](
                    config.shape, config.init, *seeds, drawing=cost.drawing
                )
                found += [
                    ("random", seed, curve)
                    for seed, curve in zip(seeds, measured(weights), strict=True)
                ]
    return found


def measure(
    ready: Prepared,
    on_block: Callable[[], None] = lambda: None,
    curves_of: Callable[..., Curves] = measured_curves,
) -> RunResult:
    """Measure every curve of a run and judge it. ``on_block`` is called after each block.

    curves_of: as ``measured_curves``, which it may remember.
    """
    config, model = ready.config, ready.config.shape
    measured = curves_of(ready, on_block)
    frame = tidy(measured, ready.tokens.numel() * model.width)
    frame, overflow = cut(frame)
    frame["massive"] = massive(frame)
    frame, lost = cut_gradients(frame, overflow)
    frame[[law.column for law in LAWS.values()]] = math.nan
    verdicts = {}
    for name in frame["curve"].unique():
        one = next(found for kind, _, found in measured if kind == name)
        of_curve = curves(frame, name, one.gain, one.normalises)
        frame = with_laws(frame, name, of_curve)
        verdicts[name] = judge(of_curve, config.dtype, drawn=name == "random")
    summary = summarise(ready, verdicts, overflow)
    summary["lambda"] = {name: _lambda(frame, name, model.depth) for name in verdicts}
    if ready.checkpoint:
        frame = with_outside(frame)
        found = departure(frame)
        summary["departure"] = asdict(found) if found else None
        summary["comparison"] = sentences(found, frame)
    if config.gradients:
        summary |= {"loss": losses(measured), "gradient_overflow": lost}
    return RunResult(config, frame, summary, verdicts, weight_table(ready))


def weight_table(ready: Prepared) -> pd.DataFrame | None:
    """A checkpoint's tensors, each beside the std with which ``init`` would draw it."""
    if ready.checkpoint is None or not ready.config.source.weights:
        return None
    frame = pd.DataFrame(ready.checkpoint.table())
    laws = [distribution(ready.config.shape, ready.config.init, name) for name in frame["tensor"]]
    frame["init_std"] = [law.std if isinstance(law, Gaussian) else 0.0 for law in laws]
    return frame


@functools.cache
def versions() -> dict[str, str]:
    """Of Python and of what the numbers depend on."""
    names = ("simlab", "torch", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def summarise(
    ready: Prepared, verdicts: dict[str, Verdict], overflow: list[dict[str, Any]]
) -> dict[str, Any]:
    """What summary.json holds: what was run, on what, and what came out."""
    config = ready.config
    return {
        "config": asdict(config),
        "config_hash": config_hash(config),
        "engine": config.engine if config.seeds else "dense",
        "engines": ready.engines,
        "engine_reason": ready.reason,
        "device": str(ready.device),
        "dtype": config.dtype,
        "versions": versions(),
        "parameters": ready.parameters,
        "tokens": list(ready.tokens.shape),
        "token_unit": ready.unit,
        "seeds": list(config.seeds),
        **(ready.checkpoint.identity() if ready.checkpoint else {}),
        "overflow": overflow,
        "theories": {name: _theories(verdict) for name, verdict in verdicts.items()},
        "verdict": {
            name: {"sentence": verdict.sentence, **asdict(verdict.growth)}
            for name, verdict in verdicts.items()
        },
    }


def _lambda(frame: pd.DataFrame, name: str, depth: int) -> dict[str, Any]:
    return {
        key: asdict(value) if isinstance(value, Estimate) else value
        for key, value in exponents(frame, name, depth).items()
    }


def _theories(verdict: Verdict) -> dict[str, Any]:
    return {name: asdict(fit) for name, fit in verdict.laws.items()}


def build_model(
    config: RunConfig, device: str | torch.device | None = None, seed: int | None = None
) -> Transformer:
    """The whole model of a run as one ``nn.Module``, its weights drawn or read onto the device.

    The weights are the checkpoint's where the source has one, else those of ``seed`` (by default
    the run's first): the ones that engine=dense measures; a weightless run has none.
    device: as in the config, which is the default.
    Raises ConfigError.
    """
    where = resolve_device(str(device or config.device))
    weights: Weights
    model: ModelConfig
    if config.source.stored:
        if seed is not None:
            raise ConfigError("seed: a checkpoint's weights have no seed")
        weights = open_checkpoint(config.source)
        model = weights.model
    else:
        model = config.shape
        weights = RandomWeights(model, config.init, config.seeds[0] if seed is None else seed)
    return materialise_model(model, weights, where, getattr(torch, config.dtype))
