import numpy as np
import pandas as pd
import pytest
from conftest import GOLDEN

from simlab.analysis.numbers import short
from simlab.analysis.verdict import ROUNDING
from simlab.experiment import run
from simlab.regress.blame import adds_up, blame, first_row_off, norms_of
from simlab.regress.gates import QUANTITIES, RTOL, SIGNED, exact, mean, statistical, structure
from simlab.regress.law_gate import LAW_GATE_SEEDS, law, stretched
from simlab.schemes.placement import PLACEMENTS

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
        ("token_cosine", 5.0, "mlp or its norm"),
    ],
)
def test_statistical_says_where_and_what(measured, recorded, fresh, column, factor, to):
    got = from_sublayer(fresh, 4, column, lambda v: factor * v)
    norms = norms_of(measured.config.shape)
    outcome = statistical(recorded, got, QUANTITIES, DTYPE, norms=norms)
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


def test_a_forward_difference_comes_first(recorded):
    """However small beside a gradient's of this row or an earlier one, of this seed or another."""
    right = recorded.assign(gradient_rms=1.0)
    got = right.copy()
    got.loc[(got["seed"] == 1) & (got["sublayer"] >= 1), "gradient_rms"] = 2.0
    got.loc[(got["seed"] == 2) & (got["sublayer"] == 6), "branch_raw_mean_square"] *= 1.001
    got.loc[(got["seed"] == 2) & (got["sublayer"] == 6), "gradient_rms"] = 3.0
    finding = exact(right, got, [*QUANTITIES, "gradient_rms"], DTYPE).finding
    assert (finding.sublayer, finding.quantity) == (6, "branch_raw_mean_square")
    assert finding.size == pytest.approx(1e-3)


def test_blame_by_kind_or_quantity(measured, recorded):
    from conftest import tiny

    curve = recorded[recorded["seed"] == 0].reset_index(drop=True)
    norms = norms_of(measured.config.shape)

    def to(row, *beyond, got=curve, norms=norms):
        return blame(curve, got, row, beyond, DTYPE, norms)

    assert to(4, "norm", got=curve.replace({"mlp": "renorm"})) == "norm"
    assert to(0, "norm") == "embedding"
    assert to(4, "gain_max_abs") == "norm"
    assert to(4, "branch_raw_mean_square", "norm") == "mlp"
    assert to(3, "branch_raw_mean_square") == "attention or its norm"  # QK-norm
    assert to(4, "token_cosine", norms=None) == "mlp or its norm"  # of a stranger's model
    assert to(4, "norm", "token_cosine") == "residual add"
    more = curve.assign(mean_square=curve["mean_square"] * np.where(curve["sublayer"] < 4, 1, 2))
    assert (
        to(4, "branch_raw_mean_square", got=more) == "residual add"
    )  # x and b are more than their sum
    scaled = norms_of(tiny("norm=residual_scale").shape)  # whose x isn't added as it is
    assert to(4, "branch_raw_mean_square", got=more, norms=scaled) == "mlp or its norm"
    assert to(8, "gradient_norm") == "loss or head"
    assert (
        to(4, "gradient_norm") == "attention or its norm, backward"
    )  # block 3's, which comes next
    assert to(4, "gradient_norm", "norm") == "residual add"


@pytest.mark.parametrize("norm", [*sorted(PLACEMENTS), "hy_v4", "minimax", "dyt"])
def test_steps_that_sum_add_up(norm):
    """Of every placement: where blame takes a step for x + branch, the measured rows are that."""
    from conftest import placed, tiny

    measured = run(tiny(*placed(norm), "depth=3", "seeds=1", "init.std=0.1"))
    norms, curve = norms_of(measured.config.shape), measured.curve
    rows = curve.index[curve["kind"].isin(["attention", "mlp"])]
    found = {row: norms(int(curve["block"][row]), curve["kind"][row]).sums for row in rows}
    assert all(adds_up(curve, row, DTYPE) for row, sums in found.items() if sums)
    wanted = {"pre": 6, "hy_v4": 6, "residual_dual": 6, "hybrid_norm": 3, "post": 0, "mhc": 0}
    assert sum(found.values()) == wanted.get(norm, sum(found.values()))
    if norm in ("hybrid_norm", "mhc"):  # and the rest aren't
        assert not all(adds_up(curve, row, DTYPE) for row in rows)


@pytest.mark.parametrize(
    ("overrides", "quantity", "to"),
    [
        ("", "branch_mean_square", "norm"),
        # The branch isn't normed after its sublayer, so what is seen is the input's norm.
        ("norm=pre", "branch_raw_mean_square", "attention or its norm"),
    ],
)
def test_another_eps_is_the_norm(overrides, quantity, to):
    """Ten times eps, also in QK-norm: entropies differ first, and so do raw branches, by little."""
    from conftest import tiny

    given = ["depth=3", "init.std=0.1", "seeds=10", *filter(None, [overrides])]
    right, other = (run(tiny(*given, f"norm.eps={eps}")) for eps in ("1e-4", "1e-3"))
    norms = norms_of(right.config.shape)
    outcomes = [
        exact(right.curve, other.curve, QUANTITIES, DTYPE, norms),
        statistical(right.curve, other.curve, QUANTITIES, DTYPE, norms=norms),
    ]
    for outcome in outcomes if to == "norm" else outcomes[:1]:  # the other is too small for chance
        assert (outcome.finding.sublayer, outcome.finding.blame) == (1, to)
    row = [mean(result.curve).iloc[1] for result in (right, other)]
    assert abs(row[1][quantity] / row[0][quantity] - 1) > 0.05


def test_the_law(measured):
    outcome = law(measured.curve, measured.verdicts["random"], 1.0, DTYPE)
    assert outcome.passed
    assert outcome.short.startswith("p ")


def test_the_law_gate_where_there_is_no_law():
    from conftest import tiny

    found = run(tiny("norm=pre", f"seeds={LAW_GATE_SEEDS}"))
    outcome = law(found.curve, found.verdicts["random"], 1.0, DTYPE)
    assert not outcome.passed
    assert "no law says anything of these curves" in outcome.why


@pytest.mark.parametrize(
    ("moved", "to"),
    [([], "residual add"), (["branch_mean_square", "delta_branch"], "norm"),
     (["delta_cross"], "attention")],
)  # fmt: skip
def test_the_law_blames(measured, moved, to):
    """Rows whose stream grows by half as much again; with it nothing, the branch or the cross term."""
    from simlab.analysis.curve import curves_of
    from simlab.analysis.verdict import judge

    got = measured.curve.copy()
    if moved == ["delta_cross"]:
        width = (got["delta_branch"] / got["branch_mean_square"]).mean()
        own = got.groupby("seed")["mean_square"].diff() - got["branch_mean_square"]
        got.loc[got["sublayer"] == 3, "delta_cross"] = width * (own + 0.5)
    for column in moved[: 2 * (to == "norm")]:
        got = from_sublayer(got, 3, column, lambda v: v + 0.5 * v)
    got = from_sublayer(got, 3, "mean_square", lambda v: v + 0.5)
    of_curve = curves_of(got, "random", gain=[1.0] * len(got), normalises=["branch"] * len(got))
    outcome = law(got, judge(of_curve, DTYPE), 1.0, DTYPE)
    assert (outcome.finding.sublayer, outcome.finding.blame) == (3, to)
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
