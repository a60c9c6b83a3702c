"""simlab from Python: ``measure``, ``probe``, ``compare``, ``multirun``, ``load``.

Keywords are the config's keys, as on the command line; ``docs/python.md`` has examples.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from simlab.config import ConfigError
from simlab.config.choices import as_choices
from simlab.config.overrides import as_overrides, in_hydra
from simlab.results import Comparison, Result, SweepResult, read_result
from simlab.store import plain_values

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from simlab.measurement.batch_checks import Batch
    from simlab.measurement.layout import Layout
    from simlab.results.probed import Probed


def measure(model: str | None = None, more: Mapping[str, Any] | None = None, **keys: Any) -> Result:
    """Measure a run, as ``python -m simlab.run`` does, and give its curves and verdict.

    Example:

        r = simlab.measure("olmo2_7b", norm="swin_renorm", seeds=8)
        r.verdict; r.plot("norm"); r.save("folder")
        simlab.measure("small", {"init.std": 0.01}, gradients=True)
        simlab.measure(source="checkpoint", **{"source.path": "allenai/OLMo-2-0425-1B"})

    Args:
        model: A preset of conf/model, such as ``olmo2_7b`` or ``small``.
        more: Keys with a dot, such as ``init.std``, which Python takes as no keyword.
        keys: Any key of the config. A dict's keys are those below it: ``init={"std": 0.01}``.

    Returns the run. Its ``.curves`` have a row per curve × seed × step; for shapes and units see
    ``Result``. Raises ConfigError, which names the key and what is allowed. Nothing is written to disk,
    but for what ``logger="tensorboard"`` and the like ask for (docs/trackers.md), in outputs/DATE/TIME.
    """
    from simlab.config.schema import KeepConfig
    from simlab.config.validate import compose
    from simlab.experiment import measure as measured
    from simlab.experiment import prepare
    from simlab.report import progress
    from simlab.sweep.gpu_lock import own_gpu

    asked = _asked(model, more, keys)
    given = as_overrides(asked)
    for key in ("hydra", *(each.name for each in fields(KeepConfig) if each.name != "logger")):
        if any(re.match(rf"{key}[=./]", each) for each in given):
            raise ConfigError(f"{key}: of the command and of multirun; measure writes no file")
    config = compose(given)
    with own_gpu(config.device if config.measures else "cpu"):
        ready = prepare(config)
        with progress.block_bar(ready.blocks) as advance:
            found = measured(ready, advance)
    summary = plain_values(found.summary)  # as summary.json has it
    result = Result(found.curve, summary, found.weights, tuple(given), streams=found.streams)
    if loggers := asked.get("logger"):
        from simlab.trackers.log import log_runs

        place = _new_folder()
        place.mkdir(parents=True)
        names = [loggers] if isinstance(loggers, str) else list(loggers)
        log_runs(names, [(result.title, result, place)], place)
    return result


def probe(
    model: nn.Module, batch: Batch | None = None, *, layout: Layout | None = None, curve: str = "model",
    seed: int = 0, gradients: bool = False, random: int = 0,
    factory: Callable[[], nn.Module] | None = None,
) -> Probed:  # fmt: skip
    """Measure the residual stream of a decoder after its embedding and after every sublayer.

    Example:

        r = simlab.probe(model, ids, random=8)  # .verdict, .plot("norm"), .rows(), .save("folder")
        with simlab.probe(model) as result:     # or any forward calls of your own
            model(ids)
        rows = result.rows()

    Your own calls run in the mode the model is in. They are batches of one curve, of sequences of one
    length and without padding. No output and no gradient changes. What torch.compile has compiled runs
    uncompiled meanwhile: it would pass the hooks by.

    Args:
        model: Any decoder whose blocks pass a stream of shape (batch, length, width), or several, which
            are measured as if they were sequences.
        batch: Token ids (batch, length), or a mapping (``model(**batch)``), or a tuple
            (``model(*batch)``). It is passed through the model at once, without gradients and in eval
            mode; every submodule's mode is put back.
        layout: Describes the residual stream; by default it is looked for, and ``.layout`` says what
            was found.
        curve: The name in the rows' column ``curve``; ``random`` says that the model is a random init.
        seed: The number in the rows' column ``seed``.
        gradients: Also measure the gradient of the model's loss with respect to the stream: of the loss
            that the model gives, as with labels in the batch, or else that of the next tokens. In a
            ``with`` block it is the gradient of your own ``loss.backward()``. Parameters get none from
            a batch that is passed here.
        random: How many random inits of the model to measure on the batch beside it, with seeds from 0,
            one in memory at a time.
        factory: A function without arguments that gives a new model, drawn with torch's generator; by
            default, of a model of transformers, its class's own init.

    Returns the result. Raises ConfigError for a model without a list of blocks, a batch that is none of
    these, and random inits that can't be drawn or aren't the model's.
    """
    from simlab.experiment.probed import random_curves
    from simlab.measurement.model_probe import ModelProbe
    from simlab.report import progress
    from simlab.results.probed import Probed

    if isinstance(random, bool) or not isinstance(random, int) or random < 0:
        raise ConfigError(f"probe: random={random!r}: must be a number of random inits, from 0")
    wanted = {"curve": (curve, str), "seed": (seed, int), "gradients": (gradients, bool)}
    for name, (value, kind) in wanted.items():
        if not isinstance(value, kind):
            raise ConfigError(f"probe: {name}={value!r}: must be of type {kind.__name__}")
    if factory is not None and not callable(factory):
        raise ConfigError(
            f"probe: factory is a {type(factory).__name__}: must be a function that gives a new model"
        )
    if factory is not None and not random:
        raise ConfigError("probe: factory makes random inits: say how many, as random=8")
    if random and (batch is None or curve == "random"):
        missing = "the batch on which they are measured" if batch is None else "another curve="
        raise ConfigError(f"probe: random={random}: give {missing}")
    measuring = ModelProbe(model, layout, curve, seed, gradients)
    given = {"layout": layout, "gradients": gradients, "random": random, "factory": factory}
    options = [
        f"{key}={value if isinstance(value, int) else key}" for key, value in given.items() if value
    ]
    if batch is None:
        call = f"simlab.probe({', '.join(['model', *options])})"
        return Probed(measuring, [], f"with {call} as r:\n    model(batch)")
    depth = max(len(probes) for probes in measuring.stacks.values())
    with progress.block_bar(depth * (1 + random)) as measuring.on_block:
        measuring.measure(batch)
        inits = random_curves(measuring, batch, layout, random, factory) if random else []
    measuring.on_block = lambda: None
    return Probed(measuring, inits, f"simlab.probe({', '.join(['model', 'batch', *options])})")


def _new_folder() -> Path:
    """A folder of outputs/, by the time, as the command's."""
    return Path(f"outputs/{datetime.now():%Y-%m-%d/%H-%M-%S-%f}")


