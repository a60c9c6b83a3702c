"""What is kept is whole, and known by what made it."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
import typing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import tiny
from safetensors.torch import load_file, save_file
from test_imports import imports

from simlab import experiment, store
from simlab.config import Llama3RopeConfig, YarnConfig
from simlab.config.validate import compose
from simlab.store import Results, config_hash, copy_result, read_csv, result_key, write_csv
from simlab.sweep.job import key_of

ROOT = Path(store.__file__).parent


def fill(value):
    return lambda folder: (folder / "curve.csv").write_text(value)


def test_results_are_atomic(tmp_path):
    results = Results(tmp_path / "results")
    assert results.find("k") is None

    def breaks(folder):
        fill("half")(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        results.put("k", breaks, {})
    assert results.find("k") is None
    assert list((tmp_path / "results").iterdir()) == []
    assert results.put("k", fill("a"), {"n": 1}) == results.find("k")
    results.put("k", fill("b"), {"n": 2})
    assert json.loads((results.find("k") / "summary.json").read_text())["n"] == 2
    assert results.spoiled == {}


def test_concurrent_writes_of_one_result(tmp_path):
    results = Results(tmp_path)

    def put(i):
        for _ in range(20):
            results.put("k", fill(str(i)), {"value": str(i)})

    threads = [threading.Thread(target=put, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        results.find("k")
        time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["k"]
    folder = results.find("k")
    assert (
        json.loads((folder / "summary.json").read_text())["value"]
        == (folder / "curve.csv").read_text()
    )


CURVE = "block,mean_square\n0,1.25\n1,2.5\n"


def rewrite(path, old, new):
    path.chmod(0o644)
    path.write_text(path.read_text().replace(old, new) if old else new)


def edit(results, change):
    path = results / "k/summary.json"
    rewrite(path, None, json.dumps(change(json.loads(path.read_text()))))


def pipe(path):
    path.unlink()
    os.mkfifo(path)


# What may happen to a kept result, and what is said then.
DAMAGE = {
    "untouched": (lambda _: None, None),
    "rows missing": (lambda r: rewrite(r / "k/curve.csv", "1,2.5\n", ""), "curve.csv has changed"),
    "a digit": (lambda r: rewrite(r / "k/curve.csv", "2.5", "2.6"), "curve.csv has changed"),
    "no curve": (lambda r: (r / "k/curve.csv").unlink(), "curve.csv: No such file or directory"),
    "weights": (lambda r: rewrite(r / "k/weights.csv", "3", "4"), "weights.csv has changed"),
    "a number of the summary":
        (lambda r: rewrite(r / "k/summary.json", "1.5", "1.6"), "summary.json has changed"),
    "another job's summary":
        (lambda r: (r / "other/summary.json").replace(r / "k/summary.json"),
         "curve.csv has changed"),
    "another job's files":
        (lambda r: [(r / "other" / n).replace(r / "k" / n) for n in ("curve.csv", "summary.json")],
         "summary.json is another result's"),
    "half a summary":
        (lambda r: rewrite(r / "k/summary.json", "}\n", ""),
         "summary.json: not JSON (Expecting ',' delimiter: line 16 column 1 (char 380))"),
    "an earlier version's": (lambda r: edit(r, lambda s: {"verdict": s["verdict"]}),
                             "summary.json has no hashes, as of an earlier version"),
    "a hash missing": (lambda r: edit(r, lambda s: s.pop("summary_hash") and s),
                       "summary.json has changed"),
    "deep": (lambda r: rewrite(r / "k/summary.json", None, "[" * 100_000),
             "summary.json: not JSON (maximum recursion depth exceeded while decoding a JSON array "
             "from a unicode string)"),
    "less deep": (lambda r: edit(r, lambda s: s | {"verdict": json.loads("[" * 900 + "]" * 900)}),
                  "summary.json: nested deeper than anything that simlab writes"),
    "large": (lambda r: rewrite(r / "k/summary.json", None, " " * (33 << 20)),
              "summary.json: larger than 32 MiB, not what simlab writes"),
    "a pipe": (lambda r: pipe(r / "k/summary.json"), "summary.json: no such file"),
    "a curve's pipe": (lambda r: pipe(r / "k/curve.csv"), "curve.csv: not a file"),
    "a file": (lambda r: ((r / "k").rename(r / "moved"), (r / "k").write_text("")),
               "summary.json: no such file"),
    "a stray folder beside": (lambda r: (r / "k" / "plots").mkdir(), None),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_kept_results_are_verified(tmp_path, damage):
    """What isn't as it was kept is not used, and why; another result can take its place."""
    results = Results(tmp_path)

    def tables(folder):
        (folder / "curve.csv").write_text(CURVE)
        (folder / "weights.csv").write_text("tensor,std\nembedding,3\n")

    results.put("k", tables, {"verdict": {"value": 1.5}, "nan": float("nan"), "seeds": (1, 2)})
    results.put("other", fill("block,mean_square\n0,9\n"), {"verdict": {"value": 1.5}})
    change, why = DAMAGE[damage]
    change(tmp_path)
    found = results.find("k")
    assert results.spoiled.get("k") == why
    assert (found is None) == (why is not None)
    kept = results.put("k", tables, {})
    assert results.find("k") == kept
    copy_result(kept, tmp_path / "job")
    assert {p.name for p in (tmp_path / "job").iterdir()} == {
        "curve.csv", "summary.json", "weights.csv",
    }  # fmt: skip


