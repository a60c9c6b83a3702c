"""Element-wise norms in theory: closed forms, double integrals, simulations, and a negative control."""

import math

import numpy as np
import pytest
from conftest import STANDARD_ERRORS, tiny
from scipy.special import erf
from test_mean_field import SHAPE, column, departures, simulated

from simlab.experiment import prepare, run
from simlab.theory.mean_field import predict, squash, unpredictable
from simlab.theory.mean_field.branch import Input
from simlab.theory.mean_field.squash import Squash

FUNCTIONS = {
    "dyt": (np.tanh, lambda z: 1 / np.cosh(z) ** 2),
    "derf": (erf, lambda z: 2 / math.sqrt(math.pi) * np.exp(-z * z)),
}


def double_integral(f, g, kernel):
    """E f(x)·g(y) of two Gaussians, by the trapezoidal rule."""
    z = np.linspace(-9, 9, 1201)
    weights = np.exp(-z * z / 2) / np.exp(-z * z / 2).sum()
    (a, c), (_, b) = kernel
    x, y = math.sqrt(a) * z[:, None], (c * z[:, None] + math.sqrt(a * b - c * c) * z) / math.sqrt(a)
    return weights @ (f(x) * g(y)) @ weights


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("alpha", [0.2, 2.0, 8.0])
@pytest.mark.parametrize("rho", [-0.4, 0.3, 0.98])
def test_kernel_and_slopes(kind, alpha, rho):
    """Against double integrals, also where tanh is nearly a sign and where tokens are nearly alike."""
    phi, slope = FUNCTIONS[kind]
    kernel = np.array([[1.5, rho * math.sqrt(1.5)], [rho * math.sqrt(1.5), 1.0]])
    norm = Squash(kind, alpha, 0.7)
    pair = norm.pairs(kernel)

    def y(x):
        return 0.7 * phi(alpha * x)

    def dy(x):
        return 0.7 * alpha * slope(alpha * x)

    assert pair.kernel[0, 1] == pytest.approx(double_integral(y, y, kernel), rel=1e-6)
    assert pair.slope[0, 1] == pytest.approx(double_integral(dy, dy, kernel), rel=1e-6)
    linear = double_integral(lambda x: dy(x) + 0 * x, lambda x: 1 + 0 * x, kernel)
    assert norm.linear(kernel)[0] == pytest.approx(linear, rel=1e-6)
    step = 1e-5

    def moved(change):  # by differences
        ends = (norm.pairs(kernel + sign * step * np.array(change)) for sign in (1, -1))
        above, below = ends
        return ((above.kernel - below.kernel) / (2 * step))[0, 1], (
            (above.slope - below.slope) / (2 * step)
        )[0, 1]

    assert pair.tilt[0, 1] == pytest.approx(moved([[1, 0], [0, 0]])[0], rel=1e-5)
    assert pair.tilt[1, 0] == pytest.approx(moved([[0, 0], [0, 1]])[0], rel=1e-5)
    assert pair.curvature[0, 1] == pytest.approx(moved([[0, 1], [1, 0]])[1], rel=1e-4)


def test_derf_in_closed_form():
    """H_ii = (2/π) asin(2α²m/(1 + 2α²m)), and 0.5·(2/π)·asin … of unlike tokens (Williams 1998)."""
    m, alpha = np.array([0.1, 1.0, 30.0]), 0.5
    kernel = np.diag(m) + 0.05 - np.diag(np.full(3, 0.05))
    h = Squash("derf", alpha, 1.0).pairs(kernel).kernel
    a = 2 * alpha**2 * m
    np.testing.assert_allclose(h.diagonal(), 2 / math.pi * np.arcsin(a / (1 + a)), rtol=1e-12)
    cross = 2 * alpha**2 * 0.05 / math.sqrt((1 + a[0]) * (1 + a[1]))
    assert h[0, 1] == pytest.approx(2 / math.pi * math.asin(cross), rel=1e-12)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_noise_between_draws(kind):
    """Of a few Gaussian vectors, each row of K̂ and Ĥ by draws: means, and Ĥ's variance given K̂."""
    rng, width, draws = np.random.default_rng(0), 64, 4000
    kernel = np.array([[2.0, 0.9], [0.9, 1.0]])
    x = np.linalg.cholesky(kernel) @ rng.standard_normal((draws, 2, width))
    y = FUNCTIONS[kind][0](1.2 * x)
    grams = [np.einsum("sid,sjd->sij", v, v) / width for v in (x, y)]
    square = 2 * kernel**2 / width
    ends = np.outer(kernel.diagonal(), kernel.diagonal())
    rho = kernel / np.sqrt(ends)
    tau = (1 - rho**2) ** 2 / width
    branch = Squash(kind, 1.2, 1.0)(Input(kernel, square, tau, False), width)
    mean, error = grams[1].mean(0), grams[1].std(0) / math.sqrt(draws)
    # The second-order terms of off-diagonals are those of ρ̂ alone.
    assert (np.abs(branch.kernel - mean) < STANDARD_ERRORS * error + 2e-3 * mean).all()
    # A functional's std: what it has of its own, and what it gets from K̂.
    for functional in ([[0.5, 0], [0, 0.5]], [[0, 0.5], [0.5, 0]], [[1.0, 0.2], [0.2, -0.3]]):
        a = np.array([functional])
        pulled = branch.pull(a)
        product = pulled[0] @ kernel
        variance = branch.covariance(a)[0, 0] + 2 / width * np.trace(product @ product)
        measured = np.einsum("ij,sij->s", a[0], grams[1]).var()
        # 4000 draws: 5 × 2.2 %. Off the diagonal what isn't linear in x counts as Gaussian.
        rough = 0.0 if functional[0][1] == 0 else 0.1
        assert variance == pytest.approx(measured, rel=0.12 + rough)


