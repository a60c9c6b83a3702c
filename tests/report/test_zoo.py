"""The answer norm_zoo: its numbers against the model's own tensors, its table and its figure."""

import dataclasses
import math

import pandas as pd
import pytest
import torch
from conftest import ids_of, placed, tiny

from simlab import build_model
from simlab.experiment import run
from simlab.model.placement import ResidualAdd
from simlab.report.answer import WRITERS
from simlab.report.console import show_sweep
from simlab.report.swept import SweptJob
from simlab.report.zoo import kept_bits, zoo_rows
from simlab.report.zoo_figure import zoo_figure

NAMES = ("reordered", "post", "keel", "deepnorm", "pre", "none", "rezero", "minimax", "hybrid_norm")


def job(name, *overrides):
    result = run(tiny(*placed(name), "gradients=true", "init.std=0.1", *overrides))
    return SweptJob({"norm_placement": name}, "", result.curve, result.summary)


@pytest.mark.parametrize("name", NAMES)
def test_bits_are_those_of_the_adds(name):
    """8 + log2 of the branch's rms over the sum's, at the last block's two adds."""
    config = tiny(*placed(name), "gradients=true", "init.std=0.1")
    seed = config.seeds[0]
    model, seen = build_model(dataclasses.replace(config, seeds=(seed,))), []
    for block in model.blocks[-1:]:
        for module in block.modules():
            if isinstance(module, ResidualAdd):
                module.register_forward_hook(lambda m, args, out: seen.append((args[1], out)))
    with torch.no_grad():
        model(ids_of(config))
    (row,) = zoo_rows([job(name)])
    rms = [(b.square().mean().sqrt(), s.square().mean().sqrt()) for b, s in seen]
    expected = min((8 + math.log2(b / s) for b, s in rms if b > 0), default=math.nan)
    # The sum's mean square behind a norm is a harmonic mean over tokens.
    assert row.bits == pytest.approx(expected, abs=0.02, nan_ok=True)
    assert row.room == pytest.approx(128 - math.log2(job(name).frame["max_abs"].max()), abs=0.01)


@pytest.mark.parametrize("name", ["reordered", "post", "peri"])
def test_branches_of_zero_have_no_bits(name):
    """As at nanochat's init; where a norm acts on them, m/(m + eps) is 0."""
    result = run(tiny(*placed(name), "init=nanochat"))
    (row,) = zoo_rows([SweptJob({"norm_placement": name}, "", result.curve, result.summary)])
    assert math.isnan(row.bits)
    assert row.predicted == pytest.approx(row.v, rel=0.1)
    sentence = result.summary["verdict"]["random"]["sentence"]
    assert "every branch is 0" in sentence
    assert "eps" not in sentence


def test_a_sum_that_is_normed_is_told():
    """Negative control: taken for the stream that keel norms, its sum has 4 bits of 7 more."""
    frame = job("keel").frame
    last = frame[frame["block"] == 2]
    assert kept_bits(last, 1e-6) < kept_bits(last.assign(gain_mean_square=2.0), 1e-6) - 2


def test_rows_table_and_figure(tmp_path):
    jobs = [job(name) for name in ("reordered", "rezero", "post")]
    jobs.append(SweptJob({"norm_placement": "pre"}, "it broke"))
    rows = zoo_rows(jobs)
    assert [row.name for row in rows] == ["rezero", "post", "reordered"]
    by_name = {row.name: row for row in rows}
    curve = next(j for j in jobs if j.values["norm_placement"] == "reordered").frame
    first, last = curve[curve["block"] == 0].iloc[-1], curve.iloc[-1]
    reordered = by_name["reordered"]
    assert reordered.v == last["mean_square"]
    assert reordered.predicted == last["law_mean_field"]
    assert reordered.gradient == first["gradient_rms"] / last["gradient_rms"]
    assert reordered.predicted_gradient == first["law_gradient_rms"] / last["law_gradient_rms"]
    assert reordered.predicted_gradient == pytest.approx(reordered.gradient, rel=0.3)
    assert reordered.cosine == last["token_cosine"]
    assert by_name["rezero"].gradient == 1
    assert math.isnan(by_name["rezero"].bits)
    text = WRITERS["norm_zoo"](jobs)
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert table[0] == "| placement | v | theory | growth | grad. | cosine | bits | room |"
    assert len(table) == 2 + 3
    assert next(line for line in table if "rezero" in line).split(" | ")[6] == "–"
    assert "pre (it broke)" in text
    assert "Theory's grad. is off by" in text
    assert "nan" not in text.lower()
    figure = zoo_figure(rows, "a line")
    assert len(figure.axes) == 4
    for ax in figure.axes:  # a log axis of less than a decade labels its minor ticks
        ticks = [*ax.xaxis.get_major_ticks(), *ax.xaxis.get_minor_ticks()]
        assert {tick.label1.get_size() for tick in ticks} == {8.5}
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [row.name for row in rows]