# Half-written, by a process that was killed, by one that lives, on another machine.
LEFT = {
    "killed": (f"{store.HERE}1-k", False, 0, False),
    "alive": (f"{store.HERE}2-k", True, 0, True),
    "alive for long": (f"{store.HERE}3-k", True, 2 * store.STALE, True),
    "elsewhere": (f"{store.PARTIAL}elsewhere-4-k", False, 0, True),
    "elsewhere, long ago": (f"{store.PARTIAL}elsewhere-5-k", False, 2 * store.STALE, False),
}


@pytest.mark.parametrize("folder", [False, True])
def test_half_written_files_are_removed(tmp_path, folder):
    """By whoever writes there next; what is being written stays."""
    with contextlib.ExitStack() as stack:
        for name, alive, age, _ in LEFT.values():
            path = tmp_path / name
            if folder:
                path.mkdir()
                (path / "curve.csv").write_text("half")
            else:
                path.write_text("half")
            os.utime(path, (time.time() - age,) * 2)
            if alive:
                stack.enter_context(store.locked(path))
        store.write_atomically(tmp_path / "job.json", lambda path: path.write_text("{}"))
        left = {name for name, *_, stays in LEFT.values() if stays}
        assert {path.name for path in tmp_path.iterdir()} == {*left, "job.json"}
    Results(tmp_path).clean()  # their processes have ended
    left = {LEFT["elsewhere"][0]}
    assert {path.name for path in tmp_path.iterdir()} == {*left, "job.json"}


def test_a_killed_write_is_cleaned_up(tmp_path):
    """A real process, killed while it writes; and one that writes on meanwhile."""
    code = (
        "import sys, time, pathlib, simlab.store as s\n"
        "s.write_atomically(pathlib.Path(sys.argv[1]),\n"
        "    lambda p: (p.write_text('half'), time.sleep(60)))"
    )

    def start(name):
        process = subprocess.Popen([sys.executable, "-c", code, tmp_path / name])
        while not list(tmp_path.glob(f"{store.HERE}*{name}")):
            time.sleep(0.01)
        return process

    with start("a") as a, start("b") as b:
        a.kill()
        a.wait()
        Results(tmp_path).clean()
        (left,) = tmp_path.iterdir()
        assert left.name.endswith("-b")
        b.kill()


