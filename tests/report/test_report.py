"""The table fits 80 columns, the figure shows what it should and is the same twice."""

import dataclasses
import io
import re

import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import tiny
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console

from simlab.analysis import LAWS
from simlab.analysis.exponents import per_block
from simlab.config import CONF_DIR
from simlab.config.preset import changed
from simlab.config.title import title
from simlab.config.validate import compose
from simlab.experiment import run
from simlab.report.console import (
    _indented,
    headlines,
    overflow_lines,
    show_tables,
    show_verdict,
    verdict_lines,
)  # fmt: skip
from simlab.report.figure import lambda_figure
from simlab.report.growth_figure import growth_figure
from simlab.report.panels import plain
from simlab.report.style import finish, save, subplots
from simlab.report.table import (
    beside_table,
    block_table,
    fallen,
    growth_table,
    lambda_table,
    shown_rows,
)

matplotlib.use("Agg")


def lines_of(table):
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text().splitlines()


def test_title_says_what_differs_from_the_preset():
    shape = title(compose(["model=olmo2_7b", "norm=pre"]))
    assert shape.startswith("olmo2_7b: depth 32, width 4096, norm pre, init ")
    other = title(compose(["model=olmo2_7b", "norm=pre", "depth=64", "model.qk_norm=none"]))
    assert other.startswith("olmo2_7b with depth 64, qk_norm none, norm pre, init ")
    presets = [path.stem for path in (CONF_DIR / "model").glob("olmo*.yaml")]
    assert len(presets) > 4
    for name in presets:
        assert changed(compose([f"model={name}"]).shape) == {}
    wide = compose(["model=olmo2_32b", "width=8192", "model.head_dim=64", "vocab_size=50"]).shape
    assert changed(wide) == {"width": 8192, "head_dim": 64, "vocab_size": 50}
    assert changed(dataclasses.replace(wide, name="custom")) == {}
    many = compose(["model=small", "heads=16", "model.bias=true"]).shape  # kv_heads follow heads
    assert changed(many) == {"heads": 16, "bias": True}
    assert title(compose(["model=small", "model.bias=true"])).startswith("small with bias true, ")


TITLES = {
    "norm=derf": "norm derf, ", "norm=dyt norm.placement=post": "norm post dyt, ",
    "norm=dyt norm.mlp_alpha=0.7": "norm dyt mlp_alpha 0.7, ", "norm=minimax": "norm minimax, ",
    "norm=scaled norm.ramp=0.25": "norm scaled ramp 0.25, ", "norm=hy_v4": "norm hy_v4, ",
    "norm=mhc norm.streams=2": "norm mhc streams 2, ", "norm=scaled": "norm scaled, ",
    "norm=attn_res norm.block_size=24": "norm kimi_k3, ",
    "norm=swin_renorm": "norm swin_renorm every 6, ",
    "norm=custom": "norm custom update x + F(N(x)), ",
}  # fmt: skip


@pytest.mark.parametrize("overrides", TITLES)
def test_title_names_the_norm_as_the_command_does(overrides):
    assert TITLES[overrides] in title(compose(["model=small", *overrides.split()]))


