"""Figures of a sweep: which there are, the numbers in them, and what titles say is left out."""

import functools
import itertools
import math
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest

from simlab.analysis import LAWS
from simlab.analysis.numbers import short
from simlab.config.validate import compose
from simlab.experiment import run
from simlab.report.facets import GREY, labelled, plan
from simlab.report.statistics_figure import SHOWN_STATISTICS
from simlab.report.style import save
from simlab.report.sweep_figures import figures
from simlab.report.values import shorten, value_text
from simlab.sweep import report
from simlab.sweep.plan import TAKEN

matplotlib.use("Agg")

SHAPE = ["model=small", "width=64", "heads=4", "kv_heads=4", "d_ff=128", "vocab_size=512"]
BASE = [*SHAPE, "inputs.length=16", "device=cpu", "seeds=3"]


@functools.cache
def sweep(*base, **axes):
    """A sweep's two frames and its keys with their values, as its report has them.

    axes: an override's key with __ for a dot: its values.
    """
    names = [key.replace("__", ".") for key in axes]
    keys = [TAKEN.get(name, name) for name in names]
    frames, jobs = [], []
    for job, values in enumerate(itertools.product(*axes.values())):
        overrides = [f"{key}={value}" for key, value in zip(names, values, strict=True)]
        result = run(compose([*base, *overrides]))
        of_job = dict(zip(keys, values, strict=True))
        jobs.append(SimpleNamespace(number=job, values=of_job, summary=result.summary))
        frames.append(result.curve.assign(**({"job": job} | of_job)))
    curves = pd.concat(frames, ignore_index=True)
    swept = {key: list(values) for key, values in zip(keys, axes.values(), strict=True)}
    return curves, report.rows(jobs, curves), swept


def drawn(frames):
    curves, jobs, swept = frames
    return figures(curves, jobs, swept, "t")


@pytest.fixture(scope="module")
def three_keys():
    """The sweep of three keys, and its figures."""
    frames = sweep(*BASE, depth=(2, 4), init__std=(0.01, 0.02), norm=("pre", "swin_renorm"))
    return frames, drawn(frames)


@pytest.fixture(scope="module")
def widths():
    frames = sweep(*BASE, "depth=2", "gradients=true", width=(32, 64), init=("normal", "fan_in"))
    return frames, drawn(frames)


@pytest.fixture(scope="module")
def steps():
    base = ["source=demo", "device=cpu", "seeds=2", "source.weights=false", "inputs.length=16"]
    frames = sweep(*base, source__step=("0", "final"))
    return frames, drawn(frames)


def has(ax, values, colour=None):
    """True if a line of the panel has just these heights, and this colour where one is given."""
    lines = [line for line in ax.lines if colour in (None, line.get_color())]
    heights = [np.asarray(line.get_ydata(), float) for line in lines]
    return any(len(y) == len(values) and np.allclose(y, values, rtol=1e-12) for y in heights)


def titled(figure):
    """The panels by their titles' lines."""
    return {frozenset(ax.get_title().split("\n")): ax for ax in figure.axes}


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_which_figures(three_keys, widths, steps):
    assert set(three_keys[1]) == {"growth", "heatmap", "lambda"}
    assert set(widths[1]) == {"growth", "gradients", "statistics", "lambda"}
    assert set(steps[1]) == {"growth", "lambda"}
    assert set(drawn(sweep(*BASE, "depth=2", norm=("pre", "post")))) == {"growth"}
    assert set(drawn(sweep(*BASE, "depth=2", seed=(0,)))) == {"growth"}


