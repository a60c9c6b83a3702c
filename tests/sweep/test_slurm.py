"""Sweeps on a real SLURM: scripts/slurm_one_node.sh starts one on this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import INPUTS, SHAPE, simlab

from simlab.sweep.job import RECORD

SMALL = [*SHAPE, *INPUTS, "device=cpu", "seeds=2"]
SLURM = [
    "hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1",
    "hydra.launcher.timeout_min=5",
]  # fmt: skip


def nodes() -> str:
    """The states of the nodes, or why there are none."""
    if shutil.which("sinfo") is None:
        return "no sinfo"
    done = subprocess.run(
        ["sinfo", "--noheader", "-o", "%T"], capture_output=True, text=True, check=False, timeout=60
    )
    return done.stdout.strip() or done.stderr.strip() or "no nodes"


def usable() -> bool:
    return any(state in nodes() for state in ("idle", "mixed", "allocated"))


pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(  # these submit real jobs
        not usable(),
        reason=f"needs a SLURM node that is up ({nodes()}); scripts/slurm_one_node.sh starts one",
    ),
]


def queued() -> list[str]:
    done = subprocess.run(
        ["squeue", "--noheader", "-o", "%A"], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_the_same_bytes_as_the_serial_sweep(tmp_path):
    sweep = ["-m", *SMALL, "depth=1,2", "norm=pre,swin_renorm", "gradients=true"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # as the job has it
    serial = simlab(*sweep, "hydra.sweep.dir=serial", "results=a", cwd=tmp_path, env=env)
    assert serial.returncode == 0, serial.stderr
    done = simlab(*sweep, *SLURM, "hydra.sweep.dir=slurm", "results=b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = ["curve.csv", "summary.json", "job.json"]
    for file in ["sweep.parquet", *(f"{job}/{name}" for job in range(4) for name in names)]:
        assert (tmp_path / "slurm" / file).read_bytes() == (tmp_path / "serial" / file).read_bytes()
    assert len(list((tmp_path / "slurm" / ".submitit").glob("*_0_result.pkl"))) in (0, 4)
    again = simlab(*sweep, *SLURM, "hydra.sweep.dir=again", "results=b", cwd=tmp_path)
    assert again.returncode == 0
    assert not (tmp_path / "again" / ".submitit").exists()  # nothing was submitted


def start(cwd: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "simlab.run", "-m", *SMALL, "seed=range(6)", "depth=2000",
               *SLURM, *overrides, "hydra.sweep.dir=sweep"]  # fmt: skip
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_slurm_ends_a_job(tmp_path):
    process = start(tmp_path, "depth=20")
    wait_for(lambda: (tmp_path / "sweep" / ".submitit").exists() and len(queued()) > 0)
    array = queued()[0]
    subprocess.run(["scancel", f"{array}_5"], check=True)  # of six on two cores it is still waiting
    out, err = process.communicate(timeout=100)
    records = [json.loads((tmp_path / f"sweep/{i}" / RECORD).read_text()) for i in range(6)]
    assert [record["status"] for record in records] == ["done"] * 5 + ["failed"], records
    assert "its process died (" in records[5]["error"]
    assert process.returncode == 1, err
    assert "1 job failed" in out
    assert set(pd.read_parquet(tmp_path / "sweep/sweep.parquet")["job"]) == set(range(5))


def test_ctrl_c_cancels_queued_jobs(tmp_path):
    process = start(tmp_path)
    wait_for(lambda: list(tmp_path.glob("sweep/*/.hydra/overrides.yaml")))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("simlab: interrupted; 0 of 6 jobs are done")
    wait_for(lambda: not queued(), 60)
