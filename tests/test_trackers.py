"""Trackers: what their own libraries read back is the run's; one that fails costs no result."""

import json
import math
import sys

import pandas as pd
import pytest
from conftest import in_process

SMALL = ["model=small", "depth=4", "width=48", "heads=6", "kv_heads=2", "d_ff=80", "vocab_size=97",
         "inputs.length=11", "seeds=2", "device=cpu", "norm=swin_renorm", "norm.every=2"]  # fmt: skip
# Their packages leave files and threads open, and use what Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")


def run(tmp_path, logger):
    """A run's folder, its curve.csv's means over seeds in order, and its summary.json."""
    pytest.importorskip(logger)
    done = in_process(*SMALL, f"logger={logger}", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    frame = pd.read_csv(folder / "curve.csv")
    means = frame.groupby(["sublayer", "kind"], sort=False)["mean_square"].mean()
    steps = [(sublayer, value) for (sublayer, _), value in means.items()]
    assert len({sublayer for sublayer, _ in steps}) < len(steps)  # a re-norm shares its sublayer's
    return folder, steps, json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def assert_same(found, steps):
    """TensorBoard keeps float32."""
    assert [at for at, _ in found] == [at for at, _ in steps]
    assert [v for _, v in found] == pytest.approx([v for _, v in steps], rel=1e-7)


def test_tensorboard(tmp_path):
    folder, steps, summary = run(tmp_path, "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert_same([(e.step, e.value) for e in events.Scalars("random/mean_square")], steps)
    (rate,) = events.Scalars("verdict/random/rate/value")
    assert rate.value == pytest.approx(summary["verdict"]["random"]["rate"]["value"], rel=1e-7)
    (text,) = events.Tensors("verdict/text_summary")
    assert summary["verdict"]["random"]["sentence"][:40] in text.tensor_proto.string_val[0].decode()
    (image,) = events.Images("growth")
    assert image.encoded_image_string[:4] == b"\x89PNG"
    start = HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    )
    hparams = start.session_start_info.hparams
    assert hparams["model.norm.placement"].string_value == "swin_renorm"
    assert hparams["model.depth"].number_value == 4
    assert (
        in_process(*SMALL, "logger=tensorboard", "hydra.run.dir=run", cwd=tmp_path).returncode == 0
    )
    again = EventAccumulator(str(folder / "tensorboard")).Reload()  # the earlier run's are replaced
    assert len(again.Scalars("random/mean_square")) == len(steps)


def leveldb(data):
    """The records of a .wandb file, LevelDB's log format; wandb's own reader is no longer Python."""
    block, at, whole = 2**15, 7, b""  # W&B's header takes 7 bytes, as each part's
    assert data[:4] == b":W&B"
    while at < len(data):
        if block - at % block < 7:
            at += block - at % block
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def test_wandb(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder, steps, summary = run(tmp_path, "wandb")
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = [wandb_internal_pb2.Record.FromString(r) for r in leveldb(path.read_bytes())]

    def values(items):
        return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}

    rows = [values(r.history.item) for r in records if r.WhichOneof("record_type") == "history"]
    named = "random/mean_square"
    assert_same([(row["sublayer"], row[named]) for row in rows if named in row], steps)
    # Seldom not in the last row: a process of its own writes them, in its own order.
    assert {"growth", "report"} <= {key.partition("/")[0] for row in rows for key in row}
    (started,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert started.display_name == summary["title"][:128]
    assert started.project == "simlab"
    assert values(started.config.update)["model.norm.placement"] == "swin_renorm"
    last = {}
    for each in records:
        last |= values(each.summary.update)
    rate = summary["verdict"]["random"]["rate"]["value"]
    assert last["verdict/random/rate/value"] == pytest.approx(rate, rel=1e-12)


def test_mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    _, steps, summary = run(tmp_path, "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("simlab")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "random/mean_square")
    ordered = sorted(history, key=lambda metric: metric.timestamp)
    assert_same([(metric.step, metric.value) for metric in ordered], steps)
    assert found.data.params["model.norm.placement"] == "swin_renorm"
    rate = summary["verdict"]["random"]["rate"]["value"]
    assert found.data.metrics["verdict/random/rate/value"] == pytest.approx(rate, rel=1e-12)
    assert summary["verdict"]["random"]["sentence"] in found.data.tags["mlflow.note.content"]
    assert (found.info.status, found.info.run_name) == ("FINISHED", summary["title"])
    names = {each.path for each in client.list_artifacts(found.info.run_id)}
    assert names == {"growth.png", "report.html"}


def test_sweep_logs_kept_results_too(tmp_path):
    """A run per job, also where all results are kept: the logger is no part of their keys."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sweep = ["-m", *SMALL, "init.std=0.02,0.04"]
    assert in_process(*sweep, "hydra.sweep.dir=a", cwd=tmp_path).returncode == 0
    kept = sorted((tmp_path / "outputs/results").iterdir())
    done = in_process(*sweep, "hydra.sweep.dir=b", "logger=[tensorboard]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tensorboard --logdir b" in done.stdout
    assert sorted((tmp_path / "outputs/results").iterdir()) == kept
    for job in "01":
        frame = pd.read_csv(tmp_path / "b" / job / "curve.csv")
        events = EventAccumulator(str(tmp_path / "b" / job / "tensorboard")).Reload()
        last = events.Scalars("random/mean_square")[-1].value
        assert last == pytest.approx(frame.groupby("seed").tail(1)["mean_square"].mean(), rel=1e-7)
        assert math.isfinite(last)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("logger=tensorbord", "allowed: tensorboard, wandb, mlflow; did you mean tensorboard?"),
        ("logger=[mlflow]", "logger=mlflow: not installed; pip install mlflow"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, override, said):
    """One line before any work; also where a folder has the name of a package that isn't there."""
    (tmp_path / "mlflow").mkdir()
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    monkeypatch.setattr(
        sys, "path", [str(tmp_path), *(p for p in sys.path if "-packages" not in p)]
    )
    done = in_process(*SMALL, override, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow"]


def test_several_are_a_list(tmp_path):
    done = in_process("-m", *SMALL, "logger=tensorboard,mlflow", cwd=tmp_path)
    assert done.returncode == 2
    assert "give a list, logger=[tensorboard,mlflow]" in done.stderr


def test_failure_costs_no_result(tmp_path):
    """A file stands where TensorBoard's folder must be made: the run is whole, and one line says it."""
    pytest.importorskip("tensorboard")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tensorboard").touch()
    done = in_process(*SMALL, "logger=tensorboard", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("simlab: logger=tensorboard: FileExistsError: ")
    assert done.stderr.count("\n") == 1
    assert "growth.png" in done.stdout
    assert (tmp_path / "run/summary.json").is_file()


def test_measure_logs_too(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    import simlab

    small = {"depth": 2, "width": 48, "heads": 6, "d_ff": 80, "vocab_size": 97, "seeds": 1}
    simlab.measure("small", {"inputs.length": 11}, logger="tensorboard", device="cpu", **small)
    assert len(list(tmp_path.glob("outputs/*/*/tensorboard/events.out.tfevents.*"))) == 1
