"""What is read off a block of one token, against blocks with real weights and many tokens."""

import pytest
import torch
from conftest import tiny

from simlab.budget.trace import Live, trace
from simlab.model.transformer import Block
from simlab.schemes.placement import PLACEMENTS

SETTINGS = [[f"norm={norm}"] for norm in sorted(PLACEMENTS)]
SETTINGS += [["model.mlp=gelu"], ["model.qk_norm=per_head", "norm.type=layer"], ["dtype=bfloat16"]]
BATCH = 64


def test_live_bytes():
    with Live() as live:
        x = torch.ones(10)
        y = x + 1
        assert live.now == 80
        view = y[:5]
        assert live.now == 80
        del x
        assert live.now == 40
        del y
        assert live.now == 40  # the view holds it
        del view
        assert live.now == 0
    assert (live.peak, live.written) == (80, 20)


@pytest.mark.parametrize("overrides", SETTINGS, ids=" ".join)
def test_many_tokens_take_as_many_times_one_tokens_bytes(overrides):
    """Sequences of one token, so that the table of RoPE's angles, which all share, is as small."""
    config = tiny(*overrides)
    dtype = getattr(torch, config.dtype)
    block = Block(config.shape, 0).to(dtype).requires_grad_(False)
    x = torch.ones(BATCH, 1, config.shape.width, dtype=dtype)
    found = trace(config.shape, config.dtype, True)
    with torch.no_grad(), Live() as live:
        block(x)
    # A probe holds a step's tensors longer than the block alone does: the trace has both.
    assert live.peak == pytest.approx(BATCH * found.forward, rel=0.1)
    assert live.peak <= BATCH * found.forward
    passed = [x.requires_grad_()]
    with Live() as live:
        for _, step in block.steps():
            passed.append(step(passed[-1]))
        torch.autograd.grad(passed[-1], passed[:-1], torch.ones_like(x))
    assert live.peak == pytest.approx(BATCH * found.backward, rel=0.1)


def test_a_plain_mlp_takes_less():
    shapes = (tiny(f"model.mlp={mlp}", "d_ff=800").shape for mlp in ("geglu", "gelu"))
    gated, plain = (trace(shape, "float32", True) for shape in shapes)
    assert gated.forward - plain.forward == 4 * 800  # an activation
    assert gated.backward > plain.backward
    assert gated.written > plain.written
    assert len(gated.matrices) == len(plain.matrices) + 1 == 7
