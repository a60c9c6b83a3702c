"""The std table against the rules written out, and against the moments of what is drawn."""

import math

import pytest
import torch
from conftest import STANDARD_ERRORS, tiny

from simlab import build_model
from simlab.model.mlp import MLPS
from simlab.schemes.init import ROLES, RULES, Constant, Gaussian, distribution, table

D, FF, L, HC = 48, 80, 3, 48  # of tiny(): width, d_ff, depth, heads × head_dim
S = 0.02
# rule -> layer -> role -> sigma, from FACTS written out for tiny() (kept apart from the code's table).
EXPECTED = {
    "normal": lambda n: {},
    "transformers": lambda n: {},
    "mitchell": lambda n: (
        dict.fromkeys(ROLES, D**-0.5)
        | {"o_proj": 1 / math.sqrt(2 * D * (n + 1)), "down_proj": 1 / math.sqrt(2 * FF * (n + 1))}
    ),
    "llama": lambda n: (
        {"embedding": 1, "head": D**-0.5}
        | dict.fromkeys(("o_proj", "up_proj", "down_proj", "router"), S / math.sqrt(2 * L))
    ),
    "llama_depth": lambda n: (
        {"embedding": 1, "head": D**-0.5}
        | dict.fromkeys(("o_proj", "up_proj", "down_proj", "router"), S / math.sqrt(2 * (n + 1)))
    ),
    "fan_in": lambda n: (
        dict.fromkeys(ROLES, D**-0.5)
        | {"embedding": 1, "o_proj": HC**-0.5, "down_proj": FF**-0.5}
        | {"right_proj": D**-0.5, "coef_proj": 4**-0.5}
    ),
    "gpt2": lambda n: dict.fromkeys(("o_proj", "down_proj"), S / math.sqrt(2 * L)),
    "megatron": lambda n: (
        dict.fromkeys(("o_proj", "down_proj"), S / math.sqrt(2 * L)) | {"head": D**-0.5}
    ),
    "small_wang": lambda n: (
        dict.fromkeys(ROLES, math.sqrt(0.4 / D))
        | dict.fromkeys(("o_proj", "down_proj"), 2 / L / math.sqrt(D))
    ),
    "ngpt": lambda n: dict.fromkeys(ROLES, D**-0.5) | {"embedding": 1, "head": 1 / D},
    "nanochat": lambda n: (
        dict.fromkeys(ROLES, D**-0.5)
        | dict.fromkeys(("gate_proj", "up_proj"), 0.4 * D**-0.5)
        | {"embedding": 0.8, "o_proj": 0, "down_proj": 0, "head": 0.001}
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layer", [0, 2])
def test_table(rule, layer):
    config = tiny(f"init={rule}")
    expected = dict.fromkeys(ROLES, S) | EXPECTED[rule](layer)
    laws = table(config.shape, config.init, layer)
    assert {role: g.sigma for role, g in laws.items()} == pytest.approx(expected, rel=1e-12)
    whole = {role for role, g in laws.items() if g.truncate is None}
    assert whole == (
        set(ROLES)
        if rule in ("gpt2", "transformers", "small_wang", "ngpt", "nanochat")
        else {"embedding"}
        if expected["embedding"] == 1
        else set()
    )


def test_value_embeddings_are_drawn_as_v_is():
    """Without DeepNorm's β, which is about matrices that a branch is linear in."""
    for norm, beta in (("pre", 1.0), ("deepnorm", (8 * L) ** -0.25)):
        config = tiny(f"norm={norm}", "init=fan_in")
        laws = table(config.shape, config.init)
        assert laws["value_embedding"].sigma == D**-0.5
        assert laws["v_proj"].sigma == pytest.approx(beta * D**-0.5)


@pytest.mark.parametrize("rule", ["llama", "llama_depth", "normal"])
def test_experts_gates_are_drawn_as_up_is(rule):
    """OLMo-core's init_feed_forward_moe has one std for all of an MLP of experts and its router."""
    asked = ["model.experts=3", "model.experts_per_token=2", f"init={rule}"]
    dense, routed = (table(tiny(*each).shape, tiny(*each).init, 1) for each in (asked[2:], asked))
    assert routed["gate_proj"] == routed["up_proj"] == routed["router"]
    assert (dense["gate_proj"] == dense["up_proj"]) == (rule == "normal")
    assert {k: v for k, v in dense.items() if k != "gate_proj"} == {
        k: v for k, v in routed.items() if k != "gate_proj"
    }


def test_truncated_std():
    assert Gaussian(1.0, 3.0).std == pytest.approx(0.986578, abs=5e-7)
    assert Gaussian(0.02, None).std == 0.02
    for c in (0.5, 1.0, 2.0, 5.0, 100.0):  # against the integral of the density
        x = torch.linspace(-c, c, 200_001, dtype=torch.float64)
        density = torch.exp(-x * x / 2)
        variance = torch.trapezoid(x * x * density, x) / torch.trapezoid(density, x)
        assert Gaussian(2.0, c).std == pytest.approx(2 * variance.sqrt().item(), rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_measured_moments_match_the_table(rule):
    """Mean 0, the table's std, nothing beyond the cut, for every matrix of a whole model.

    Five standard errors: √(κ−1)/2n-ish for the std (κ ≤ 3), 1/√n for the mean; 23 matrices × 9
    rules, so a false alarm in 10^4 runs at most, and seeds are fixed.
    """
    config = tiny(f"init={rule}", "vocab_size=997")
    for name, parameter in build_model(config).named_parameters():
        law = distribution(config.shape, config.init, name)
        values = parameter.detach().double().flatten()
        if isinstance(law, Constant) or law.sigma == 0:
            assert (values == (law.value if isinstance(law, Constant) else 0)).all()
            continue
        n = len(values)
        assert values.mean().abs() < STANDARD_ERRORS * law.std / math.sqrt(n), name
        assert values.std().item() == pytest.approx(
            law.std, rel=STANDARD_ERRORS / math.sqrt(2 * n)
        ), name
        if law.truncate is not None:
            assert values.abs().max() <= law.truncate * law.sigma * (1 + 1e-6), name
        elif n > 10_000:
            assert values.abs().max() > 3.2 * law.sigma, name


def test_draws_are_truncated_normal():
    """Kolmogorov–Smirnov against the truncated normal's distribution function, and a control."""
    values = build_model(tiny("vocab_size=20000")).embedding.weight.detach().double().flatten()
    z, n = (values / 0.02).sort().values, values.numel()

    def distance(cut):
        edge = math.erf(cut / math.sqrt(2))
        cdf = (torch.erf(z / math.sqrt(2)) / edge + 1) / 2
        return (cdf - (torch.arange(n) + 0.5) / n).abs().max().item() * math.sqrt(n)

    assert distance(3.0) < 1.95  # the 0.1 % point
    assert distance(2.6) > 1.95


@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("rule", RULES)
def test_parameter_laws(mlp, rule):
    config = tiny(f"model.mlp={mlp}", "model.bias=true", f"init={rule}")
    for name, parameter in build_model(config).named_parameters():
        law = distribution(config.shape, config.init, name)
        assert isinstance(law, Gaussian) == (parameter.dim() == 2), name
        if name.endswith("bias"):
            assert law == Constant(0.0), name
            assert (parameter == 0).all()
    with pytest.raises(KeyError, match="mixer"):
        distribution(config.shape, config.init, "blocks.0.mlp.sublayer.mixer.weight")


def test_gains():
    config = tiny("norm=swin_renorm", "norm.gain=0.5", "norm.every=1")
    gains = {n: p for n, p in build_model(config).named_parameters() if "norm" in n}
    for name, gain in gains.items():
        inside = ".norm_out." in name and "renorm" not in name
        assert (gain == (0.5 if inside else 1.0)).all(), name
