"""How often the gates are false alarms: python scripts/false_alarms.py [RUNS].

A pool of random inits of one small model is dealt into pairs of groups of the gate's sizes, which
differ by chance alone; the share of alarms is printed for several alphas beside its 95 % upper bound
(Clopper and Pearson). The power is printed too: how often a std that is a few per cent off is seen.
Then the law's gate, on a tenth as many groups of random inits, for which the law holds, and theory's,
on a two hundredth as many groups of every placement, with gradients.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.stats import beta

from simlab import compose
from simlab.analysis.curve import curves_of
from simlab.analysis.resampling import limit, permuted
from simlab.analysis.verdict import ROUNDING, judge
from simlab.experiment import prepare, run
from simlab.experiment.theory import predicted
from simlab.regress.gates import QUANTITIES, stack
from simlab.regress.law_gate import LAW_GATE_SEEDS, passes
from simlab.regress.theory_gate import THEORY_GATE_SEEDS, against_chance, checks
from simlab.schemes.placement import PLACEMENTS
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
    """Clopper and Pearson's upper bound of the rate of alarms: 95 % one-sided."""
    return float(beta.ppf(0.95, alarms + 1, runs - alarms))


def stacked(frames: list[pd.DataFrame]) -> tuple[Array, Array]:
    """Curves as the gate compares them, (S, C), and what rounding explains, (C,)."""
    frame = pd.concat(frames)
    values, _, floor, _ = stack(frame, frame, QUANTITIES, ROUNDING["float32"])
    return values, floor


def law_alarms(runs: int, depth: int) -> int:
    """The number of groups that fail the law's gate, of ``runs`` groups of inits that obey the law."""
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


def theory_alarms(placement: str, runs: int) -> dict[tuple[int, float], int] | None:
    """The number of false alarms of the theory gate in ``runs`` groups, by their seeds and alpha.

    None where theory has no prediction of the whole curve.
    """
    given = [
        *MODEL, f"norm={placement}", "width=128", "inputs=zipf", "inputs.batch=2", "gradients=true",
        f"seeds={POOL // 8}",
    ]  # fmt: skip
    config = compose(given)
    prediction = predicted(prepare(config))
    if prediction.ends:
        return None
    pooled = [rows for _, rows in run(config).curve.groupby("seed")]
    generator = np.random.default_rng(3)
    alarms = {(seeds, alpha): 0 for seeds in (THEORY_GATE_SEEDS, 16) for alpha in ALPHAS}
    for seeds in (THEORY_GATE_SEEDS, 16):
        for _ in range(runs):
            picked = generator.choice(len(pooled), seeds, replace=False)
            every = checks(pd.concat([pooled[i] for i in picked]), prediction, "float32")
            for alpha in ALPHAS:
                largest, most = against_chance(every, alpha)
                alarms[seeds, alpha] += largest > most
    return alarms


def main() -> None:
    """Draw the pool, deal it, and count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="?", type=int, default=20_000)
    runs = parser.parse_args().runs
    pooled, floor = stacked(pool(range(POOL)))
    generator = np.random.default_rng(1)
    alarms = dict.fromkeys(ALPHAS, 0)
    reported = time.perf_counter()
    for done in range(1, runs + 1):
        picked = generator.choice(POOL, 2 * RECORDED, replace=False)
        t, maxima = permuted(pooled[picked[:RECORDED]], pooled[picked[RECORDED:]], floor, DEALS)
        for alpha in ALPHAS:
            alarms[alpha] += bool(t.max() > limit(maxima, alpha))
        if time.perf_counter() - reported > 30:
            reported = time.perf_counter()
            print(f"{done} of {runs}: {alarms}", file=sys.stderr)
    for alpha, count in alarms.items():
        print(
            f"alpha {alpha:g}: {count} false alarms in {runs} runs, {count / runs:.2g}"
            f" (at most {upper(count, runs):.2g} with 95 %)"
        )
    for off in (1.01, 1.02, 1.05, 1.1):
        wrong, _ = stacked(pool(range(POOL, POOL + 200), f"init.std={0.05 * off}"))
        alarmed = 0
        for _ in range(200):
            old = pooled[generator.choice(POOL, RECORDED, replace=False)]
            new = wrong[generator.choice(len(wrong), RECORDED, replace=False)]
            t, maxima = permuted(old, new, floor, DEALS)
            alarmed += bool(t.max() > limit(maxima, 0.001))
        print(f"a std {100 * (off - 1):.0f} % too large is seen in {alarmed / 2:.0f} % of runs")
    for depth in (8, 32):
        failed, groups = law_alarms(runs // 10, depth), runs // 10
        print(f"law, depth {depth}: {failed} false alarms in {groups} groups", end=" ")
        print(f"(at most {upper(failed, groups):.2g} with 95 %)")
    total = dict.fromkeys(((n, a) for n in (THEORY_GATE_SEEDS, 16) for a in ALPHAS), 0)
    held = []
    for placement in PLACEMENTS:
        found = theory_alarms(placement, runs // 200)
        if found:
            held.append(placement)
            for key, count in found.items():
                total[key] += count
    groups = len(held) * (runs // 200)
    print(f"theory, {len(held)} placements ({', '.join(held)}):")
    for (seeds, alpha), count in total.items():
        print(f"  {seeds} seeds, alpha {alpha:g}: {count} false alarms in {groups} groups", end=" ")
        print(f"(at most {upper(count, groups):.2g} with 95 %)")


if __name__ == "__main__":
    main()
