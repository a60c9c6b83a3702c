"""A process that dies takes its own job down and no other, in any launcher."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from conftest import INPUTS, SHAPE, in_process, tiny
from joblib.externals.loky import get_reusable_executor

from simlab.sweep import job
from simlab.sweep.launch import Place, launch
from simlab.sweep.plan import Job

SMALL = [*SHAPE, *INPUTS, "device=cpu"]
TABLES = ("curve.csv", "summary.json")


def places(folder: Path, count: int) -> list[Place]:
    jobs = [Job(i, (f"seed={i}",), {"seed": i}, {}, tiny(f"seed={i}")) for i in range(count)]
    return [Place(each, folder / str(each.number), str(each.number), 3, None) for each in jobs]


class Pool:
    """A launcher whose whole pool breaks when a deadly job is in it, two jobs at a time."""

    def __init__(self, folder: Path, deadly: set[int]) -> None:
        self.folder, self.deadly = folder, deadly
        self.launched: list[list[int]] = []

    def launch(self, overrides, first):
        batch = [int(each[0].partition("=")[2]) for each in overrides]
        assert [each[1] for each in overrides] == [f"hydra.sweep.subdir='{n}'" for n in batch]
        self.launched.append(batch)
        for pair in (batch[i : i + 2] for i in range(0, len(batch), 2)):
            for number in pair:
                (self.folder / str(number) / ".hydra").mkdir(parents=True, exist_ok=True)
            if self.deadly & set(pair):
                raise RuntimeError("a worker died")
            for number in pair:
                (self.folder / str(number) / job.RECORD).write_text('{"status": "done"}')


def test_a_dead_worker(tmp_path):
    jobs = places(tmp_path, 7)
    pool = Pool(tmp_path, {2, 5})
    launch(pool, jobs)
    records = [json.loads((place.folder / job.RECORD).read_text()) for place in jobs]
    assert [r["status"] == "failed" for r in records] == [i in (2, 5) for i in range(7)]
    assert "its process died (RuntimeError: a worker died)" in records[2]["error"]
    assert pool.launched[0] == list(range(7))
    assert all(len(batch) < 7 for batch in pool.launched[1:])


def test_a_launcher_that_can_start_nothing(tmp_path):
    """As when a cluster refuses every submission: each job says so, and it ends."""

    class Refuses:
        def launch(self, overrides, first):
            raise OSError("no such partition")

    jobs = places(tmp_path, 3)
    launch(Refuses(), jobs)
    errors = [json.loads((place.folder / job.RECORD).read_text())["error"] for place in jobs]
    assert all("no such partition" in error for error in errors)


def children(pid: int) -> list[int]:
    """Every process below this one."""
    below = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        below += [int(child), *children(int(child))]
    return below


class Killer(threading.Thread):
    """Kills a worker of this process as soon as jobs run in ``folder`` on ``count`` of them."""

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__()
        self.folder, self.count, self.others = folder, count, children(os.getpid())

    def run(self) -> None:
        deadline = time.monotonic() + 200
        while len(list(self.folder.glob("*/.hydra/hydra.yaml"))) < self.count:
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)
        workers = [
            pid for pid in children(os.getpid())
            if pid not in self.others
            and b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]  # fmt: skip
        os.kill(workers[-1], signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_killed_worker(tmp_path, monkeypatch, one_thread, no_figures, launcher):
    """A killed worker costs at most its own job, and every job has the serial sweep's bytes.

    joblib's job is done by another process; submitit says that its process died.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the workers; other threads may be other bits
    run = ["-m", *SMALL, "seeds=1", "seed=0,1,2", "gradients=true"]
    serial = in_process(*run, "results=other", "hydra.sweep.dir=serial", cwd=tmp_path)
    assert serial.returncode == 0, serial.stderr
    in_process(*run, "seed=1", "hydra.sweep.dir=first", cwd=tmp_path)  # a kept result
    run += [f"hydra/launcher={launcher}", "hydra.sweep.dir=sweep"]
    killer = Killer(tmp_path / "sweep", min(2, os.cpu_count()))
    killer.start()
    done = in_process(*run, cwd=tmp_path)
    killer.join()
    records = [json.loads((tmp_path / f"sweep/{i}/job.json").read_text()) for i in range(3)]
    whole = [record["status"] == "done" for record in records]
    assert whole.count(False) == (launcher == "submitit_local"), records
    assert done.returncode == (1 if False in whole else 0)
    for i in range(3):
        assert (tmp_path / f"sweep/{i}/summary.json").exists() == whole[i]
    if False in whole:
        assert "its process died" in " ".join(done.stdout.split())
        done = in_process(*run, cwd=tmp_path)  # the same command does the rest
        assert done.returncode == 0, done.stderr
    else:
        get_reusable_executor().shutdown()
    assert {p.parts[-3] for p in tmp_path.glob("sweep/*/.hydra/hydra.yaml")} <= {"0", "2"}
    for name in ("sweep.parquet", *(f"{i}/{n}" for i in range(3) for n in TABLES)):
        assert (tmp_path / "sweep" / name).read_bytes() == (tmp_path / "serial" / name).read_bytes()
