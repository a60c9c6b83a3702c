"""Experts: against transformers' modules with the same weights, forward and backward, and on paper."""

import importlib

import pytest
import torch
from conftest import assert_parity, tiny
from torch import nn

from simlab import build_model, compose
from simlab.budget.cost import costs
from simlab.budget.trace import trace
from simlab.config import ConfigError
from simlab.experiment import run
from simlab.model.describe import describe
from simlab.model.mlp import MLPS, Experts
from simlab.model.transformer import dense_linear

SIZES = {"hidden_size": 48, "intermediate_size": 20}
EXPERTS = ["model.experts=5", "model.experts_per_token=2", "d_ff=20"]
# Of each kind: transformers' config, its keys, and what is the same here.
KINDS = {
    "olmoe": ("Olmoe", {"num_experts": 5, "num_experts_per_tok": 2}, False),
    "olmoe-renormalised": (
        "Olmoe",
        {"num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True},
        True,
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}, True),
}


def pair(kind):
    """transformers' module of a kind, and ours with its weights."""
    import transformers

    name, keys, renormalise = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**SIZES, **keys)
    config._experts_implementation = "eager"
    path = f"transformers.models.{name.lower()}.modeling_{name.lower()}"
    theirs = getattr(importlib.import_module(path), f"{name}SparseMoeBlock")(config)
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    shape = tiny(*EXPERTS, f"model.renormalise_experts={str(renormalise).lower()}").shape
    ours = Experts(shape, dense_linear)
    state = {"router.weight": theirs.gate.weight}
    for number in range(5):
        gate, up = theirs.experts.gate_up_proj[number].chunk(2)
        parts = {"gate": gate, "up": up, "down": theirs.experts.down_proj[number]}
        state |= {f"experts.{number}.{part}_proj.weight": w for part, w in parts.items()}
    ours.load_state_dict(state, strict=True)
    return theirs, ours


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_those_of_transformers(kind):
    """The output, and the gradient at the input, part of which comes through the router."""
    theirs, ours = pair(kind)
    x = torch.randn(2, 9, 48)
    direction, outputs, gradients = torch.randn(2, 9, 48), [], []
    for module in (ours, theirs):
        given = x.clone().requires_grad_()
        out = module(given)
        outputs.append(out)
        gradients += torch.autograd.grad(out, given, direction)
    assert_parity(*outputs)
    assert_parity(*gradients, "gradient")
    ours.renormalise = not ours.renormalise  # negative control
    with pytest.raises(AssertionError):
        assert_parity(ours(x), outputs[1])


def test_one_expert_is_an_mlp():
    """All of a single expert's share is 1; of a single MLP nothing is routed."""
    shape = tiny("model.experts=1", "model.experts_per_token=1").shape
    experts, mlp = Experts(shape, dense_linear), MLPS["swiglu"](shape, dense_linear)
    mlp.load_state_dict(experts.experts[0].state_dict())
    x = torch.randn(2, 3, 48)
    assert_parity(experts(x), mlp(x))


@pytest.mark.parametrize("engine", ["dense", "weightless"])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_experts_run(engine, mlp):
    """A curve is the same bytes again, and alone as among other seeds."""
    asked = [*EXPERTS, f"model.mlp={mlp}", "model.bias=true", f"engine={engine}", "gradients=true"]
    first, again = (run(tiny(*asked, "seeds=2")).curve for _ in range(2))
    assert first.equals(again)
    alone = run(tiny(*asked, "seeds=[1]")).curve
    assert first[first["seed"] == 1].reset_index(drop=True).equals(alone)
    assert (first["gradient_norm"] > 0).all()


def test_unreached_experts_are_not_multiplied():
    """An expert whose weights are NaN, which the router never picks, changes nothing."""
    model = build_model(tiny(*EXPERTS))
    experts = model.blocks[0].mlp.sublayer
    with torch.no_grad():
        experts.router.weight[3] = 0
        x = torch.randn(1, 40, 48)
        p = experts.router(x).softmax(-1)
        x = x[:, p[0].topk(2).indices.ne(3).all(-1)]
        assert x.shape[1] > 5
        for parameter in experts.experts[3].parameters():
            parameter.fill_(torch.nan)
        assert experts(x).isfinite().all()


def test_costs_follow_the_share():
    """Of E experts with k per token each meets k/E of the tokens; all are drawn by the dense engine."""
    few, all_of_them = (tiny(*EXPERTS, f"model.experts_per_token={k}").shape for k in (1, 5))
    assert describe(few).entries == describe(all_of_them).entries
    assert set(describe(few).shares) == {1.0, 0.2}
    assert set(describe(all_of_them).shares) == {1.0}
    a, b = costs(few, 20, False), costs(all_of_them, 20, False)
    assert a["dense"].numbers == b["dense"].numbers
    assert a["dense"].operations < b["dense"].operations
    assert a["weightless"].numbers < b["weightless"].numbers
    assert len(trace(few, "float32", True).matrices) == 5 + 3
    assert trace(few, "float32", True).written < trace(all_of_them, "float32", True).written


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model.experts=4"], "model.experts_per_token=null: with model.experts=4: 1 to 4"),
        (
            ["model.experts=4", "model.experts_per_token=5"],
            "model.experts_per_token=5: .* 1 to 4",
        ),
        (["model.experts_per_token=2"], "model.experts_per_token=2: needs model.experts"),
        (["model.renormalise_experts=true"], "model.renormalise_experts=true: needs model.experts"),
        (["model.experts=0"], "model.experts=0: allowed: an integer, at least 1, at most 4096"),
        (
            ["model.experts=4", "model.experts_per_token=1", "d_ff=9999999"],
            "model.experts=4: only with width and d_ff of at most 1048576",
        ),
    ],
)
def test_wrong_experts_are_one_line(overrides, line):
    with pytest.raises(ConfigError, match=line):
        compose(overrides)
