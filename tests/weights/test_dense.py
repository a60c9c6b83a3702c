"""Random weights: reproducible, independent of depth, order, threads and dtype."""

import numpy as np
import pytest
import torch
from conftest import tiny

from simlab import build_model
from simlab.weights.dense import RandomWeights

CPU = torch.device("cpu")


def weights(*overrides, seed=0):
    config = tiny(*overrides)
    return RandomWeights(config.shape, config.init, seed)


def test_depth_prefix():
    shallow = build_model(tiny("depth=2")).state_dict()
    deep = build_model(tiny("depth=5")).state_dict()
    assert all(torch.equal(value, deep[name]) for name, value in shallow.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_equals_resident(dtype):
    asked = [f"dtype={str(dtype).removeprefix('torch.')}", "model.value_embeddings=alternate"]
    config = tiny(*asked)
    model, streamed = build_model(config), RandomWeights(config.shape, config.init, 0)
    for layer in (2, 0, 1):  # the order of work doesn't matter
        block = streamed.block(layer, CPU, dtype)
        for name, value in block.state_dict().items():
            assert torch.equal(value, model.blocks[layer].state_dict()[name])
    ids = torch.tensor([[3, 96, 3], [0, 5, 96]])
    for layer in (2, 0):  # a block holds none of it: rows are made for the tokens that come
        name = f"blocks.{layer}.attention.sublayer.value_embedding"
        rows = streamed.block(layer, CPU, dtype).attention.sublayer.value_embedding(ids)
        assert torch.equal(rows, model.get_submodule(name).weight[ids])
    for name in ("embedding", "head"):
        rows = streamed.rows(f"{name}.weight", (97, 48), ids, CPU, dtype)
        assert torch.equal(rows, model.get_submodule(name).weight[ids])


def test_half_precision_is_the_rounded_float32():
    full, half = build_model(tiny()), build_model(tiny("dtype=bfloat16"))
    for name, value in half.state_dict().items():
        assert value.dtype is torch.bfloat16
        assert torch.equal(value, full.state_dict()[name].bfloat16())


def test_threads_do_not_matter():
    """Pieces have their own streams: one thread and two give the same bytes."""
    before = torch.get_num_threads()
    try:
        drawn = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            of = weights("width=768", "heads=6")
            drawn.append(of.tensor("head.weight", (997, 768), CPU, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*drawn)


def test_names_seeds_and_rows_are_independent():
    """No two weights share numbers; correlations within four standard errors of zero."""
    names = [f"blocks.{i}.attention.sublayer.{m}_proj.weight" for i in range(4) for m in "qo"]
    drawn = [weights(seed=s).tensor(n, (48, 48), CPU, torch.float32) for n in names for s in (0, 1)]
    drawn.append(weights().tensor("embedding.weight", (48, 48), CPU, torch.float32))
    flat = torch.stack([w.flatten() for w in drawn]).numpy()
    correlation = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(correlation).max() < 4.5 / 48
    rows = np.corrcoef(drawn[-1].numpy()) - np.eye(48)
    assert np.abs(rows).max() < 4.5 / np.sqrt(48)


def test_no_parameter_is_left_uninitialised(monkeypatch):
    """Memory that torch hands out is filled with NaN first; none is left in any model."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        for norm in ("swin_renorm", "peri", "deepnorm"):
            model = build_model(tiny(f"norm={norm}", "norm.type=layer"))
            for name, value in [*model.named_parameters(), *model.named_buffers()]:
                assert value.device.type == "cpu", name
                assert value.isfinite().all(), name
    finally:
        torch.use_deterministic_algorithms(False)


def test_tied_head():
    model = build_model(tiny("model.tied=true"))
    assert model.head.weight is model.embedding.weight


def test_golden_numbers():
    """The streams are part of the result: a change of NumPy or of ours must be seen."""
    first = weights().tensor("head.weight", (97, 48), CPU, torch.float32)
    again = weights().tensor("head.weight", (97, 48), CPU, torch.float32)
    assert torch.equal(first, again)
    assert first[0, :3].tolist() == GOLDEN


GOLDEN = pytest.approx([-0.01098962, 0.01007181, 0.01561939], abs=1e-8)
