"""``python -m simlab.sweep DIR``: one report over a sweep, from its files alone, finished or not.

sweep.parquet   every job's curve.csv, with the job's number and every swept key as a column
streams.parquet likewise every streams.csv, where jobs have one
jobs.csv        a row per job × curve: where it ended, how it grew, λ's, which law holds
*.png           figures, chosen by what was swept; *.svg where asked for; zoo.png of answer=norm_zoo
report.html     a page with the figure, the jobs and the command
answer.md       a written answer, where the sweep's config asks for one (``report.answer``)
families.csv    of answer=families: a row per checkpoint
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml

from simlab.config import ConfigError, printable
from simlab.report.page import PAGE
from simlab.store import (
    SUMMARY,
    read_csv,
    read_object,
    same_weights,
    spoiled,
    write_atomically,
    write_csv,
    write_text,
)
from simlab.sweep.job import PLAN, RECORD

if TYPE_CHECKING:
    from simlab.report.families import Survey
    from simlab.report.swept import SweptJob

READ = (RECORD, SUMMARY, "curve.csv", "streams.csv")  # of a job's folder
MOST_SHOWN = 40  # characters of a value in the heading
STREAMS = "streams.parquet"
ANSWER, FAMILIES = "answer.md", "families.csv"
LAMBDAS = (
    "lambda_paper", "lambda_token", "lambda_paper_gradient", "lambda_token_gradient",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A job of a sweep as its files have it: ``status`` is done, failed or unfinished.

    A job whose files aren't the ones that it wrote has failed, too.
    """

    number: int
    folder: Path
    overrides: Sequence[str]
    values: Mapping[str, Any]
    status: str
    error: str = ""

    @property
    def summary(self) -> dict[str, Any]:
        """Its summary.json."""
        return read_object(self.folder / SUMMARY)


def read_entries(folder: Path) -> tuple[list[Entry], dict[str, list[Any]]]:
    """A sweep's jobs, and the swept columns with their values. Raises ConfigError."""
    if not (folder / PLAN).is_file():
        raise ConfigError(f"{folder}: no sweep's folder, it has no {PLAN}")
    described = read_object(folder / PLAN)
    entries = []
    try:
        swept = {str(key): list(values) for key, values in described["swept"].items()}
        for each in described["jobs"]:
            inner = Path(each["folder"])
            if inner.is_absolute() or ".." in inner.parts:
                raise ConfigError(f"{folder / PLAN}: {inner} leads out of the sweep's folder")
            for path in (folder / inner, *(folder / inner / name for name in READ)):
                if not path.resolve().is_relative_to(folder.resolve()):
                    raise ConfigError(f"{path}: leads out of the sweep's folder")
            status, error = _status(folder / inner, each.get("config_hash", []))
            values = {key: each["values"][key] for key in swept}
            entries.append(
                Entry(int(each["job"]), folder / inner, each["overrides"], values, status, error)
            )
    except ConfigError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{folder / PLAN}: not what a sweep writes") from error
    return entries, swept


def _status(folder: Path, hashes: Sequence[str]) -> tuple[str, str]:
    """How a job has ended, and why it failed. hashes: the config hashes that it may have."""
    if (folder / RECORD).is_file():
        record = read_object(folder / RECORD)
        if record.get("status") == "failed":
            return "failed", str(record.get("error", ""))
    if not (folder / SUMMARY).is_file():
        return "unfinished", ""
    why = spoiled(folder, hashes)
    return ("failed", f"{why}; the sweep's command writes it again") if why else ("done", "")


