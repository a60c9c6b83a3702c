"""The mean-field recursion against closed forms, against simulation, and against its own negatives."""

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import STANDARD_ERRORS, ids_of, placed, tiny
from scipy.integrate import quad
from threadpoolctl import threadpool_info, threadpool_limits

from simlab.experiment import prepare, run
from simlab.schemes.placement import PLACEMENTS
from simlab.schemes.scheme import Scheme
from simlab.theory.mean_field import gradient, predict, recursion, unpredictable
from simlab.theory.mean_field.averages import DEGREE, at_nodes, expand, gelu, saturation, silu
from simlab.theory.mean_field.branch import Input
from simlab.theory.mean_field.kernels import KernelStep, State, state_of
from simlab.theory.mean_field.mlp import UNITS, Unit

SHAPE = [
    "depth=3", "width=128", "heads=4", "kv_heads=2", "d_ff=320", "vocab_size=30",
    "inputs.batch=2", "inputs.length=8",
]  # fmt: skip
# Beyond the seeds' noise: the drawn heads' own (0.1 % of v, 1 % of cosines), and terms of order 1/d².
OWN = {
    "mean_square": 0.02, "norm": 0.01, "mean_vector_norm": 0.02, "token_cosine": 0.05,
    "read_mean_square": 0.02, "branch_raw_mean_square": 0.04, "eps_factor": 0.02,
    "gradient_rms": 0.06, "gradient_norm": 0.06,
}  # fmt: skip


def theory(config, **options):
    tokens = prepare(config).tokens
    return predict(config.shape, config.init, tokens, **options).rows


