"""nanochat's whole model: its formulas, its counts of parameters, its init in both engines."""

import numpy as np
import pytest
import torch
from conftest import PARITY, tiny
from torch.nn.functional import cross_entropy, relu, rms_norm, scaled_dot_product_attention

from simlab import build_model
from simlab.config.validate import compose
from simlab.experiment import run
from simlab.model.transformer import parameter_count

DEPTH, SHORT = 5, 5  # a window of 5 tokens: 4 before a token, and itself
MODEL = ["model=nanochat_d12", f"depth={DEPTH}", f"model.window={SHORT}"]
IDS = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(0))


def nanochat(weights, ids, left=SHORT - 1, sharper=1.2):
    """Logits: karpathy/nanochat, gpt.py, GPT.forward, 6 query and 2 kv heads of 8 channels.

    Its smear is off at init, and its gates of value embeddings are 3·sigmoid(0). left: how many keys
    before a token a short window shows.
    """

    def norm(x):
        return rms_norm(x, x.shape[-1:])

    back = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
    angles = torch.outer(torch.arange(ids.shape[1]), 100_000 ** (-torch.arange(0, 8, 2) / 8))
    cos, sin = (f(angles.double())[:, None] for f in (torch.cos, torch.sin))

    def turned(y):
        # nanochat turns by −θ: the same, with the halves a and b of W_q and W_k exchanged
        a, b = y[..., :4], y[..., 4:]
        return sharper * norm(torch.cat([a * cos - b * sin, b * cos + a * sin], -1))

    x = start = norm(weights["embedding.weight"][ids])
    for i in range(DEPTH):
        w = {
            name.split(".")[-2]: value for name, value in weights.items() if f"blocks.{i}." in name
        }
        x = (1.15 - 0.10 * i / (DEPTH - 1)) * x + (0.20 - 0.15 * i / (DEPTH - 1)) * start
        h = norm(x)
        q, k, v = ((h @ w[f"{n}_proj"].T).unflatten(-1, (-1, 8)) for n in "qkv")
        if i % 2 == (DEPTH - 1) % 2:
            v = v + 3 * torch.sigmoid(torch.zeros(())) * w["value_embedding"][ids].view(v.shape)
        full = "SSSL"[i % 4] == "L" or i == DEPTH - 1
        mask = (back >= 0) & (full | (back <= left))
        q, k, v = (y.transpose(1, 2) for y in (turned(q), turned(k), v))
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = x + y.transpose(1, 2).flatten(2) @ w["o_proj"].T
        x = x + relu(norm(x) @ w["up_proj"].T).square() @ w["down_proj"].T
        if i == DEPTH // 2:
            middle = x
    logits = norm(x - 0.2 * middle) @ weights["head.weight"].T
    return 15 * torch.tanh(logits / 15)


def test_as_nanochats_own_code():
    """The logits, and the loss's gradient with respect to every matrix; two negative controls."""
    config = tiny(*MODEL, "norm.branch_scale=1", "init=fan_in", "norm.eps=1e-14")
    model = build_model(config).double()
    weights = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    assert len(weights) == 2 + 6 * DEPTH + 3
    found, gradients = [], []
    for call in (model, lambda ids: nanochat(weights, ids)):
        found.append(call(IDS))
        loss = cross_entropy(found[-1][:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        gradients.append(torch.autograd.grad(loss, [*weights.values()]))
    # Norms and RoPE are in float32, whatever the dtype.
    torch.testing.assert_close(*found, **PARITY)
    for name, ours, theirs in zip(weights, *gradients, strict=True):
        scale = float(theirs.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * scale, msg=name)
    for other in ({"left": SHORT}, {"sharper": 1.0}):
        assert (nanochat(weights, IDS, **other) - found[1]).abs().max() > 1e-3, other


@pytest.mark.parametrize(("depth", "total"), [(12, 286_261_730), (20, 896_533_746)])
def test_parameters_are_nanochats(depth, total):
    """``total``: what nanochat's own num_scaling_params says of this depth (run on meta).

    Its norms have no gains. It has besides, which simlab has not: gates of 12 numbers a head in every
    second layer, two scalars a layer, 24 numbers and 2 of the smear, one of x_mid.
    """
    model = compose([f"model=nanochat_d{depth}"]).shape
    assert (model.width, model.heads, model.head_dim) == (64 * depth, depth // 2, 128)
    gains = depth * (2 * model.width + 2 * 128) + model.width
    scalars = depth // 2 * 12 * model.heads + 2 * depth + 24 + 1 + 1
    assert parameter_count(model) - gains + scalars == total
    assert model.window == -(-2048 // 4 // 128) * 128 + 1
    windows = [model.window_of(i) for i in range(depth)]
    assert windows == [513, 513, 513, None] * (depth // 4)


@pytest.mark.parametrize("engine", ["dense", "weightless"])
def test_at_init_the_stream_is_the_normed_embedding(engine):
    """Times a number that λ and μ make: attention and MLPs add 0, and every number is finite."""
    result = run(tiny(*MODEL, f"engine={engine}", "gradients=true"))
    curve, c = result.curve, [1.0]
    for i in range(DEPTH):
        c.append((1.15 - 0.10 * i / (DEPTH - 1)) * c[-1] + 0.20 - 0.15 * i / (DEPTH - 1))
    expected = [1.0, *np.repeat(np.square(c[1:]), 2)]
    # eps takes 1e-6 of the embedding's 0.64.
    for column in ("mean_square", "law_mean_field"):
        np.testing.assert_allclose(curve[column], expected, rtol=5e-6)
    assert (curve["branch_mean_square"][1:] == 0).all()
    assert np.isfinite(
        curve[["gradient_rms", "law_gradient_rms", "band_mean_field"]].to_numpy()
    ).all()
    # Behind the start's λ and μ, the gradient is back to front the same products, and x_mid's −0.2.
    np.testing.assert_allclose(curve["gradient_rms"], curve["law_gradient_rms"], rtol=0.1)
    sentence = result.summary["verdict"]["random"]["sentence"]
    assert "Attention and MLPs add nothing: every branch is 0." in sentence