def read_curve(folder: Path) -> pd.DataFrame:
    """A run's curve.csv. Raises ConfigError."""
    if not (folder / "curve.csv").is_file():
        raise ConfigError(f"{folder / 'curve.csv'}: no such file")
    try:
        frame = read_csv(folder / "curve.csv")
        frame["block"] = frame["block"].astype("Int64")
        frame[["curve", "seed", "sublayer", "kind", "mean_square"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder / 'curve.csv'}: not a curve ({error})") from error
    return frame


def read_vectors(folder: Path) -> pd.DataFrame | None:
    """A run's streams.csv, None where it has none. Raises ConfigError."""
    path = folder / "streams.csv"
    if not path.is_file():
        return None
    try:
        return read_csv(path).astype({"block": "Int64"})
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not what simlab writes ({error})") from error


def overrides_in(folder: Path) -> list[str]:
    """The overrides of a run, from the file that Hydra wrote; none where there isn't one."""
    path = folder / ".hydra" / "overrides.yaml"
    if not path.is_file():
        return []
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not what Hydra writes") from error
    return [str(each) for each in found] if isinstance(found, list) else []


def curves(
    jobs: Sequence[Entry], read: Callable[[Path], pd.DataFrame | None] = read_curve
) -> pd.DataFrame:
    """The rows of sweep.parquet: every finished job's curve.csv, its number and swept values first.

    read: reads another table of a job's folder, None where there is none.
    """
    frames = []
    for each in jobs:
        frame = read(each.folder)
        if frame is None:
            continue
        keys = {"job": each.number} | {k: v for k, v in each.values.items() if k not in frame}
        front = pd.DataFrame({key: [value] * len(frame) for key, value in keys.items()})
        frames.append(pd.concat([front, frame], axis=1))
    if not frames:
        return pd.DataFrame()
    table = pd.concat(frames, ignore_index=True)
    for column in (key for key in jobs[0].values if key in table):
        if table[column].map(type).nunique() > 1:  # numbers and null, say: a column has one type
            table[column] = table[column].map(lambda v: "null" if v is None else str(v))
    return table


def rows(jobs: Sequence[Entry], frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of jobs.csv."""
    records: list[dict[str, Any]] = []
    last = frame.groupby(["job", "curve", "seed"], sort=False).tail(1)
    level = last.groupby(["job", "curve"])["mean_square"].mean()
    for each in jobs:
        try:
            records += _rows_of(each, level)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{each.folder / SUMMARY}: not what a job writes") from error
    return pd.DataFrame(records)


def _rows_of(each: Entry, level: pd.Series) -> Iterator[dict[str, Any]]:
    summary = each.summary
    for name, verdict in summary["verdict"].items():
        loss = summary.get("loss", {}).get(name)
        row = {"job": each.number, "curve": name} | dict(each.values)
        model = summary["config"]["model"]
        row |= {key: row.get(key, model[key]) for key in ("depth", "width")}
        row |= {
            "mean_square": level.get((each.number, name), np.nan),
            "peak": _peak(verdict),
            "per_sublayer": _number(verdict["per_sublayer"]["value"]),
            "exponent": _number(verdict["exponent"]["value"]),
            "rate": _number(verdict["rate"]["value"]),
            "shape": verdict["shape"],
        }
        for key in LAMBDAS:
            row |= _interval(key, summary["lambda"][name].get(key))
        for key in (f"lambda_token_{law}" for law in summary["theories"][name]):
            row[key] = _number(summary["lambda"][name].get(key))
        row |= {
            "loss": _number(loss["value"]) if loss else np.nan,
            **_laws(summary["theories"][name]),
            "overflow": sum(row["curve"] == name for row in summary["overflow"]),
            "sentence": verdict["sentence"],
        }
        yield row


def _peak(verdict: Mapping[str, Any]) -> float:
    """The largest peak of a saw-tooth, else NaN."""
    teeth = (verdict.get("fit") or {}).get("teeth")
    return _number(teeth["high"]) if teeth else np.nan


def _laws(theories: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of each law in a summary: ``NAME`` (holds, fails, unknown) and ``NAME_error``."""
    columns: dict[str, Any] = {}
    for name, fit in theories.items():
        columns |= {name: fit["status"], f"{name}_error": _number(fit["log_error"])}
    return columns


def _number(value: float | None) -> float:
    """JSON's null stands for inf and NaN."""
    return np.nan if value is None else float(value)


def _interval(name: str, estimate: Mapping[str, float | None] | None) -> dict[str, float]:
    parts = {"": "value", "_low": "low", "_high": "high"}
    return {f"{name}{end}": _number((estimate or {}).get(key)) for end, key in parts.items()}


def report(folder: Path, *, svg: bool = False) -> bool:
    """Write and show a sweep's report; True if every job succeeded. Raises ConfigError, OSError.

    svg: write the figures as .svg, too.
    """
    import matplotlib

    from simlab.report import (
        console,
        families,
        families_figure,
        families_text,
        style,
        sweep_figures,
        zoo,
        zoo_figure,
    )

    matplotlib.use("agg")  # seaborn's grids are pyplot's figures: these need no window
    jobs, keys = read_entries(folder)
    done = [each for each in jobs if each.status == "done"]
    failed = [each for each in jobs if each.status == "failed"]
    heading = _title(jobs, keys)
    name, outcomes = _answer_of(folder), list(map(_outcome, jobs))
    survey = families.survey(outcomes) if name == "families" else None
    table, files = pd.DataFrame(), []
    if done:
        frame = curves(done)
        table = rows(done, frame)
        files = [folder / "sweep.parquet", folder / "jobs.csv"]
        write_atomically(files[0], lambda path: frame.to_parquet(path, index=False))
        write_csv(files[1], table)
        streams = curves(done, read_vectors)
        if len(streams):
            files.append(folder / STREAMS)
            write_atomically(files[-1], lambda path: streams.to_parquet(path, index=False))
        drawn = sweep_figures.figures(frame, table, keys, heading)
        if survey:
            drawn["growth"] = families_figure.families_figure(
                survey.members, families_text.line(survey)
            )
            write_csv(folder / FAMILIES, survey.table)
            files.append(folder / FAMILIES)
        if name == "norm_zoo":
            about = next(zoo.about_model(job) for job in outcomes if job.summary is not None)
            drawn["zoo"] = zoo_figure.zoo_figure(zoo.zoo_rows(outcomes), about)
        for figure_name, figure in drawn.items():
            files += style.save(figure, folder, figure_name, svg=svg)
    answer = _answer(folder, name, outcomes)
    files += [folder / ANSWER] if answer else []
    if done:
        page = _page(
            folder,
            done,
            frame,
            table,
            heading,
            answer,
            _labels(jobs, outcomes, survey),
            families_text.page_data(survey) if survey else {},
        )
        write_atomically(folder / PAGE, lambda path: write_text(path, page), durable=False)
        files.insert(2, folder / PAGE)
    summaries = {str(each.number): each.summary for each in done}
    console.show_sweep(
        heading,
        table,
        keys,
        summaries,
        same_weights(summaries),
        [{"job": e.number, "overrides": of_sweep(e), "error": e.error} for e in failed],
        len(jobs) - len(done) - len(failed),
        files,
        answer,
        survey,
    )
    return len(done) == len(jobs)


def _outcome(each: Entry) -> SweptJob:
    """How a job has ended, as a written answer takes it."""
    from simlab.report.swept import SweptJob

    if each.status == "done":
        return SweptJob(each.values, "", read_curve(each.folder), each.summary)
    return SweptJob(each.values, each.error)


def _answer_of(folder: Path) -> str | None:
    """The name of the answer that a sweep's plan asks for. Raises ConfigError."""
    from simlab.report.answer import WRITERS

    name = read_object(folder / PLAN).get("answer")
    if name is not None and name not in WRITERS:
        raise ConfigError(f"{folder / PLAN}: not what a sweep writes")
    return name


def _answer(folder: Path, name: str | None, outcomes: Sequence[SweptJob]) -> str | None:
    """Write the answer of this name, from the jobs' files; None where there is none.

    Gives the text for the screen, where the report itself says which jobs failed or aren't finished.
    """
    from simlab.report.answer import WRITERS

    if name is None:
        return None
    text = WRITERS[name](outcomes)
    write_atomically(folder / ANSWER, lambda path: write_text(path, text))
    done = [each for each in outcomes if each.summary is not None]
    return WRITERS[name](done) if len(done) < len(outcomes) else text


def _page(
    folder: Path, done: Sequence[Entry], frame: pd.DataFrame, table: pd.DataFrame,
    heading: str, answer: str | None, labels: dict[int, str], instead: Mapping[str, Any],
) -> str:  # fmt: skip
    """The sweep's page, of its finished jobs. frame, table: of sweep.parquet and jobs.csv.

    labels: of jobs that have another name than their swept values. instead: entries of the page's data
    that replace its own.
    """
    from simlab.report.page.build import PageJob, command_of
    from simlab.report.page.sweep import sweep_page

    by_job = dict(list(frame.groupby("job", sort=False)))
    shown = [
        PageJob(labels.get(e.number) or _label(e), by_job[e.number], e.summary, e.values)
        for e in done
    ]
    plain = (answer or "").replace("**", "").replace("\\<", "<").replace("`", "")
    told = [" ".join(line.split()) for line in plain.split("\n\n")]
    overrides = read_object(folder / PLAN).get("overrides")
    command = command_of(overrides, True) if isinstance(overrides, list) else str(folder)
    lines = [line for line in told if line and not line.startswith("|")]
    return sweep_page(shown, table, heading, lines, command, str(date.today()), instead)


def _labels(
    jobs: Sequence[Entry], outcomes: Sequence[SweptJob], survey: Survey | None
) -> dict[int, str]:
    """The names in families.csv of the jobs that it has; outcomes: the jobs'."""
    found = list(zip(jobs, outcomes, strict=True))
    members = survey.members if survey else []
    return {e.number: m.label for m in members for e, job in found if job.frame is m.frame}


def _label(each: Entry) -> str:
    """A job's swept values in a few words."""
    from simlab.report.values import key_text, shorten, value_text

    shown = [
        f"{key_text(key)} {shorten(printable(value_text(value)), MOST_SHOWN)}"
        for key, value in each.values.items()
    ]
    return ", ".join(shown) or f"job {each.number}"


def _title(jobs: Sequence[Entry], keys: Mapping[str, Sequence[Any]]) -> str:
    """What a sweep is over: ``48 jobs: depth 8, 16, 32, 64; norm pre, post``."""
    from simlab.report.values import key_text, shorten, value_text

    axes = []
    for key, values in keys.items():
        shown = [shorten(printable(value_text(value)), MOST_SHOWN) for value in values]
        if len(shown) > 6:
            shown = [*shown[:2], "…", shown[-1]]
        axes.append(f"{printable(key_text(key))} {', '.join(shown)}")
    return f"{len(jobs)} job{'s' if len(jobs) != 1 else ''}" + (
        f": {'; '.join(axes)}" if axes else ""
    )


def of_sweep(entry: Entry) -> str:
    """A job's swept values, or where nothing was swept its overrides."""
    values = [f"{key}={value}" for key, value in entry.values.items()]
    return " ".join(values or entry.overrides)
