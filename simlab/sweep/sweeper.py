"""A sweep: all jobs are checked before the first starts; jobs with a stored result don't run again."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from simlab import signals, store
from simlab.budget.machine import TORCH, refuse_imports
from simlab.config import ConfigError, RunConfig
from simlab.config.validate import read_keep
from simlab.report import estimates, progress
from simlab.report.page import PAGE
from simlab.sweep import job, launch
from simlab.sweep.launch import Place
from simlab.sweep.plan import Job, SweepPlan, column, plan_experiment

if TYPE_CHECKING:
    from simlab.experiment import Prepared

DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # ten times as fast, where it was built
NUMBER = "${hydra.job.num}"  # hydra.sweep.subdir as Hydra has it
REPORT = (
    "answer.md",
    "families.csv",
    PAGE,
    "heatmap.*",
    "lambda_*.png",  # of earlier versions, one for each key
    "lambda_*.svg",
    "statistics.*",
    "gradients.*",
    "zoo.*",
)


class Sweep:
    """Every combination of the values, numbered as Hydra does; all are checked before any starts.

    Only jobs without a kept result are launched. With Hydra's basic launcher they run in this process:
    Hydra itself takes 60 ms to compose each and to write its files, and again 40 to check it.
    """

    def __init__(self, context: HydraContext, task: TaskFunction, config: DictConfig) -> None:
        self.config, self.keep = config, read_keep(config)
        assert isinstance(context.config_loader, ConfigLoaderImpl)
        self.loader = context.config_loader
        installed(config.hydra.launcher._target_)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=task, config=config
        )

    def run(self) -> None:
        """Check all jobs and launch those without a stored result. Raises ConfigError, OSError."""
        hydra = self.config.hydra
        # As they are, not resolved: an override may name another key's value.
        settings: Any = OmegaConf.to_container(hydra, resolve=False)
        params = [f"{key}={value}" for key, value in (settings["sweeper"]["params"] or {}).items()]
        overrides = settings["overrides"]
        planned = plan_experiment(
            self.loader, hydra.job.config_name, overrides["hydra"], params, overrides["task"]
        )
        from simlab.inputs import token_batch

        self.results = store.Results(Path(self.keep.results))
        self.tokens_of = functools.lru_cache(4)(token_batch)  # jobs often have the same
        folder = Path(hydra.sweep.dir)
        places, rows, refused = [], [], []
        for place, ready in self.look(planned, folder):
            places.append(place)
            if isinstance(ready, ConfigError):
                refused.append(ready)
            elif self.keep.dry_run:
                rows.append(estimated(place.job, ready, place.stored is not None))
        if len(refused) == len(places):
            raise refused[0]
        job.tell_spoiled(self.results.spoiled, self.keep)
        if self.keep.dry_run:
            estimates.show_estimates(rows, launch.at_once(self.launcher))
            return
        if len({place.subdir for place in places}) < len(places):
            raise ConfigError("hydra.sweep.subdir: gives several jobs the same folder")
        if any(Path(p.subdir).is_absolute() or ".." in Path(p.subdir).parts for p in places):
            raise ConfigError("hydra.sweep.subdir: leads out of the sweep's folder")
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder):
            self.start(planned, places, folder)

    def start(self, planned: SweepPlan, places: Sequence[Place], folder: Path) -> None:
        """Lay the sweep out and launch it. Raises OSError, SystemExit after Ctrl-C, which is told."""
        laid_out = False
        try:
            self.lay_out(planned, places, folder)
            laid_out = True
            self.launch([place for place in places if not place.stored])
        except KeyboardInterrupt:
            for place in places:
                if not place.ended:
                    shutil.rmtree(place.folder / ".hydra", ignore_errors=True)
                    with contextlib.suppress(OSError):  # it holds something, or was never made
                        place.folder.rmdir()
            line = "simlab: interrupted before any job started; the same command starts the sweep"
            if laid_out:
                done = sum(place.ended for place in places)
                line = (
                    f"simlab: interrupted; {done} of {len(places)} jobs are done and kept. The same "
                    "command does the rest; python -m simlab.sweep "
                    f"{shlex.quote(str(folder))} reports on these"
                )
            print(line, file=sys.stderr)
            raise SystemExit(signals.status()) from None

    def lay_out(self, planned: SweepPlan, places: Sequence[Place], folder: Path) -> None:
        """Write the sweep's plan and stored results into its folder; remove an earlier sweep's."""
        self.results.root.mkdir(parents=True, exist_ok=True)  # or this is said now
        self.results.clean()
        job.remove_left_beside(folder)
        forget(folder)
        for place in places:
            if place.folder.is_file():
                store.make_way(place.folder)
            job.clear(place.folder)
            store.remove(place.folder / ".hydra")
        OmegaConf.save(self.config, folder / "multirun.yaml")
        store.write_json(
            folder / job.PLAN, description(planned, places, self.keep.answer) | made_by(self.config)
        )
        for place in places:
            if place.stored:
                write_hydra(place)
                job.use_result(place.stored, place.folder)

    def look(
        self, planned: SweepPlan, folder: Path
    ) -> Iterator[tuple[Place, Prepared | ConfigError]]:
        """Prepare every job, as far as this machine can. Raises ConfigError.

        With answer=families a checkpoint that is there and can't be measured isn't the others' end: its
        error is given, and its job fails with it.
        """
        local = self.in_process or launch.is_local(self.launcher)
        for each in planned.jobs:
            signals.raise_noted()
            hashes: list[str] = []
            stored, blocks = None, 0
            for device in possible_devices(each.config, local):
                ready = self.prepared(each.config, device)
                if isinstance(ready, ConfigError):
                    break
                blocks = ready.blocks
                hashes.append(store.config_hash(ready.config))
                if self.keep.resume:
                    stored = job.find_result(job.key_of(ready), ready, self.results)
                if stored:
                    hashes = hashes[-1:]
                    break
            if local and not stored and each.config.measures and not isinstance(ready, ConfigError):
                self.refuse(ready.config)
            subdir = self.subdir(each)
            yield Place(each, folder / subdir, subdir, blocks, stored, tuple(hashes)), ready

    def prepared(self, config: RunConfig, device: str) -> Prepared | ConfigError:
        """A job's run, or why its checkpoint can't be measured, where that isn't the others' end."""
        from simlab.experiment import prepare

        try:
            return prepare(config, self.tokens_of, device, download=False)
        except ConfigError as error:
            if self.keep.answer != "families" or self.keep.dry_run:
                raise
            from simlab.experiment.build import refuse_missing

            refuse_missing(config.source)
            return error

    def refuse(self, config: RunConfig) -> None:
        """Raise ConfigError for a job that needs more memory than this machine has for each."""
        import torch

        from simlab.budget.memory import INTERPRETER, refuse

        threads, cpu = torch.get_num_threads(), not config.device.startswith("cuda")
        share = launch.at_once(self.launcher) if cpu else 1
        refuse(config, threads, share, INTERPRETER if cpu and not self.in_process else 0)

    @functools.cached_property
    def in_process(self) -> bool:
        """True if the jobs run in this process and need nothing from Hydra but a composed config."""
        hydra = self.config.hydra
        return bool(
            type(self.launcher) is BasicLauncher
            and list(hydra.callbacks) == ["simlab"]
            and not hydra.job.env_set
            and not hydra.job.chdir
        )

    def subdir(self, each: Job) -> str:
        """A job's folder in the sweep's: its number, or what ``hydra.sweep.subdir`` says."""
        sweep = OmegaConf.to_container(self.config.hydra.sweep, resolve=False)
        assert isinstance(sweep, dict)
        if sweep["subdir"] == NUMBER:
            return str(each.number)
        composed = self.loader.load_sweep_config(self.config, list(each.overrides))
        with open_dict(composed):
            composed.hydra.job.num = composed.hydra.job.id = each.number
        HydraConfig.instance().set_config(composed)
        return str(composed.hydra.sweep.subdir)

    def launch(self, places: Sequence[Place]) -> None:
        """Run these jobs, here or by the launcher; each has then ended, or says why it couldn't."""
        if not places:
            return
        blocks = sum(place.blocks for place in places)
        if self.in_process:
            from simlab.experiment.sharing import SharedCurves, sharing_groups

            # The report's imports take a quarter of a second, which a second core has now.
            threading.Thread(target=import_figures, daemon=True).start()
            ended = done = 0
            with progress.sweep(len(places), blocks) as bar:
                for group in sharing_groups([place.job.config for place in places]):
                    curves_of = SharedCurves()
                    for place in map(places.__getitem__, group):
                        signals.raise_noted()
                        write_hydra(place)
                        job.sweep_job(
                            place.job.config,
                            place.folder,
                            self.keep,
                            bar.block,
                            self.tokens_of,
                            curves_of,
                        )
                        ended, done = ended + 1, done + place.blocks
                        bar.reached(ended, done)
            return

        def look() -> list[int]:
            return [place.blocks for place in places if place.ended]

        places = sorted(places, key=lambda place: -place.blocks)  # none is left to the end alone
        size = self.config.hydra.sweeper.max_batch_size or len(places)
        with progress.sweep(len(places), blocks, look):
            for start in range(0, len(places), size):
                launch.launch(self.launcher, places[start : start + size])


