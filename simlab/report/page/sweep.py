"""report.html of a sweep: its jobs' curves side by side or one by one, and a table of the jobs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from simlab.analysis import LAWS
from simlab.analysis.decision import NOT_DECIDED, UNDECIDED
from simlab.analysis.numbers import short
from simlab.report.page.build import PageJob, html_of, job_data, origin, warnings
from simlab.report.page.payload import Drawn
from simlab.report.page.quantities import DRAWABLE
from simlab.report.values import (
    SEEDS,
    is_number,
    key_text,
    law_text,
    shape_text,
    shorten,
    spread,
    value_text,
)

MOST_NUMBERS = 300_000  # in a page: about 2 MB
MAIN = ("mean_square", "rms", "norm", "variance", "gradient_rms", "lambda_from_first")
PAGE_COLOURS = 8  # that a page has for values without an order
DASHES = 4  # that a page has
LONGEST_VALUE = 40  # characters of a swept value
FEW_JOBS = 8  # up to which each has a look of its own and a switch
SHAPES = {
    "linear": "linear", "constant": "none (constant)", "exponential": "exponential", "power": "a power",
    "saturating": "saturating", "saw-tooth": "a saw-tooth", "jump": "one jump",
    "none": "no simple shape",
}  # fmt: skip


def sweep_page(
    jobs: Sequence[PageJob], table: pd.DataFrame, title: str, lines: Sequence[str], command: str,
    written: str, instead: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """The page of a sweep's finished jobs, of which there is at least one, as HTML.

    table: the rows of jobs.csv. lines: what is said beside it, such as its written answer. command,
    written: as of a run's page. instead: entries of the page's data that replace its own.
    """
    drawn, shown = _fitting(jobs)
    said = list(lines)
    if len(shown) < len(jobs):
        said.append(
            f"The figure has {len(shown)} of the {len(jobs)} jobs; sweep.parquet has them all."
        )
    elif drawn.columns == MAIN:
        said.append("The figure has the main quantities; sweep.parquet has them all.")
    keys = [key for key in jobs[0].values if key not in SEEDS and _differs(jobs, key)]
    of_jobs = jobs_data(table, list(jobs[0].values))
    if any(str(cell).startswith(UNDECIDED) for row in of_jobs["rows"] for cell in row):
        said.append(f"{UNDECIDED.capitalize()}: {NOT_DECIDED}")
    data = {
        "title": title,
        "headline": sweep_headline(jobs, table, keys),
        "warnings": list(_warnings(jobs)),
        "lines": said,
        "tiles": [],
        "jobs": [
            {
                "label": job.label,
                "values": [_shown(job, key) for key in keys],
                **job_data(job, drawn),
            }
            for job in shown
        ],
        **_looks(shown, keys),
        "table": of_jobs,
        **_origin(jobs, command, written),
        **(instead or {}),
    }
    return html_of(data)


def _origin(jobs: Sequence[PageJob], command: str, written: str) -> dict[str, Any]:
    """Of the jobs' ``origin`` what all have, and with each job's label what differs.

    Of more than FEW_JOBS the facts that differ are left out.
    """
    of_jobs = [origin(job.summary, command, written) for job in jobs]
    facts = []
    for name in dict.fromkeys(name for each in of_jobs for name, _ in each["facts"]):
        said = [dict(each["facts"]).get(name, "none") for each in of_jobs]
        if len(set(said)) == 1:
            facts.append((name, said[0]))
        elif len(jobs) <= FEW_JOBS:
            rows = [f"{job.label}: {text}" for job, text in zip(jobs, said, strict=True)]
            facts.append((name, "\n".join(rows)))
    shared, own = _shared([job.summary["config"] for job in jobs])
    by_job = [{"job": job.label, **each} for job, each in zip(jobs, own, strict=True)]
    config = {"all jobs": shared, "by job": by_job} if any(own) else shared
    text = json.dumps(config, indent=1, ensure_ascii=False)
    return {**of_jobs[0], "facts": facts, "config": text}


def _shared(configs: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What nested configs have in common, and of each the rest."""
    shared: dict[str, Any] = {}
    own: list[dict[str, Any]] = [{} for _ in configs]
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [config[key] for config in configs if key in config]
        if len(values) == len(configs) and all(value == values[0] for value in values):
            shared[key] = values[0]
        elif len(values) == len(configs) and all(isinstance(value, Mapping) for value in values):
            shared[key], rest = _shared(values)
            for each, part in zip(own, rest, strict=True):
                each |= {key: part} if part else {}
        else:
            for each, config in zip(own, configs, strict=True):
                each |= {key: config[key]} if key in config else {}
    return shared, own


