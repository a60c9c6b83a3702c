"""+experiment=families: checkpoints of several model types, each beside its own random inits."""

import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from conftest import in_process, write_olmo
from family_table import write_family
from rich.console import Console
from rich.markdown import Markdown
from safetensors.torch import load_file, save_file

from simlab.report.console import show_sweep
from simlab.report.families import Survey, Surveyed, survey, told_apart
from simlab.report.families_figure import families_figure
from simlab.report.families_text import line, survey_table
from simlab.report.swept import SweptJob, around_text

TEXT = "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG"  # of ids below 91, as bytes
LABELS = ["native", "streamed"]


@pytest.fixture(scope="module")
def swept(one_thread, tmp_path_factory):
    """A native checkpoint with massive activations, a streamed one, and one that can't be read."""
    cwd = tmp_path_factory.mktemp("families")
    write_olmo(cwd / "native", "Llama", vocab_size=97)
    file = cwd / "native" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.2.mlp.down_proj.weight"][7] *= 1e5  # channel 7, from block 3 on
    save_file(weights, file, {"format": "pt"})
    write_family(cwd / "streamed", "cohere2")
    (cwd / "empty").mkdir()
    paths = ",".join([*LABELS, "empty"])
    done = in_process(
        "+experiment=families", f"source.path={paths}", f"inputs.prompt='{TEXT}'", "inputs.batch=2",
        "inputs.length=16", "device=cpu", "hydra.sweep.dir=out", cwd=cwd,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    (cwd / "stdout").write_text(done.stdout)
    return cwd


def of_job(swept, number):
    folder = swept / "out" / str(number)
    return pd.read_csv(folder / "curve.csv"), json.loads((folder / "summary.json").read_text())


def grown(rows, column="mean_square"):
    """The mean over seeds after the last block over that after the first."""
    ends = rows.groupby(["block", "sublayer"])[column].mean().groupby("block").last()
    return ends.iloc[-1] / ends.iloc[0]


def times(value):
    """A factor as tables have it: three digits, or 1.2e5."""
    return f"×{value:.1e}".replace("e+0", "e") if value >= 9999.5 else f"×{value:.3g}"


def test_numbers(swept):
    """Every number of families.csv anew from the jobs' curves."""
    table = pd.read_csv(swept / "out" / "families.csv")
    assert table["checkpoint"].tolist() == LABELS
    assert table["model_type"].tolist() == ["llama", "cohere2"]
    assert table["read"].tolist() == ["native, float32", "streamed, float32"]
    assert table["depth"].tolist() == [5, 3]
    for number, row in table.iterrows():
        frame, summary = of_job(swept, number)
        own, drawn = (frame[frame["curve"] == name] for name in ("checkpoint", "random"))
        assert drawn["seed"].nunique() == row["seeds"] == 8
        assert row["growth_random"] == pytest.approx(grown(drawn))
        assert row["growth_trained"] == pytest.approx(grown(own))
        assert row["growth_median"] == pytest.approx(grown(own, "mean_square_median"))
        ratio = own["mean_square"].iloc[-1] / drawn.groupby("seed")["mean_square"].last().mean()
        assert row["ratio"] == pytest.approx(ratio)
        assert row["leaves_sublayer"] == summary["departure"]["sublayer"] == 0
        assert (row["leaves_block"], row["ratio_of"]) == (0, "mean")
    native, streamed = table.iloc[0], table.iloc[1]
    frame, summary = of_job(swept, 0)
    drawn, own = (frame[frame["curve"] == name] for name in ("random", "checkpoint"))
    assert native["growth_theory"] == pytest.approx(grown(drawn, "law_mean_field"))
    assert native["theory_error"] == summary["theories"]["random"]["mean_field"]["log_error"]
    assert pd.isna(streamed["growth_theory"])
    assert pd.isna(streamed["theory"])
    among = own[own["massive"] == 1]
    assert (among["block"].iloc[0] + 1, native["massive_from"], native["massive_to"]) == (3, 3, 5)
    assert native["massive_steps"] == len(among)
    assert native["max_abs"] == among["max_abs"].max()
    assert (streamed["massive_steps"], pd.isna(streamed["massive_from"])) == (0, True)


def test_text(swept):
    """The answer's table and sentences, and on the screen why the third isn't there."""
    answer = (swept / "out" / "answer.md").read_text()
    table = pd.read_csv(swept / "out" / "families.csv")
    rows = [part.strip("| ").split(" | ") for part in answer.splitlines() if part[:2] == "| "][2:]
    assert [row[0] for row in rows] == LABELS
    for row, (_, numbers) in zip(rows, table.iterrows(), strict=True):
        shown = [times(numbers[f"growth_{name}"]) for name in ("random", "trained", "median")]
        assert [row[4], row[6], row[7]] == shown
        assert row[8] == "start"
    assert rows[0][9].startswith("blocks 3–5, ×")
    assert (rows[1][5], rows[1][9]) == ("–", "none")
    assert "2 × 16 bytes of the text, for want of a tokenizer." in answer
    assert "**Together:** Both checkpoints end outside their random inits' band; 1 of 2" in answer
    assert "theory has no formula for transformers' cohere2" in answer
    why = "holds no checkpoint: no config.json"
    assert f"**Missing here:** empty ({swept / 'empty'}: {why}" in answer
    screen = " ".join((swept / "stdout").read_text().split())
    assert f"Not measured: {swept / 'empty'}: {why}" in screen.replace("- ", "-")
    assert screen.count(times(table["growth_trained"][0])) == 1  # the answer's table is left out
    page = (swept / "out" / "report.html").read_text()
    assert "Both checkpoints end outside their random inits" in page


def test_page(swept):
    """Jobs have the names of families.csv; facts and config are all jobs' or say whose they are."""
    page = (swept / "out" / "report.html").read_text()
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.S)[1])
    assert [job["label"] for job in data["jobs"]] == LABELS
    assert [job["sublayers"] for job in data["jobs"]] == [10, 3]  # attention and MLP in parallel
    summaries = [of_job(swept, number)[1] for number in (0, 1)]
    facts = dict(data["facts"])
    counts = [f"{each['parameters']:,}" for each in summaries]
    assert facts["parameters"] == f"native: {counts[0]}\nstreamed: {counts[1]}"
    assert facts["seeds"] == "0, 1, 2, 3, 4, 5, 6, 7"
    config = json.loads(data["config"])
    assert (config["all jobs"]["model"]["vocab_size"], config["all jobs"]["seed"]) == (97, 0)
    for summary, own in zip(summaries, config["by job"], strict=True):
        assert merged(config["all jobs"], own) == summary["config"] | {"job": own["job"]}


