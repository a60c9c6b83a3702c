"""Sweeps over a hub repository's revisions: one table, each downloaded, measured and removed."""

import contextlib
import json
import os
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import in_process, write_olmo
from hub_server import REPO, SLEEP, cache, hub
from joblib.externals.loky import get_reusable_executor
from safetensors.torch import load_file, save_file

from simlab import store
from simlab.checkpoints.checkpoint import Checkpoint
from simlab.config import ConfigError

__all__ = ["cache", "hub"]  # fixtures
STEPS = ("stage1-step10", "stage1-step9", "main")


@pytest.fixture
def trajectory(hub, tmp_path):
    """Three revisions, of two shards and more; their large files by commit."""
    commits = {}
    for number, step in enumerate(STEPS):
        write(tmp_path / step, number)
        commits[step] = hub.push(REPO, tmp_path / step, step)
    return commits


def write(folder, number):
    """A checkpoint of several shards, its weights other than of other numbers."""
    write_olmo(folder, shards="100KB")
    for path in folder.glob("model-*"):
        tensors = {name: tensor + number / 100 for name, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})


def sweep(folder, *overrides, keep=False, steps=STEPS):
    return in_process(
        "-m", "source=checkpoint", f"source.path={REPO}", f"source.revision={','.join(steps)}",
        f"source.keep={keep}".lower(), "seeds=0", "inputs.length=8", "inputs.batch=1", "device=cpu",
        "hydra.sweep.dir=swept", *overrides, cwd=folder,
    )  # fmt: skip


def weights_in(cache):
    return sorted(p for p in cache.parent.rglob("*") if p.is_file() and p.stat().st_size > 50_000)


def opened(name):
    """The files of such names that this process holds open: they take room, removed or not."""
    links = []
    for place in Path("/proc/self/fd").glob("*"):  # none, where there is no /proc
        with contextlib.suppress(OSError):  # closed meanwhile
            links.append(os.readlink(place))
    return [link for link in links if name in link]


def test_a_trajectory(hub, cache, trajectory, tmp_path):
    """Nothing is fetched for a plan; each is removed before the next; kept results need no weights."""
    held = []

    def look(handler, path):
        if "/lfs/" in path and handler.command == "GET":
            places = [*map(str, weights_in(cache)), *opened(".safetensors")]
            held.append({c for c in trajectory.values() if any(c in place for place in places)})
        return False

    hub.fault = look
    dry = sweep(tmp_path, "dry_run=true")
    assert dry.returncode == 0, dry.stderr
    assert not held
    run = sweep(tmp_path)
    assert run.returncode == 0, run.stderr
    assert "download" not in run.stderr  # theirs are small
    assert len(held) == 3 * len(list((tmp_path / "main").glob("model-*")))
    assert max(map(len, held)) == 1  # commits of which weights are on the disk, or held open
    assert {commit for each in held for commit in each} == set(trajectory.values())
    assert not weights_in(cache)
    assert not opened("-weights")
    jobs = pd.read_csv(tmp_path / "swept" / "jobs.csv")
    assert list(jobs["source.revision"]) == list(STEPS)
    for number, step in enumerate(STEPS):
        summary = json.loads((tmp_path / "swept" / str(number) / "summary.json").read_text())
        assert summary["weight_hash"] == Checkpoint(str(tmp_path / step)).identity()["weight_hash"]
    held.clear()
    curve = tmp_path / "swept" / "0" / "curve.csv"
    first = curve.read_bytes()
    again = sweep(tmp_path, keep=True)
    assert again.returncode == 0, again.stderr
    assert curve.read_bytes() == first
    assert not held
    write(tmp_path / "moved", 9)
    moved = hub.push(REPO, tmp_path / "moved", STEPS[0])  # the branch has another commit now
    assert sweep(tmp_path).returncode == 0
    assert curve.read_bytes() != first
    assert len(held) == 4
    assert not any(each & (set(trajectory.values()) - {moved}) for each in held)


def test_in_processes_side_by_side(hub, cache, trajectory, tmp_path, monkeypatch, no_figures):
    """One job's weights still come when another's come, are measured and removed."""
    monkeypatch.setenv("HF_ENDPOINT", hub.url)  # a launcher's processes import huggingface_hub anew
    monkeypatch.setenv("HF_HUB_CACHE", str(cache.parent))
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "120")
    steps, held = STEPS[:2], []
    shard = sorted((tmp_path / steps[0]).glob("model-*"))[1].name

    def hold(handler, path):
        """The second shard of the first job comes when the other job is done."""
        if path.endswith(f"{trajectory[steps[0]]}/{shard}") and handler.command == "GET":
            until = time.monotonic() + 50
            while not (tmp_path / "swept/1/summary.json").exists() and time.monotonic() < until:
                SLEEP(0.05)
            held.append(time.monotonic() < until)
        return False

    hub.fault = hold
    get_reusable_executor().shutdown(kill_workers=True)  # those of other tests have another hub
    run = sweep(tmp_path, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", steps=steps)
    get_reusable_executor().shutdown(kill_workers=True)
    assert run.returncode == 0, run.stderr
    assert held == [True]
    assert not weights_in(cache)
    jobs = pd.read_csv(tmp_path / "swept" / "jobs.csv")
    assert list(jobs["source.revision"]) == list(steps)
    for number, step in enumerate(steps):
        summary = json.loads((tmp_path / "swept" / str(number) / "summary.json").read_text())
        assert summary["weight_hash"] == Checkpoint(str(tmp_path / step)).identity()["weight_hash"]


def test_what_was_there_before_stays(hub, cache, trajectory, tmp_path):
    whole, part = (Checkpoint(REPO, step).folder for step in ("main", STEPS[0]))
    some, *others = sorted(part.glob("model-*"))
    for path in others:
        path.resolve().unlink()
        path.unlink()
    before, asked = weights_in(cache), len(hub.asked)
    for step in ("main", STEPS[0]):
        model = Checkpoint(REPO, step, keep=False)
        assert model.identity() == Checkpoint(str(tmp_path / step)).identity()
        model.release()
    assert weights_in(cache) == before
    assert some.exists()
    assert Checkpoint(REPO, "main").folder == whole
    gets = [path for method, path, _ in hub.asked[asked:] if method == "GET" and "/lfs/" in path]
    assert len(gets) == len(others)  # of the two, only what was missing


def test_removed_whatever_happens(hub, cache, trajectory, tmp_path):
    """After an error, without ``release``, and after a kill."""
    shards = sorted((tmp_path / "main").glob("model-*"))
    hub.fault = lambda handler, path: (
        path.endswith(shards[-1].name) and bool(handler.say(500) or True)
    )
    with pytest.raises(ConfigError, match="answers 500"):
        Checkpoint(REPO, keep=False)
    assert not weights_in(cache)
    hub.fault = lambda handler, path: False
    model = Checkpoint(REPO, keep=False)
    assert weights_in(cache)
    del model
    assert not weights_in(cache)
    left = cache.parent / f"{store.HERE}0123-weights" / "c"
    left.mkdir(parents=True)
    (left / shards[0].name).write_bytes(os.urandom(60_000))
    Checkpoint(REPO, keep=False).release()
    assert not weights_in(cache)
