"""Placements of several streams against hyper-connections as their papers write them."""

import math

import numpy as np
import pytest
import torch
from conftest import ids_of, placed, tiny
from torch.nn.functional import cross_entropy, rms_norm
from transformers import DeepseekV4Config, HYV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4HyperConnection,
    DeepseekV4HyperHead,
)
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextHyperHead
from transformers.models.hy_v4.modeling_hy_v4 import HYV4HyperConnection, HYV4HyperHead

from simlab import build_model
from simlab.experiment import prepare, run
from simlab.model.placement import finished, start
from simlab.schemes.placement import placement_of
from simlab.theory.mean_field import predict


def hyper_connections(h, k, F, norm):
    """Algorithm 2 of arXiv 2409.19606 at its init: streams h (n, B, T, D), sublayer k from 0."""
    n, d = len(h), h.shape[-1]
    w_read, w_mix, w_write, s = torch.zeros(d), torch.zeros(d, n), torch.zeros(d), 0.01
    normed = rms_norm(h, (d,), None, 1e-6)
    read = torch.eye(n)[k % n].view(n, 1, 1) + s * (normed @ w_read).tanh()  # (n, B, T)
    mix = torch.eye(n).view(n, 1, 1, n) + s * (normed @ w_mix).tanh()  # (n from, B, T, n to)
    write = torch.ones(n, 1, 1) + s * (normed @ w_write).tanh()
    branch = F(norm((read[..., None] * h).sum(0)))
    return torch.einsum("jbtn,jbtd->nbtd", mix, h) + write[..., None] * branch


def test_hyper_connections_by_the_paper():
    """Streams, logits and the gradient at the embedding, forward and backward."""
    config = tiny("norm=hyper_connections", "norm.streams=3", "init.std=0.1")
    model, ids = build_model(config), ids_of(config)
    x = model.embed(ids).detach()
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    state, h = start(leaves[0], config.shape), leaves[1].expand(3, *x.shape)
    for i, block in enumerate(model.blocks):
        state = block(state)
        for j, step in enumerate((block.attention, block.mlp)):
            h = hyper_connections(h, 2 * i + j, step.sublayer, step.norm_in)
        torch.testing.assert_close(torch.stack(state), h, rtol=1e-6, atol=1e-6)
    outs = [finished(state, config.shape), h.sum(0)]
    gradients = []
    for out, leaf in zip(outs, leaves, strict=True):
        logits = model.head(model.norm(out))[:, :-1].flatten(0, 1)
        (gradient,) = torch.autograd.grad(cross_entropy(logits, ids[:, 1:].flatten()), leaf)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_hyper_connections_are_pre_at_init():
    """The stream to the last bit; its gradient but for rounding; peri's is another."""
    for engine in ("dense", "weightless"):
        options = ("init=fan_in", "gradients=true", "seeds=2", "norm.eps=1e-9", f"engine={engine}")
        curves = {
            n: run(tiny(f"norm={n}", *options)).curve for n in ("hyper_connections", "pre", "peri")
        }
        ours = curves["hyper_connections"]
        for column in ("mean_square", "branch_mean_square", "token_cosine", "max_abs"):
            np.testing.assert_array_equal(ours[column], curves["pre"][column])
        np.testing.assert_allclose(ours["gradient_rms"], curves["pre"]["gradient_rms"], rtol=1e-4)
        assert not np.allclose(ours["gradient_rms"], curves["peri"]["gradient_rms"], rtol=0.1)


def test_theory_of_equal_streams_is_that_of_one():
    """Curve, band and gradient, at the cost of one."""

    def predicted(norm):
        config = tiny(*placed(norm), "init=fan_in", "norm.eps=1e-9")
        tokens = prepare(config).tokens
        return predict(config.shape, config.init, tokens, gradients=True).rows

    for ours, pre in zip(predicted("hyper_connections"), predicted("pre"), strict=True):
        for name in ("mean_square", "band", "token_cosine", "gradient_rms", "branch_mean_square"):
            np.testing.assert_allclose(getattr(ours, name), getattr(pre, name), rtol=1e-6)


# A step, a head and their config.
MODULES = {
    "mhc": (DeepseekV4HyperConnection, lambda config: Glm5NextTextHyperHead(), DeepseekV4Config),
    "deepseek_v4": (DeepseekV4HyperConnection, DeepseekV4HyperHead, DeepseekV4Config),
    "hy_v4": (HYV4HyperConnection, HYV4HyperHead, HYV4Config),
}


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("norm", MODULES)
def test_mhc_by_transformers(norm, scale):
    """Streams after every sublayer, what the head makes of them, the gradient at the embedding."""
    keys = ("norm.streams=3", "norm.mix_std=0.2", f"norm.mix_scale={scale}", "init.std=0.1")
    model = build_model(tiny(f"norm={norm}", *keys))
    module, head_of, config_of = MODULES[norm]
    config, logit = config_of(hidden_size=48, hc_mult=3, rms_norm_eps=1e-6), -math.log(2)
    x = model.embed(torch.arange(22).view(2, 11)).detach()
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    state, h = start(leaves[0], model.config), leaves[1][:, :, None].expand(2, 11, 3, 48)
    for _, step in (pair for block in model.blocks for pair in block.steps()):
        state = step(state)
        theirs = module(config).requires_grad_(False)
        theirs.fn = step.mix.mix_proj.weight
        theirs.scale.fill_(scale)
        theirs.base.zero_()[:3] = logit if norm == "hy_v4" else 0.0
        post, *comb, read = theirs(h.contiguous())
        kept = comb[0].mT @ h if comb else h
        h = post[..., None] * step.sublayer(step.norm_in(read))[:, :, None] + kept
        torch.testing.assert_close(torch.stack(state, 2), h, rtol=1e-5, atol=5e-5)
    head = head_of(config)
    if norm != "mhc":
        head.requires_grad_(False).hc_fn = model.finish_parts.gates.mix_proj.weight
        head.hc_scale.fill_(scale)
        head.hc_base.fill_(logit if norm == "hy_v4" else 0.0)
    outs = [finished(state, model.config, model.finish_parts), head(h)]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=5e-5)
    weights = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(1))
    losses = [(out * weights).sum() for out in outs]
    gradients = [torch.autograd.grad(*pair)[0] for pair in zip(losses, leaves, strict=True)]
    size = float(gradients[0].abs().max())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4 * size)


def test_a_step_of_mhc_moves_the_mean_by_its_branch():
    """x̄' = x̄ + q̄·F: what is measured as skip and branch, though c is doubly stochastic but for 10⁻³."""
    model = build_model(tiny(*placed("mhc"), "init.std=0.1"))
    block = model.blocks[0]
    state = block(start(model.embed(torch.arange(22).view(2, 11)), model.config))
    assert max((x - state[0]).abs().max() for x in state) > 0.1  # streams have parted
    seen = []
    block.mlp.add.register_forward_hook(lambda m, args, out: seen.append((*args, out)))
    watch = placement_of(model.config).watch
    after = watch(block.mlp(state))
    ((skip, _, total),) = seen
    torch.testing.assert_close(total, after, rtol=1e-6, atol=1e-6)
    assert (skip - watch(state)).abs().max() < 0.02 * watch(state).abs().max()
