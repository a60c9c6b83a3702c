"""engine=theory: the predicted curve in place of random inits."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import STANDARD_ERRORS, in_process, tiny

from simlab import compose
from simlab.budget import predicted
from simlab.config import ConfigError
from simlab.experiment import measure, prepare, run
from simlab.report.growth_figure import growth_figure
from simlab.theory.mean_field import predict

WIDE = ["width=128", "heads=4", "kv_heads=2", "d_ff=256", "init.std=0.05"]


@pytest.fixture(scope="module")
def both():
    """The predicted curve, and measured ones of the same config."""
    overrides = [*WIDE, "norm=swin_renorm", "norm.every=2", "gradients=true", "seed=3"]
    predicted, measured = ["engine=theory"], ["engine=weightless", "seeds=60"]
    return tuple(run(tiny(*overrides, *engine)) for engine in (predicted, measured))


def test_rows_are_the_prediction(both):
    result, measured = both
    frame, config = result.curve, result.config
    assert (config.seeds, set(frame["curve"]), set(frame["seed"])) == ((3,), {"theory"}, {3})
    ids = prepare(config).tokens
    theory = pd.DataFrame(map(vars, predict(config.shape, config.init, ids, gradients=True).rows))
    keys = ["sublayer", "block", "kind"]
    first = measured.curve[measured.curve["seed"] == 3].reset_index(drop=True)
    pd.testing.assert_frame_equal(frame[keys], first[keys])
    for column in theory.columns.drop(keys):
        name = "band_mean_field" if column == "band" else column
        np.testing.assert_array_equal(frame[name], theory[column], err_msg=name)
    assert frame["law_mean_field"].isna().all()  # the curve is that law
    assert set(frame) <= set(measured.curve)


def test_the_figure_shows_the_predicted_band(both):
    """Mean ± 2 std of seeds."""
    frame = both[0].curve
    low, high = (frame["mean_square"] + sign * 2 * frame["band_mean_field"] for sign in (-1, 1))
    (band,) = growth_figure(frame, "", []).axes[0].collections
    edges = np.concatenate([low, high])[:, None]
    assert np.isclose(edges, band.get_paths()[0].vertices[:, 1], rtol=1e-9).any(1).all()


@pytest.mark.parametrize("column", ["variance", "law_additive"])
def test_derived_columns_are_the_measured_means(both, column):
    """Up to chance and 1 %, the prediction's own error at width 128 (docs/theory.md)."""
    theory, rows = both[0].curve[column], both[1].curve.groupby(["sublayer", "kind"], sort=False)
    mean, error = rows[column].mean().to_numpy(), rows[column].sem().to_numpy()
    assert (np.abs(theory - mean) < 0.01 * mean + STANDARD_ERRORS * error).all()


def test_summary_of_a_prediction(both):
    summary, frame = both[0].summary, both[0].curve
    assert (summary["engine"], summary["engines"]) == ("theory", {"theory": "theory"})
    assert {*summary["verdict"], *summary["lambda"], *summary["theories"]} == {"theory"}
    ends = frame.groupby("block").tail(1)["norm"].to_numpy()
    growth = np.log(ends[-1] / ends[0]) / 3
    assert summary["lambda"]["theory"]["lambda_token"]["value"] == pytest.approx(growth)
    sentence = summary["verdict"]["theory"]["sentence"]
    assert "Predicted, not measured" in sentence
    assert (
        "the additive law gives the same to" in sentence
    )  # no test was made that it could hold by
    assert "holds" not in sentence
    assert summary["loss"] == {}


def test_where_a_prediction_ends():
    result = run(tiny("engine=theory", "norm=none", "init=fan_in", "depth=40"))
    sublayers = result.curve["sublayer"]
    sentence = result.summary["verdict"]["theory"]["sentence"]
    assert 0 < sublayers.max() < 80
    assert f"from sublayer {sublayers.max() + 1} on" in sentence
    assert result.summary["mean_field"]["ends"] in sentence


