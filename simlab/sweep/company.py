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

from simlab.budget.cost import costs
from simlab.budget.machine import available
from simlab.budget.memory import needed
from simlab.config import ConfigError, InitConfig, RunConfig
from simlab.experiment import Curves, Prepared, division, measured_together, pieces, prepare
from simlab.inputs import TEXT_BATCH, TEXT_LENGTH
from simlab.weights.prefix import begins
from simlab.weights.weightless import lies_alone, small

# Of a group, if it isn't a single job: float32 operations, some half a minute on two cores, which an
# interrupt loses; and curves, whose rows are held meanwhile.
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
        by_depth: dict[int, list[Seeds]] = {}
        for seeds, numbers in by_init[inits[0]].items():
            by_depth.setdefault(max(_depth(configs[n]) for n in numbers), []).append(seeds)
        for keys in by_depth.values():
            largest = max(len(many) for _, many in keys) or 1  # a job's seeds stay together
            for some in pieces(inits, max(1, most // largest)):
                for several in pieces(keys, max(1, most // (largest * len(some)))):
                    group = [n for key in several for init in some for n in by_init[init][key]]
                    found.append(sorted(group, key=lambda n: (-_depth(configs[n]), n)))
    return found


def _depth(config: RunConfig) -> int:
    return config.model.depth if config.model else 0


def _most(config: RunConfig) -> int:
    """Curves of a group."""
    if config.model is None:
        return 1
    tokens = (config.inputs.batch or TEXT_BATCH) * (config.inputs.length or TEXT_LENGTH)
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
        self.group = list(group)
        self.ready: list[Prepared] | None = None
        self.found: dict[object, Curves] = {}

    def __call__(self, ready: Prepared, on_block: Callable[[], None] = lambda: None) -> Curves:
        """As ``measured_curves``; ``on_block`` isn't called for what is remembered."""
        if _key(ready) not in self.found:
            runs, group = self.with_others(ready), self.group
            self.group = []  # after a mistake each is measured alone
            try:
                curves = measured_together(runs, on_block)
            except (MemoryError, RuntimeError):  # of others, too much memory for instance
                if len(runs) == 1:
                    raise
                runs, curves = [ready], measured_together([ready], on_block)
            else:
                self.group = group
            self.found |= dict(zip(map(_key, runs), curves, strict=True))
        return self.found[_key(ready)]

    def with_others(self, ready: Prepared) -> list[Prepared]:
        """A job and those of its group that are measured with it."""
        config = ready.config
        if len(self.group) < 2 or config.source.stored or config.gradients:
            return [ready]
        if shares(ready):
            if self.ready is None:
                self.ready = self.prepared(self.group, ready)
            others = self.ready
        else:
            seeds = config.init, config.seed, config.seeds
            alike = [one for one in self.group if (one.init, one.seed, one.seeds) == seeds]
            others = self.prepared(alike, ready)
        known = {*self.found, _key(ready)}
        others = [other for other in others if _key(other) not in known]
        for fitting in (goes_with, is_prefix):
            runs = [ready, *(other for other in others if fitting(other, ready))]
            if whole(runs) and fits(runs):
                return runs
        return [ready]

    def prepared(self, group: Sequence[RunConfig], ready: Prepared) -> list[Prepared]:
        """Those of a group that can be, for the device of one of them."""
        found = []
        for config in group:
            with suppress(ConfigError, OSError):  # it'll say so when its turn comes
                found.append(self.prepare(config, device=ready.device))
        return found


def _key(run: Prepared) -> object:
    return run.config, tuple(run.pairs)


def whole(runs: Sequence[Prepared]) -> bool:
    """Whether every init is wanted with all seeds and tokens that another is."""
    wanted = {(run.config.init, pair) for run in runs for pair in run.pairs}
    inits, pairs = zip(*wanted, strict=True)
    return len(wanted) == len(set(inits)) * len(set(pairs))


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
    """Whether the curves of ``run`` are, to the last bit, the same when measured with ``deep``."""
    return akin(run, deep) and (_same(run, deep) or shares(deep))


def shares(run: Prepared) -> bool:
    """Whether curves of other seeds and inits may be measured with a run's, and don't change them.

    Weightless ones whose batches are small, computed by one thread, and in which they lie as alone.
    """
    config, tokens = run.config, run.tokens.numel()
    return (
        config.engine == "weightless"
        and run.device.type == "cpu"
        and division(run, 1).compute == 1
        and small(config.shape, tokens, config.gradients)
        and lies_alone(config.shape, tokens, getattr(torch, config.dtype).itemsize)
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
