"""``simlab.probe`` on other people's models: its rows against ones made by hand, and its refusals."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import PARITY, tiny, write_olmo
from torch import nn

import simlab
from simlab import ConfigError, Layout, Sublayer, build_model, compose, probe
from simlab.experiment import prepare, run
from simlab.layout import KNOWN, PERI, PRE, REORDERED
from simlab.layout_probe import read_norm
from simlab.model.placement import PLACEMENTS

IDS = torch.randint(1, 61, (3, 11), generator=torch.Generator().manual_seed(0))
KINDS = ["Olmo2", "Olmo3", "Llama", "Qwen3", "Gemma2", "Gemma3"]
SAME = [
    "Olmo",
    "Mistral",
    "Qwen2",
    "Gemma",
]  # the same table entries, held against the same reference
SHAPE = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    "attn_implementation": "eager",
}  # fmt: skip


def perturbed(model):
    """Gains away from 1, weights large enough for attention to matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.15)
    return model.eval()


def pretrained(kind, head="ForCausalLM", **changes):
    """A tiny model of transformers, its norms' eps large enough to be seen."""
    config = {"Gemma3": "Gemma3TextConfig"}.get(kind, f"{kind}Config")
    eps = {} if kind == "Olmo" else {"rms_norm_eps": 0.03}
    config = getattr(transformers, config)(**SHAPE, **eps, **changes)
    return perturbed(getattr(transformers, kind + head)(config))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


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


def values(row):
    """One row's statistics, each by its definition."""
    x = row["after"].double()
    found = {
        "norm": x.norm(dim=-1).mean(),
        "mean_square": x.pow(2).mean(),
        "variance": x.var(),
        "mean": x.mean(),
        "mean_abs": x.abs().mean(),
        "max_abs": x.abs().max(),
    }
    if "skip" in row:
        a, b, raw, norm = (
            row["skip"].double(),
            row["branch"].double(),
            row["raw"].double(),
            row["norm"],
        )
        found |= {
            "branch_mean_square": b.pow(2).mean(),
            "branch_raw_mean_square": raw.pow(2).mean(),
            "cosine": torch.cosine_similarity(a, b, dim=-1).mean(),
            "delta_branch": b.pow(2).sum(-1).mean(),
            "delta_cross": 2 * (a * b).sum(-1).mean(),
        }
        if hasattr(norm, "weight"):
            moment = raw.pow(2).mean(-1)
            eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
            gain = norm.weight.double() + ("Gemma" in type(norm).__name__)
            found |= {
                "eps_factor": (moment / (moment + eps)).mean(),
                "gain_mean_square": gain.pow(2).mean(),
                "gain_max_abs": gain.abs().max(),
            }
    if row.get("weights") is not None:
        a = row["weights"].double()
        found["attention_entropy"] = -(a * a.clamp(min=1e-30).log()).sum(-1).mean()
        found["attention_first"] = a[:, :, 1:, 0].mean()
    return {"kind": row["kind"]} | {name: value.item() for name, value in found.items()}


def assert_same(frame, expected, columns):
    """PARITY, with atol in units of each column's largest value (≥ 1)."""
    assert frame["kind"].tolist() == expected["kind"].tolist()
    for column in columns:
        a, b = (torch.tensor(f[column].to_numpy(float)) for f in (frame, expected))
        atol = PARITY["atol"] * max(1.0, b.abs().nan_to_num().max().item())
        torch.testing.assert_close(
            a,
            b,
            rtol=PARITY["rtol"],
            atol=atol,
            equal_nan=True,
            msg=lambda m, c=column: f"{c}: {m}",
        )


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, *SAME])
def test_rows_against_the_layers_own_submodules(kind):
    model = pretrained(kind)
    frame, expected = probe(model, IDS).rows(), by_hand(model, IDS)
    assert_same(frame, expected, expected.columns.drop("kind"))
    assert frame["sublayer"].tolist() == list(range(7))
    assert frame["block"].tolist() == [pd.NA, 0, 0, 1, 1, 2, 2]
    if kind != "Olmo":  # its norm has no gain, and its eps is no attribute
        assert frame["eps_factor"].iloc[1] < 0.999  # eps is seen
        assert frame["law_additive"].notna().all()
    assert frame["attention_max_logit"].isna().all()


