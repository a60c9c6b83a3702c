"""Weightless against dense: whole models, forward and backward, every statistic, in distribution.

The token batch repeats tokens within sequences, and the sequences begin alike, so that Gram
matrices are singular. At width 16 there are more tokens than dimensions, so that most layers draw
their weights; at 32 and 64 none does. Heads are grouped. The engines draw the same embeddings from
the same seed, so the samples are compared in pairs: what the embedding varies falls out.
"""

import contextlib
import dataclasses
import re
import sys
from functools import partial
from statistics import NormalDist
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import PARITY, placed, tiny
from torch import nn

from simlab.config import InitConfig
from simlab.measurement.engine import measure_curves
from simlab.model import attention
from simlab.model.mlp import Experts
from simlab.schemes.init import distribution
from simlab.weights import rng, weightless
from simlab.weights.base import Columns
from simlab.weights.dense import RandomWeights
from simlab.weights.weightless import GaussianWeights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "normals_together")]

SEEDS = 240
TOGETHER = 60  # seeds that are measured as one batch
CPU = torch.device("cpu")
IDS = torch.tensor([[3, 3, 7, 1, 3, 9, 2, 4, 6, 3, 1, 7], [3, 3, 7, 1, 5, 0, 0, 2, 4, 9, 3, 8]])
ALPHA = 1e-3  # of a false alarm anywhere in one case; with seeds fixed, it rings always or never


@pytest.fixture(scope="module")
def normals_together():
    """The weightless engine's normals, of all seeds from one stream: 20 times as fast."""

    def draw(out, entropies, piece):
        generator = np.random.Generator(np.random.SFC64([*entropies, piece]))
        generator.standard_normal(out=out.numpy(), dtype=np.float32)

    with mock.patch.object(rng, "draw_normals", draw):
        yield


def shape(norm, width, *overrides):
    every = ["norm.every=1"] if norm == "swin_renorm" else []
    return tiny(
        "depth=2", f"width={width}", "heads=4", "kv_heads=2", "d_ff=40", "vocab_size=11",
        "init.truncate=null", "init.std=0.1", "norm.eps=1e-4", f"norm={norm}", *every, *overrides,
    )  # fmt: skip


DRAWN = {}  # of each law, seed and name the same in every case


class StackedLinear(nn.Module):
    """(S·B, T, d_in) to (S·B, T, d_out): each curve's tokens by its own matrix."""

    weights: torch.Tensor  # (S, d_out, d_in)

    def __init__(self, d_out, bias):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def forward(self, x):
        y = x.reshape(len(self.weights), -1, x.shape[-1]) @ self.weights.mT
        return y.view(*x.shape[:-1], -1) + (0 if self.bias is None else self.bias)


class DenseWeights(RandomWeights):
    """The random weights of several seeds, whose curves are measured as one batch."""

    tokens_at_once, embedded = sys.maxsize, GaussianWeights.embedded
    value_rows = GaussianWeights.value_rows

    def __init__(self, model, init, *seeds):
        super().__init__(model, init, seeds[0])
        self.dense = [RandomWeights(model, init, seed) for seed in seeds]
        self.seeds, self.curves = seeds, len(seeds)

    def stack(self, name, *shape):
        key = self.seeds, name, shape, distribution(self.model, self.init, name)
        if key not in DRAWN:
            matrices = [d.tensor(name, shape, CPU, torch.float32) for d in self.dense]
            DRAWN[key] = torch.stack(matrices)
        return DRAWN[key]

    def linear(self, d_in, d_out, bias):
        layer = StackedLinear(d_out, bias)
        layer.shape = d_out, d_in
        return layer

    def stacked(self, made, prefix):
        for name, module in made.named_modules():
            if isinstance(module, StackedLinear):
                module.weights = self.stack(f"{prefix}.{name}.weight", *module.shape)
        return made

    def block(self, layer, device, dtype):
        return self.stacked(super().block(layer, device, dtype), f"blocks.{layer}")

    def end_parts(self, end, device, dtype):
        return self.stacked(super().end_parts(end, device, dtype), f"{end}_parts")

    def head(self, x, ids):
        name = "embedding.weight" if self.model.tied else "head.weight"
        weights = self.stack(name, self.model.vocab_size, self.model.width)
        return [Columns(x, lambda: iter([weights.mT]))], ids[:, 1:].flatten()


