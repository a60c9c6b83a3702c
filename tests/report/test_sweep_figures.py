"""Which figures a sweep gets, that nothing swept is averaged unsaid, and tables of 80 columns."""

import functools
import io
import itertools
import math
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from simlab.config.validate import compose
from simlab.experiment import run
from simlab.report.facets import GREY, axes_of, plan, shorten, value_text
from simlab.report.style import save
from simlab.report.sweep_figures import figures, prepared
from simlab.report.sweep_scans import law_lambdas
from simlab.report.sweep_table import failed_table, jobs_table
from simlab.sweep import report
from simlab.sweep.plan import TAKEN

matplotlib.use("Agg")

SHAPE = ["model=small", "width=64", "heads=4", "kv_heads=4", "d_ff=128", "vocab_size=512"]
BASE = [*SHAPE, "inputs.length=32", "device=cpu", "seeds=3"]


def sweep(base, **axes):
    """A sweep's two frames and its axes, as ``python -m simlab.run -m`` gives them.

    axes: override's key with __ for a dot: its values.
    """
    keys = [key.replace("__", ".") for key in axes]
    named = [TAKEN.get(key, key) for key in keys]
    frames, jobs = [], []
    for job, values in enumerate(itertools.product(*axes.values())):
        overrides = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
        result = run(compose([*base, *overrides]))
        of_job = dict(zip(named, values, strict=True))
        jobs.append(SimpleNamespace(number=job, values=of_job, summary=result.summary))
        frame = result.curve.copy()
        for key, value in reversed([("job", job), *of_job.items()]):
            frame.insert(0, key, value)
        frames.append(frame)
    of_axes = zip(named, axes.values(), strict=True)
    swept = {name: list(values) for name, values in of_axes if len(values) > 1}
    curves = pd.concat(frames, ignore_index=True)
    return curves, report.rows(jobs, curves), swept


@functools.cache
def example():
    """Three keys, the README's: depth × init.std × norm."""
    return sweep(
        BASE, depth=(2, 4, 8), init__std=(0.01, 0.02), norm=("reordered", "pre", "swin_renorm")
    )


@functools.cache
def of_depth():
    return sweep(BASE, depth=(2, 4, 8))


@functools.cache
def of_width():
    return sweep(
        [*BASE, "depth=3", "gradients=true"], width=(16, 32, 64), init=("normal", "fan_in")
    )


@functools.cache
def of_demo():
    base = ["source=demo", "device=cpu", "seeds=2", "source.weights=false", "inputs.length=16"]
    return sweep(base, source__step=("0", "100", "final"))


def drawn(frames):
    curves, jobs, swept = frames
    return figures(curves, jobs, swept, "t")


def heights(ax):
    return [np.asarray(line.get_ydata(), float) for line in ax.lines]


def has(ax, values):
    """Whether a line of the panel has just these heights."""
    values = np.asarray(values, float)
    return any(
        len(y) == len(values) and np.array_equal(y, values, equal_nan=True) for y in heights(ax)
    )


def titled(figure):
    return {ax.get_title().replace("\n", ", "): ax for ax in figure.axes}


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def lines_of(table):
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_which_figures():
    assert set(drawn(example())) == {"growth", "heatmap", "lambda_depth", "lambda_init.std"}
    assert set(drawn(of_depth())) == {"growth", "lambda"}
    assert set(drawn(of_width())) == {"growth", "gradients", "statistics", "lambda"}
    assert set(drawn(of_demo())) == {"growth", "lambda"}
    assert set(drawn(sweep(BASE, norm=("pre", "post")))) == {"growth"}
    assert set(drawn(sweep([*BASE, "depth=2"], seed=(0,)))) == {"growth"}


def test_every_swept_key_is_a_colour_or_a_panel():
    """Each line is the mean over one job's seeds, and every job has its line."""
    curves, jobs, swept = example()
    panels = titled(drawn((curves, jobs, swept))["growth"])
    assert len(panels) == 6
    assert {"depth=2", "depth=4", "depth=8"} <= set(legend(drawn((curves, jobs, swept))["growth"]))
    for _, rows in curves.groupby("job"):
        first = rows.iloc[0]
        ax = panels[f"norm={first['norm_placement']}, init.std={first['init.std']}"]
        step = rows.groupby("seed").cumcount()
        assert has(ax, rows["mean_square"].groupby(step).mean())


