import numpy as np
import pytest

from simlab.analysis import fit
from simlab.analysis.fit import EXPONENTS, design, exponent, growth, per_sublayer, rate
from simlab.analysis.resampling import MIN_SEEDS, jackknife, t_quantile

PLAIN = ["embedding", *["attention", "mlp"] * 20]
SWIN = ["embedding", *(["attention", "mlp"] * 6 + ["renorm"]) * 4]


def position(kinds):
    d = design(kinds)
    return np.concatenate([[0], d.position]), np.concatenate([[0], d.segment])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 3.7])
@pytest.mark.parametrize("kinds", [PLAIN, SWIN])
def test_exponent_is_recovered(p, kinds):
    """v = a + b·k^p exactly, with an a per segment: p to 3 digits, whatever the offset."""
    k, segment = position(kinds)
    v = 3.0 + 5.0 * segment + 0.7 * k**p
    assert exponent(v[None], kinds)[0] == pytest.approx(p, rel=2e-3)


@pytest.mark.parametrize("r", [0.8, 1.05, 2.0, 1e4])
@pytest.mark.parametrize("kinds", [PLAIN, SWIN])
def test_rate_is_recovered(r, kinds):
    k, segment = position(kinds)
    v = (1.0 + segment) * r**k
    assert rate(v[None], kinds)[0] == pytest.approx(r, rel=1e-9)


def test_exponent_against_a_grid_search():
    """An independent ten-line least squares, on noisy curves."""
    generator = np.random.default_rng(0)
    k = np.arange(1, 41)
    for _ in range(5):
        v = np.concatenate([[0.0], 1 + k**1.3 + generator.normal(0, 1, 40)])
        best = None
        for p in np.linspace(0.5, 3, 2501):
            basis = np.stack([np.ones(40), k**p], axis=1)
            residual = v[1:] - basis @ np.linalg.lstsq(basis, v[1:], rcond=None)[0]
            if best is None or residual @ residual < best[0]:
                best = (residual @ residual, p)
        assert exponent(v[None], PLAIN)[0] == pytest.approx(best[1], abs=2e-3)


def test_growth_rows():
    k, _ = position(SWIN)
    v = np.where(np.array(SWIN) == "renorm", 1.0, 1.0 + k)
    v[0] = 0.0004
    assert per_sublayer(v, SWIN) == pytest.approx(1.0)
    assert exponent(v[None], SWIN)[0] == pytest.approx(1.0, rel=1e-3)


def test_what_cannot_be_fitted():
    short = ["embedding", "attention", "mlp"]
    assert np.isnan(exponent(np.ones((1, 3)), short)[0])
    constant = np.ones(41)
    assert np.isnan(exponent(constant[None], PLAIN)[0])
    assert np.isnan(per_sublayer(np.ones(2), ["embedding", "attention"]))


def test_t_quantile():
    """Values from printed tables."""
    for q, df, value in ((0.975, 7, 2.3646), (0.975, 1, 12.7062), (0.995, 9, 3.2498)):
        assert t_quantile(q, df) == pytest.approx(value, abs=2e-4)


def random_walks(generator, seeds, runs):
    """Curves with v_k = k + a random walk whose steps grow: rows depend on each other, as real ones."""
    steps = generator.normal(0, 0.05, (runs, seeds, 40)) * np.sqrt(np.arange(1, 41))
    return np.concatenate([np.zeros((runs, seeds, 1)), np.arange(1, 41) + steps.cumsum(-1)], -1)


@pytest.mark.parametrize("statistic", [per_sublayer, exponent])
def test_the_intervals_cover(statistic, monkeypatch):
    """95 % of 1000 runs to three standard errors of that, 2.1 %; without Student's t it is 91 %."""
    monkeypatch.setattr(fit, "EXPONENTS", EXPONENTS[::4])  # a quarter of the time
    runs = random_walks(np.random.default_rng(1), 8, 1000)
    intervals = [jackknife(v, lambda w: statistic(w, PLAIN)) for v in runs]
    missed = np.array([abs(e.value - 1.0) / (e.high - e.value) for e in intervals])
    assert abs((missed <= 1).mean() - 0.95) < 0.021
    assert (missed <= 1.960 / 2.365).mean() < 0.929


def test_interval_of_a_linear_statistic_is_students():
    """mean ± t·s/√S of the curves' own values, also where one curve dwarfs the others."""
    v = random_walks(np.random.default_rng(3), 8, 1)[0] * 10.0 ** np.arange(0, 24, 3)[:, None]
    each = per_sublayer(v, PLAIN)
    e = jackknife(v, lambda w: per_sublayer(w, PLAIN))
    half = 2.36462 * each.std(ddof=1) / np.sqrt(8)
    assert (e.low, e.high) == pytest.approx((e.value - half, e.value + half), rel=1e-5)


def test_interval_of_a_smooth_statistic():
    """Of e^mean it is t·e^mean·s/√S, to the curvature: the delta method."""
    v = np.random.default_rng(3).normal(0, 1e-3, (16, 1))
    e = jackknife(v, lambda w: np.exp(w[:, 0]))
    half = 2.13145 * np.exp(v.mean()) * v.std(ddof=1) / 4
    assert (e.low, e.high) == pytest.approx((e.value - half, e.value + half), rel=1e-6)


def test_one_curve_that_is_all_there_is():
    """Without the only curve that varies there is no p: a value, and no interval."""
    v = np.zeros((8, 41))
    v[0, 1:] = np.arange(1, 41)
    e = growth(v, PLAIN, "linear").exponent
    assert e.value == pytest.approx(1.0, rel=1e-3)
    assert e.low is None


def test_too_few_seeds_get_no_interval():
    v = random_walks(np.random.default_rng(1), MIN_SEEDS - 1, 1)[0]
    g = growth(v, PLAIN, "linear")
    for e in (g.per_sublayer, g.exponent, g.rate):
        assert e.low is None
        assert np.isfinite(e.value)
