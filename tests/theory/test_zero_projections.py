"""Matrices that start at 0: theory stays finite, and is what simulations are."""

import numpy as np
import pytest
from conftest import STANDARD_ERRORS, ids_of, tiny

from simlab.experiment import run
from simlab.schemes.init import RULES
from simlab.theory.mean_field import predict

CASES = [
    ("pre", "per_head", "q_proj"), ("reordered", "none", "k_proj"), ("reordered", "full", "o_proj"),
    ("peri", "full", "down_proj"), ("swin_renorm", "full", "up_proj"), ("gemma3n", "full", "down_proj"),
]  # fmt: skip


@pytest.mark.parametrize(("norm", "qk_norm", "role"), CASES)
def test_a_projection_of_zeros(norm, qk_norm, role, monkeypatch):
    """A branch of 0 in front of a norm, or queries and keys of 0. Not zeroed, theory departs."""
    plain, width = RULES["fan_in"], "width=96"
    asked = [f"norm={norm}", f"model.qk_norm={qk_norm}", "init=fan_in", width, "d_ff=192"]
    config = tiny(*asked, "gradients=true", "engine=weightless", "seeds=8", "norm.eps=1e-3")

    def predicted():
        found = predict(config.shape, config.init, ids_of(config).numpy(), gradients=True)
        assert (found.ends, found.no_gradient) == (None, None)
        return np.array([(r.mean_square, r.gradient_rms) for r in found.rows])

    whole = predicted()
    monkeypatch.setitem(RULES, "fan_in", lambda *given: plain(*given) | {role: 0.0})
    zeroed = predicted()
    rows = run(config).curve.groupby(["sublayer", "kind"], sort=False)
    columns = ["mean_square", "gradient_rms"]
    mean, error = rows[columns].mean().to_numpy(), rows[columns].sem().to_numpy()
    # Theory's own error: 1 % of a mean square and 10 % of a gradient at this width.
    bound = STANDARD_ERRORS * error + np.array([0.01, 0.1]) * mean
    assert (np.abs(zeroed - mean) <= bound).all()
    assert (np.abs(whole - mean) > bound).any()
