"""The three trackers: what of a record goes where, each by its own library, which is imported then."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from simlab.trackers.record import Record

PROJECT = "simlab"  # W&B's project and MLflow's experiment, where the environment names none
BATCH = 900  # MLflow takes at most 1000 metrics and 100 parameters in a call


def to_tensorboard(record: Record) -> None:
    """Event files in the run's folder, in ``tensorboard/``; an earlier run's there are replaced."""
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    place = record.folder / "tensorboard"
    for path in place.glob("events.out.tfevents.*"):
        path.unlink()
    with SummaryWriter(str(place)) as writer:
        for sublayer, values in record.points:
            for name, value in values.items():
                writer.add_scalar(name, value, sublayer)
        for name, value in record.numbers.items():
            writer.add_scalar(name, value)
        # Not ``add_hparams``, which puts them into a run of their own.
        for part in hparams(dict(record.config), dict(record.numbers)):
            writer.file_writer.add_summary(part)
        writer.add_text("verdict", record.text)
        for name, text in record.tags.items():
            writer.add_text(name, f"`{text}`" if name != "headline" else text)
        writer.add_image("growth", imread(record.figure), dataformats="HWC")


def to_wandb(record: Record) -> None:
    """A run in ``wandb/`` in the run's or the sweep's folder; offline, unless WANDB_MODE says else."""
    import wandb

    started = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        mode=None if "WANDB_MODE" in os.environ else "offline",
        dir=str(record.sweep or record.folder),
        name=record.name,
        group=record.group,
        notes=record.text,
        config=dict(record.config) | {"command": record.tags["command"]},
        # A notebook's own run goes on beside this one.
        settings=wandb.Settings(silent=True, console="off", reinit="create_new"),
    )
    with started as run:
        # A re-norm has the sublayer's number too, so that W&B's own step can't be the sublayer.
        run.define_metric("*", step_metric="sublayer")
        for sublayer, values in record.points:
            run.log({"sublayer": sublayer, **values})
        page = wandb.Html(record.page.read_text(encoding="utf-8"), inject=False)
        run.log({"growth": wandb.Image(str(record.figure)), "report": page})
        run.summary.update({**record.numbers, "headline": record.tags["headline"]})


def to_mlflow(record: Record) -> None:
    """A run where MLFLOW_TRACKING_URI says; by default where ``mlflow ui`` looks, in this folder."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # of a new database
    client = MlflowClient()
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    known = client.get_experiment_by_name(name)
    experiment = known.experiment_id if known else client.create_experiment(name)
    tags = {**record.tags, "mlflow.note.content": record.text}
    tags |= {"sweep": record.group} if record.group else {}
    run = client.create_run(experiment, tags=tags, run_name=record.name).info.run_id
    start = int(time.time() * 1000)
    # In milliseconds. A re-norm's values have their own, so that they come after its sublayer's.
    metrics = [
        Metric(name, value, start + row, sublayer)
        for row, (sublayer, values) in enumerate(record.points)
        for name, value in values.items()
    ]
    metrics += [Metric(name, value, start, 0) for name, value in record.numbers.items()]
    for first in range(0, len(metrics), BATCH):
        client.log_batch(run, metrics=metrics[first : first + BATCH])
    client.log_batch(run, params=[Param(key, str(value)) for key, value in record.config.items()])
    for path in (record.figure, record.page):
        client.log_artifact(run, str(path))
    client.set_terminated(run)


@dataclass(frozen=True)
class Tracker:
    """write: writes a record. found: says where the records of a run's or a sweep's folder are."""

    write: Callable[[Record], None]
    found: Callable[[Path], str]


def _in_mlflow(_: Path) -> str:
    from mlflow import get_tracking_uri

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    shown = re.sub("//[^/@]*@", "//", get_tracking_uri())  # without a password
    return f"mlflow: experiment {name} in {shown}"


TRACKERS: Mapping[str, Tracker] = {
    "tensorboard": Tracker(to_tensorboard, lambda folder: f"tensorboard --logdir {folder}"),
    "wandb": Tracker(to_wandb, lambda folder: f"wandb sync {folder}/wandb/offline-run-*"),
    "mlflow": Tracker(to_mlflow, _in_mlflow),
}
