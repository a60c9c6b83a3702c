"""The engine: order of rows, batches, memory, overflow, dtypes."""

import weakref

import numpy as np
import pytest
import torch
from conftest import PARITY, ids_of, placed, tiny

from simlab import build_model
from simlab.budget.trace import Counter
from simlab.config import ConfigError
from simlab.experiment import run
from simlab.measurement.engine import measure_curves, resolve_device
from simlab.weights.base import Weights
from simlab.weights.dense import RandomWeights
from simlab.weights.weightless import GaussianWeights

CPU = torch.device("cpu")


def test_row_numbers():
    frame = run(tiny("depth=4", "norm=swin_renorm", "norm.every=2", "seeds=2")).curve
    for seed in (0, 1):
        rows = frame[frame["seed"] == seed]
        assert rows["sublayer"].tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
        kinds = ["attention", "mlp", "attention", "mlp", "renorm"]
        assert rows["kind"].tolist() == ["embedding", *kinds, *kinds]
        assert rows["block"].tolist()[1:] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


def test_batches_do_not_matter(monkeypatch):
    config = tiny("inputs.batch=7", "gradients=true")
    whole = run(config).curve
    monkeypatch.setattr(RandomWeights, "tokens_at_once", 22)  # two sequences at a time
    parts = run(config).curve
    for column in whole.select_dtypes("number"):
        np.testing.assert_allclose(parts[column], whole[column], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", [RandomWeights, GaussianWeights])
@pytest.mark.parametrize("gradients", [False, True])
def test_one_block_lives_at_a_time(monkeypatch, engine, gradients):
    alive, most = weakref.WeakSet(), []
    built = Weights.block

    def watched(*args):
        most.append(len(alive))
        block = built(*args)
        alive.add(block)
        return block

    monkeypatch.setattr(Weights, "block", watched)
    config = tiny("depth=6")
    ids = torch.arange(22).view(2, 11)
    weights = engine(config.shape, config.init, 0)
    measure_curves(weights, ids, CPU, torch.float32, gradients)
    assert len(most) == (12 if gradients else 6)
    assert max(most) == 0  # the one before is gone when the next is made


@pytest.mark.parametrize("engine", [RandomWeights, GaussianWeights])
def test_peak_memory_by_depth(engine):
    """Bytes of live tensors: each block more would add its 1.1 MB to a peak of some 3."""
    peaks = []
    for depth in (2, 8):
        config = tiny(f"depth={depth}", "width=192", "d_ff=384")
        with Counter() as live:
            weights = engine(config.shape, config.init, 0)
            measure_curves(weights, torch.arange(22).view(2, 11), CPU, torch.float32)
        peaks.append(live.peak)
    assert peaks[1] < 1.1 * peaks[0]


def test_overflow_ends_the_curve():
    result = run(tiny("dtype=float16", "norm=none", "init.std=3", "depth=6", "seeds=3"))
    frame, overflow = result.curve, result.summary["overflow"]
    assert len(overflow) == 3
    for row in overflow:
        rows = frame[frame["seed"] == row["seed"]]
        assert np.isfinite(rows["mean_square"]).all()
        assert rows["sublayer"].max() == row["sublayer"] - 1
        assert row["kind"] in ("attention", "mlp")
        model = build_model(
            tiny("dtype=float16", "norm=none", "init.std=3", "depth=6"), seed=row["seed"]
        )
        x = model.embedding(ids_of(result.config))
        first = None
        for sublayer, step in enumerate((s for b in model.blocks for _, s in b.steps()), start=1):
            x = step(x)
            if first is None and not x.isfinite().all():
                first = sublayer
        assert first == row["sublayer"]


def test_squares_beyond_float32_are_measured():
    """The stream passes 1e20 before anything in it overflows; the statistics are in float64."""
    config = tiny("norm=none", "init=fan_in", "init.truncate=null", "depth=20")
    frame = run(config).curve
    x = build_model(config).embedding(ids_of(config))
    expected = []
    for step in (s for b in build_model(config).blocks for _, s in b.steps()):
        expected.append(x.detach().double().pow(2).mean().item())
        x = step(x)
    assert frame["mean_square"].max() > 10 * torch.finfo(torch.float32).max
    np.testing.assert_allclose(frame["mean_square"], expected[: len(frame)], rtol=PARITY["rtol"])


FLOAT32 = torch.finfo(torch.float32).max


@pytest.mark.parametrize("engine", ["dense", "weightless"])
@pytest.mark.parametrize(
    ("norm", "below", "beyond"),
    [("reordered", 1e3, 1e5), ("swin_renorm", 1e3, 1e5), ("peri", 1e5, 1e8), ("pre", 1e5, 1e8)],
)
def test_norms_of_huge_numbers(norm, below, beyond, engine):
    """Where float32 can't hold the squares of a norm's input, the norm is right all the same.

    Just below the limit and beyond, branches have the same directions, but for 1/std of the stream.
    """
    before, after = (
        run(tiny(*placed(norm), f"engine={engine}", "init.truncate=null", f"init.std={std}")).curve
        for std in (below, beyond)
    )
    squares = [48 * rows["branch_raw_mean_square"].max() for rows in (before, after)]
    assert squares[0] < FLOAT32 < squares[1]
    for column in ("cosine", "token_cosine", "attention_entropy"):
        np.testing.assert_allclose(after[column], before[column], atol=0.01)
    adds = after[after["kind"].isin(["attention", "mlp"])]
    np.testing.assert_allclose(adds["eps_factor"], 1)
    if norm == "pre":
        grown = [
            rows["mean_square"].to_numpy() / rows["mean_square"][2] for rows in (before, after)
        ]
        np.testing.assert_allclose(grown[1][2:], grown[0][2:], rtol=0.01)
    else:
        np.testing.assert_allclose(adds["branch_mean_square"], 1, rtol=PARITY["rtol"])


@pytest.mark.parametrize("engine", ["dense", "weightless"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_gradients_through_norms_of_huge_numbers(kind, engine):
    """Post-norm: the stream is the same at any large std, its gradient grows as std.

    At 1e3 float32 holds all that a norm's backward computes, at 1e10 not even the forward's squares.
    """
    options = ["norm=post", f"norm.type={kind}", "gradients=true", "init.truncate=null"]
    below, beyond = (
        run(tiny(*options, f"engine={engine}", f"init.std={std}")).curve for std in (1e3, 1e10)
    )
    assert 48 * beyond["branch_raw_mean_square"].min() > FLOAT32
    np.testing.assert_allclose(beyond["mean_square"][1:], 1, rtol=PARITY["rtol"])
    ratio = (beyond["gradient_rms"] / below["gradient_rms"]).to_numpy()
    np.testing.assert_allclose(ratio[1:], 1e7, rtol=0.01)  # SiLU is a ReLU but for 1/std
    assert ratio[0] == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize(
    ("cuda", "mps", "best"), [(False, False, "cpu"), (True, False, "cuda"), (False, True, "mps")]
)
def test_the_automatic_device(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto") == torch.device(best)


def test_devices():
    assert resolve_device("cpu") == CPU
    with pytest.raises(ConfigError, match=r"device=cuda:99: not on this machine"):
        resolve_device("cuda:99")


def test_gradients_under_no_grad():
    config = tiny("gradients=true")
    with torch.no_grad():
        quiet = run(config).curve
    assert quiet.equals(run(config).curve)
