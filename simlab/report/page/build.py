"""report.html: the page of a run, from its curves' rows and its summary."""

from __future__ import annotations

import base64
import functools
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from simlab.analysis import LAWS
from simlab.analysis.decision import HOLDS, OFF, UNDECIDED, UNTOLD, decision
from simlab.analysis.headline import headline
from simlab.analysis.massive import most_massive, place
from simlab.analysis.numbers import off_by, plus_minus, short
from simlab.analysis.resampling import Estimate
from simlab.analysis.tokens import skewed
from simlab.config.command_line import shell_word
from simlab.report.colours import LABELS
from simlab.report.console import ENGINES_BESIDE, lost_lines, overflow_lines, streams_lines
from simlab.report.page.payload import Drawn, job_values
from simlab.report.page.quantities import BY_BLOCK, DRAWABLE

_HERE = Path(__file__).parent
TILE_CLASS = {HOLDS: "good", OFF: "bad"}  # of a decision on a law
_STREAMS = (
    '<section class="card"><h2>The vectors between two steps</h2><img class="figure" alt="Mean square, '
    "cosine between tokens and cosine to the stream of each vector that the placement carries, by "
    'sublayer; the numbers are in streams.csv" src="data:image/png;base64,DATA"></section>\n'
)
EPS_TAKES = 0.9  # of m/(m + eps): below, eps takes a tenth of a norm's output


@dataclass(frozen=True)
class PageJob:
    """A run as a page shows it: its label beside other jobs, its curve.csv and its summary.json.

    values: of the swept keys.
    """

    label: str
    frame: pd.DataFrame
    summary: Mapping[str, Any]
    values: Mapping[str, Any] = field(default_factory=dict)


def command_of(overrides: Sequence[str], sweep: bool = False) -> str:
    """The command line that makes a run or a sweep with these overrides, as a shell takes it."""
    words = map(shell_word, overrides)
    return " ".join(["python", "-m", "simlab.run", *(["-m"] if sweep else []), *words])


