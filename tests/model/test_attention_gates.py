"""Attention's output gate against transformers' Qwen3-Next and against sums over heads."""

import pytest
import torch
from conftest import PARITY, assert_parity, tiny

from simlab.model.attention import Attention
from simlab.model.describe import describe
from simlab.model.transformer import dense_linear, parameter_count
from simlab.theory.size import parameters_on_paper

C = 16
QWEN = [
    "heads=6", "kv_heads=2", f"model.head_dim={C}", "model.qk_norm=per_head", "model.rotary=0.25",
    "norm=pre", "norm.type=rms_plus_one", "norm.eps=1e-5", "model.rope_theta=10000",
]  # fmt: skip


def module(*overrides):
    """Attention with parameters away from their init, and gates that open and shut."""
    torch.manual_seed(0)
    attention = Attention(tiny(*overrides).shape, 0, dense_linear)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return attention


@pytest.mark.parametrize("bias", [False, True])
def test_qwen3_next(bias):
    """Forward and backward. W_g is the other half of their q_proj, head by head."""
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import (
        Qwen3NextAttention,
        Qwen3NextRotaryEmbedding,
    )

    config = Qwen3NextConfig(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=C,
        rms_norm_eps=1e-5, attention_bias=bias, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    )  # fmt: skip
    theirs = Qwen3NextAttention(config, 0)
    ours = module(*QWEN, "model.attention_gate=elementwise", f"model.bias={str(bias).lower()}")
    state = ours.state_dict()
    doubled = {}
    for kind in ["weight"] + ["bias"] * bias:
        q, g = (state.pop(f"{name}.{kind}") for name in ("q_proj", "g_proj"))
        halves = (half.unflatten(0, (6, C)) for half in (q, g))
        doubled[f"q_proj.{kind}"] = torch.cat(list(halves), 1).flatten(0, 1)
    theirs.load_state_dict(state | doubled, strict=True)

    x = torch.randn(2, 9, 48)
    angles = Qwen3NextRotaryEmbedding(config)(x, torch.arange(9)[None])
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    upstream, outs, gradients = torch.randn(2, 9, 48), [], []
    for call in (ours, lambda x: theirs(x, angles, mask)[0]):
        given = x.clone().requires_grad_()
        outs.append(call(given))
        gradients += torch.autograd.grad(outs[-1], given, upstream)
    assert_parity(*outs, "output")
    assert_parity(*gradients, "gradient")


@pytest.mark.parametrize("kind", ["elementwise", "per_head"])
def test_gates_are_of_heads(kind):
    """Σ_h W_o^h(sigmoid(W_g^h x)·o_h), o_h read off attention without a gate."""
    gated = module("norm=pre", f"model.attention_gate={kind}")
    plain = module("norm=pre")
    state = gated.state_dict()
    weight = state.pop("g_proj.weight")
    plain.load_state_dict(state, strict=True)
    x, seen = torch.randn(2, 9, 48), []
    plain.attend.register_forward_hook(lambda m, args, out: seen.append(out))
    plain(x)
    gates = torch.sigmoid(x @ weight.T)
    out = torch.zeros(2, 9, 48)
    for h in range(6):
        gate = gates[..., h, None] if kind == "per_head" else gates[..., 8 * h : 8 * h + 8]
        out += (gate * seen[0][:, h]) @ gated.o_proj.weight[:, 8 * h : 8 * h + 8].T
    torch.testing.assert_close(gated(x), out, **PARITY)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(plain(x), out, **PARITY)


@pytest.mark.parametrize(("kind", "rows"), [("elementwise", 48), ("per_head", 6)])
def test_sizes(kind, rows):
    """W_g is among a block's matrices, next to v's, and in both counts of parameters."""
    plain, gated = (tiny(f"model.attention_gate={k}").shape for k in ("none", kind))
    matrices = describe(gated).matrices
    names = [matrix.name.rpartition(".")[2] for matrix in matrices]
    assert names[:5] == ["q_proj", "k_proj", "v_proj", "g_proj", "o_proj"]
    assert (matrices[3].d_in, matrices[3].d_out) == (48, rows)
    assert matrices[0].group == matrices[3].group
    assert parameter_count(gated) - parameter_count(plain) == 3 * 48 * rows
    for model in (gated, tiny(f"model.attention_gate={kind}", "model.bias=true").shape):
        assert parameters_on_paper(model) == parameter_count(model)
