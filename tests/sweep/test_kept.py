"""Kept results and jobs' folders that others have changed, and two sweeps in one folder."""

import json

import pytest
from conftest import INPUTS, SHAPE, in_process

from simlab.store import HERE, locked

SWEEP = ["-m", *SHAPE, *INPUTS, "device=cpu", "seeds=1", "norm=pre,post", "hydra.sweep.dir=sweep"]


@pytest.mark.usefixtures("no_figures", "one_thread")
def test_spoiled_results_are_measured_again(tmp_path):
    """One line says so; the untouched one is used, and in the end all is as it was."""
    assert in_process(*SWEEP, cwd=tmp_path).returncode == 0
    results = tmp_path / "outputs" / "results"
    before = {path: path.read_bytes() for path in results.rglob("*.*")}
    times = {path.name: path.stat().st_mtime_ns for path in results.iterdir()}
    key = json.loads((tmp_path / "sweep/0/summary.json").read_text())["result_key"]
    (tmp_path / "sweep/1/curve.csv").write_text("edited")  # a copy: the kept one stays
    curve = results / key / "curve.csv"
    curve.chmod(0o644)
    curve.write_text(curve.read_text().replace("embedding", "embeddinG"))
    dry = in_process(*SWEEP, "dry_run=true", cwd=tmp_path)
    done = in_process(*SWEEP, cwd=tmp_path)
    assert done.returncode == 0
    line = f"outputs/results/{key}: not used, curve.csv has changed; measured again\n"
    assert done.stderr == dry.stderr == f"simlab: {line}"
    assert [row.split()[-1] == "kept" for row in dry.stdout.splitlines()[1:3]] == [False, True]
    assert {path: path.read_bytes() for path in results.rglob("*.*")} == before
    after = {path.name for path in results.iterdir() if path.stat().st_mtime_ns in times.values()}
    assert after == times.keys() - {key}
    curve.chmod(0o644)
    curve.write_text("")
    theirs = in_process(*SWEEP, "hydra/sweeper=basic", cwd=tmp_path)
    assert (theirs.returncode, theirs.stderr) == (0, f"simlab: {tmp_path}/{line}")


@pytest.mark.usefixtures("no_figures", "one_thread")
def test_changed_files_of_a_job(tmp_path):
    """A report doesn't believe them; the sweep's command writes them again."""
    assert in_process(*SWEEP, cwd=tmp_path).returncode == 0
    job = tmp_path / "sweep" / "1"
    before = {path.name: path.read_bytes() for path in job.glob("[!.]*")}
    cut = b"".join(before["curve.csv"].splitlines(keepends=True)[:-1])
    bare = json.loads(before["summary.json"])
    del bare["summary_hash"]
    earlier = {k: v for k, v in bare.items() if k not in ("files", "result_key")}
    other = {path.name: path.read_bytes() for path in (tmp_path / "sweep" / "0").glob("[!.]*")}
    cases = {
        "curve.csv has changed": {"curve.csv": cut},
        "summary.json has changed": {
            "curve.csv": cut,
            "summary.json": json.dumps(bare).encode(),
        },
        "has no hashes": {"curve.csv": cut, "summary.json": json.dumps(earlier).encode()},
        "summary.json is another job's": other,
    }
    for why, files in cases.items():
        for name, content in (before | files).items():
            (job / name).write_bytes(content)
        done = in_process("sweep", cwd=tmp_path, command="sweep")
        assert done.returncode == 1
        said = " ".join(done.stdout.split())
        assert why in said
        assert "the sweep's command writes it again" in said
    # An earlier version's plan has no hashes, and neither have its jobs.
    plan = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    for each in plan["jobs"]:
        del each["config_hash"]
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(plan))
    (job / "summary.json").write_text(json.dumps(earlier))
    assert in_process("sweep", cwd=tmp_path, command="sweep").returncode == 0
    for sweeper in ("simlab", "basic"):
        assert in_process(*SWEEP, f"hydra/sweeper={sweeper}", cwd=tmp_path).returncode == 0
        assert {path.name: path.read_bytes() for path in job.glob("[!.]*")} == before
        for name, content in other.items():
            (job / name).write_bytes(content)
        done = in_process("sweep", cwd=tmp_path, command="sweep")
        assert (done.returncode, "another job's" in done.stdout) == (1, True)


@pytest.mark.usefixtures("no_figures", "one_thread")
def test_what_is_not_ours_does_not_block_a_sweep(tmp_path):
    """Folders and files of simlab's names, in a sweep's folder and among the kept results."""
    for folder in ("sweep/sweep.parquet", "sweep/heatmap.old", "sweep/0/curve.csv", "sweep/0/job.json",
                   "outputs/results/mine"):  # fmt: skip
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "note").write_text("mine")
    (tmp_path / "sweep" / "1").write_text("mine")
    done = in_process(*SWEEP, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "sweep" / "1" / "summary.json").is_file()
    notes = [p for p in tmp_path.rglob("*") if p.is_file() and p.read_bytes() == b"mine"]
    assert len(notes) == 6


@pytest.mark.usefixtures("no_figures", "one_thread")
def test_two_sweeps_in_one_folder(tmp_path):
    """The second is refused while the first runs, and changes nothing."""
    assert in_process(*SWEEP, cwd=tmp_path).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with locked(tmp_path / "sweep"):
        second = in_process(*SWEEP, "seed=3", cwd=tmp_path)
        other = in_process(*SWEEP, "seed=3", "hydra/sweeper=basic", cwd=tmp_path)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        report = in_process("sweep", cwd=tmp_path, command="sweep")
    assert (second.returncode, second.stdout) == (2, "")
    assert (other.returncode, other.stdout, other.stderr) == (2, "", second.stderr)
    assert second.stderr == (
        "simlab: hydra.sweep.dir=sweep: another sweep runs in this folder; give this one its own\n"
    )
    assert report.returncode == 0  # of a sweep that runs, too
    assert in_process(*SWEEP, "seed=3", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("mode", ["run", "sweep"])
@pytest.mark.usefixtures("no_figures", "one_thread")
def test_what_killed_runs_left_is_removed(tmp_path, mode):
    """In folders named by the time, each of one run; what is being written stays."""
    day = tmp_path / "outputs" / "2020-01-01"
    left = [
        day / name / f"{HERE}0-curve.csv" for name in ("10-00-00-1", "10-00-00-2/0", "10-00-00-3")
    ]
    for path in left:
        path.parent.mkdir(parents=True)
        path.write_text("half")
        (path.parent / "curve.csv").write_text("whole")
    with locked(left[2]):
        done = in_process(*(SWEEP[:-1] if mode == "sweep" else SWEEP[1:-2]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.exists() for path in left] == [False, False, True]
    assert all((path.parent / "curve.csv").exists() for path in left)
