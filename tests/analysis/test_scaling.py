"""The power law of a statistic in width: closed forms, and how often its interval holds."""

import math

import numpy as np
import pytest

from simlab.analysis.scaling import BENT, power_law

WIDTHS = np.array([128.0, 256.0, 512.0, 2048.0])


@pytest.mark.parametrize("p", [-0.5, 0.0, 0.5, 1.25])
def test_a_power_law_gives_its_exponent(p):
    """Seeds whose own exponents are known: their mean, and Student's interval of theirs."""
    own = p + 0.01 * np.arange(-4, 5)  # nine seeds
    law = power_law(WIDTHS, 3.0 * WIDTHS ** own[:, None])
    assert law.exponent.value == pytest.approx(p, abs=1e-12)
    half = 2.306004 * own.std(ddof=1) / 3  # t's 97.5 % point of 8 degrees of freedom, from a table
    assert law.exponent.high - p == pytest.approx(half, rel=1e-6)
    assert p - law.exponent.low == pytest.approx(half, rel=1e-6)
    assert (law.first, law.last) == pytest.approx((p, p), abs=1e-12)
    assert not law.bent


def test_a_curve_that_levels_off_is_bent():
    """v = d/(d + 128): p is 128/(d + 128) between near widths, and falls to 0."""
    law = power_law(WIDTHS, (WIDTHS / (WIDTHS + 128))[None])
    assert law.bent
    assert law.exponent.low is None  # one seed
    assert law.first == pytest.approx(math.log2((256 / 384) / (128 / 256)))
    assert law.last == pytest.approx(math.log((2048 / 2176) / (512 / 640)) / math.log(4))
    assert law.first - law.last > BENT


def test_interval_and_bent_under_noise():
    """The interval holds p in 95 % of 1000 trials; a straight line is bent in 1 of 128 at most.

    Negative control: an interval a third as wide doesn't.
    """
    generator = np.random.default_rng(0)
    inside = narrow = bent = 0
    for _ in range(1000):
        noise = 0.3 * generator.standard_normal((8, len(WIDTHS)))
        law = power_law(WIDTHS, WIDTHS**0.5 * np.exp(noise))
        half, off = law.exponent.high - law.exponent.value, abs(law.exponent.value - 0.5)
        inside, narrow, bent = inside + (off < half), narrow + (off < half / 3), bent + law.bent
    sigma = math.sqrt(1000 * 0.05 * 0.95)
    assert abs(inside - 950) < 4 * sigma
    assert bent < 1000 / 128 + 4 * math.sqrt(1000 / 128)
    assert narrow < 950 - 4 * sigma


def test_what_is_missing():
    values = WIDTHS[None] ** np.array([[1.0], [2.0]])
    values[0, 1] = np.nan  # the first seed lacks a width: the second is left
    assert power_law(WIDTHS, values).exponent.value == pytest.approx(2.0)
    values[1, 1] = np.inf  # now no seed has it: it is left out
    assert power_law(WIDTHS, values).exponent.value == pytest.approx(1.5)
    assert power_law(WIDTHS, -values) is None
    assert power_law(WIDTHS[:1], values[:, :1]) is None
    values[0, 0], values[1, 3] = np.nan, np.nan
    assert power_law(WIDTHS, values) is None
