"""The pipeline: a checked config to measured curves, held against theory."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from simlab.config import ConfigError, ModelConfig, RunConfig
from simlab.engine import Row, forward, resolve_device
from simlab.growth.curve import Curves, curves
from simlab.growth.verdict import Verdict, judge
from simlab.inputs import make_tokens
from simlab.model.placement import PLACEMENTS
from simlab.model.transformer import Transformer, parameter_count
from simlab.statistics import STATISTICS
from simlab.store import config_hash
from simlab.theory.laws import LAWS
from simlab.weights.checkpoint import Checkpoint
from simlab.weights.random import RandomWeights
from simlab.weights.source import Weights, materialise_model


@dataclass(frozen=True)
class Prepared:
    """A run that can start: everything the user named has been found, opened and checked."""

    config: RunConfig
    tokens: Tensor
    checkpoint: Checkpoint | None
    device: torch.device

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
        """How many blocks the run will materialise, over all its curves."""
        return self.config.shape.depth * (len(self.config.seeds) + (self.checkpoint is not None))


@dataclass(frozen=True)
class RunResult:
    """A run's curves (the rows of curve.csv), its summary (summary.json) and its verdicts."""

    config: RunConfig
    curve: pd.DataFrame
    summary: dict[str, Any]
    verdicts: dict[str, Verdict]


def prepare(config: RunConfig) -> Prepared:
    """Open the checkpoint, make the tokens, find the device. Raises ConfigError."""
    device = resolve_device(config.device)
    checkpoint = None
    if config.source.kind == "checkpoint":
        assert config.source.path is not None
        checkpoint = Checkpoint(config.source.path, config.source.revision)
        config = dataclasses.replace(config, model=checkpoint.model)
    tokenizer = checkpoint.tokenizer if checkpoint else None
    tokens = make_tokens(config.inputs, config.shape.vocab_size, config.seed, tokenizer)
    inputs = dataclasses.replace(config.inputs, batch=tokens.shape[0], length=tokens.shape[1])
    config = dataclasses.replace(config, inputs=inputs, device=str(device))
    return Prepared(config, tokens, checkpoint, device)


def sources(run: Prepared) -> Iterator[tuple[str, int, Weights]]:
    """The run's curves: name, seed, weights. The checkpoint's first, then every random init."""
    config = run.config
    if run.checkpoint:
        yield "checkpoint", config.seed, run.checkpoint
    for seed in config.seeds:
        yield "random", seed, RandomWeights(config.shape, config.init, seed)


def run(config: RunConfig) -> RunResult:
    """Everything from a config to its verdict. Raises ConfigError."""
    return measure(prepare(config))


def measure(ready: Prepared, on_block: Callable[[], None] = lambda: None) -> RunResult:
    """Measure every curve of a run and judge it. ``on_block`` is called after each block."""
    config, model, dtype = ready.config, ready.config.shape, getattr(torch, ready.config.dtype)
    measured = [
        (name, seed, forward(model, weights, ready.tokens, ready.device, dtype, on_block))
        for name, seed, weights in sources(ready)
    ]
    frame = tidy(measured, ready.tokens.numel() * model.width)
    frame, overflow = cut(frame)
    placement = PLACEMENTS[model.norm.placement]
    frame[[f"law_{law}" for law in LAWS]] = np.nan
    verdicts = {}
    for name in frame["curve"].unique():
        of_curve = curves(frame, name)
        frame = with_laws(frame, name, of_curve, model.norm.gain, placement.normalises)
        verdicts[name] = judge(
            of_curve, model.norm.gain, placement.normalises, config.dtype, drawn=name == "random"
        )
    return RunResult(config, frame, summarise(ready, verdicts, overflow), verdicts)


