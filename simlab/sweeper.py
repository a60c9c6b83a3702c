"""The Hydra callback ``simlab.sweeper.Around``, under the name that earlier runs' ``.hydra/`` have."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from simlab import signals
from simlab.config import ConfigError
from simlab.config.cli_errors import or_exit
from simlab.config.validate import read, read_keep
from simlab.store import write_json
from simlab.sweep import job


class Around(Callback):
    """Checks a single run before Hydra makes its folder, and reports on a sweep when it has ended.

    Hydra makes a warning of a callback's exception, so a mistake ends the process from here.
    """

    def __init__(self) -> None:
        self.alone = ExitStack()  # holds the folder of another sweeper's sweep until its report

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Check a run's config, files and device. Raises SystemExit for a mistake and a dry run."""
        with or_exit():
            checked, keep = read(config), read_keep(config)
            from simlab.experiment import prepare

            ready = prepare(checked)
            if keep.dry_run:
                from simlab.report import estimates
                from simlab.sweep.sweeper import estimated

                estimates.show_estimates([estimated(None, ready, False)], 1)
                raise SystemExit(0)
            HydraConfig.instance().set_config(config)  # the folder's name may be made of its keys
            folder = Path(os.path.abspath(config.hydra.run.dir))  # as Hydra names it then
            job.STARTED[folder] = job.run_files(folder)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Prepare for the report on another sweeper's jobs. Raises SystemExit for a dry run of it."""
        with or_exit():
            refuse_swept_logger(config.hydra.overrides.task)
        if is_ours(config):
            return
        with or_exit():
            from simlab.sweep.sweeper import alone_in, forget, written_by_hydra

            if read_keep(config).dry_run:
                raise ConfigError("dry_run=true: only with hydra/sweeper=simlab")
            folder = Path(config.hydra.sweep.dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.alone.enter_context(alone_in(folder))
            forget(folder)
            self.before = written_by_hydra(folder)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """One report over all jobs. Raises SystemExit where one has failed."""
        if config.dry_run:
            return
        folder = Path(config.hydra.sweep.dir)
        with or_exit():
            from simlab.sweep.report import report
            from simlab.sweep.sweeper import alone_in, described, made_by

            if not is_ours(config):
                plan = described(folder, self.before, read_keep(config).answer)
                write_json(folder / job.PLAN, plan | made_by(config))
            try:
                with alone_in(folder) if is_ours(config) else self.alone:
                    whole = report(folder, svg=read_keep(config).svg)
            except KeyboardInterrupt:
                print(
                    "simlab: interrupted; the jobs are kept, "
                    f"python -m simlab.sweep {shlex.quote(str(folder))} reports",
                    file=sys.stderr,
                )
                raise SystemExit(signals.status()) from None
            logged = log_jobs(folder, read_keep(config).logger)
            if not (whole and logged):
                raise SystemExit(2 if whole else 1)


def refuse_swept_logger(overrides: Sequence[str]) -> None:
    """Raises ConfigError for ``-m logger=A,B``, which would be two jobs for one result."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.get_key_element() == "logger" and override.is_sweep_override():
            names = str(override.input_line).partition("=")[2]
            raise ConfigError(f"{override.input_line}: for several give a list, logger=[{names}]")


def log_jobs(folder: Path, loggers: Sequence[str]) -> bool:
    """Log a sweep's finished jobs, a run each, and say where they are; True if no logger has failed."""
    if not loggers:
        return True
    from simlab.results import read_result
    from simlab.sweep.report import of_sweep, read_entries
    from simlab.trackers.log import log_runs

    done = [each for each in read_entries(folder)[0] if each.status == "done"]
    runs = ((of_sweep(e), read_result(e.folder, e.overrides), e.folder) for e in done)
    return log_runs(loggers, runs, folder, sweep=True)


def is_ours(config: DictConfig) -> bool:
    """True if simlab's own sweeper runs the jobs, which writes the sweep's plan itself."""
    return str(config.hydra.sweeper._target_).endswith(".SimlabSweeper")
