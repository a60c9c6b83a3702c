"""A checkpoint beside random inits: where it leaves them, with what false alarms, and why."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import placed, tiny

from simlab.analysis import compare
from simlab.analysis.compare import Split, departure, outside, split, with_outside
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


def sentences(found, frame, depth=4):
    return compare.sentences(found, frame, (1, 3), 2 * depth)


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
        "The checkpoint leaves the random inits' band at sublayer 5 (the attention of block 3) for "
        "good (first at sublayer 2) and ends 2× above them."
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
    assert (found.low + found.high) / 2 == pytest.approx(found.alignment)  # of two seeds
    assert found.low < found.high


@pytest.mark.parametrize("norm", ["post", "deepnorm", "residual_scale", "swin_renorm"])
def test_no_terms_across_renorms(norm):
    assert split(run(tiny(*placed(norm), "init.std=0.1")).curve) is None


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
    first, second, _ = sentences(found, cut)
    assert first.endswith("and is 3× above them when a random init's curve ends at sublayer 6.")
    assert second.startswith("Up to sublayer 6 its branches are at right angles to the stream")


def test_no_claim_beyond_the_last_row():
    """A checkpoint that overflows after sublayer 3 of 8."""
    seeds = drawn(np.random.default_rng(7), 8)
    inside = seeds.mean(0)
    for value, said in (
        (inside, "stays within the random inits' band until it ends at sublayer 3."),
        (inside * [1, 2, 1, 1, 1, 1, 1, 1, 1], "and is back inside when it ends at sublayer 3."),
        (inside * [1, 2, 1, 2, 1, 1, 1, 1, 1], "(the attention of block 2), first at sublayer 1, and"
         " is 2× above them when it ends at sublayer 3."),
    ):  # fmt: skip
        frame = table(value, seeds)
        frame = frame[(frame["curve"] == "random") | (frame["sublayer"] <= 3)]
        text = sentences(departure(frame := with_outside(frame.reset_index(drop=True))), frame)
        assert text[0].endswith(said), text
    at_once = with_outside(frame[frame["curve"] == "random"].reset_index(drop=True))
    assert sentences(departure(at_once), at_once) == []


@pytest.mark.parametrize(
    ("alignment", "said"),
    [
        (0.9, "are at right angles to the stream on the whole: their alignment adds 0.9 to the 19 of"
         " their size"),
        (-0.9, "are at right angles to the stream on the whole: their alignment takes 0.9 from the 19"
         " of their size"),
        (5.78, "point slightly along the stream, which adds 5.78 to the 19 that their size alone would"
         " add"),
        (-5.78, "point slightly against the stream, which takes 5.78 from the 19 that their size alone"
         " would add"),
        (25.0, "point along the stream, which adds 25 to the 19 that their size alone would add"),
        (-12.0, "point against the stream, which takes 12 from the 19 that their size alone would add"),
    ],
)  # fmt: skip
def test_sizes_and_alignment_in_words(alignment, said):
    seeds = drawn(np.random.default_rng(8), 8)
    frame = with_outside(table(seeds.mean(0), seeds))
    found = replace(departure(frame), checkpoint=Split(19.0, alignment, 0.0, 0.0))
    others = {
        0.01: "; those of random inits are at right angles to it (0.01 of 45; single seeds: -0.19"
        " to 0.21).",
        -4.0: "; those of random inits point slightly against it (which takes 4 from 45; single seeds:"
        " -4.2 to -3.8).",
        40.0: "; those of random inits point along it (which adds 40 to 45; single seeds: 39.8"
        " to 40.2).",
        None: ".",
    }
    for other, beside in others.items():
        drawn_split = None if other is None else Split(45.0, other, other - 0.2, other + 0.2)
        text = sentences(replace(found, random=drawn_split), frame)
        assert text[1] == f"Its branches {said}{beside}"
    wide = sentences(replace(found, random=Split(45.0, 0.0, -60.0, 60.0)), frame)[1]
    apart = abs(alignment) > 0.05 * 19  # else they are at right angles
    assert ("as those of random inits do" in wide) == apart
    assert ("single seeds have -133 to 133 %." in wide) == apart


def test_a_checkpoint_of_zeros():
    seeds = drawn(np.random.default_rng(6), 8)
    frame = table(np.zeros(9), seeds).assign(max_abs=0.0, median_abs=0.0)
    frame = with_outside(frame)
    assert "ends far below them" in sentences(departure(frame), frame)[0]
