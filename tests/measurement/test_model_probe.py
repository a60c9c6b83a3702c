"""``simlab.probe`` on other people's models: its rows against ones made by hand; it changes nothing."""

import contextlib
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import PARITY, ids_of, placed, tiny, write_olmo
from probed import (
    GPT2,
    IDS,
    KINDS,
    POST,
    SAME,
    SHAPE,
    Own,
    assert_same,
    hooks,
    perturbed,
    refused,
    theirs,
    values,
)
from torch import nn

from simlab import ConfigError, Layout, build_model, compose, probe
from simlab.experiment import run
from simlab.schemes.placement import PLACEMENTS


def by_hand(model, ids):
    """The rows from each layer's own input and its submodules, called again one after another."""
    calls, rows = [], [{"kind": "embedding"}]
    handles = [
        layer.register_forward_pre_hook(lambda m, a, k: calls.append(k), with_kwargs=True)
        for layer in model.model.layers
    ]
    hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for handle in handles:
        handle.remove()
    rows[0]["after"] = hidden[0]
    for i, (layer, kwargs) in enumerate(zip(model.model.layers, calls, strict=True)):
        x, reordered = hidden[i], hasattr(layer, "post_feedforward_layernorm")
        pre = hasattr(layer, "input_layernorm")
        norms = [getattr(layer, "input_layernorm", None), layer.post_attention_layernorm]
        if pre and reordered:
            norms = [layer.input_layernorm, layer.pre_feedforward_layernorm]
        out_norms = [
            layer.post_attention_layernorm,
            getattr(layer, "post_feedforward_layernorm", None),
        ]
        for kind, norm_in, norm_out in zip(("attention", "mlp"), norms, out_norms, strict=True):
            given, weights = norm_in(x) if pre else x, None
            if kind == "attention":
                raw, weights = layer.self_attn(hidden_states=given, **kwargs)
            else:
                raw = layer.mlp(given)
            branch = norm_out(raw) if reordered else raw
            norm = norm_out if reordered else norm_in
            rows.append({"kind": kind, "skip": x, "branch": branch, "raw": raw, "norm": norm})
            rows[-1] |= {"after": x + branch, "weights": weights}
            x = x + branch
        if i < len(calls) - 1:  # the last entry is after the final norm
            torch.testing.assert_close(x, hidden[i + 1], **PARITY)
    return pd.DataFrame([values(row) for row in rows])


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, *SAME])
def test_rows_match_layer_submodules(kind):
    model = theirs(kind)
    frame, expected = probe(model, IDS).rows(), by_hand(model, IDS)
    assert_same(frame, expected, expected.columns.drop("kind"))
    assert frame["sublayer"].tolist() == list(range(7))
    assert frame["block"].tolist() == [pd.NA, 0, 0, 1, 1, 2, 2]
    if kind != "Olmo":  # its norm has no gain, and its eps is no attribute
        assert frame["eps_factor"].iloc[1] < 0.999  # eps is seen
        normed = frame["law_additive"].notna().all()  # a law only where branches are
        assert normed == (kind in ("Olmo2", "Olmo3", "Gemma2", "Gemma3"))
    assert frame["attention_max_logit"].isna().all()


def without_theory(frame):
    """A probed model's init isn't known, so nothing is predicted."""
    return frame.drop(columns=["law_mean_field", "band_mean_field"])


def test_olmo2_rows_match_the_engine(tmp_path):
    model = write_olmo(tmp_path / "olmo")
    config = compose(
        ["source=checkpoint", f"source.path={tmp_path / 'olmo'}", "seeds=0", "inputs.batch=3",
         "inputs.length=11", "device=cpu"]
    )  # fmt: skip
    engine = run(config).curve
    frame = probe(model, ids_of(config)).rows()
    assert set(engine.columns) - set(frame.columns) == {"outside"}
    columns = [c for c in frame.columns if c not in ("curve", "kind", "attention_max_logit")]
    assert_same(frame, engine, columns)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_own_model_rows_match_the_engine(placement):
    config = tiny(*placed(placement), "init.std=0.1")
    engine = without_theory(run(config).curve)
    ids = ids_of(config)
    model = build_model(config)
    frame = without_theory(probe(model, ids, curve="random").rows())
    pd.testing.assert_frame_equal(frame, engine, check_exact=True)
    with probe(model, curve="random") as probing:  # with autograd on
        model(ids).sum().backward()
    pd.testing.assert_frame_equal(without_theory(probing.rows()), engine, check_exact=True)


