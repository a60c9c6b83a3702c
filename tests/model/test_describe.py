"""A block's description against the blocks that the engines build and run."""

import pytest
import torch
from conftest import tiny
from torch import nn

from simlab.experiment import run
from simlab.model.describe import describe, paper_block, shapes
from simlab.model.mlp import MLPS
from simlab.model.transformer import Block, parameter_count
from simlab.theory.size import parameters_on_paper
from simlab.weights import weightless

SETTINGS = [[f"model.mlp={mlp}"] for mlp in MLPS]
SETTINGS += [["model.experts=3", "model.experts_per_token=2", "model.bias=true"]]
SETTINGS += [["model.bias=true"], ["norm=peri", "model.qk_norm=per_head"], ["model.qk_norm=none"]]


@pytest.mark.parametrize("overrides", SETTINGS, ids=" ".join)
def test_description_matches_dense_block(overrides):
    model = tiny(*overrides, "model.head_dim=10").shape
    block = Block(model, 1)
    assert shapes(model) == {name: tuple(p.shape) for name, p in block.named_parameters()}
    linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    sizes = {m.name: (m.d_in, m.d_out) for m in describe(model).matrices}
    assert sizes == {name: (m.in_features, m.out_features) for name, m in linears.items()}
    assert list(sizes) == list(linears)  # in this order the weightless engine draws ahead
    assert parameters_on_paper(model) == parameter_count(model)


def test_matrices_that_share_an_input():
    gated = [(48, [48, 16, 16]), (48, [48]), (48, [80, 80]), (80, [48])]
    assert describe(tiny().shape).groups == gated
    plain = [*gated[:2], (48, [80]), (80, [48])]
    assert describe(tiny("model.mlp=gelu").shape).groups == plain
    assert describe(tiny().shape).widest == 80


@pytest.mark.parametrize("mlp", MLPS)
def test_one_factorisation_per_input(monkeypatch, mlp):
    factored = []
    original = weightless.factor

    def counting(square):
        factored.append(square.shape)
        return original(square)

    monkeypatch.setattr(weightless, "factor", counting)
    config = tiny("engine=weightless", f"model.mlp={mlp}", "inputs.batch=1")
    run(config)
    assert len(factored) == config.shape.depth * len(describe(config.shape).groups)


def test_huge_sizes_are_described():
    model = tiny("width=400000000", "heads=4", "kv_heads=4", "d_ff=1000000000").shape
    assert paper_block(model, torch.float32)[1].device.type == "meta"
    assert describe(model).widest == 10**9
