import numpy as np
import pandas as pd
import pytest
from conftest import GOLDEN

from simlab.analysis.numbers import short
from simlab.analysis.verdict import ROUNDING
from simlab.experiment import run
from simlab.regress.gates import (
    QUANTITIES,
    RTOL,
    SIGNED,
    blame,
    exact,
    first_row_off,
    statistical,
    structure,
)
from simlab.regress.law_gate import LAW_GATE_SEEDS, law, stretched

DTYPE = "float32"


@pytest.fixture(scope="module")
def measured():
    """Curves of 20 random inits of a model without eps effects: every sublayer adds 1."""
    from conftest import tiny

    return run(tiny("depth=4", "init.std=0.3", "seeds=20"))


@pytest.fixture
def recorded(measured):
    return measured.curve[measured.curve["seed"] < 10]


@pytest.fixture
def fresh(measured):
    return measured.curve[measured.curve["seed"] >= 10].copy()


def from_sublayer(frame, k, column, change):
    rows = frame["sublayer"] >= k
    frame.loc[rows, column] = change(frame.loc[rows, column])
    return frame


def test_tolerance_is_golden():
    assert RTOL == GOLDEN


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_exact_sees_one_number(recorded, quantity):
    """A single one, by ten times what rounding may do, and not by a tenth of it."""
    curve = recorded.loc[recorded["seed"] == 3, quantity]
    row = curve.index[5]
    size = np.sqrt((curve**2).mean()) if quantity in SIGNED else curve[row]
    for times, passes in ((0.1, True), (10, False)):
        got = recorded.copy()
        got.loc[row, quantity] += times * RTOL[DTYPE] * size
        outcome = exact(recorded, got, QUANTITIES, DTYPE)
        assert outcome.passed == passes
    if pd.notna(curve[row]):
        assert (outcome.finding.sublayer, outcome.finding.quantity) == (5, quantity)
        assert outcome.finding.size == pytest.approx(10 * RTOL[DTYPE])
        assert "sublayer 5, the attention of block 3" in outcome.why


def test_exact_sees_what_is_missing(recorded):
    got = recorded.copy()
    got.loc[got.index[4], "norm"] = np.nan
    assert not exact(recorded, got, QUANTITIES, DTYPE).passed
    assert not exact(recorded, got.iloc[:-1], QUANTITIES, DTYPE).passed
    one = recorded[recorded["seed"] == 0]
    assert "seed 1 isn't recorded" in exact(one, recorded, QUANTITIES, DTYPE).why
    assert "is recorded and wasn't measured" in exact(recorded, one, QUANTITIES, DTYPE).why
    assert not exact(recorded, recorded.iloc[:0], QUANTITIES, DTYPE).passed
    assert not exact(recorded.iloc[:0], recorded.iloc[:0], QUANTITIES, DTYPE).passed


def test_statistical_sees_what_is_missing(recorded, fresh):
    assert not statistical(recorded, fresh.assign(norm=np.nan), QUANTITIES, DTYPE).passed
    assert not statistical(recorded, fresh.assign(norm=np.inf), QUANTITIES, DTYPE).passed
    lost = fresh.copy()
    lost.loc[lost.index[3], "norm"] = np.nan
    assert np.isinf(statistical(recorded, lost, QUANTITIES, DTYPE).finding.size)
    none = [frame.assign(norm=np.nan) for frame in (recorded, fresh)]
    assert not statistical(*none, ["norm"], DTYPE).passed
    assert statistical(*none, ["norm", "cosine"], DTYPE).passed


def test_other_steps_are_named(recorded):
    got = recorded.copy()
    got.loc[got["sublayer"] == 4, "kind"] = "attention"
    outcome = structure(recorded, got, "exact")
    assert outcome.finding.blame == "structure"
    assert "it is attention of block 2 (sublayer 4), not mlp of block 2" in outcome.why
    short = got[got["sublayer"] < 3]
    assert "it is the end, not attention of block 2" in structure(recorded, short, "exact").why
    assert "isn't recorded" in structure(recorded, got.assign(curve="other"), "exact").why
    assert structure(recorded, recorded, "exact") is None


def test_other_seeds_pass(recorded, fresh):
    outcome = statistical(recorded, fresh, QUANTITIES, DTYPE)
    assert outcome.passed
    assert outcome.finding is None


