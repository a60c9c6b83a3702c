"""From a checked config to a run that can start: the checkpoint, the tokens, the device, the engine.

Imports of torch are late: a run that measures nothing (``engine=theory`` of random inits) needs none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from simlab.analysis.numbers import gigabytes
from simlab.budget.machine import TORCH, available, refuse_imports
from simlab.budget.predicted import WITHOUT_TORCH, prediction_cost, refuse_prediction
from simlab.config import FROM_CHECKPOINT, ConfigError, FamilyConfig, RunConfig
from simlab.inputs import Ids, Tokens, token_batch
from simlab.theory.mean_field import unpredictable
from simlab.theory.size import parameters_on_paper

if TYPE_CHECKING:
    from simlab.checkpoints.checkpoint import Checkpoint
    from simlab.checkpoints.families.checkpoint import FamilyCheckpoint
    from simlab.checkpoints.formats.own_init import OwnInit


@dataclass(frozen=True)
class Prepared:
    """A run that can start: everything the user named has been found, opened and checked.

    ``config.engine`` is then the random inits' engine, and ``reason`` says why it is that one. With
    ``theory`` they are one predicted curve, and ``config.seeds`` is (seed,). ``init_origin`` says where
    an init that the user left to the checkpoint comes from, None of one that the user gave. ``special``
    names the tokens that are put around a text, ``unit`` says if ids are tokens or bytes.
    ``checkpoint`` is also None of a plan for one on the hub whose weights aren't here.
    """

    config: RunConfig
    tokens: Ids
    checkpoint: Checkpoint | FamilyCheckpoint | None
    reason: str
    init_origin: str | None = None
    special: str = ""
    unit: str = "tokens"

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        if not self.config.measures:
            return parameters_on_paper(self.config.shape)
        if isinstance(self.config.shape, FamilyConfig):
            return self.config.shape.parameters
        from simlab.model.transformer import parameter_count

        return parameter_count(self.config.shape)

    @property
    def unread(self) -> str:
        """How the checkpoint's weights are quantised, and what isn't read of its files, or nothing."""
        return self.checkpoint.unread if self.checkpoint else ""

    @property
    def entries(self) -> int:
        """Numbers in the residual stream of one curve: tokens × width."""
        return self.tokens.size * self.config.shape.width

    @property
    def blocks(self) -> int:
        """How many blocks the run will pass through, over all its curves, forward and backward.

        A predicted curve passes forward, back for its band, and back for gradients.
        """
        drawn = len(self.config.seeds) if self.config.engine != "theory" else 0
        curves, backward = drawn + self.config.source.stored, int(self.config.gradients)
        if isinstance(self.config.shape, FamilyConfig):
            from simlab.budget.cost import curves_to_measure

            one = curves_to_measure(self.config, 1)[0]  # each group passes through all blocks
            curves *= -(-one.batch // one.together)
        predicted = bool(self.config.seeds) and not self.unpredicted
        return self.config.shape.depth * (curves * (1 + backward) + predicted * (2 + backward))

    @property
    def unpredicted(self) -> str | None:
        """Why there is no predicted curve of the random inits, or None where there is one."""
        (size, _), free = prediction_cost(self.config), available("cpu")
        reason = unpredictable(self.config.shape, self.tokens)
        if not reason and free is not None and size > free:
            reason = f"it needs about {gigabytes(size)} of memory, and {gigabytes(free)} are free"
        return reason

    @property
    def prediction(self) -> tuple[int, float]:
        """Bytes and seconds that the predicted curve takes; 0 and 0 where there is none."""
        if not self.config.seeds or self.unpredicted:
            return 0, 0.0
        return prediction_cost(self.config)

    @property
    def estimate(self) -> tuple[int, float]:
        """Peak bytes of the process, and seconds of measuring and predicting; both are estimates.

        NaN seconds where this machine hasn't the device.
        """
        size, time = self.prediction
        if not self.config.measures:
            return size + WITHOUT_TORCH, time
        import torch

        from simlab.budget.cost import curves_to_measure, seconds
        from simlab.budget.memory import INTERPRETER, needed
        from simlab.measurement.engine import resolve_device

        threads = torch.get_num_threads()
        size = max(size, needed(self.config, threads)) + INTERPRETER
        try:
            resolve_device(self.config.device)
        except ConfigError:
            return size, math.nan
        return size, time + sum(map(seconds, curves_to_measure(self.config, threads)))

    @property
    def engines(self) -> dict[str, str]:
        """The engine of each kind of curve: a checkpoint has its weights, so it is always dense."""
        engines = {"checkpoint": "dense"} if self.config.source.stored else {}
        inits = "theory" if self.config.engine == "theory" else "random"
        return engines | ({inits: self.config.engine} if self.config.seeds else {})


def prepare(
    config: RunConfig,
    tokens_of: Callable[..., Tokens] = token_batch,
    device: str | None = None,
    download: bool = True,
) -> Prepared:
    """Open the checkpoint, make the tokens, find the device, see that it fits. Raises ConfigError.

    tokens_of: replaces ``token_batch``, with the same arguments; a sweep passes one that caches.
    device: where the run will be; this machine's devices and free memory are then not checked.
    download: False for a plan: weights that aren't here are left where they are.
    """
    if config.measures:
        refuse_imports(TORCH)
    where = device if config.measures else "cpu"
    if where is None:
        from simlab.measurement.engine import resolve_device

        where = str(resolve_device(config.device))
    checkpoint, origin, tokenizer = None, None, None
    if config.source.stored:
        from simlab.experiment.build import read_description

        described = read_description(
            config.source
        )  # so that a run that can't be is told before a download
        if described is None:
            checkpoint = _opened(config)
        about = described or checkpoint
        assert about is not None
        config, tokenizer = replace(config, model=about.model), about.tokenizer
        if isinstance(config.model, FamilyConfig):
            from simlab.experiment.families import family_config

            config = family_config(config)
        if config.init.rule == FROM_CHECKPOINT:
            config, origin = _own_init(config, about.init)
    made = tokens_of(config.inputs, config.shape.vocab_size, config.seed, tokenizer)
    tokens = made.ids
    inputs = replace(config.inputs, batch=tokens.shape[0], length=tokens.shape[1])
    positions, length = config.shape.positions, tokens.shape[1]
    if positions is not None and length > positions:
        raise ConfigError(
            f"inputs.length={length}: the model has {positions} learned positions (model.positions)"
        )
    if config.gradients and inputs.length == 1:
        raise ConfigError(
            "gradients=true: predicts next tokens, so inputs.length must be at least 2"
        )
    config = replace(config, inputs=inputs, device=where)
    family = isinstance(config.model, FamilyConfig)
    reason = "transformers computes and draws this model" if family else "as asked"
    if not config.seeds:
        config, reason = replace(config, engine="dense"), "a checkpoint has its weights"
    elif (loops := config.shape.norm.loops or 1) > 1 and config.engine in ("auto", "weightless"):
        if config.engine == "weightless":
            raise ConfigError(
                f"engine=weightless: draws each matrix's effect anew, and norm.loops={loops} meets it "
                "again; allowed: auto, dense"
            )
        config, reason = replace(config, engine="dense"), "auto: blocks are met again (norm.loops)"
    elif config.engine == "auto":
        config, reason = _cheaper(config, tokens.size)
    elif config.engine == "theory":
        if why := unpredictable(config.shape, tokens):
            raise ConfigError(f"engine=theory: {why}")
        config = replace(config, seeds=(config.seed,))
        refuse_prediction(config)
    if config.measures and device is None:
        import torch

        from simlab.budget.memory import refuse

        refuse(config, torch.get_num_threads())
    if config.source.stored and checkpoint is None and download:
        checkpoint = _opened(config)
    return Prepared(config, tokens, checkpoint, reason, origin, made.special, made.unit)


def _opened(config: RunConfig) -> Checkpoint | FamilyCheckpoint:
    """The run's checkpoint, with the head that gradients need. Raises ConfigError."""
    from simlab.experiment.build import open_checkpoint

    checkpoint = open_checkpoint(config.source)
    if config.gradients:
        _ = checkpoint.head_name  # an error, if any, before anything is measured
    return checkpoint


