"""Gradients of the streaming engine against autograd through whole models, and transformers."""

import numpy as np
import pytest
import torch
from conftest import ids_of, placed, tiny, write_olmo

from simlab import build_model, probe
from simlab.checkpoints.checkpoint import Checkpoint
from simlab.config import ConfigError
from simlab.experiment import prepare, run
from simlab.measurement.engine import measure_curves
from simlab.measurement.statistics import GRADIENT_STATISTICS
from simlab.model.placement import finished, start, tensors_of
from simlab.schemes.placement import PLACEMENTS, placement_of
from simlab.weights.dense import RandomWeights

CPU = torch.device("cpu")


def by_autograd(model, ids):
    """The loss, and for every row of the curve the stream and the gradient: plain backward()."""
    placement = placement_of(model.config)

    def apart(state):  # each vector a tensor of its own, whose gradient is kept
        own = [x.view_as(x) for x in tensors_of(state)]
        for x in own:
            x.retain_grad()
        return tuple(own) if isinstance(state, tuple) else own[0]

    states = [
        apart(start(model.embed(ids).detach().requires_grad_(), model.config, model.start_parts))
    ]
    layers = [None]
    for layer, block in enumerate(model.blocks):
        for _, step in block.steps():
            states.append(apart(step(states[-1], ids)))
            layers.append(layer)
    logits = model.head(model.norm(finished(states[-1], model.config, model.finish_parts)))
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
    )
    loss.backward()
    gradients = [
        placement.pull(
            [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors_of(s)], layer
        )
        for s, layer in zip(states, layers, strict=True)
    ]
    return loss.detach(), [placement.watch(s) for s in states], [g.double() for g in gradients]


def expected(streams, gradients):
    """The columns by their definitions."""
    cosine = [
        torch.cosine_similarity(x.detach().double(), g, dim=-1)
        for x, g in zip(streams, gradients, strict=True)
    ]
    return {
        "gradient_norm": [g.norm(dim=-1).mean().item() for g in gradients],
        "gradient_rms": [g.pow(2).mean().sqrt().item() for g in gradients],
        "gradient_mean_vector_norm": [g.mean((0, 1)).norm().item() for g in gradients],
        "gradient_cosine": [c.nan_to_num(0).mean().item() for c in cosine],
    }


def agree(column, values, truth, tolerance=1e-5):
    """float32's accuracy, as PARITY, of the column's largest value; a cosine's scale is 1."""
    scale = 1.0 if column == "gradient_cosine" else np.max(np.abs(truth))
    np.testing.assert_allclose(values, truth, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("norm", ["pre", "siamese_norm", "hyper_connections"])
def test_gradients_are_those_of_what_sublayers_give(norm):
    """A row's gradient is autograd's of the sublayer's output, whichever vectors that is added to."""
    config = tiny(*placed(norm), "init.std=0.1", "gradients=true", "seeds=1", "engine=dense")
    model, outs = build_model(config), []

    def keep(_, args, out):
        out.retain_grad()
        outs.append(out)

    for block in model.blocks:
        for _, step in block.steps():
            step.sublayer.register_forward_hook(keep)
    ids = torch.from_numpy(prepare(config).tokens)
    logits = model(ids)[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:].flatten()).backward()
    rms = [out.grad.pow(2).mean().sqrt().item() for out in outs]
    np.testing.assert_allclose(run(config).curve["gradient_rms"][1:], rms, rtol=1e-4)


CASES = [placed(norm) for norm in sorted(PLACEMENTS)] + [
    ["norm.type=layer"],
    ["norm=dyt"],
    ["norm=derf", "norm.shift=0.3", "norm.placement=reordered"],
    ["model.tied=true"],
    ["model.qk_norm=none", "kv_heads=6"],
    ["model.mlp=geglu"],
    ["model.mlp=gelu", "model.bias=true"],
    ["model.value_embeddings=alternate", "model.value_embedding_scale=9"],
    ["norm=hybrid_norm", "model.value_embeddings=all", "model.attention_gate=per_head"],
]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_dense_gradients_match_autograd(case, monkeypatch):
    """At every sublayer. Sequences pass two at a time, and the head in parts."""
    monkeypatch.setattr(RandomWeights, "tokens_at_once", 22)
    monkeypatch.setattr("simlab.weights.base.COLUMNS_AT_ONCE", 40)
    config = tiny(*case, "init.std=0.1", "inputs.batch=5", "gradients=true")
    result = run(config)
    loss, streams, gradients = by_autograd(build_model(config), ids_of(config))
    assert result.summary["loss"]["random"]["value"] == pytest.approx(loss.item(), rel=1e-6)
    for column, truth in expected(streams, gradients).items():
        agree(column, result.curve[column], truth)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_checkpoint_gradients_match_transformers(tmp_path, changes):
    """transformers' own loss and autograd, at the embedding and after every block."""
    reference = write_olmo(tmp_path / "m", **changes)
    ids = torch.randint(61, (3, 23), generator=torch.Generator().manual_seed(0))
    out = reference(ids, labels=ids, output_hidden_states=True)
    hidden = out.hidden_states  # the last one is after the final norm: not a block's output
    wanted = torch.autograd.grad(out.loss, hidden[:-1])
    checkpoint = Checkpoint(str(tmp_path / "m"))
    (measured,) = measure_curves(checkpoint, ids, CPU, torch.float32, gradients=True)
    assert measured.loss.item() == pytest.approx(out.loss.item(), rel=1e-6)
    names = list(GRADIENT_STATISTICS)
    ends = [row for i, row in enumerate(measured.rows) if i % 2 == 0][:-1]
    for row, x, g in zip(ends, hidden[:-1], wanted, strict=True):
        measured = dict(zip(names, row.gradient.tolist(), strict=True))
        for column, truth in expected([x], [g.double()]).items():
            assert measured[column] == pytest.approx(truth[0], rel=1e-4, abs=1e-7), column


