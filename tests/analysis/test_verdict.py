import numpy as np
import pytest

from simlab.analysis import resampling
from simlab.analysis.curve import Curves
from simlab.analysis.numbers import gigabytes, off_by, plus_minus
from simlab.analysis.resampling import Estimate, sign_flip
from simlab.analysis.verdict import ALPHA, judge

KINDS = ["embedding", *["attention", "mlp"] * 8]


def made(v, kinds=KINDS, c=1.0, normalises="branch"):
    v = np.asarray(v, float)
    alike = [1.0] * len(kinds), [normalises] * len(kinds)
    return Curves(kinds, v, np.full_like(v, c), *alike)


def additive_curves(seeds, generator, bias=0.0, noise=0.05):
    steps = 1 + bias + noise * generator.standard_normal((seeds, 16))
    return made(np.concatenate([np.full((seeds, 1), 4e-4), 4e-4 + steps.cumsum(1)], 1))


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


def test_additive_curves_are_called_additive():
    verdict = judge(additive_curves(8, np.random.default_rng(0)), "float32")
    assert verdict.laws["additive"].status == "holds"
    assert verdict.laws["sqrt2"].status == "fails"
    assert "linearly" in verdict.sentence
    assert "the additive law holds to" in verdict.sentence
    assert verdict.growth.per_sublayer.low < 1 < verdict.growth.per_sublayer.high


EXPONENTS = {0.5: "more slowly than linearly (p = 0.", 1: "linearly (p = ",
             1.5: "faster than linearly (p = 1."}  # fmt: skip


@pytest.mark.parametrize(("p", "said"), EXPONENTS.items())
def test_sentence_names_the_exponent(p, said):
    noise = 0.01 * np.random.default_rng(0).standard_normal((8, 17))
    v = 1e-3 + np.arange(17) ** p * np.exp(noise)
    sentence = judge(made(v), "float32").sentence
    assert f" per sublayer, {said}" in sentence


def test_doubling_curves_are_called_doubling():
    generator = np.random.default_rng(0)
    v = 4e-4 * 2.0 ** np.arange(17) * np.exp(0.01 * generator.standard_normal((8, 17)))
    v[:, 0] = 4e-4
    verdict = judge(made(v), "float32")
    assert verdict.laws["sqrt2"].status == "holds"
    assert verdict.laws["additive"].status == "fails"
    assert "exponentially" in verdict.sentence
    assert "by a factor 2.00" in verdict.sentence


def test_a_small_bias_fails_beyond_chance():
    curves = additive_curves(8, np.random.default_rng(0), bias=0.02, noise=0.001)
    verdict = judge(curves, "float32")
    assert verdict.laws["additive"].status == "fails"
    assert "fails beyond chance" in verdict.sentence


def test_too_few_seeds_cannot_tell():
    verdict = judge(additive_curves(7, np.random.default_rng(0)), "float32")
    assert verdict.sentence.startswith("7 seeds are too few to tell (8 needed)")
    assert {fit.status for fit in verdict.laws.values()} == {"unknown"}
    assert {fit.p_value for fit in verdict.laws.values()} == {None}
    one = judge(additive_curves(1, np.random.default_rng(0)), "float32")
    assert one.sentence.startswith("1 seed is too few to tell")
    checkpoint = judge(additive_curves(1, np.random.default_rng(0)), "float32", drawn=False)
    assert "too few" not in checkpoint.sentence
    assert "no intervals" in checkpoint.sentence


def test_constant_and_rounding():
    """A stream that is normed at every step: rounding alone is no evidence against a law."""
    v = np.concatenate([np.full((8, 1), 4e-4), np.full((8, 16), 1 + 3e-8)], 1)
    verdict = judge(made(v, normalises="stream"), "float32")
    assert verdict.laws["additive"].status == "holds"
    assert verdict.sentence.startswith("Mean square stays at 1:")


def test_short_and_empty_curves():
    verdict = judge(made(np.ones((8, 1)), ["embedding"]), "float32")
    assert verdict.sentence == "The curve can't be fitted."


def test_off_by():
    factors = {1.008: "0.8 %", 1.5: "50 %", 5.2: "a factor of 5.2", 150: "a factor of 150"}
    factors |= {1 + 1e-6: "less than 0.01 %", 1e35: "10^35", np.inf: "any factor"}
    for factor, said in factors.items():
        assert off_by(np.log(factor)) == said


def test_plus_minus():
    for estimate, said in (
        (Estimate(1.0, 0.99, 1.01), "1.00 ± 0.01"),
        (Estimate(1.0023, 1.0021, 1.0025), "1.0023 ± 0.0002"),
        (Estimate(1.08e-6, 1.05e-6, 1.11e-6), "(1.08 ± 0.03)·10^-6"),
        (Estimate(12345.0, 11845.0, 12845.0), "(1.23 ± 0.05)·10^4"),
        (Estimate(0.5), "0.5"),
        (Estimate(6786.76, 4677.0, 8896.0), "6787 ± 2110"),
    ):
        assert plus_minus(estimate) == said


def test_a_law_beyond_float64_is_rejected_quietly():
    """Depth 520: √2 per sublayer predicts 2^1040."""
    kinds = ["embedding", *["attention", "mlp"] * 520]
    generator = np.random.default_rng(0)
    v = 4e-4 + np.arange(1041) + generator.standard_normal((8, 1041)).cumsum(1) * 0.01
    v[:, 0] = 4e-4
    verdict = judge(made(v, kinds), "float32")
    assert verdict.laws["sqrt2"].status == "fails"
    assert verdict.laws["additive"].status == "holds"
    assert "10^307" in verdict.sentence


def test_gigabytes():
    """Never in powers of ten: a dry run said 1.2e+02 GB."""
    texts = [gigabytes(size) for size in (4.1e8, 3.21e9, 1.234e11, 1.2e12)]
    assert texts == ["0.41 GB", "3.2 GB", "123 GB", "1,200 GB"]
