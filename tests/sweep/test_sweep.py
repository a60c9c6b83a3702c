"""Sweeps as a user runs them: one report, resumed after anything, the same bytes in every launcher."""

import json
import multiprocessing
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import INPUTS, SHAPE, in_process
from hydra.experimental.callback import Callback

from simlab import experiment

SMALL = [*SHAPE, *INPUTS, "device=cpu", "seeds=2"]
AXES = ["depth=1,2", "init.std=0.02,0.05", "norm=pre,swin_renorm"]
SWEEP = ["-m", *SMALL, *AXES]


def report(folder, cwd):
    return in_process(str(folder), cwd=cwd, command="sweep")


def files(folder: Path, names=("curve.csv", "summary.json")) -> dict[str, bytes]:
    """Every job's results, and the sweep's table."""
    paths = [path for name in names for path in folder.glob(f"*/{name}")]
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return contents | {"sweep.parquet": (folder / "sweep.parquet").read_bytes()}


@pytest.fixture(scope="module")
def whole(one_thread, tmp_path_factory) -> Path:
    """An uninterrupted sweep without figures: ``sweep``, in a folder with its kept results."""
    cwd = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("simlab.report.sweep_figures.figures", lambda *_: {})
        done = in_process(*SWEEP, "hydra.sweep.dir=sweep", cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")
    (cwd / "stdout").write_text(done.stdout)
    return cwd / "sweep"


def test_report(whole, tmp_path, figure_names):
    """Made from the files alone; the numbers are the jobs'."""
    shutil.copytree(whole, tmp_path / "sweep")
    for name in ("sweep.parquet", "jobs.csv"):
        (tmp_path / "sweep" / name).unlink()
    done = report("sweep", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert figure_names == ["growth", "heatmap", "lambda"]
    assert done.stdout == (whole.parent / "stdout").read_text()
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert done.stdout.startswith("8 jobs: depth 1, 2; init.std 0.02, 0.05; ")
    for name in ("sweep.parquet", "jobs.csv"):
        assert (tmp_path / "sweep" / name).exists()
        assert f"sweep/{name}" in done.stdout
    assert files(tmp_path / "sweep") == files(whole)
    frame = pd.read_parquet(whole / "sweep.parquet")
    assert frame.columns[:7].tolist() == [
        "job", "depth", "init.std", "norm_placement", "curve", "seed", "sublayer",
    ]  # fmt: skip
    assert frame["job"].nunique() == 8
    for job, rows in frame.groupby("job"):
        curve = pd.read_csv(whole / str(job) / "curve.csv")
        summary = json.loads((whole / str(job) / "summary.json").read_text())["config"]
        assert rows["mean_square"].tolist() == curve["mean_square"].tolist()
        (values,) = rows[["depth", "init.std", "norm_placement"]].drop_duplicates().to_numpy()
        model = summary["model"]
        assert values.tolist() == [
            model["depth"], summary["init"]["std"], model["norm"]["placement"],
        ]  # fmt: skip
    jobs = pd.read_csv(whole / "jobs.csv")
    assert jobs["job"].tolist() == list(range(8))
    last = frame.groupby(["job", "seed"]).tail(1).groupby("job")["mean_square"].mean()
    np.testing.assert_allclose(jobs["mean_square"], last, rtol=1e-12)


def test_report_on_an_unfinished_sweep(whole, tmp_path, no_figures):
    shutil.copytree(whole, tmp_path / "part")
    for job in ("1", "4"):
        shutil.rmtree(tmp_path / "part" / job)
    (tmp_path / "part" / "7" / "summary.json").unlink()  # killed between its files
    done = report("part", tmp_path)
    assert done.returncode == 1
    assert "3 jobs are not finished" in done.stdout
    frame = pd.read_parquet(tmp_path / "part" / "sweep.parquet")
    assert sorted(set(range(8)) - set(frame["job"])) == [1, 4, 7]


def test_only_missing_results_are_computed(whole, tmp_path, no_figures):
    """Results are known by content: in another order, in part, and under other names of the same."""
    shutil.copytree(whole.parent / "outputs", tmp_path / "outputs")
    kept = tmp_path / "outputs" / "results"
    assert len(list(kept.iterdir())) == 8
    times = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    axes = ["norm=swin_renorm,pre", "depth=2,4", "init.std=2e-2,0.05"]
    done = in_process("-m", *SMALL, "init=normal", *axes, "hydra.sweep.dir=again", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    after = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert len(after) == 8 + 4  # depth 4
    assert times.items() <= after.items()
    old, new = (
        pd.read_parquet(p) for p in (whole / "sweep.parquet", tmp_path / "again/sweep.parquet")
    )
    keys = ["depth", "init.std", "norm_placement", "seed", "sublayer", "kind"]
    old = old[old["depth"] == 2].drop(columns="job").sort_values(keys, ignore_index=True)
    new = new[new["depth"] == 2].drop(columns="job").sort_values(keys, ignore_index=True)
    pd.testing.assert_frame_equal(old, new[old.columns])
    in_process(
        "-m", *SMALL, "depth=2", "resume=false", "init.std=0.02,0.05", "norm=pre", cwd=tmp_path
    )
    again = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert sum(again[name] != time for name, time in after.items()) == 2


def test_changed_text_or_weights_are_measured_again(tmp_path, checkpoint, no_figures):
    """A text or a checkpoint that has changed under its path is computed again."""
    from safetensors.torch import load_file, save_file

    text = tmp_path / "text"
    text.write_bytes(bytes(range(32, 60)) * 9)
    run = ["-m", "source=checkpoint", f"source.path={checkpoint}", "inputs=text", "seeds=0",
           f"inputs.path={text}", "inputs.batch=1", "inputs.length=16", "device=cpu",
           "source.weights=false"]  # fmt: skip
    file = checkpoint / "model.safetensors"
    seen, before = [], set()
    for change in ("", "nothing", "text", "weights"):
        if change == "text":
            text.write_bytes(b"0" + text.read_bytes())
        if change == "weights":
            tensors = load_file(file)
            tensors["model.layers.2.mlp.up_proj.weight"][3, 5] += 1
            save_file(tensors, file, {"format": "pt"})
        done = in_process(*run, "hydra.sweep.dir=sweep", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        seen.append(files(tmp_path / "sweep")["0/curve.csv"])
        stamps = {p.stat().st_mtime_ns for p in (tmp_path / "outputs" / "results").iterdir()}
        if change == "nothing":
            assert stamps == before
        before = stamps
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3


# Processes that begin with everything imported: torch and pandas take five seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["simlab.experiment", "simlab.sweep.sweeper", "simlab.experiment.sharing"]
)


def test_kill_and_resume(whole, tmp_path, no_figures):
    """SIGKILL in job after job: every kept result is whole, and the end is the whole sweep's."""
    rng = random.Random(0)
    kept = tmp_path / "outputs" / "results"

    def results() -> list[Path]:
        return list(kept.glob("[!.]*"))

    for most in (1, 2, 5):
        process = FORKS.Process(
            target=in_process, args=(*SWEEP, "hydra.sweep.dir=sweep"), kwargs={"cwd": tmp_path}
        )
        process.start()
        while len(results()) < most and process.is_alive():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))  # a job takes about so long
        process.kill()
        process.join()
        for result in results():
            pd.read_csv(result / "curve.csv")
            json.loads((result / "summary.json").read_text())
    assert len(results()) < 8
    done = in_process(*SWEEP, "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "sweep") == files(whole)


def test_ctrl_c_keeps_finished_jobs(tmp_path, no_figures):
    command = [sys.executable, "-m", "simlab.run", "-m", *SMALL, "seed=range(150)", "seeds=1",
               "hydra.sweep.dir=sweep"]  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("sweep/*/job.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = err.splitlines()
    assert line.startswith("simlab: interrupted; ")
    done = int(line.split()[2])
    assert 3 <= len(list(tmp_path.glob("sweep/*/summary.json"))) == done < 150
    assert len(list(tmp_path.glob("outputs/results/[!.]*"))) in (done, done + 1)
    assert f"{150 - done} jobs are not finished" in report("sweep", tmp_path).stdout


def test_ctrl_c_before_the_plan_is_written(tmp_path, monkeypatch, no_figures):
    """A report on the folder would fail then, so none is recommended; the same command works."""

    def interrupt(*_):
        raise KeyboardInterrupt

    run = ["-m", *SMALL, "depth=1,2", "hydra.sweep.dir=sweep"]
    in_process(*run, cwd=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("simlab.sweep.sweeper.description", interrupt)
        done = in_process(*run, cwd=tmp_path)
    assert done.returncode == 130
    assert done.stderr == (
        "simlab: interrupted before any job started; the same command starts the sweep\n"
    )
    assert report("sweep", tmp_path).returncode == 2
    assert in_process(*run, cwd=tmp_path).returncode == 0


def test_a_failed_job_takes_no_other_down(tmp_path, monkeypatch, no_figures):
    run = ["-m", *SMALL, "norm=pre,post", "hydra.sweep.dir=sweep"]
    real = experiment.measure

    def broken(ready, *args):
        if ready.config.shape.norm.placement == "pre":
            raise RuntimeError("it broke\nin two lines")
        return real(ready, *args)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "measure", broken)
        done = in_process(*run, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    told = done.stdout.split("1 job failed\n")
    assert len(told) == 2
    assert "sweep.parquet" in told[0]  # the failure comes last
    assert told[1].rstrip().endswith("RuntimeError: it broke in two lines")
    record = tmp_path / "sweep" / "0" / "job.json"
    assert json.loads(record.read_text())["status"] == "failed"
    assert "in broken" in json.loads(record.read_text())["traceback"]
    assert set(pd.read_parquet(tmp_path / "sweep" / "sweep.parquet")["job"]) == {1}
    again = in_process(*run, cwd=tmp_path)  # and without the fault, the same command mends it
    assert again.returncode == 0, again.stderr
    assert json.loads(record.read_text()) == {"status": "done"}


def test_full_disk(tmp_path, no_figures):
    """Files beyond a size can't be written: those jobs fail with a line, the others are done."""
    run = ["-m", *SMALL, "depth=1,40", "hydra.sweep.dir=sweep"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, before[1]))  # depth 40 takes more
    try:
        done = in_process(*run, cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.returncode != 0
    assert (tmp_path / "sweep" / "0" / "summary.json").exists()
    assert not (tmp_path / "sweep" / "1" / "summary.json").exists()
    assert len(list((tmp_path / "outputs" / "results").iterdir())) == 1
    done = in_process(*run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_hydra_flags(whole, tmp_path, monkeypatch, no_figures):
    """Callbacks, folders by name, another working directory: Hydra launches, with the same result."""
    calls = []

    class Told(Callback):
        def __getattribute__(self, name):
            if name.startswith("on_"):
                calls.append(name)
            return object.__getattribute__(self, name)

    monkeypatch.setattr("simlab.sweeper.Told", Told, raising=False)
    two = ["-m", *SMALL, "depth=1,2", "init.std=0.02", "norm=pre"]
    done = in_process(
        *two, "hydra.sweep.dir=sweep", "+hydra.callbacks.told._target_=simlab.sweeper.Told",
        "hydra.sweep.subdir='depth-${depth}/${hydra.job.override_dirname}'", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert calls == ["on_multirun_start", *["on_job_start", "on_job_end"] * 2, "on_multirun_end"]
    for depth, job in ((1, 0), (2, 4)):
        (curve,) = (tmp_path / "sweep" / f"depth-{depth}").glob("*/curve.csv")
        assert curve.read_bytes() == (whole / str(job) / "curve.csv").read_bytes()
    assert pd.read_parquet(tmp_path / "sweep/sweep.parquet")["depth"].unique().tolist() == [1, 2]
    for option in ("hydra.job.chdir=true", "hydra.sweep.subdir=job-${hydra.job.num}"):
        again = in_process(*two, option, "hydra.sweep.dir=again", cwd=tmp_path)
        assert again.returncode == 0, again.stderr
    assert len(list((tmp_path / "outputs" / "results").iterdir())) == 2
    names = {path.parent.name for path in tmp_path.glob("again/*/summary.json")}
    assert names == {"0", "1", "job-0", "job-1"}
    same = in_process(*two, "hydra.sweep.subdir=one", cwd=tmp_path)
    assert (same.returncode, len(same.stderr.splitlines())) == (2, 1)
    assert "gives several jobs the same folder" in same.stderr


def test_hydras_own_sweeper(tmp_path, no_figures):
    """The same results and the same report."""
    run = ["-m", *SMALL, "depth=1,2", "hydra.sweep.dir=sweep"]
    ours = in_process(*run, cwd=tmp_path)
    before = files(tmp_path / "sweep")
    shutil.rmtree(tmp_path / "sweep")
    done = in_process(*run, "hydra/sweeper=basic", "resume=false", cwd=tmp_path)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", ours.stdout)
    assert files(tmp_path / "sweep") == before
    dry = in_process(*run, "hydra/sweeper=basic", "dry_run=true", cwd=tmp_path)
    assert (dry.returncode, dry.stdout) == (2, "")
    assert dry.stderr == "simlab: dry_run=true: only with hydra/sweeper=simlab\n"


def test_a_folder_used_again(tmp_path, request):
    """Nothing of the sweep before is left in it."""
    run = ["-m", *SMALL, "hydra.sweep.dir=sweep"]
    first = in_process(*run, "depth=1,2", "init.std=0.02,0.05", cwd=tmp_path)
    assert "sweep/growth.png" in first.stdout
    names = {path.stem for path in (tmp_path / "sweep").glob("*.png")}
    assert names == {"growth", "heatmap", "lambda"}
    request.getfixturevalue("no_figures")
    done = in_process(*run, "norm=pre,post", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not [path for path in (tmp_path / "sweep").iterdir() if path.suffix in (".png", ".svg")]
    jobs = pd.read_csv(tmp_path / "sweep" / "jobs.csv")
    assert jobs["norm_placement"].tolist() == ["pre", "post"]


def test_a_swept_seed_is_a_column(tmp_path, no_figures):
    """seed also draws the tokens, so with given seeds it is something else than a curve's own."""
    done = in_process("-m", *SMALL, "seeds=[5]", "seed=0,1", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    frame = pd.read_parquet(tmp_path / "sweep" / "sweep.parquet")
    assert set(zip(frame["job"], frame["first_seed"], frame["seed"], strict=True)) == {
        (0, 0, 5), (1, 1, 5),
    }  # fmt: skip
    a, b = (rows["mean_square"].tolist() for _, rows in frame.groupby("job"))
    assert a != b


def test_dry_run(tmp_path, whole):
    shutil.copytree(whole.parent / "outputs", tmp_path / "outputs")
    before = sorted(tmp_path.rglob("*"))
    axes = ["depth=2,6", "init.std=0.02,0.05", "norm=pre", "gradients=false"]
    done = in_process("-m", *SMALL, *axes, "dry_run=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    heading = ["job", "depth", "init.std", "parameters", "engine", "memory", "time"]
    assert lines[0].split() == heading
    assert [line.split()[-1] for line in lines[1:3]] == ["kept", "kept"]
    assert lines[3].split()[:3] == ["2", "6", "0.02"]
    assert lines[-1].startswith("2 jobs to run, 2 kept, about ")
    assert sorted(tmp_path.rglob("*")) == before
    shutil.copytree(whole, tmp_path / "done")  # into a finished sweep's folder: it is left alone
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    into = in_process("-m", *SMALL, *axes, "dry_run=true", "hydra.sweep.dir=done", cwd=tmp_path)
    assert into.returncode == 0, into.stderr  # times are measured anew, and vary
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == stamps
    shutil.rmtree(tmp_path / "done")
    single = in_process(*SMALL, "dry_run=true", cwd=tmp_path)
    assert single.returncode == 0
    assert single.stdout.splitlines()[-1].startswith("1 job to run, about ")
    assert sorted(tmp_path.rglob("*")) == before
