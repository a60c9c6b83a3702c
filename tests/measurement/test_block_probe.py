"""The probe changes nothing, leaves nothing behind, and measures what it says."""

import pandas as pd
import pytest
import torch
from conftest import PARITY, ids_of, placed, tiny
from probed import hooks, values

from simlab import build_model
from simlab.experiment import run
from simlab.measurement.block_probe import Probe
from simlab.measurement.statistics import STATISTICS
from simlab.model.placement import ResidualStep, start, tensors_of
from simlab.schemes.placement import PLACEMENTS


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_probed_and_unprobed_are_bit_equal(placement, dtype):
    model = build_model(tiny(f"norm={placement}", f"dtype={dtype}", "init.std=0.1"))
    plain = probed = start(
        model.embedding(torch.arange(22).view(2, 11)), model.config, model.start_parts
    )
    with torch.no_grad():
        for block in model.blocks:
            plain = block(plain)
            with Probe(block):
                probed = block(probed)
    for one, other in zip(tensors_of(plain), tensors_of(probed), strict=True):
        assert torch.equal(one, other)
    assert hooks(model) == 0


def test_hooks_are_removed_after_exceptions():
    block = build_model(tiny()).blocks[0]
    with pytest.raises(RuntimeError), Probe(block):
        block(torch.zeros(1, 2, 3))
    assert hooks(block) == 0


def by_hand(config, ids):
    """The rows of curve.csv for the config's first seed, from plain hooks on build_model's modules."""
    model, rows = build_model(config), []
    x = model.embedding(ids).double()
    rows.append({"kind": "embedding", "after": x})
    for block in model.blocks:
        for kind, step in block.steps():
            row = {"kind": kind, "norm": None}
            if isinstance(step, ResidualStep):
                step.add.register_forward_hook(
                    lambda m, a, o, row=row: row.update(skip=a[0].double(), branch=a[1].double())
                )
                step.sublayer.register_forward_hook(
                    lambda m, a, o, row=row: row.update(raw=o.double())
                )
            step.register_forward_hook(lambda m, a, o, row=row: row.update(after=o.double()))
            rows.append(row)
    with torch.no_grad():
        model(ids)
    for row in rows[1:]:
        if "skip" in row:  # delta_branch and delta_cross are what the stream's square grows by
            grown = (row["skip"] + row["branch"]).pow(2) - row["skip"].pow(2)
            parts = values(row)
            torch.testing.assert_close(
                parts["delta_branch"] + parts["delta_cross"], grown.sum(-1).mean().item()
            )
    return pd.DataFrame([values(row) for row in rows])


@pytest.mark.parametrize(
    "placement", ["reordered", "swin_renorm", "post", "deepnorm", "residual_scale"]
)
def test_curve_against_plain_hooks(placement):
    config = tiny(*placed(placement), "init.std=0.1", "inputs.batch=5")
    frame = run(config).curve
    expected = by_hand(config, ids_of(config))
    assert frame["kind"].tolist() == expected["kind"].tolist()
    for column in expected.columns.drop("kind"):
        torch.testing.assert_close(
            torch.tensor(frame[column]), torch.tensor(expected[column]), equal_nan=True, **PARITY
        )


@pytest.mark.parametrize("norm_type", ["rms", "layer"])
def test_eps_factor(norm_type):
    """m/(m + eps): for normed branches it is the branch's mean square, measured independently."""
    config = tiny(f"norm.type={norm_type}", "norm.eps=1e-6")
    frame = run(config).curve.iloc[1:]
    torch.testing.assert_close(
        torch.tensor(frame["eps_factor"].values),
        torch.tensor(frame["branch_mean_square"].values),
        **PARITY,
    )
    assert frame["eps_factor"].iloc[0] < 0.9  # eps matters at this width: the test can tell
    for placement in ("post", "deepnorm"):
        frame = run(
            tiny(f"norm={placement}", f"norm.type={norm_type}", "norm.eps=0.01")
        ).curve.iloc[1:]
        torch.testing.assert_close(
            torch.tensor(frame["eps_factor"].values),
            torch.tensor(frame["mean_square"].values),
            **PARITY,
        )
        assert frame["eps_factor"].iloc[0] < 0.9


def test_every_statistic_is_a_column():
    columns = set(run(tiny()).curve.columns) | {"non_finite"}
    assert columns > {*STATISTICS, "curve", "seed", "sublayer", "block", "kind", "law_additive"}