def import_figures() -> None:
    """Import what draws the report. What fails here, the report tells: it imports it again."""
    with contextlib.suppress(ImportError, OSError, MemoryError):
        importlib.import_module("simlab.report.sweep_figures")


def possible_devices(config: RunConfig, local: bool) -> list[str]:
    """Where a job may run. On a cluster ``auto`` may become each of three: a result of any will do."""
    if not config.measures:
        return ["cpu"]
    if not local:
        return ["cpu", "cuda", "mps"] if config.device == "auto" else [config.device]
    refuse_imports(TORCH)
    from simlab.measurement.engine import resolve_device

    return [str(resolve_device(config.device))]


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a sweep's folder for this block. Raises ConfigError where another sweep holds it.

    Both would write the same jobs' folders, and each would report on the other's jobs.
    """
    with store.locked(folder) as mine:
        if mine is False:
            raise ConfigError(
                f"hydra.sweep.dir={folder}: another sweep runs in this folder; give this one its own"
            )
        yield


def forget(folder: Path) -> None:
    """Remove an earlier sweep's plan and report from the folder."""
    for pattern in (
        job.PLAN,
        "sweep.parquet",
        "streams.parquet",
        "jobs.csv",
        *job.FIGURES,
        *REPORT,
    ):
        for path in folder.glob(pattern):
            if path.is_file() or path.is_symlink():  # a folder of that name isn't ours
                path.unlink()


