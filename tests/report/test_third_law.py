"""A third law is one entry of the registry: every table, figure, sentence and column has it."""

import io

import numpy as np
import pytest
from conftest import tiny
from rich.console import Console

from simlab.analysis import LAWS, Law
from simlab.experiment import run
from simlab.regress.law_gate import law as law_gate
from simlab.report import style
from simlab.report.figure import lambda_figure
from simlab.report.growth_figure import growth_figure
from simlab.report.table import growth_table, lambda_table
from simlab.store import SUMMARY, write_json
from simlab.sweep import report
from simlab.sweep.job import PLAN, write_tables

DUMMY = Law(
    "flat", lambda rows: np.log(rows.first)[:, None] + 0.1 * np.arange(len(rows.kinds)),
    "flat", "flat law", "the flat law", "#123456", (0, (7, 3)), expected=True,
)  # fmt: skip
BASE = ["seeds=11", "depth=4", "engine=weightless"]


def text_of(table):
    to = Console(width=120, file=io.StringIO(), record=True)
    to.print(table)
    return to.export_text()


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def lines_in(figure, colour):
    return sum(line.get_color() == colour for ax in figure.axes for line in ax.lines)


def names_in(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def shown_of_a_run(folder):
    """What a run's figures, tables, sentences and files say of the laws."""
    result = run(tiny(*BASE))
    frame, summary = result.curve, result.summary
    write_tables(result.curve, result.weights, folder)
    gate = law_gate(frame, result.verdicts["random"], 1.0, "float32")
    growth, lambdas = growth_figure(frame, "t", []), lambda_figure(frame, 4, "t")
    return {
        "curve.csv": (folder / "curve.csv").read_text().splitlines()[0],
        "growth.png": f"{names_in(growth)} {lines_in(growth, DUMMY.colour)}",
        "lambda.png": f"{legend(lambdas)} {lines_in(lambdas, DUMMY.colour)}",
        "table": text_of(growth_table(frame, "random")),
        "exponents": text_of(lambda_table(summary["lambda"]["random"])),
        "verdict": result.verdicts["random"].sentence,
        "theories": str(list(summary["theories"]["random"])),
        "lambda": str(list(summary["lambda"]["random"])),
        "gate": str(gate.finding and gate.finding.against),
    }


def shown_of_a_sweep(folder, capsys, monkeypatch):
    """What a sweep's report says of the laws: two jobs of one key."""
    jobs, drawn = [], {}
    for job, depth in enumerate((2, 4)):
        of_job = folder / str(job)
        of_job.mkdir(parents=True)
        result = run(tiny(*BASE, f"depth={depth}"))
        write_tables(result.curve, result.weights, of_job)
        write_json(of_job / SUMMARY, result.summary)
        jobs.append({"job": job, "folder": str(job), "overrides": [], "values": {"depth": depth}})
    write_json(folder / PLAN, {"swept": {"depth": [2, 4]}, "jobs": jobs})
    monkeypatch.setattr(
        style, "save", lambda figure, _, name, **__: drawn.update({name: figure}) or []
    )
    assert report.report(folder)
    return {
        "jobs.csv": (folder / "jobs.csv").read_text().splitlines()[0],
        "sweep's growth.png": str(legend(drawn["growth"])),
        "sweep's lambda.png": str(legend(drawn["lambda"].subfigs[0])),
        "sweep's table": capsys.readouterr().out,
    }


@pytest.mark.parametrize("registered", [True, False])
def test_a_third_law_is_shown_everywhere(registered, tmp_path, capsys, monkeypatch):
    """And the negative control: unless it is registered it is shown nowhere."""
    if registered:
        monkeypatch.setitem(LAWS, DUMMY.name, DUMMY)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    shown = shown_of_a_run(run_dir)
    capsys.readouterr()
    shown |= shown_of_a_sweep(tmp_path / "sweep", capsys, monkeypatch)
    for place, text in shown.items():
        assert ("flat" in text) == registered, place