def compare(*runs: Result, labels: Sequence[str] | None = None) -> Comparison:
    """Put runs side by side.

    Example:

        pre, post = simlab.measure("small", norm="pre"), simlab.measure("small", norm="post")
        simlab.compare(pre, post).plot("norm")

    Args:
        runs: Finished runs.
        labels: A name of each; by default what differs between their overrides, or else their titles.

    Returns them as one ``Comparison``: its ``.frame`` has all rows, its ``.table`` a row per run and
    curve. Raises ConfigError for no run, or labels that aren't one of each.
    """
    if not runs or not all(isinstance(run, Result) for run in runs):
        raise ConfigError("compare: give at least one run, and each as an argument of its own")
    labels = _labels(runs) if labels is None else labels
    if len(labels) != len(runs) or len(set(labels)) < len(labels):
        raise ConfigError(
            f"compare: labels={list(labels)}: give {len(runs)} different ones, one per run"
        )
    pairs = list(zip(labels, runs, strict=True))
    frame = pd.concat([run.curves.assign(run=label) for label, run in pairs], ignore_index=True)
    return Comparison(frame, {label: run.headline for label, run in pairs})


def _labels(runs: Sequence[Result]) -> list[str]:
    """A label for each run: the overrides that the other runs lack, or else so of its title."""
    shared = set.intersection(*(set(run.overrides) for run in runs))
    labels = [" ".join(o for o in run.overrides if o not in shared) for run in runs]
    if not all(labels) or len(set(labels)) < len(labels):
        parts = [re.split(r", (?![^(]*\))", run.title) for run in runs]
        same = set.intersection(*map(set, parts))
        labels = [
            ", ".join(p for p in part if p not in same) or run.title
            for part, run in zip(parts, runs, strict=True)
        ]
    again = {label for label in labels if labels.count(label) > 1}
    return [f"{label} ({i + 1})" if label in again else label for i, label in enumerate(labels)]


