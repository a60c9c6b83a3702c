"""Which jobs of a sweep are measured together, in one process.

Jobs that differ in depth alone have the same layers as far as the shallow one goes: the deepest is
measured, and gives the others its first rows (``weights.layers``). Weightless jobs that differ in their
seeds fill batches together, and those that differ in their init draw the same normals, once. Each gets
the bytes that it gets alone: no number on the way knows what lies beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from simlab.config import ConfigError, InitConfig, RunConfig
from simlab.cost import costs
from simlab.experiment import Curves, Prepared, division, measured_together, pieces, prepare
from simlab.memory import needed
from simlab.resources import available
from simlab.weights.gaussian import lies_alone, small
from simlab.weights.layers import begins

# What an interrupt loses of a sweep at most: float32 operations, some half a minute on two cores; and
# curves, whose rows are held meanwhile.
OPERATIONS, CURVES = 1e12, 64
Seeds = tuple[int, tuple[int, ...]]  # of the tokens, and of the inits


def companies(configs: Sequence[RunConfig]) -> list[list[int]]:
    """Jobs in groups that may be company, each the deepest first; every job's number is in one.

    A group is whole: its depths' inits are all to be measured with the same seeds.
    """
    families: dict[object, list[int]] = {}
    for number, config in enumerate(configs):
        families.setdefault(config.family, []).append(number)
    return [group for family in families.values() for group in _groups(configs, family)]


def _groups(configs: Sequence[RunConfig], family: list[int]) -> list[list[int]]:
    """A family's jobs by init and by seeds: of inits that are to have the same, so many at a time."""
    by_init: dict[InitConfig, dict[Seeds, list[int]]] = {}
    for number in family:
        config = configs[number]
        by_seeds = by_init.setdefault(config.init, {})
        by_seeds.setdefault((config.seed, config.seeds), []).append(number)
    alike: dict[object, list[InitConfig]] = {}
    for init, by_seeds in by_init.items():
        wanted = frozenset(
            (seeds, max(_depth(configs[n]) for n in numbers)) for seeds, numbers in by_seeds.items()
        )
        alike.setdefault(wanted, []).append(init)
    found = []
    most = _most(max((configs[n] for n in family), key=_depth))
    for inits in alike.values():
        seeds = list(by_init[inits[0]])
        largest = max(len(many) for _, many in seeds) or 1  # a job's seeds stay together
        for some in pieces(inits, max(1, most // largest)):
            for several in pieces(seeds, max(1, most // (largest * len(some)))):
                group = [n for key in several for init in some for n in by_init[init][key]]
                found.append(sorted(group, key=lambda n: (-_depth(configs[n]), n)))
    return found


def _depth(config: RunConfig) -> int:
    return config.model.depth if config.model else 0


def _most(config: RunConfig) -> int:
    """Curves of a group."""
    if config.model is None:
        return 1
    tokens = (config.inputs.batch or 1) * (config.inputs.length or 1)
    return min(
        CURVES, int(OPERATIONS / costs(config.model, tokens, False)["weightless"].operations)
    )


class Company:
    """``measured_curves`` for one job after another; those of a group are measured as one.

    Of the group it remembers every curve until the next. prepare: as ``experiment.prepare``.
    """

    def __init__(self, prepare: Callable[..., Prepared] = prepare) -> None:
        self.prepare = prepare
        self.next([])

    def next(self, group: Sequence[RunConfig]) -> None:
        """The jobs that now come, the deepest first."""
        self.group = group
        self.ready: list[Prepared] | None = None
        self.found: dict[RunConfig, Curves] = {}

    def __call__(self, ready: Prepared, on_block: Callable[[], None] = lambda: None) -> Curves:
        """As ``measured_curves``; ``on_block`` isn't called for what is remembered."""
        if ready.config not in self.found:
            runs = self.with_others(ready)
            curves = measured_together(runs, on_block)
            self.found |= dict(zip((run.config for run in runs), curves, strict=True))
        return self.found[ready.config]

    def with_others(self, ready: Prepared) -> list[Prepared]:
        """A job and those of its group that are measured with it."""
        if self.ready is None:
            self.ready = []
            for config in self.group:
                with suppress(ConfigError):  # it'll say so when its turn comes
                    self.ready.append(self.prepare(config, device=ready.device))
        known = {*self.found, ready.config}
        others = [other for other in self.ready if other.config not in known]
        for alike in (goes_with, is_prefix):
            runs = [ready, *(other for other in others if alike(other, ready))]
            if fits(runs):
                return runs
        return [ready]


def fits(runs: Sequence[Prepared]) -> bool:
    """Whether there is the memory to measure these together."""
    curves = {(run.config.init, pair) for run in runs for pair in run.pairs}
    config = replace(runs[0].config, seeds=tuple(range(len(curves))))
    return needed(config, torch.get_num_threads()) <= (available(config.device) or math.inf)


def is_prefix(run: Prepared, deep: Prepared) -> bool:
    """Whether the curves of ``run`` are, to the last bit, the first rows of those of ``deep``.

    Of random inits: everything but the depth is the same, and so is every layer of ``run``.
    A gradient comes from the end, which is another.
    """
    return akin(run, deep) and _same(run, deep)


def goes_with(run: Prepared, deep: Prepared) -> bool:
    """Whether the curves of ``run`` are, to the last bit, the same when measured with ``deep``.

    So are those of other seeds and inits in batches that are small, computed by one thread, and where
    every curve lies as it would alone.
    """
    config, tokens = deep.config, deep.tokens.numel()
    return akin(run, deep) and (
        _same(run, deep)
        or (
            config.engine == "weightless"
            and deep.device.type == "cpu"
            and division(deep, 1).compute == 1
            and small(config.shape, tokens, config.gradients)
            and lies_alone(config.shape, tokens, getattr(torch, config.dtype).itemsize)
        )
    )


def akin(run: Prepared, deep: Prepared) -> bool:
    """Whether runs differ in nothing but seeds, inits and depth, and ``deep`` begins as ``run``."""
    one, other = run.config, deep.config
    return (
        not (one.source.stored or one.gradients)
        and one.family == other.family
        and run.tokens.shape == deep.tokens.shape
        and begins(one.shape, other.shape, one.init)
    )


def _same(run: Prepared, deep: Prepared) -> bool:
    one, other = run.config, deep.config
    return (one.init, run.pairs) == (other.init, deep.pairs) and division(
        run, len(one.seeds)
    ) == division(deep, len(other.seeds))