def test_growth_has_each_jobs_mean_over_seeds(three_keys):
    (curves, *_), of_sweep = three_keys
    figure = of_sweep["growth"]
    panels = titled(figure)
    assert len(panels) == 4
    assert legend(figure)[:2] == ["init.std=0.01", "init.std=0.02"]  # depth's curves coincide
    assert "3 seeds: mean, min to max" in legend(figure)
    for _, rows in curves.groupby("job"):
        norm, depth = rows.iloc[0][["norm_placement", "depth"]]
        ax = panels[frozenset([f"norm={norm}", f"depth={depth}"])]
        seeds = rows.groupby(rows.groupby("seed").cumcount())["mean_square"]
        assert has(ax, seeds.mean())
        bands = [band.get_paths()[0].vertices[:, 1] for band in ax.collections if band.get_paths()]
        assert any(math.isclose(band.max(), seeds.max().max()) for band in bands)


def test_titles_answer(three_keys):
    (curves, jobs, swept), of_sweep = three_keys
    said = of_sweep["heatmap"].get_suptitle().split("\n")
    ends = [short(jobs["mean_square"].min()), short(jobs["mean_square"].max())]
    assert said[0] == f"The mean square at the last sublayer is between {ends[0]} and {ends[1]}."
    assert said[1] == "Random init; 8 runs: depth × init.std × norm."
    shapes = {
        "linear": ["linear"] * 5 + ["power"] * 3, "none": ["none"] * 8,
        "mixed": ["linear"] * 3 + ["power"] * 3 + ["none"] * 2,
    }  # fmt: skip
    steps = [1.0, 1.25, 1.5, 1.0, 1.0, 9.0, 9.0, 9.0]
    titles = {
        name: figures(curves, jobs.assign(shape=of, per_sublayer=steps), swept, "t")["growth"]
        .get_suptitle().split("\n")[0]
        for name, of in shapes.items()
    }  # fmt: skip
    keys = "depth × init.std × norm"
    assert titles == {
        "linear": f"Linear growth by 1 to 1.5 per sublayer in 5 of 8 runs ({keys}).",
        "mixed": f"8 runs: {keys}", "none": f"8 runs: {keys}",
    }  # fmt: skip


def test_statistics_are_bold_beyond_chance_alone(widths):
    """Three seeds have no interval; of nine with the same draws p is known, and of some off."""
    (curves, jobs, swept), of_sweep = widths

    def bold(figure):
        return [text.get_text() for ax in figure.axes for text in ax.texts
                if text.get_weight() == "bold"]  # fmt: skip

    assert bold(of_sweep["statistics"]) == []
    nine = pd.concat([curves.assign(seed=curves["seed"] + 3 * i) for i in range(3)])
    found = bold(figures(nine, jobs, swept, "t")["statistics"])
    assert found
    assert "0.00" not in " ".join(text.split("±")[0] for text in found)


def test_renorm_position_and_law_gap():
    curves, jobs, swept = sweep(*BASE, "norm=swin_renorm", "norm.every=2", depth=(1, 2))
    (ax,) = drawn((curves, jobs, swept))["growth"].axes
    deep = curves[curves["depth"] == 2].groupby(["sublayer", "kind"], sort=False)
    mean = deep["mean_square"].mean()
    (line,) = (li for li in ax.lines if len(li.get_xdata()) == 6 and li.get_linestyle() == "-")
    assert np.allclose(line.get_ydata(), mean)
    assert 4.35 in line.get_xdata()
    assert sum(np.isnan(np.asarray(law.get_ydata(), float)).sum() == 1 for law in ax.lines) == 2
    (fan,) = (law for law in ax.lines if law.get_label() == LAWS["sqrt2"].label)
    assert max(fan.get_xdata()) == 4  # drawn once, up to the re-norm
    assert [text.get_text() for text in ax.texts] == [f"peak {short(mean[4, 'mlp'])}"]


def test_laws_that_coincide_are_drawn_once():
    curves, jobs, swept = sweep(*BASE, depth=(2, 4))
    (ax,) = drawn((curves, jobs, swept))["growth"].axes
    assert has(ax, curves.query("depth == 4").groupby("sublayer")["law_additive"].mean())
    assert len([line for line in ax.lines if len(line.get_xdata())]) == 2 + 3


