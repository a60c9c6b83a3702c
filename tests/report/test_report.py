"""The table fits 80 columns, the figure shows what it should and is the same twice."""

import dataclasses
import io

import matplotlib
import numpy as np
import pytest
from conftest import tiny
from rich.console import Console

from simlab.analysis.exponents import per_block
from simlab.config import CONF_DIR
from simlab.config.preset import changed
from simlab.config.validate import compose
from simlab.experiment import run
from simlab.report.console import overflow_lines, title, verdict_lines
from simlab.report.figure import growth_figure, lambda_figure
from simlab.report.style import save
from simlab.report.table import growth_table, lambda_table

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


def test_figure_elements():
    result = run(tiny("depth=8", "seeds=3", "norm=swin_renorm"))
    figure = growth_figure(result.curve, "t", ["v"])
    linear, log = figure.axes
    assert (linear.get_yscale(), log.get_yscale()) == ("linear", "log")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["additive law", "√2 per sublayer", "random init (3 seeds: mean, min to max)"]
    for ax in figure.axes:
        assert ax.collections  # the band
        low, high = ax.get_ylim()
        assert low <= result.curve["mean_square"].min()
        assert high >= result.curve["mean_square"].max()


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
    lines = verdict_lines(result.verdicts, result.summary)
    figure = growth_figure(result.curve, title(result.config), lines)
    if case == "deep":
        save(figure, tmp_path, "growth")
    mean = result.curve.groupby(["sublayer", "kind"], sort=False)["mean_square"].mean()
    for ax in figure.axes:
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
    assert len(figure.axes) == 3
    assert figure.axes[2].get_yscale() == "log"
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
    """One row of panels, or two; both laws beside the activations' measured curve."""
    result = run(tiny("depth=2", "gradients=true")) if gradients else deep
    frame, depth = result.curve, result.config.shape.depth
    blocks, figure = per_block(frame, depth), lambda_figure(frame, depth, "t")
    assert len(figure.axes) == (4 if gradients else 2)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    mean = "random init, of the mean vector (paper)"
    assert labels == ["additive law", "√2 per sublayer", "random init", mean]
    pairwise = figure.axes[0]
    low, high = pairwise.get_ylim()
    values = blocks.loc[(blocks["curve"] == "random") & (blocks["of"] == "activation")]
    assert low <= values["lambda_pairwise"].min()
    assert high >= values["lambda_pairwise"].max()
    save(figure, tmp_path, "lambda")
    assert (tmp_path / "lambda.svg").exists()


def test_a_lost_gradient_is_named():
    result = run(tiny("dtype=float16", "norm=pre", "init.std=2", "depth=12", "gradients=true"))
    lines = verdict_lines(result.verdicts, result.summary)
    assert any(line.startswith("Gradient overflow (random init, 1 curve)") for line in lines)
    growth_figure(result.curve, "t", lines)
    assert lambda_figure(result.curve, 12, "t") is not None
