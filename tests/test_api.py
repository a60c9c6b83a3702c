"""simlab from Python: the same runs, names and files as the command's."""

import json
import re
from dataclasses import replace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import in_process, tiny
from matplotlib.figure import Figure
from omegaconf import OmegaConf

import simlab
from simlab.analysis.numbers import short
from simlab.config.overrides import as_overrides
from simlab.experiment import build_model
from simlab.results import small

matplotlib.use("agg")
KEYS = {
    "depth": 3,
    "width": 48,
    "heads": 6,
    "kv_heads": 2,
    "d_ff": 80,
    "vocab_size": 97,
    "device": "cpu",
}
SMALL = [f"{key}={value}" for key, value in KEYS.items()]


@pytest.fixture(scope="module")
def result():
    return simlab.measure("small", {"inputs.length": 11}, **KEYS, seeds=4, norm="swin_renorm")


@pytest.fixture(scope="module")
def renormed():
    """One re-norm, after the second of three blocks."""
    more = {"inputs.length": 11, "norm.every": 2}
    return simlab.measure("small", more, **KEYS, seeds=4, norm="swin_renorm")


def test_measures_as_the_command_does(result, tmp_path):
    """Same curve, same summary, same bytes in every file but the page's day."""
    done = in_process("model=small", "inputs.length=11", *SMALL, "seeds=4", "norm=swin_renorm",
                      "hydra.run.dir=command", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    saved = result.save(tmp_path / "saved")
    names = sorted(p.name for p in saved.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "command").iterdir() if p.name != ".hydra")
    for name in names:
        assert (saved / name).read_bytes() == (tmp_path / "command" / name).read_bytes(), name
    assert result.command in (saved / "report.html").read_text(encoding="utf-8")
    again = simlab.load_run(tmp_path / "command")
    assert isinstance(simlab.load(tmp_path / "command"), simlab.Result)
    with pytest.raises(
        simlab.ConfigError, match=r"holds no sweep: .*; simlab.load_run reads a run"
    ):
        simlab.load_sweep(tmp_path / "command")
    pd.testing.assert_frame_equal(again.curves, result.curves, check_dtype=False)
    assert again.command == result.command
    assert again.verdict == result.verdict
    assert all(part in " ".join(done.stdout.split()) for part in result.verdict.split("\n"))


def test_shows_itself(result):
    assert repr(result).count("\n") == 1
    assert len(repr(result)) < 300
    html = result._repr_html_()
    assert result.headline.replace("'", "&#x27;") in html
    assert "<img" in html
    assert "<table" in html
    assert result.table().loc[3, "random"] == pytest.approx(
        result.curves[result.curves["sublayer"] == 6]["mean_square"].mean()
    )
    theory = result.theory
    assert list(theory.columns[:3]) == ["sublayer", "kind", "block"]
    first = result.curves[result.curves["seed"] == 0]
    np.testing.assert_allclose(theory["mean_field"], first["law_mean_field"])


@pytest.mark.parametrize("quantity", ["mean_square", "rms", "norm", "token_cosine", "max_abs"])
def test_plot(result, quantity):
    """The line is the seeds' mean, the band their range, on the axes that were given."""
    ax = Figure().subplots()
    assert result.plot(quantity, ax=ax, laws=False) is ax
    rows = result.curves.assign(rms=np.sqrt(result.curves["mean_square"]))
    mean = rows.groupby("sublayer")[quantity].mean()
    (line,) = ax.get_lines()
    np.testing.assert_allclose(line.get_ydata(), mean[np.isfinite(mean)])
    top = ax.collections[0].get_datalim(ax.transData).y1
    assert top == pytest.approx(rows[quantity].max())
    assert (ax.get_yscale() == "log") == (quantity == "max_abs")


def test_laws_in_a_plot(result):
    def labels(**options):
        return [line.get_label() for line in result.plot("rms", **options).get_lines()][1:]

    assert labels() == ["additive law", "√2 per sublayer", "theory (mean field)"]
    assert labels(laws=["additive"]) == ["additive law"]
    line = result.plot("rms", laws=["additive"]).get_lines()[1]
    np.testing.assert_allclose(line.get_ydata() ** 2, result.theory["additive"], rtol=1e-6)
    plt.close("all")
    for column, said in (
        ("nrom", "; did you mean norm?"),
        ("branch", "; did you mean branch_mean_square?"),
        ("lambda_token", "; a run's λ's are in .summary['lambda'], by curve"),
        ("gradient_rms", "; measure with gradients=True"),
        ("foo", "; there are mean_square, norm, variance, mean, mean_abs, median_abs, max_abs,"),
    ):
        with pytest.raises(simlab.ConfigError, match=f"no column {column}{re.escape(said)}") as e:
            result.plot(column)
        assert len(str(e.value)) < 160