def test_exponents_and_their_laws_are_the_jobs(three_keys):
    (curves, jobs, _), of_sweep = three_keys
    against_depth, against_std = of_sweep["lambda"].subfigs
    assert {ax.get_xlabel() for ax in against_std.axes} == {"", "init.std"}
    panels = titled(against_depth)
    words = {"lambda_token": "λ of the tokens' mean norm",
             "lambda_token_additive": "λ of the tokens' mean norm",
             "lambda_paper": "λ of the mean vector (paper)"}  # fmt: skip
    for (norm, _), rows in jobs.groupby(["norm_placement", "init.std"]):
        for name, title in words.items():
            ax = panels[frozenset([title, f"norm={norm}"])]
            values = rows.sort_values("depth")[name]
            if norm == "pre" and name.endswith("additive"):
                assert values.isna().all()  # no law for it, so none is drawn
            else:
                assert has(ax, values)
    ends = curves[curves["job"] == 1].groupby(["seed", "block"]).tail(1)
    law = np.log(ends.groupby("seed")["law_additive"].agg(["first", "last"])).diff(axis=1)["last"]
    assert math.isclose(jobs["lambda_token_additive"][1], law.mean() / 2 / 2, rel_tol=1e-9)


def test_heatmap_values(three_keys):
    (_, jobs, swept), of_sweep = three_keys
    panels = titled(of_sweep["heatmap"])
    for norm in swept["norm_placement"]:
        of = jobs[jobs["norm_placement"] == norm]
        table = of.pivot(index="init.std", columns="depth", values="mean_square").iloc[::-1]
        (mesh,) = panels[frozenset([f"norm={norm}"])].collections
        assert np.array_equal(np.asarray(mesh.get_array()), table.to_numpy())


@pytest.mark.parametrize("high", [12.0, 13.5, 50.0, 900.0])
def test_colour_bar_has_ticks(three_keys, high):
    (curves, jobs, swept), _ = three_keys
    jobs = jobs.assign(mean_square=np.linspace(12.0, high, len(jobs)))
    bar = figures(curves, jobs, swept, "t")["heatmap"].axes[-1]
    low, top = bar.get_ylim()
    shown = [text for text, y in zip(bar.get_yticklabels(), bar.get_yticks(), strict=True)
             if low <= y <= top]  # fmt: skip
    assert len({text.get_text() for text in shown} - {""}) >= (1 if high == 12.0 else 3)
    assert ("log scale" in bar.get_ylabel()) == (high > 36)


def test_statistics_are_those_after_a_block(widths):
    (curves, *_), of_sweep = widths
    panels = {ax.get_gid(): ax for ax in of_sweep["statistics"].axes}
    assert set(panels) == {
        f"{row} {name}"
        for row in (0, 1) for name in SHOWN_STATISTICS
    }  # fmt: skip
    for row, init in enumerate(("normal", "fan_in")):
        ends = curves[(curves["init"] == init) & (curves["block"] == 1)]
        ends = ends.groupby(["width", "seed"])["norm"].last().groupby("width").mean()
        assert has(panels[f"{row} norm"], ends)


def test_statistics_labels_are_the_exponents(widths):
    """An embedding's norm goes as √width, its mean |x| not at all; a block's as measured."""
    (curves, *_), of_sweep = widths
    panels = {ax.get_gid(): ax for ax in of_sweep["statistics"].axes}
    for row, init in enumerate(("normal", "fan_in")):
        said = {
            name: [t.get_text() for t in panels[f"{row} {name}"].texts if t.get_text() != "●"]
            for name in ("norm", "mean_abs")
        }
        # 0.15: over four standard errors, 0.032, of 3 seeds × 16 tokens × 32 and 64 entries
        assert float(said["norm"][0]) == pytest.approx(0.5, abs=0.15)
        assert float(said["mean_abs"][0].replace("−", "-")) == pytest.approx(0, abs=0.15)
        ends = curves[(curves["init"] == init) & (curves["block"] == 1)]
        logs = np.log(ends.groupby(["width", "seed"])["norm"].last().unstack())
        slope = float((logs.loc[64] - logs.loc[32]).mean() / math.log(2))
        assert f"{slope:+.2f}" in said["norm"]