def test_products_on_one_thread(monkeypatch):
    """More would wait busily for each other."""
    seen = []

    def counting(*args):
        seen.extend(lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas")
        return steps(*args)

    steps = recursion._steps
    monkeypatch.setattr(recursion, "_steps", counting)
    with threadpool_limits(2, user_api="blas"):
        theory(tiny(*SHAPE))
        assert {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"} == {2}
    assert set(seen) == {1}


def column(rows, name):
    return np.array([getattr(row, name) for row in rows])


@cache
def simulated(overrides, seeds=50):
    config = tiny(*SHAPE, "engine=weightless", "gradients=true", f"seeds={seeds}", *overrides)
    rows = run(config).curve.groupby(["sublayer", "kind"], sort=False)
    return (
        config,
        rows.mean(numeric_only=True),
        rows.sem(numeric_only=True),
        rows.std(numeric_only=True),
    )


def departures(config, mean, sem, **options):
    """Of every column: by how much |theory − mean| is beyond OWN and the seeds' noise; ≤ 0 is right."""
    rows = theory(config, gradients=True, **options)
    beyond = {}
    for name, own in OWN.items():
        predicted, measured, error = (column(rows, name), mean[name], sem[name])
        bound = own * np.abs(measured) + STANDARD_ERRORS * error + 1e-5
        beyond[name] = np.nanmax(np.abs(predicted - measured) - bound)
    return beyond


def test_averages_of_silu():
    """E silu(s z)² by adaptive quadrature at s = 1 and 3, and s²/4 + 3s⁴/16 for small s."""
    square = expand(at_nodes(silu, np.array([1.0, 9.0, 1e-4]))).square
    np.testing.assert_allclose(square[:2], [0.355776, 4.24941], rtol=2e-6)
    assert square[2] == pytest.approx(1e-4 / 4 + 3e-8 / 16, rel=1e-6)


def test_averages_of_squared_relu():
    """E φ² = 3a²/2, E slope² = 2a, and two tokens' by the arc-cosine kernel of degree 2.

    Cho & Saul, NeurIPS 2009, eq. 6.
    """
    a, unit = np.array([0.7, 2.0]), UNITS["relu2"]
    values, slopes = (expand(at_nodes(phi, a)) for phi in (unit.phi, unit.slope))
    np.testing.assert_allclose(values.square, 1.5 * a**2, rtol=1e-6)
    np.testing.assert_allclose(slopes.square, 2 * a, rtol=1e-6)
    angle = math.acos(0.4)
    third = 3 * math.sin(angle) * math.cos(angle)
    third += (math.pi - angle) * (1 + 2 * math.cos(angle) ** 2)
    rho = np.array([[1.0, 0.4], [0.4, 1.0]])
    assert values.kernel(rho)[0][0, 1] == pytest.approx(1.4 * third / (2 * math.pi), rel=1e-5)


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_slopes_of_large_variances(name):
    """E φ'(√a z)² at a = 100, where φ' is nearly a step, by adaptive quadrature (1e-9)."""
    slope, a = UNITS[name].slope, 100.0
    density = math.sqrt(2 * math.pi * a)
    edges = (-120.0, -12.0, 0.0, 12.0, 120.0)
    parts = [
        quad(lambda u: slope(u) ** 2 * math.exp(-u * u / (2 * a)) / density, *ends, epsabs=1e-11)[0]
        for ends in pairwise(edges)
    ]
    assert expand(at_nodes(slope, np.array([a]))).square[0] == pytest.approx(sum(parts), rel=1e-8)


@pytest.mark.parametrize("phi", [silu, gelu])
@pytest.mark.parametrize("rho", [-0.7, 0.0, 0.4, 0.95])
def test_kernel_of_an_activation(phi, rho):
    """The Hermite series against the double integral, and its derivatives against differences."""
    a = np.array([0.3, 4.0])
    expansion = expand(at_nodes(phi, a))
    parts = expansion.kernel(np.array([[1.0, rho], [rho, 1.0]]), extra=1, derivatives=2)
    value, first, second = (part[0, 1] for part in parts)
    z, weights = np.polynomial.hermite_e.hermegauss(80)
    weights /= weights.sum()
    other = rho * z[:, None] + math.sqrt(1 - rho**2) * z
    products = phi(math.sqrt(a[0]) * z)[:, None] * phi(math.sqrt(a[1]) * other)
    assert value == pytest.approx(rho * (weights @ products @ weights), abs=2e-6)
    step = 1e-4
    near = [expansion.kernel(np.full((2, 2), rho + d), extra=1)[0][0, 1] for d in (-step, 0, step)]
    assert first == pytest.approx((near[2] - near[0]) / (2 * step), abs=1e-6)
    assert second == pytest.approx((near[2] - 2 * near[1] + near[0]) / step**2, abs=1e-5)


def test_hermite_series_is_complete_enough():
    """The share of E φ² beyond 24 terms: OLMo-2-7B's gates have a variance of 1.6 per mean square of
    the stream, which is 65 at its end.
    """
    expansion = expand(at_nodes(silu, np.array([1.6, 104.0])))
    assert expansion.coefficients.shape[1] == DEGREE + 1
    rest = 1 - (expansion.coefficients**2).sum(1) / expansion.square
    assert rest[0] < 1e-8
    assert rest[1] < 1e-3


def test_saturation():
    m = np.array([1e-6, 1.0])
    np.testing.assert_allclose(saturation(m, np.zeros(2), 1e-6), m / (m + 1e-6), rtol=1e-12)
    # E m/(m + eps) of a lognormal m, by a million draws.
    draws = np.exp(0.5 * np.random.default_rng(0).standard_normal(1_000_000) - 0.125)
    expected = (draws / (draws + 1)).mean()
    spread = np.array([math.expm1(0.25)])
    assert saturation(np.array([1.0]), spread, 1.0)[0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("norm", ["reordered", "peri", "swin_renorm", "post", "deepnorm"])
def test_exact_laws(norm):
    """v_k = v_0 + k where branches are normed, 1 after a norm of the stream, at any width."""
    config = tiny(*placed(norm), "norm.eps=1e-12", "init.std=0.3", "init.truncate=null")
    rows = theory(config)
    expected = []
    for row in rows:
        if row.kind == "embedding":
            expected.append(0.3**2)
        elif row.kind == "renorm" or norm in ("post", "deepnorm"):
            expected.append(1.0)
        else:
            expected.append(expected[-1] + 1)
    np.testing.assert_allclose(column(rows, "mean_square"), expected, rtol=1e-6)
    if norm in ("reordered", "peri"):
        np.testing.assert_allclose(column(rows, "branch_mean_square")[1:], 1, rtol=1e-6)


SETTINGS = [
    *[tuple(placed(norm)) for norm in ("reordered", "mix_ln", "none")],
    ("norm=pre_post", "model.mlp=gelu", "model.tied=true", "vocab_size=300"),
    ("norm=peri", "model.mlp=geglu", "norm.type=layer", "norm.gain=0.7"),
    ("norm=pre", "init=mitchell", "model.window=4", "model.qk_norm=per_head"),
    ("norm=lns", "init=fan_in", "model.qk_norm=none"),
    ("norm=peri", "init=mitchell", "norm.type=rms_plus_one", "model.mlp=geglu", "model.qk_norm=none",
     "model.embedding_scale=3", "model.query_pre_attn_scalar=2", "model.attention_softcap=1",
     "model.window=4", "model.full_every=2", "model.rope_local_theta=30", "model.rope_linear=8"),
    ("norm=parallel", "init=fan_in", "model.mlp=gelu_exact", "model.rotary=0.5"),
    (*placed("scaled"), "init=fan_in"), (*placed("nanochat"),), ("norm=minimax", "init=fan_in"),
    ("norm=hybrid_norm", "init=fan_in"), ("norm=hybrid_norm_star",),
    ("norm=gemma3n", "init=fan_in"), ("norm=gemma3n", "norm.laurel_rank=4"),
    ("norm=siamese_norm", "init=fan_in"), ("norm=siamese_norm", "width=256", "norm.type=layer"),
    (*placed("attn_res"), "init=fan_in"), ("norm=attn_res", "width=256", "norm.eps=1e-3"),
    ("norm=residual_dual", "init=fan_in"), ("norm=residual_dual", "width=256", "norm.type=layer"),
    ("norm=ngpt", "init=ngpt"), ("norm=ngpt", "norm.alpha=0.3", "model.mlp=gelu"),
    ("norm=pre", "init=fan_in", "model.mlp=relu2"),
    ("norm=keel", "init=fan_in"), ("norm=complete_p", "init=fan_in"),
    ("norm=gemma3n_altup", "init=fan_in"),
    ("norm=deepseek_v4", "norm.mix_scale=0.1", "init=fan_in"),
    ("norm=pre", "init=gpt2", "model.qk_norm=none", "model.rotary=0", "model.positions=64",
     "norm.type=layer_bias", "model.mlp=gelu", "model.bias=true"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("overrides", SETTINGS, ids=" ".join)
def test_means_and_bands_of_simulations(overrides):
    """Every column within the seeds' noise and OWN; the band within a third of the seeds' std."""
    config, mean, sem, std = simulated(overrides)
    assert max(departures(config, mean, sem).values()) <= 0
    ratio = column(theory(config), "band") / std["mean_square"]
    # Right after a norm of the stream the engine's float32 rounds by more than the seeds differ.
    pinned = std["mean_square"] < 1e-4 * mean["mean_square"]
    # A std of 50 draws is off by 10 % itself.
    assert ((ratio > 0.67) & (ratio < 1.5) | pinned).all()


def test_a_wrong_recursion_departs(monkeypatch):
    """The negative control: all is well, until the MLP's scale has a factor of 1.2."""
    import simlab.theory.mean_field.mlp as module

    assert max(departures(*simulated(("norm=pre", "init=fan_in"))[:3]).values()) <= 0
    original = module.MLPKernel.scale.fget
    monkeypatch.setattr(module.MLPKernel, "scale", property(lambda self: 1.2 * original(self)))
    beyond = departures(*simulated(("norm=pre", "init=fan_in"))[:3])
    assert beyond["mean_square"] > 0
    assert beyond["branch_raw_mean_square"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("engine", ["weightless", "dense"])
@pytest.mark.parametrize("norm", ["none", "lns", "parallel", "hybrid_norm", "nanochat", "gemma3n"])
def test_what_sublayers_read(norm, engine, width):
    """``read_mean_square`` of theory and of simulations; another placement's departs."""
    model = [*SHAPE, f"width={width}", "init=fan_in", "norm.eps=0.1"]
    config = tiny(*model, *placed(norm), f"engine={engine}", "seeds=20")
    groups = run(config).curve.groupby(["sublayer", "kind"], sort=False)["read_mean_square"]
    mean, error = groups.mean().to_numpy()[1:], groups.sem().to_numpy()[1:]

    def beyond(predicted):
        bound = OWN["read_mean_square"] * mean + STANDARD_ERRORS * error
        says = column(predicted, "read_mean_square")[1:]  # without norms the curve ends early
        return np.max(np.abs(says - mean[: len(says)]) - bound[: len(says)])

    assert beyond(theory(config)) <= 0
    other = "norm=lns" if norm != "lns" else "norm=pre"
    assert beyond(theory(tiny(*model, other))) > 0


def test_what_the_final_norm_gets_is_in_the_gradient():
    """x − 0.6·x_mid: without the second term theory's gradient departs."""
    config, mean, sem, _ = simulated((*placed("scaled"), "init=fan_in"))
    norm = replace(config.shape.norm, subtract_middle=None)
    other = replace(config, model=replace(config.shape, norm=norm))
    assert departures(config, mean, sem)["gradient_rms"] <= 0
    beyond = departures(other, mean, sem)
    assert beyond["gradient_rms"] > 0 >= beyond["mean_square"]


@pytest.mark.parametrize("norm", ["ngpt", "keel", "deepnorm"])
def test_norms_of_one_direction_take_it_out_once(norm, monkeypatch):
    """Sixteen norms of a stream that hardly turns; by 1/d each the gradient would be 16/2d low."""
    overrides = "depth=8", "width=32", "heads=2", "kv_heads=2", "d_ff=96", f"norm={norm}"
    config, mean, sem, _ = simulated((*overrides, "vocab_size=300"), seeds=30)
    measured, error = mean["gradient_rms"].to_numpy(), sem["gradient_rms"].to_numpy()

    def off():
        return column(theory(config, gradients=True), "gradient_rms") / measured - 1

    assert (np.abs(off()) < 0.015 + STANDARD_ERRORS * error / measured).all()
    monkeypatch.setattr(gradient, "_cosine", lambda step, one, other: np.zeros(16))
    assert off()[0] < -0.15


class Halves(Scheme):
    """½x + N(x) + 2N(F(N(x))): a scheme that only this test knows, with x in two terms."""

    norms, normalises = ("norm_in", "norm_out"), "branch"

    def step(self, x, F, add, norm_in, norm_out):
        normed = norm_in(x)
        return add(add(0.5 * x, normed), 2.0 * norm_out(F(normed)))


def test_a_new_placement_has_its_theory(monkeypatch):
    """From its formula alone, run here on kernels and by independent dense models below."""
    monkeypatch.setitem(PLACEMENTS, "pre", Halves)
    config = tiny(*SHAPE, "norm=pre", "init=fan_in", "norm.eps=1e-5", "init.truncate=null")
    tokens = ids_of(config)

    def formula(x, F, norm):
        normed = norm(x)
        return 0.5 * x + normed + 2 * norm(F(normed))

    measured = monte_carlo(config.shape, tokens, formula, seeds=100)
    rows = theory(config)
    predicted = column(rows, "mean_square")
    error = measured.std(0) / math.sqrt(len(measured))
    bound = 0.02 * predicted + STANDARD_ERRORS * error
    assert (np.abs(measured.mean(0) - predicted) < bound).all()
    ratio = column(rows, "band") / measured.std(0)
    assert (ratio > 0.67).all()
    assert (ratio < 1.5).all()


def test_band_after_a_norm_of_the_stream():
    """Only eps lets the mean square vary: by 4·10⁻⁸ of it, which float64 alone can tell."""
    config = tiny(
        *SHAPE, "depth=1", "norm=post", "init=fan_in", "norm.eps=1e-6", "init.truncate=null"
    )
    tokens = ids_of(config)
    measured = monte_carlo(config.shape, tokens, lambda x, F, norm: norm(x + F(x)), seeds=100)
    ratio = column(theory(config), "band") / measured.std(0)
    # A std of 100 draws is off by 7 %; theory by 5 % (800 draws, measured).
    np.testing.assert_allclose(ratio, 1, atol=0.25)


def monte_carlo(shape, ids, formula, seeds):
    """Mean squares (seeds, rows) of dense models in float64 that share no code with simlab."""
    d, heads, c = shape.width, shape.heads, shape.head_dim
    generator = torch.Generator().manual_seed(0)
    length = ids.shape[1]
    angles = torch.outer(
        torch.arange(length, dtype=torch.float64),
        shape.rope_theta ** (-torch.arange(0, c, 2, dtype=torch.float64) / c),
    )

    def matrix(d_in, d_out):
        return torch.randn(d_in, d_out, generator=generator, dtype=torch.float64) / math.sqrt(d_in)

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + shape.norm.eps).sqrt()

    def turn(x):
        real, imaginary = x.chunk(2, -1)
        turned = torch.polar(torch.ones_like(angles), angles) * torch.complex(real, imaginary)
        return torch.cat((turned.real, turned.imag), -1)

    def attention(h):
        def split(x):
            return x.unflatten(-1, (-1, c)).transpose(1, 2)

        kv = shape.kv_heads * c
        q, k = norm(h @ matrix(d, heads * c)), norm(h @ matrix(d, kv))
        q, k, v = turn(split(q)), turn(split(k)), split(h @ matrix(d, kv))
        k, v = (x.repeat_interleave(heads // shape.kv_heads, 1) for x in (k, v))
        logits = (q @ k.mT / math.sqrt(c)).masked_fill(
            torch.ones(length, length).triu(1).bool(), -math.inf
        )
        out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return out @ matrix(heads * c, d)

    def mlp(h):
        gate, up = h @ matrix(d, shape.d_ff), h @ matrix(d, shape.d_ff)
        return (gate * gate.sigmoid() * up) @ matrix(shape.d_ff, d)

    curves = []
    for _ in range(seeds):
        table = torch.randn(shape.vocab_size, d, generator=generator, dtype=torch.float64)
        x = table[ids]
        curve = [x.square().mean()]
        for _ in range(shape.depth):
            for sublayer in (attention, mlp):
                x = formula(x, sublayer, norm)
                curve.append(x.square().mean())
        curves.append(torch.stack(curve))
    return torch.stack(curves).numpy()


def test_the_band_without_feedback_telescopes():
    """Under pre-norm with branches that don't see x, Var of the mean square is 2‖K_k‖²/(dN²).

    With deterministic branch kernels every base vector is Gaussian, and so is the stream.
    """
    from simlab.theory.mean_field.band import band

    width, tokens = 50, 6
    rng = np.random.default_rng(0)

    def gram():
        x = rng.standard_normal((tokens, 9))
        return x @ x.T / 9

    class Fixed:
        units, lean = 10**9, None

        def __init__(self):
            self.kernel = gram()
            self.square = self.cross = self.slope = np.zeros((tokens, tokens))

        def covariance(self, functionals):
            return np.zeros((len(functionals), len(functionals)))

        def pull(self, functionals):
            return np.zeros_like(functionals)

    start = gram()
    ends = np.outer(start.diagonal(), start.diagonal())
    state = State(start, 2 * start**2 / width, (ends + start**2) / width)
    steps, kernels = [], [start]
    for _ in range(3):
        step = KernelStep(state, width, 1e-6, 1.0)
        x = step.x
        out = step.add(x, step.feed(lambda v: Fixed())(step.norm(x)))
        steps.append((step, [out.terms]))
        kernels.append(out.kernel)
        state = state_of(out)
    expected = [math.sqrt(2 * (kernel**2).sum() / width) / tokens for kernel in kernels]
    found = band(steps, start, np.arange(tokens), 0.0, width)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_attention_oracles():
    """n·Σa² = e^{1−ρ} for logits of unit variance and tokens with correlation ρ, without RoPE.

    To order 1/n. The output's mean square is ρ + (1−ρ)·Σa² of the values', up to 1/d.
    """
    from simlab.theory.mean_field.attention import AttentionKernel
    from simlab.theory.mean_field.drawing import Context

    length, width, last = 256, 1 << 16, slice(-64, None)
    config = tiny("heads=8", "kv_heads=8", "width=1024", "norm.eps=1e-12")
    model = replace(
        config.shape, width=width, rope_theta=1e300
    )  # all pairs but the first stand still
    stds = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 0.02)
    for rho in (0.3, 0.6):
        kernel = np.full((length, length), rho) + (1 - rho) * np.eye(length)
        attention = AttentionKernel(Context(model, 1, length), 0, stds)
        branch = attention(Input(kernel, 0 * kernel, 0 * kernel, True))
        seen = np.arange(1, length + 1)[last]
        squares = (branch.second[0].sum(-1)[last] * seen).mean()
        assert squares == pytest.approx(math.exp(1 - rho), rel=0.03)  # 128 heads
        sizes = branch.kernel.diagonal()[last] / attention.scale
        expected = rho + (1 - rho) * branch.second[0].sum(-1)[last]
        np.testing.assert_allclose(sizes, expected, rtol=0.02)


@pytest.mark.parametrize("norm", ["reordered", "post", "pre"])
def test_huge_stds(norm):
    """Where float32 can't hold what the recursion computes in it, the prediction ends, and says so.

    Up to there only the scale changes: of the stream, or (pre) of the branches too.
    """
    rows = {}
    for std in (1e5, 1e10):
        config = tiny(*SHAPE, f"norm={norm}", f"init.std={std}", "init.truncate=null")
        rows[std] = theory(config, gradients=True)
        assert len(rows[std]) == 7
    for name in ("mean_square", "gradient_rms"):
        below, beyond = (column(rows[std], name)[2:] for std in (1e5, 1e10))
        np.testing.assert_allclose(beyond / beyond[0], below / below[0], rtol=1e-3)
    below, beyond = (column(r, "band") / column(r, "mean_square") for r in rows.values())
    np.testing.assert_allclose(beyond, below, rtol=1e-3, atol=1e-6)  # 0 under post
    config = tiny(*SHAPE, f"norm={norm}", "init.std=1e30")
    prediction = predict(config.shape, config.init, prepare(config).tokens, gradients=True)
    assert "beyond the range of floats" in prediction.ends
    assert all(math.isfinite(row.mean_square + row.band) for row in prediction.rows)


def test_pre_norm_with_relu(monkeypatch):
    """Xiong et al. 2020, Lemma 2: 1 + l/2 ≤ E‖x_l‖²/d ≤ 1 + 3l/2 after l blocks of Pre-LN."""
    relu = Unit(lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(float), False)
    monkeypatch.setitem(UNITS, "gelu", relu)
    config = tiny("model.mlp=gelu", "norm=pre", "init=fan_in", "depth=6", "init.truncate=null")
    rows = predict(config.shape, config.init, np.arange(8)[None], with_band=False).rows
    for blocks, row in enumerate(rows[::2]):
        assert 1 + blocks / 2 <= row.mean_square <= 1 + 3 * blocks / 2


def test_a_curve_that_explodes_ends():
    """Without norms at fan-in the mean of seeds is soon one seed's; not under a norm, or at 0.02."""
    config = tiny(*SHAPE, "norm=none", "init=fan_in", "depth=10")
    tokens = prepare(config).tokens
    prediction = predict(config.shape, config.init, tokens, gradients=True)
    assert "seeds differ by more than 25 % of their mean" in prediction.ends
    assert 3 < len(prediction.rows) < 12
    assert (column(prediction.rows, "band") <= 0.25 * column(prediction.rows, "mean_square")).all()
    assert np.isnan(column(prediction.rows, "gradient_rms")).all()
    for overrides in (["norm=pre", "init=fan_in"], ["norm=none"]):
        config = tiny(*SHAPE, *overrides, "depth=10")
        assert predict(config.shape, config.init, tokens).ends is None


def test_tied_head_refuses_gradient():
    """With an embedding of std 1 (init=llama) the own token's logit is d above the others."""
    config = tiny(*SHAPE, "model.tied=true", "norm=lns", "init=llama")
    tokens = prepare(config).tokens
    prediction = predict(config.shape, config.init, tokens, gradients=True)
    assert "predict themselves" in prediction.no_gradient
    assert np.isnan(column(prediction.rows, "gradient_rms")).all()
    assert prediction.ends is None


def test_too_many_tokens_are_refused():
    config = tiny("inputs.batch=2", "inputs.length=300")
    tokens = prepare(config).tokens
    assert "this one has 600" in unpredictable(config.shape, tokens)
    with pytest.raises(ValueError, match="this one has 600"):
        predict(config.shape, config.init, tokens)


def test_an_mlp_without_a_unit_is_refused():
    config = tiny()
    model = replace(config.shape, mlp="relu")
    assert "model.mlp=relu;" in unpredictable(model, prepare(config).tokens)


def test_the_same_numbers_every_time():
    config = tiny(*SHAPE, "norm=pre")
    first, second = theory(config, gradients=True), theory(config, gradients=True)
    assert first == second
