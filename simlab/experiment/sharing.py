"""Sweep jobs that share work: of those that differ in depth alone, only the deepest is measured.

The others' curves are the first rows of its curves, the same bytes as if each job were measured alone,
where the deep model begins with the shallow one's layers (``weights.prefix.begins``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from simlab.config import RunConfig
from simlab.experiment.prepare import Prepared

if TYPE_CHECKING:
    from simlab.experiment.batches import MeasuredCurves


def sharing_groups(configs: Sequence[RunConfig]) -> list[list[int]]:
    """The jobs' numbers in groups that differ in depth alone, the deepest job of each group first."""
    groups: dict[RunConfig, list[int]] = {}
    for number, config in enumerate(configs):
        groups.setdefault(without_depth(config), []).append(number)

    def deepest_first(number: int) -> int:
        model = configs[number].model
        return -model.depth if model else 0

    return [sorted(group, key=deepest_first) for group in groups.values()]


def without_depth(config: RunConfig) -> RunConfig:
    """A copy of the config in which the depth, and all that follows from it, is blanked."""
    if config.model is None:
        return config
    return replace(config, model=replace(config.model, name="", depth=0, full_attention=()))


class SharedCurves:
    """``measured_curves`` for the jobs of one group, called for one job after another.

    It keeps what it has measured; ``on_block`` isn't called for a job whose curves are known from that.
    """

    def __init__(self) -> None:
        self.measured: list[tuple[Prepared, MeasuredCurves]] = []

    def __call__(
        self, ready: Prepared, on_block: Callable[[], None] = lambda: None
    ) -> MeasuredCurves:
        """The job's curves: the first rows of a deeper job's, or measured."""
        for deep, curves in self.measured:
            if is_prefix(ready, deep):
                depth = ready.config.shape.depth
                return [(name, seed, curve.first(depth)) for name, seed, curve in curves]
        from simlab.experiment.batches import measured_curves  # late: it needs torch

        curves = measured_curves(ready, on_block)
        self.measured.append((ready, curves))
        return curves


def is_prefix(shallow: Prepared, deep: Prepared) -> bool:
    """True if the curves of ``shallow`` are, to the last bit, the first rows of those of ``deep``.

    True for random inits that differ in depth alone and begin with the same layers, measured on as many
    threads. Gradients come from a model's end, so they are never shared.
    """
    from simlab.weights.prefix import begins

    one, other = shallow.config, deep.config
    return (
        not (one.source.stored or one.gradients)
        and without_depth(one) == without_depth(other)
        and np.array_equal(shallow.tokens, deep.tokens)
        and begins(one.shape, other.shape, one.init)
        and _threads(one) == _threads(other)
    )


def _threads(config: RunConfig) -> list[int]:
    import torch

    from simlab.budget.cost import curves_to_measure

    return [cost.computing for cost in curves_to_measure(config, torch.get_num_threads())]
