import itertools
import math

import numpy as np
import pytest

from simlab.analysis.resampling import deals_for, enough, limit, permuted


def pooled(a, b):
    """Student's two-sample t by the book."""
    n, m = len(a), len(b)
    variance = (((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()) / (n + m - 2)
    return abs(a.mean() - b.mean()) / math.sqrt(variance * (1 / n + 1 / m))


def test_every_deal_by_the_book():
    rng = np.random.default_rng(0)
    old, new = rng.normal(3, 2, (5, 4)), rng.normal(3, 2, (4, 4))
    t, maxima = permuted(old, new, np.zeros(4))
    both = np.concatenate([new, old])
    expected = []
    for chosen in itertools.combinations(range(9), 4):
        rest = [i for i in range(9) if i not in chosen]
        expected.append(max(pooled(both[list(chosen), c], both[rest, c]) for c in range(4)))
    assert t == pytest.approx([pooled(new[:, c], old[:, c]) for c in range(4)])
    assert maxima == pytest.approx(sorted(expected, reverse=True))


def test_random_deals_keep_the_first():
    rng = np.random.default_rng(0)
    t, maxima = permuted(rng.normal(0, 1, (20, 3)), rng.normal(9, 1, (20, 3)), np.zeros(3), 1000)
    assert len(maxima) == 1000
    assert maxima[0] == pytest.approx(t.max())
    assert maxima[1] < t.max() / 2


def walks(rng, count, off=0.0):
    """Curves whose rows depend on each other, and which aren't Gaussian."""
    return np.exp(rng.standard_normal((count, 1))) + rng.exponential(1 + off, (count, 30)).cumsum(1)


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_false_alarms_and_power(alpha):
    rng, runs = np.random.default_rng(1), 400

    def alarm(off):
        t, maxima = permuted(walks(rng, 8), walks(rng, 8, off), np.zeros(30), 1000)
        return t.max() > limit(maxima, alpha)

    rate = np.mean([alarm(0.0) for _ in range(runs)])
    # As often as alpha says, by the binomial's standard error: neither more nor far less.
    assert abs(rate - alpha) < 3.5 * math.sqrt(alpha * (1 - alpha) / runs)
    assert np.mean([alarm(2.0) for _ in range(40)]) > 0.9


def test_what_rounding_explains_is_no_difference():
    constant = np.ones((8, 1))
    floor = np.array([1e-5])
    t, maxima = permuted(constant, constant * (1 + 0.9e-5), floor)
    assert t.max() == 0.0
    t, maxima = permuted(constant, constant * (1 + 5e-5), floor)
    assert t.max() > limit(maxima, 1e-3)


def test_how_many_are_enough():
    """Of two groups of one size a deal and its mirror image tie: one of them can't be told apart."""
    assert next(n for n in range(2, 12) if enough(n, n, 1e-3)) == 7
    assert enough(10, 10, 1e-3 / 8)
    assert not enough(4, 4, 1e-3)
    rng = np.random.default_rng(0)
    for n in (6, 7):
        t, maxima = permuted(rng.normal(0, 1, (n, 1)), rng.normal(99, 1, (n, 1)), np.zeros(1))
        if enough(n, n, 1e-3):
            assert t.max() > limit(maxima, 1e-3)
        else:
            with pytest.raises(ValueError, match="too few"):
                limit(maxima, 1e-3)
    assert deals_for(1e-3) == 20_000
