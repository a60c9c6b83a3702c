"""The table fits 80 columns, the figure shows what it should and is the same twice."""

import io

import matplotlib
import pytest
from conftest import tiny
from rich.console import Console

from simlab.experiment import run
from simlab.report.console import overflow_lines, title, verdict_lines
from simlab.report.figure import growth_figure, save
from simlab.report.table import growth_table

matplotlib.use("Agg")


def lines_of(table):
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text().splitlines()


@pytest.mark.parametrize("depth", [1, 4, 30, 200])
@pytest.mark.parametrize("norm", ["reordered", "swin_renorm"])
def test_table(depth, norm):
    frame = run(tiny(f"depth={depth}", f"norm={norm}", "seeds=2")).curve
    lines = lines_of(growth_table(frame, "random"))
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 36
    assert "mean square" in lines[0]
    if norm == "reordered":  # the last block is always shown
        assert lines[-1].split()[:2] == [str(depth), "mlp"]


def test_figure_is_the_same_twice(tmp_path):
    result = run(tiny("seeds=3"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = verdict_lines(result.verdicts, [])
        save(growth_figure(result.curve, title(result.config), lines), tmp_path / name)
    for file in ("growth.png", "growth.svg"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).stat().st_size > 10_000


def test_figure_has_both_axes_the_band_and_both_theories():
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


@pytest.mark.parametrize(
    "overrides",
    [["norm=rezero"], ["norm=post"], ["depth=1", "seeds=1"], ["depth=300", "width=16", "heads=2"]],
)
def test_odd_curves_draw(tmp_path, overrides):
    result = run(tiny(*overrides))
    save(
        growth_figure(result.curve, title(result.config), verdict_lines(result.verdicts, [])),
        tmp_path,
    )


def test_a_curve_that_overflows_at_once(tmp_path):
    """Only the embedding is finite: still a table, a figure and a sentence."""
    result = run(tiny("dtype=float16", "norm=none", "init.std=500", "seeds=2"))
    lines = verdict_lines(result.verdicts, result.summary["overflow"])
    save(growth_figure(result.curve, title(result.config), lines), tmp_path)
    lines_of(growth_table(result.curve, "random"))
    assert any(line.startswith("Overflow (random init, 2 curves)") for line in lines)


def test_overflow_is_named():
    rows = [
        {"curve": "random", "seed": 0, "sublayer": 9, "block": 4, "kind": "attention"},
        {"curve": "random", "seed": 1, "sublayer": 6, "block": 2, "kind": "mlp"},
    ]
    (line,) = overflow_lines(rows)
    assert "2 curves" in line
    assert "sublayer 6 (mlp of block 3)" in line