@pytest.mark.parametrize("engine", ["dense", "weightless"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_float32(engine, dtype):
    """The stream within 2 %, its gradient within 5: entries are about 1e-6, it travels scaled."""
    options = ["gradients=true", f"engine={engine}", "init.std=0.3", "inputs.batch=40"]
    full, half = (run(tiny(*options, f"dtype={d}")).curve for d in ("float32", dtype))
    np.testing.assert_allclose(half["gradient_rms"], full["gradient_rms"], rtol=0.05)
    np.testing.assert_allclose(half["mean_square"], full["mean_square"], rtol=0.02)


def test_no_gradients_after_an_overflow():
    result = run(tiny("dtype=float16", "norm=none", "init.std=3", "depth=6", "gradients=true"))
    assert result.summary["overflow"]
    assert result.curve["gradient_rms"].isna().all()
    assert result.summary["gradient_overflow"] == []


def test_gradient_overflow_is_reported():
    """Without norms and in half precision the gradient can leave the range where the stream doesn't."""
    config = tiny("dtype=float16", "norm=pre", "init.std=2", "depth=12", "gradients=true")
    result = run(config)
    lost = result.summary["gradient_overflow"]
    bad = result.curve["gradient_rms"].isna()
    assert not result.summary["overflow"]
    assert len(lost) == 1
    assert bad.sum() == (result.curve["sublayer"] <= lost[0]["sublayer"]).sum()
    assert not np.isinf(result.curve["gradient_rms"]).any()


def test_gradients_need_a_next_token():
    with pytest.raises(ConfigError, match=r"inputs.length must be at least 2"):
        prepare(tiny("gradients=true", "inputs.length=1"))


def test_gradients_do_not_change_the_forward():
    plain, both = run(tiny()).curve, run(tiny("gradients=true")).curve
    assert both[plain.columns].equals(plain)
    assert set(both.columns) - set(plain.columns) == {*GRADIENT_STATISTICS, "law_gradient_rms"}


def test_loss_at_init():
    """Logits of a normed stream are N(0, dσ²): the loss is ln V + dσ²/2, and its own spread known."""
    overrides = ["width=512", "d_ff=64", "vocab_size=20000", "init.std=0.03", "init.truncate=null"]
    config = tiny("depth=1", "heads=4", "kv_heads=4", *overrides, "gradients=true", "seeds=12",
                  "inputs.length=32", "engine=weightless")  # fmt: skip
    loss = run(config).summary["loss"]["random"]["value"]
    variance = 512 * 0.03**2
    # The targets' logits dominate: 62 per seed, 12 seeds, nearly independent.
    assert abs(loss - np.log(20000) - variance / 2) < 4 * np.sqrt(variance / (12 * 62))


def test_gradients_beside_a_token_of_zeros():
    """A padding token's embedding is zeros: its cosine counts as 0, and no gradient is emptied."""
    torch.manual_seed(0)
    config = tiny("init.std=0.1")
    model, ids = build_model(config), ids_of(config)
    with torch.no_grad():
        model.embedding.weight[ids[0, 3]] = 0
    frame = probe(model, ids, gradients=True).rows()
    _, streams, gradients = by_autograd(model, ids)
    for column, truth in expected(streams, gradients).items():
        agree(column, frame[column], truth)
    x, y = (stream.detach().double() for stream in streams[:2])
    cosine = torch.cosine_similarity(x, y - x, dim=-1)  # 0 where x is
    assert (x.norm(dim=-1) == 0).any()
    # y − x has the rounding of y in float32, some 1e-7 of it.
    assert frame["cosine"][1] == pytest.approx(cosine.mean().item(), abs=1e-6)
