"""Gemma 3n's scheme against transformers' layers, and its law and its fixed point."""

import math

import numpy as np
import pytest
import torch
from conftest import STANDARD_ERRORS, tiny
from torch import nn

from simlab import build_model
from simlab.experiment import prepare, run
from simlab.model.placement import finished, start
from simlab.theory.mean_field import predict

D, RANK, LAYERS = 48, 5, 3


def theirs(coefficients):
    """transformers' model, its layers' attention and MLP replaced by random linear maps.

    Their gains are random too. coefficients: True for AltUp's as transformers draws them, else 0.
    """
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextConfig, Gemma3nTextModel

    torch.manual_seed(1)
    config = Gemma3nTextConfig(
        hidden_size=D, laurel_rank=RANK, num_hidden_layers=LAYERS, num_kv_shared_layers=0,
        intermediate_size=80, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=97, vocab_size_per_layer_input=97, hidden_size_per_layer_input=8,
        activation_sparsity_pattern=None, rms_norm_eps=1e-5,
        layer_types=["full_attention"] * LAYERS,
    )  # fmt: skip
    model = Gemma3nTextModel(config).eval()
    for layer in model.layers:
        layer.self_attn, layer.mlp = OfStates(D), nn.Linear(D, D, bias=False)
        for name, parameter in layer.named_parameters():
            if "norm" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
        if not coefficients:
            nn.init.zeros_(layer.altup.prediction_coefs.weight)
            nn.init.zeros_(layer.altup.correction_coefs.weight)
    return model


class OfStates(nn.Linear):
    """A linear map in the place of attention."""

    def __init__(self, width):
        super().__init__(width, width, bias=False)

    def forward(self, hidden_states, **_):
        return super().forward(hidden_states), None


def ours(layers, norm="gemma3n"):
    """simlab's model with the same parameters."""
    config = tiny(f"norm={norm}", f"norm.laurel_rank={RANK}", "norm.eps=1e-5", f"depth={LAYERS}")
    model = build_model(config)
    for block, layer in zip(model.blocks, layers, strict=True):
        attention, mlp = block.attention, block.mlp
        attention.sublayer, mlp.sublayer = nn.Linear(D, D, bias=False), layer.mlp
        attention.sublayer.weight = layer.self_attn.weight
        attention.norm_in.weight = layer.input_layernorm.weight
        attention.norm_out.weight = layer.post_attention_layernorm.weight
        attention.norm_laurel.weight = layer.laurel.post_laurel_norm.weight
        attention.laurel.left_proj.weight = layer.laurel.linear_left.weight
        attention.laurel.right_proj.weight = layer.laurel.linear_right.weight
        mlp.norm_in.weight = layer.pre_feedforward_layernorm.weight
        mlp.norm_out.weight = layer.post_feedforward_layernorm.weight
        if norm == "gemma3n_altup":
            for part in (attention.predict, mlp.correct):
                part.mode_proj.weight = layer.altup.modality_router.weight
            attention.predict.coef_proj.weight = layer.altup.prediction_coefs.weight
            mlp.correct.coef_proj.weight = layer.altup.correction_coefs.weight
    return model


@pytest.mark.parametrize("size", [1.0, 0.01])
def test_side_streams_as_transformers_model(size):
    """All streams after every layer, what the final norm gives, and the gradient at the embedding.

    With coefficients 100 times as large; a small embedding's projections are below the least square.
    """
    model = theirs(coefficients=True)
    for layer in model.layers:
        for name in ("modality_router", "prediction_coefs", "correction_coefs"):
            getattr(layer.altup, name).weight.data *= 10
        nn.init.ones_(layer.altup.router_norm.weight)
    mine = ours(model.layers, "gemma3n_altup")
    for part, their in (
        (mine.start_parts.embed_sides, model.altup_projections),
        (mine.finish_parts.unembed_sides, model.altup_unembed_projections),
    ):
        for side, matrix in zip(part.children(), their, strict=True):
            side.side_proj.weight = matrix.weight
    expected = []
    for layer in model.layers:
        layer.register_forward_hook(lambda m, args, out: expected.append(out))
    torch.manual_seed(2)
    x = size * torch.randn(2, 7, D)
    leaves, upstream = [x.clone().requires_grad_() for _ in range(2)], torch.randn(2, 7, D)
    out = model(inputs_embeds=leaves[1], use_cache=False).last_hidden_state
    state = start(leaves[0], mine.config, mine.start_parts)
    for block, streams in zip(mine.blocks, expected, strict=True):
        state = block(state)
        torch.testing.assert_close(torch.stack(state), streams, rtol=1e-5, atol=1e-5)
    last = mine.norm(finished(state, mine.config, mine.finish_parts))
    torch.testing.assert_close(last, out, rtol=1e-5, atol=1e-5)
    pairs = zip((last, out), leaves, strict=True)
    gradients = [torch.autograd.grad(y, leaf, upstream)[0] for y, leaf in pairs]
    bound = 1e-5 * float(gradients[0].abs().max())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=bound)