def test_a_re_norm(renormed):
    """√2 per sublayer is drawn once, the table has the peak, and one fall is no "each"."""
    rows = renormed.curves.groupby(["sublayer", "kind"])["mean_square"].mean()
    peak = rows[4, "mlp"]
    until = renormed.theory["sqrt2"].where(renormed.theory.index < 5)
    ax = renormed.plot(ax=Figure().subplots())
    assert ax.get_ylim()[1] > 1.4 * rows.max()  # room for the legend, which would hide √2's line
    (law,) = (each for each in ax.get_lines()
              if each.get_label() == "√2 per sublayer, until the first re-norm")  # fmt: skip
    np.testing.assert_allclose(law.get_ydata(), until)
    assert until.notna().sum() == 5
    data = re.search(r'id="data"[^>]*>(.*?)</script>', renormed.page(), flags=re.S)[1]
    (law,) = (each for each in json.loads(data)["jobs"][0]["laws"] if each["key"] == "sqrt2")
    np.testing.assert_allclose(np.array(law["mean"]["mean_square"], float), until, rtol=1e-4)
    assert law["label"].endswith(", until the first re-norm")
    table = renormed.table()
    assert table["after"].tolist() == ["mlp", "mlp", "renorm", "mlp"]
    np.testing.assert_allclose(table.loc[2, "random"], [peak, rows[4, "renorm"]])
    assert f"<td>{short(peak)}</td>" in renormed._repr_html_()
    assert f"a re-norm sets it back to 1 once, from a peak of {short(peak)}." in renormed.headline
    assert f"a re-norm sets it back to 1 once, from a peak of {short(peak)}" in renormed.verdict


def test_a_deep_ones_small_table_shows_peaks():
    frame = pd.DataFrame({"curve": "random", "seed": 0, "sublayer": range(81)})
    frame["block"], frame["kind"] = (frame["sublayer"] + 1) // 2 - 1, "mlp"
    frame.loc[0, "block"] = np.nan
    frame["mean_square"] = [
        1.0 + (i - 1) % 20 for i in range(81)
    ]  # set back within blocks 11, 21 …
    run = simlab.Result(frame, {})
    assert run.table().loc[11, "random"].tolist() == [1.0, 2.0]
    assert run.table().loc[10, "random"] == 20
    assert small(run.table(), "random")["random"].tolist().count(20) == 4
    assert len(small(run.table(), "random")) <= 12


def test_a_folder_that_cant_be_made(result, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "below"):
        with pytest.raises(simlab.ConfigError, match=f"^save: {folder}: [A-Z][a-z ]+$"):
            result.save(folder)


def test_a_probes_rows_are_plotted():
    config = tiny()
    model, ids = build_model(config), torch.randint(97, (2, 7))
    rows = simlab.probe(model, ids).rows()
    ax = simlab.plot(rows, "norm", ax=Figure().subplots())
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), rows["norm"])
    assert ax.get_xlabel().endswith("a block has two)")
    attention = rows[rows["kind"] != "mlp"]  # a model whose blocks have one sublayer each
    assert "two" not in simlab.plot(attention, "norm", ax=Figure().subplots()).get_xlabel()


def test_compare(result):
    other = simlab.measure("small", {"inputs.length": 11}, **KEYS, seeds=4, norm="pre")
    both = simlab.compare(result, other)
    assert repr(both).startswith("norm=swin_renorm: At init")
    assert list(both.table.index) == [("norm=swin_renorm", "random"), ("norm=pre", "random")]
    ax = both.plot("norm", ax=Figure().subplots())
    assert [line.get_label().split(" (")[0] for line in ax.get_lines()] == [
        "norm=swin_renorm",
        "norm=pre",
    ]
    assert "<img" in both._repr_html_()
    plain = simlab.measure("small", {"inputs.length": 11}, **KEYS, seeds=4)
    assert list(simlab.compare(plain, other).headlines) == ["norm reordered", "norm pre"]
    twice = simlab.compare(result, result)
    assert len(twice.headlines) == 2
    for runs, labels in (((), None), ((result, other), ["a"]), ((result, other), ["a", "a"])):
        with pytest.raises(simlab.ConfigError, match="compare: "):
            simlab.compare(*runs, labels=labels)