def test_the_exponents_are_the_jobs():
    curves, jobs, swept = example()
    panels = titled(drawn((curves, jobs, swept))["lambda_depth"])
    for norm, words in itertools.product(
        swept["norm_placement"], ("λ of the tokens' mean norm", "λ of the mean vector (paper)")
    ):
        name = "lambda_token" if "tokens" in words else "lambda_paper"
        for _, rows in jobs[jobs["norm_placement"] == norm].groupby("init.std"):
            assert has(panels[f"{words}, norm={norm}"], rows.sort_values("depth")[name])


def test_the_laws_exponent_is_the_runs():
    result = run(compose([*BASE, "depth=4"]))
    curves, jobs, swept = of_depth()
    law = law_lambdas(prepared(curves, jobs, swept)).set_index("job")["law_additive"]
    found = result.summary["lambda"]["random"]["lambda_token_additive"]
    assert math.isclose(law[jobs.loc[jobs["depth"] == 4, "job"].item()], found, rel_tol=1e-12)


def test_the_heat_map_is_the_jobs_mean_squares():
    curves, jobs, swept = example()
    panels = titled(drawn((curves, jobs, swept))["heatmap"])
    for norm in swept["norm_placement"]:
        table = jobs[jobs["norm_placement"] == norm].pivot(
            index="init.std", columns="depth", values="mean_square"
        )
        (mesh,) = (c for c in panels[f"norm={norm}"].collections if hasattr(c, "get_coordinates"))
        assert np.array_equal(np.asarray(mesh.get_array()), table.to_numpy())


def test_laws_that_coincide_are_drawn_once():
    (ax,) = drawn(of_depth())["growth"].axes
    styles = [line.get_linestyle() for line in ax.lines if len(line.get_xdata())]
    curves = 3 + 3  # lines, and dots at their ends
    assert len(styles) == curves + 2
    deepest = of_depth()[0].query("depth == 8").groupby("sublayer")["law_additive"].mean()
    assert has(ax, deepest)


def test_a_swept_seed_is_a_band():
    curves, jobs, swept = sweep([*SHAPE, "inputs.length=8", "device=cpu", "depth=3", "seeds=1"],
                                seed=(0, 1, 2, 3))  # fmt: skip
    assert swept == {"first_seed": [0, 1, 2, 3]}
    figure = drawn((curves, jobs, swept))["growth"]
    assert has(figure.axes[0], curves.groupby("sublayer")["mean_square"].mean())
    assert "4 seeds: mean, min to max" in legend(figure)
    # Of a swept count each seed is drawn once.
    more = sweep([*SHAPE, "inputs.length=8", "device=cpu", "depth=3"], seeds=(2, 4))
    four = more[0].query("job == 1").groupby("sublayer")["mean_square"].mean()
    assert has(drawn(more)["growth"].axes[0], four)
    # Exponents of jobs that differ in their seed alone: their mean.
    both = sweep([*BASE, "seeds=1"], depth=(2, 3), seed=(0, 1))
    (token, _) = drawn(both)["lambda"].axes
    assert has(token, both[1].groupby("depth")["lambda_token"].mean())


def test_checkpoints_are_coloured_and_random_inits_grey():
    curves, *_ = of_demo()
    figure = drawn(of_demo())["growth"]
    (ax,) = figure.axes
    assert legend(figure)[:4] == [
        "source.step=0", "source.step=100", "source.step=final", "random init",
    ]  # fmt: skip
    for _, rows in curves[curves["curve"] == "checkpoint"].groupby("job"):
        assert has(ax, rows["mean_square"])
    grey = [line for line in ax.lines if line.get_color() == GREY and len(line.get_xdata())]
    assert len(grey) == 1  # the random inits are the same beside each


def test_many_categories_have_a_panel_each():
    norms = ("reordered", "pre", "post", "peri", "lns", "none", "rezero")
    figure = drawn(sweep([*BASE, "depth=2"], norm=norms))["growth"]
    assert list(titled(figure)) == [f"norm={norm}" for norm in norms]