def _asked(model: str | None, more: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
    """All keys that a call gives. Raises ConfigError where more isn't a mapping."""
    if more is not None and not isinstance(more, Mapping):
        raise ConfigError(f'{more!r}: give keys with a dot in a dict, as {{"init.std": 0.01}}')
    return as_choices({**({"model": model} if model else {}), **(more or {}), **keys})


def multirun(
    sweep: Mapping[str, Sequence[Any]], model: str | None = None, more: Mapping[str, Any] | None = None,
    *, folder: str | Path | None = None, **keys: Any,
) -> SweepResult:  # fmt: skip
    """Measure every combination of values, as ``python -m simlab.run -m`` does.

    Example:

        s = simlab.multirun({"depth": [8, 16, 32], "init.std": [0.01, 0.02]}, seeds=8)
        s.frame; s.table; s.plot()

    A result that is kept under ``results`` (by default outputs/results) isn't computed again: after an
    interrupt the same call does the rest. Runs in a process of its own, and shows its progress.

    Args:
        sweep: Lists of values by key, dotted or not.
        model: As of ``measure``, for all jobs.
        more: As of ``measure``, for all jobs; also ``{"hydra/launcher": "joblib"}``.
        keys: As of ``measure``, for all jobs.
        folder: Where the sweep's files go; by default outputs/DATE/TIME.

    Returns the sweep: ``.frame`` has a row per job × curve × seed × step, ``.table`` one per job and
    curve. Raises ConfigError for a mistake, before any job starts. Jobs that fail are in ``.failed``.
    """
    from simlab.report import progress

    if not isinstance(sweep, Mapping) or not sweep:
        raise ConfigError(
            f'multirun: {sweep!r}: give lists of values by key, as {{"depth": [8, 16]}}'
        )
    swept = []
    for key, values in sweep.items():
        if (
            isinstance(values, str | Mapping)
            or not hasattr(values, "__iter__")
            or not len(list(values))
        ):
            raise ConfigError(f"multirun: {key}={values!r}: give a list of values")
        swept.append(f"{key}={','.join(in_hydra(key, value) for value in values)}")
    given = as_overrides(_asked(model, more, keys))
    if "dry_run=true" in given:
        raise ConfigError(
            "multirun: dry_run: of the command, which prints what each job would take"
        )
    place = Path(folder) if folder is not None else _new_folder()
    command = [
        sys.executable,
        "-m",
        "simlab.run",
        "-m",
        *given,
        *swept,
        f"hydra.sweep.dir={in_hydra('folder', str(place))}",
    ]
    said: list[str] = []
    with (
        progress.of_process() as (env, show),
        subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8"
        ) as process,
    ):
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if show(line.rstrip()):
                    continue
                if said:  # the last line may be a mistake's, which is raised
                    print(said[-1], file=sys.stderr, flush=True)
                said.append(line.rstrip())
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # a notebook's goes to its kernel alone
            process.wait()
            raise
    status = process.returncode
    if status == 2 or not (place / "sweep.json").is_file():
        raise ConfigError(
            said[-1].removeprefix("simlab: ") if said else f"multirun: exit status {status}"
        )
    if said:
        print(said[-1], file=sys.stderr)
    return load_sweep(place)


def load(folder: str | Path) -> Result | SweepResult:
    """A finished run or sweep again, from the folder that it wrote.

    Example:

        simlab.load("outputs/my_run").plot("norm")

    Args:
        folder: A run's, with summary.json, or a sweep's, with sweep.json; of an interrupted sweep too.

    Returns what the folder holds; ``load_run`` and ``load_sweep`` give one of the two. Both have a
    ``.plot``; a run's rows are ``.curves``, a sweep's ``.frame``. Raises ConfigError for a folder
    without one, or whose files aren't what simlab writes.
    """
    from simlab.sweep.job import PLAN

    return (
        load_sweep(folder) if (Path(folder) / PLAN).is_file() else _run_in(folder, "run or sweep")
    )


def load_run(folder: str | Path) -> Result:
    """A finished run again, as ``load``, for a type checker that must know that it is one.

    Example:

        simlab.load_run("outputs/my_run").curves  # a row per curve, seed and step

    Args:
        folder: One that ``python -m simlab.run`` or ``.save()`` wrote, with summary.json.

    Returns the run. Raises ConfigError for a folder without one, such as a sweep's.
    """
    from simlab.sweep.job import PLAN

    if (Path(folder) / PLAN).is_file():
        raise ConfigError(f"{folder}: holds a sweep; simlab.load_sweep reads it")
    return _run_in(folder, "run")


def _run_in(folder: str | Path, what: str) -> Result:
    """The run in a folder. what: is missed where there is none. Raises ConfigError."""
    from simlab.store import SUMMARY
    from simlab.sweep.report import overrides_in

    place = Path(folder)
    if not place.is_dir():
        missing = "is a file; give its folder" if place.exists() else "no such folder"
        raise ConfigError(f"{place}: {missing}")
    if not (place / SUMMARY).is_file():
        raise ConfigError(f"{place}: holds no finished {what}: no {SUMMARY}")
    return read_result(place, overrides_in(place))


def load_sweep(folder: str | Path) -> SweepResult:
    """A sweep again, as ``load``, for a type checker that must know that it is one.

    Example:

        simlab.load_sweep("outputs/my_sweep").table  # a row per job and curve

    Args:
        folder: One that ``python -m simlab.run -m`` or ``multirun`` wrote, with sweep.json; of an
            interrupted sweep too.

    Returns the sweep. Raises ConfigError for a folder without one, such as a run's.
    """
    from simlab.sweep.job import PLAN
    from simlab.sweep.report import curves, read_entries, read_vectors, rows

    place = Path(folder)
    if not (place / PLAN).is_file():
        if place.is_dir():
            raise ConfigError(f"{place}: holds no sweep: no {PLAN}; simlab.load_run reads a run")
        raise ConfigError(
            f"{place}: {'is a file; give its folder' if place.exists() else 'no such folder'}"
        )
    entries, swept = read_entries(place)
    done = [each for each in entries if each.status == "done"]
    frame = curves(done) if done else pd.DataFrame()
    return SweepResult(
        place, frame, rows(done, frame) if done else pd.DataFrame(), swept,
        {each.number: each.error for each in entries if each.status == "failed"},
        [each.number for each in entries if each.status == "unfinished"],
        {each.number: each.folder for each in done}, curves(done, read_vectors),
    )  # fmt: skip
