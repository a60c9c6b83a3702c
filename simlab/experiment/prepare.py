"""From a checked config to a run that can start: the checkpoint, the tokens, the device, the engine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from simlab.budget.cost import choose, seconds
from simlab.budget.cost import curves_to_measure as costs_of
from simlab.budget.memory import INTERPRETER, needed, refuse
from simlab.checkpoints.checkpoint import Checkpoint
from simlab.config import ConfigError, ModelConfig, RunConfig, SourceConfig
from simlab.inputs import Ids, make_tokens
from simlab.measurement.engine import resolve_device
from simlab.model.transformer import Transformer, parameter_count
from simlab.weights.base import Weights, materialise_model
from simlab.weights.dense import RandomWeights


@dataclass(frozen=True)
class Prepared:
    """A run that can start: everything the user named has been found, opened and checked.

    ``config.engine`` is then the random inits' engine, and ``reason`` says why it is that one.
    """

    config: RunConfig
    tokens: Ids
    checkpoint: Checkpoint | None
    device: torch.device
    reason: str

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return parameter_count(self.config.shape)

    @property
    def entries(self) -> int:
        """Numbers in the residual stream of one curve: tokens × width."""
        return self.tokens.size * self.config.shape.width

    @property
    def unit(self) -> str:
        """The unit of the token ids: ``tokens``, or ``bytes`` for text without a tokenizer."""
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
        engines = {"checkpoint": "dense"} if self.checkpoint else {}
        return engines | ({"random": self.config.engine} if self.config.seeds else {})


def open_checkpoint(source: SourceConfig) -> Checkpoint:
    """The checkpoint of a source that has one. Raises ConfigError."""
    checkpoint = Checkpoint(source.location, source.revision, statistics=source.weights)
    if source.kind == "demo":
        name = f"demo ({checkpoint.folder.name.replace('-', ' ')})"
        checkpoint.model = dataclasses.replace(checkpoint.model, name=name)
    return checkpoint


def prepare(
    config: RunConfig,
    tokens_of: Callable[..., Ids] = make_tokens,
    device: torch.device | None = None,
) -> Prepared:
    """Open the checkpoint, make the tokens, find the device, see that it fits. Raises ConfigError.

    tokens_of: replaces ``make_tokens``, with the same arguments; a sweep passes one that caches.
    device: where the run will be; this machine's devices and free memory are then not checked.
    """
    available = device is not None
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
        engine, times = choose(config.shape, tokens.size, config.gradients, device.type)
        size = f"{times:.1f}" if times < 10 else f"{times:.0f}"
        other = "weightless" if engine == "dense" else "dense"
        reason = f"auto: by estimate {size}× cheaper than {other}"
    config = dataclasses.replace(config, inputs=inputs, device=str(device), engine=engine)
    if not available:
        refuse(config, torch.get_num_threads())
    return Prepared(config, tokens, checkpoint, device, reason)


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
