"""Which mistakes show in the curve, and which in parity: python scripts/mutation_table.py [NAME …].

A markdown row for each mutation of the catalogue (all, or those named): the statistic and step in
which the curves of other seeds depart most from the right ones, by how many standard errors, the
chance limit for as many comparisons, and whether the mistaken model departs from transformers'.
"""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
import torch
from mutations import MUTATIONS, SETTINGS, Mutation, applied

from simlab import RunConfig, build_model, compose
from simlab.engine import measure_curves
from simlab.experiment import measure, prepare
from simlab.statistics import STATISTICS
from simlab.weights.checkpoint import Checkpoint

SEEDS = 32
FALSE_ALARMS = 1e-3  # of one comparison of two samples, all of their numbers together
ROUNDING = 1e-6  # relative: what another order of float32's operations may change
KEYS = ["block", "kind"]
OF_A_STATE = ["norm", "mean_square", "mean", "mean_abs", "max_abs"]  # what parity compares


@cache
def config_of(setting: str) -> RunConfig:
    """One of SETTINGS, checked."""
    return compose(SETTINGS[setting])


def curves(setting: str, seeds: Sequence[int], mutation: Mutation | None = None) -> pd.DataFrame:
    """The rows of curve.csv for these random inits, all with the same tokens."""
    config = replace(config_of(setting), seeds=tuple(seeds))
    torch.manual_seed(0)  # simlab has no use for it, but a forgotten dropout has
    with applied(mutation):
        return measure(prepare(config)).curve


@cache
def right(setting: str, first: int = 0) -> pd.DataFrame:
    """The curves without a mistake."""
    return curves(setting, range(first, first + SEEDS))


def samples(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows (block, kind, statistic), a column per seed: ln |v|, and v itself where signs vary.

    Both of these: RMSNorm's mean over width is 0 on average, and LayerNorm's is 0.
    """
    last = frame.columns.get_loc("law_additive")
    assert isinstance(last, int)
    names = [
        n for n in frame.columns[:last] if n not in ("curve", "seed", "sublayer", "massive", *KEYS)
    ]
    names += [n for n in frame.columns if n.startswith("gradient_")]
    long = frame.melt([*KEYS, "seed"], names, "statistic", "value").dropna(subset="value")
    long["block"] = long["block"].fillna(-1).astype(int)
    wide = long.pivot(index=[*KEYS, "statistic"], columns="seed", values="value")
    signed = wide[(wide < 0).any(axis=1)]
    logs = wide.abs().clip(lower=1e-30).apply(np.log)
    return pd.concat([logs, signed], keys=["ln", ""])


@dataclass(frozen=True)
class Departure:
    """The largest |t| of a comparison, where it is, and what chance alone passes once in 1000."""

    t: float
    limit: float
    statistic: str
    where: str

    @property
    def shows(self) -> bool:
        """Whether it is more than chance."""
        return self.t > self.limit


def departure(ours: pd.DataFrame, theirs: pd.DataFrame) -> Departure:
    """Welch's t of every statistic at every step. A step that only one of them has: infinite."""
    a, b = samples(ours), samples(theirs)
    both = a.index.intersection(b.index)
    steps = [set(frame.droplevel([0, 3]).index) for frame in (a, b)]
    if steps[0] != steps[1]:
        odd = min(steps[0] ^ steps[1])
        return Departure(np.inf, 0.0, "a row that isn't there", f"{odd[1]} {odd[0]}")
    x, y = a.loc[both].to_numpy(), b.loc[both].to_numpy()
    error = np.sqrt(x.var(1, ddof=1) / x.shape[1] + y.var(1, ddof=1) / y.shape[1])
    t = np.abs(x.mean(1) - y.mean(1)) / np.hypot(error, ROUNDING)
    t = np.where(np.isnan(t), np.inf, t)  # a number that some seeds haven't
    worst = int(t.argmax())
    log, block, kind, statistic = both[worst]
    return Departure(
        float(t[worst]), limit(len(t), x.shape[1]), f"{log} {statistic}".strip(), f"{kind} {block}"
    )


def limit(comparisons: int, seeds: int) -> float:
    """Bonferroni's bound on |t|: Student's quantile, expanded about the normal's."""
    z = NormalDist().inv_cdf(1 - FALSE_ALARMS / (2 * comparisons))
    n = 2 * seeds - 2
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)


def in_law(mutation: Mutation) -> Departure:
    """How far the mistaken curves of other seeds are from the right ones."""
    seeds = range(100, 100 + SEEDS)
    return departure(right(mutation.setting), curves(mutation.setting, seeds, mutation))


@cache
def reference(kv_heads: int) -> tuple[Path, torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """A tiny OLMo-2 by transformers: its folder, tokens, state after every sublayer, and logits."""
    tests = Path(__file__).parents[1] / "tests"
    sys.path[:0] = [str(tests), str(tests / "weights")]
    from conftest import write_olmo
    from test_checkpoint_parity import sublayer_states

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    rope = {"rope_type": "default", "rope_theta": 1234.5}  # nothing at a default
    model = write_olmo(folder, num_key_value_heads=kv_heads, rope_parameters=rope)
    ids = torch.randint(61, (2, 23), generator=torch.Generator().manual_seed(0))
    return folder, ids, *sublayer_states(model, ids)


def parity(mutation: Mutation | None) -> bool:
    """Whether simlab with this mistake departs from transformers: a state's statistics, or logits."""
    grouped = mutation is None or mutation.setting != "ungrouped"
    folder, ids, states, logits = reference(2 if grouped else 6)
    from conftest import PARITY, assert_parity

    close: dict[str, Any] = PARITY
    with applied(mutation), torch.no_grad():
        config = compose(["source=checkpoint", f"source.path={folder}", "device=cpu"])
        ours = build_model(config)(ids)
        (curve,) = measure_curves(Checkpoint(str(folder)), ids, torch.device("cpu"), torch.float32)
    names = list(STATISTICS)
    found = torch.stack([row.values for row in curve.rows])[:, [names.index(n) for n in OF_A_STATE]]
    expected = torch.tensor([of_a_state(state.double()) for state in states], dtype=found.dtype)
    try:
        assert_parity(ours, logits)
        torch.testing.assert_close(found, expected, **close)
    except AssertionError:
        return True
    return False


def of_a_state(x: torch.Tensor) -> list[float]:
    """OF_A_STATE, by the book."""
    numbers = x.norm(dim=-1).mean(), x.pow(2).mean(), x.mean(), x.abs().mean(), x.abs().max()
    return [number.item() for number in numbers]


def main(names: Sequence[str]) -> None:
    """Print the table."""
    torch.set_num_threads(1)  # matrices this small are quicker so
    print("| mutation | mistake | statistic | step | t | limit | law | parity |")
    print("|---|---|---|---|---|---|---|---|")
    for mutation in MUTATIONS:
        if names and mutation.name not in names:
            continue
        found = in_law(mutation)
        marks = ["yes" if mark else "no" for mark in (found.shows, parity(mutation))]
        odd = "" if found.shows == mutation.shifts else " (!)"
        print(
            f"| {mutation.name} | {mutation.mistake} | {found.statistic} | {found.where} "
            f"| {found.t:.1f} | {found.limit:.1f} | {marks[0]}{odd} | {marks[1]} |",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