@pytest.mark.parametrize(
    ("kind", "head"), [("Olmo2", "Model"), ("Gemma3", "TextModel"), ("Llama", "ForCausalLM")]
)
def test_bare_models(kind, head):
    model = theirs(kind, head)
    assert len(probe(model, IDS).rows()) == 7


def test_multimodal_text_model():
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=SHAPE, vision_config=vision, mm_tokens_per_image=4, image_token_index=60
    )
    model = perturbed(transformers.Gemma3ForConditionalGeneration(config))
    ids = IDS.clamp(max=50)
    frame = probe(model, ids).rows()
    pd.testing.assert_frame_equal(frame, probe(model.model.language_model, ids).rows())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_bit_equal(kind, dtype):
    model = theirs(kind).to(dtype)

    def passed():
        model.zero_grad()
        out = model(IDS, labels=IDS, output_hidden_states=True)
        out.loss.backward()
        return [out.logits, *out.hidden_states, *(p.grad for p in model.parameters())]

    plain, before = passed(), hooks(model)  # transformers leaves some of its own
    with probe(model) as probing:
        probed = passed()
    assert all(torch.equal(a, b) for a, b in zip(plain, probed, strict=True))
    assert hooks(model) == before
    gains = probing.rows()["gain_mean_square"].iloc[1:]
    assert gains.notna().all()  # the norms are recognised in bfloat16 too


def test_hooks_after_exceptions():
    model = theirs("Llama", attention_dropout=0.5)
    rows = probe(model, IDS).rows()
    pd.testing.assert_frame_equal(probe(model.train(), IDS).rows(), rows)
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    for ids in (IDS, IDS + 1000):
        with contextlib.suppress(ConfigError):
            probe(model, ids)
        assert hooks(model) == 0
        assert [m.training for m in model.modules()] == modes
    model.model.layers[1].mlp.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError), probe(model) as probing:
        model(IDS)
    assert hooks(model) == 0
    with pytest.raises(ConfigError, match="saw 0 of 33 tokens: a forward call failed"):
        probing.rows()


def test_batches_are_of_one_curve():
    model = theirs("Llama")
    with torch.no_grad(), probe(model, curve="two", seed=5) as probing:
        model(IDS[:1])
        model(input_ids=IDS[1:])
    once = probe(model, (IDS,), curve="two", seed=5).rows()
    assert (once["curve"].unique().tolist(), once["seed"].unique().tolist()) == (["two"], [5])
    assert_same(probing.rows(), once, once.columns.drop(["curve", "kind"]))


def test_recomputed_activations_count_once():
    model = theirs("Llama").train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    with probe(model) as probing:
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    pd.testing.assert_frame_equal(probing.rows(), probe(model, IDS).rows())


@pytest.mark.parametrize("how", ["transformers", "layout", "simlab"])
def test_probes_keep_no_tensors(how):
    model, layout = {
        "transformers": lambda: (theirs("Gemma2"), None),
        "layout": lambda: (perturbed(Own("post")), Layout("h", POST)),
        "simlab": lambda: (build_model(tiny()), None),
    }[how]()
    for block in probe(model, IDS, layout=layout).probe.probes:
        held = [block.outputs, block.stream] if how != "simlab" else [block.tensors, block.last]
        assert held == [{}, None]


def test_refused_batches():
    model = theirs("Llama")
    mask = torch.ones_like(IDS)
    assert len(probe(model, {"input_ids": IDS, "attention_mask": mask}).rows()) == 7
    mask[0, -2:] = 0
    for batch in ({"input_ids": IDS, "attention_mask": mask}, (IDS, mask)):
        assert "attention_mask hides 2 of 33 tokens" in refused(model, batch)
    assert "shape (0, 11, 32): holds no token" in refused(Own(), IDS[:0])
    assert "batch is a list: must be a tensor" in refused(model, IDS.tolist())
    with torch.no_grad(), probe(model) as probing:
        model(IDS)
        with pytest.raises(ConfigError, match="a batch of length 1 after one of 11"):
            model(IDS[:, :1])
        model(IDS)
    # A refused call leaves nothing behind: the others count once each.
    assert_same(probing.rows(), probe(model, IDS).rows(), ["mean_square", "cosine"])
    assert "no forward call of LlamaForCausalLM was seen" in refused(model, None)
    with pytest.raises(ConfigError, match="model is a dict"):
        probe({})
    own = perturbed(Own())
    own.wte = nn.EmbeddingBag(61, 32)
    assert "gets a tensor of shape (3, 32)" in refused(own, layout=Layout("h", GPT2))
    own.wte = Twice(61, 32)
    assert "the first block gets tuple: must be a tensor" in refused(own, layout=Layout("h", GPT2))


