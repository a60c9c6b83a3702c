"""A process that dies takes its own job down and no other, in any launcher."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import INPUTS, SHAPE, tiny

from simlab.sweep import job
from simlab.sweep import launch as cluster
from simlab.sweep.launch import Place
from simlab.sweep.plan import Job

SMALL = [*SHAPE, *INPUTS, "device=cpu"]


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
    cluster.launch(pool, jobs)
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
    cluster.launch(Refuses(), jobs)
    errors = [json.loads((place.folder / job.RECORD).read_text())["error"] for place in jobs]
    assert all("no such partition" in error for error in errors)


def children(pid: int) -> list[int]:
    """Every process below this one."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *children(int(child))]
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_worker_killed_for_real(tmp_path, launcher):
    """joblib's job is done by another process; submitit says that its process died."""
    command = [sys.executable, "-m", "simlab.run", "-m", *SMALL, "seeds=1", "seed=0,1,2,3",
               "depth=300", f"hydra/launcher={launcher}", "hydra.sweep.dir=sweep"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )

    def busy() -> list[Path]:
        started = [path.parent for path in tmp_path.glob("sweep/*/.hydra/overrides.yaml")]
        return [folder for folder in started if not (folder / job.RECORD).exists()]

    deadline = time.monotonic() + 100
    while not busy() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    workers = [
        pid for pid in children(process.pid)
        if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]  # fmt: skip
    os.kill(workers[-1], signal.SIGKILL)
    out, _ = process.communicate(timeout=250)
    records = [json.loads((tmp_path / f"sweep/{i}/job.json").read_text()) for i in range(4)]
    done = [record["status"] == "done" for record in records]
    assert done.count(False) == (launcher == "submitit_local"), records
    assert process.returncode == (1 if False in done else 0)
    for i in range(4):
        assert (tmp_path / f"sweep/{i}/summary.json").exists() == done[i]
    if False in done:
        assert "its process died" in " ".join(out.split())