def sweep_headline(jobs: Sequence[PageJob], table: pd.DataFrame, keys: Sequence[str]) -> str:
    """One sentence on a sweep: where its curves end, by the swept key if it is one, and their growth.

    table: the rows of jobs.csv. keys: the swept keys that differ between jobs.
    """
    main = "checkpoint" if (table["curve"] == "checkpoint").any() else table["curve"].iloc[0]
    rows = table[(table["curve"] == main) & table["mean_square"].notna()]
    if rows.empty:
        return "No curve has a finite end."
    label = {number: job.label for number, job in zip(table["job"].unique(), jobs, strict=False)}
    whose = " of the checkpoint's residual stream" if main == "checkpoint" else ""
    says = f"The mean square{whose} at the end "
    if len(rows) == 1:
        says += f"is {short(float(rows['mean_square'].iloc[0]))}"
    elif len(keys) == 1 and all(is_number(job.values[keys[0]]) for job in jobs):
        by_value = rows.assign(value=rows[keys[0]].astype(float)).sort_values(
            "value", kind="stable"
        )
        (first, start), (last, end) = (
            (value_text(row[keys[0]]), short(float(row["mean_square"])))
            for _, row in by_value.iloc[[0, -1]].iterrows()
        )
        name = key_text(keys[0])
        says += f"goes from {start} at {name} {first} to {end} at {name} {last}"
    else:
        ordered = rows.sort_values("mean_square", kind="stable")
        low, high = ordered.iloc[0], ordered.iloc[-1]
        says += f"is between {short(float(low['mean_square']))} ({label[low['job']]}) and "
        says += f"{short(float(high['mean_square']))} ({label[high['job']]})"
    return f"{says}; {_growth(rows)}."


def _growth(rows: pd.DataFrame) -> str:
    counts = Counter(SHAPES.get(shape, "not known") for shape in rows["shape"])
    if len(counts) == 1:
        shape = next(iter(counts))
        return f"its growth is {shape}" + (" in every job" if len(rows) > 1 else "")
    return "its growth is " + ", ".join(f"{shape} in {n}" for shape, n in counts.most_common())


def _differs(jobs: Sequence[PageJob], key: str) -> bool:
    return len({value_text(job.values[key]) for job in jobs}) > 1


def _warnings(jobs: Sequence[PageJob]) -> Iterator[str]:
    """Each job's warnings, an equal one once."""
    whose: dict[str, list[str]] = {}
    for job in jobs:
        for text in warnings(job.frame, job.summary):
            whose.setdefault(text, []).append(job.label)
    for text, labels in whose.items():
        yield f"{labels[0] if len(labels) == 1 else f'{len(labels)} jobs'}: {text}"


def _fitting(jobs: Sequence[PageJob]) -> tuple[Drawn, Sequence[PageJob]]:
    """What of a sweep a page has room for: all quantities, or the main ones, or these of some jobs."""
    rows = sum(len(job.frame.drop_duplicates(["curve", "sublayer", "kind"])) for job in jobs)
    if 3 * len(DRAWABLE) * rows <= MOST_NUMBERS:
        return Drawn(seeds=False), jobs
    every = math.ceil(3 * len(MAIN) * rows / MOST_NUMBERS)
    return Drawn(seeds=False, columns=MAIN), jobs[::every]


