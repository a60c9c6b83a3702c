"""How often the gates are false alarms: python scripts/false_alarms.py [RUNS].

A pool of random inits of one small model is dealt into pairs of groups of the gate's sizes, which
differ by chance alone; the share of alarms is printed for several alphas beside its 95 % upper bound
(Clopper and Pearson). The power is printed too: how often a std that is a few per cent off is seen.
Then the law's gate, on a tenth as many groups of random inits, for which the law holds.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd

from simlab import compose
from simlab.analysis.curve import curves_of
from simlab.analysis.resampling import limit, permuted
from simlab.analysis.verdict import ROUNDING, judge
from simlab.experiment import run
from simlab.regress.gates import QUANTITIES, stack
from simlab.regress.law_gate import LAW_GATE_SEEDS, passes
from simlab.theory.laws import Array

RECORDED = 10  # seeds of simlab's own cases, and as many others
POOL = 2000
DEALS = 4096  # random ones: exact for any number of them, only the power is less
MODEL = [
    "model=small", "depth=4", "width=64", "heads=4", "kv_heads=2", "d_ff=128", "vocab_size=256",
    "inputs.batch=1", "inputs.length=16", "device=cpu", "engine=weightless", "init.std=0.05",
]  # fmt: skip
ALPHAS = (0.05, 0.01, 0.001)


def pool(seeds: range, *overrides: str) -> list[pd.DataFrame]:
    """A frame per random init."""
    frame = run(compose([*MODEL, f"seeds=[{','.join(map(str, seeds))}]", *overrides])).curve
    return [rows for _, rows in frame.groupby("seed")]


def upper(alarms: int, runs: int) -> float:
    """The rate that gives so few alarms with probability 5 %, by bisection on the binomial."""
    low, high = alarms / runs, 1.0
    log_choose = np.cumsum(
        np.log(np.arange(runs, runs - alarms, -1)) - np.log(np.arange(1, alarms + 1))
    )
    for _ in range(60):
        p = (low + high) / 2
        k = np.arange(1, alarms + 1)
        terms = np.concatenate([[0.0], log_choose]) if alarms else np.zeros(1)
        chance = np.exp(
            terms + np.concatenate([[0], k]) * np.log(p)
            + (runs - np.concatenate([[0], k])) * np.log1p(-p)
        ).sum()  # fmt: skip
        low, high = (p, high) if chance > 0.05 else (low, p)
    return low


def stacked(frames: list[pd.DataFrame]) -> tuple[Array, Array]:
    """Curves as the gate compares them, (S, C), and what rounding explains, (C,)."""
    frame = pd.concat(frames)
    values, _, floor, _ = stack(frame, frame, QUANTITIES, ROUNDING["float32"])
    return values, floor


def law_alarms(runs: int, depth: int) -> int:
    """Of so many groups of random inits that obey the law, how many fail its gate."""
    config = compose([*MODEL, f"depth={depth}", "init.std=0.1", f"seeds={POOL // 2}"])
    rows = 1 + 2 * depth
    every = curves_of(run(config).curve, "random", gain=[1.0] * rows, normalises=["branch"] * rows)
    generator, alarms = np.random.default_rng(2), 0
    for _ in range(runs):
        picked = generator.choice(every.count, LAW_GATE_SEEDS, replace=False)
        group = replace(
            every, mean_square=every.mean_square[picked], eps_factor=every.eps_factor[picked]
        )
        alarms += not passes(judge(group, "float32"))
    return alarms


def main() -> None:
    """Draw the pool, deal it, and count."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    pooled, floor = stacked(pool(range(POOL)))
    generator = np.random.default_rng(1)
    alarms = dict.fromkeys(ALPHAS, 0)
    said = time.perf_counter()
    for done in range(1, runs + 1):
        picked = generator.choice(POOL, 2 * RECORDED, replace=False)
        t, maxima = permuted(pooled[picked[:RECORDED]], pooled[picked[RECORDED:]], floor, DEALS)
        for alpha in ALPHAS:
            alarms[alpha] += bool(t.max() > limit(maxima, alpha))
        if time.perf_counter() - said > 30:
            said = time.perf_counter()
            print(f"{done} of {runs}: {alarms}", file=sys.stderr)
    for alpha, count in alarms.items():
        print(
            f"alpha {alpha:g}: {count} false alarms in {runs} runs, {count / runs:.2g}"
            f" (at most {upper(count, runs):.2g} with 95 %)"
        )
    for off in (1.01, 1.02, 1.05, 1.1):
        wrong, _ = stacked(pool(range(POOL, POOL + 200), f"init.std={0.05 * off}"))
        seen = 0
        for _ in range(200):
            old = pooled[generator.choice(POOL, RECORDED, replace=False)]
            new = wrong[generator.choice(len(wrong), RECORDED, replace=False)]
            t, maxima = permuted(old, new, floor, DEALS)
            seen += bool(t.max() > limit(maxima, 0.001))
        print(f"a std {100 * (off - 1):.0f} % too large is seen in {seen / 2:.0f} % of runs")
    for depth in (8, 32):
        found, groups = law_alarms(runs // 10, depth), runs // 10
        print(f"law, depth {depth}: {found} false alarms in {groups} groups", end=" ")
        print(f"(at most {upper(found, groups):.2g} with 95 %)")


if __name__ == "__main__":
    main()