def test_olmo2_against_the_engine_on_the_same_checkpoint(tmp_path):
    model = write_olmo(tmp_path / "olmo")
    config = compose(
        ["source=checkpoint", f"source.path={tmp_path / 'olmo'}", "seeds=0", "inputs.batch=3",
         "inputs.length=11", "device=cpu"]
    )  # fmt: skip
    engine = run(config).curve
    frame = probe(model, prepare(config).tokens).rows()
    assert set(engine.columns) - set(frame.columns) == {"outside"}
    columns = [c for c in frame.columns if c not in ("curve", "kind", "attention_max_logit")]
    assert_same(frame, engine, columns)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_simlabs_own_model_gives_the_engines_rows(placement):
    every = ["norm.every=2"] if placement == "swin_renorm" else []
    config = tiny(f"norm={placement}", "init.std=0.1", *every)
    engine = run(config).curve
    ids = prepare(config).tokens
    model = build_model(config)
    frame = probe(model, ids, curve="random").rows()
    pd.testing.assert_frame_equal(frame, engine, check_exact=True)
    with probe(model, curve="random") as found:  # with autograd on
        model(ids).sum().backward()
    pd.testing.assert_frame_equal(found.rows(), engine, check_exact=True)


@pytest.mark.parametrize(
    ("kind", "head"), [("Olmo2", "Model"), ("Gemma3", "TextModel"), ("Llama", "ForCausalLM")]
)
def test_bare_models(kind, head):
    model = pretrained(kind, head)
    assert len(probe(model, IDS).rows()) == 7


def test_the_text_half_of_a_multimodal_model():
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


# Somebody's own model, written three ways.


