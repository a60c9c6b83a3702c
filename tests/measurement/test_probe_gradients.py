"""``simlab.probe(…, gradients=True)`` against plain autograd and the engine; it changes nothing."""

import gc
import weakref
from functools import partial

import pandas as pd
import pytest
import torch
import transformers
from conftest import ids_of, placed, tiny
from probed import GPT2, IDS, OwnBlock, hooks, theirs
from test_gradients import agree, expected
from torch import nn
from torch.utils.checkpoint import checkpoint

from simlab import ConfigError, Layout, build_model, probe
from simlab.experiment import run

BATCH = {"input_ids": IDS, "use_cache": False}
NEXT = torch.nn.functional.cross_entropy


def small_gpt2():
    shape = {"n_embd": 32, "n_head": 4, "n_layer": 3, "vocab_size": 61, "n_positions": 16}
    torch.manual_seed(2)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**shape, initializer_range=0.2)
    ).eval()


def by_autograd(model, inner):
    """The stream and the loss's gradient at every step, by retain_grad in hooks of this test."""
    streams = []

    def keep(x):
        x.retain_grad()
        streams.append(x)

    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    handles = [blocks[0].register_forward_pre_hook(lambda _, args: keep(args[0]))]
    for block in blocks:
        handles.append(
            block.get_submodule(inner).register_forward_pre_hook(lambda _, args: keep(args[0]))
        )
        handles.append(
            block.register_forward_hook(
                lambda _, args, out: keep(out if torch.is_tensor(out) else out[0])
            )
        )
    loss = model(**BATCH, labels=IDS).loss
    loss.backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return loss.detach(), streams, [x.grad for x in streams]


def assert_gradients(rows, streams, gradients):
    for column, truth in expected(streams, [g.double() for g in gradients]).items():
        agree(
            column, rows[column], truth, tolerance=1e-6
        )  # the same float32 sums, reduced in float64


