"""Words for shapes: curves whose shape is known by construction, and where no word is right."""

import numpy as np
import pytest

from simlab.analysis.shape import FLAT, TOLERANCE, shape_of

PLAIN = ["embedding", *["attention", "mlp"] * 20]
SWIN = ["embedding", *(["attention", "mlp"] * 6 + ["renorm"]) * 3, *["attention", "mlp"] * 2]
K = np.arange(1, 41)


def named(v, kinds=PLAIN, c=1.0, target="branch", **more):
    """The shape of rows after an embedding of 1e-4."""
    v = np.concatenate([[1e-4], np.asarray(v, float)])
    normalises = [None, *("stream" if kind == "renorm" else target for kind in kinds[1:])]
    return shape_of(v, kinds, np.broadcast_to(c, v.shape), normalises, **more)


CURVES = {
    "constant": 3 + 0.01 * np.sin(K),
    "linear": 0.5 + 1.02 * K,
    "exponential": 1e-3 * 1.2**K,
    "power": 1 + 0.3 * K**1.6,
    "saturating": 2 - 1.5 * 0.85**K,
    "jump": np.where(K < 15, 1.0, 60.0) + 0.01 * K,
    "none": 50 + 20 * np.sin(K / 4),
}


@pytest.mark.parametrize("word", CURVES)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e30])
def test_word(word, scale):
    """Whatever the unit; and falling as well as growing."""
    assert named(scale * CURVES[word]).word == word
    if word not in ("constant", "exponential"):
        assert named(scale * (1.1 * CURVES[word].max() - CURVES[word])).word == word


NUMBERS = {"exponential": 1.2, "power": 1.6, "saturating": 2.0}


@pytest.mark.parametrize("word", NUMBERS)
def test_number(word):
    assert named(CURVES[word]).number == pytest.approx(NUMBERS[word], rel=0.02)


@pytest.mark.parametrize("kinds", [PLAIN, SWIN])
def test_misfit_is_the_largest_residual(kinds):
    """The share that the sentence states, against NumPy's own polynomial fit."""
    v = 1 + K + 0.4 * np.cos(K * 1.7)
    ends = v[1::2]
    line = np.polyval(np.polyfit(K[1::2], ends, 1), K[1::2])
    assert named(v).misfit == pytest.approx(np.abs(line - ends).max() / np.ptp(ends), rel=1e-6)


def test_neighbours_are_told_apart():
    """Just within a tolerance and just beyond it."""
    wave = np.where(K // 2 % 2, 1.0, -1.0)  # alternates at the blocks' ends
    assert named(30 + K + 0.8 * TOLERANCE * 38 * wave).word == "linear"
    assert named(30 + K + 1.3 * TOLERANCE * 38 * wave).word == "none"
    assert named(1 + 0.45 * FLAT * wave).word == "constant"
    assert named(1 + 0.7 * FLAT * wave).word != "constant"


def test_rows_that_eps_holds_back():
    """width 256, init.std=0.01: an exponential to a fit of all rows, a line once eps has let go."""
    c = np.concatenate([[1.0], np.minimum(1, 0.03 * 1.9 ** np.arange(40))])
    shape = named(np.cumsum(c[1:]), c=c)
    assert (shape.word, shape.held) == ("linear", "eps")
    assert c[shape.start] >= 0.9 > c[shape.start - 1]
    held_throughout = named(np.cumsum(0.1 * c[1:]), c=0.1 * c)
    assert (held_throughout.start, held_throughout.held) == (1, None)


def sawtooth(first=0.0):
    v, level = [], first
    for kind in SWIN[1:]:
        level = 1.0 if kind == "renorm" else level + 1
        v.append(level)
    return np.array(v)


def test_saw_tooth():
    """As in swin_renorm: peaks of 12 and 13, a reset to 1 every 12 sublayers, linear between."""
    shape = named(sawtooth(), SWIN)
    assert (shape.word, shape.inside) == ("saw-tooth", "linear")
    teeth = shape.teeth
    assert (teeth.sublayers, teeth.low, teeth.high, teeth.reset) == (12, 12, 13, 1)
    assert (teeth.renorm, teeth.count) == (True, 3)
    flat = np.where(np.array(SWIN[1:]) == "renorm", 1.0, 1.0 + 1e-3)
    assert named(flat, SWIN).word == "constant"  # re-norms that take nothing away


def test_norms_of_the_stream():
    """post: constant. pre_post: teeth of two sublayers. mix_ln: post-norm blocks, then a line."""
    assert named(np.ones(40), target="stream").word == "constant"
    kinds, v = ["embedding", *["attention", "mlp"] * 20], np.where(K % 2, 1.5, 1.0)
    targets = [None, *[None, "stream"] * 20]
    shape = shape_of(np.r_[1.0, v], kinds, np.ones(41), targets)
    assert (shape.word, shape.teeth.sublayers, shape.teeth.renorm) == ("saw-tooth", 2, False)
    v = np.maximum(1.0, 1 + 0.3 * (K - 10))
    shape = shape_of(np.r_[1.0, v], kinds, np.ones(41), [None, *["stream"] * 10, *[None] * 30])
    assert (shape.word, shape.held, shape.start) == ("linear", "norm", 11)


def test_theory_decides_between_words_that_both_fit():
    """A line with noise: alone it may be called a power; theory's word stays if it fits."""
    generator = np.random.default_rng(0)
    prior = named(1.0 * K)
    words = {False: [], True: []}
    noise = np.r_[0, 0.8 * K**0.5 / 3]
    for _ in range(100):
        v = K + 0.8 * generator.standard_normal(40).cumsum() * np.sqrt(K) / 6
        for known in words:
            shape = named(v, noise=noise, prior=prior if known else None)
            words[known].append(shape.word)
    right = {known: np.mean([word == "linear" for word in found]) for known, found in words.items()}
    assert right[True] > right[False]
    assert named(0.02 * K**2.0, prior=prior).word == "power"  # and not where it doesn't fit


def test_a_level_behind_no_shape():
    """As HybridNorm's: one step, and then 18 but for chance. Where that begins is found."""
    noisy = 18 + 0.35 * np.sin(K * 2.3)
    noisy[0] = 0.3
    assert (named(noisy).word, named(noisy).level) == ("none", 2)
    noisy[:9] = 0.3, 2.5, 4.4, 5.4, 7.4, 9.9, 12, 13, 15
    assert named(noisy).level == 10  # the MLP of the fifth block
    assert named(np.where(K < 25, noisy, 50 + 20 * np.sin(K / 4))).level is None
    assert named(CURVES["none"]).level is None
    assert named(CURVES["saturating"]).level is None  # it has a word


def test_chance_names_nothing():
    """Where seeds differ more than the curve moves, no word is right, least of all "constant"."""
    v = np.r_[np.ones(30), 10.0 ** np.arange(10)]
    assert named(v, noise=np.r_[0, v]).word == "none"


def test_too_few_rows():
    assert named([1.0, 2.0, 3.0], PLAIN[:4]).word == "unknown"
    assert named(np.zeros(40)).word == "constant"
    assert named(np.r_[np.ones(39), np.inf]).word == "unknown"
