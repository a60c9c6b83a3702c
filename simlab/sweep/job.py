"""One job: a run that ends with tables, figures and a verdict, or a sweep's, which ends with a record.

A sweep's job is computed where no result of its key is kept; its folder gets copies of the kept files.
"""

from __future__ import annotations

import functools
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from simlab import signals
from simlab.budget.process import tune_process
from simlab.config import ConfigError, KeepConfig, RunConfig
from simlab.config.cli_errors import in_one_line, out_of_memory
from simlab.config.validate import read, read_keep
from simlab.report.page import PAGE
from simlab.store import (
    PARTIAL,
    SUMMARY,
    Results,
    copy_result,
    plain_values,
    remove_left,
    result_key,
    write_atomically,
    write_csv,
    write_json,
    write_text,
)
from simlab.sweep.gpu_lock import own_gpu

if TYPE_CHECKING:
    import pandas as pd

    from simlab.experiment import MeasuredCurves, Prepared, RunResult
    from simlab.inputs import Tokens

RECORD = "job.json"  # how a sweep's job ended
PLAN = "sweep.json"  # what a sweep is to do
TABLES = ("curve.csv", "weights.csv", "streams.csv")
FIGURES = tuple(
    f"{name}.{kind}"
    for name in ("growth", "lambda", "inside", "streams")
    for kind in ("png", "svg")
)
OUR_FOLDER = re.compile(
    r"outputs|\d{4}-\d\d-\d\d|\d\d-\d\d-\d\d-\d+"
)  # as conf/config.yaml names them


# The folder of a single run, from before Hydra makes it, and the files that are there by then.
STARTED: dict[Path, dict[Path, int]] = {}


@contextmanager
def nothing_left_behind(folders: Mapping[Path, Mapping[Path, int]]) -> Iterator[None]:
    """If a run fails, remove the files that it and Hydra wrote, and folders left empty.

    folders: with their ``run_files`` before the run, which stay; looked at when the block ends. One
    with a summary holds an earlier, whole result and stays. What can't be removed is left: the
    exception that ended the run is the one to be seen.
    """
    try:
        yield
    except BaseException:
        for folder, before in folders.items():
            with suppress(OSError):
                if not (folder / SUMMARY).exists():
                    for path, _ in run_files(folder).items() - before.items():
                        path.unlink()
                    remove_empty(folder / ".hydra")
                    remove_empty(folder)
        raise


def run_files(folder: Path) -> dict[Path, int]:
    """The files in a folder that a run or Hydra may have written, with their times in ns."""
    ours = [folder / name for name in (SUMMARY, RECORD, PAGE, *TABLES, *FIGURES)]
    paths = [*ours, *(folder / ".hydra").glob("*")]
    return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}


def clear(folder: Path) -> None:
    """Remove the results in a run's folder, the summary first: what is left is never a whole one."""
    for path in (folder / name for name in (SUMMARY, RECORD, PAGE, *TABLES, *FIGURES)):
        if path.is_file() or path.is_symlink():  # a folder of that name isn't ours
            path.unlink()


def remove_empty(folder: Path) -> None:
    """Remove an empty run folder, then those around it that a run makes, up to outputs/.

    Stops at the first that isn't empty or can't be removed, such as a mount or a symbolic link.
    """
    for place in (folder, *folder.parents):
        if place != folder and not OUR_FOLDER.fullmatch(place.name):
            break
        try:
            if [entry.name for entry in place.iterdir()] == ["multirun.yaml"]:
                (place / "multirun.yaml").unlink()
            place.rmdir()
        except FileNotFoundError:
            continue  # Hydra couldn't make it, or hadn't yet
        except OSError:
            break


def remove_left_beside(folder: Path) -> None:
    """Remove what killed processes left half-written in the runs and sweeps beside this one.

    Folders that are named by the time: no other run writes there, and removes it.
    """
    if OUR_FOLDER.fullmatch(folder.name) and OUR_FOLDER.fullmatch(folder.parent.name):
        for depth in ("*/*", "*/*/*"):  # of a run, of a sweep's job
            for path in folder.parents[1].glob(f"{depth}/{PARTIAL}*"):
                remove_left(path.parent)


