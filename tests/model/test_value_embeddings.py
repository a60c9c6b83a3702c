"""Value embeddings: nanochat's attention written out, layers that have one, tied blocks, probes."""

import numpy as np
import pytest
import torch
from conftest import PARITY, assert_parity, ids_of, tiny
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from simlab import build_model, probe
from simlab.experiment import run
from simlab.model.attention import Attention
from simlab.model.describe import describe
from simlab.model.transformer import Block, dense_linear, parameter_count
from simlab.theory.mean_field import unpredictable
from simlab.theory.size import parameters_on_paper

LARGE = ["model.value_embeddings=alternate", "model.value_embedding_scale=9"]
IDS = torch.tensor([[3, 3, 7, 1, 96, 9, 2], [4, 6, 3, 1, 7, 0, 7]])


def of_nanochat(attention, x, ids, gate):
    """karpathy/nanochat, gpt.py, CausalSelfAttention.forward: 6 query heads, 3 kv heads of 8 channels.

    But for its factor 1.2 on q and k. gate: (B, T, 3).
    """
    q, k, v = (
        (x @ getattr(attention, f"{name}_proj").weight.T).view(*x.shape[:2], -1, 8)
        for name in "qkv"
    )
    v = v + gate[..., None] * attention.value_embedding.weight[ids].view(*x.shape[:2], 3, 8)
    angles = torch.outer(torch.arange(x.shape[1]), 10000 ** (-torch.arange(0, 8, 2) / 8))
    cos, sin = (f(angles)[None, :, None] for f in (torch.cos, torch.sin))

    def turned(y):
        a, b = y[..., :4], y[..., 4:]
        return rms_norm(torch.cat([a * cos - b * sin, b * cos + a * sin], -1), (8,), eps=1e-6)

    q, k, v = (y.transpose(1, 2) for y in (turned(q), turned(k), v))
    o = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return o.transpose(1, 2).flatten(2) @ attention.o_proj.weight.T


def nanochats():
    torch.manual_seed(0)
    asked = ["kv_heads=3", "model.qk_norm=per_head", "model.rope_theta=10000"]
    config = tiny(*asked, "model.value_embeddings=all")
    attention = Attention(config.shape, 0, dense_linear)
    for parameter in attention.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return attention


def test_nanochat():
    """Forward, and the gradient with respect to what attention reads; without rows it is another."""
    attention, x = nanochats(), torch.randn(2, 7, 48)
    up, outs, gradients = torch.randn(2, 7, 48), [], []
    gate = torch.full((2, 7, 3), 1.5)
    calls = (
        lambda x: attention(x, IDS),
        lambda x: of_nanochat(attention, x, IDS, gate),
        lambda x: of_nanochat(attention, x, IDS, 0 * gate),
    )
    for call in calls:
        given = x.clone().requires_grad_()
        outs.append(call(given))
        gradients += torch.autograd.grad(outs[-1], given, up)
    assert_parity(*outs[:2], "output")
    assert_parity(*gradients[:2], "gradient")
    for ours, without in ((outs[0], outs[2]), (gradients[0], gradients[2])):
        assert (ours - without).norm() > 0.05 * ours.norm()


def test_nanochats_gate_at_init():
    """3·sigmoid(w·x[:12]), w uniform on (0, 0.02): 1.5 ± 2 %, and it hardly moves the output."""
    attention, x = nanochats(), torch.randn(2, 7, 48)
    x = rms_norm(x, (48,))
    torch.manual_seed(1)
    w = 0.02 * torch.rand(1000, 12)
    gate = 3 * torch.sigmoid(torch.randn(1000, 12).mul(w).sum(1))
    assert gate.mean().item() == pytest.approx(1.5, abs=0.005)
    assert gate.std().item() == pytest.approx(0.03, rel=0.1)
    gate = 3 * torch.sigmoid(x[..., :12] @ w[:3].T)
    ours, theirs = attention(x, IDS), of_nanochat(attention, x, IDS, gate)
    assert (ours - theirs).norm() < 0.025 * ours.norm()


@pytest.mark.parametrize(("layers", "has"), [("none", ""), ("alternate", "02"), ("all", "012")])
def test_layers_and_sizes(layers, has):
    """The last layer has one. Both counts of parameters know the whole vocabulary's rows."""
    plain, model = (tiny(f"model.value_embeddings={x}").shape for x in ("none", layers))
    built = build_model(tiny(f"model.value_embeddings={layers}"))
    names = [n for n, _ in built.named_parameters() if n.endswith("value_embedding.weight")]
    assert names == [f"blocks.{i}.attention.sublayer.value_embedding.weight" for i in has]
    count = sum(p.numel() for p in built.parameters())
    assert count == parameter_count(model) == parameters_on_paper(model)
    assert count - parameter_count(plain) == len(has) * 97 * 16
    assert describe(model) == describe(plain)
    assert [tiny(*LARGE, "depth=4").shape.embeds_values(i) for i in range(4)] == [0, 1, 0, 1]


def test_tied_blocks():
    """A block's visits have one value embedding, as they have one of every matrix."""
    asked = ["depth=6", "norm=deep_loop", "norm.loops=2", *LARGE, "init.std=0.1"]
    config = tiny(*asked)
    model = build_model(config)
    assert [block.attention.sublayer.embeds_values for block in model.blocks] == [1, 0, 1] * 2
    for first, again in ((0, 3), (2, 5)):
        ends = [model.blocks[i].attention.sublayer.value_embedding for i in (first, again)]
        assert ends[0].weight is ends[1].weight
    count = sum(p.numel() for p in model.parameters())
    assert count == parameter_count(config.shape) == parameters_on_paper(config.shape)
    rows = probe(model, ids_of(config)).rows()["mean_square"]
    np.testing.assert_allclose(rows, run(config).curve["mean_square"], **PARITY)


@pytest.mark.parametrize("norm", ["reordered", "mix_ln", "swin_renorm"])
def test_probe_and_engine(norm, monkeypatch):
    """The whole model's forward and backward by the probe; the engine's, two sequences at a time."""
    monkeypatch.setattr("simlab.weights.base.Weights.tokens_at_once", 22)
    config = tiny(f"norm={norm}", *LARGE, "init.std=0.1", "inputs.batch=5", "gradients=true")
    probed = probe(build_model(config), ids_of(config), gradients=True).rows()
    curve = run(config).curve
    for column in ("mean_square", "read_mean_square", "cosine", "gradient_rms"):
        np.testing.assert_allclose(probed[column], curve[column], rtol=1e-4, atol=1e-6)
    plain = run(tiny(f"norm={norm}", "init.std=0.1", "inputs.batch=5", "gradients=true")).curve
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(plain["mean_square"], curve["mean_square"], rtol=1e-3)


def test_ids_are_needed():
    block = Block(tiny("model.value_embeddings=all").shape, 0)
    with pytest.raises(ValueError, match="needs token ids"):
        block(torch.ones(1, 2, 48))


def test_theory_refuses_normed_values():
    model = tiny("norm=hybrid_norm", "model.value_embeddings=all").shape
    assert "value embeddings" in unpredictable(model, IDS.numpy())
