"""``read_mean_square``: what attention and MLP get, against plain hooks on the modules."""

import families
import numpy as np
import pytest
import torch
from conftest import PARITY, ids_of, placed, tiny, write_olmo
from probed import GPT2, IDS, LAYOUTS, PARALLEL, Own, theirs

import simlab
from simlab import build_model
from simlab.checkpoints.checkpoint import Checkpoint
from simlab.experiment import run
from simlab.measurement.engine import measure_curves
from simlab.measurement.statistics import STATISTICS
from simlab.schemes.placement import PLACEMENTS


def mean_squares(modules, call):
    """Of each module's first input in a call, in their order."""
    found = []

    def hook(module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        found.append(x.detach().double().square().mean().item())

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in dict.fromkeys(modules)]
    with torch.no_grad():
        call()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_placement(placement, dtype):
    """The module's own input, whether a norm, a scale, or another vector of the state stands there."""
    config = tiny(*placed(placement), "init.std=0.1", f"dtype={dtype}")
    model = build_model(config)
    sublayers = [step.sublayer for b in model.blocks for k, step in b.steps() if k != "renorm"]
    expected = mean_squares(sublayers, lambda: model(ids_of(config)))
    frame = run(config).curve
    is_step = frame["kind"].isin(["attention", "mlp"])
    assert frame.loc[~is_step, "read_mean_square"].isna().all()
    np.testing.assert_allclose(frame.loc[is_step, "read_mean_square"], expected, **PARITY)


def test_the_stream_itself_is_read():
    """Without a norm in front the column is the row before's ``mean_square``; with one it isn't."""
    plain, pre = (run(tiny(f"norm={name}", "init.std=0.1")).curve for name in ("reordered", "pre"))
    before = plain["mean_square"].shift()[1:]
    np.testing.assert_allclose(plain["read_mean_square"][1:], before, rtol=1e-12)
    assert (abs(pre["read_mean_square"][1:] / pre["mean_square"].shift()[1:] - 1) > 0.1).all()


def test_layer_norm_scaling_by_its_formula():
    """LNS reads g·N(x)/√l: g²/l in block l, where eps is nothing."""
    frame = run(tiny("norm=lns", "norm.eps=1e-12", "norm.gain=0.7")).curve
    np.testing.assert_allclose(
        frame["read_mean_square"][1:], 0.49 / np.array([1, 1, 2, 2, 3, 3]), rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["Olmo2", "Llama", "Gemma2"])
@pytest.mark.parametrize("given", [False, True])
def test_models_of_transformers(kind, given):
    """Reordered, pre-norm and peri, with the layout given or found; on later batches, too."""
    model = theirs(kind)
    layers = model.model.layers
    modules = [module for layer in layers for module in (layer.self_attn, layer.mlp)]
    parts = IDS[:2], IDS[2:]
    expected = [mean_squares(modules, lambda part=part: model(part)) for part in parts]
    layout = simlab.Layout("model.layers", LAYOUTS[kind]) if given else None
    with torch.no_grad(), simlab.probe(model, layout=layout) as probed:
        for part in parts:
            model(part, use_cache=False)
    rows = probed.rows()
    weighted = np.average(expected, axis=0, weights=[2, 1])
    assert np.isnan(rows["read_mean_square"].iloc[0])
    np.testing.assert_allclose(rows["read_mean_square"][1:], weighted, **PARITY)


@pytest.mark.parametrize("how", ["pre", "in place"])
def test_somebodys_own_model(how):
    """The module may change what it gets, or the block the stream, in place."""
    model = Own(how)
    with torch.no_grad():
        for parameter in model.h.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    modules = [module for block in model.h for module in (block.attn, block.mlp)]
    expected = mean_squares(modules, lambda: model(IDS))
    for layout in (None, simlab.Layout("h", GPT2)):
        rows = simlab.probe(model, IDS, layout=layout).rows()
        np.testing.assert_allclose(rows["read_mean_square"][1:], expected, **PARITY)


def test_unknown_where_modules_read_different_vectors():
    """A parallel step whose attention and MLP have a norm each; with one norm for both it is known."""
    two = Own("parallel")
    with torch.no_grad():
        for block in two.h:
            block.ln_2.weight.mul_(3)
    rows = simlab.probe(two, IDS, layout=simlab.Layout("h", PARALLEL)).rows()
    assert rows["read_mean_square"].isna().all()
    for block in two.h:
        block.ln_2 = block.ln_1
    rows = simlab.probe(two, IDS, layout=simlab.Layout("h", PARALLEL)).rows()
    np.testing.assert_allclose(rows["read_mean_square"][1:], 1, rtol=0.1)


@pytest.mark.parametrize(
    ("family", "known"),
    [("opt", ["attention"]), ("bloom", []), ("mpt", ["attention"]), ("gpt2", ["attention", "mlp"])],
)
def test_a_last_projection_reads_something_else(family, known):
    """Where a matrix alone gives what is added, its input isn't what the sublayer reads."""
    probed, *_ = families.found_in(family)
    rows = probed.rows()
    assert set(rows.loc[rows["read_mean_square"].notna(), "kind"]) == set(known)


def test_a_streamed_checkpoint(tmp_path):
    reference = write_olmo(tmp_path / "m").eval()
    ids = torch.randint(61, (2, 23), generator=torch.Generator().manual_seed(0))
    modules = [m for layer in reference.model.layers for m in (layer.self_attn, layer.mlp)]
    expected = mean_squares(modules, lambda: reference(ids))
    curve = measure_curves(Checkpoint(str(tmp_path / "m")), ids, torch.device("cpu"), torch.float32)
    place = list(STATISTICS).index("read_mean_square")
    got = [row.values[place].item() for row in curve[0].rows]
    assert np.isnan(got[0])
    np.testing.assert_allclose(got[1:], expected, **PARITY)