def task(config: DictConfig) -> None:
    """The function that Hydra calls: for a single run, or for a sweep's job in a launcher's process."""
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    if hydra.mode != RunMode.MULTIRUN:
        with in_one_line():  # Hydra would say more of a mistake
            run_job(read(config), folder, hydra.overrides.task, read_keep(config))
        return
    keep = read_keep(config)
    if keep.dry_run:  # of another sweeper
        return
    keep = replace(keep, results=str(Path(hydra.runtime.cwd) / keep.results))
    tune_process()
    spoiled = sweep_job(read(config), folder, keep)
    if not str(hydra.sweeper._target_).endswith(".SimlabSweeper"):  # which has said it
        tell_spoiled(spoiled, keep)


def run_job(config: RunConfig, folder: Path, overrides: Sequence[str], keep: KeepConfig) -> None:
    """A single run: prepare, measure and judge, write, show, log. Raises ConfigError, OSError.

    overrides: those of the command line, of which the config was composed. keep: its ``svg``,
    ``verbose`` and ``logger`` are used. Raises SystemExit where the run is whole and a logger has
    failed.
    """
    from simlab import experiment
    from simlab.report import console, progress

    STARTED.setdefault(folder, run_files(folder))
    remove_left_beside(folder)
    with own_gpu(config.device if config.measures else "cpu"):
        ready = experiment.prepare(config)
        console.announce(
            ready.config, ready.parameters, ready.unit, ready.engines, ready.reason,
            ready.init_origin, ready.unread, ready.special,
        )  # fmt: skip
        with progress.block_bar(ready.blocks) as advance:

            def on_block() -> None:
                signals.raise_noted()
                advance()

            result = experiment.measure(ready, on_block)
        console.show_verdict(result.verdicts, result.summary)  # figures take half a second
        curves = result.curve, result.summary, result.weights
        files = write(*curves, folder, overrides, svg=keep.svg, streams=result.streams)
    console.show_files(files)
    if result.verdicts:
        console.show_tables(result.curve, result.verdicts, result.summary, keep.verbose)
    if keep.logger and not log_result(result, folder, overrides, keep.logger):
        raise SystemExit(2)


def log_result(
    result: RunResult, folder: Path, overrides: Sequence[str], loggers: Sequence[str]
) -> bool:
    """Log a run whose files are written; True if every logger has it."""
    from simlab.results import Result
    from simlab.trackers.log import log_runs

    summary = plain_values(result.summary)
    run = Result(
        result.curve, summary, result.weights, tuple(overrides), folder, result.streams
    )  # fmt: skip
    return log_runs(loggers, [(run.title, run, folder)], folder)


def write(
    curve: pd.DataFrame,
    summary: dict[str, Any],
    weights: pd.DataFrame | None,
    folder: Path,
    overrides: Sequence[str],
    *,
    svg: bool = False,
    streams: pd.DataFrame | None = None,
) -> list[Path]:
    """curve.csv, the figures, the page, and last summary.json: with it the run is whole.

    weights, streams: the rows of weights.csv and streams.csv. overrides: of the command that makes the
    run again, which the page shows.
    """
    from simlab.report import (
        checkpoint_figure,
        console,
        figure,
        growth_figure,
        streams_figure,
        style,
    )
    from simlab.report.page.build import command_in, run_page

    if not (folder / PLAN).exists():  # a sweep's own figures stay
        clear(folder)  # of an earlier run there
    summary = plain_values(summary)  # as the file has it: null, not NaN
    tables = write_tables(curve, weights, folder, streams)
    title, depth = console.title_of(summary), summary["config"]["model"]["depth"]
    lines = console.figure_lines(curve, summary)
    figures = {
        "growth": growth_figure.growth_figure(curve, title, lines, summary["tokens"]),
        "lambda": figure.lambda_figure(curve, depth, title),
        "inside": checkpoint_figure.inside_figure(curve, title),
        "streams": streams_figure.streams_figure(streams, title),
    }
    drawn = {name: each for name, each in figures.items() if each}
    files = [f for name, each in drawn.items() for f in style.save(each, folder, name, svg=svg)]
    page = run_page(
        curve, summary, title, command_in(summary, overrides), str(date.today()),
        (folder / "streams.png").read_bytes() if "streams" in drawn else None,
    )  # fmt: skip
    write_atomically(folder / PAGE, lambda path: write_text(path, page), durable=False)
    signals.raise_noted()
    write_json(folder / SUMMARY, summary)
    return [*tables, folder / SUMMARY, folder / PAGE, *files[::-1]]


def write_tables(
    curve: pd.DataFrame,
    weights: pd.DataFrame | None,
    folder: Path,
    streams: pd.DataFrame | None = None,
) -> list[Path]:
    """Write curve.csv, of a checkpoint weights.csv, of a state of several vectors streams.csv."""
    frames = {"curve.csv": curve, "weights.csv": weights, "streams.csv": streams}
    written = []
    for name, frame in frames.items():
        if frame is not None:
            write_csv(folder / name, frame)
            written.append(folder / name)
    return written


