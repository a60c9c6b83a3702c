"""Placements of several streams against hyper-connections as their papers write them."""

import numpy as np
import torch
from conftest import ids_of, placed, tiny
from torch.nn.functional import cross_entropy, rms_norm

from simlab import build_model
from simlab.experiment import prepare, run
from simlab.model.placement import start
from simlab.schemes.placement import PLACEMENTS
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
    finished = [PLACEMENTS["hyper_connections"].finish(state, None, None), h.sum(0)]
    gradients = []
    for out, leaf in zip(finished, leaves, strict=True):
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