def test_a_stray_folder_makes_way(tmp_path):
    (tmp_path / "curve.csv").mkdir()
    (tmp_path / "curve.csv" / "mine").write_text("mine")
    store.write_atomically(tmp_path / "curve.csv", lambda path: path.write_text("a"))
    assert (tmp_path / "curve.csv").read_text() == "a"
    assert (tmp_path / "curve.csv.aside-1" / "mine").read_text() == "mine"


@pytest.mark.parametrize(("umask", "modes"), [(0o022, "755 444 644"), (0o007, "770 440 660")])
def test_modes_follow_umask(tmp_path, umask, modes):
    before = os.umask(umask)
    try:
        kept = Results(tmp_path / "results").put("k", fill("a"), {})
        copy_result(kept, tmp_path / "job")
    finally:
        os.umask(before)
    seen = [kept, kept / "curve.csv", tmp_path / "job/curve.csv"]
    assert " ".join(f"{path.stat().st_mode & 0o777:o}" for path in seen) == modes
    assert (tmp_path / "job/summary.json").stat().st_mode == seen[2].stat().st_mode


def test_results_of_other_weights_are_not_found(tmp_path):
    results = Results(tmp_path)
    results.put("k", fill("a"), {"weight_hash": "abc"})
    assert results.find("k", lambda: "abc") is not None
    assert results.find("k", lambda: "abd") is None
    assert results.spoiled == {}  # the checkpoint has changed, not the result


@pytest.mark.parametrize("reflinks", [True, False])
def test_copies_are_apart(tmp_path, monkeypatch, reflinks):
    """Whoever edits a job's file leaves the kept one as it is; blocks are shared where they can be."""
    asked = []

    def ioctl(new, request, old):
        asked.append(request)
        if not reflinks:
            raise OSError(95, "Operation not supported")
        os.write(new, os.pread(old, 1000, 0))

    monkeypatch.setattr(store.fcntl, "ioctl", ioctl)
    results = Results(tmp_path / "results")
    kept = results.put("k", fill("a"), {})
    copy_result(kept, tmp_path / "job")
    copy_result(kept, tmp_path / "job")  # again is fine
    assert asked == [store.FICLONE] * 4
    assert (tmp_path / "job" / "curve.csv").read_text() == "a"
    (tmp_path / "job" / "curve.csv").write_text("b")
    assert results.find("k") == kept


def leaves(config, replaced=lambda changed: changed):
    """Copies of a frozen config, each with one leaf changed, by the leaf's dotted name."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)

        def changed(inner, name=field.name):
            return replaced(dataclasses.replace(config, **{name: inner}))

        if dataclasses.is_dataclass(value):
            for name, copy in leaves(value, changed):
                yield f"{field.name}.{name}", copy
            continue
        nested = [kind for kind in typing.get_args(hints[field.name]) if kind is not type(None)]
        assert not any(map(dataclasses.is_dataclass, nested)), f"{field.name}: none is given here"
        other = {
            bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v * 2 + 1,
            str: lambda v: v + "2", tuple: lambda v: (*v, 7), type(None): lambda _: 7,
        }  # fmt: skip
        yield field.name, changed(other[type(value)](value))


def test_hash_of_every_config_leaf():
    config = tiny("device=cpu")
    model = dataclasses.replace(
        config.shape, yarn=YarnConfig(2.0, 64), llama3=Llama3RopeConfig(2.0, 1.0, 4.0, 64)
    )
    config = dataclasses.replace(config, model=model)
    copies = dict(leaves(config))
    assert {"engine", "seeds", "model.norm.eps", "model.yarn.factor", "init.std"} <= copies.keys()
    hashes = {name: config_hash(copy) for name, copy in copies.items()}
    assert hashes.pop("source.keep") == config_hash(config)  # of the download, not of the run
    assert len({config_hash(config), *hashes.values()}) == 1 + len(hashes), hashes


@pytest.mark.parametrize("reads_head", ["gradients", "weights", ""])
def test_key_includes_head_when_read(checkpoint, reads_head):
    """A checkpoint's weight hash leaves the head out, which the loss and weights.csv read."""
    config = compose(
        ["source=checkpoint", f"source.path={checkpoint}", "inputs.length=8", "seeds=0",
         "device=cpu", f"gradients={reads_head == 'gradients'}".lower(),
         f"source.weights={reads_head == 'weights'}".lower()]
    )  # fmt: skip
    file = checkpoint / "model.safetensors"
    stamp = file.stat().st_mtime_ns
    before = experiment.prepare(config)
    key, weights = key_of(before), before.checkpoint.identity()["weight_hash"]
    tensors = load_file(file)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    os.utime(file, ns=(stamp + 10**9, stamp + 10**9))
    after = experiment.prepare(config)
    assert after.checkpoint.identity()["weight_hash"] == weights
    assert (key_of(after) != key) == bool(reads_head)