def test_why_theory_has_no_gradient():
    found = job("pre", "model.tied=true", "init=llama", "depth=1")
    text = WRITERS["norm_zoo"]([found, job("post")])
    (reason,) = [line for line in text.splitlines() if "no gradient of" in line]
    assert reason.startswith("Theory has no gradient of pre: the head is tied")


def test_theory_alone_and_two_models():
    one, other = (
        dataclasses.replace(j, values={"norm_placement": "peri", "depth": d})
        for d, j in (
            (3, job("peri", "engine=theory")),
            (2, job("peri", "engine=theory", "depth=2")),
        )
    )
    rows = zoo_rows([one, other])
    assert [row.group for row in rows] == ["3", "2"]
    assert all(math.isnan(row.room) and math.isfinite(row.v) for row in rows)
    assert WRITERS["norm_zoo"]([one, other]).count("| placement") == 2


def test_formulas_are_code_in_the_answer():
    """Markdown takes the stars of a formula for marks."""
    text = "0.9*x + 0.5*F(N(x))"
    told = [job("custom", f'norm.update="{text}"') for _ in range(2)]
    swept = [dataclasses.replace(told[0], values={"norm.update": text}), told[1]]
    assert [row.name for row in zoo_rows(swept)] == [text, "custom"]
    assert f"| `{text}` |" in WRITERS["norm_zoo"](swept)
    assert f"| 7B `custom {text}` |" in WRITERS["issue797"](told)


def test_nothing_ended():
    assert "No job has ended" in WRITERS["norm_zoo"]([SweptJob({"norm_placement": "pre"}, "broke")])


def test_a_curve_that_overflows_says_where_it_ends():
    found = job("none", "init.std=1e6")
    (row,) = zoo_rows([found])
    assert row.ends.startswith("ends after sublayer ")
    text = WRITERS["norm_zoo"]([found, job("pre")])
    assert f"the numbers are its last ones: none {row.ends}." in text
    assert " × |" in next(line for line in text.splitlines() if line.startswith("| none"))
    figure = zoo_figure(zoo_rows([found, job("pre")]), "a line")
    assert figure.axes[0].get_xlim()[1] < 1e9  # of pre's, not of 1e38
    assert math.isfinite(row.v)


def test_names_are_whole_on_a_screen(capsys, monkeypatch):
    """At 80 characters, with the widest numbers that docs/norm_zoo.md has; rich alone cuts them."""
    monkeypatch.setenv("COLUMNS", "80")
    wide = (
        "`x + 0.1*x0 + F(N(x))/sqrt(L)`",
        "hybrid_norm_star",
        "hybrid_norm",
        "hyper_connections",
    )
    head = "| placement | v | theory | growth | grad. | cosine | bits | room |"
    numbers = "0.00403 | 0.0043 | exponential | 3.2e9 | -8.9e-4 | -1.3 | 132 |"
    lines = [head, "| --- " + "| ---: " * 7 + "|", *(f"| {name} | {numbers}" for name in wide)]
    show_sweep("4 jobs", pd.DataFrame(), {}, {}, {}, [], 0, [], answer="\n".join(lines))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert all(name in out.split() for name in wide[1:])
