"""Seeds measured as one batch against the same seeds alone."""

import numpy as np
import pytest
import torch
from conftest import placed, tiny

from simlab.budget import cost
from simlab.config.validate import compose
from simlab.experiment import ENGINE_WEIGHTS, measure, prepare, run
from simlab.measurement.engine import measure_curves
from simlab.schemes.placement import PLACEMENTS
from simlab.weights.weightless import GaussianWeights, factor, gram, together

CPU = torch.device("cpu")
SEEDS = (3, 0, 7)
# Tokens repeat and the sequences begin alike: Gram matrices are singular.
IDS = torch.tensor([[3, 3, 7, 1, 3, 9, 2, 4, 6, 3, 1], [3, 3, 7, 1, 5, 0, 0, 2, 4, 9, 3]])
CASES = [placed(norm) for norm in PLACEMENTS] + [
    ["model.tied=true"],
    ["model.tied=true", "init=fan_in"],
    ["norm.type=layer", "model.qk_norm=per_head"],
    ["kv_heads=6", "model.qk_norm=none"],
    ["width=12", "d_ff=16"],  # fewer dimensions than tokens: the weights are drawn
    ["dtype=bfloat16"],
    ["norm=dyt"],
]


def values(curves):
    """(curves, rows × statistics and the loss)."""
    rows = [[torch.cat([r.values, r.gradient]) for r in m.rows] for m in curves]
    flat = [torch.cat([*row, m.loss.double()[None]]) for row, m in zip(rows, curves, strict=True)]
    return torch.stack(flat).nan_to_num(-1).numpy()


def measured(config, *seeds):
    weights = GaussianWeights(config.shape, config.init, *seeds)
    return measure_curves(weights, IDS, CPU, getattr(torch, config.dtype), True)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_together_as_alone(case):
    """Every statistic of the stream and of the gradient, at every step, and the loss.

    On one thread: on several, sums in another order give the gradient another draw of the same law
    where tokens repeat. The tolerance is float32's rounding, through all blocks and back, where
    repeated tokens make it matter more; other seeds' numbers are much farther away.
    """
    std = [] if "init=fan_in" in case else ["init.std=0.1"]
    config = tiny(*std, *case)
    together = values(measured(config, *SEEDS))
    alone = values([measured(config, seed)[0] for seed in SEEDS])
    tolerance = 1e-4 if config.dtype == "float32" else 2**-6  # some roundings of bfloat16
    size = np.abs(alone).max(0)
    assert (np.abs(together - alone) <= tolerance * size).all()
    assert (np.abs(np.roll(together, 1, 0) - alone) > 10 * tolerance * size).mean() > 0.3


def test_overflow_in_one_seed():
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    x[1, 2, 3] = torch.inf
    x[2, 4] = x[2, 0]  # singular: jitter, which the first must not get
    scale, lower, jitter = factor(gram(x))
    assert lower[1].isnan().any()
    for i in (0, 2):
        for batch, alone in zip((scale, lower, jitter), factor(gram(x[i : i + 1])), strict=True):
            torch.testing.assert_close(batch[i], alone[0], rtol=1e-12, atol=1e-12)


def test_jitter_grows_only_where_it_must():
    """A matrix that isn't positive needs 0.1 more on its diagonal than is ever added: NaN, alone."""
    square = torch.eye(3, dtype=torch.float64).repeat(3, 1, 1)
    square[1, 0, 1] = square[1, 1, 0] = 1 + 1e-11  # needs more than the first jitter
    square[2, 0, 1] = square[2, 1, 0] = 1.1
    _, lower, jitter = factor(square)
    assert jitter[0].item() == 1e-13
    assert 1e-11 < jitter[1].item() < 2e-10
    assert not lower[:2].isnan().any()
    assert lower[2].isnan().all()


def test_how_many_go_together():
    """Few where a token is wide or tokens are many, and never none; the logits count backward."""

    def size(width, tokens, gradients=False, seeds=24):
        sizes = [f"width={width}", "heads=4", "kv_heads=4", f"d_ff={4 * width}"]
        shape = tiny(*sizes, "vocab_size=50304").shape
        return together(shape, tokens, gradients, seeds)

    assert [size(width, 64) for width in (256, 1024, 4096)] == [24, 12, 4]
    assert size(256, 64, gradients=True) == 12
    assert [size(1024, 64, seeds=seeds) for seeds in (0, 1, 16, 17, 40)] == [1, 1, 16, 9, 14]
    assert together(compose(["model=olmo2_32b"]).shape, 64, False, 8) == 2
    assert size(4096, 1024) == 1


@pytest.mark.parametrize("gradients", [False, True])
def test_a_run_in_groups(monkeypatch, gradients):
    """Rows, order and progress are the same, however the run's seeds are grouped."""
    frames, groups = [], []

    class Recorded(GaussianWeights):
        def __init__(self, *args, **options):
            groups.append(args[2:])
            super().__init__(*args, **options)

    monkeypatch.setitem(ENGINE_WEIGHTS, "weightless", Recorded)
    for size in (1, 2, 5):
        groups.clear()
        monkeypatch.setattr(cost, "together", lambda *_, size=size: size)
        config = tiny(
            "engine=weightless", "seeds=5", "seed=2", f"gradients={str(gradients).lower()}"
        )
        ready, done = prepare(config), []
        frames.append(measure(ready, lambda done=done: done.append(None)).curve)
        assert len(done) == ready.blocks
        assert sorted(seed for group in groups for seed in group) == [2, 3, 4, 5, 6]
        assert max(map(len, groups)) == size
        assert run(config).curve.equals(frames[-1])  # and the same bytes again
    keys = ["curve", "seed", "sublayer", "block", "kind"]
    for frame in frames[1:]:
        assert frame[keys].equals(frames[0][keys])
        for column in frame.columns.drop(keys):
            np.testing.assert_allclose(frame[column], frames[0][column], rtol=1e-4, atol=1e-6)