def measured(weights):
    """(seeds, rows × statistics and the loss)."""
    curves = []
    for m in measure_curves(weights, IDS, CPU, torch.float32, True):
        rows = torch.stack([torch.cat([row.values, row.gradient]) for row in m.rows])
        curves.append(torch.cat([rows.flatten(), m.loss.double()[None]]))
    return torch.stack(curves).numpy()


def sample(engine, config, seeds=SEEDS):
    """The curves of a number of seeds."""
    together = 1 if config.shape.experts else TOGETHER
    batches = np.split(np.arange(seeds), seeds // together)
    return np.concatenate(
        [measured(engine(config.shape, config.init, *b.tolist())) for b in batches]
    )


def worst(a, b):
    """The largest |z| of paired differences over all columns, of values and of squared deviations.

    And how many columns there are. Pairs of different seeds are independent, whatever is within one.
    What one side hasn't (NaN) the other hasn't; a column in which all pairs differ by the same differs
    by nothing: of what both engines draw alike, as the embedding's statistics.
    """
    assert np.array_equal(np.isnan(a), np.isnan(b))
    there = ~np.isnan(a).any(0)
    a, b = a[:, there], b[:, there]
    varies = (a - b).std(0) > 1e-9 * np.abs(a).mean(0)
    np.testing.assert_allclose(a[:, ~varies], b[:, ~varies], rtol=1e-9)
    a, b = a[:, varies], b[:, varies]
    scores = []
    for x, y in ((a, b), ((a - a.mean(0)) ** 2, (b - b.mean(0)) ** 2)):
        differences = x - y
        error = differences.std(0, ddof=1) / np.sqrt(len(x))
        scores.append(np.abs(differences.mean(0)) / error)
    return max(s.max() for s in scores), 2 * varies.sum()


def limit(comparisons):
    """Bonferroni's bound on |z| for a number of comparisons."""
    return NormalDist().inv_cdf(1 - ALPHA / (2 * comparisons))


def agree(dense, weightless):
    """True if the two samples are of one law, as far as can be seen."""
    z, count = worst(dense, weightless)
    assert count > 100
    return z < limit(count)


def engines_agree(config):
    return agree(sample(DenseWeights, config), sample(GaussianWeights, config))


@contextlib.contextmanager
def two_percent_off():
    """Every σ: with 240, 480, 720 seeds at width 64 |z| is 4.2, 6.1, 6.9, and 4.6 is needed."""
    right = GaussianWeights.std
    with mock.patch.object(GaussianWeights, "std", lambda self, name: 1.02 * right(self, name)):
        yield


def fresh_alone(ctx, *gradients):
    """A backward that draws another W: as if G were independent of the forward."""
    scale, lower, _ = weightless.factor(gradients[1])
    x = ctx.saved_tensors[0]
    return (scale * lower).float() @ ctx.normals(ctx.name, x.shape[1:], x.device), None, None


def known_alone(ctx, *gradients):
    """A backward without the part of W that the forward hasn't shown."""
    x, scale, lower, _ = ctx.saved_tensors
    q = torch.linalg.solve_triangular(lower, (x / scale).double(), upper=False).float()
    return gradients[0] @ q, None, None


def backward(wrong):
    return partial(mock.patch.object, weightless._Coordinates, "backward", staticmethod(wrong))


@pytest.mark.parametrize("tied", [False, True])
def test_dense_batch_equals_single_models(tied):
    config = shape("pre", 64, f"model.tied={str(tied).lower()}", "model.bias=true")
    batch = measured(DenseWeights(config.shape, config.init, 0, 5))
    for seed, curve in zip((0, 5), batch, strict=True):
        (alone,) = measured(RandomWeights(config.shape, config.init, seed))
        np.testing.assert_allclose(curve, alone, **PARITY)


@pytest.mark.parametrize("norm", ["pre", "swin_renorm", "peri", "lns", "deepnorm"])
def test_weightless_is_dense_in_distribution(norm):
    assert engines_agree(shape(norm, 64))


def test_mistakes_are_seen():
    """A σ that is 2 % off, and backwards without conditioning, under the placement of OLMo 2."""
    config = shape("reordered", 64)
    dense = sample(DenseWeights, config, 2 * SEEDS)
    assert agree(dense, sample(GaussianWeights, config, 2 * SEEDS))
    mistakes = {two_percent_off: 2 * SEEDS, backward(fresh_alone): 60, backward(known_alone): 60}
    for mistake, seeds in mistakes.items():
        with mistake():
            assert not agree(dense[:seeds], sample(GaussianWeights, config, seeds)), mistake


def test_more_tokens_than_dimensions():
    assert engines_agree(shape("reordered", 16))


@pytest.mark.parametrize(
    ("overrides", "init"),
    [
        (["model.tied=true", "norm.type=layer", "model.qk_norm=per_head", "model.mlp=geglu"], {}),
        (["model.tied=true", "model.qk_norm=none"], {"init": InitConfig("fan_in", None, None)}),
        (
            [
                "model.mlp=gelu",
                "model.bias=true",
                "norm.type=layer_bias",
                "model.rotary=0.5",
                "model.positions=14",
                "model.tied=true",
            ],
            {},
        ),
        (["norm=parallel", "model.mlp=gelu_exact"], {}),
        (["norm=hybrid_norm_star"], {}),
        (["norm=pre", "model.mlp=relu2", "init.std=0.2"], {}),
        (placed("scaled"), {}),
        (["norm=residual_dual"], {}),
        (["norm=siamese_norm"], {}),
        ([*placed("attn_res"), "norm.eps=1e-3"], {}),
    ],
    ids=[
        "other norms",
        "other init",
        "GPT",
        "parallel",
        "values normed",
        "relu2",
        "two vectors",
        "ResiDual",
        "SiameseNorm",
        "AttnRes",
    ],
)
def test_variants(overrides, init):
    """A tied head, whose shown rows are known; other norms, MLPs, positions; an init without one σ."""
    assert engines_agree(dataclasses.replace(shape("reordered", 32, *overrides), **init))


@pytest.mark.parametrize("width", [16, 64])
def test_gemma(width):
    """Caps that bend both kinds of logits, two RoPEs, a scaled embedding that is also the head."""
    overrides = [
        "norm.type=rms_plus_one", "model.mlp=geglu", "model.qk_norm=none", "model.tied=true",
        f"model.embedding_scale={width**0.5}", "model.query_pre_attn_scalar=0.1",
        "model.attention_softcap=1", "model.logit_softcap=1", "model.window=5",
        "model.full_every=2", "model.rope_local_theta=30", "model.rope_linear=8",
    ]  # fmt: skip
    assert engines_agree(shape("peri", width, *overrides))


@contextlib.contextmanager
def gates_twice_as_wide():
    """The σ of the gates' matrix alone."""
    right = GaussianWeights.std

    def std(self, name):
        return right(self, name) * (2 if "g_proj" in name else 1)

    with mock.patch.object(GaussianWeights, "std", std):
        yield


@contextlib.contextmanager
def gates_without_gradient():
    """Gates as constants."""
    with mock.patch.object(attention.torch, "sigmoid", lambda u: u.detach().sigmoid()):
        yield


@pytest.mark.parametrize(("width", "kind"), [(16, "elementwise"), (64, "per_head")])
def test_output_gates(width, kind):
    """Their matrix shares q's input. Another σ of it, and gates without a gradient, are seen."""
    config = shape("pre", width, f"model.attention_gate={kind}", "init.std=0.3")
    dense = sample(DenseWeights, config)
    assert agree(dense, sample(GaussianWeights, config))
    if width == 64:  # of a bound of 4.6: |z| is 7.2 and 8.5
        for mistake in (gates_twice_as_wide, gates_without_gradient):
            with mistake():
                assert not agree(dense, sample(GaussianWeights, config)), mistake


@pytest.mark.parametrize("width", [16, 64])
def test_gated_head(width):
    """DeepSeek-V4's, at logits of std 2.5. Their mean in its place, mhc's head, is seen."""
    logits = ["norm.mix_scale=1", f"norm.mix_std={2.5 / (4 * width) ** 0.5}"]
    dense = sample(DenseWeights, shape("deepseek_v4", width, *logits), SEEDS // 2)
    for norm, same in (("deepseek_v4", True), ("mhc", False)):
        weightless = sample(GaussianWeights, shape(norm, width, *logits), SEEDS // 2)
        assert agree(dense, weightless) == same


@pytest.mark.parametrize("width", [16, 64])
def test_side_streams(width):
    """AltUp's, by projections at the start and at the end. The active stream alone is seen."""
    asked = ["norm.laurel_rank=8", "init.std=0.3"]
    dense = sample(DenseWeights, shape("gemma3n_altup", width, *asked), SEEDS // 2)
    for norm, same in (("gemma3n_altup", True), ("gemma3n", False)):
        weightless = sample(GaussianWeights, shape(norm, width, *asked), SEEDS // 2)
        assert agree(dense, weightless) == same


def value_rows(wrong):
    """wrong: what is looked up, of the right function and the token ids."""
    right = RandomWeights.value_rows

    def rows(self, name, ids, device, dtype):
        return wrong(lambda ids: right(self, name, ids, device, dtype), ids)

    return partial(mock.patch.object, RandomWeights, "value_rows", rows)


@pytest.mark.parametrize(("width", "layers"), [(16, "alternate"), (64, "all")])
def test_value_embeddings(width, layers):
    """As large as the values. Another token's rows, and rows half as large, are seen."""
    asked = [f"model.value_embeddings={layers}", f"model.value_embedding_scale={width**0.5}"]
    config = shape("pre", width, *asked)
    dense = sample(DenseWeights, config)
    assert agree(dense, sample(GaussianWeights, config))
    if width == 64:
        mistakes = {
            "next token's": value_rows(lambda right, ids: right(ids.roll(1, -1))),
            "half": value_rows(lambda right, ids: right(ids) / 2),
        }
        for name, mistake in mistakes.items():
            with mistake():
                assert not agree(dense, sample(GaussianWeights, config)), name


def at_random(self, logits):
    """Experts that the router doesn't pick, with the shares that it gives them."""
    p = logits.float().softmax(-1)
    chosen = torch.rand(p.shape, generator=torch.Generator().manual_seed(0)).topk(self.chosen)[1]
    return p.gather(-1, chosen), chosen


class OneExpert(DenseWeights):
    """Experts that are all the first one."""

    def stack(self, name, *shape):
        return super().stack(re.sub(r"experts\.\d+", "experts.0", name), *shape)


@pytest.mark.parametrize(("width", "renormalise", "seeds"), [(32, "false", 60), (16, "true", 60)])
def test_experts(width, renormalise, seeds):
    """Width 16 is below the batch's tokens and above an expert's. Other routing, or one expert in all
    places, is seen.
    """
    asked = ["model.experts=4", "model.experts_per_token=2", "d_ff=20", "depth=1"]
    config = shape("pre", width, *asked, f"model.renormalise_experts={renormalise}")
    weightless = sample(GaussianWeights, config, seeds)
    assert agree(sample(DenseWeights, config, seeds), weightless)
    if renormalise == "false":
        assert not agree(sample(OneExpert, config, 40), weightless[:40])
        with mock.patch.object(Experts, "route", at_random):
            assert not agree(sample(DenseWeights, config, 40), weightless[:40])