def test_overflow_ends_with_a_cross(tmp_path):
    frames = sweep([*BASE, "dtype=float16", "norm=none", "depth=8"], init__std=(0.02, 0.2, 500))
    curves, jobs, _ = frames
    assert (jobs["overflow"] > 0).sum() == 2
    figure = drawn(frames)["growth"]
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    shown = {point for line in crosses for point in zip(*line.get_data(), strict=True)}
    cut = curves[curves["job"] > 0].groupby(["job", "seed"]).tail(1)
    assert shown == set(zip(cut["sublayer"], cut["mean_square"], strict=True))
    assert "a seed's curve ends: overflow" in legend(figure)
    save_all(drawn(frames), tmp_path)
    assert max(map(len, lines_of(jobs_table(jobs, frames[2])))) <= 80


def made_up(**axes):
    """Frames of a sweep that nobody ran: two seeds' lines of depth 2."""
    base_curves, base_jobs, _ = of_depth()
    base_curves = base_curves[base_curves["depth"] == 2].drop(columns=["job", "depth"])
    base_jobs = base_jobs[base_jobs["depth"] == 2].drop(columns="job")
    keys, frames, rows = [key.replace("__", ".") for key in axes], [], []
    for job, values in enumerate(itertools.product(*axes.values())):
        of_job = {"job": job} | dict(zip(keys, values, strict=True))
        frames.append(base_curves.assign(**of_job, mean_square=base_curves["mean_square"] + job))
        rows.append(base_jobs.assign(**of_job))
    return (
        pd.concat(frames, ignore_index=True),
        pd.concat(rows, ignore_index=True),
        {key: list(values) for key, values in zip(keys, axes.values(), strict=True)},
    )


def save_all(figures_, folder):
    for name, figure in figures_.items():
        save(figure, folder, name)


@pytest.mark.parametrize(
    "axes",
    [
        {"source.path": [f"/some/where/far/off/in/a/folder/step{i}" for i in range(20)]},
        {"width": range(1, 15), "init.std": [0.1 * i for i in range(1, 16)]},
        {"norm_placement": list("abcdefghijk"), "init.std": [1, 2, 3, 4], "width": [8, 16, 32, 64]},
        {"norm.eps": [1e-6, 1e-5, 1e-4], "init": list("abcd"), "width": [1, 2, 3], "qk": list("xyz"),
         "inputs.length": [4, 8]},
        {"a": list("abcdefghijklmnopqrstuvwxyzäöü"), "b": list("abcdefg")},
    ],
    ids=lambda axes: " × ".join(f"{key} {len(values)}" for key, values in axes.items()),
)  # fmt: skip
def test_many_values_and_many_keys(tmp_path, axes):
    """Nothing crashes, legends stay short, and each line is one job's mean or named as left out."""
    curves, jobs, swept = made_up(**axes)
    figure = drawn((curves, jobs, swept))["growth"]
    save(figure, tmp_path, "growth")
    panels = [ax for ax in figure.axes if ax.get_title() or len(figure.axes) <= 2]
    assert len(panels) <= 24
    assert len(legend(figure)) <= 12
    means = {
        tuple(rows.groupby("sublayer")["mean_square"].mean()) for _, rows in curves.groupby("job")
    }
    seen = [
        tuple(y) for ax in panels for y, line in zip(heights(ax), ax.lines, strict=True)
        if line.get_linestyle() == "-" and len(y) == 5 and line.get_color() != ".84"
    ]  # fmt: skip
    assert set(seen) <= means
    assert len(set(seen)) == len(means) or "Shown: " in figure.get_suptitle()
    lines = lines_of(jobs_table(jobs, swept))
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 43