def key_of(ready: Prepared) -> str:
    """The key of a run's result.

    A checkpoint's weight hash leaves out the head, which gradients and weights.csv read: with these the
    key also knows its files' sizes and times. On the hub the commit, which is the model's name, stands
    for them: they may have been downloaded anew.
    """
    inputs = ready.tokens.tobytes()
    source = ready.config.source
    if (
        ready.checkpoint
        and not ready.checkpoint.commit
        and (ready.config.gradients or source.weights)
    ):
        top = ready.checkpoint.folder
        inner = [top, top / "model_and_optim"]
        files = sorted(p for folder in inner if folder.is_dir() for p in folder.iterdir())
        files = files or [top]  # a file that is the checkpoint
        stats = [(str(p.relative_to(top)), p.stat()) for p in files if p.is_file()]
        inputs += repr([(name, s.st_size, s.st_mtime_ns) for name, s in stats]).encode()
    return result_key(ready.config, inputs)


def find_result(key: str, ready: Prepared, results: Results) -> Path | None:
    """The folder of an earlier result with this key, or None. ready: the run that needs it.

    The weights' hash must be the same, where they are here; else the commit, in the key, says enough.
    """
    weights = ready.checkpoint.identity if ready.checkpoint else None
    return results.find(key, (lambda: weights()["weight_hash"]) if weights else None)


def sweep_job(
    config: RunConfig,
    folder: Path,
    keep: KeepConfig,
    on_block: Callable[[], None] = lambda: None,
    tokens_of: Callable[..., Tokens] | None = None,
    curves_of: Callable[..., MeasuredCurves] | None = None,
) -> dict[str, str]:
    """One job of a sweep: its result in its folder, and how it ended in RECORD.

    Returns why a kept result, by its key, wasn't used though it is there.

    tokens_of: as for ``experiment.prepare``. curves_of: measures the curves, by default
    ``experiment.measured_curves``. Whatever is raised ends this job and not the sweep; what a
    user or the machine can get wrong is recorded as a line, anything else with its traceback.
    """
    from simlab import experiment
    from simlab.inputs import token_batch

    results = Results(Path(keep.results))
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"status": "done"}
    with nothing_left_behind({folder: {}}):
        try:
            clear(folder)
            with own_gpu(config.device if config.measures else "cpu"):
                ready = experiment.prepare(config, tokens_of or token_batch, download=False)
                key = key_of(ready)  # before its files are read, which may change meanwhile
                stored = find_result(key, ready, results) if keep.resume else None
                if stored is None and config.source.stored and ready.checkpoint is None:
                    ready = experiment.prepare(config, tokens_of or token_batch)
                if stored is None:
                    result = experiment.measure(ready, on_block, curves_of)
                    stored = results.put(
                        key,
                        functools.partial(
                            write_tables, result.curve, result.weights, streams=result.streams
                        ),
                        result.summary,
                    )
            copy_result(stored, folder)
        except Exception as error:  # the one place where a sweep's jobs are kept apart
            signals.raise_noted()
            record = failure(error)
    with suppress(OSError):  # a full disk: a job without a record counts as unfinished
        write_json(folder / RECORD, record, durable=False)
    return results.spoiled


def use_result(stored: Path, folder: Path) -> None:
    """Copy a stored result into a job's folder, and record the job as done."""
    copy_result(stored, folder)
    write_json(folder / RECORD, {"status": "done"}, durable=False)


def tell_spoiled(spoiled: Mapping[str, str], keep: KeepConfig) -> None:
    """Say on stderr, in a line per reason, which kept results aren't used, by their keys."""
    for why, count in Counter(spoiled.values()).items():
        key = next(key for key, reason in spoiled.items() if reason == why)
        others = f" and {count - 1} other{'s' if count > 2 else ''}" if count > 1 else ""
        print(
            f"simlab: {Path(keep.results) / key}{others}: not used, {why}; measured again",
            file=sys.stderr,
        )


def failure(error: Exception) -> dict[str, Any]:
    """A failed job's record: its status, its error in one line, and an unexpected one's traceback."""
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        line = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    memory = out_of_memory(error)
    if memory or isinstance(error, ConfigError | OSError):
        return {"status": "failed", "error": memory or line}
    trace = "".join(traceback.format_exception(error))
    return {"status": "failed", "error": f"{type(error).__name__}: {line}", "traceback": trace}