def tidy(measured: list[tuple[str, int, list[Row]]], entries: int) -> pd.DataFrame:
    """One row per curve × seed × step. The only place where the host waits for the device.

    ``entries``: tokens × width, for the variance over both, as torch.var takes it.
    """
    rows = [(name, seed, row) for name, seed, curve in measured for row in curve]
    values = torch.stack([row.values for *_, row in rows]).cpu().to(torch.float64).numpy()
    frame = pd.DataFrame(values, columns=list(STATISTICS))
    spread = frame["mean_square"] - frame["mean"] ** 2
    frame.insert(2, "variance", spread * (entries / (entries - 1)))
    keys = {
        "curve": [name for name, *_ in rows],
        "seed": [seed for _, seed, _ in rows],
        "sublayer": [row.sublayer for *_, row in rows],
        "block": pd.array([row.block for *_, row in rows], dtype="Int64"),
        "kind": [row.kind for *_, row in rows],
    }
    return pd.concat([pd.DataFrame(keys), frame], axis=1)


def cut(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """End each curve before its first non-finite value, and say where that was."""
    keys = ["curve", "seed"]
    bad = frame["non_finite"] > 0
    seen = bad.groupby([frame[key] for key in keys], sort=False).cummax()
    first = frame[bad].groupby(keys, sort=False)[["sublayer", "block", "kind"]].first()
    overflow = [
        {str(key): None if pd.isna(value) else value for key, value in row.items()}
        for row in first.reset_index().to_dict("records")
    ]
    return frame[~seen].drop(columns="non_finite").reset_index(drop=True), overflow


def with_laws(
    frame: pd.DataFrame, name: str, of_curve: Curves, gain: float, normalises: str | None
) -> pd.DataFrame:
    """Add what each law predicts for the mean square as columns ``law_additive``, ``law_sqrt2``.

    Where a seed's curve is longer than the shortest, the rows beyond stay empty.
    """
    rows = of_curve.rows(gain, normalises)
    of_name = frame[frame["curve"] == name]
    step = of_name.groupby("seed").cumcount()
    kept = of_name.index[step < len(of_curve.kinds)]
    for law, predict in LAWS.items():
        with np.errstate(over="ignore"):
            values = np.exp(predict(rows))
        order = {seed: i for i, seed in enumerate(sorted(of_name["seed"].unique()))}
        which = [order[seed] for seed in frame.loc[kept, "seed"]]
        frame.loc[kept, f"law_{law}"] = values[which, step.loc[kept].to_numpy()]
    return frame


def summarise(
    ready: Prepared, verdicts: dict[str, Verdict], overflow: list[dict[str, Any]]
) -> dict[str, Any]:
    """What summary.json holds: what was run, on what, and what came out."""
    config, names = ready.config, ("simlab", "torch", "numpy")
    return {
        "config": asdict(config),
        "config_hash": config_hash(config),
        "engine": "dense",
        "device": str(ready.device),
        "dtype": config.dtype,
        "versions": {"python": platform.python_version()} | {n: version(n) for n in names},
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


def _theories(verdict: Verdict) -> dict[str, Any]:
    return {name: asdict(fit) for name, fit in verdict.laws.items()}


def build_model(
    config: RunConfig, device: str | torch.device | None = None, seed: int | None = None
) -> Transformer:
    """The whole model of a run as one ``nn.Module``, its weights drawn or read onto the device.

    The weights are the ones the run measures: the checkpoint's for source=checkpoint, else those of
    ``seed`` (by default the run's first). device: as in the config, which is the default.
    Raises ConfigError.
    """
    where = resolve_device(str(device or config.device))
    weights: Weights
    model: ModelConfig
    if config.source.kind == "checkpoint":
        if seed is not None:
            raise ConfigError("seed: a checkpoint's weights have no seed")
        weights = Checkpoint(str(config.source.path), config.source.revision)
        model = weights.model
    else:
        model = config.shape
        weights = RandomWeights(model, config.init, config.seeds[0] if seed is None else seed)
    return materialise_model(model, weights, where, getattr(torch, config.dtype))
