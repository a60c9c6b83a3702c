"""A sweep's tables fit 80 columns and say which rows they leave out."""

import io
import itertools

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from simlab.report.page.sweep import jobs_data
from simlab.report.sweep_table import failed_table, jobs_table


def lines_of(table):
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table)
    return [line.rstrip() for line in console.export_text().splitlines()]


def made_up(**axes):
    """A row per job of a sweep that nobody ran; axes: key with __ for a dot: its values."""
    keys = [key.replace("__", ".") for key in axes]
    measured = {
        "curve": "random", "mean_square": 1.5, "per_sublayer": 1.02, "shape": "power",
        "exponent": 1.0, "rate": np.nan, "lambda_token": 0.3, "additive": "holds",
        "additive_error": 0.02, "overflow": 0,
    }  # fmt: skip
    rows = [
        {"job": job} | dict(zip(keys, values, strict=True)) | measured
        for job, values in enumerate(itertools.product(*axes.values()))
    ]
    return pd.DataFrame(rows), {key: list(v) for key, v in zip(keys, axes.values(), strict=True)}


def test_rows_of_jobs():
    jobs, swept = made_up(
        depth=(2, 4, 8), init__std=(0.01, 0.02), norm_placement=("reordered", "pre")
    )
    lines = lines_of(jobs_table(jobs, swept))
    assert lines[0].split()[:4] == ["job", "depth", "std", "norm"]
    assert len(lines) == 1 + len(jobs)
    assert max(map(len, lines)) <= 80
    assert lines[1].split()[:4] == ["0", "2", "0.01", "reordered"]
    assert "p = 1.00" in lines[1]


def test_formulas_are_whole():
    formula = "0.9*x + 0.1*x0 + sqrt(2)*F(N(x))/sqrt(L)/sqrt(l+1)"
    lines = lines_of(jobs_table(*made_up(norm__update=("x + F(N(x))", formula))))
    assert max(map(len, lines)) <= 80
    column = slice(lines[0].index("update"), lines[0].index("mean sq."))
    assert "".join("".join(line[column].split()) for line in lines[2:]) == formula.replace(" ", "")


def test_long_table_caption():
    jobs, swept = made_up(width=[1, 2, 3, 4], init__std=range(1, 13), norm_placement=["a", "b"])
    lines = lines_of(jobs_table(jobs, swept))
    assert lines[-1] == "64 of 96 rows are left out; jobs.csv has them all."
    assert {line.split()[3] for line in lines[1:-1]} == {"a", "b"}
    assert len(lines) == 34


def test_tables_fit_80_columns():
    assert lines_of(jobs_table(pd.DataFrame(), {}))
    paths, keys = made_up(
        source__path=[f"/some/where/far/off/in/a/folder/step{i}" for i in range(20)]
    )
    assert max(map(len, lines_of(jobs_table(paths, keys)))) <= 80
    many, keys = made_up(**{f"a_long_key_{i}": [1, 2] for i in range(7)})
    many["overflow"] = 1
    lines = lines_of(jobs_table(many, keys))
    assert max(map(len, lines)) <= 80
    assert "×" in lines[1]
    assert "No room for" in " ".join(lines)
    nothing = many.assign(**dict.fromkeys(many.select_dtypes("float"), np.nan))
    assert max(map(len, lines_of(jobs_table(nothing, keys)))) <= 80


@pytest.mark.parametrize("width", [45, 50, 60, 70])
def test_narrow_terminals_lose_columns_not_digits(width):
    jobs, swept = made_up(depth=(2, 4), norm_placement=("reordered", "pre"))
    jobs = jobs.assign(additive="holds", additive_error=0.0123, mean_field="holds")
    lines = lines_of(jobs_table(jobs, swept, width))
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines[:5])
    assert lines[1].split()[:3] == ["0", "2", "reordered"]
    assert ("additive" in lines[0]) == ("No room for" not in " ".join(lines))


def test_swept_keys_come_before_lambda_and_growth():
    """Else the rows of +experiment=issue797 can't be told apart; a saw-tooth's value is its peak."""
    jobs, swept = made_up(
        model=("olmo2_7b", "olmo2_13b"), norm_placement=("reordered", "swin_renorm")
    )
    saw = jobs["norm_placement"] == "swin_renorm"
    jobs["peak"] = np.where(saw, 13.1, np.nan)
    jobs["shape"] = np.where(saw, "saw-tooth", "linear")
    laws = {
        "additive": "holds",
        "additive_error": 0.0123,
        "mean_field": "holds",
        "mean_field_error": 0.01,
    }
    jobs = jobs.assign(**laws)
    lines = lines_of(jobs_table(jobs, swept))
    assert max(map(len, lines)) <= 80
    assert "λ" not in lines[0]
    assert lines[1].split()[:6] == ["0", "olmo2_7b", "reordered", "1.5", "1.02", "linear"]
    assert lines[2].split()[:5] == ["1", "olmo2_7b", "swin_renorm", "≤", "13.1"]
    assert lines[-1] == "≤: a saw-tooth, its largest peak."


WORDS = {  # of jobs.csv, and how the terminal and the page say it
    ("random", "holds", 0.0123): ("holds, 1.2 %", "holds, 1.2 %"),
    ("random", "fails", 0.4): ("off, 49 %", "off, 49 %"),
    ("random", "unknown", 0.07): ("?, 7.3 %", "not decided, 7.3 %"),
    ("random", "unknown", np.nan): ("", None),  # pre: no additive law
    ("theory", "unknown", 0.01): ("holds, 1 %", "holds, 1 %"),  # no chance in it
    ("checkpoint", "unknown", 3.0): ("off, ×20", "off, ×20"),
}


def test_laws_have_one_decision_in_every_table():
    jobs, swept = made_up(depth=range(len(WORDS)))
    jobs[["curve", "additive", "additive_error"]] = list(WORDS)
    jobs["shape"], jobs["exponent"] = "none", np.nan
    lines, page = lines_of(jobs_table(jobs, swept)), jobs_data(jobs, list(swept))
    law, growth = page["heads"].index("additive law"), page["heads"].index("growth")
    start = lines[0].index("additive")
    for line, row, said in zip(lines[1:], page["rows"], WORDS.values(), strict=False):
        assert (line[start:], row[law]) == said
        assert "no shape" in line
        assert row[growth] == "no shape"
    told = "chance may explain it; fewer than 8 seeds tell a factor of 2 or more only."
    assert " ".join(lines[-2:]) == f"?: not decided, {told}"


def test_failed_jobs_and_their_errors():
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
