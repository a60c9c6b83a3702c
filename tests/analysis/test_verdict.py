import re
from dataclasses import replace

import numpy as np
import pytest

from simlab import compose
from simlab.analysis import resampling
from simlab.analysis.agreement import agreement, enough_seeds
from simlab.analysis.curve import Curves
from simlab.analysis.numbers import gigabytes, off_by, percent, plus_minus, power_of_ten
from simlab.analysis.resampling import Estimate, sign_flip
from simlab.analysis.verdict import ALPHA, hold, judge
from simlab.experiment import run
from simlab.theory.mean_field import PredictedRow, Prediction

KINDS = ["embedding", *["attention", "mlp"] * 8]
SWIN = ["embedding", *(["attention", "mlp"] * 6 + ["renorm"]) * 2]


def made(v, kinds=KINDS, c=1.0, target="branch", theory=None, **others):
    v = np.asarray(v, float)
    targets = [None, *("stream" if kind == "renorm" else target for kind in kinds[1:])]
    gain = [1.0] * len(kinds)
    eps = np.broadcast_to(np.asarray(c, float), v.shape)
    return Curves(kinds, v, eps, gain, targets, others, theory, len(kinds))


def predicted(v, band, kinds=KINDS, raw=2.0, ends=None, accuracy=0.005):
    """A prediction with these mean squares and bands; every branch has ``raw`` before its norm."""
    rows = [
        PredictedRow(i, i // 2, kind, x, 1, 1, 0.1, 1.0, raw, 1.0, s)
        for i, (kind, x, s) in enumerate(zip(kinds, v, band, strict=False))
    ]
    return Prediction(rows, ends, accuracy=accuracy)


def additive_curves(seeds, generator, bias=0.0, noise=0.05, **more):
    steps = 1 + bias + noise * generator.standard_normal((seeds, 16))
    v = np.concatenate([np.full((seeds, 1), 4e-4), 4e-4 + steps.cumsum(1)], 1)
    return made(v, **more)


@pytest.mark.parametrize("seeds", [8, 16])
def test_false_alarms(seeds, monkeypatch):
    """A true law is rejected in about ALPHA of the runs: 2000 runs, three standard errors.

    Of 8 seeds all 256 flips, of 16 random ones: 512 reach 0.002.
    """
    monkeypatch.setattr(resampling, "FLIPS", 512)
    generator = np.random.default_rng(0)
    walks = generator.standard_normal((2000, seeds, 16)).cumsum(-1)
    rejected = np.mean([sign_flip(w, np.full(16, 1e-9)) < ALPHA for w in walks])
    assert rejected < ALPHA + 3 * np.sqrt(ALPHA * (1 - ALPHA) / 2000)
    assert rejected > 0.2 * ALPHA


def test_power():
    """The negative control: a bias of one standard deviation of the final value, 16 seeds."""
    generator = np.random.default_rng(0)
    walks = generator.standard_normal((200, 16, 16)).cumsum(-1) + np.arange(1, 17) / 4
    assert np.mean([sign_flip(w, np.full(16, 1e-9)) < ALPHA for w in walks]) > 0.6


def test_identical_errors_are_not_chance():
    """Eight equal offsets: p is the least that eight seeds can give."""
    assert sign_flip(np.full((8, 5), 0.01), np.full(5, 1e-9)) == 2 / 2**8


def test_additive_curves():
    verdict = judge(additive_curves(8, np.random.default_rng(0)), "float32")
    assert verdict.laws["additive"].status == "holds"
    assert verdict.laws["sqrt2"].status == "fails"
    assert re.match(
        r"Mean square grows by 1\.0\d ± 0\.0\d per sublayer, linearly \(a line fits to 0\.\d+ % of its "
        r"growth\): the additive law holds to \d\.\d %\.",
        verdict.sentence,
    )
    start = "From the embedding's 4.0e-4, √2 per sublayer would have meant 26.2 after 8 blocks"
    assert start in verdict.sentence  # 4e-4·2^16
    assert "“2·√2 per layer” 6711" in verdict.sentence  # 4e-4·8^8
    assert verdict.growth.per_sublayer.low < 1 < verdict.growth.per_sublayer.high


SENTENCES = {
    0.5: "more slowly than linearly in the sublayer, as its power p = 0.5",
    1: "linearly (a line fits to",
    1.5: "faster than linearly in the sublayer, as its power p = 1.",
}


@pytest.mark.parametrize(("p", "text"), SENTENCES.items())
def test_sentence_names_the_exponent(p, text):
    noise = 0.002 * np.random.default_rng(0).standard_normal((8, 17))
    v = 1e-3 + np.arange(17) ** p * np.exp(noise)
    assert text in judge(made(v), "float32").sentence


def test_additive_law_isnt_claimed_where_it_is_none():
    """pre: no norm on the branch. The curve is a line, and the law is not mentioned."""
    curves = additive_curves(8, np.random.default_rng(0), target=None)
    verdict = judge(curves, "float32")
    assert np.isnan(verdict.laws["additive"].log_error)
    assert "additive" not in verdict.sentence


def test_doubling_curves():
    generator = np.random.default_rng(0)
    v = 4e-4 * 2.0 ** np.arange(17) * np.exp(0.01 * generator.standard_normal((8, 17)))
    v[:, 0] = 4e-4
    verdict = judge(made(v), "float32")
    assert verdict.laws["additive"].status == "fails"
    assert "by a factor 2.00" in verdict.sentence
    assert "exponentially" in verdict.sentence
    assert "the additive law fails, off by" in verdict.sentence
    assert "√2 per sublayer would have meant 26.2 after 8 blocks" in verdict.sentence


def test_a_small_bias_fails_beyond_chance():
    curves = additive_curves(8, np.random.default_rng(0), bias=0.02, noise=0.001)
    verdict = judge(curves, "float32")
    assert verdict.laws["additive"].status == "fails"
    assert "is within 2" in verdict.sentence
    assert "but off beyond chance" in verdict.sentence


def test_a_law_that_chance_hides():
    """Off by more than 5 %, which eight such seeds can't tell: the verdict says how many could."""
    curves = additive_curves(8, np.random.default_rng(3), noise=0.3)
    fit = judge(curves, "float32").laws["additive"]
    assert fit.log_error > np.log(1.05)
    assert (fit.status, 8 < fit.enough < 1000) == ("unknown", True)
    said = r"law is not decided, off by [\d.]+ %, which may be chance \(\d+ seeds would tell\)"
    assert re.search(said, judge(curves, "float32").sentence)
    assert enough_seeds(0.05 / 3) == 8
    assert enough_seeds(1.0) == 3600  # three standard errors of 1/√3600 are 5 %


def test_too_few_seeds():
    texts = {
        7: "7 seeds are too few for intervals and close",
        1: "1 seed is too few for intervals and",
    }
    for seeds, text in texts.items():
        verdict = judge(additive_curves(seeds, np.random.default_rng(0)), "float32")
        assert f"({text} tests of laws: 8 needed)" in verdict.sentence
        assert "the additive law is not decided, off by" in verdict.sentence
        statuses = {name: fit.status for name, fit in verdict.laws.items()}
        sqrt2 = "fails" if seeds > 1 else "unknown"  # off by far, but one curve has no spread
        assert statuses == {"additive": "unknown", "sqrt2": sqrt2, "mean_field": "unknown"}
        assert {fit.p_value for fit in verdict.laws.values()} == {None}
    checkpoint = judge(additive_curves(1, np.random.default_rng(0)), "float32", "checkpoint")
    assert "too few" not in checkpoint.sentence
    assert "(one curve: no intervals)" in checkpoint.sentence
    assert "√2" not in checkpoint.sentence


@pytest.mark.parametrize("seeds", [2, 4, 7])
def test_few_seeds_tell_what_is_far_off(seeds):
    """Off by a factor of 3 isn't chance where the seeds' spread is 2 %; a large spread is.

    The negative control: 2000 runs of a true law, each seed's whole curve off by a lognormal factor.
    """
    verdict = judge(additive_curves(seeds, np.random.default_rng(0), bias=2, noise=0.02), "float32")
    assert verdict.laws["additive"].status == "fails"
    assert "the additive law fails, off by a factor of 3" in verdict.sentence
    generator, law, found = np.random.default_rng(1), np.arange(1.0, 18), []
    for sigma in generator.choice([0.3, 1.0, 2.0, 4.0], 2000):
        factor = np.exp(sigma * generator.standard_normal((seeds, 1)) - sigma**2 / 2)
        logs = np.log(np.tile(law, (seeds, 1)))
        found.append(hold(made(law * factor), logs, "float32").status)
    assert found.count("fails") < ALPHA * 2000


def test_constant_and_rounding():
    """A stream that is normed at every step: rounding alone is no evidence against a law."""
    v = np.concatenate([np.full((8, 1), 4e-4), np.full((8, 16), 1 + 3e-8)], 1)
    verdict = judge(made(v, target="stream"), "float32")
    assert verdict.laws["additive"].status == "holds"
    assert verdict.sentence == (
        "Mean square stays at 1 (it varies by less than 0.01 %), after the embedding's 4.0e-4: the "
        "additive law holds to less than "
        "0.01 %."
    )


def test_eps_and_saw_tooth_sentences():
    c = np.minimum(1, 0.05 * 2.0 ** np.arange(17))
    c[0] = 1
    v = 4e-4 + np.cumsum(np.r_[0, c[1:]]) + np.zeros((8, 1))
    sentence = judge(made(v, c=c), "float32").sentence
    assert "linearly" in sentence
    assert "from sublayer 5 on (before, eps holds the branches back)" in sentence
    level, rows = 0.0, []
    for kind in SWIN:
        level = 1.0 if kind == "renorm" else level + (kind != "embedding")
        rows.append(level)
    sentence = judge(made(np.tile(rows, (8, 1)), SWIN), "float32").sentence
    assert (
        "is a saw-tooth: a re-norm sets it back to 1 every 6 blocks, 12 sublayers, from peaks of 12 to "
        "13; between, it grows by 1" in sentence
    )
    start = "From the last re-norm's 1, √2 per sublayer would have meant 4096 after 12 blocks"
    assert start in sentence


def test_short_and_ended_curves():
    verdict = judge(made(np.ones((8, 1)), ["embedding"]), "float32")
    assert (
        verdict.sentence
        == "Mean square is 1 at the embedding, and there is no sublayer to speak of."
    )
    curves = additive_curves(8, np.random.default_rng(0))
    whole = Curves(**(vars(curves) | {"whole": 40}))
    assert judge(whole, "float32").sentence.startswith("Until a curve ends after sublayer 16, mean")


def near(scale=1.0, seeds=8, raw=2.0, noise=0.05, generator=0):
    """Curves around a prediction v_k = k, the rows from the sixth on ``scale`` times as large."""
    v = np.r_[4e-4, np.arange(1.0, 17)]
    band = noise * v
    got = v * (1 + noise * np.random.default_rng(generator).standard_normal((seeds, 1)))
    got[:, 6:] *= scale
    others = {
        "branch_raw_mean_square": np.full((seeds, 17), 2.0),
        "branch_mean_square": np.ones((seeds, 17)),
    }
    others["branch_raw_mean_square"][:, 6:] = raw
    return made(got, theory=predicted(v, band), **others)


THEORY = {
    "The curve is what theory predicts: off by at most": {},
    "The curve is not what theory predicts: off by 40 %": {"scale": 1.4, "noise": 0.01},
    "which chance and theory's own error explain;": {"seeds": 1, "noise": 0.3, "generator": 2},
    "but off beyond chance": {"scale": 1.03, "noise": 0.002},
}


@pytest.mark.parametrize("text", THEORY)
def test_theory_comes_first(text):
    verdict = judge(near(**THEORY[text]), "float32")
    sentence = verdict.sentence
    status = {"is what": "holds", "own error": "unknown"}
    expected = next((word for key, word in status.items() if key in text), "fails")
    assert verdict.laws["mean_field"].status == expected
    assert text in sentence
    assert sentence.startswith("The curve ")


def test_where_theory_first_fails_and_what_is_off():
    found = agreement(near(1.4, noise=0.01))
    assert (found.first, found.component) == (6, "branch or the residual add")
    assert found.largest == pytest.approx(0.4, abs=0.02)
    assert agreement(near(1.4, raw=3.0, noise=0.01)).component == "mlp"  # row 6
    sentence = judge(near(1.4, raw=3.0, noise=0.01), "float32").sentence
    assert "first at sublayer 6 (the MLP of block 3), where the MLP's output is off" in sentence


@pytest.mark.parametrize("scale", [0.7, 1.4])
def test_how_far_off_is_one_number(scale):
    """The sentence and the law's entry say the factor between the curves, on either side of 1."""
    verdict = judge(near(scale, noise=0.0), "float32")
    assert verdict.laws["mean_field"].log_error == pytest.approx(abs(np.log(scale)), rel=1e-6)
    assert f"off by {100 * (max(scale, 1 / scale) - 1):.2g} % (" in verdict.sentence


def test_theory_false_alarms():
    """A right theory is rejected in at most ALPHA of 2000 runs, of one seed and of eight.

    A curve's rows move together, so Bonferroni's limit rejects less often than that.
    """
    for seeds in (1, 8):
        alarms = [
            agreement(near(seeds=seeds, generator=i, noise=0.1)).first is not None
            for i in range(2000)
        ]
        assert np.mean(alarms) < ALPHA + 3 * np.sqrt(ALPHA / 2000)
    assert agreement(near(1.5, noise=0.1)).first is not None


def test_where_theory_says_nothing():
    v = np.r_[4e-4, np.arange(1.0, 17)]
    none = made(np.tile(v, (8, 1)), theory=Prediction([], "the batch has 1024 tokens"))
    assert judge(none, "float32").sentence.startswith(
        "Theory predicts no curve here: the batch has 1024 tokens. Mean square grows"
    )
    some = made(np.tile(v, (8, 1)), theory=predicted(v[:5], 0.05 * v, ends="seeds differ"))
    sentence = judge(some, "float32").sentence
    assert "Up to sublayer 4 the curve is what theory predicts" in sentence
    assert "Theory ends before the model: seeds differ." in sentence


def test_gradient_sentence():
    g = np.tile(np.r_[7e-3, 1e-4 * 0.99 ** np.arange(16)], (8, 1))
    curves = additive_curves(8, np.random.default_rng(0), gradient_rms=g)
    assert (
        "The gradient's rms falls 81.4-fold through the model (0.007 at the embedding, 8.6e-5 at the "
        "end); its largest step is a fall by a factor 70 at sublayer 1 (the attention of block 1)."
        in judge(curves, "float32").sentence
    )
    flat = additive_curves(8, np.random.default_rng(0), gradient_rms=np.ones((8, 17)))
    assert "The gradient's rms is about the same at both ends" in judge(flat, "float32").sentence


GRADIENTS = {  # how far off, if so few seeds tell, and if chance may be it
    (
        1,
        0.0,
    ): "theory is not decided, off by 20 %, which so few seeds can't tell from chance (8 needed)",
    (
        2,
        0.02,
    ): "theory is not decided, off by 20 %, which so few seeds can't tell from chance (8 needed)",
    (8, 0.3): "theory is not decided, off by 20 %, which may be chance",
    (8, 0.02): "theory is off by 20 %",
}


@pytest.mark.parametrize(("seeds", "noise"), GRADIENTS)
def test_theory_of_gradients_has_no_band(seeds, noise):
    drawn = 1 + noise * np.random.default_rng(0).standard_normal((seeds, 1))
    g = 0.12 * drawn / drawn.mean() * np.ones(17)
    v = np.r_[4e-4, np.arange(1.0, 17)]
    at = predicted(v, 0.1 * v)
    at = replace(at, rows=[replace(row, gradient_rms=0.1) for row in at.rows])
    curves = additive_curves(seeds, np.random.default_rng(0), theory=at, gradient_rms=g)
    assert f"; {GRADIENTS[seeds, noise]}." in judge(curves, "float32").sentence


def test_massive_activations_are_set_aside():
    """The shape is the median token's, and no law is claimed."""
    v = np.r_[4e-4, np.arange(1.0, 17)]
    jump = np.where(np.arange(17) > 8, 5000.0, v)
    curves = made(jump[None], mean_square_median=v[None])
    sentence = judge(curves, "float32", "checkpoint", massive=True).sentence
    assert sentence.startswith("The median token's mean square grows by 1 per sublayer, linearly")
    assert "additive" not in sentence


def test_off_by():
    factors = {1.008: "0.8 %", 1.5: "50 %", 5.2: "a factor of 5.2", 150: "a factor of 150"}
    factors |= {1 + 1e-6: "less than 0.01 %", 1e35: "a factor of 10³⁵", np.inf: "any factor"}
    for factor, text in factors.items():
        assert off_by(np.log(factor)) == text
    assert [percent(x) for x in (1e-5, 0.008, 0.12, 11.5)] == [
        "less than 0.01 %", "0.8 %", "12 %", "1150 %"
    ]  # fmt: skip
    assert [power_of_ten(x) for x in (1.814, 3.61, 19.6, 0, -5)] == [
        "65.2", "4074", "4·10¹⁹", "1", "10⁻⁵"
    ]  # fmt: skip


def test_plus_minus():
    for estimate, text in (
        (Estimate(1.0, 0.99, 1.01), "1.00 ± 0.01"),
        (Estimate(1.0023, 1.0021, 1.0025), "1.0023 ± 0.0002"),
        (Estimate(1.08e-6, 1.05e-6, 1.11e-6), "(1.08 ± 0.03)·10⁻⁶"),
        (Estimate(12345.0, 11845.0, 12845.0), "(1.23 ± 0.05)·10⁴"),
        (Estimate(0.5), "0.5"),
        (Estimate(6786.76, 4677.0, 8896.0), "6787 ± 2110"),
    ):
        assert plus_minus(estimate) == text


def test_a_law_beyond_float64_is_rejected_quietly():
    """Depth 520: √2 per sublayer predicts 2^1040."""
    kinds = ["embedding", *["attention", "mlp"] * 520]
    generator = np.random.default_rng(0)
    v = 4e-4 + np.arange(1041) + generator.standard_normal((8, 1041)).cumsum(1) * 0.01
    v[:, 0] = 4e-4
    verdict = judge(made(v, kinds), "float32")
    assert verdict.laws["sqrt2"].status == "fails"
    assert verdict.laws["additive"].status == "holds"
    assert "√2 per sublayer would have meant 5·10³⁰⁹ after 520 blocks" in verdict.sentence


def test_gigabytes():
    """Never in powers of ten: a dry run said 1.2e+02 GB."""
    texts = [gigabytes(size) for size in (4.1e8, 3.21e9, 1.234e11, 1.2e12)]
    assert texts == ["0.41 GB", "3.2 GB", "123 GB", "1,200 GB"]


def test_growth_per_block():
    """Attention adds 0.1, the MLP 1.9: 2 per block, however few the blocks."""
    kinds = ["embedding", *["attention", "mlp"] * 6]
    v = np.r_[4e-4, np.cumsum([0.1, 1.9] * 6)]
    noise = 1e-3 * np.random.default_rng(0).standard_normal((8, 1))
    sentence = judge(made(v * (1 + noise), kinds, target=None), "float32").sentence
    assert "by 2.00" in sentence
    assert "per block (attention adds 0.1, the MLP 1.9)" in sentence


def test_zero_embedding_and_plateau():
    v = np.r_[4e-4, np.arange(1.0, 17)]
    nothing = judge(made(np.zeros((8, 17)), theory=predicted(v, 0.05 * v)), "float32")
    assert "√2" not in nothing.sentence
    assert nothing.laws["mean_field"].log_error == np.inf
    v = np.r_[np.ones(10), 100, np.full(6, 200.0)]
    assert "faster than exp" not in judge(made(v[None]), "float32", "checkpoint").sentence
    v = np.exp(0.02 * np.arange(17.0) ** 2.4)
    assert "faster than exp" in judge(made(v[None]), "float32", "checkpoint").sentence


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["norm=post"], "Mean square stays at 1 (it varies by 0.26 %), after the embedding's 3.9e-4"),
        (["norm=swin_renorm", "init.std=0.001"], "from a peak of 1.08 (while the stream is small it"
         " raises it: at the re-norm after block 6 from 1.3e-6); it ends at 1.69, above every peak (eps"
         " holds the branches back: m/(m + eps) is 0.217 and 2.5e-4 at the end)"),
        (["norm=lns"], "more slowly than linearly in the sublayer"),  # it has no limit: see depth=64
    ],
)  # fmt: skip
def test_what_a_reader_would_miss(overrides, said):
    (verdict,) = run(compose(["model=small", "engine=theory", *overrides])).verdicts.values()
    assert said in verdict.sentence


@pytest.mark.parametrize("kind", ["block", "parallel", "mixer"])
def test_sqrt2_per_sublayer_is_of_sublayers(kind):
    """Of rows that are several sublayers the law says nothing, and no number of blocks is made up."""
    v = np.outer(np.ones(8), np.arange(1.0, 10))
    verdict = judge(made(v, ["embedding", *[kind] * 8], target=None), "float32")
    assert not any("√2 per sublayer would have meant" in line for line in verdict.sentences)
    assert (verdict.laws["sqrt2"].status == "unknown") == (kind != "mixer")