def test_padding_hidden_by_query_and_key():
    """A mask (B, 1, T, T), boolean or added to the logits, also by layer type."""
    model = theirs("Llama")
    seen = torch.ones(3, 1, 11, 11, dtype=torch.bool).tril()
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (seen, added):
        assert len(probe(model, {"input_ids": IDS, "attention_mask": mask}).rows()) == 7
    seen[0, :, :, :2] = False
    added[0, :, :, :2] = torch.finfo(torch.float32).min
    for mask in (seen, added, {"full_attention": seen}):
        batch = {"input_ids": IDS, "attention_mask": mask}
        assert "attention_mask hides 2 of 33 tokens" in refused(model, batch)


class Twice(nn.Embedding):
    """Two streams as a tuple."""

    def forward(self, ids):
        x = super().forward(ids)
        return x, x


class Hidden(Own):
    """Its blocks get, by position, a mask of tokens, which the model makes of lengths."""

    def __init__(self):
        super().__init__()
        for block in self.h:
            block.forward = lambda x, mask, of=block.forward: of(x)

    def forward(self, ids, lengths):
        x = self.wte(ids)
        for block in self.h:
            x = block(x, torch.arange(ids.shape[1]) < lengths[:, None])
        return x


def test_padding_hidden_by_a_mask_by_position():
    model = perturbed(Hidden())
    assert len(probe(model, (IDS, torch.tensor([11, 11, 11]))).rows()) == 7
    assert "mask hides 6 of 33 tokens" in refused(model, (IDS, torch.tensor([5, 11, 11])))


@pytest.mark.parametrize("kind", ["Llama", "Mamba"])
def test_generation_is_refused(kind):
    """From one token on its batches are of one length, and lack what the cache holds."""
    model = theirs(kind)
    with (
        pytest.raises(ConfigError, match="holds earlier tokens"),
        torch.no_grad(),
        probe(model),
    ):
        model.generate(IDS[:, :1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert not hooks(model)
    cache = model(IDS, use_cache=True)
    for name in {"past_key_values", "cache_params"} & cache.keys():
        assert "holds earlier tokens" in refused(model, {"input_ids": IDS, name: cache[name]})


def test_norms_are_recognised_under_autocast():
    """The branch is bfloat16 where the stream is float32, and so is what its norm gives."""
    model = theirs("Olmo2")
    expected = probe(model, IDS).rows()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        frame = probe(model, IDS).rows()
    columns = ["eps_factor", "gain_mean_square", "gain_max_abs"]
    # To a few of bfloat16's roundings (2⁻⁸) of the branch; the gains are the same numbers.
    pd.testing.assert_frame_equal(frame[columns], expected[columns], rtol=0.03)


def test_a_users_hook_is_named():
    model = theirs("Olmo2")
    handle = model.model.layers[1].register_forward_hook(lambda m, args, out: out + 5)
    with pytest.raises(ConfigError, match="a forward hook on Olmo2DecoderLayer"):
        probe(model, IDS)
    handle.remove()
    assert len(probe(model, IDS).rows()) == 7


def test_overflow_warns():
    model = theirs("Llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.warns(UserWarning, match=r"model isn't finite from sublayer 4 \(mlp\) on"):
        frame = probe(model, IDS).rows()
    assert frame["sublayer"].tolist() == [0, 1, 2, 3]
    assert np.isfinite(frame["mean_square"]).all()


def test_probe_page_examples(capsys):
    page = (Path(__file__).parents[2] / "docs" / "probe.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert len(blocks) >= 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert "mean_square" in capsys.readouterr().out
