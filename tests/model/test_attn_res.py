"""Attention residuals against the paper's code: every source is kept, and the softmax is taken."""

import numpy as np
import pytest
import torch
from conftest import ids_of, tiny
from torch.nn.functional import cross_entropy, rms_norm

from simlab import build_model
from simlab.experiment import run

OPTIONS = ("init=fan_in", "depth=4", "gradients=true")


def attend(sources, w):
    """Σ a_i·v_i, a = softmax_i(w·N(v_i)): arXiv 2603.15031, Fig. 2."""
    v = torch.stack(sources)
    return torch.einsum("nbt,nbtd->btd", (rms_norm(v, v.shape[-1:]) @ w).softmax(0), v)


def reference(model, ids, size, std):
    """Mean squares of all sources' sum, and rms of the gradient with respect to what is written."""
    generator = torch.Generator().manual_seed(0)

    def query():
        return std * torch.randn(model.config.width, generator=generator)

    sealed, open_sum = [model.embed(ids).detach().requires_grad_()], None
    writes, streams = [sealed[0]], [sealed[0]]
    steps = [step for block in model.blocks for step in (block.attention, block.mlp)]
    for k, step in enumerate(steps):
        if k % size == 0 and open_sum is not None:
            sealed, open_sum = [*sealed, open_sum], None
        sources = sealed if open_sum is None else [*sealed, open_sum]
        branch = step.sublayer(step.norm_in(attend(sources, query())))
        open_sum = branch if open_sum is None else open_sum + branch
        open_sum.retain_grad()
        writes.append(open_sum)
        streams.append(sum(sealed) + open_sum)
    logits = model.head(model.norm(attend([*sealed, open_sum], query())))
    cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return (
        [x.detach().square().mean().item() for x in streams],
        [x.grad.square().mean().sqrt().item() for x in writes],
    )


@pytest.mark.parametrize("size", [None, 1, 2, 3, 5])
def test_zero_queries_are_the_papers_code(size):
    """Stream and gradient of every row, from one autograd graph; queries that aren't 0 give others."""
    config = tiny("norm=attn_res", f"norm.block_size={size or 'null'}", *OPTIONS)
    curve, model = run(config).curve, build_model(config)
    streams, gradients = reference(model, ids_of(config), size or 1, std=0.0)
    np.testing.assert_allclose(curve["mean_square"], streams, rtol=1e-5)
    np.testing.assert_allclose(curve["gradient_rms"], gradients, rtol=1e-5)
    streams, gradients = reference(model, ids_of(config), size or 1, std=0.5)
    assert abs(streams[-1] / curve["mean_square"].iloc[-1] - 1) > 1e-3
    assert abs(gradients[0] / curve["gradient_rms"][0] - 1) > 1e-3


@pytest.mark.parametrize("engine", ["dense", "weightless"])
def test_the_function_is_pre_norms(engine):
    """Forward and backward, but for eps."""

    def curve(*norm):
        return run(tiny(*norm, *OPTIONS, "seeds=2", f"engine={engine}", "norm.eps=1e-12")).curve

    pre, peri = curve("norm=pre"), curve("norm=peri")
    for norm in (
        ["norm=attn_res"],
        ["norm=attn_res_block"],
        ["norm=attn_res", "norm.block_size=3"],
    ):
        ours = curve(*norm)
        for column in ("mean_square", "token_cosine", "gradient_rms"):
            np.testing.assert_allclose(ours[column], pre[column], rtol=1e-4)
            assert not np.allclose(ours[column], peri[column], rtol=0.05)