def test_result_key():
    config = tiny()
    assert result_key(tiny("depth=4"), b"") != result_key(config, b"")
    assert result_key(config, b"") != result_key(config, b"1")
    same = tiny("results=elsewhere", "resume=false")
    assert result_key(same, b"") == result_key(config, b"")
    gpus = [config_hash(dataclasses.replace(config, device=f"cuda:{i}")) for i in (0, 3)]
    assert gpus[0] == gpus[1] != config_hash(config)


def test_csv_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "kind": ["a", "b", "c"],
            "value": np.exp(rng.normal(size=3) * 100),
            "empty": [np.nan] * 3,
            "some": [1.0, np.nan, 1e-300],
            "count": [1, 2, 3],
        }
    )
    write_csv(tmp_path / "t.csv", frame)
    found = read_csv(tmp_path / "t.csv")
    pd.testing.assert_frame_equal(found, frame, check_exact=True, check_dtype=False)
    assert found["empty"].dtype == np.float64


def imported(path: Path) -> set[Path]:
    """simlab's files that a file imports, wherever in it; a package is its ``__init__.py``."""
    found = set()
    for parts in (name.split(".") for name in imports(path) if name.startswith("simlab")):
        for length in range(1, len(parts) + 1):
            place = ROOT.parent.joinpath(*parts[:length])
            found |= {place.with_suffix(".py"), place / "__init__.py"}
    found -= {
        ROOT / "__init__.py"
    }  # its names, of the whole interface, are imported when asked for
    return {file for file in found if file.exists()}


def measuring_code() -> set[Path]:
    """Everything that measuring a run imports, directly or not."""
    found: set[Path] = set()
    waiting = {ROOT / "experiment" / name for name in ("pipeline.py", "sharing.py")}
    while waiting:
        found |= waiting
        waiting = {other for path in waiting for other in imported(path)} - found
    return found


def test_key_covers_measuring_code(monkeypatch):
    """Nothing in the import closure of the measuring code is left out of the key."""
    measuring = measuring_code()
    rooms = {path.relative_to(ROOT).parts[0] for path in measuring}
    assert {"measurement", "weights", "checkpoints", "model", "analysis", "theory"} <= rooms
    assert measuring <= set(store.result_code())
    for room in rooms:  # and the comparison would show it
        monkeypatch.setattr(store, "NOT_RESULTS", (room,))
        assert not measuring <= set(store.result_code()), room


def test_key_changes_with_measuring_code(monkeypatch):
    def key():
        store.code_hash.cache_clear()
        return store.code_hash()

    before = key()
    whole = store.result_code()
    monkeypatch.setattr(store, "result_code", lambda: whole[1:])
    assert key() != before
    monkeypatch.undo()
    monkeypatch.setattr(store, "version", lambda name: f"{name} 0")
    assert key() != before
    monkeypatch.undo()
    assert key() == before
