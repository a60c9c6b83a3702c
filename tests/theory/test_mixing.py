"""Theory's averages over mHC's coefficients, against draws and against simulation."""

from functools import cache

import numpy as np
import pytest
import torch
from conftest import STANDARD_ERRORS, tiny

from simlab.experiment import prepare, run
from simlab.schemes.streams import doubly_stochastic
from simlab.theory.mean_field import mixing, predict

# Beyond the seeds' noise, at logits of std 2.5; cosines have more than other placements'.
OWN = {"mean_square": 0.02, "norm": 0.01, "mean_vector_norm": 0.03, "token_cosine": 0.06}
OWN |= {"branch_raw_mean_square": 0.03, "branch_mean_square": 0.03}
SHAPE = (
    "depth=4", "heads=4", "kv_heads=2", "d_ff=320", "vocab_size=30", "inputs.batch=2",
    "inputs.length=8", "init=fan_in",
)  # fmt: skip


@cache
def simulated(*overrides):
    config = tiny(*SHAPE, *overrides, "seeds=60")
    return config, run(config).curve.groupby(["sublayer", "kind"], sort=False)


def compared(*overrides):
    """By column how far theory is beyond OWN and the seeds' noise; theory's band over the seeds'."""
    config, measured = simulated(*overrides)
    rows = predict(config.shape, config.init, prepare(config).tokens).rows

    def column(name):
        return np.array([getattr(row, name) for row in rows])

    beyond = {}
    for name, own in OWN.items():
        mean, error = measured[name].mean().to_numpy(), measured[name].sem().to_numpy()
        bound = own * np.abs(mean) + STANDARD_ERRORS * error + 1e-5
        beyond[name] = np.nanmax(np.abs(column(name) - mean)[1:] - bound[1:])
    return beyond, column("band") / measured["mean_square"].std().to_numpy()


CASES = [
    ("norm=mhc", "norm.mix_std=0.11", "width=128", "engine=weightless"),
    ("norm=mhc", "norm.mix_std=0.16", "width=64", "engine=dense"),
    ("norm=mhc", "norm.mix_std=0.11", "width=128", "engine=weightless", "norm.mix_streams=false"),
    ("norm=mhc_paper", "width=128", "engine=dense"),
    ("norm=hy_v4", "width=64", "engine=weightless"),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_theory_of_simulations(case):
    """At two widths, by both engines: means, and the band within a third of the seeds' std."""
    beyond, ratio = compared(*case)
    assert max(beyond.values()) <= 0, beyond
    assert ((ratio > 0.67) & (ratio < 1.5)).all()


def test_branches_are_written_with_their_gates():
    """Of the mean stream q̄²·B for B: E q̄² = 1 + 4 Var σ(u)/n by quadrature, which isn't 1."""
    config, measured = simulated(*CASES[0])
    sums = measured.obj.groupby("seed")[["branch_mean_square", "branch_raw_mean_square"]].sum()
    ratio = sums["branch_mean_square"] / sums["branch_raw_mean_square"]
    z, weights = np.polynomial.hermite_e.hermegauss(80)
    std = 0.11 * (4 * config.shape.width) ** 0.5
    variance = ((1 / (1 + np.exp(-std * z)) - 0.5) ** 2) @ weights / weights.sum()
    error = STANDARD_ERRORS * ratio.sem()
    assert ratio.mean() == pytest.approx(1 + variance, abs=error)
    assert ratio.mean() > 1 + error
    row = predict(config.shape, config.init, prepare(config).tokens).rows[-1]
    held = row.branch_mean_square / row.branch_raw_mean_square
    assert held == pytest.approx(1 + variance, abs=1e-3)


@pytest.mark.parametrize("rho", [1.0, 0.5, 0.0])
def test_averages_by_draws(rho):
    """κ, R and Cov(σ, σ'), by torch's own softmax, Sinkhorn iteration and sigmoid."""
    n, std, count = 4, 2.5, 20_000
    z, fresh = torch.randn(2, count, n + n * n, generator=torch.Generator().manual_seed(0))
    pair = (std * z, std * (rho * z + (1 - rho**2) ** 0.5 * fresh))
    p = [u[:, :n].sigmoid() for u in pair]
    c = [doubly_stochastic(u[:, n:].unflatten(-1, (n, n)).softmax(-1)) for u in pair]
    w = [x / x.sum(1, keepdim=True) for x in p]
    kept = ((c[0] * c[1]).sum((1, 2)).mean() - 1) / (n - 1)
    read = (w[0] * w[1]).sum(1).mean() - 1 / n
    ours = [np.interp(rho, mixing.GRID, v) for v in mixing._drawn(n, std, 0.0, True)]
    np.testing.assert_allclose(ours, [kept, read], atol=0.012)
    products = mixing.expand(mixing.at_nodes(mixing.sigmoid, np.array([std**2] * 2)))
    (both,) = products.kernel(np.array([[1.0, rho], [rho, 1.0]]))
    assert both[0, 1] == pytest.approx(float((p[0] * p[1]).mean()), abs=0.003)


def test_gradients_of_large_logits_are_refused():
    """Those through the coefficients aren't predicted; of the paper's init they are nothing."""
    for norm, refused in (
        ("mhc", True),
        ("deepseek_v4", True),
        ("mhc_paper", False),
        ("hy_v4", False),
    ):
        config = tiny(*SHAPE, f"norm={norm}", "width=64")
        found = predict(config.shape, config.init, prepare(config).tokens, gradients=True)
        assert bool(found.no_gradient) == refused
        assert np.isnan(found.rows[-1].gradient_rms) == refused