SETTINGS = {
    "dyt": ("norm=dyt", "norm.mlp_alpha=0.8", "init=fan_in"),
    "derf": ("norm=derf", "init=fan_in", "model.qk_norm=none"),
    "saturated": ("norm=dyt", "init=fan_in", "model.embedding_scale=6", "norm.mlp_alpha=1"),
    "lns": ("norm=derf", "norm.placement=lns", "init=fan_in", "norm.gain=0.7"),
    "parallel": ("norm=dyt", "norm.placement=parallel", "init=fan_in", "model.mlp=gelu"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_means_and_bands_of_simulations(name):
    """Weightless: every column within the seeds' noise and OWN; the band as of other norms."""
    config, mean, sem, std = simulated(SETTINGS[name])
    assert max(departures(config, mean, sem).values()) <= 0
    ratio = column(predict_rows(config), "band") / std["mean_square"]
    assert ((ratio > 0.67) & (ratio < 1.5)).all()


def predict_rows(config):
    return predict(config.shape, config.init, prepare(config).tokens, gradients=True).rows


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_dense_at_another_width(kind):
    config = tiny(
        *SHAPE, "width=64", f"norm={kind}", "init=fan_in", "gradients=true", "seeds=40",
        "norm.mlp_alpha=0.7", "init.truncate=null",
    )  # fmt: skip
    rows = run(config).curve.groupby(["sublayer", "kind"], sort=False)
    mean, sem = rows.mean(numeric_only=True), rows.sem(numeric_only=True)
    for name, own in (("mean_square", 0.02), ("gradient_rms", 0.06)):
        gap = np.abs(column(predict_rows(config), name) - mean[name])
        assert (gap < own * mean[name] + STANDARD_ERRORS * sem[name]).all()
    # The step's law: m' = m + B, and B grows as the stream does.
    added = mean["branch_mean_square"].to_numpy()
    assert (added[3::2] > added[1:-2:2]).all()


def test_a_wrong_function_departs(monkeypatch):
    """The negative control: theory that takes tanh for erf, or α for 0.7 times it."""
    config, mean, sem, _ = simulated(SETTINGS["dyt"])
    for mixture in (((1.0, 1.0),), ((0.6, 1.0),)):
        with monkeypatch.context() as patch:
            patch.setitem(squash.MIXTURES, "dyt", mixture)
            beyond = departures(config, mean, sem)
        assert beyond["branch_raw_mean_square"] > 0


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["norm.placement=post"], "theory has norm.type=derf only where sublayers alone get"),
        (["norm.placement=mhc"], "theory has norm.type=derf in no norm.placement=mhc"),
        (["norm.placement=reordered"], "only where sublayers alone get"),
        (["norm.placement=keel"], "only where sublayers alone get"),
        (["norm.placement=hybrid_norm", "+norm.qkv_norm=true"], "only where sublayers alone get"),
        (["norm.shift=0.1"], "theory has norm.shift=0 alone; this model's is 0.1"),
        (["model.experts=4", "model.experts_per_token=2"], "theory has experts"),
        (["norm.placement=parallel"], None),
        (["norm.placement=residual_scale"], None),
        (["norm.placement=none"], None),
    ],
)
def test_where_theory_has_them(overrides, says):
    config = tiny("norm=derf", *overrides)
    found = unpredictable(config.shape, prepare(config).tokens)
    assert (found is None) if says is None else says in found
