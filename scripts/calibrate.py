"""How often intervals and tests err: python scripts/calibrate.py PART … [--groups N].

intervals  how often the 95 % intervals of growth per sublayer, exponent p and rate r cover the truth,
           the statistic of the mean curve of all
laws       how often the sign-flip test rejects, at 1 %, the additive law where it holds

Both deal a pool of random inits of one small model, 32 N curves for each placement, into groups of 8,
16 and 32: at least N of each, independent of each other. ± is the binomial's standard error. Both parts
with 2000 groups took 13 minutes of CPU, of which 10 made the pools.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from simlab import compose
from simlab.analysis.curve import Curves
from simlab.analysis.fit import exponent, per_sublayer, rate
from simlab.analysis.resampling import jackknife
from simlab.analysis.verdict import hold
from simlab.config import InitConfig, ModelConfig
from simlab.experiment import prepare
from simlab.measurement.engine import forward
from simlab.measurement.statistics import STATISTICS
from simlab.theory.laws import Array, additive
from simlab.weights.base import Shape
from simlab.weights.rng import Normals
from simlab.weights.weightless import GaussianWeights

Statistic = Callable[[Array, Sequence[str]], Array]
SIZES = (8, 16, 32)  # curves in a group
AT_ONCE = 1000  # curves in one batch
MODEL = [
    "model=small", "depth=8", "width=64", "heads=4", "d_ff=128", "vocab_size=256", "init.std=0.05",
    "inputs.batch=1", "inputs.length=16",
]  # fmt: skip
PLACEMENTS = {
    "reordered": ["norm=reordered"],
    "pre": ["norm=pre"],
    "peri": ["norm=peri"],
    "swin_renorm": ["norm=swin_renorm", "norm.every=4"],
}


class Stream(Normals):
    """Standard normals of several curves from one generator, in the order of the calls.

    The engine seeds each curve's matrices apart, so that a seed's curve is the same in any batch; a
    pool doesn't need that, and is made three times as quickly without.
    """

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(range(count), None)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, key: str, shape: Shape, device: torch.device) -> Tensor:
        """N(0, 1) entries (float32), (curves, *shape)."""
        return torch.randn(len(self.seeds), *shape, generator=self.generator)


class Pool(GaussianWeights):
    """Weightless random inits whose normals, the embedding's too, are those of one ``Stream``."""

    def __init__(self, model: ModelConfig, init: InitConfig, count: int, seed: int) -> None:
        super().__init__(model, init, 0)
        self.curves, self.normals = count, Stream(count, seed)

    def embedded(self, ids: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """As in Weights, but for the embedding's truncation, which its std alone accounts for."""
        distinct, where = ids.unique(return_inverse=True)
        rows = self.normals("embedding.weight", (len(distinct), self.model.width), device)
        return (rows * self.std("embedding.weight"))[:, where].flatten(0, 1).to(dtype)


@cache
def pool(placement: str, count: int, overrides: tuple[str, ...]) -> Curves:
    """Curves of ``count`` random inits of the small model with this placement."""
    config = compose(
        [*MODEL, *PLACEMENTS[placement], *overrides, "seeds=1", "engine=weightless", "device=cpu"]
    )
    ids, device = torch.from_numpy(prepare(config).tokens), torch.device("cpu")
    columns = [list(STATISTICS).index(name) for name in ("mean_square", "eps_factor")]
    batches, first = [], list(PLACEMENTS).index(placement) * count  # each pool has its own numbers
    for start in range(0, count, AT_ONCE):
        weights = Pool(config.shape, config.init, min(AT_ONCE, count - start), first + start)
        rows, _ = forward(weights, ids, device, torch.float32, False, lambda: None)
        batches.append(torch.stack([row.values[:, columns] for row in rows]).numpy())
    mean_square, eps_factor = np.concatenate(batches, axis=1).transpose(2, 1, 0)
    return Curves(
        [row.kind for row in rows], mean_square, eps_factor,
        [row.gain for row in rows], [row.normalises for row in rows],
    )  # fmt: skip


def groups(pool: Curves, size: int) -> Iterator[Curves]:
    """The pool dealt into groups of ``size`` curves."""
    for start in range(0, pool.count - size + 1, size):
        own = slice(start, start + size)
        yield replace(pool, mean_square=pool.mean_square[own], eps_factor=pool.eps_factor[own])


def share(events: Sequence[bool]) -> str:
    """How many per cent of the events are True, ± the binomial's standard error."""
    rate = float(np.mean(events))
    return f"{100 * rate:.2f} ± {100 * math.sqrt(rate * (1 - rate) / len(events)):.2f}"


def cover(curves: Curves, size: int, statistic: Statistic) -> str:
    """How many of the intervals from groups of ``size`` curves cover the truth."""

    def of(v: Array) -> Array:
        return statistic(v, curves.kinds)

    truth = float(of(curves.mean_square.mean(0, keepdims=True))[0])
    found = [jackknife(group.mean_square, of) for group in groups(curves, size)]
    return share(
        [e.low is not None and e.high is not None and e.low <= truth <= e.high for e in found]
    )


def intervals(curves: Curves, size: int) -> list[str]:
    """Cells of the table: how many of growth's, p's and r's intervals cover the truth."""
    return [cover(curves, size, statistic) for statistic in (per_sublayer, exponent, rate)]


def laws(curves: Curves, size: int) -> list[str]:
    """A cell of the table: how many groups reject the additive law."""
    if not {*curves.normalises[1:]} <= {"branch", "stream"}:
        return ["no law"]
    fits = [hold(group, additive(group.rows), "float32") for group in groups(curves, size)]
    return [share([fit.status == "fails" for fit in fits])]


PARTS: dict[str, tuple[Callable[[Curves, int], list[str]], list[str]]] = {
    "intervals": (intervals, ["growth", "p", "r"]),
    "laws": (laws, ["rejected"]),
}


def main() -> None:
    """Make the pools, deal them, and print a table per part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--groups", type=int, default=2000, help="at least so many of each size")
    parser.add_argument(
        "--overrides", nargs="*", default=[], help="config overrides, after the small model's"
    )
    args = parser.parse_args()
    for part in args.parts:
        cells_of, head = PARTS[part]
        head = ["placement", "seeds", "groups", *(f"{name} (%)" for name in head)]
        print(f"\n{part}\n\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
        for placement in PLACEMENTS:
            curves = pool(placement, args.groups * max(SIZES), tuple(args.overrides))
            for size in SIZES:
                cells = [placement, f"{size}", f"{curves.count // size}", *cells_of(curves, size)]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
