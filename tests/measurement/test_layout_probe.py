"""Models whose residual stream a layout names; and a wrong layout gives no numbers."""

import re

import pandas as pd
import pytest
import torch
import transformers
from conftest import ids_of, tiny
from probed import (
    GPT2,
    IDS,
    KINDS,
    LAYOUTS,
    OWN,
    PERI,
    POST,
    PRE,
    REORDERED,
    SHAPE,
    Own,
    assert_same,
    perturbed,
    refused,
    theirs,
    values,
)
from torch import nn

from simlab import ConfigError, Layout, Sublayer, build_model, probe
from simlab.measurement.norm_probe import held_by, identify_norm


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_custom_layouts(how, dtype):
    model = perturbed(Own(how)).to(dtype)
    frame = probe(model, IDS, layout=Layout("h", OWN[how])).rows()
    expected = own_by_hand(model, how, IDS)
    assert_same(frame, expected, expected.columns.drop("kind"))
    assert frame["attention_entropy"].iloc[1] > 0


def test_own_model_through_a_layout():
    """The two probes have nothing in common but the reducer."""
    config = tiny("init.std=0.1")
    names = [("attention", "mlp"), ("mlp", None)]
    layout = Layout("blocks", tuple(
        Sublayer(kind, f"{kind}.sublayer", f"{kind}.norm_out", after, f"{kind}.norm_out")
        for kind, after in names
    ))  # fmt: skip
    model, ids = build_model(config), ids_of(config)
    assert_same(
        probe(model, ids, layout=layout).rows(),
        probe(model, ids).rows(),
        ["mean_square", "cosine", "kurtosis", "eps_factor", "gain_max_abs", "law_additive"],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_layouts_are_refused(kind):
    """Each family's layout is wrong for the other two."""
    model = theirs(kind)
    right = LAYOUTS[kind]
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
    assert "attn gave nothing before its sum" in refused(model, layout=Layout("h", POST))
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


def test_a_residual_multiplier():
    """It is found, and named; a layout without it is refused."""
    config = transformers.GraniteConfig(**SHAPE, residual_multiplier=0.22)
    model = perturbed(transformers.GraniteForCausalLM(config))
    message = refused(model, layout=Layout("model.layers", PRE))
    assert message.startswith(
        "probe: model.layers.0, attention: stream + self_attn isn't what post_"
    )
    found = probe(model, IDS)
    assert "mlp: x + 0.22 · mlp (norm post_attention_layernorm)" in found.layout
    layer = model.model.layers[0]
    gave = {}
    layer.mlp.register_forward_hook(lambda m, args, out: gave.update(raw=out.double()))
    with torch.no_grad():
        x = model(IDS, output_hidden_states=True).hidden_states[1]
    row = found.rows().iloc[2]
    raw = gave["raw"].square().mean().item()
    assert row["branch_raw_mean_square"] == pytest.approx(raw)
    assert row["branch_mean_square"] == pytest.approx(0.22**2 * raw)
    assert row["mean_square"] == pytest.approx(x.double().square().mean().item())


def test_multipliers_in_bfloat16():
    """Found of branches far below the stream too; none where channels have their own multipliers."""
    config = transformers.GraniteConfig(
        **SHAPE | {"num_hidden_layers": 6}, residual_multiplier=0.22
    )
    model = perturbed(transformers.GraniteForCausalLM(config)).bfloat16()
    found = probe(model, IDS)
    assert "layers 0-5: attention: x + 0.22 · self_attn" in found.layout
    for layer in model.model.layers:
        layer.residual_multiplier = torch.full((48,), 0.22).bfloat16()
    measured = probe(model, IDS)
    multipliers = [float(m) for m in re.findall(r"x \+ (\S+) ·", measured.layout)]
    assert multipliers == pytest.approx([0.22] * len(multipliers), rel=2e-3)  # 0.22 is rounded too
    assert len(multipliers) >= 2
    for layer in model.model.layers:
        layer.residual_multiplier[::2] *= 0.8
    assert probe(model, IDS).layout == "model.layers 0-5: block"


def test_models_without_blocks():
    message = refused(nn.Linear(2, 2))
    assert "Linear (no submodules) has no ModuleList of blocks" in message
    assert 'layout=simlab.Layout("…",' in message


class Two(nn.Module):
    """Two stacks of blocks, one after the other."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Own(), Own()

    def forward(self, ids):
        return self.b(ids) + self.a(ids)


def test_ambiguous_models():
    assert "Two has blocks at b.h, a.h" in refused(perturbed(Two()))
    model = perturbed(Own())
    model.h[1] = model.h[0]
    assert "h holds a block more than once" in refused(model, layout=Layout("h", GPT2))


def test_norms_are_recognised_by_their_output():
    x = torch.randn(2, 5, 32, dtype=torch.float64) + 0.5
    layer, rms = nn.LayerNorm(32, eps=0.03).double(), nn.RMSNorm(32, eps=0.03).double()
    for norm in (layer, rms):
        norm.weight.data.uniform_(0.5, 1.5)
    layer.bias.data.normal_()
    for norm, moment in ((layer, x.var(-1, correction=0)), (rms, x.pow(2).mean(-1))):
        identified = identify_norm(held_by(norm), x, norm(x).detach(), 1e-7)
        torch.testing.assert_close(identified.moment(x), moment)
        assert torch.equal(identified.gain, norm.weight)
        assert (
            identify_norm(held_by(norm), x, norm(x).detach() * 1.01, 1e-7) is None
        )  # something else


class Turned(Own):
    """Its stream is (length, batch, width)."""

    def forward(self, ids):
        x = self.wte(ids).transpose(0, 1)
        for block in self.h:
            x = block(x)
        return x.transpose(0, 1)


class Between(Own):
    """Its stream is scaled between blocks."""

    def forward(self, ids):
        x = self.wte(ids)
        for block in self.h:
            x = block(x) * 1.01
        return x


@pytest.mark.parametrize("ids", [IDS, IDS[:, :3]])
def test_a_stream_in_another_order(ids):
    """Also where batch and length are equal, and the shape doesn't tell."""
    assert "must be (batch, length, width)" in refused(perturbed(Turned()), ids)
    assert len(probe(perturbed(Own()), ids).rows()) == 7


def test_a_stream_changed_between_blocks():
    assert "h.1 doesn't get what block 0 gives" in refused(perturbed(Between()))


def test_steps_that_start_at_zero():
    """Both branches are seen where one adds nothing yet, and the check goes on with later batches."""
    for how in ("pre", "parallel"):
        model = perturbed(Own(how))
        for block in model.h:
            block.mlp[2].weight.data.zero_()
            block.mlp[2].bias.data.zero_()
        with torch.no_grad(), probe(model) as probed:
            model(IDS)
            for block in model.h:
                block.mlp[2].bias.data.fill_(1.0)
            model(IDS)
        kinds = probed.rows()["kind"].tolist()
        assert kinds[1:3] == (["attention", "mlp"] if how == "pre" else ["parallel"] * 2)


@pytest.mark.parametrize(("how", "kind"), [("pre", "attention+mlp"), ("parallel", "parallel")])
def test_steps_that_may_be_one_after_the_other(how, kind):
    """A norm that is called twice hides the stream between two steps: they aren't called parallel."""
    model = Own(how)
    for block in model.h:
        block.ln_2 = block.ln_1
    found = probe(model, IDS)
    assert found.rows()["kind"].tolist() == ["embedding", kind, kind, kind]
    assert found.layout == f"h 0-2: {kind}: x + attn + mlp"
