"""A sweep's jobs, composed and checked before the first of them starts.

Hydra composes a job in some 40 ms, twice. Here what doesn't change from job to job is composed once
for every combination of groups, by Hydra, and a job's own values are then set as Hydra sets them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from simlab.config import ConfigError, RunConfig
from simlab.config.validate import read, refuse_empty_choices

# curve.csv has a column ``norm``, the mean over tokens of ‖x‖, and ``seed``, each curve's own.
TAKEN = {"norm": "norm_placement", "seed": "first_seed"}
MOST_JOBS = 10_000
STORED = ("source=checkpoint", "source=demo")
SHAPE = ("model", "norm", "depth", "width", "heads", "kv_heads", "d_ff", "vocab_size")


@dataclass(frozen=True)
class Job:
    """One job of a sweep: its number, its overrides, and the config that they compose to."""

    number: int
    overrides: tuple[str, ...]
    values: Mapping[str, Any]  # of the swept keys
    composed: Mapping[str, Any]  # plain: OmegaConf's take 20 times the memory, of hundreds of jobs
    config: RunConfig


@dataclass(frozen=True)
class SweepPlan:
    """A sweep: its jobs, and the keys that it goes over, as the columns of its tables name them."""

    jobs: tuple[Job, ...]
    swept: Mapping[str, tuple[Any, ...]]


class Composer:
    """Composes jobs' configs, by Hydra's own rules, without ``hydra`` in them."""

    def __init__(self, loader: ConfigLoaderImpl, name: str, hydra_overrides: Sequence[str]) -> None:
        self.loader, self.name, self.hydra_overrides = loader, name, list(hydra_overrides)
        self.parser = OverridesParser.create(config_loader=loader)
        self.parsed: dict[str, Override] = {}
        self.bases: dict[tuple[str, ...], Any] = {}

    def parse(self, text: str) -> Override:
        """An override, parsed; Hydra's parser takes a millisecond, so once."""
        if text not in self.parsed:
            self.parsed[text] = self.parser.parse_override(text)
        return self.parsed[text]

    def is_group(self, override: Override) -> bool:
        """True if an override picks a file in conf/, rather than setting a value."""
        exists = self.loader.repository.group_exists(override.key_or_group)
        return bool(exists) and not isinstance(override.value(), dict)

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """The config of these overrides."""
        parsed = [self.parse(text) for text in overrides]
        groups = tuple(str(o.input_line) for o in parsed if self.is_group(o))
        if groups not in self.bases:
            base = self.loader.load_configuration(
                self.name, [*self.hydra_overrides, *groups], RunMode.RUN
            )
            ours = OmegaConf.masked_copy(base, [str(key) for key in base if key != "hydra"])
            self.bases[groups] = OmegaConf.to_container(ours)
        config = OmegaConf.create(self.bases[groups])
        OmegaConf.set_struct(config, True)
        self.loader._apply_overrides_to_config([o for o in parsed if not self.is_group(o)], config)
        assert isinstance(config, DictConfig)
        return config


def plan_sweep(
    loader: ConfigLoaderImpl, name: str, hydra_overrides: Sequence[str], overrides: Sequence[str]
) -> SweepPlan:
    """Every job of a sweep, as Hydra's basic sweeper numbers them: the last key varies fastest.

    name: of the primary config. overrides: with the swept values in them; of a key that is given
    twice the last one holds. Raises ConfigError, and what Hydra raises for an override.
    """
    composer = Composer(loader, name, hydra_overrides)
    parsed = composer.parser.parse_overrides(list(overrides))
    last = {o.get_key_element(): o for o in parsed}
    axes = {}
    count = 1
    for key, override in last.items():
        if override.is_sweep_override():
            axis = itertools.islice(override.sweep_string_iterator(), MOST_JOBS + 1)
            axes[key] = [f"{key}={value}" for value in axis]
            if not axes[key]:
                raise ConfigError(f"{override.input_line}: stands for no value at all")
            count *= len(axes[key])
    if count > MOST_JOBS:
        raise ConfigError(f"{' '.join(overrides)}: {count} jobs or more; at most {MOST_JOBS}")
    (combinations,) = BasicSweeper.split_arguments(list(last.values()), None)
    jobs = []
    for number, chosen in enumerate(combinations):
        refuse_empty_choices(chosen)
        composed = composer.compose(chosen)
        of_key = dict(zip(last, chosen, strict=True))
        values = {column(key): _value(composer, composed, of_key[key]) for key in axes}
        plain = OmegaConf.to_container(composed)
        assert isinstance(plain, dict)
        named = {str(key): value for key, value in plain.items()}
        jobs.append(Job(number, tuple(chosen), values, named, read(composed)))
    names = [column(key) for key in axes]
    swept = {column: tuple(dict.fromkeys(job.values[column] for job in jobs)) for column in names}
    return SweepPlan(tuple(jobs), swept)


def plan_experiment(
    loader: ConfigLoaderImpl,
    name: str,
    hydra_overrides: Sequence[str],
    params: Sequence[str],
    overrides: Sequence[str],
) -> SweepPlan:
    """The jobs of ``plan_sweep``, or random inits' and then checkpoints', where both are asked for.

    params: an experiment's swept keys; overrides: the command line's. An experiment that sweeps what a
    checkpoint decides itself (model, norm) keeps its jobs, of random inits; the command line's stored
    source makes jobs of its own, in which such a key is ``from_checkpoint``.
    """
    keys = {text: text.split("=", 1)[0].lstrip("+~") for text in (*params, *overrides)}
    stored = any(text in STORED for text in overrides)
    if not stored or not any(_decided(keys[text]) for text in params):
        return plan_sweep(loader, name, hydra_overrides, [*params, *overrides])
    drawn = [text for text in overrides if keys[text].split(".")[0] != "source"]
    both = [text for text in (*params, *overrides) if not _decided(keys[text])]
    random = plan_sweep(loader, name, hydra_overrides, [*params, *drawn])
    trained = plan_sweep(loader, name, hydra_overrides, both)
    swept: dict[str, list[Any]] = {}
    jobs: list[Job] = []
    for each in (*random.jobs, *trained.jobs):
        columns = dict.fromkeys([*random.swept, *trained.swept])
        missing = {c: "from_checkpoint" if c in ("model", TAKEN["norm"]) else None for c in columns}
        jobs.append(replace(each, number=len(jobs), values=missing | dict(each.values)))
        for key, value in jobs[-1].values.items():
            swept.setdefault(key, []).append(value)
    return SweepPlan(tuple(jobs), {key: tuple(dict.fromkeys(v)) for key, v in swept.items()})


def _decided(key: str) -> bool:
    """True for a key of a model's shape, which a checkpoint's own config decides."""
    return key.split(".")[0] in SHAPE


def column(key: str) -> str:
    """The name of a swept key's column in the sweep's tables."""
    bare = key.lstrip("+~")
    return TAKEN.get(bare, bare)


def _value(composer: Composer, composed: DictConfig, text: str) -> Any:
    """A swept value as a table holds it: a number, a truth value or a text."""
    override = composer.parse(text)
    if composer.is_group(override):
        return str(override.value())
    value = OmegaConf.select(composed, override.key_or_group)
    if value is None or isinstance(value, bool | int | float):
        return value
    if OmegaConf.is_config(value):
        return str(OmegaConf.to_container(value)).replace("'", "")
    return str(value)
