"""The estimate of a predicted curve's memory, against a count of the arrays that it makes."""

import tracemalloc

import numpy as np
import pytest
from conftest import ids_of, tiny

from simlab.budget.predicted import prediction_cost
from simlab.theory.mean_field import drawing, predict

SHAPE = ["engine=theory", "width=256", "heads=4", "kv_heads=4", "vocab_size=500"]


def predicted(config):
    return predict(config.shape, config.init, ids_of(config).numpy(), gradients=config.gradients)


@pytest.mark.parametrize(
    "asked",
    [
        ["depth=1"],
        ["depth=3", "norm=siamese_norm"],
        ["depth=2", "gradients=true"],
    ],
    ids=lambda asked: asked[-1],
)
def test_arrays_of_a_prediction(asked):
    config = tiny(*SHAPE, *asked, "inputs.batch=1", "inputs.length=128")
    drawing._pool.cache_clear()  # its numbers are counted
    tracemalloc.start()
    predicted(config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.8 < prediction_cost(config)[0] / peak < 1.3


def test_heads_in_pieces(monkeypatch):
    """All heads' kernels at once, or a few of them at a time: the same numbers."""
    config = tiny(*SHAPE, "depth=2", "inputs.batch=1", "inputs.length=24")
    whole = predicted(config).rows
    monkeypatch.setattr(drawing, "COPIED", 1)
    for one, other in zip(whole, predicted(config).rows, strict=True):
        assert one.band == pytest.approx(other.band, rel=1e-9)
        np.testing.assert_allclose(one.mean_square, other.mean_square, rtol=1e-9)
