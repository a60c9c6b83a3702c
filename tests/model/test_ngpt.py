"""nGPT's placement against nGPT's own formulas, on vectors of unit length, and its law."""

import math

import pytest
import torch
from conftest import STANDARD_ERRORS, tiny
from torch.nn.functional import cross_entropy, normalize, scaled_dot_product_attention, silu

from simlab import build_model
from simlab.model.placement import start
from simlab.schemes.rope import inverse_frequencies
from simlab.weights.dense import RandomWeights
from simlab.weights.weightless import GaussianWeights

D, HEADS, C = 48, 6, 8


def on_the_sphere(model):
    """The model with nGPT's matrices: rows of unit length along d, and columns of o and down."""
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            rows = not name.endswith(("o_proj.weight", "down_proj.weight"))
            weight.data = normalize(weight.data, dim=1 if rows else 0)
    model.embedding.weight.data *= math.sqrt(D)  # of a stream that is √d times nGPT's
    model.head.weight.data /= math.sqrt(D)
    return model


def ngpt(weights, ids, a, rope):
    """Every step's stream, and the loss, as in NVIDIA/ngpt's model.py: s_qk, s_uv and s_z are 1."""
    angles = torch.outer(torch.arange(ids.shape[1]), rope).repeat(1, 2).double()

    def turned(x):
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    def unit(x):
        return x / x.norm(dim=-1, keepdim=True)

    def moved(x, branch):
        return unit(x + a * (unit(branch) - x))

    h = weights["embedding.weight"][ids] / math.sqrt(D)
    streams = [h]
    for layer in range(3):
        w = {name: weights[f"blocks.{layer}.{kind}.sublayer.{name}_proj.weight"]
             for kind, names in (("attention", "qkvo"), ("mlp", ("gate", "up", "down")))
             for name in names}  # fmt: skip
        q, k, v = ((h @ w[n].T).unflatten(-1, (-1, C)).transpose(1, 2) for n in "qkv")
        q, k = unit(turned(q)), unit(turned(k))
        o = scaled_dot_product_attention(q, k, v, is_causal=True, scale=math.sqrt(C))
        h = moved(h, o.transpose(1, 2).flatten(2) @ w["o"].T)
        u, v = math.sqrt(D) * (h @ w["up"].T), math.sqrt(D) * (h @ w["gate"].T)
        streams += [h, moved(h, (u * silu(v)) @ w["down"].T)]
        h = streams[-1]
    logits = h @ (math.sqrt(D) * weights["head.weight"]).T
    return streams[::2], cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_as_ngpts_own_code():
    """The stream after every block, the loss, and its gradient with respect to the embedding."""
    config = tiny(
        "norm=ngpt", "init=ngpt", f"heads={HEADS}", f"kv_heads={HEADS}", "norm.eps=1e-12",
        "norm.alpha=0.3",
    )  # fmt: skip
    model = on_the_sphere(build_model(config)).double()
    ids = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(0))
    rope, _ = inverse_frequencies(torch.arange(C // 2), C, config.shape.rope_theta, None, None)
    expected, loss = ngpt(dict(model.named_parameters()), ids, 0.3, rope)
    (gradient,) = torch.autograd.grad(loss, model.embedding.weight)
    streams = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, out: streams.append(out))
    own = cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    for found, there in zip(streams, expected[1:], strict=True):
        torch.testing.assert_close(found, math.sqrt(D) * there, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own, loss, rtol=1e-6, atol=0)
    (found,) = torch.autograd.grad(own, model.embedding.weight)
    # The start norms rows that have unit length already, which takes out the gradient along them.
    unit = normalize(model.embedding.weight.detach(), dim=1)
    across = gradient - (gradient * unit).sum(1, keepdim=True) * unit
    torch.testing.assert_close(found, across, rtol=1e-4, atol=1e-6 * float(across.abs().max()))


def cosines(config, weightless, seeds=6):
    """Of the stream after each block with the embedding, the mean over tokens (seeds, blocks)."""
    ids, cpu = torch.arange(22).view(2, 11), torch.device("cpu")
    rows = []
    for seed in range(seeds):
        make = GaussianWeights if weightless else RandomWeights
        weights = make(config.shape, config.init, seed)
        x = start(weights.embedded(ids, cpu, torch.float32), config.shape)
        first, row = x, []
        for layer in range(config.shape.depth):
            x = weights.block(layer, cpu, torch.float32)(x)
            row.append(torch.cosine_similarity(x, first, dim=-1).mean())
        rows.append(torch.stack(row))
    return torch.stack(rows).double()


@pytest.mark.parametrize("width", [64, 192])
@pytest.mark.parametrize("weightless", [False, True])
def test_the_law_of_the_cosine(width, weightless):
    """((1 − a)/√((1 − a)² + a²))^k after k steps; the law of another a is refused."""
    config = tiny(
        "norm=ngpt", "init=ngpt", "norm.alpha=0.2", f"width={width}", "heads=4", "kv_heads=4"
    )
    found = cosines(config, weightless)
    steps = 2 * torch.arange(1, 4)

    def off(a):
        law = ((1 - a) / math.hypot(1 - a, a)) ** steps
        error = found.std(0) / math.sqrt(len(found))
        return ((found.mean(0) - law).abs() - STANDARD_ERRORS * error).max()

    assert off(0.2) < 1 / width  # to the order of 1/d
    assert off(0.25) > 0.02
    assert ((1 - 0.05) / math.hypot(1 - 0.05, 0.05)) ** 16 == pytest.approx(0.978, abs=5e-4)