class OwnBlock(nn.Module):
    """One of the ways to add up attention and MLP."""

    def __init__(self, how, width=32):
        super().__init__()
        self.how = how
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=0.03), nn.LayerNorm(width, eps=0.03)
        self.attn = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def attend(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.attn(x, x, x, attn_mask=mask, average_attn_weights=False)[0]

    def forward(self, x):
        if self.how == "parallel":
            return x + self.attend(self.ln_1(x)) + self.mlp(self.ln_2(x))
        if self.how == "post":
            x = self.ln_1(x + self.attend(x))
            return self.ln_2(x + self.mlp(x))
        if self.how == "in place":
            x += self.attend(self.ln_1(x))
            x += self.mlp(self.ln_2(x))
            return x
        x = x + self.attend(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Own(nn.Module):
    """Embedding and blocks in ``h``, as GPT-2 names them."""

    def __init__(self, how="pre"):
        super().__init__()
        self.wte = nn.Embedding(61, 32)
        self.h = nn.ModuleList(OwnBlock(how) for _ in range(3))

    def forward(self, ids):
        x = self.wte(ids)
        for block in self.h:
            x = block(x)
        return x


GPT2 = (
    Sublayer("attention", raw="attn", sum="ln_2", norm="ln_1"),
    Sublayer("mlp", raw="mlp", norm="ln_2"),
)
POST = (
    Sublayer("attention", raw="attn", sum="ln_1", norm="ln_1"),
    Sublayer("mlp", raw="mlp", sum="ln_2", norm="ln_2"),
)
PARALLEL = (Sublayer("parallel", raw=("attn", "mlp"), norm="ln_1"),)
OWN = {"pre": GPT2, "in place": GPT2, "post": POST, "parallel": PARALLEL}


def own_by_hand(model, how, ids):
    """Rows of the three ways, from the formulas."""
    x = model.wte(ids)
    rows = [values({"kind": "embedding", "after": x})]
    for b in model.h:
        if how == "parallel":
            steps = [("parallel", lambda x, b=b: b.attend(b.ln_1(x)) + b.mlp(b.ln_2(x)), b.ln_1)]
        else:
            before = (b.ln_1, b.ln_2) if how != "post" else (nn.Identity(), nn.Identity())
            steps = [
                ("attention", lambda x, b=b, n=before[0]: b.attend(n(x)), b.ln_1),
                ("mlp", lambda x, b=b, n=before[1]: b.mlp(n(x)), b.ln_2),
            ]
        for kind, step, norm in steps:
            raw = step(x)
            total = x + raw
            after = norm(total) if how == "post" else total
            row = {"kind": kind, "skip": x, "branch": raw, "raw": raw, "norm": norm, "after": after}
            rows.append(values(row))
            if how == "post":
                variance = total.double().var(-1, correction=0)
                rows[-1]["eps_factor"] = (variance / (variance + norm.eps)).mean().item()
            x = after
    return pd.DataFrame(rows)


@torch.no_grad()
@pytest.mark.parametrize("how", OWN)
def test_a_layout_of_your_own(how):
    model = perturbed(Own(how))
    frame = probe(model, IDS, layout=Layout("h", OWN[how])).rows()
    expected = own_by_hand(model, how, IDS)
    assert_same(frame, expected, expected.columns.drop("kind"))
    assert frame["attention_entropy"].iloc[1] > 0


def test_simlabs_own_model_through_a_layout():
    """The two probes have nothing in common but the reducer."""
    config = tiny("init.std=0.1")
    names = [("attention", "mlp"), ("mlp", None)]
    layout = Layout("blocks", tuple(
        Sublayer(kind, f"{kind}.sublayer", f"{kind}.norm_out", after, f"{kind}.norm_out")
        for kind, after in names
    ))  # fmt: skip
    model, ids = build_model(config), prepare(config).tokens
    assert_same(
        probe(model, ids, layout=layout).rows(),
        probe(model, ids).rows(),
        ["mean_square", "cosine", "kurtosis", "eps_factor", "gain_max_abs", "law_additive"],
    )


# Changes nothing, leaves nothing behind.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_bit_equal(kind, dtype):
    model = pretrained(kind).to(dtype)

    def passed():
        model.zero_grad()
        out = model(IDS, labels=IDS, output_hidden_states=True)
        out.loss.backward()
        return [out.logits, *out.hidden_states, *(p.grad for p in model.parameters())]

    plain, before = passed(), hooks(model)  # transformers leaves some of its own
    with probe(model) as found:
        probed = passed()
    assert all(torch.equal(a, b) for a, b in zip(plain, probed, strict=True))
    assert hooks(model) == before
    assert (
        found.rows()["gain_mean_square"].iloc[1:].notna().all()
    )  # the norms are known in bfloat16


def test_hooks_go_on_an_exception_and_modes_come_back():
    model = pretrained("Llama").train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    for ids in (IDS, IDS + 1000):
        with contextlib.suppress(IndexError):
            probe(model, ids)
        assert hooks(model) == 0
        assert [m.training for m in model.modules()] == modes
    model.model.layers[1].mlp.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError), probe(model) as found:
        model(IDS)
    assert hooks(model) == 0
    with pytest.raises(ConfigError, match="saw 0 of 33 tokens: a forward call failed"):
        found.rows()


def test_batches_are_of_one_curve():
    model = pretrained("Llama")
    with torch.no_grad(), probe(model, curve="two", seed=5) as found:
        model(IDS[:1])
        model(input_ids=IDS[1:])
    once = probe(model, (IDS,), curve="two", seed=5).rows()
    assert (once["curve"].unique().tolist(), once["seed"].unique().tolist()) == (["two"], [5])
    assert_same(found.rows(), once, once.columns.drop(["curve", "kind"]))


def test_what_a_backward_runs_again_is_not_counted():
    model = pretrained("Llama").train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    with probe(model) as found:
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    pd.testing.assert_frame_equal(found.rows(), probe(model, IDS).rows())


@pytest.mark.parametrize("how", ["transformers", "layout", "simlab"])
def test_no_stream_is_kept(how):
    model, layout = {
        "transformers": lambda: (pretrained("Gemma2"), None),
        "layout": lambda: (perturbed(Own("post")), Layout("h", POST)),
        "simlab": lambda: (build_model(tiny()), None),
    }[how]()
    for block in probe(model, IDS, layout=layout).probes:
        held = [block.outputs, block.stream] if how != "simlab" else [block.seen, block.last]
        assert held == [{}, None]


# What is refused.


def refused(model, batch=IDS, **options):
    with pytest.raises(ConfigError) as error:
        probe(model, batch, **options).rows()
    assert "\n" not in str(error.value)
    assert hooks(model) == 0
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_layout_is_refused(kind):
    """Each family's layout is wrong for the other two."""
    model = pretrained(kind)
    right = KNOWN[f"{kind}DecoderLayer"]
    for wrong in (REORDERED, PRE, PERI):
        if wrong is not right:
            message = refused(model, layout=Layout("model.layers", wrong))
            assert "isn't what" in message or "has no submodule" in message, message


def test_other_wrong_layouts():
    model = perturbed(Own())
    attention, mlp = GPT2
    assert "stream + attn isn't what the block gives" in refused(
        model, layout=Layout("h", (Sublayer("attention", "attn"),))
    )
    assert "isn't what ln_1 gets" in refused(model, layout=Layout("h", POST))
    assert "mlp.0 gives (3, 11, 64), the stream is (3, 11, 32)" in refused(
        model, layout=Layout("h", (attention, Sublayer("mlp", raw="mlp.0", branch="mlp")))
    )
    assert "mlp gave nothing before" in refused(
        model, layout=Layout("h", (Sublayer("mlp", raw="mlp", sum="ln_2"), mlp))
    )
    assert "h.0 (OwnBlock) has no submodule atn; did you mean attn?" in refused(
        model, layout=Layout("h", (Sublayer("attention", raw="atn", sum="ln_2"), mlp))
    )
    assert "Own has no submodule g; it has wte, h" in refused(model, layout=Layout("g", GPT2))
    assert "blocks=wte is a Embedding" in refused(model, layout=Layout("wte", GPT2))
    with pytest.raises(ConfigError, match="sublayer attention needs sum=NAME"):
        Layout("h", (Sublayer("attention", raw="attn"), mlp))


def test_a_scaled_residual_is_refused():
    config = transformers.GraniteConfig(**SHAPE, residual_multiplier=0.22)
    model = perturbed(transformers.GraniteForCausalLM(config))
    message = refused(model, layout=Layout("model.layers", PRE))
    assert message.startswith(
        "probe: model.layers.0, attention: stream + self_attn isn't what post_"
    )
    assert "scales stream or branch" in message
    config.residual_multiplier = 1.0
    assert (
        len(
            probe(
                transformers.GraniteForCausalLM(config), IDS, layout=Layout("model.layers", PRE)
            ).rows()
        )
        == 7
    )


def test_an_unknown_model():
    message = refused(perturbed(Own()))
    for part in (
        "Own: h holds OwnBlock (ln_1, ln_2, attn, mlp)",
        "Olmo2DecoderLayer",
        "Layout('h', ",
    ):
        assert part in message
    assert "no decoder layers of a known class in Linear; known" in refused(nn.Linear(2, 2))


def test_models_that_cant_be_told_apart():
    two = nn.ModuleDict({"a": pretrained("Llama"), "b": pretrained("Llama")})
    assert "decoder layers at a.model.layers, b.model.layers" in refused(two)
    model = perturbed(Own())
    model.h[1] = model.h[0]
    assert "h holds a block more than once" in refused(model, layout=Layout("h", GPT2))


def test_batches_that_are_refused():
    model = pretrained("Llama")
    mask = torch.ones_like(IDS)
    assert len(probe(model, {"input_ids": IDS, "attention_mask": mask}).rows()) == 7
    mask[0, -2:] = 0
    for batch in ({"input_ids": IDS, "attention_mask": mask}, (IDS, mask)):
        assert "attention_mask hides 2 of 33 tokens" in refused(model, batch)
    assert "batch is a list: must be a tensor" in refused(model, IDS.tolist())
    with torch.no_grad(), probe(model) as found:
        model(IDS)
        with pytest.raises(ConfigError, match="a batch of length 1 after one of 11"):
            model(IDS[:, :1])
    assert len(found.rows()) == 7  # of the first
    assert "no forward call of LlamaForCausalLM was seen" in refused(model, None)
    with pytest.raises(ConfigError, match="model is a dict"):
        probe({})
    own = perturbed(Own())
    own.wte = nn.EmbeddingBag(61, 32)
    assert "gets a tensor of shape (3, 32)" in refused(own, layout=Layout("h", GPT2))


def test_an_overflow_ends_the_curve_with_a_warning():
    model = pretrained("Llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.warns(UserWarning, match=r"model isn't finite from sublayer 4 \(mlp\) on"):
        frame = probe(model, IDS).rows()
    assert frame["sublayer"].tolist() == [0, 1, 2, 3]
    assert np.isfinite(frame["mean_square"]).all()


def test_norms_that_are_told_apart_by_what_they_do():
    x = torch.randn(2, 5, 32, dtype=torch.float64) + 0.5
    layer, rms = nn.LayerNorm(32, eps=0.03).double(), nn.RMSNorm(32, eps=0.03).double()
    for norm in (layer, rms):
        norm.weight.data.uniform_(0.5, 1.5)
    layer.bias.data.normal_()
    for norm, moment in ((layer, x.var(-1, correction=0)), (rms, x.pow(2).mean(-1))):
        found = read_norm(norm, x, norm(x).detach(), 1e-7)
        torch.testing.assert_close(found.moment(x), moment)
        assert torch.equal(found.gain, norm.weight)
        assert read_norm(norm, x, norm(x).detach() * 1.01, 1e-7) is None  # something else


def test_import_is_late():
    code = "import sys, simlab; assert 'torch' not in sys.modules; simlab.probe; simlab.Layout"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=100).returncode == 0
    assert callable(simlab.probe)


def test_the_readme(capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    section = readme.split("## Your own model\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    assert len(blocks) >= 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert "mean_square" in capsys.readouterr().out
