"""The gate ``theory``: on curves with a planted mistake, and as a case without a record."""

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from conftest import in_process, tiny

from simlab.experiment import measure, prepare
from simlab.experiment.theory import predicted
from simlab.model.placement import ResidualAdd
from simlab.regress.blame import norms_of
from simlab.regress.gates import QUANTITIES
from simlab.regress.theory_gate import checks, theory

GIVEN = ("norm=peri", "init.std=0.1", "gradients=true", "seeds=12")
CASE = """\
overrides: [model=small, norm=peri, init.std=0.1, depth=3, width=64, heads=4, kv_heads=2, d_ff=96,
            vocab_size=64, inputs.batch=2, inputs.length=8, device=cpu, engine=weightless, seeds=12]
gates: [theory]
"""


@pytest.fixture(scope="module")
def right():
    """Rows of random inits, their prediction, and the model's norms."""
    ready = prepare(tiny(*GIVEN))
    return measure(ready).curve, predicted(ready), norms_of(ready.config.shape)


def held(right, frame):
    _, prediction, norms = right
    return theory(frame, prediction, QUANTITIES, "float32", norms=norms)


def changed(frame, column, change, sublayers):
    there = frame["sublayer"].isin(sublayers)
    return frame.assign(**{column: frame[column].where(~there, change(frame[column]))})


def test_right_curves_pass(right):
    outcome = held(right, right[0])
    assert outcome.passed, outcome
    names = {check.quantity for check in checks(right[0], right[1], "float32")}
    assert {"mean_square", "gradient_rms", "eps_factor", *QUANTITIES[:3]} <= names


def test_branches_of_nothing_pass():
    """ReZero's are 0 at init, and have no cosine."""
    ready = prepare(tiny("norm=rezero", "seeds=8"))
    assert theory(measure(ready).curve, predicted(ready), QUANTITIES, "float32").passed


@pytest.mark.parametrize(
    ("column", "factor", "sublayers", "to"),
    [
        ("mean_square", 1.5, [4, 5, 6], "residual add"),
        ("branch_raw_mean_square", 2.0, [4], "mlp or its norm"),
        ("branch_mean_square", 1.2, [3], "norm"),
        ("gradient_rms", 2.0, [0, 1, 2], "attention or its norm, backward"),
    ],
)
def test_says_where_and_what(right, column, factor, sublayers, to):
    outcome = held(right, changed(right[0], column, lambda v: factor * v, sublayers))
    found = outcome.finding
    first = max(sublayers) if column == "gradient_rms" else min(sublayers)
    assert (found.sublayer, found.quantity, found.blame) == (first, column, to)
    assert found.size > found.limit > 4
    assert found.got == pytest.approx(factor * found.expected, rel=0.15)


def test_a_forward_mistake_comes_before_a_gradient(right):
    got = changed(right[0], "gradient_rms", lambda v: 9 * v, range(7))
    assert held(right, got).finding.blame == "loss or head"
    got = changed(got, "norm", lambda v: 1.3 * v, [5, 6])
    assert (held(right, got).finding.sublayer, held(right, got).finding.quantity) == (5, "norm")


@pytest.mark.parametrize("factor", [0.05, 4])
def test_the_spread_between_seeds(right, factor):
    """Seeds that share their numbers, or differ by more than theirs would."""
    mean = right[0].groupby("sublayer")["mean_square"].transform("mean")
    got = right[0].assign(mean_square=mean + factor * (right[0]["mean_square"] - mean))
    found = held(right, got).finding
    assert (found.quantity, found.blame) == ("std of mean_square between seeds", "random draws")
    got = changed(got, "norm", lambda v: 1.3 * v, [5])
    assert held(right, got).finding.quantity == "norm"  # a mean that is off comes first


def test_a_drift_has_no_single_place(right):
    """Each sublayer's branch is a little too large: by less than a branch is known to."""
    predicted_v = right[1].column("mean_square", 7)
    mean = right[0].groupby("sublayer")["mean_square"].transform("mean")
    own = 0.3 * (right[0]["mean_square"] - mean)  # less than chance, or the drift is lost in it
    drift = 0.08 * right[0]["sublayer"] + predicted_v[right[0]["sublayer"]]
    outcome = held(right, right[0].assign(mean_square=drift + own))
    assert outcome.finding.quantity == "mean_square"
    assert outcome.finding.blame == "attention, mlp or residual add"


def test_what_is_missing(right):
    assert "it is the end" in held(right, right[0][right[0]["sublayer"] < 5]).why
    lost = changed(right[0], "norm", lambda v: np.nan * v, [3])
    assert held(right, lost).finding.quantity == "norm"


@pytest.fixture
def case(tmp_path, monkeypatch):
    """A folder with a case, as the current one."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tests" / "baselines"
    folder.mkdir(parents=True)
    (folder / "small.yaml").write_text(CASE)
    return folder / "small.yaml"


def command(*args):
    done = in_process(*args, cwd=Path.cwd(), command="regress")
    return done.returncode, done.stdout, done.stderr


def test_a_case_without_a_record(case, monkeypatch):
    status, out, _ = command("--html", "page", "--junit", "junit.xml")
    assert status == 0, out
    assert "theory: largest departure from the predicted curve" in out
    assert Path("page/small.png").exists()
    assert list(case.parent.iterdir()) == [case]
    assert "needs no record" in command("--list")[1]
    status, _, err = command("--update", "small", "--reason", "why")
    assert status == 2
    assert "small: gate theory needs no record" in err

    monkeypatch.setattr(ResidualAdd, "forward", lambda self, skip, branch: skip + 2 * branch)
    status, out, _ = command("--junit", "junit.xml")
    assert status == 1
    said = " ".join(out.split())
    assert "theory: first at sublayer 1, the attention of block 1" in said
    assert "to blame: residual add" in said
    assert Path("outputs/regress/small.png").exists()
    (test,) = ET.parse("junit.xml").getroot().find("testsuite")
    assert test.get("name") == "small[theory]"
    assert "blame: residual add" in test.find("failure").text


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seeds=12", "seeds=7", "small: seeds=7: gate theory needs at least 8"),
        ("length=8", "length=300", "small: gate theory: there is no prediction: theory takes"),
        ("engine=weightless", "engine=theory", "engine=theory: gate theory needs curves that are"),
        (
            "norm=peri, init.std=0.1",
            "norm=none, init.std=0.5",
            "there is no prediction: from sublayer",
        ),
        (
            "norm=peri",
            "gradients=true, model.tied=true",
            "gate theory: gradients=true: there is no",
        ),
        ("model=small", "source=demo", "small: "),
    ],
)
def test_what_theory_cannot_say(case, old, new, said):
    case.write_text(CASE.replace(old, new))
    status, out, err = command()
    assert (status, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1