def test_multirun(tmp_path, monkeypatch, capfd, no_figures):
    """A sweep as the command's, whose kept results the next one uses; a failed job is told."""
    monkeypatch.chdir(tmp_path)
    values = {"depth": [2, 3], "init.std": [0.01, 0.02]}
    keys = {**KEYS, "seeds": 2}
    del keys["depth"]
    sweep = simlab.multirun(values, "small", folder="here", **keys)
    assert sweep.table.groupby(["depth", "init.std"]).size().tolist() == [1] * 4
    assert len(sweep.frame) == 2 * (2 * 5 + 2 * 7)
    assert sweep.job(2).summary["config"]["model"]["depth"] == 3
    with pytest.raises(
        simlab.ConfigError, match="job 4: not a finished job of here; there are 0, 1, 2, 3"
    ):
        sweep.job(4)
    assert "4 jobs" in repr(sweep)
    labels = [line.get_label() for line in sweep.plot(ax=Figure().subplots()).get_lines()]
    assert labels[0].startswith("depth 2, init.std 0.01")
    kept = sorted((tmp_path / "outputs" / "results").iterdir())
    (tmp_path / "here" / "sweep.parquet").unlink()
    (tmp_path / "here" / "3" / "job.json").write_text(
        json.dumps({"status": "failed", "error": "no luck"})
    )
    with pytest.raises(simlab.ConfigError, match=r"^plot: no job of here has ended"):
        replace(sweep, frame=pd.DataFrame()).plot()
    again = simlab.load_sweep("here")
    assert simlab.load("here").failed == again.failed
    with pytest.raises(
        simlab.ConfigError, match=r"^here: holds a sweep; simlab.load_sweep reads it"
    ):
        simlab.load_run("here")
    assert again.failed == {3: "no luck"}
    assert len(kept) == 4
    capfd.readouterr()
    with pytest.raises(simlab.ConfigError, match=r"^depth=0: allowed: an integer"):
        simlab.multirun({"depth": [2, 0]}, "small", folder="there")
    assert capfd.readouterr().err == ""
    for bad in ("8,16", 8, []):
        with pytest.raises(simlab.ConfigError, match="give a list of values"):
            simlab.multirun({"depth": bad})


def test_mistaken_arguments(result):
    for call, said in (
        (lambda: result.plot("kind"), "kind is a column of texts"),
        (lambda: result.plot(3), "no column 3"),
        (lambda: result.plot(laws=["addtive"]), "did you mean additive?"),
        (lambda: simlab.plot(result), "give a DataFrame"),
        (lambda: simlab.compare([result, result]), "an argument of its own"),
        (lambda: simlab.multirun(["depth"]), "lists of values by key"),
        (lambda: simlab.multirun({}), "lists of values by key"),
        (lambda: simlab.multirun({"depth": [1]}, more="seed=1"), "in a dict"),
        (
            lambda: simlab.measure("small", "init.std=0.01"),
            "'init.std=0.01': give keys with a dot in a dict",
        ),
        (lambda: simlab.measure("small", dry_run=True), "dry_run: of the command"),
        (lambda: simlab.measure("small", hydra={"job": {"name": "a"}}), "hydra: of the command"),
        (lambda: simlab.multirun({"depth": [1]}, dry_run=True), "dry_run: of the command"),
        (lambda: simlab.load(__file__), "is a file; give its folder"),
    ):
        with pytest.raises(simlab.ConfigError) as error:
            call()
        assert said in str(error.value)
    alone = result.plot("rms", laws="additive").get_lines()
    assert [line.get_label() for line in alone][1:] == ["additive law"]
    plt.close("all")


def test_mistakes(tmp_path):
    for keys, said in (
        ({"depht": 3}, "depht=3: no such key; did you mean depth?"),
        ({"norm": "swinrenorm"}, "did you mean swin_renorm?"),
        ({"depth": object()}, "allowed: numbers, texts"),
        ({"init": {"sdt": 1}}, "init.sdt"),
    ):
        with pytest.raises(simlab.ConfigError) as error:
            simlab.measure("small", **keys)
        assert said in str(error.value)
        assert "\n" not in str(error.value)
    for folder, said in (
        (tmp_path / "no", "no such folder"),
        (tmp_path, "no finished run or sweep"),
    ):
        with pytest.raises(simlab.ConfigError, match=said):
            simlab.load(folder)
    with pytest.raises(simlab.ConfigError, match="no such folder"):
        simlab.load_sweep(tmp_path / "no")


VALUES = [
    None, True, 3, 0.02, 1e-5, "pre", "a/b.txt", "a b", "it's", "back\\slash\\", "a,b", "{x}", "x=y",
    "ü", "", "1e5", "true", [1, 2], ["a b", "c"], np.int64(3), np.float64(0.5), "a'\\'b", "#x", "$y",
    "a: b", "10:30",
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_arrive_as_they_are(value):
    """Whatever a Python value is, Hydra's parser reads the same."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (text,) = as_overrides({"key": value})
    got = OverridesParser.create().parse_override(text).value()
    got = OmegaConf.to_container(OmegaConf.create({"key": got}))["key"]
    assert got == value
    assert type(got) is type(value) or isinstance(value, np.generic)
