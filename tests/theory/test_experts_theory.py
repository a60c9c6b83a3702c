"""Theory of experts against random ones: kernel, gradient and noise of one layer, and a whole curve."""

import dataclasses

import numpy as np
import pytest
from conftest import STANDARD_ERRORS, ids_of, tiny
from one_layer import TOKENS, WIDTH, drawn, off, tokens

from simlab.experiment import run
from simlab.model.mlp import Experts
from simlab.model.transformer import dense_linear
from simlab.theory.mean_field import predict, unpredictable
from simlab.theory.mean_field.branch import Input
from simlab.theory.mean_field.experts import ExpertsKernel
from simlab.theory.mean_field.mlp import MLPKernel

pytestmark = pytest.mark.usefixtures("one_thread")
DRAWS = 400
STDS = {"router": 0.1, "gate_proj": 0.12, "up_proj": 0.1, "down_proj": 0.15}  # logits' variance 1.3
MODEL = [
    f"width={WIDTH}", "heads=4", "kv_heads=4", "d_ff=48", "model.experts=6", "norm=pre",
]  # fmt: skip


@pytest.mark.parametrize(("per_token", "renormalise"), [(2, False), (2, True), (6, False)])
def test_one_layer(per_token, renormalise):
    """Mean Gram matrices within their standard errors; the noise of the mean square within a fifth.

    A variance from 400 draws is known to some 10 %.
    """
    asked = [f"model.experts_per_token={per_token}"]
    asked += [f"model.renormalise_experts={str(renormalise).lower()}"]
    model = tiny(*MODEL, *asked).shape
    x, g = tokens(), np.random.default_rng(2).standard_normal((TOKENS, WIDTH))
    kernel, nothing = x @ x.T / WIDTH, np.zeros((TOKENS, TOKENS))
    outputs, gradients = drawn(Experts(model, dense_linear), STDS, DRAWS, x, g)
    branch = ExpertsKernel(MLPKernel(model, STDS))(Input(kernel, nothing, nothing, True))
    assert off(outputs, branch.kernel) < STANDARD_ERRORS
    assert off(gradients, branch.pull_gradient(g @ g.T / WIDTH)) < STANDARD_ERRORS
    noise = (branch.square + 2 * branch.kernel**2 / WIDTH).mean()
    measured = outputs.diagonal(axis1=1, axis2=2).mean(1).var(ddof=1)
    assert noise == pytest.approx(measured, rel=0.2)
    # Negative controls: one MLP in their place, no gradient through the shares, no noise of theirs.
    assert off(outputs, branch.one.kernel) > 2 * STANDARD_ERRORS
    still = dataclasses.replace(branch.averages, through=nothing)
    alone = dataclasses.replace(branch, averages=still)
    assert off(gradients, alone.pull_gradient(g @ g.T / WIDTH)) > 1.3 * STANDARD_ERRORS
    own = branch.averages.fourth * branch.one.square + 2 * branch.kernel**2 / WIDTH
    if not renormalise:  # else Σ w² varies little
        assert own.mean() < 0.8 * measured


def test_whole_curve():
    """Mean squares and the gradient's, after every sublayer, against 24 random inits."""
    asked = ["depth=2", "model.experts_per_token=2", "init.std=0.08", "seeds=24", "gradients=true"]
    config = tiny(*MODEL, *asked, "engine=weightless")
    predicted = predict(config.shape, config.init, ids_of(config).numpy(), gradients=True)
    assert predicted.ends is None
    by_row = run(config).curve.groupby("sublayer")
    for row in predicted.rows:
        seeds = by_row.get_group(row.sublayer)
        for name, power in (("mean_square", 1), ("gradient_rms", 2)):
            values = seeds[name].to_numpy() ** power
            error = values.std(ddof=1) / np.sqrt(len(values))
            assert abs(values.mean() - getattr(row, name) ** power) < STANDARD_ERRORS * error, name
        assert row.band == pytest.approx(seeds["mean_square"].std(ddof=1), rel=0.5)


def test_only_behind_a_norm():
    config = tiny(*MODEL, "model.experts_per_token=2", "norm=reordered")
    reason = unpredictable(config.shape, ids_of(config).numpy())
    assert (
        reason == "theory has experts (model.experts) only behind a norm, as norm=pre places them"
    )