def _own_init(config: RunConfig, own: OwnInit) -> tuple[RunConfig, str]:
    """The config with the checkpoint's init, and where that comes from; what the user gave is kept."""
    given = {key: value for key, value in asdict(config.init).items() if value is not None}
    del given["rule"]
    if "std" in given and own.config.std is None:
        raise ConfigError(
            f"init.std={given['std']:g}: the checkpoint's init is {own.config.rule}, which has no std; "
            "init= picks another"
        )
    origin = f"the checkpoint's own init: {own.origin}"
    if own.guess:
        origin = f"the init beside the checkpoint is a guess: {own.origin}; init= picks another"
    asked = "".join(f", {key} {value:g} as asked" for key, value in given.items())
    return replace(config, init=replace(own.config, **given)), origin + asked


def _cheaper(config: RunConfig, tokens: int) -> tuple[RunConfig, str]:
    """The config with the cheaper engine in place of auto, and why it is that one."""
    from simlab.budget.cost import choose

    device = config.device.partition(":")[0]
    engine, times = choose(config.shape, tokens, config.gradients, device)
    size = f"{times:.1f}" if times < 10 else f"{times:.0f}"
    other = "weightless" if engine == "dense" else "dense"
    said = "as cheap as" if size == "1.0" else f"{size}× cheaper than"
    return replace(config, engine=engine), f"auto: by estimate {said} {other}"
