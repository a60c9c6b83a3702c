"""report.html of a check of recorded curves: expected and new curves of each case, in one page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd

from simlab.analysis.numbers import duration
from simlab.config import printable
from simlab.experiment.summary import versions
from simlab.regress.cases import Checked
from simlab.report.page import PAGE
from simlab.report.page.build import html_of, names
from simlab.report.page.payload import Drawn, curve_values, steps_of
from simlab.report.page.quantities import BY_SUBLAYER
from simlab.store import write_atomically, write_text


def write_report(folder: Path, done: Sequence[Checked]) -> Path:
    """report.html: the cases' verdicts, curves and a table."""
    failed = [checked.case.name for checked in done if not checked.passed]
    count = f"{len(done)} case{'s' if len(done) != 1 else ''}"
    data = {
        "title": "Growth curves against the recorded ones",
        "headline": f"{len(failed)} of {count} fail: {', '.join(failed)}"
        if failed else f"{count}: all pass",
        "warnings": [
            f"{checked.case.name}, {outcome.gate}: {outcome.why}."
            for checked in done for outcome in checked.outcomes if not outcome.passed
        ],
        "notes": "Why cases fail",
        "lines": [],
        "tiles": [],
        "jobs": [_curves(checked) for checked in done],
        "start": 0,
        "noun": "case",
        "table": {
            "heads": ["case", "result", "gates", "time", "what it is"],
            "rows": [_row(checked) for checked in done],
        },
        "command": shlex.join(
            ["python", "-m", "simlab.regress", *(c.case.name for c in done), "--html", str(folder)]
        ),
        "facts": [
            ("checked", str(date.today())),
            ("versions", ", ".join(f"{name} {number}" for name, number in versions().items())),
        ],
        "config": "\n".join(f"{c.case.name}: {printable(c.case.command)}" for c in done),
        "quantities": names(),
    }  # fmt: skip
    path = folder / PAGE
    write_atomically(path, lambda aside: write_text(aside, html_of(data)))
    return path


def _row(checked: Checked) -> list[str]:
    gates = ", ".join(f"{o.gate} {o.short}" for o in checked.outcomes)
    passed = "pass" if checked.passed else "FAIL"
    name, about = checked.case.name, printable(checked.case.description)
    return [name, passed, gates, duration(checked.seconds), about]


def _curves(checked: Checked) -> dict[str, Any]:
    """A case's expected and new curves, of the random inits or else of the checkpoint."""
    drawn = "random" if (checked.got["curve"] == "random").any() else "checkpoint"
    columns = [q for q in BY_SUBLAYER if q in checked.got and q in checked.case.quantities]
    curves = []
    for name, frame in (("expected", checked.expected), ("got", checked.got)):
        rows = frame[frame["curve"] == drawn]
        if rows.empty:
            continue
        rows = rows.assign(curve=name)
        values = curve_values(
            rows, name, pd.DataFrame(columns=["curve", "of"]), Drawn(columns=columns)
        )
        curves.append({"name": name, "label": name, "steps": steps_of(rows), **values})
    depth = int(checked.got["block"].max()) + 1
    return {
        "label": checked.case.name,
        "curves": curves,
        "laws": [],
        "depth": depth,
        "sublayers": int(checked.got["sublayer"].max()),
        "departure": None,
    }
