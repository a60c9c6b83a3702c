"""The curves of a ready run, measured on its device: the checkpoint, then the seeds in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from simlab.budget.cost import curves_to_measure as costs_of
from simlab.config import FamilyConfig
from simlab.experiment.prepare import Prepared
from simlab.measurement.engine import Measured, measure_curves
from simlab.weights.base import Weights
from simlab.weights.dense import RandomWeights
from simlab.weights.weightless import GaussianWeights

MeasuredCurves = list[tuple[str, int, Measured]]  # name, seed, rows
ENGINE_WEIGHTS = {"dense": RandomWeights, "weightless": GaussianWeights}  # of random inits


def measured_curves(ready: Prepared, on_block: Callable[[], None] = lambda: None) -> MeasuredCurves:
    """Every curve of a run, the checkpoint's first. ``on_block`` is called after each block.

    Weightless seeds are measured several at a time, as one batch (``weights.weightless.together``).
    """
    if isinstance(ready.config.shape, FamilyConfig):
        # Late: a random run reads no checkpoint, and their readers take a tenth of its imports.
        from simlab.checkpoints.families.checkpoint import FamilyCheckpoint
        from simlab.experiment.families import family_curves

        assert isinstance(ready.checkpoint, FamilyCheckpoint)
        return family_curves(ready, ready.checkpoint, on_block)
    config, dtype = ready.config, getattr(torch, ready.config.dtype)
    ids, device = torch.from_numpy(ready.tokens), torch.device(config.device)

    def measured(weights: Weights) -> list[Measured]:
        return measure_curves(weights, ids, device, dtype, config.gradients, on_block)

    curves: MeasuredCurves = []
    if isinstance(ready.checkpoint, Weights):
        curves += [("checkpoint", config.seed, curve) for curve in measured(ready.checkpoint)]
    if config.seeds and config.engine != "theory":
        cost = costs_of(config, torch.get_num_threads())[-1]
        with threads(cost.computing):
            for start in range(0, len(config.seeds), cost.batch_seeds):
                seeds = config.seeds[start : start + cost.batch_seeds]
                weights = ENGINE_WEIGHTS[config.engine](
                    config.shape, config.init, *seeds, drawing=cost.drawing
                )
                curves += [
                    ("random", seed, curve)
                    for seed, curve in zip(seeds, measured(weights), strict=True)
                ]
    return curves


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