def test_what_theory_cant_predict_is_one_line(tmp_path, monkeypatch):
    done = in_process("engine=theory", "model=small", "inputs.length=513", cwd=tmp_path)
    says = (
        "engine=theory: theory takes batches of at most 512 tokens; this one has 513 (inputs.batch "
    )
    says += "and inputs.length make it smaller)"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"simlab: {says}\n")
    monkeypatch.setattr(predicted, "available", lambda _: 100 << 20)
    with pytest.raises(
        ConfigError, match=r"depth=3 inputs\.batch=2 inputs\.length=11: needs about"
    ):
        prepare(tiny("engine=theory"))


def test_theory_beside_a_checkpoint(tmp_path, figure_names):
    """The demo is measured as ever; the predicted curve has one row per step and its own name."""
    done = in_process(
        "source=demo", "engine=theory", "inputs.length=32", "device=cpu", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "the checkpoint and the predicted curve of random inits" in done.stdout
    assert "for random inits; always dense for a checkpoint" in " ".join(done.stdout.split())
    (path,) = tmp_path.glob("outputs/*/*/curve.csv")
    counts = pd.read_csv(path)["curve"].value_counts()
    assert counts["checkpoint"] == counts["theory"]
    assert {"growth", "lambda", "inside"} <= set(figure_names)


def test_a_checkpoint_outside_the_prediction():
    """The demo before its training is a random init; after, it leaves their band."""
    says = {}
    for step in ("0", "final"):
        asked = ["source=demo", f"source.step={step}", "engine=theory", "inputs.length=32"]
        says[step] = run(compose([*asked, "inputs.batch=1", "device=cpu"])).summary["comparison"][0]
    assert says["0"] == "The checkpoint stays within the random inits' predicted band."
    assert "leaves the random inits' predicted band at sublayer" in says["final"]


def test_sweep_of_theory_and_simulation(tmp_path, figure_names):
    """Both curves in one report; the predicted one is kept by its hash and used again."""
    swept = ["-m", "engine=theory,weightless", "depth=1,2", "hydra.sweep.dir=sweep"]
    model = ["model=small", *WIDE[:-1], "inputs.length=8", "seeds=2", "device=cpu"]
    for _ in range(2):
        done = in_process(*swept, *model, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    jobs = pd.read_csv(tmp_path / "sweep" / "jobs.csv")
    assert jobs["curve"].tolist() == ["theory"] * 2 + ["random"] * 2
    means = jobs["mean_square"].to_numpy().reshape(2, 2)
    np.testing.assert_allclose(*means, rtol=0.2)  # two seeds
    assert "growth" in figure_names
    summary = json.loads((tmp_path / "sweep" / "0" / "summary.json").read_text())
    assert summary["engine"] == "theory"
    assert len(list((tmp_path / "outputs" / "results").iterdir())) == 4


def test_dry_run_of_theory(tmp_path):
    done = in_process("-m", "engine=theory", "depth=1,2", "dry_run=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" theory ") == 2
    assert prepare(tiny("engine=theory")).estimate[1] > 0


def test_an_estimate_counts_the_prediction_beside_simulated_runs(monkeypatch):
    """Which there is for up to 512 tokens of random inits."""
    monkeypatch.setattr("simlab.budget.cost.seconds", lambda *_: 100.0)
    of = {}
    for gradients in ("false", "true"):
        ready = prepare(tiny("seeds=2", f"gradients={gradients}"))
        of[gradients] = predicted.prediction_cost(ready.config)[1]
        assert ready.estimate[1] == 100 + of[gradients]
    assert 0 < of["false"] < of["true"]
    assert prepare(tiny("inputs.batch=1", "inputs.length=513")).estimate[1] == 100


@pytest.mark.parametrize("gradients", ["false", "true"])
def test_progress_of_a_prediction(gradients):
    """A block of the curve, of its band and of the gradient each; none where nothing is predicted."""
    asked = ["norm=swin_renorm", "norm.every=2", "depth=4", f"gradients={gradients}"]
    for engine in ("theory", "dense"):
        ready, done = prepare(tiny(*asked, f"engine={engine}")), []
        measure(ready, lambda done=done: done.append(None))
        passes = (2 if gradients == "false" else 3) + (engine == "dense") * (
            1 + (gradients == "true")
        )
        assert len(done) == ready.blocks == 4 * passes
    assert prepare(tiny("inputs.batch=1", "inputs.length=513", "depth=4")).blocks == 4
