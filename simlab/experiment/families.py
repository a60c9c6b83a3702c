"""The curves of a model type that transformers computes: its decoder's, streamed and probed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch

from simlab.checkpoints.families.checkpoint import FamilyCheckpoint
from simlab.checkpoints.families.config import CONFIG_ERRORS, one_line
from simlab.checkpoints.families.skeleton import Skeleton, Source
from simlab.config import FROM_CHECKPOINT, ConfigError, RunConfig
from simlab.config.cli_errors import out_of_memory
from simlab.experiment.family_gradients import with_gradients
from simlab.measurement.engine import Measured
from simlab.measurement.model_probe import ModelProbe, whole_blocks
from simlab.weights.base import Weights

if TYPE_CHECKING:
    from simlab.experiment.batches import MeasuredCurves
    from simlab.experiment.prepare import Prepared


def family_curves(
    ready: Prepared, checkpoint: FamilyCheckpoint, on_block: Callable[[], None]
) -> MeasuredCurves:
    """Every curve of a run, the checkpoint's first. ``on_block`` is called before each block."""
    config = ready.config
    skeleton = checkpoint.skeleton_for(getattr(torch, config.dtype), torch.device(config.device))
    ids = torch.from_numpy(ready.tokens).to(skeleton.device)

    blocks = skeleton.blocks()

    def passed(path: str) -> None:
        if path in blocks:
            on_block()

    def read(path: str) -> None:
        checkpoint.prefetch(path)
        passed(path)

    stored = checkpoint.stored(skeleton)
    back = config.gradients
    own = streamed(skeleton, stored, ids, read, back)
    curves = [("checkpoint", config.seed, own)]
    for seed in config.seeds:
        drawn = checkpoint.drawn(skeleton, seed)
        found = streamed(skeleton, drawn, ids, passed, back, whole_blocks(own))
        if [row.kind for row in found.rows] != [row.kind for row in own.rows]:
            raise ConfigError(
                f"{checkpoint.path}: other steps are found in the random init of seed {seed} than in"
                " the checkpoint: seeds=0 measures the checkpoint alone"
            )
        curves.append(("random", seed, found))
    return curves


def family_config(config: RunConfig) -> RunConfig:
    """The run's config with the one engine that it may have. Raises ConfigError for other wishes."""
    family = config.shape.norm.placement
    why = f"model_type={family} is computed by transformers' code"
    if config.engine not in ("auto", "dense"):
        raise ConfigError(f"engine={config.engine}: {why}; allowed: dense")
    given = {key: value for key, value in asdict(config.init).items() if value is not None}
    if given != {"rule": FROM_CHECKPOINT}:
        key, value = next((k, v) for k, v in given.items() if (k, v) != ("rule", FROM_CHECKPOINT))
        name = "init" if key == "rule" else f"init.{key}"
        raise ConfigError(f"{name}={value}: {why}, and its random inits are the family's own")
    return replace(config, engine="dense")


def streamed(
    skeleton: Skeleton,
    source: Source,
    ids: torch.Tensor,
    on_unit: Callable[[str], None] = lambda path: None,
    gradients: bool = False,
    whole: Collection[int] = (),
) -> Measured:
    """One curve: the decoder's forward call on ids (B, T), its weights from a source.

    Whole sequences pass in groups of at most Weights.tokens_at_once tokens, each through all blocks:
    memory holds one group's activations, and every weight is read or drawn once for each of them.
    whole: as of ``ModelProbe``.
    Raises ConfigError where no layout describes its blocks, or where its code can't run without all
    of its weights.
    """
    batches = ids.split(max(1, Weights.tokens_at_once // ids.shape[1]))
    try:
        if gradients:
            return with_gradients(skeleton, source, batches, on_unit, whole)
        with skeleton.filled(source, on_unit) as decoder:
            result = ModelProbe(decoder, whole=whole)
            for batch in batches:
                with torch.no_grad(), result:
                    decoder(input_ids=batch, use_cache=False)
            return result.measured()
    except (ConfigError, OSError):  # each has its own line
        raise
    except CONFIG_ERRORS as error:  # of transformers' code, on a stranger's config
        if out_of_memory(error):
            raise
        kind = type(skeleton.model).__name__
        raise ConfigError(
            f"{skeleton.where}: transformers' {kind} can't be streamed: {one_line(error)}"
        ) from error