def passed(layers, x):
    """The active stream after every layer, of four streams."""
    states, streams = torch.stack([x, *(torch.randn_like(x) for _ in range(3))]), []
    for layer in layers:
        states = layer(states, per_layer_input=torch.randn(*x.shape[:2], 8))
        streams.append(states[0])
    return streams


@pytest.mark.parametrize("coefficients", [False, True])
def test_as_transformers_layers(coefficients):
    """The active stream and its gradient: equal; with AltUp's small coefficients, nearly so."""
    layers = theirs(coefficients).layers
    torch.manual_seed(2)
    x, upstream = torch.randn(2, 7, D, requires_grad=True), torch.randn(2, 7, D)
    expected, found, y = passed(layers, x), [], x
    for block in ours(layers).blocks:
        found.append(y := block(y))
    small = {"rtol": 1e-5, "atol": 1e-5} if not coefficients else {"rtol": 0, "atol": 0.02}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **small)
    gradients = [torch.autograd.grad(s[-1], x, upstream)[0] for s in (found, expected)]
    torch.testing.assert_close(*gradients, **small)
    assert coefficients == (not torch.allclose(*gradients, rtol=1e-5, atol=1e-5))


def after(m):
    """The mean square after attention, and after the MLP, of m before a block."""
    attention = ((math.sqrt(m) + 1) ** 2 + 2) / 2
    return attention, attention + 1


def column(rows, name):
    return np.array([getattr(row, name) for row in rows])


def test_the_fixed_point():
    """Theory's curve, from the formula alone, is the law's and comes to rest at (1 + √6)²."""
    config = tiny("norm=gemma3n", "depth=24", "norm.eps=1e-12", "inputs.batch=1", "inputs.length=4")
    rows = predict(config.shape, config.init, prepare(config).tokens, with_band=False).rows
    expected = [config.init.std**2 * 0.986578**2]
    for _ in range(24):
        expected += after(expected[-1])
    np.testing.assert_allclose(column(rows, "mean_square"), expected, rtol=1e-5)
    assert rows[-1].mean_square == pytest.approx((1 + math.sqrt(6)) ** 2, rel=1e-3)
    assert rows[-1].mean_square == pytest.approx(11.90, abs=0.01)


@pytest.mark.parametrize("width", [64, 192])
def test_both_engines_obey_the_law(width):
    """Mean squares to 2/d, which those of norms without LAuReL don't; and gradients are alike."""
    expected, sandwich = [1.0], [1.0]
    for _ in range(3):
        expected += after(expected[-1])
        sandwich += [sandwich[-1] + 1, sandwich[-1] + 2]
    gradients = []
    for engine in ("dense", "weightless"):
        config = tiny(
            "norm=gemma3n", "norm.laurel_rank=16", "init=fan_in", f"engine={engine}", "seeds=24",
            "gradients=true", f"width={width}", "heads=4", "kv_heads=4",
        )  # fmt: skip
        rows = run(config).curve.groupby(["sublayer", "kind"], sort=False)
        mean, error = rows.mean(numeric_only=True), rows.sem(numeric_only=True)
        v, noise = mean["mean_square"].to_numpy(), error["mean_square"].to_numpy()

        def off(law, v=v, noise=noise):
            return ((np.abs(v - law) - STANDARD_ERRORS * noise) / law).max()

        assert off(np.array(expected)) < 2 / width
        assert off(np.array(sandwich)) > 0.2
        gradients.append((mean["gradient_rms"].to_numpy(), error["gradient_rms"].to_numpy()))
    (dense, noise), (weightless, other) = gradients
    noise = STANDARD_ERRORS * np.hypot(noise, other)
    assert (np.abs(dense - weightless) < noise).all()
    # A row's gradient isn't taken for the next one's, up to the fall from one attention to its MLP.
    assert (np.abs(dense[:-1] - weightless[1:]) > noise[1:])[:5].all()


def test_theory_refuses_large_coefficients():
    """fan_in's have a std of 1/d, which theory leaves out at width 48 and not at width 24."""
    for width, refused in ((48, False), (24, True)):
        config = tiny("norm=gemma3n_altup", "init=fan_in", f"width={width}", "norm.laurel_rank=4")
        found = predict(config.shape, config.init, prepare(config).tokens, gradients=True)
        assert ("coefficients" in (found.ends or "")) == refused
        assert len(found.rows) == (1 if refused else 7)