def state(model):
    return (
        {name: (p.detach().clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()},
        [module.training for module in model.modules()],
        hooks(model),
        torch.get_rng_state(),
    )  # fmt: skip


def assert_unchanged(model, before):
    parameters, modes, count, generator = state(model)
    for name, (value, wanted, gradient) in before[0].items():
        assert torch.equal(parameters[name][0], value)
        assert parameters[name][1:] == (wanted, gradient)
    assert (modes, count) == before[1:3]
    assert torch.equal(generator, before[3])


@pytest.mark.parametrize(
    "placement", ["pre", "reordered", "post", "swin_renorm", "deepnorm", "mix_ln"]
)
def test_own_model_has_the_engines_gradients(placement):
    config = tiny(*placed(placement), "init.std=0.1", "gradients=true")
    engine = run(config)
    probed = probe(build_model(config), ids_of(config), curve="random", gradients=True)
    rows = probed.rows()
    for column in [c for c in rows if c.startswith("gradient_")]:
        agree(column, rows[column], engine.curve[column].to_numpy())
    loss = engine.summary["loss"]["random"]["value"]
    assert probed.summary["loss"]["random"]["value"] == pytest.approx(loss, rel=1e-6)
    others = [c for c in rows if "gradient" not in c and "mean_field" not in c]
    pd.testing.assert_frame_equal(rows[others], engine.curve[others], check_exact=True)


MODELS = {
    "gpt2": (small_gpt2, "ln_2"),
    "qwen3": (partial(theirs, "Qwen3"), "post_attention_layernorm"),
    "olmo2": (partial(theirs, "Olmo2"), "mlp"),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_autograds(kind, frozen):
    """With the model's own loss and without labels, whether or not its parameters are trained."""
    make, inner = MODELS[kind]
    model = make()
    loss, streams, gradients = by_autograd(model, inner)
    model.requires_grad_(not frozen)
    model.train()  # GPT-2 has dropout, which eval mode turns off
    before = state(model)
    for batch in (BATCH | {"labels": IDS}, BATCH):
        probed = probe(model, batch, gradients=True)
        assert_gradients(probed.rows(), streams, gradients)
        assert probed.summary["loss"]["model"]["value"] == pytest.approx(loss.item(), rel=1e-6)
    assert_unchanged(model, before)
    assert not probe(model, BATCH).rows().filter(like="gradient").size


def test_your_own_backward():
    model = small_gpt2()
    _, streams, gradients = by_autograd(model, "ln_2")
    with probe(model, gradients=True) as probed:
        for ids in IDS.split(
            1
        ):  # a batch's gradient is of its own loss, a mean over its own tokens
            (model(input_ids=ids, labels=ids).loss / len(IDS)).backward()
    assert_gradients(probed.rows(), streams, gradients)
    given = {name: p.grad for name, p in model.named_parameters()}
    plain = small_gpt2()
    plain(**BATCH, labels=IDS).loss.backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(given[name], p.grad)
    assert not hooks(model)
    model.zero_grad()
    named = Layout("transformer.h", GPT2)
    with probe(model, layout=named, gradients=True) as probed:
        (3 * model(**BATCH, labels=IDS).loss).backward()
    assert_gradients(probed.rows(), streams, [3 * g for g in gradients])


class Plain(nn.Module):
    """Somebody's model: its forward gives what ``head`` makes of (logits, ids)."""

    def __init__(self, give=lambda logits, ids: logits, block=lambda block, x: block(x)):
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.head = nn.Embedding(61, 32), nn.Linear(32, 61)
        self.blocks = nn.ModuleList(OwnBlock("pre") for _ in range(2))
        self.give, self.call = give, block

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = self.call(block, x)
        return self.give(self.head(x), ids)


def with_loss(logits, ids):
    return logits, NEXT(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_the_loss_of_a_plain_module():
    """Logits, or a tuple with the loss, as in nanoGPT: the same rows."""
    rows = [
        probe(Plain(give), IDS, gradients=True).rows() for give in (lambda x, ids: x, with_loss)
    ]
    pd.testing.assert_frame_equal(*rows)
    assert (rows[0]["gradient_rms"] > 0).all()


def test_no_graph_is_left():
    seen = []
    model = Plain()
    model.head.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    probe(model, IDS, gradients=True)
    with probe(model, gradients=True) as probed:
        model(IDS).mean().backward()
    gc.collect()
    assert len(seen) == 2
    assert not any(ref() is not None for ref in seen)
    assert probed.rows()["gradient_rms"].notna().all()


REFUSED = {
    "no loss, no logits": (
        lambda: Plain(lambda x, ids: {"hidden": x}),
        "neither a loss nor logits",
    ),
    "loss per token": (lambda: Plain(lambda x, ids: {"loss": x.mean(-1)}), r"shape \(3, 11\)"),
    "of nothing": (lambda: Plain(lambda x, ids: {"loss": x.mean().detach()}), "sees no way"),
    "classes": (lambda: Plain(lambda x, ids: x[..., :5]), "5 logits per token for a token id 6"),
    "reentrant": (
        lambda: Plain(block=lambda b, x: checkpoint(b, x, use_reentrant=True)),
        "use_reentrant",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_missing_losses_are_refused(case):
    make, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        probe(make(), IDS, gradients=True).rows()


def test_no_backward_and_two():
    model = Plain()
    with probe(model, gradients=True) as probed:
        loss = model(IDS).mean()
    with pytest.raises(ConfigError, match="at sublayer 0 the gradient of 0 of 33 tokens"):
        probed.rows()
    loss.backward(retain_graph=True)
    probed.rows()
    loss.backward()
    with pytest.raises(ConfigError, match="66 of 33"):
        probed.rows()
    with probe(model, gradients=True) as probed:
        seen, _ = model(IDS).mean(), model(IDS)
    for _ in range(2):  # 66 of 66, those of one call twice
        seen.backward(retain_graph=True)
    with pytest.raises(ConfigError, match="two backwards went through one forward call"):
        probed.rows()


def test_the_loss_is_of_the_ids():
    """Whatever comes before them in the batch, and whatever mode is on."""
    model = small_gpt2()
    expected = probe(model, BATCH, gradients=True).rows()
    ones = torch.ones_like(IDS)
    with torch.inference_mode():
        rows = probe(model, {"attention_mask": ones} | BATCH, gradients=True).rows()
    pd.testing.assert_frame_equal(rows, expected)
    vectors = {"inputs_embeds": model.transformer.wte(IDS).detach(), "attention_mask": ones}
    with pytest.raises(ConfigError, match="no token ids to predict"):
        probe(model, vectors, gradients=True)


class Beside(OwnBlock):
    """Its MLP's norm gets a copy of the stream; what is added to the stream goes around it."""

    def forward(self, x):
        x = x + self.attend(self.ln_1(x))
        return x + self.mlp(self.ln_2(x.clone()))


def test_a_part_of_the_stream_is_refused():
    """The gradient at a copy isn't the stream's; without gradients the copy's value is enough."""
    model = Plain()
    model.blocks[1] = Beside("pre")
    assert probe(model, IDS).rows()["mean_square"].notna().all()
    with pytest.raises(ConfigError, match="goes around the tensor"):
        probe(model, IDS, gradients=True)
