"""A run's checkpoint, opened, and its whole model as one module."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from simlab.checkpoints.checkpoint import Checkpoint
from simlab.checkpoints.families.checkpoint import FamilyCheckpoint, describe_family
from simlab.checkpoints.families.config import is_family
from simlab.checkpoints.formats import read_shape
from simlab.checkpoints.formats.own_init import OwnInit
from simlab.checkpoints.untrusted.tokenizer_files import find_tokenizer
from simlab.config import ConfigError, ModelConfig, RunConfig, SourceConfig
from simlab.measurement.engine import resolve_device
from simlab.model.transformer import Transformer
from simlab.weights.base import Weights, materialise_model
from simlab.weights.dense import RandomWeights


def open_checkpoint(source: SourceConfig) -> Checkpoint | FamilyCheckpoint:
    """The checkpoint of a source that has one. Raises ConfigError."""
    from simlab.checkpoints.hub import find  # late: most runs need no hub

    if is_family(find(source.location, source.revision).folder):
        return FamilyCheckpoint(
            source.location, source.revision, statistics=source.weights, keep=source.keep
        )
    checkpoint = Checkpoint(
        source.location, source.revision, statistics=source.weights, keep=source.keep
    )
    if source.kind == "demo":
        name = f"demo ({checkpoint.folder.name.replace('-', ' ')})"
        checkpoint.model = dataclasses.replace(checkpoint.model, name=name)
    return checkpoint


def refuse_missing(source: SourceConfig) -> None:
    """Raises ConfigError where a source names a checkpoint that isn't there, readable or not."""
    from simlab.checkpoints.hub import find  # late: most runs need no hub

    find(source.location, source.revision)


@dataclasses.dataclass(frozen=True)
class Described:
    """A checkpoint on the hub whose weights aren't here: what its small files say."""

    model: ModelConfig
    init: OwnInit
    tokenizer: Path | None


def read_description(source: SourceConfig) -> Described | None:
    """A source's checkpoint as its small files describe it; None if its weights are here.

    Raises ConfigError.
    """
    from simlab.checkpoints.hub import find  # late: most runs need no hub

    found = find(source.location, source.revision)
    if not found.missing:
        return None
    shape = describe_family if is_family(found.folder) else read_shape
    return Described(*shape(found.folder), find_tokenizer(found.folder))


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
        opened = open_checkpoint(config.source)
        if isinstance(opened, FamilyCheckpoint):
            raise ConfigError(
                f"{opened.path}: model_type={opened.model.family} isn't a model of simlab's: load it "
                "with transformers"
            )
        weights, model = opened, opened.model
    else:
        model = config.shape
        weights = RandomWeights(model, config.init, config.seeds[0] if seed is None else seed)
    return materialise_model(model, weights, where, getattr(torch, config.dtype))
