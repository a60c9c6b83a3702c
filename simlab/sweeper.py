"""The Hydra callback ``simlab.sweeper.Around``, under the name that earlier runs' ``.hydra/`` have."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
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
            if not whole:
                raise SystemExit(1)


def is_ours(config: DictConfig) -> bool:
    """True if simlab's own sweeper runs the jobs, which writes the sweep's plan itself."""
    return str(config.hydra.sweeper._target_).endswith(".SimlabSweeper")