def installed(target: str) -> None:
    """Raises ConfigError where a launcher's package isn't there."""
    package = ".".join(target.split(".")[:2])
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise ConfigError(
            f"hydra.launcher: {target} is not installed; pip install hydra-joblib-launcher "
            "hydra-submitit-launcher"
        )


def write_hydra(place: Place) -> None:
    """A job's .hydra/, as Hydra writes it but for hydra.yaml, which multirun.yaml has for them all."""
    folder = place.folder / ".hydra"
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"config": dict(place.job.composed), "overrides": list(place.job.overrides)}
    for name, content in contents.items():
        text = yaml.dump(content, Dumper=DUMPER, sort_keys=False, allow_unicode=True)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def description(
    planned: SweepPlan, places: Sequence[Place], answer: str | None = None
) -> dict[str, Any]:
    """The content of sweep.json: swept keys with their values, every planned job, the answer's name.

    A job's ``config_hash`` lists the hashes that its summary may have: others are another job's.
    """
    return {
        "answer": answer,
        "swept": {key: list(values) for key, values in planned.swept.items()},
        "jobs": [
            {
                "job": place.job.number,
                "folder": place.subdir,
                "overrides": list(place.job.overrides),
                "values": dict(place.job.values),
                "config_hash": list(place.hashes),
            }
            for place in places
        ],
    }


def made_by(config: DictConfig) -> dict[str, Any]:
    """The part of sweep.json that says with which overrides the sweep was started."""
    # As they are, not resolved: an override may name another key's value.
    given: Any = OmegaConf.to_container(config.hydra.overrides, resolve=False)
    ours = ("hydra.mode=", "hydra.sweep.dir=")
    own = [text for text in given["hydra"] if not text.startswith(ours)]
    return {"overrides": [*own, *given["task"]]}


def written_by_hydra(folder: Path) -> dict[Path, int]:
    """The files in which Hydra describes the jobs of a sweep's folder, with their times."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob(".hydra/hydra.yaml")}


def described(
    folder: Path, before: Mapping[Path, int], answer: str | None = None
) -> dict[str, Any]:
    """As ``description``, for another sweeper's jobs: from the files that Hydra wrote for each.

    before: such files as were there before the sweep, with their times; they are another one's.
    """
    parser = OverridesParser.create()
    jobs = []
    for path, written in written_by_hydra(folder).items():
        if before.get(path) == written:
            continue
        hydra: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        number, overrides = hydra["hydra"]["job"]["num"], hydra["hydra"]["overrides"]["task"]
        parsed = {column(o.get_key_element()): o.value() for o in parser.parse_overrides(overrides)}
        values = {
            key: value if value is None or isinstance(value, bool | int | float) else str(value)
            for key, value in parsed.items()
        }
        inner = str(path.parents[1].relative_to(folder))
        known = {"job": number, "folder": inner, "overrides": overrides, "values": values}
        with contextlib.suppress(ConfigError, KeyError):  # it has failed
            known["config_hash"] = [
                store.read_object(folder / inner / store.SUMMARY)["config_hash"]
            ]
        jobs.append(known)
    jobs.sort(key=lambda each: int(each["job"]))
    every = dict.fromkeys(key for each in jobs for key in each["values"])
    of_key = {key: list(dict.fromkeys(j["values"].get(key) for j in jobs)) for key in every}
    swept = {key: values for key, values in of_key.items() if len(values) > 1}
    for each in jobs:
        each["values"] = {key: each["values"].get(key) for key in swept}
    return {"answer": answer, "swept": swept, "jobs": jobs}


def estimated(each: Job | None, ready: Prepared, kept: bool) -> estimates.JobEstimate:
    """A job's row of a dry run's table; each: None for a single run."""
    memory, seconds = ready.estimate
    number, values = (each.number, each.values) if each else (0, {})
    engine = " + ".join(dict.fromkeys(ready.engines.values()))
    return estimates.JobEstimate(number, values, ready.parameters, engine, memory, seconds, kept)
