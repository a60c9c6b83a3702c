"""DeepLoop with tied blocks: against a plain loop over two blocks, and against independent weights."""

import numpy as np
import pytest
import torch
from conftest import STANDARD_ERRORS, ids_of, placed, tiny
from test_gradients import agree, by_autograd, expected
from torch.nn.functional import cross_entropy

from simlab import build_model, probe
from simlab.config import ConfigError
from simlab.experiment import prepare, run
from simlab.model.transformer import parameter_count
from simlab.schemes.init import table
from simlab.theory.mean_field import unpredictable
from simlab.theory.size import parameters_on_paper
from simlab.weights.prefix import begins

LOOPED = ["depth=6", "norm=deep_loop", "norm.loops=3", "init.std=0.1", "gradients=true"]


def by_a_loop(config):
    """The streams of two blocks' sublayers, visited three times, and the loss: the formula alone."""
    model, ids = build_model(config), ids_of(config)
    x = model.embedding(ids).detach().requires_grad_()
    streams = [x]
    for _ in range(3):
        for block in list(model.blocks)[:2]:
            for step in (block.attention, block.mlp):
                normed = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)
                total = 12**0.5 * x + step.sublayer(normed)
                x = torch.nn.functional.rms_norm(total, x.shape[-1:], eps=1e-6)
                x.retain_grad()
                streams.append(x)
    logits = model.head(torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6))[:, :-1]
    loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.item(), streams, [stream.grad.double() for stream in streams]


@pytest.mark.parametrize("width", [48, 96])
def test_tied_blocks_are_a_loop(width):
    """Streams, gradients with respect to them, and the loss."""
    config = tiny(*LOOPED, f"width={width}")
    result = run(config)
    loss, streams, gradients = by_a_loop(config)
    assert result.summary["loss"]["random"]["value"] == pytest.approx(loss, rel=1e-6)
    squares = [x.detach().double().square().mean().item() for x in streams]
    np.testing.assert_allclose(result.curve["mean_square"], squares, rtol=1e-5)
    cosines = [vector_norm_of_mean(x) for x in streams]
    np.testing.assert_allclose(result.curve["mean_vector_norm"], cosines, rtol=1e-5)
    for column, truth in expected(streams, gradients).items():
        agree(column, result.curve[column], truth)
    _, _, whole = by_autograd(build_model(config), ids_of(config))
    for ours, theirs in zip(whole, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def vector_norm_of_mean(x):
    return x.detach().double().mean((0, 1)).norm().item()


def test_tied_parameters():
    config = tiny(*LOOPED)
    model = build_model(config)
    first = dict(model.blocks[1].named_parameters())
    for layer in (3, 5):
        for name, value in model.blocks[layer].named_parameters():
            assert value is first[name]
    count = sum(p.numel() for p in model.parameters())
    assert parameter_count(config.shape) == parameters_on_paper(config.shape) == count
    assert count < parameter_count(tiny(*LOOPED[:2]).shape)
    frame = probe(model, ids_of(config)).rows()
    np.testing.assert_allclose(frame["mean_square"], run(config).curve["mean_square"])


def test_a_rule_of_the_layer_is_the_first_visits():
    """init=mitchell, whose stds fall with the block: a block has one std, at every visit."""
    model = build_model(tiny(*LOOPED[:3], "init=mitchell"))
    stds = [block.mlp.sublayer.down_proj.weight.std().item() for block in model.blocks]
    assert stds[0] == stds[2] == stds[4] > stds[1] == stds[3] == stds[5]


def test_tied_is_not_independent():
    """The negative control: branches of a block's visits add up, as those of other blocks don't."""
    cosines = {}  # of the stream and what is added, in the last block
    for loops in (1, 6):
        config = tiny("depth=6", "norm=deep_loop", f"norm.loops={loops}", "init.std=1", "seeds=12")
        cosines[loops] = run(config).curve.groupby("seed")["cosine"].last()
    error = np.hypot(cosines[1].sem(), cosines[6].sem())
    assert abs(cosines[1].mean()) < STANDARD_ERRORS * cosines[1].sem()
    assert cosines[6].mean() - cosines[1].mean() > STANDARD_ERRORS * error


def test_scales():
    """α = (2N)^½ and β = (8N)^−½, N the visits."""
    config = tiny("depth=4", "norm=deep_loop", "norm.loops=2")
    stds, beta = table(config.shape, config.init), (8 * 4) ** -0.5
    for role in ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert stds[role].sigma == pytest.approx(0.02 * beta, rel=1e-12)
    for role in ("q_proj", "k_proj", "embedding", "head"):
        assert stds[role].sigma == 0.02


def test_where_it_is_refused():
    with pytest.raises(ConfigError, match=r"^norm.loops=2: must divide depth=3, the visits"):
        tiny("norm=deep_loop", "norm.loops=2")
    config = tiny(*LOOPED)
    assert "meets it again" in unpredictable(config.shape, prepare(config).tokens)
    for engine in ("weightless", "theory"):
        with pytest.raises(ConfigError, match=f"^engine={engine}: .* norm.loops=3 meets it again"):
            prepare(tiny(*LOOPED, f"engine={engine}"))
    chosen = prepare(tiny(*LOOPED, "engine=auto"))
    assert chosen.config.engine == "dense"
    assert "norm.loops" in chosen.reason
    untied = tiny(*placed("deep_loop"))
    assert unpredictable(untied.shape, prepare(untied).tokens) is None


def test_no_depth_is_anothers_beginning():
    models = [tiny("norm=deep_loop", "norm.loops=2", f"depth={depth}") for depth in (4, 6)]
    assert not begins(models[0].shape, models[1].shape, models[0].init)
