"""A checkpoint beside random inits: where it leaves them, with what false alarms, and why."""

import numpy as np
import pandas as pd
import pytest
from conftest import placed, tiny

from simlab.analysis.compare import departure, massive, outside, sentences, split, with_outside
from simlab.analysis.resampling import t_quantile
from simlab.experiment import run


def table(checkpoint, seeds, kinds=None):
    """Curves as in curve.csv, of mean squares alone: branches as large as each step."""
    kinds = kinds or ["embedding", *["attention", "mlp"] * (len(checkpoint) // 2)]
    parts = []
    for name, seed, v in [
        ("checkpoint", 0, checkpoint),
        *(("random", i, s) for i, s in enumerate(seeds)),
    ]:
        v = np.asarray(v, float)
        grown = np.diff(v, prepend=np.nan)
        parts.append(
            pd.DataFrame(
                {
                    "curve": name, "seed": seed, "sublayer": range(len(v)), "kind": kinds,
                    "block": pd.array([None, *[i // 2 for i in range(len(v) - 1)]], dtype="Int64"),
                    "mean_square": v, "branch_mean_square": grown, "delta_branch": 10 * grown,
                    "delta_cross": 0.0, "max_abs": 5.0, "median_abs": 1.0, "massive": 0,
                }
            )
        )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def drawn(rng, count, rows=9):
    """Random inits: v_k = 1 + k with a few per cent of noise that rows share."""
    noise = rng.normal(0, 0.02, (count, 1)) + rng.normal(0, 0.01, (count, rows))
    return (1 + np.arange(rows)) * np.exp(noise)


def test_one_more_random_init_is_rarely_outside():
    """Nominal: below 1 % a row, since it must also be beyond all seeds."""
    rng = np.random.default_rng(0)
    away = [outside(curves[0], curves[1:]) for curves in (drawn(rng, 9) for _ in range(2000))]
    rate = np.mean(away)
    assert rate < 0.01 + 4 * np.sqrt(0.01 / 2000)
    few = [outside(curves[0], curves[1:]) for curves in (drawn(rng, 3) for _ in range(500))]
    assert np.mean(few) < 0.02


def test_band_is_prediction_interval():
    """t·s·√(1 + 1/S) of ln v with s from S − 1: with the population's std it is √(7/8) as wide."""
    logs = np.array([-3.0, -2, -1, 0, 0, 1, 2, 3])[:, None] / 100
    reach = t_quantile(0.995, 7) * np.sqrt((logs**2).sum() / 7) * np.sqrt(1 + 1 / 8)
    for size, out in ((0.97, False), (1.03, True)):
        for side in (1, -1):
            assert outside(np.exp([side * size * reach]), np.exp(logs)) == [out]


def test_outside_detects_small_excess():
    """Negative control: 15 % where the seeds' spread is 2 %."""
    rng = np.random.default_rng(1)
    seen = []
    for _ in range(200):
        curves = drawn(rng, 9)
        seen.append(outside(1.15 * curves[0], curves[1:]))
    assert np.mean(seen) > 0.95


def test_where_it_leaves():
    seeds = drawn(np.random.default_rng(2), 8)
    value = seeds.mean(0) * np.where(np.arange(9) >= 5, 2.0, 1.0)
    value[2] *= 3
    frame = with_outside(table(value, seeds))
    found = departure(frame)
    assert (found.first, found.sublayer, found.block, found.kind) == (2, 5, 2, "attention")
    assert found.ratio == pytest.approx(2)
    text = sentences(found, frame)
    assert text[0] == (
        "The checkpoint leaves the random inits' band at sublayer 5 (attention of block 3) for good "
        "(first at sublayer 2) and ends 2× above them."
    )
    assert frame.loc[frame["curve"] == "random", "outside"].isna().all()


def test_departure_for_good_or_not():
    seeds = drawn(np.random.default_rng(3), 8)
    assert (
        "stays within"
        in sentences(departure(with_outside(table(seeds.mean(0), seeds))), table(seeds[0], []))[0]
    )
    value = seeds.mean(0) * np.where(np.arange(9) < 4, 0.5, 1.0)
    frame = with_outside(table(value, seeds))
    found = departure(frame)
    assert (found.first, found.sublayer) == (0, None)
    assert "ends within" in sentences(found, frame)[0]


def test_nothing_to_compare():
    seeds = drawn(np.random.default_rng(4), 8)
    for few in (seeds[:0], seeds[:1], seeds[:7]):
        frame = with_outside(table(seeds[0], few))
        assert departure(frame) is None
        assert len(sentences(None, frame)) == 1 + bool(len(few))
    assert sentences(None, frame)[0].startswith("7 random inits are too few to tell")
    shorter = table(seeds[0], seeds)
    cut = shorter[~((shorter["curve"] == "random") & (shorter["sublayer"] > 6))]
    assert with_outside(cut)["outside"].notna().sum() == 7


@pytest.mark.parametrize("norm", ["reordered", "pre", "peri", "lns", "none", "layerscale"])
def test_the_two_terms_make_up_the_growth(norm):
    """Measured: what the stream gains is the sum over its adds."""
    frame = run(tiny(f"norm={norm}", "init.std=0.1", "seeds=2")).curve
    found = split(frame)
    ends = frame.groupby("seed")["mean_square"].agg(["first", "last"]).mean()
    assert found.branches + found.alignment == pytest.approx(ends["last"] - ends["first"], rel=1e-5)


@pytest.mark.parametrize("norm", ["post", "deepnorm", "residual_scale", "swin_renorm"])
def test_no_terms_across_renorms(norm):
    assert split(run(tiny(*placed(norm), "init.std=0.1")).curve) is None


def test_massive_needs_both_conditions():
    """Sun et al. 2024: above 100, and a thousand times the median."""
    frame = pd.DataFrame(
        {"max_abs": [2000.0, 150.0, 90.0, 100.5], "median_abs": [0.2, 1.0, 0.01, 0.1005]}
    )
    assert massive(frame).tolist() == [1, 0, 0, 1]


def test_comparison_ends_with_random_inits():
    """All three numbers are of the rows that every curve has, and the sentence says where that is."""
    seeds = drawn(np.random.default_rng(5), 8)
    frame = table(3 * seeds.mean(0), seeds)
    cut = frame[~((frame["curve"] == "random") & (frame["seed"] == 2) & (frame["sublayer"] > 6))]
    found = departure(cut := with_outside(cut.reset_index(drop=True)))
    assert found.last == 6
    assert found.checkpoint.branches + found.checkpoint.alignment == pytest.approx(found.growth)
    assert found.growth == pytest.approx(3 * (seeds[:, 6] - seeds[:, 0]).mean())
    grown = (seeds[:, 6] - seeds[:, 0]).mean()
    assert found.random.branches + found.random.alignment == pytest.approx(grown)
    assert "at sublayer 6, before a curve overflows, is 3× above them" in sentences(found, cut)[0]


def test_a_checkpoint_of_zeros():
    seeds = drawn(np.random.default_rng(6), 8)
    frame = table(np.zeros(9), seeds).assign(max_abs=0.0, median_abs=0.0)
    frame = with_outside(frame)
    assert "ends far below them" in sentences(departure(frame), frame)[0]
