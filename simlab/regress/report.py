"""The output of ``simlab.regress``: a line per case, figures, a page, JUnit XML."""

from __future__ import annotations

import html
import shutil
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from simlab.analysis import LAWS
from simlab.analysis.numbers import duration
from simlab.config import printable
from simlab.regress.case_figure import case_figure
from simlab.regress.cases import Case, Checked
from simlab.regress.gates import GATE_ALPHA, RTOL, SIGNED, Finding, relative_error
from simlab.report.style import save
from simlab.store import write_atomically, write_text

_PASS_OR_FAIL = {True: "pass", False: "FAIL"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color-scheme: light dark; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100%; display: block; overflow-x: auto }
table { overflow-wrap: normal }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid #ddd; vertical-align: top }
.FAIL { color: light-dark(#b00020, #ff8a80); font-weight: 600 }
.pass { color: light-dark(#1a7f37, #5fce95) }
img { max-width: 100% } code { white-space: pre-wrap } p.why { color: light-dark(#b00020, #ff8a80) }
"""


def _columns() -> int:
    return min(100, shutil.get_terminal_size((80, 24)).columns)


def show_line(checked: Checked, width: int = 0) -> None:
    """One line per case; below it, a sentence for each gate that fails."""
    gates = "  ".join(
        f"{o.gate} {o.short}" + ("" if o.passed else " FAIL") for o in checked.outcomes
    )
    took = duration(checked.seconds)
    print(
        f"{_PASS_OR_FAIL[checked.passed]}  {checked.case.name:{width}}  {took:>6}  {gates}",
        flush=True,
    )
    for outcome in checked.outcomes:
        if not outcome.passed:
            line = f"{outcome.gate}: {outcome.why}."
            print(
                textwrap.fill(line, _columns(), initial_indent="      ", subsequent_indent="      ")
            )


def show_list(cases: Sequence[tuple[Case, Mapping[str, str]]]) -> None:
    """Every case: its gates and quantities, what it runs, and why it was last recorded."""
    indent = " " * 4

    def wrapped(text: str) -> str:
        return textwrap.fill(
            text, _columns(), initial_indent=indent, subsequent_indent=indent + "  "
        )

    for case, about in cases:
        print(f"{case.name}: {printable(case.description) or 'no description'}")
        print(wrapped(f"gates {', '.join(case.gates)}; of {', '.join(case.quantities)}"))
        print(wrapped(f"run {' '.join(case.overrides)}"))
        reason = "needs no record" if not case.recorded else "not recorded yet"
        print(wrapped(f"recorded: {about['reason']}" if "reason" in about else reason))


def show_end(done: Sequence[Checked], files: Sequence[Path]) -> None:
    """The closing lines: the count of passed cases, a legend of the figures, and the files' paths."""
    failed = [checked.case.name for checked in done if not checked.passed]
    count = f"{len(done)} case{'s' if len(done) != 1 else ''}"
    took = duration(sum(checked.seconds for checked in done))
    end = f"{len(failed)} FAIL ({', '.join(failed)})" if failed else "all pass"
    print()
    print(textwrap.fill(f"{count}: {end}, in {took}.", _columns()))
    expected = [law.phrase for law in LAWS.values() if law.expected and law.exact]
    laws = " and ".join(expected)
    says = {
        "exact": f"exact: largest relative difference; allowed: {RTOL['float32']:.0e} in float32,"
        f" {RTOL['float16']:.0e} in float16, {RTOL['bfloat16']:.0e} in bfloat16",
        "statistical": "statistical: largest difference in standard errors / what chance explains"
        f" (of all cases together it is a false alarm in 1 run of {1 / GATE_ALPHA:.0f})",
        "law": f"law: {laws} hold{'s' if len(expected) == 1 else ''}, interval of the exponent p",
        "theory": "theory: largest departure from the predicted curve, in standard errors / what"
        f" chance explains (of all cases together a false alarm in 1 run of {1 / GATE_ALPHA:.0f})",
    }
    used = {outcome.gate for checked in done for outcome in checked.outcomes}
    for gate, line in says.items():
        if gate in used:
            print(textwrap.fill(line, _columns(), subsequent_indent="  "))
    for path in files:
        print(path)


def changes(
    before: pd.DataFrame | None, after: pd.DataFrame, quantities: Sequence[str]
) -> list[str]:
    """The changes made by recording anew: the largest relative change of each quantity."""
    if before is None:
        return [f"recorded {len(after)} rows of {len(quantities)} quantities"]
    if len(before) != len(after):
        return [f"recorded {len(after)} rows, before {len(before)}"]
    lines = []
    for q in quantities:
        most = float(relative_error(before[q], after[q], q in SIGNED).max())
        lines.append(f"{q}: changed by up to {most:.1e}" if most else f"{q}: as before")
    return lines


def draw_cases(
    done: Sequence[Checked], folder: Path, *, every: bool, svg: bool = False
) -> list[Path]:
    """NAME.png of each case that fails, or of every one, and with ``svg`` NAME.svg; the PNGs' paths."""
    paths = []
    for checked in done:
        if every or not checked.passed:
            folder.mkdir(parents=True, exist_ok=True)
            paths.append(save(case_figure(checked), folder, checked.case.name, svg=svg)[0])
    return paths


def write_page(folder: Path, done: Sequence[Checked]) -> Path:
    """index.html: a table of the cases, then a figure of each; it needs no script."""

    def esc(text: object) -> str:
        return html.escape(str(text))

    rows, parts = [], []
    for checked in done:
        name, word = esc(checked.case.name), _PASS_OR_FAIL[checked.passed]
        gates = "<br>".join(
            f'<span class="{_PASS_OR_FAIL[o.passed]}">{esc(o.gate)} {esc(o.short)}</span>'
            for o in checked.outcomes
        )
        rows.append(
            f'<tr><td><a href="#{name}">{name}</a></td><td class="{word}">{word}</td>'
            f"<td>{gates}</td><td>{duration(checked.seconds)}</td></tr>"
        )
        why = "".join(
            f'<p class="why">{esc(o.gate)}: {esc(o.why)}.</p>' for o in checked.outcomes if o.why
        )
        parts.append(
            f'<h2 id="{name}">{name}</h2><p>{esc(checked.case.description)}</p>'
            f"<p><code>{esc(' '.join(checked.case.overrides))}</code></p>{why}"
            f'<p><a href="{name}.png"><img src="{name}.png" alt="{name}"></a></p>'
        )
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>simlab.regress</title><style>{STYLE}</style></head><body><h1>Growth curves</h1>"
        '<p><a href="report.html">The curves, to look at more closely</a></p>'
        f"<table><tr><th>case</th><th></th><th>gates</th><th>time</th></tr>{''.join(rows)}</table>"
        f"{''.join(parts)}</body></html>\n"
    )
    path = folder / "index.html"
    write_atomically(path, lambda aside: write_text(aside, text))
    return path


def write_junit(path: Path, done: Sequence[Checked]) -> Path:
    """JUnit XML: a test per case and gate; a case's time is its first gate's."""
    suite = ET.Element("testsuite", name="simlab.regress")
    failures = 0
    for checked in done:
        seconds = checked.seconds
        for outcome in checked.outcomes:
            test = ET.SubElement(
                suite, "testcase", classname="simlab.regress",
                name=f"{checked.case.name}[{outcome.gate}]", time=f"{seconds:.3f}",
            )  # fmt: skip
            seconds = 0.0
            if not outcome.passed:
                failures += 1
                failure = ET.SubElement(test, "failure", message=outcome.why)
                failure.text = _detail(outcome.finding) if outcome.finding else outcome.why
    suite.set("tests", str(sum(len(checked.outcomes) for checked in done)))
    suite.set("failures", str(failures))
    suite.set("errors", "0")
    suite.set("time", f"{sum(checked.seconds for checked in done):.3f}")
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    data = ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
    write_atomically(path, lambda aside: write_text(aside, data))
    return path


def _detail(finding: Finding) -> str:
    pairs = {
        "where": finding.where, "quantity": finding.quantity, "expected": finding.expected,
        "got": finding.got, "size": finding.size, "limit": finding.limit, "blame": finding.blame,
    }  # fmt: skip
    return "\n".join(f"{key}: {value}" for key, value in pairs.items())