def test_statistics_say_what_is_left_out():
    """Ten values of another key are more than there are rows."""
    one = sweep(*BASE, "depth=2", width=(32, 64), init=("normal", "fan_in"))[0]
    frames = [one.assign(**{"job": one["job"] + 4 * i, "norm.eps": i}) for i in range(10)]
    swept = {"width": [32, 64], "init": ["normal", "fan_in"], "norm.eps": list(range(10))}
    figure = figures(pd.concat(frames), pd.DataFrame(), swept, "t")["statistics"]
    assert len({ax.get_gid().split()[0] for ax in figure.axes}) == 8
    said = " ".join(text.get_text() for text in figure.texts)
    assert "norm.eps=0, norm.eps=3, norm.eps=6, norm.eps=9, of 10." in said


def test_a_swept_seed_is_a_band():
    base = [*SHAPE, "inputs.length=8", "device=cpu"]
    curves, jobs, swept = sweep(*base, "depth=2", "seeds=1", seed=(0, 1, 2, 3))
    figure = drawn((curves, jobs, swept))["growth"]
    assert has(figure.axes[0], curves.groupby("sublayer")["mean_square"].mean())
    assert "4 seeds: mean, min to max" in legend(figure)
    # Of a swept count each seed is drawn once; exponents of several jobs are their mean.
    more = sweep(*base, "depth=2", seeds=(2, 4))
    four = more[0].query("job == 1").groupby("sublayer")["mean_square"].mean()
    assert has(drawn(more)["growth"].axes[0], four)
    both = sweep(*base, "seeds=1", depth=(2, 3), seed=(0, 1))
    assert has(drawn(both)["lambda"].axes[0], both[1].groupby("depth")["lambda_token"].mean())


def test_checkpoints_are_coloured_and_random_inits_grey(steps):
    (curves, *_), of_sweep = steps
    figure = of_sweep["growth"]
    (ax,) = figure.axes
    assert legend(figure)[:3] == ["source.step=0", "source.step=final", "random init"]
    for (_, name), rows in curves.groupby(["job", "curve"]):
        mean = rows.groupby("sublayer")["mean_square"].mean()
        assert has(ax, mean)
        assert has(ax, mean, GREY) == (name == "random")


def test_overflow_marker(tmp_path):
    curves, jobs, swept = sweep(
        *BASE, "dtype=float16", "norm=none", "depth=8", init__std=(0.02, 0.2, 500)
    )
    assert (jobs["overflow"] > 0).sum() == 2
    made = drawn((curves, jobs, swept))
    crosses = [
        line.get_xdata()[0] for line in made["growth"].axes[0].lines if line.get_marker() == "x"
    ]
    ends = curves.groupby(["job", "seed"])["sublayer"].max().groupby("job").min()
    assert sorted(crosses) == sorted(ends[jobs["job"][jobs["overflow"] > 0]])
    assert "a seed's curve ends: overflow" in legend(made["growth"])
    save(made["lambda"], tmp_path, "lambda")