@pytest.mark.parametrize("depth", [1, 4, 60])
@pytest.mark.parametrize("norm", ["reordered", "swin_renorm"])
def test_table(depth, norm):
    """60 blocks are more than its rows."""
    frame = run(tiny(f"depth={depth}", f"norm={norm}", "seeds=2")).curve
    lines = lines_of(growth_table(frame, "random"))
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 36
    assert "mean square" in lines[0]
    if norm == "reordered":  # the last block is always shown
        assert lines[-1].split()[:2] == [str(depth), "mlp"]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_narrow_terminals_lose_columns_not_digits(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    result = run(tiny("depth=8", "seeds=8", "gradients=true"))
    show_tables(result.curve, result.verdicts, result.summary)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= max(width, 40)
    assert "…" not in "".join(lines)
    ends = result.curve[result.curve["sublayer"] == 16]["mean_square"].mean()
    assert f"{ends:.4g}" in lines[-1].split()
    assert ("± seeds" in lines[0], "√2 law" in lines[0]) == (width > 60, width > 80)
    values = [line.split() for line in lines[2:] if "embedding" not in line]
    assert len({len(row) for row in values}) == 1  # no empty column


def test_a_checkpoint_beside_random_inits_in_one_table(capsys):
    result = run(tiny("seeds=8"))
    frame = result.curve
    trained = frame[frame["seed"] == 0].assign(curve="checkpoint", mean_square=7.0)
    both = pd.concat([trained, frame], ignore_index=True)
    lines = lines_of(beside_table(both))
    assert lines[0].split() == [
        "block",
        "after",
        "checkpoint",
        "median",
        "token",
        "random",
        "init",
        "±",
        "seeds",
        "×",
        "random",
    ]
    last = frame[frame["sublayer"] == 6]["mean_square"]
    row = [float(cell) for cell in lines[-1].split()[2:]]
    assert row[0] == 7
    assert row[2:] == pytest.approx([last.mean(), last.std(), 7 / last.mean()], rel=1e-3)
    assert max(map(len, lines)) <= 80


def test_verbose_adds_lambdas(capsys):
    result = run(tiny("depth=4", "seeds=2"))
    show_tables(result.curve, result.verdicts, result.summary)
    assert "λ" not in capsys.readouterr().out
    show_tables(result.curve, result.verdicts, result.summary, verbose=True)
    out = capsys.readouterr().out
    assert "λ of the tokens' mean norm" in out
    assert "λ pairwise" in out


def saw_tooth(depth, every):
    """The rows of swin_renorm's curve by the additive law, of one seed."""
    steps = [(0, pd.NA, "embedding", 0.01)]
    for block in range(depth):
        for half, kind in enumerate(("attention", "mlp"), start=1):
            steps.append((2 * block + half, block, kind, steps[-1][3] + 1))
        if (block + 1) % every == 0:
            steps.append((2 * block + 2, block, "renorm", 1.0))
    frame = pd.DataFrame(steps, columns=["sublayer", "block", "kind", "mean_square"])
    frame["block"] = frame["block"].astype("Int64")
    return frame.assign(curve="random", seed=0, branch_mean_square=1.0)


@pytest.mark.parametrize("every", [4, 6, 8])
@pytest.mark.parametrize("depth", [32, 40, 64])
def test_tables_show_peaks_and_resets(depth, every):
    """Every peak and reset in the table of rows, at least three in that of λ by block."""
    frame = saw_tooth(depth, every)
    table = growth_table(frame, "random")
    shown = list(zip(*(column._cells for column in table.columns[:3]), strict=True))
    assert len(shown) <= 34
    resets = {str(block) for block in range(every, depth + 1, every)}
    assert {block for block, kind, v in shown if (kind, v) == ("renorm", "1")} == resets
    assert resets <= {block for block, kind, v in shown if kind == "mlp" and float(v) >= 2 * every}
    ends = frame.loc[~frame["block"].duplicated(keep="last"), "mean_square"].to_numpy()[1:]
    values = {"lambda_from_first": (np.log(ends / ends[0])[1:] / (2 * depth)).tolist()}
    blocks = list(block_table(values).columns[0]._cells)
    assert len(blocks) <= 12
    assert blocks[-1] == str(depth)
    assert len(resets & set(blocks)) >= 3


def test_rows_of_a_table():
    """The largest value is shown wherever it is; of too many falls every n-th."""
    rising = np.arange(100.0)
    assert shown_rows(rising, range(100), [], 12)[-1] == 99
    peak = np.where(rising == 37, 1e3, rising)
    assert fallen(peak) == [38]
    assert {0, 37, 38, 99} <= set(shown_rows(peak, range(100), fallen(peak), 12))
    saw = np.where(rising % 2 == 0, 1.0, 2.0 + rising)
    for most in (7, 12, 34):
        rows = shown_rows(saw, range(100), fallen(saw), most)
        assert most - 3 <= len(rows) <= most
        assert {0, 99} <= set(rows)
        assert all({i - 1, i} <= set(rows) for i in rows if i in fallen(saw))
    assert shown_rows(np.array([np.nan, np.nan]), range(2), [], 12) == [0, 1]


def test_a_verdict_is_told_in_sentences(capsys):
    """Before the tables, a sentence a line; the main ones are theory's and the growth's."""
    result = run(tiny("depth=4", "norm=swin_renorm", "norm.every=2", "seeds=8", "gradients=true"))
    show_verdict(result.verdicts, result.summary)
    show_tables(result.curve, result.verdicts, result.summary)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    table = next(i for i, line in enumerate(lines) if line.startswith("block after"))
    told = [line for line in lines[:table] if line]
    starts = [line for line in told if not line.startswith("  ")]
    sentence = result.summary["verdict"]["random"]["sentence"]
    assert " ".join(" ".join(told).split()).startswith(sentence)
    assert " %" in sentence
    assert not any("\n  %" in _indented(sentence, width) for width in range(20, 90))
    assert [start.split()[0] for start in starts[:2]] == ["The", "Mean"]
    said = result.verdicts["random"].sentences
    assert sentence == " ".join(said)
    assert all(map(str.startswith, said, starts))
    (main,) = headlines(result.verdicts, result.summary)
    assert sentence.startswith(main)
    assert "Mean square" in main
    assert "√2" not in main
    assert "gradient" not in main


def named(ax):
    """The lines' names right of a panel, and those of laws that leave it."""
    return " ".join(text.get_text() for text in ax.texts)


def test_figure_elements():
    """Names at the lines' ends, theory's band, √2 drawn once, the peak's value, axes that say log."""
    result = run(tiny("depth=8", "seeds=3", "norm=swin_renorm"))
    figure = growth_figure(result.curve, "t", ["The answer.", "More."])
    main, log, norm, variance, added = figure.axes
    assert [ax.get_yscale() for ax in figure.axes] == [
        "linear",
        "log",
        "linear",
        "linear",
        "linear",
    ]
    assert sum("log axis" in text.get_text() for text in figure.texts) == 1
    assert {"The answer.", "More.", "t"} <= {text.get_text() for text in figure.texts}
    one = result.curve[result.curve["seed"] == 0]
    mean = result.curve.groupby(["sublayer", "kind"], sort=False)["mean_square"].mean()
    for said in (
        "random init",
        "3 seeds",
        "additive law",
        "theory (mean field)",
        "√2 per sublayer",
    ):
        assert said in named(main)
    peaks = mean.to_numpy()[np.flatnonzero(one["kind"] == "renorm") - 1]
    assert f"peak {peaks.max():.3g}" in named(main)
    sqrt2 = next(line for line in main.lines if line.get_color() == LAWS["sqrt2"].colour)
    drawn = np.isfinite(np.asarray(sqrt2.get_ydata(), float))
    assert drawn.sum() == np.flatnonzero(one["kind"] == "renorm")[0]
    edges = one["law_mean_field"] - 2 * one["band_mean_field"]
    corners = np.concatenate([path.vertices for c in main.collections for path in c.get_paths()])
    assert all(np.isclose(corners[:, 1], edge).any() for edge in edges)
    panels = {"mean_square": main, "norm": norm, "variance": variance, "branch_mean_square": added}
    for column, ax in (*panels.items(), ("mean_square", log)):
        of = result.curve.groupby(["sublayer", "kind"], sort=False)[column].mean().dropna()
        heights = [np.asarray(line.get_ydata(), float) for line in ax.lines]
        assert any(len(y) == len(of) and np.allclose(y, of) for y in heights), column
        assert ax.collections  # the band
        low, high = ax.get_ylim()
        assert low <= of.min() <= of.max() <= high


def test_many_teeth_and_a_prediction_that_ends():
    """Nine re-norms: eight teeth are drawn, and a note says so. Where theory ends is said."""
    frame = run(tiny("depth=10", "seeds=2", "norm=swin_renorm", "norm.every=1")).curve
    last = frame[frame["kind"] == "renorm"]["sublayer"].unique()[7]
    frame.loc[frame["sublayer"] > 4, "law_mean_field"] = np.nan
    figure = growth_figure(frame, "t", [])
    assert figure.axes[0].get_xlim()[1] == pytest.approx(last, abs=0.5)
    (note,) = (t.get_text() for t in figure.texts if "re-norms" in t.get_text())
    assert note.startswith("Drawn up to the 8th of ")
    assert "ends at sublayer 4" in named(figure.axes[0])
    assert max(lambda_figure(frame, 10, "t").axes[0].lines[0].get_xdata()) == last // 2
    whole = growth_figure(run(tiny("depth=5", "norm=swin_renorm", "norm.every=1")).curve, "t", [])
    assert not any("re-norms" in t.get_text() for t in whole.texts)


def test_a_checkpoint_of_few_large_tokens():
    """The linear panel has its median token then, and the names say so."""
    frame = run(tiny("seeds=8")).curve
    trained = frame[frame["seed"] == 0].assign(curve="checkpoint", outside=1.0)
    trained["mean_square"] *= 5000
    both = pd.concat([trained, frame], ignore_index=True)
    main, relative, *_ = growth_figure(both, "t", ["a"]).axes
    median = trained["mean_square_median"]
    assert any(
        np.allclose(line.get_ydata(), median)
        for line in main.lines
        if len(line.get_ydata()) == len(median)
    )
    assert main.get_ylim()[1] < 100 * frame["mean_square"].max()
    assert relative.get_yscale() == "log"
    assert relative.get_ylim()[1] > 4000


@pytest.fixture(scope="module")
def deep():
    """A deep model's curve with a law that leaves float64, as √2 per sublayer does after 512 blocks."""
    result = run(tiny("depth=60"))
    law = result.curve["law_sqrt2"] * 1e6 ** result.curve["sublayer"].astype(float)
    assert np.isinf(law).any()
    return dataclasses.replace(result, curve=result.curve.assign(law_sqrt2=law))


@pytest.mark.parametrize("case", ["norm=rezero", "norm=post", "depth=1", "deep"])
def test_odd_curves_draw(tmp_path, request, case):
    """Measured means lie within both panels, and what is drawn of a law is within float64."""
    result = request.getfixturevalue("deep") if case == "deep" else run(tiny(case))
    lines = headlines(result.verdicts, result.summary)
    figure = growth_figure(result.curve, title(result.config), lines)
    if case == "deep":
        figure.axes[0].set_title("a $ and a $")
        save(figure, tmp_path, "growth", svg=True)
        svg = (tmp_path / "growth.svg").read_text("utf-8")
        assert "<!-- a $ and a $ -->" in svg
        assert re.search("<!-- 10⁻?[⁰-⁹]+ -->", svg), "plain"
    mean = result.curve.groupby(["sublayer", "kind"], sort=False)["mean_square"].mean()
    for ax in figure.axes[:2]:
        (low, high), (left, right) = ax.get_ylim(), ax.get_xlim()
        shown = mean[mean > 0] if ax.get_yscale() == "log" else mean
        assert low <= shown.min() <= shown.max() <= high
        assert left <= 0 < result.curve["sublayer"].max() <= right
        heights = [np.asarray(line.get_ydata(), float) for line in ax.lines]
        assert any(len(y) == len(mean) and np.allclose(y, mean) for y in heights)
        assert not any(np.isinf(y).any() for y in heights)


def test_overflow_is_named():
    rows = [
        {"curve": "random", "seed": 0, "sublayer": 9, "block": 4, "kind": "attention"},
        {"curve": "random", "seed": 1, "sublayer": 6, "block": 2, "kind": "mlp"},
    ]
    (line,) = overflow_lines(rows)
    assert "2 curves" in line
    assert "sublayer 6 (mlp of block 3)" in line
    at_once = {"curve": "checkpoint", "seed": 0, "sublayer": 0, "block": None, "kind": "embedding"}
    assert overflow_lines([at_once])[0].endswith(
        ": the embedding isn't finite, so there is no curve."
    )


@pytest.mark.parametrize(("norm", "seeds"), [("reordered", 1), ("swin_renorm", 8)])
def test_gradient_panel_column_and_line(norm, seeds):
    result = run(tiny("gradients=true", f"norm={norm}", "depth=5", f"seeds={seeds}"))
    figure = growth_figure(result.curve, "t", [])
    assert len(figure.axes) == 5
    assert figure.axes[4].get_yscale() == "log"
    heights = [np.asarray(line.get_ydata(), float) for line in figure.axes[4].lines]
    one = result.curve[result.curve["seed"] == 0].drop_duplicates(["sublayer", "kind"])
    assert any(np.allclose(y, one["law_gradient_rms"]) for y in heights)  # theory's
    lines = lines_of(growth_table(result.curve, "random"))
    assert max(map(len, lines)) <= 80
    assert lines[0].split()[-2:] == ["grad.", "rms"]
    exponents = lines_of(lambda_table(result.summary["lambda"]["random"]))
    assert max(map(len, exponents)) <= 80
    assert len(exponents) == 5
    (loss,) = (line for line in verdict_lines(result.verdicts, result.summary) if "loss" in line)
    assert "ln(vocabulary) is 4.575" in loss


@pytest.mark.parametrize("gradients", [False, True])
def test_lambda_figure(tmp_path, deep, gradients):
    """One row of panels, or two, each with its formula; the expected laws beside the measured curve."""
    result = run(tiny("depth=2", "gradients=true")) if gradients else deep
    frame, depth = result.curve, result.config.shape.depth
    blocks, figure = per_block(frame, depth), lambda_figure(frame, depth, "t")
    assert len(figure.axes) == (4 if gradients else 2)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    mean = "random init, of the mean vector (paper)"
    theory = "theory (mean field)"
    assert sorted(labels) == sorted(["additive law", theory, "random init", mean])
    formulas = [ax.get_ylabel() for ax in figure.axes]
    assert formulas[:2] == ["λ = ln(‖xᵢ‖/‖xᵢ₋₁‖)/n", "λ = ln(‖xᵢ‖/‖x₁‖)/n"]
    pairwise = figure.axes[0]
    low, high = pairwise.get_ylim()
    values = blocks.loc[(blocks["curve"] == "random") & (blocks["of"] == "activation")]
    assert low <= values["lambda_pairwise"].min()
    assert high >= values["lambda_pairwise"].max()
    (tmp_path / "lambda.svg").write_text("of an earlier run")
    assert save(figure, tmp_path, "lambda") == [tmp_path / "lambda.png"] == [*tmp_path.iterdir()]


def test_a_lost_gradient_is_named():
    result = run(tiny("dtype=float16", "norm=pre", "init.std=2", "depth=12", "gradients=true"))
    lines = verdict_lines(result.verdicts, result.summary)
    assert any(line.startswith("Gradient overflow (random init, 1 curve)") for line in lines)
    growth_figure(result.curve, "t", lines)
    assert lambda_figure(result.curve, 12, "t") is not None


@pytest.mark.parametrize("count", [1, 5, 6])
def test_a_legend_fits_its_figure(count):
    """Entries as long as those of a checkpoint beside random inits, which four columns cut off."""
    figure, ((ax,),) = subplots(1, 1, (11, 4))
    for i in range(count):
        ax.plot([0, 1], label=f"{i}: random init, of the mean vector (paper)")
    finish(figure, [ax], ["t"])
    FigureCanvasAgg(figure).draw()
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 <= box.x1 <= figure.bbox.width
    assert box.height < (0.3 * count + 0.3) * figure.dpi


def test_ticks_are_the_numbers():
    """A tick at 0.0075 isn't 7·10⁻³."""
    ticks = {
        0.0075: "7.5·10⁻³",
        -0.00125: "−1.25·10⁻³",
        1e4: "10⁴",
        -1e5: "−10⁵",
        0.5: "0.5",
        0: "0",
    }
    assert {tick: plain(tick) for tick in ticks} == ticks