@pytest.mark.parametrize(
    ("column", "factor", "to"),
    [
        ("norm", 1.5, "residual add"),
        ("branch_mean_square", 1.1, "norm"),
        ("branch_raw_mean_square", 9.0, "mlp"),
        ("token_cosine", 5.0, "mlp"),
    ],
)
def test_statistical_says_where_and_what(recorded, fresh, column, factor, to):
    got = from_sublayer(fresh, 4, column, lambda v: factor * v)
    outcome = statistical(recorded, got, QUANTITIES, DTYPE)
    finding = outcome.finding
    assert not outcome.passed
    assert (finding.sublayer, finding.block, finding.kind) == (4, 1, "mlp")
    assert (finding.quantity, finding.blame) == (column, to)
    assert finding.size > finding.limit > 3
    assert f"standard errors (limit {short(finding.limit, 2)})" in outcome.why


def test_statistical_sees_a_spread_about_zero(recorded, fresh):
    """LayerNorm's mean over width is 0 like RMSNorm's, but always."""
    got = fresh.assign(mean=1e-9)
    assert statistical(recorded, fresh, ["mean"], DTYPE).passed
    assert statistical(recorded, got, ["mean"], DTYPE).finding.quantity == "mean"


def test_rounding_passes_where_seeds_agree(recorded, fresh):
    """Normed branches have one mean square, whatever the seed: another machine's may pass."""
    got = fresh.assign(
        branch_mean_square=lambda f: f["branch_mean_square"] * (1 + ROUNDING[DTYPE] / 2)
    )
    assert statistical(recorded, got, QUANTITIES, DTYPE).passed


def test_gradients_begin_at_the_loss():
    rows = np.array([2, 3, 4])
    assert first_row_off(rows, ["gradient_norm"] * 3) == 4
    assert first_row_off(rows, ["gradient_norm", "norm", "cosine"]) == 3


def test_blame_by_kind_or_quantity(recorded):
    row = recorded.iloc[4]
    assert blame(recorded, row.replace({"mlp": "renorm"}), ["norm"], DTYPE) == "norm"
    assert blame(recorded, recorded.iloc[0], ["norm"], DTYPE) == "embedding"
    assert blame(recorded, row, ["gain_max_abs"], DTYPE) == "norm"
    last = recorded.iloc[8]
    assert blame(recorded, last, ["gradient_norm"], DTYPE) == "loss"
    assert blame(recorded, row, ["gradient_norm"], DTYPE) == "mlp"


def test_the_law(measured):
    outcome = law(measured.curve, measured.verdicts["random"], 1.0, DTYPE)
    assert outcome.passed
    assert outcome.short.startswith("p ")


@pytest.mark.parametrize(
    ("overrides", "to"),
    [(["norm=pre", "init.std=0.05"], "norm"), (["norm=residual_scale", "init.std=2"], "norm")],
)
def test_law_gate_fails_without_norm(overrides, to):
    from conftest import tiny

    found = run(tiny("depth=4", f"seeds={LAW_GATE_SEEDS}", *overrides))
    outcome = law(found.curve, found.verdicts["random"], 1.0, DTYPE)
    assert not outcome.passed
    assert (outcome.finding.sublayer, outcome.finding.blame) == (1, to)


def test_the_law_blames_the_add(measured):
    """Rows in which the stream grows by what no branch has."""
    from simlab.analysis.curve import curves_of
    from simlab.analysis.verdict import judge

    got = from_sublayer(measured.curve.copy(), 3, "mean_square", lambda v: v + 0.5)
    of_curve = curves_of(got, "random", gain=[1.0] * len(got), normalises=["branch"] * len(got))
    verdict = judge(of_curve, DTYPE)
    outcome = law(got, verdict, 1.0, DTYPE)
    assert (outcome.finding.sublayer, outcome.finding.blame) == (3, "residual add")
    assert outcome.finding.size > 5


def test_the_law_needs_seeds():
    from conftest import tiny

    found = run(tiny("seeds=2"))
    with pytest.raises(ValueError, match="2 seeds: 11 needed"):
        law(found.curve, found.verdicts["random"], 1.0, DTYPE)


def test_the_law_is_stricter_than_the_verdict():
    """Stretched as Student's t of 10 degrees of freedom is: 4.587 at 99.95 %, 2.228 at 97.5 %."""
    from simlab.analysis.resampling import Estimate

    p = stretched(Estimate(1.0, 0.9, 1.2), 11)
    assert (p.low, p.high) == pytest.approx(
        (1 - 0.1 * 4.587 / 2.228, 1 + 0.2 * 4.587 / 2.228), abs=1e-3
    )
    assert stretched(Estimate(1.0), 1) == Estimate(1.0)
