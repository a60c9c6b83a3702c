"""Theory's averages over mHC's coefficients, against draws and against simulation."""

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import STANDARD_ERRORS, tiny
from mutations import applied
from mutations.mixing import MIXING

from simlab.experiment import prepare, run
from simlab.schemes.placement import at, placement_of
from simlab.schemes.streams import doubly_stochastic
from simlab.theory.mean_field import mixing, mixing_gradient, predict
from simlab.theory.mean_field.kernels import KernelStep, State
from simlab.theory.mean_field.parts import LowRankBranch

# Beyond the seeds' noise, at logits of std 2.5; cosines have more than other placements'.
OWN = {"mean_square": 0.02, "norm": 0.01, "mean_vector_norm": 0.03, "token_cosine": 0.06}
OWN |= {"branch_raw_mean_square": 0.03, "branch_mean_square": 0.03}
OWN |= {"gradient_rms": 0.02, "gradient_norm": 0.08}
SHAPE = (
    "depth=4", "heads=4", "kv_heads=2", "d_ff=320", "vocab_size=30", "inputs.batch=2",
    "inputs.length=8", "init=fan_in",
)  # fmt: skip


@cache
def simulated(*overrides):
    # Dense seeds take a tenth of a second each. A std of 30 draws is off by 13 %, of 60 by 9 %.
    seeds = 30 if "engine=dense" in overrides else 60
    config = tiny(*SHAPE, *overrides, f"seeds={seeds}", "gradients=true")
    return config, run(config).curve.groupby(["sublayer", "kind"], sort=False)


def compared(*overrides):
    """By column how far theory is off, over OWN and the seeds' noise; theory's band over the seeds'."""
    config, measured = simulated(*overrides)
    rows = predict(config.shape, config.init, prepare(config).tokens, gradients=True).rows

    def column(name):
        return np.array([getattr(row, name) for row in rows])

    beyond = {}
    for name, own in OWN.items():
        mean, error = measured[name].mean().to_numpy(), measured[name].sem().to_numpy()
        bound = own * np.abs(mean) + STANDARD_ERRORS * error + (0 if "grad" in name else 1e-5)
        beyond[name] = np.nanmax(np.abs(column(name) - mean)[1:] / bound[1:])
    return beyond, column("band") / measured["mean_square"].std().to_numpy()