def merged(one, other):
    """Two nested dicts that share no value, in one."""
    both = one.keys() & other.keys()
    return one | other | {key: merged(one[key], other[key]) for key in both}


def jobs_of(swept, *numbers):
    frames = (of_job(swept, number) for number in numbers)
    return [SweptJob({"source.path": "x"}, "", frame, summary) for frame, summary in frames]


def test_figure(swept):
    """Each checkpoint's median token, its inits' band and theory, over these inits' embedding."""
    found = survey(jobs_of(swept, 0, 1))
    growth, ratio, _ = families_figure(found.members, line(found)).axes
    solid = [each for each in growth.lines if each.get_linewidth() == 2.2]
    assert [text.get_text() for text in growth.texts if text.get_weight() == "bold"] != []
    for number, drawn in enumerate(solid):
        frame, _ = of_job(swept, number)
        own, inits = (frame[frame["curve"] == name] for name in ("checkpoint", "random"))
        unit = inits.loc[inits["sublayer"] == 0, "mean_square"].mean()
        np.testing.assert_allclose(drawn.get_ydata(), own["mean_square_median"] / unit)
        np.testing.assert_allclose(drawn.get_xdata(), own["sublayer"] / own["sublayer"].max())
        band = growth.collections[number].get_paths()[0].vertices[:, 1]
        most = inits.groupby("sublayer")["mean_square"].max() / unit
        assert band.max() == pytest.approx(most.max())
    assert len(solid) == len(growth.collections) == 2
    assert len([each for each in growth.lines if each.get_linewidth() == 1.3]) == 2
    assert [each.get_xdata()[0] for each in ratio.lines if each.get_marker() == "o"] == [0, 0]