def _looks(jobs: Sequence[PageJob], keys: Sequence[str]) -> dict[str, Any]:
    """Each job's colour and dash; of many jobs also the swept keys with what their values look like.

    looks: a job's dash, an index, and its colour: an index below PAGE_COLOURS, or of numbers and
    of many values ``shade``, from 0 to 1. keys, hide: of many jobs, each key's values with their
    look, and those values that are off at first, so that no two curves look alike.
    """
    if not keys:
        return {"looks": [{"colour": 0, "dash": 0} for _ in jobs]}
    others = list(dict.fromkeys(tuple(_shown(job, k) for k in keys[:-1]) for job in jobs))
    if len(keys) == 1 or (len(jobs) <= FEW_JOBS and len(others) <= DASHES):
        dashes = [others.index(tuple(_shown(job, key) for key in keys[:-1])) for job in jobs]
        return {"looks": _coloured(jobs, keys[-1], dashes)}
    wide = spread(_levels(jobs, keys), keys)
    values = {key: _values(jobs, key) for key in keys}
    order = sorted(keys, key=lambda k: (not all(map(is_number, values[k])), -wide[k]))
    kinds = max(job.frame["curve"].nunique() for job in jobs)  # two: dashed or not by the kind
    colour, few = order[0], [k for k in order[1:] if len(values[k]) <= DASHES and kinds == 1]
    dash = max(few, key=lambda key: wide[key]) if few else None
    looks = {colour: "colour", dash: "dash"}
    of_dash = [values[dash].index(_shown(job, dash)) if dash else 0 for job in jobs]
    hide = {
        key: values[key][:-1] if all(map(is_number, values[key])) else values[key][1:]
        for key in keys if key not in looks
    }  # fmt: skip
    return {
        "looks": _coloured(jobs, colour, of_dash),
        "keys": [
            {"name": key_text(key), "values": values[key], "look": looks.get(key, "")}
            for key in keys
        ],
        "hide": [f"{key_text(key)}={value}" for key, off in hide.items() for value in off],
    }


def _shown(job: PageJob, key: str) -> str:
    return shorten(value_text(job.values[key]), LONGEST_VALUE)


def _values(jobs: Sequence[PageJob], key: str) -> list[str]:
    """A key's values as texts: numbers ascend, others are in the jobs' order."""
    values = list(dict.fromkeys(_shown(job, key) for job in jobs))
    return sorted(values, key=float) if all(map(is_number, values)) else values


def _levels(jobs: Sequence[PageJob], keys: Sequence[str]) -> pd.DataFrame:
    """A row per job, for ``spread``: its keys' values, and its level where the shallowest ends."""
    last = min(job.frame["sublayer"].max() for job in jobs)
    levels = [job.frame[job.frame["sublayer"] == last]["mean_square"].mean() for job in jobs]
    table = pd.DataFrame([{key: _shown(job, key) for key in keys} for job in jobs])
    return table.assign(level=levels)


def _coloured(jobs: Sequence[PageJob], key: str, dashes: Sequence[int]) -> list[dict[str, float]]:
    """The jobs' looks, coloured by a key's value."""
    values = _values(jobs, key)
    numbers = all(map(is_number, values))
    shaded = len(values) > 2 and (len(values) > PAGE_COLOURS or numbers)
    looks: list[dict[str, float]] = []
    for job, dash in zip(jobs, dashes, strict=True):
        at = values.index(_shown(job, key))
        colour = {"shade": at / (len(values) - 1)} if shaded else {"colour": at}
        looks.append({"dash": dash, **colour})
    return looks


def jobs_data(table: pd.DataFrame, swept: Sequence[str]) -> dict[str, Any]:
    """A row per job and curve, of jobs.csv's main columns: heads and cells, texts and numbers."""
    columns = {
        "job": "job",
        **{key: key_text(key) for key in swept if key in table},
        "curve": "curve",
    }
    columns |= {
        "mean_square": "mean square at the end", "peak": "largest peak", "per_sublayer": "per sublayer",
        "exponent": "exponent p", "rate": "factor per sublayer", "shape": "growth",
        "lambda_token": "λ of the tokens' norm", "lambda_paper": "λ of the mean vector", "loss": "loss",
    }  # fmt: skip
    columns |= {law.name: law.label for law in LAWS.values() if law.name in table}
    records = [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]
    said = {law: [law_text(row, law) or None for row in records] for law in LAWS if law in table}
    said["shape"] = [shape_text(word) or None for word in table["shape"]]
    table = table.assign(**{name: pd.Series(cells, table.index) for name, cells in said.items()})
    there = [c for c in columns if c in table and table[c].notna().any()]
    for law in LAWS.values():  # a law that nobody expects to hold, and that isn't tested
        if law.name in there and not law.expected and all(map(_undecided, said[law.name])):
            there.remove(law.name)
    if table["curve"].nunique() == 1:
        there.remove("curve")
    return {
        "heads": [columns[c] for c in there],
        "rows": [[_cell(value) for value in row] for row in table[there].itertuples(index=False)],
    }


def _undecided(text: str | None) -> bool:
    """True for a law's cell that decides nothing."""
    return not text or text.startswith(UNDECIDED)


def _cell(value: Any) -> Any:
    """A table's value as JSON takes it: a number, a text, or None."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    return value_text(value)
