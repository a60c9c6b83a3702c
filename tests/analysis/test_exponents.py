"""Growth exponents against a ten-line reference and closed forms."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ids_of, placed, tiny

from simlab import build_model
from simlab.analysis.exponents import exponents, per_block
from simlab.experiment import run


def by_hand(config):
    """‖⟨x⟩‖ and ⟨‖x‖⟩ after every block of the whole model, and of the loss's gradient there."""
    model, ids = build_model(config), ids_of(config)
    x, ends = model.embedding(ids).detach().requires_grad_(), []
    for block in model.blocks:
        x = block(x)
        x.retain_grad()
        ends.append(x)
    logits = model.head(model.norm(x))[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    found = {}
    for suffix, tensors in (("", ends), ("_gradient", [x.grad for x in ends])):
        found[f"paper{suffix}"] = [t.double().mean((0, 1)).norm().item() for t in tensors]
        found[f"token{suffix}"] = [t.double().norm(dim=-1).mean().item() for t in tensors]
    return found


@pytest.mark.parametrize("norm", ["reordered", "swin_renorm", "pre"])
def test_against_the_whole_model(norm):
    config = tiny("depth=4", *placed(norm), "gradients=true", "init.std=0.1")
    values, truth = run(config).summary["lambda"]["random"], by_hand(config)
    for suffix in ("", "_gradient"):
        for name in ("paper", "token"):
            first, last = truth[f"{name}{suffix}"][0], truth[f"{name}{suffix}"][-1]
            found = values[f"lambda_{name}{suffix}"]["value"]
            assert found == pytest.approx(math.log(last / first) / 4, rel=1e-4, abs=1e-6)
        norms = np.log(truth[f"token{suffix}"])
        pairwise, first = np.diff(norms) / 4, (norms[1:] - norms[0]) / 4
        for name, truth_of in (("pairwise", pairwise), ("from_first", first)):
            found = values[f"lambda_{name}{suffix}"]
            np.testing.assert_allclose(found, truth_of, rtol=1e-3, atol=1e-6)


def test_the_answer_to_the_question():
    """λ = ln √(v_L / v_1) / L: ln √32 / 32 = 0.054 for OLMo-2-7B's 32 blocks, near 0."""
    config = tiny(
        "depth=32", "norm.eps=1e-12", "seeds=8", "width=96", "d_ff=64", "engine=weightless"
    )
    values = run(config).summary["lambda"]["random"]
    assert values["lambda_token_additive"] == pytest.approx(math.log(math.sqrt(32)) / 32, rel=0.01)
    token = values["lambda_token"]
    assert token["low"] - 0.002 < values["lambda_token_additive"] < token["high"] + 0.002
    assert values["lambda_token_sqrt2"] == pytest.approx(31 * math.log(2) / 32, rel=1e-6)


def test_rank_collapse_raises_the_papers_lambda():
    """The mean vector's norm is not the mean norm: ρ + (1 − ρ)/N of it."""
    config = tiny("depth=8", "norm.eps=1e-12", "seeds=8", "inputs.length=40")
    values = run(config).summary["lambda"]["random"]
    assert values["lambda_paper"]["low"] > values["lambda_token"]["high"]


def frame(rows):
    columns = ["curve", "seed", "block", "kind", "norm", "mean_vector_norm"]
    made = pd.DataFrame(rows, columns=columns).assign(law_additive=1.0, law_sqrt2=2.0)
    return made.astype({"block": "Int64"})


def test_a_closed_form():
    """Norms 1, 2, 8 after three blocks: the last row of a block counts."""
    rows = [("random", 0, None, "embedding", 9, 9)]
    for block, (norm, vector) in enumerate([(1, 1), (2, 3), (8, 27)]):
        rows += [("random", 0, block, "attention", 5, 5), ("random", 0, block, "mlp", norm, vector)]
    values = exponents(frame(rows), "random", 3)
    assert values["lambda_token"].value == pytest.approx(math.log(8) / 3)
    assert values["lambda_paper"].value == pytest.approx(math.log(27) / 3)
    assert values["lambda_pairwise"] == pytest.approx([math.log(2) / 3, math.log(4) / 3])
    assert values["lambda_from_first"] == pytest.approx([math.log(2) / 3, math.log(8) / 3])
    assert values["lambda_token_additive"] == 0
    blocks = per_block(frame(rows), 3)
    assert set(blocks["curve"]) == {"random", "law_additive", "law_sqrt2"}
    measured = blocks[blocks["curve"] == "random"]
    assert measured["lambda_from_first"].tolist() == pytest.approx(
        [0, math.log(2) / 3, math.log(8) / 3]
    )


def test_what_has_no_exponent():
    one = run(tiny("depth=1")).summary["lambda"]["random"]
    assert one["lambda_paper"] is None
    assert one["lambda_pairwise"] == []
    cut = run(tiny("dtype=float16", "norm=none", "init.std=3", "depth=6")).summary["lambda"]
    assert cut["random"].get("lambda_token") is None