def test_odd_frames_do_not_crash(tmp_path, steps):
    none = pd.DataFrame()
    assert figures(none, none, {"depth": [1, 2]}, "t") == {}
    curves, jobs, swept = steps[0]
    measured = [c for c in curves.select_dtypes("float") if c not in swept]
    numbers = [c for c in jobs.select_dtypes("float") if c not in swept]
    nothing = jobs.assign(**dict.fromkeys(numbers, np.nan))
    for value in (np.nan, np.inf):
        assert figures(curves.assign(**dict.fromkeys(measured, value)), nothing, swept, "t") == {}
    for empty in (nothing, none):
        assert set(figures(curves, empty, swept, "t")) == {"growth"}
    assert set(figures(none, jobs, swept, "t")) == {"lambda"}
    holes = curves.assign(mean_square=curves["mean_square"].where(curves["job"] == 1))
    for name, figure in figures(holes, jobs.iloc[:1], swept, "t").items():
        save(figure, tmp_path, name)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"d_ff": range(1, 31)}, ["10 of the 30 values of d_ff"]),
        ({"source.path": [f"/a/folder/far/off/step{i}" for i in range(20)]}, ["10 of the 20"]),
        ({"model": [f"model_{i}" for i in range(7)], "d_ff": [1, 2]}, []),
        ({"norm_placement": [*"abcdefg"], "init.std": [1, 2], "d_ff": [8, 16, 32]},
         ["6 of the 7 values of norm"]),
        ({"norm.eps": [1e-6, 1e-5], "init": [*"ab"], "d_ff": [1, 2, 3], "qk": [*"xy"]},
         ["norm.eps=1e-06 alone, of its 2 values"]),
        ({"init.truncate": [None, 3.0], "gradients": [True, False]}, []),
        ({"a": [*"abcdefghijklmnopqrstuvwxyzäöü"]}, ["24 of the 29 values of a"]),
    ],
    ids=lambda x: " × ".join(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_a_title_says_what_is_left_out(axes, said):
    """Each line is one job's mean, and every job has one, or the title says which values are shown."""
    one = sweep(*BASE, depth=(2, 4))[0].query("depth == 2").drop(columns=["job", "depth"])
    jobs = enumerate(itertools.product(*axes.values()))
    swept = [{"job": job} | dict(zip(axes, values, strict=True)) for job, values in jobs]
    frames = [one.assign(mean_square=one["mean_square"] + of["job"], **of) for of in swept]
    curves = pd.concat(frames, ignore_index=True)
    figure = figures(curves, pd.DataFrame(), axes, "t")["growth"]
    title = " ".join(figure.get_suptitle().split())
    assert ("Shown: " in title) == bool(said)
    assert all(words in title for words in said)
    assert len(figure.axes) <= 24
    assert len(legend(figure)) <= 15  # 10 values, the seeds, three laws and theory's band
    means = {tuple(f.groupby("sublayer")["mean_square"].mean().round(6)) for f in frames}
    seen = {tuple(np.round(np.asarray(line.get_ydata(), float), 6)) for ax in figure.axes
            for line in ax.lines if line.get_linestyle() == "-" and len(line.get_xdata())}  # fmt: skip
    assert seen <= means
    assert said or seen == means


def test_plan_of_colours_and_panels():
    swept = {"a": [*"abc"], "b": [1, 2, 3], "c": [1, 2], "d": [4, 5]}
    rows = [dict(zip(swept, v, strict=True)) for v in itertools.product(*swept.values())]
    frame, keys = labelled(pd.DataFrame(rows).assign(curve="random", job=range(len(rows))), swept)
    made = plan(frame, keys)
    assert (made.colour, made.column, made.row) == ("b", "a", "c")
    assert made.notes == ["Shown: d=4 alone, of its 2 values."]
    assert set(made.frame["d"]) == {"4"}


def test_the_same_frames_give_the_same_files(tmp_path, steps):
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths = save(drawn(steps[0])["growth"], tmp_path / name, "growth", svg=True)
        files.append([path.read_bytes() for path in paths])
    assert len(files[0]) == 2
    assert files[0] == files[1]


def test_value_texts():
    assert [value_text(v) for v in (1, 1.0, "1", 1e-6, "1e-6", None, math.nan, True, "final")] == [
        "1", "1", "1", "1e-06", "1e-06", "null", "null", "true", "final",
    ]  # fmt: skip
    assert shorten("/a/long/path/to/step1000", 10) == "…/step1000"
    assert shorten("residual_scale", 9) == "residual…"
    assert shorten("0.9*x + F(N(x))/sqrt(L)", 12) == "0.9*x …rt(L)"