CASES = [
    ("norm=mhc", "norm.mix_std=0.11", "width=128", "engine=weightless"),
    ("norm=mhc", "norm.mix_std=0.16", "width=64", "engine=dense"),
    ("norm=mhc", "norm.mix_std=0.11", "width=128", "engine=weightless", "norm.mix_streams=false"),
    ("norm=deepseek_v4", "norm.mix_std=0.05", "width=128", "engine=weightless"),
    ("norm=mhc_paper", "width=128", "engine=dense"),
    ("norm=hy_v4", "width=64", "engine=weightless"),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_theory_of_simulations(case):
    """At two widths, by both engines: means, and the band within a third of the seeds' std."""
    beyond, ratio = compared(*case)
    assert max(beyond.values()) <= 1, beyond
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


@pytest.mark.slow
def test_gradients_go_through_the_coefficients(monkeypatch):
    """Behind the first block the rms is theory's to chance, and without that part it is 8 % more."""
    config, measured = simulated(*CASES[0])
    rms = measured["gradient_rms"]

    def off():
        rows = predict(config.shape, config.init, prepare(config).tokens, gradients=True).rows
        return (rows[2].gradient_rms - rms.mean().iloc[2]) / rms.sem().iloc[2]

    assert abs(off()) < STANDARD_ERRORS
    monkeypatch.setattr(
        mixing_gradient, "through_coefficients", lambda by, *_: np.zeros_like(by.apart)
    )
    assert off() < -1.4 * STANDARD_ERRORS


N, WIDTH, PAIRS, STD, RHO = 4, 256, 500, 2.5, 0.6
APART = {"step": 0.9, "sum": 0.0}  # Γ' by case


@cache
def by_autograd(of, seed):
    """P and Γ of a step or of a head, of every pair of tokens (PAIRS, 2, 2).

    The streams' mean and what sets them apart have mean squares 1 and 0.8, gradients behind a step
    likewise 1.3/n² and 0.9 (0 of ``sum``), and behind a head, which reads Σ w_j x_j, 1.3; the sublayer
    is linear.
    """
    generator = torch.Generator().manual_seed(seed)

    def pairs(square, *streams):
        z = torch.randn(*streams, 2, PAIRS, WIDTH, generator=generator)
        z = torch.stack([z[..., 0, :, :], RHO * z[..., 0, :, :] + 0.8 * z[..., 1, :, :]], -3)
        return (z - z.mean(0) if streams else z) * square**0.5

    def normed(x):
        return x / x.pow(2).mean(-1, keepdim=True).sqrt()

    x = (pairs(1.0) + pairs(0.8, N)).requires_grad_()
    std = STD / (N * WIDTH) ** 0.5
    u = normed(torch.cat(tuple(x), -1))
    u = u @ torch.randn(N * WIDTH, N * (N + 2), generator=generator) * std
    p = u[..., :N].sigmoid()
    read = torch.einsum("...j,j...d->...d", p, x)
    if of == "head":
        out, g = read / p.sum(-1, keepdim=True), pairs(1.3)
    else:
        g = pairs(1.3) / N + pairs(APART[of], N)
        c = doubly_stochastic(u[..., 2 * N :].unflatten(-1, (N, N)).softmax(-1))
        F = normed(read) @ torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
        out = torch.einsum("...jt,j...d->t...d", c, x)
        out = out + torch.einsum("...t,...d->t...d", 2 * u[..., N : 2 * N].sigmoid(), F)
    (back,) = torch.autograd.grad((g * out).sum(), x)
    apart = back - back.mean(0)
    total = torch.einsum("ipd,jpd->pij", back.sum(0), back.sum(0)) / WIDTH
    return total, torch.einsum("tipd,tjpd->pij", apart, apart) / WIDTH / (N - 1)


def by_theory(of):
    """Its P and Γ."""
    both = np.array([[1, RHO], [RHO, 1]])
    std = f"norm.mix_std={STD / (N * WIDTH) ** 0.5}"
    model = tiny("norm=deepseek_v4", f"width={WIDTH}", "heads=4", std).shape
    nothing = np.zeros((2, 2))
    step = KernelStep(State(both, nothing, nothing, copies=N, apart=0.8 * both), WIDTH, 1e-6, 1.0)
    mix = mixing.mixing(SimpleNamespace(model=model), {}, step)
    if of == "head":
        placement_of(model).finish(step.state, step.norm, model, gates=mix)
        found = mixing_gradient.pull_read(step, 1.3 * both, nothing[0])
        return found.total, found.apart
    sublayer = step.feed(lambda h: LowRankBranch(h, 1.0, 10**9))
    at(model, 0, "mlp").step(step.state, sublayer, step.add, norm_in=step.norm, mix=mix)
    after = mixing_gradient.StreamsGradient(1.3 * both, nothing[0], APART[of] * both, nothing[0])
    found = mixing_gradient.pull_mixed(step, after)
    return found.total, found.apart


def held_to_autograd(of):
    """Asserts that theory's P and Γ are autograd's, of a step or of a head."""
    samples = [by_autograd(of, seed) for seed in range(3)]
    for some, found in zip(zip(*samples, strict=True), by_theory(of), strict=True):
        measured = torch.cat(some).numpy()
        # W and the sublayer are common to a sample's pairs, and averages of ``mixing`` are by draws.
        error = 0.02 * measured.mean(0)[0, 0] + measured.std(0) / len(measured) ** 0.5
        assert (abs(measured.mean(0) - found) < STANDARD_ERRORS * error).all(), (
            found,
            measured.mean(0),
        )


@pytest.mark.parametrize("of", [*APART, "head"])
def test_one_step_by_autograd(of):
    """Gradients that don't know of the streams, back through a step or a head: their sum and rest."""
    held_to_autograd(of)


@pytest.mark.parametrize("mutation", MIXING, ids=lambda mutation: mutation.name)
def test_every_mistake_in_the_gradient_is_caught(mutation):
    """By the test that its record names."""
    with applied(mutation), pytest.raises(AssertionError):
        held_to_autograd(mutation.setting)


def test_slopes_are_those_of_the_averages():
    """κ̇ and Ṙ, by Price's theorem, against the differences of κ and R."""
    of = (4, 1.0, 0.3, True)
    slopes = [np.interp(0.3, mixing.NODES, v) for v in mixing._slopes(*of)]
    ends = [[np.interp(rho, mixing.GRID, v) for v in mixing._drawn(*of)] for rho in (0.1, 0.5)]
    np.testing.assert_allclose(slopes, np.subtract(*ends[::-1]) / 0.4, rtol=0.06)


def test_gradients_that_rare_coefficients_carry_are_refused():
    """At a large std of the logits, beside an embedding that the first write buries."""
    for extra, refused in ((), False), (("init.embedding_std=0.02",), True):
        config = tiny(*SHAPE, "norm=mhc", "width=64", "norm.mix_std=0.16", *extra)
        found = predict(config.shape, config.init, prepare(config).tokens, gradients=True)
        assert ("rare mixing coefficients" in (found.no_gradient or "")) == refused
        assert np.isnan(found.rows[-1].gradient_rms) == refused
