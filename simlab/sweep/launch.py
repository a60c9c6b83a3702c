"""Hands a sweep's jobs to Hydra's launchers, so that one that dies takes no other down.

A job that ends writes its record itself, done or failed. This module writes the record of a job whose
process was killed: by the system for its memory, by SLURM for its time, by a user.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import setup_globals
from hydra.plugins.launcher import Launcher

from simlab import signals, store
from simlab.config import ConfigError
from simlab.sweep import job
from simlab.sweep.plan import Job

_JOB_LOOK_SECONDS = 0.2  # seconds between two looks at a job
_SLURM_LOOK_SECONDS = 3.0  # seconds between two questions to SLURM
LATE = 5.0  # seconds that a record may take to be seen on a shared disk


@dataclass(frozen=True)
class Place:
    """A job of a sweep: its folder, its number of blocks to compute, and its stored result if any.

    subdir: of the sweep's folder, in which ``folder`` is. hashes: the config hashes that its summary
    may have, one for each device that it may run on.
    """

    job: Job
    folder: Path
    subdir: str
    blocks: int
    stored: Path | None
    hashes: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        """True if the job has left its record."""
        return (self.folder / job.RECORD).is_file()


def executor(launcher: Launcher) -> str:
    """``local`` or ``slurm`` for submitit's launchers, else an empty text."""
    return str(getattr(launcher, "_EXECUTOR", ""))


def is_local(launcher: Launcher) -> bool:
    """True if a launcher's jobs run on this machine."""
    return executor(launcher) == "local" or type(launcher).__name__ in (
        "JoblibLauncher", "BasicLauncher",
    )  # fmt: skip


def at_once(launcher: Any) -> int:
    """The number of jobs that run on this machine at a time; 1 where it isn't known."""
    cores = os.cpu_count() or 1
    if type(launcher).__name__ == "JoblibLauncher":
        jobs = launcher.joblib["n_jobs"]
        if not isinstance(jobs, int) or not jobs:
            raise ConfigError(f"hydra.launcher.n_jobs={jobs}: allowed: an integer, not 0")
        return max(1, jobs if jobs > 0 else cores + 1 + jobs)
    if executor(launcher) == "local":
        return int(max(1, cores // (launcher.params.get("cpus_per_task") or 1)))
    return 1


def overrides_of(place: Place) -> list[str]:
    """A job's overrides and its folder, which Hydra would number by what is launched, from 0."""
    folder = place.subdir.replace("\\", "\\\\").replace("'", "\\'")
    return [*place.job.overrides, f"hydra.sweep.subdir='{folder}'"]


def launch(launcher: Launcher, places: Sequence[Place]) -> None:
    """Launch jobs and wait until each has ended. KeyboardInterrupt cancels those that have not."""
    if executor(launcher):
        submit(launcher, places)
        return
    try:
        launcher.launch([overrides_of(place) for place in places], places[0].job.number)
    except Exception as error:
        signals.raise_noted()
        # A job records its own errors, so this is the pool's: a worker died. Each launcher has a class
        # of its own for that, and none says which job it was. The text goes into those jobs' records.
        left = [place for place in places if not place.ended]
        started = [place for place in left if (place.folder / ".hydra").exists()]
        if len(places) == 1 or not started:
            for place in left:
                lost(place, f"its process died ({type(error).__name__}: {error})")
            return
        for again in ([place for place in left if place not in started], *([p] for p in started)):
            if again:
                launch(launcher, again)


def submit(launcher: Any, places: Sequence[Place]) -> None:
    """Launches as ``hydra-submitit-launcher`` does, and also handles jobs that die, and Ctrl-C."""
    import submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    setup_globals()
    kind, params = executor(launcher), dict(launcher.params)
    start = {"folder": params.pop("submitit_folder")}
    if "max_num_timeout" in params:
        start[f"{kind}_max_num_timeout"] = params.pop("max_num_timeout")
    if kind == "local" and params.get("gpus_per_node") is None:
        import torch

        params["gpus_per_node"] = torch.cuda.device_count()  # else a job is shown none of them
    auto = submitit.AutoExecutor(cluster=kind, **start)
    common = {field.name for field in fields(BaseQueueConf)}
    auto.update_parameters(**{k if k in common else f"{kind}_{k}": v for k, v in params.items()})
    state = Singleton.get_state()
    arguments = [
        (overrides_of(p), "hydra.sweep.dir", p.job.number, str(p.job.number), state) for p in places
    ]
    submitted: list[Any] = []
    try:
        if kind == "slurm":
            submitted += auto.map_array(launcher, *zip(*arguments, strict=True))
            queue = Queue(submitted)
            while not all(p.ended or queue.gone(t) for p, t in zip(places, submitted, strict=True)):
                time.sleep(_JOB_LOOK_SECONDS)
                signals.raise_noted()
        else:
            for each in arguments:  # there is no queue: all would start at once
                while sum(not t.done() for t in submitted) >= at_once(launcher):
                    time.sleep(_JOB_LOOK_SECONDS)
                    signals.raise_noted()
                with stderr_in(Path(start["folder"]).parent):
                    submitted.append(auto.submit(launcher, *each))
            while not all(task.done() for task in submitted):
                time.sleep(_JOB_LOOK_SECONDS)
                signals.raise_noted()
    except BaseException:
        for task in submitted:
            task.cancel(check=False)
        raise
    for place, task in zip(places, submitted, strict=True):
        if not place.ended and not _appears(place):
            state = task.get_info(mode="force").get("State", "no longer in the queue")
            lost(place, f"its process died ({state}; see {task.paths.stderr})")


@contextmanager
def stderr_in(folder: Path) -> Iterator[None]:
    """Processes started in this block write stderr to a file: submitit's log at length on Ctrl-C."""
    folder.mkdir(parents=True, exist_ok=True)
    stderr = os.dup(2)
    try:
        with (folder / "submitit.log").open("a") as log:
            os.dup2(log.fileno(), 2)
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


class Queue:
    """Which of these jobs SLURM still has. sacct says nothing of a cancelled one that was waiting."""

    def __init__(self, submitted: Sequence[Any]) -> None:
        self.ids = sorted({str(task.job_id).partition("_")[0] for task in submitted})
        self.asked = 0.0
        self.has: set[str] | None = None  # not known

    def gone(self, task: Any) -> bool:
        """True if the job is surely no longer in the queue; SLURM is asked every few seconds."""
        if time.monotonic() - self.asked > _SLURM_LOOK_SECONDS:
            self.has = self._ask()
            self.asked = time.monotonic()
        return self.has is not None and str(task.job_id) not in self.has

    def _ask(self) -> set[str] | None:
        command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join(self.ids)}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        except subprocess.TimeoutExpired:
            return None
        if done.returncode and "Invalid job id" not in done.stderr:
            return None  # the controller doesn't answer: that says nothing of the jobs
        return set(done.stdout.split())


def _appears(place: Place) -> bool:
    """True if a job's record appears within LATE seconds: a shared disk may show a new file late."""
    for _ in range(int(LATE / _JOB_LOOK_SECONDS)):
        if place.ended:
            return True
        time.sleep(_JOB_LOOK_SECONDS)
        signals.raise_noted()
    return False


def lost(place: Place, why: str) -> None:
    """Write the failed record of a job whose process died without writing one."""
    place.folder.mkdir(parents=True, exist_ok=True)
    job.clear(place.folder)
    store.write_json(place.folder / job.RECORD, {"status": "failed", "error": why})