def shown(table, width):
    out = io.StringIO()
    Console(width=width, file=out).print(table)
    return out.getvalue()


@pytest.mark.parametrize(("width", "left_out"), [(80, ""), (56, "theory"), (46, "median token")])
def test_narrow(swept, width, left_out):
    """No line is wider than the terminal, no number is cut, and what is left out is said."""
    found = survey(jobs_of(swept, 0, 1))
    text = shown(survey_table(found, width), width)
    assert max(map(len, text.splitlines())) <= width
    for row in found.records:
        for name in ("random", "trained"):
            assert times(row[f"growth_{name}"]) in text
    assert ("No room for" in text) == bool(left_out)
    assert left_out in " ".join(text.split())


def test_labels():
    assert told_apart(["a/m", "b/n.gguf", "org/name"], [None] * 3) == ["m", "n", "name"]
    assert told_apart(["a/m", "b/m/"], [None] * 2) == ["a/m", "b/m"]
    assert told_apart(["o/m", "o/m"], ["r", "s"]) == ["m@r", "m@s"]
    assert told_apart(["m", "m"], [None] * 2) == ["m (0)", "m (1)"]


def test_special_tokens_are_no_tags():
    """Markdown takes <s> for HTML and leaves it out."""
    console = Console(width=60, file=io.StringIO())
    console.print(Markdown(f"text{around_text({'special_tokens': '<s> first'})}."))
    assert console.file.getvalue().strip() == "text with <s> first."
    assert around_text({}) == ""


def test_sentence_of_several():
    def of(*rows):
        table = pd.DataFrame(rows, columns=["checkpoint", "ratio", "leaves_block", "massive_steps"])
        return line(Survey([], table, []))

    stays = ("a", 1.0, None, 0)
    assert (
        of(stays)
        == "The checkpoint ends within its random inits' band and has no massive activations."
    )
    left = ("b", 2.0, 3.0, 1)
    assert of(stays, left) == (
        "1 of 2 checkpoints ends outside its random inits' band (b); 1 of 2 checkpoints has massive "
        "activations (b)."
    )
    assert of(left, left, left).startswith(
        "All 3 checkpoints end outside their random inits' band;"
    )
    unknown = ("c", None, None, 0)
    assert of(unknown, unknown) == "None of 2 checkpoints has massive activations."


def test_what_failed_is_copied_whole(swept, monkeypatch, capsys):
    """A path or a command that is longer than the terminal is on one line."""
    monkeypatch.setenv("COLUMNS", "60")
    path, call = f"{'long/' * 20}m.gguf", f"AutoTokenizer.from_pretrained({'DIR' * 20})"
    failed = SweptJob({"source.path": path}, f"{path}: a text needs the tokenizer: {call} [a]")
    show_sweep("t", pd.DataFrame(), {}, {}, {}, [], 0, [], "", survey([*jobs_of(swept, 0), failed]))
    lines = capsys.readouterr().out.splitlines()
    assert any(path in line for line in lines)
    assert any(call in line for line in lines)
    assert any("a text needs the tokenizer" in line and len(line) <= 60 for line in lines)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ([], "source.path is missing: give a checkpoint folder"),
        (["source.path=nowhere"], "source.path=nowhere: no such folder"),
        (["source.path=empty,nowhere"], "source.path=nowhere: no such folder"),
        (["source.path=empty,other"], "empty: holds no checkpoint"),
    ],
)
def test_mistakes(tmp_path, path, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    done = in_process("+experiment=families", *path, "device=cpu", cwd=tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert said in done.stderr
    assert {each.name for each in tmp_path.iterdir()} == {"empty", "other"}


def test_overflow_and_no_inits(swept):
    """A checkpoint alone whose curve ends after block 2: nothing is said of random inits."""
    frame, summary = of_job(swept, 1)
    frame = frame[(frame["curve"] == "checkpoint") & (frame["sublayer"] <= 2)].assign(
        outside=np.nan
    )
    one = Surveyed("m", frame.reset_index(drop=True), summary)
    row = one.row()
    assert one.inits == ""
    assert row["growth_trained"] == pytest.approx(grown(frame))
    assert pd.isna(row["growth_random"])
    assert row["ratio"] is None
