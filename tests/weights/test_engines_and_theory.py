"""Every choice of norm: dense, weightless and theory agree, forward and backward, at two widths."""

from functools import cache

import numpy as np
import pytest
from conftest import STANDARD_ERRORS, placed
from test_weightless import (
    DRAWN,
    IDS,
    TOGETHER,
    DenseWeights,
    limit,
    normals_together,
    sample,
    shape,
    worst,
)

from simlab.config.validate import options
from simlab.measurement.statistics import GRADIENT_STATISTICS, STATISTICS
from simlab.theory.mean_field import predict
from simlab.weights.weightless import GaussianWeights

__all__ = ["normals_together"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "normals_together")]
COLUMNS = [*STATISTICS, *GRADIENT_STATISTICS]
# Theory's own error of a mean, times the width: it is of order 1/width.
OWN = {"mean_square": 2.0, "gradient_rms": 6.0}
# Without norms rare seeds carry the mean, and theory ends.
CHOICES = [name for name in options("norm") if name not in ("from_checkpoint", "none")]


@pytest.fixture(scope="module", autouse=True)
def drawn_matrices():
    """Choices share them; 200 MB, until this file is done."""
    before = set(DRAWN)
    yield
    for key in set(DRAWN) - before:
        del DRAWN[key]


def setting(norm, width):
    """Three blocks. No write buries the embedding, and no token carries the loss."""
    sizes = ["depth=3", f"d_ff={2 * width}", "vocab_size=200", "init.embedding_std=0.7"]
    return shape(norm, width, *placed(norm)[1:], *sizes)


@cache
def theory(norm, width):
    config = setting(norm, width)
    rows = predict(config.shape, config.init, IDS.numpy(), gradients=True, with_band=False).rows
    return {name: np.array([getattr(row, name) for row in rows]) for name in OWN}


def off(norm, width, curves):
    """How far theory of a choice is from curves, over what chance and OWN allow: below 1 is right."""
    ratios = {}
    for name, found in theory(norm, width).items():
        measured = curves[:, : len(found), COLUMNS.index(name)]
        mean, error = measured.mean(0), measured.std(0, ddof=1) / len(measured) ** 0.5
        bound = OWN[name] / width * mean + STANDARD_ERRORS * error
        ratios[name] = float((np.abs(found[: len(mean)] - mean) / bound).max())
    return ratios


@pytest.mark.parametrize("width", [48, 96])
@pytest.mark.parametrize("norm", CHOICES)
def test_engines_and_theory(norm, width):
    """Engines: every statistic. Theory: mean squares and gradients. Another's theory departs."""
    config = setting(norm, width)
    dense, weightless = (sample(e, config, TOGETHER) for e in (DenseWeights, GaussianWeights))
    z, count = worst(dense, weightless)
    assert z < limit(count)
    # The last number is the loss.
    dense, weightless = (s[:, :-1].reshape(TOGETHER, -1, len(COLUMNS)) for s in (dense, weightless))
    assert len(theory(norm, width)["mean_square"]) == dense.shape[1]
    for curves in (dense, weightless):
        assert all(ratio < 1 for ratio in off(norm, width, curves).values())  # of NaN it is false
    others = [off(other, width, dense) for other in ("lns", "reordered")]
    for name in OWN:
        assert max(ratios[name] for ratios in others) > 1