def command_in(summary: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """What makes a run again: the command line, or of a probed module the call in Python."""
    return summary.get("call") or command_of(overrides)


def run_page(
    frame: pd.DataFrame, summary: Mapping[str, Any], title: str, command: str, written: str,
    streams: bytes | None = None,
) -> str:  # fmt: skip
    """The page of one run, as HTML. frame: the rows of curve.csv. summary: that of summary.json.

    command: what makes it again, on the command line or in Python. written: when it was measured, as a
    text. streams: streams.png, where the run has one.
    """
    data = {
        "title": title,
        "headline": headline(frame, summary),
        "warnings": list(warnings(frame, summary)),
        "lines": list(lines(summary)),
        "tiles": list(tiles(frame, summary)),
        "jobs": [{"label": "", **job_data(PageJob("", frame, summary), Drawn())}],
        "table": None,
        "quantity": "mean_square_median" if skewed(frame) else "mean_square",
        **origin(summary, command, written),
    }
    return html_of(data, streams)


def job_data(job: PageJob, drawn: Drawn) -> dict[str, Any]:
    """A run's curves and laws, and where its checkpoint leaves the random inits."""
    left = job.summary.get("departure")
    at = None
    if left and left["sublayer"] is not None:
        where = place(left["sublayer"], left["block"], left["kind"])
        at = {
            "sublayer": left["sublayer"],
            "label": f"outside the random inits' band from {where} on",
        }
    return {**job_values(job.frame, job.summary, drawn), "departure": at}


def origin(summary: Mapping[str, Any], command: str, written: str) -> dict[str, Any]:
    """What a page says of where its numbers come from, and the names of what it can draw."""
    s = summary
    probed = "call" in s  # a module in memory, without a config
    engine = "simlab.probe" if probed else f"{s['engine']} ({s['engine_reason']})"
    inputs = "tokens" if probed else f"{s['config']['inputs']['kind']} {s['token_unit']}"
    facts = [
        ("measured", written),
        *([] if probed else [("config hash", s["config_hash"])]),
        ("engine", engine + (ENGINES_BESIDE if len(s.get("engines", ())) > 1 else "")),
        ("device", f"{s['device']}, {s['dtype']}"),
        ("parameters", f"{s['parameters']:,}"),
        ("input", f"{s['tokens'][0] // s.get('streams', 1)} × {s['tokens'][1]} {inputs}"),
        ("seeds", ", ".join(map(str, s["seeds"])) or "none"),
        ("versions", ", ".join(f"{name} {number}" for name, number in s["versions"].items())),
    ]
    for key in ("layout", "init_origin", "weight_hash"):
        if s.get(key):
            facts.append((key.removesuffix("_origin").replace("_", " "), s[key]))
    return {
        "command": command,
        "facts": facts,
        "config": json.dumps(s["config"], indent=1, ensure_ascii=False),
        "quantities": names(),
    }


def names() -> dict[str, dict[str, Any]]:
    """Every quantity's label, group and axis, and whether it has a value per sublayer or per block."""
    return {
        name: {**asdict(q), "by": "block" if name in BY_BLOCK else "sublayer"}
        for name, q in DRAWABLE.items()
    }


def lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """The verdict's sentences, each curve's with its name where there are several."""
    verdicts = summary["verdict"]
    for name, verdict in verdicts.items():
        who = f"{LABELS[name].capitalize()}: " if len(verdicts) > 1 else ""
        yield who + verdict["sentence"]
    yield from summary.get("comparison", [])


def warnings(frame: pd.DataFrame, summary: Mapping[str, Any]) -> Iterator[str]:
    """What a reader of the curves must know: eps, massive activations, values that aren't finite."""
    yield from streams_lines(summary)
    yield from overflow_lines(summary["overflow"])
    yield from lost_lines(summary)
    for name in frame["curve"].unique():
        rows = frame[frame["curve"] == name]
        who = f" ({LABELS[name]})" if frame["curve"].nunique() > 1 else ""
        # Where no norm acts on what is added (pre), there is no additive law, and eps takes nothing.
        # Of a branch of 0 it takes nothing either.
        normed = rows[(rows["kind"] != "embedding") & rows["law_additive"].notna()]
        if "branch_mean_square" in normed:
            normed = normed[normed["branch_mean_square"] != 0]
        factors = normed.groupby("sublayer")["eps_factor"].mean()
        held = {int(str(at)): float(m) for at, m in factors.items() if m < EPS_TAKES}
        if held:
            yield _eps(held, f"{LABELS[name].capitalize()}: in" if who else "In")
    if "massive" in frame and (frame["massive"] == 1).any():
        rows = frame[frame["massive"] == 1]
        who = " and ".join(LABELS[name] for name in rows["curve"].unique())
        top = most_massive(rows)
        yield (
            f"Massive activations ({who}): the largest |x| is {short(float(top['max_abs']))} at "
            f"sublayer {top['sublayer']}, where the median |x| is {short(float(top['median_abs']))}. A "
            "mean over tokens is mostly of these: see the median token."
        )


def _eps(held: Mapping[int, float], start: str) -> str:
    """Where eps shrinks a norm's output. held: m/(m + eps) by sublayer. start: of the sentence."""
    last, least = max(held), min(held, key=lambda at: held[at])
    if len(held) == 1:
        where = f"sublayer {last}"
    else:
        some = f"{len(held)} of " if len(held) < last else ""
        where = f"{some}the first {last} sublayers"
    most = f"at sublayer {least} " if len(held) > 1 else ""
    return (
        f"{start} {where} the norm's input is so small that its eps shrinks the output: {most}to "
        f"{short(held[least])} of the mean square that the output would have with eps = 0."
    )


def tiles(frame: pd.DataFrame, summary: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The main numbers, each with what it is."""
    several = len(summary["verdict"]) > 1
    for name, verdict in summary["verdict"].items():
        who = f", {LABELS[name]}" if several else ""
        rows = frame[frame["curve"] == name]
        last = rows.groupby("seed").tail(1)["mean_square"]
        yield _tile(short(float(last.mean())), f"mean square at the end{who}")
        if skewed(rows):
            median = float(rows["mean_square_median"].iloc[-1])
            yield _tile(short(median), f"mean square of the median token at the end{who}")
        word = verdict["fit"]["word"]
        if word == "linear":
            yield _tile(plus_minus(Estimate(**verdict["per_sublayer"])), f"per sublayer{who}")
        elif word == "exponential":
            yield _tile("×" + plus_minus(Estimate(**verdict["rate"])), f"per sublayer{who}")
        elif word == "power" and verdict["exponent"]["value"] is not None:
            yield _tile(plus_minus(Estimate(**verdict["exponent"])), f"exponent p of depth{who}")
        token = summary["lambda"][name].get("lambda_token")
        if token and token["value"] is not None:
            yield _tile(plus_minus(Estimate(**token)), f"λ of the tokens' norm{who}")
    name = "random" if "random" in summary["verdict"] else next(iter(summary["verdict"]), None)
    for law, fit in (summary["theories"].get(name) or {}).items():
        word = decision(str(name), fit["status"], fit["log_error"])
        if fit["log_error"] is not None and word is not None and law in LAWS:
            said = f"{LAWS[law].label}: off by at most this; {_said(word, law, fit)}"
            yield _tile(off_by(fit["log_error"]), said, TILE_CLASS.get(word, ""))


def _said(word: str, law: str, fit: Mapping[str, Any]) -> str:
    """A decision on a law as a clause."""
    if word == UNDECIDED:
        untested = LAWS[law].exact and fit["p_value"] is None
        return f"{UNDECIDED}, which {UNTOLD}" if untested else f"{UNDECIDED}, chance may explain it"
    return "it holds" if word == HOLDS else "it is off"


def _tile(value: str, label: str, status: str = "") -> dict[str, str]:
    return {"value": value, "label": label, "status": status}


def html_of(data: Mapping[str, Any], streams: bytes | None = None) -> str:
    """The page with its style, its script and its data, none of which can end its own element.

    streams: as of ``run_page``.
    """
    axes: dict[str, int] = {}  # of many jobs' curves the steps are the same
    for curve in (curve for job in data["jobs"] for curve in job["curves"]):
        curve["steps"] = axes.setdefault(json.dumps(curve["steps"]), len(axes))
    whole = {**data, "axes": [json.loads(steps) for steps in axes]}
    text = json.dumps(whole, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for mark, code in (("<", "\\u003c"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        text = text.replace(mark, code)
    title = html.escape(f"simlab: {data['title']}")
    before, after = _frame(title)
    picture = _STREAMS.replace("DATA", base64.b64encode(streams).decode()) if streams else ""
    before = before.replace("<!--streams-->", picture)
    return before + text + after


@functools.cache
def _part(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _frame(title: str) -> tuple[str, str]:
    """The page's text before its data and after."""
    before, _, after = _part("page.html").partition("/*data*/")
    before = before.replace("/*style*/", _part("page.css")).replace("<!--title-->", title)
    return before, after.replace("/*script*/", _part("page.js"))
