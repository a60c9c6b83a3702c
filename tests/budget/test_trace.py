"""What is read off a block of one token, against blocks with real weights and many tokens."""

import pytest
import torch
from conftest import tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from simlab.budget.trace import Counter, trace
from simlab.measurement.engine import as_leaves
from simlab.model.describe import describe
from simlab.model.placement import end_parts, start, tensors_of
from simlab.model.transformer import Block, dense_linear
from simlab.schemes.placement import PLACEMENTS

SETTINGS = [[f"norm={norm}"] for norm in sorted(PLACEMENTS)]
SETTINGS += [["model.mlp=gelu"], ["model.qk_norm=per_head", "norm.type=layer"], ["dtype=bfloat16"]]
SETTINGS += [["model.experts=3", "model.experts_per_token=3"]]  # every token meets all
BATCH = 64


def test_live_bytes():
    with Counter() as count:
        x = torch.ones(10)
        y = x + 1
        assert count.now == 80
        view = y[:5]
        assert count.now == 80
        del x
        assert count.now == 40
        del y
        assert count.now == 40  # the view holds it
        del view
        assert count.now == 0
    assert (count.peak, count.written) == (80, 20)


@pytest.mark.parametrize("overrides", SETTINGS, ids=" ".join)
def test_bytes_of_many_tokens(overrides):
    """Sequences of one token, so that the table of RoPE's angles, which all share, is as small."""
    config = tiny(*overrides)
    dtype = getattr(torch, config.dtype)
    block = Block(config.shape, 0).to(dtype).requires_grad_(False)
    parts = end_parts("start", config.shape, dense_linear).to(dtype).requires_grad_(False)
    x = start(torch.ones(BATCH, 1, config.shape.width, dtype=dtype), config.shape, parts)
    traced = trace(config.shape, config.dtype, True)
    with torch.no_grad(), Counter() as count:
        block(x)
    # A probe holds a step's tensors longer than the block alone does: the trace has both. The means
    # of mhc's streams and the sum of AltUp's, which are added to be measured, only a probe holds.
    norm = config.shape.norm
    rel = 0.3 if norm.mix_std or norm.placement == "gemma3n_altup" else 0.1
    assert count.peak == pytest.approx(BATCH * traced.forward, rel=rel)
    assert count.peak <= BATCH * traced.forward
    passed = [as_leaves(tuple(y.clone() for y in x) if isinstance(x, tuple) else x)]
    ones = tuple(torch.ones_like(y) for y in tensors_of(block(x)))
    with Counter() as count:
        for _, step in block.steps():
            passed.append(step(passed[-1]))
        wanted = [y for state in passed[:-1] for y in tensors_of(state)]
        torch.autograd.grad(tensors_of(passed[-1]), wanted, ones, allow_unused=True)
    assert count.peak == pytest.approx(BATCH * traced.backward, rel=0.1)


@pytest.mark.parametrize("overrides", [[], ["model.head_dim=10"], ["kv_heads=6"]], ids=" ".join)
def test_attention_operations(overrides):
    """QKᵀ and the weights times V: two operations for each of a head's entries; as torch counts."""
    shape = tiny(*overrides).shape
    pair = trace(shape, "float32", False).pair
    assert pair == 4 * shape.heads * shape.head_dim
    block, x = Block(shape, 0).requires_grad_(False), torch.ones(1, 5, shape.width)
    linear = 2 * 5 * describe(shape).entries
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as torchs:
        block(x)
    assert torchs.get_total_flops() == linear + 25 * pair


def test_plain_mlp_takes_less():
    shapes = (tiny(f"model.mlp={mlp}", "d_ff=800").shape for mlp in ("geglu", "gelu"))
    gated, plain = (trace(shape, "float32", True) for shape in shapes)
    assert gated.forward - plain.forward == 4 * 800  # an activation
    assert gated.backward > plain.backward
    assert gated.written > plain.written
    assert len(gated.matrices) == len(plain.matrices) + 1 == 7