def test_what_is_left_out_is_said():
    axes = axes_of(made_up(a=list("abc"), b=[1, 2, 3], c=[1, 2], d=[4, 5])[0].astype(str),
                   {"a": list("abc"), "b": [1, 2, 3], "c": [1, 2], "d": [4, 5]})  # fmt: skip
    whole, less = plan(axes), plan(axes, most=4)
    assert (whole.colour.key, [axis.key for axis in whole.panels]) == ("b", ["a", "c"])
    assert whole.fixed == (("d", "4"),)
    assert whole.notes == ("Shown: d=4 alone, of its 2 values.",)
    assert (len(whole.cells), whole.columns) == (6, 3)
    assert len(less.cells) <= 4
    shown = {axis.key for axis in less.panels} | {key for key, _ in less.fixed} | {less.colour.key}
    assert shown == set("abcd")
    assert less.notes[0].startswith("Shown: ")


def test_nothing_to_draw(tmp_path):
    none = pd.DataFrame()
    assert figures(none, none, {}, "t") == {}
    assert lines_of(jobs_table(none, {}))
    assert figures(none, none, {"depth": [1, 2]}, "t") == {}
    curves, jobs, swept = of_width()
    numbers = [name for name in curves.select_dtypes("float").columns if name != "init.std"]
    empty = curves.assign(**dict.fromkeys(numbers, np.nan))
    measured = jobs.select_dtypes("float").columns
    nothing = jobs.assign(**dict.fromkeys(measured, np.nan))
    assert figures(empty, nothing, swept, "t") == {}
    assert max(map(len, lines_of(jobs_table(nothing, swept)))) <= 80
    assert set(figures(curves, nothing, swept, "t")) == {"growth", "gradients", "statistics"}
    assert set(figures(curves, none, swept, "t")) == {"growth", "gradients", "statistics"}
    assert set(figures(none, jobs, swept, "t")) == {"lambda"}
    save_all(figures(curves.iloc[:1], jobs.iloc[:1], swept, "t"), tmp_path)


def test_the_same_twice(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_all(drawn(of_width()), tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 8
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_frames_as_their_files_have_them(tmp_path):
    """From CSV, where whole numbers may be floats and texts numbers, the figures are the same."""
    curves, jobs, swept = of_demo()
    curves.to_csv(tmp_path / "sweep.csv", index=False)
    jobs.to_csv(tmp_path / "jobs.csv", index=False)
    read = (pd.read_csv(tmp_path / "sweep.csv"), pd.read_csv(tmp_path / "jobs.csv"), swept)
    for ours, theirs in zip(
        drawn(of_demo())["growth"].axes, drawn(read)["growth"].axes, strict=True
    ):
        assert len(ours.lines) == len(theirs.lines)


def test_jobs_table():
    _, jobs, swept = example()
    lines = lines_of(jobs_table(jobs, swept))
    assert lines[0].split()[:4] == ["job", "depth", "std", "norm"]
    assert len(lines) == 1 + len(jobs)
    assert max(map(len, lines)) <= 80
    assert lines[1].split()[:4] == ["0", "2", "0.01", "reordered"]


def test_a_long_jobs_table_says_what_it_leaves_out():
    _, jobs, swept = made_up(width=[1, 2, 3, 4], init__std=range(1, 13), norm_placement=["a", "b"])
    lines = lines_of(jobs_table(jobs, swept))
    assert lines[-1] == "64 of 96 rows are left out; jobs.csv has them all."
    assert {line.split()[3] for line in lines[1:-1]} == {"a", "b"}
    assert len(lines) == 34


def test_texts():
    assert [value_text(v) for v in (1, 1.0, "1", 1e-6, "1e-6", None, math.nan, True, "final")] == [
        "1", "1", "1", "1e-06", "1e-06", "null", "null", "true", "final",
    ]  # fmt: skip
    assert shorten("/a/long/path/to/step1000", 10) == "…/step1000"
    assert shorten("residual_scale", 9) == "residual…"


def test_failed_table():
    error = "line one\n[red]two[/red]\x1b[31m " + "long " * 200
    failed = [
        {"job": 3, "overrides": ["depth=8", "seeds=[0,1]"], "error": error},
        {"job": 12, "overrides": "source.path=" + "/folder" * 30, "error": None},
    ]
    lines = lines_of(failed_table(failed))
    assert max(map(len, lines)) <= 80
    assert len(lines) < 25
    assert "seeds=[0,1]" in lines[1]
    assert "[red]two[/red]" in " ".join(lines)
    assert "\x1b" not in " ".join(lines)
