"""The weightless linear layer against linear algebra and against the covariances it must have."""

import math

import numpy as np
import pytest
import torch
from conftest import STANDARD_ERRORS, tiny
from torch import nn

from simlab.config.validate import compose
from simlab.schemes.init import RULES, distribution
from simlab.weights import rng
from simlab.weights.dense import RandomWeights
from simlab.weights.rng import Normals
from simlab.weights.weightless import GaussianLinear, GaussianWeights, Inputs, factor, gram

CPU = torch.device("cpu")
# Kinds of tokens X, for their Gram matrices XXᵀ.
GRAMS = [
    "generic",
    "repeated",
    "at_the_jitter",
    "rank_one",
    "nearly_equal",
    "with_zero",
    "wild_scales",
    "tall",
]


def tokens(case, n=12, d=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    if case == "repeated":
        x[2], x[-1] = x[0], x[1]
    elif case == "at_the_jitter":
        x[2] = x[0] * (1 + 3e-7 * x[1])
    elif case == "rank_one":
        x = torch.randn(n, 1, generator=g) * x[:1]
    elif case == "nearly_equal":
        x = x[:1] + 1e-4 * x
    elif case == "with_zero":
        x[3] = 0
    elif case == "wild_scales":
        x = x * 10.0 ** torch.linspace(-12, 12, n)[:, None]
    elif case == "tall":
        x = torch.randn(n, n - 3, generator=g)
    return x


def layers(weights, *shapes, std=0.3):
    """GaussianLinears that share their inputs."""
    shared, linears = Inputs(weights), []
    for i, (d_in, d_out) in enumerate(shapes):
        linears.append(GaussianLinear(d_in, d_out))
        linears[-1].bind(f"layer{i}", std * (i + 1), shared)
    return linears


def normals(*seeds):
    return Normals(seeds, None)


@pytest.mark.parametrize("case", GRAMS)
def test_factor(case):
    """LLᵀ is the Gram matrix, each entry to 1e-12 of its rows' lengths, however singular."""
    x = tokens(case)
    scale, lower, _ = (of_all[0] for of_all in factor(gram(x[None])))
    wide = x.double()
    lengths = wide.norm(dim=1, keepdim=True)
    product = (scale * lower) @ (scale * lower).T
    assert ((product - wide @ wide.T).abs() <= 1e-12 * lengths * lengths.T).all()
    assert torch.equal(lower, lower.tril())


def test_factor_of_nan():
    x = tokens("generic")
    x[2, 3] = torch.nan
    assert factor(gram(x[None]))[1].isnan().any()


@pytest.mark.parametrize("case", GRAMS)
def test_output_covariance(case):
    """Columns are independent: Σ_c y_sc·y_tc / count is σ²·x_s·x_t to five standard errors."""
    x, count, std = tokens(case), 100_000, 0.3
    (layer,) = layers(normals(0), (x.shape[1], count), std=std)
    y = layer(x).double()
    wide = x.double()
    expected = std**2 * wide @ wide.T
    power = expected.diagonal()
    error = ((power[:, None] * power + expected**2) / count).sqrt()
    assert ((y @ y.T / count - expected).abs() <= STANDARD_ERRORS * error).all()


def test_repeated_tokens_get_the_same_output():
    x = tokens("repeated")
    (layer,) = layers(normals(0), (40, 30))
    y = layer(x)
    # √JITTER of a token's length is what its input is known to.
    for a, b in ((0, 2), (1, 11)):
        torch.testing.assert_close(y[a], y[b], rtol=0, atol=1e-6 * y[a].abs().max().item() + 1e-5)


@pytest.mark.parametrize("case", GRAMS)
def test_backward_is_consistent_with_forward(case):
    """GW·Xᵀ = G·(XWᵀ)ᵀ whatever W is: dX Xᵀ = Σ G_i Y_iᵀ, for layers that share their input."""
    x = tokens(case).requires_grad_()
    ys = [layer(x) for layer in layers(normals(1), (x.shape[1], 30), (x.shape[1], 9))]
    gs = [torch.randn(y.shape, generator=torch.Generator().manual_seed(7)) for y in ys]
    torch.autograd.backward(ys, gs)
    left = (x.grad.double() @ x.double().T).detach()
    right = sum(g.double() @ y.double().T for g, y in zip(gs, ys, strict=True)).detach()
    # Column t scales with token t's length; float32's rounding, and √JITTER, of that.
    size = x.detach().double().norm(dim=1) * math.sqrt(39) * 3
    assert ((left - right).abs() <= 3e-6 * size).all()


@pytest.mark.parametrize("case", ["generic", "repeated", "at_the_jitter", "tall"])
def test_joint_covariance(case, monkeypatch):
    """(Y, GW) for a fixed G over 8000 draws: every second moment, against σ² and X, G alone."""
    draws, std, d_out = 8000, 0.5, 3
    x = tokens(case, n=4, d=6)
    d_in = x.shape[1]
    g = torch.randn(4, d_out, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(rng, "NORMALS_PIECE", 64)  # quicker: few normals are asked of each stream
    leaf = x.repeat(draws, 1).requires_grad_()  # a curve for each draw, as one batch
    (layer,) = layers(normals(*range(draws)), (d_in, d_out), std=std)
    y = layer(leaf)
    y.backward(g.repeat(draws, 1))
    halves = y.detach().view(draws, -1), leaf.grad.view(draws, -1)
    sample = torch.cat(halves, 1).double()
    # vec(Y) and vec(GW) are linear in vec(W): the covariance is σ²·MMᵀ.
    eye_out, eye_in = torch.eye(d_out), torch.eye(d_in)
    forward = torch.einsum("td,oc->todc", x, eye_out).permute(0, 1, 3, 2).reshape(4 * d_out, -1)
    backward = torch.einsum("to,dc->tdoc", g, eye_in).reshape(4 * d_in, -1)
    m = std * torch.cat([forward, backward]).double()
    expected = m @ m.T
    power = expected.diagonal()
    error = ((power[:, None] * power + expected**2) / draws).sqrt()
    measured = sample.T @ sample / draws
    assert ((measured - expected).abs() <= 5.5 * error + 1e-9).all()  # about 500 comparisons
    assert (sample.mean(0).abs() <= STANDARD_ERRORS * (power / draws).sqrt()).all()


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("norm", ["reordered", "deepnorm"])
def test_stds_match_dense_weights(rule, norm):
    """Truncation included: measured on the drawn matrices, to five standard errors."""
    config = tiny(f"init={rule}", f"norm={norm}", "width=96", "d_ff=160")
    weightless = GaussianWeights(config.shape, config.init, 0).block(2, CPU, torch.float32)
    dense = RandomWeights(config.shape, config.init, 0).block(2, CPU, torch.float32)
    matrices = {n: m for n, m in dense.named_modules() if isinstance(m, nn.Linear)}
    linears = {n: m for n, m in weightless.named_modules() if isinstance(m, GaussianLinear)}
    assert linears.keys() == matrices.keys()
    assert len(linears) == 7
    for name, linear in linears.items():
        weight = matrices[name].weight
        assert (linear.d_out, linear.d_in) == weight.shape
        sure = STANDARD_ERRORS / math.sqrt(2 * weight.numel())
        assert linear.std == pytest.approx(weight.std().item(), rel=sure)


def test_gains_and_embedding_match_dense():
    config = tiny("norm.gain=0.3")
    both = [w(config.shape, config.init, 4) for w in (RandomWeights, GaussianWeights)]
    ids = torch.tensor([[3, 96, 3]])
    rows = [w.rows("embedding.weight", (97, 48), ids, CPU, torch.float32) for w in both]
    assert torch.equal(*rows)
    gains = [w.block(1, CPU, torch.float32).attention.norm_out.weight for w in both]
    assert torch.equal(*gains)
    assert gains[0][0].item() == pytest.approx(0.3)


def test_normals_by_seed_and_key():
    first, second = normals(5), normals(5)
    shape = (70, 1000)  # more than a piece
    first.start("b", shape)  # ahead of its turn
    a, b = first("a", shape, CPU), first("b", shape, CPU)
    assert torch.equal(second("b", shape, CPU), b)
    assert torch.equal(second("a", shape, CPU), a)
    assert not torch.equal(a, b)
    assert not torch.equal(normals(6)("a", shape, CPU), a)
    assert torch.equal(second("a", (35, 1000), CPU), a[:, :35])  # fewer tokens: the first of them
    assert a.mean().abs() < STANDARD_ERRORS / math.sqrt(a.numel())
    assert a.std().item() == pytest.approx(1, rel=STANDARD_ERRORS / math.sqrt(2 * a.numel()))


@pytest.mark.parametrize("case", ["generic", "tall"])
def test_bias_is_only_added(case):
    bias = torch.arange(30.0)
    results = []
    for has_bias in (False, True):
        x = tokens(case).requires_grad_()
        layer = GaussianLinear(x.shape[1], 30, has_bias)
        layer.bind("layer", 0.3, Inputs(normals(0)))
        if layer.bias is not None:
            layer.load_state_dict({"bias": bias})
        y = layer(x)
        y.square().sum().backward() if not has_bias else (y - bias).square().sum().backward()
        results.append((y.detach(), x.grad))
    (plain, gradient), (biased, with_bias) = results
    assert torch.equal(biased, plain + bias)
    # y − bias is y to float32's rounding of numbers up to 30, which the gradient sums over 30 outputs.
    torch.testing.assert_close(with_bias, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    x = tokens("generic").to(dtype).requires_grad_()
    (layer,) = layers(normals(0), (40, 30))
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype


@pytest.mark.parametrize("rule", sorted(RULES))
def test_tied_head_uses_the_shown_rows(rule):
    """Its logits for them are the embedding's, to rounding; the rest have the embedding's std."""
    config = compose(
        ["depth=1", "width=64", "heads=2", "kv_heads=2", "d_ff=32", "vocab_size=5000",
         "model.tied=true", "device=cpu", f"init={rule}"]
    )  # fmt: skip
    weights = GaussianWeights(config.shape, config.init, 0)
    ids = torch.tensor([[7, 3, 7, 4999], [0, 3, 1, 2]])
    x = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    parts, targets = weights.head(x, ids)
    logits = torch.cat([p.coordinates @ c for p in parts for c in p.chunks()], 2)[0].detach()
    assert logits.shape == (6, 5000)
    rows = weights.rows("embedding.weight", (5000, 64), ids, CPU, torch.float32)
    nexts = rows[:, 1:].flatten(0, 1)
    expected = (x[0].detach() * nexts).sum(1)
    torch.testing.assert_close(logits.gather(1, targets[:, None])[:, 0], expected)
    std = logits[:, 10:].std(1) / x[0].detach().norm(dim=1)
    law = distribution(config.shape, config.init, "embedding.weight")
    assert np.allclose(std, law.std, rtol=STANDARD_ERRORS / math.sqrt(2 * 4990))
