"""What is kept is whole, and known by what made it."""

import dataclasses
import json
import os
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
from simlab.store import Results, config_hash, link, read_csv, result_key, write_csv
from simlab.sweep.job import key_of

ROOT = Path(store.__file__).parent


def fill(value):
    def write(folder):
        (folder / "curve.csv").write_text(value)
        (folder / "summary.json").write_text(json.dumps({"value": value}))

    return write


def test_results_are_atomic(tmp_path):
    results = Results(tmp_path / "results")
    assert results.find("k") is None

    def breaks(folder):
        fill("half")(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        results.put("k", breaks)
    assert results.find("k") is None
    assert list((tmp_path / "results").iterdir()) == []
    assert results.put("k", fill("a")) == results.find("k")
    results.put("k", fill("b"))
    assert json.loads((results.find("k") / "summary.json").read_text()) == {"value": "b"}
    (results.root / "k" / "summary.json").chmod(0o644)
    (results.root / "k" / "summary.json").write_text("{")  # a broken file is no result
    assert results.find("k") is None


def test_concurrent_writes_of_one_result(tmp_path):
    results = Results(tmp_path)
    threads = [
        threading.Thread(target=lambda i=i: [results.put("k", fill(str(i))) for _ in range(20)])
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for _ in range(50):
        found = results.find("k")
        if found is not None:
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["k"]
    folder = results.find("k")
    assert (
        json.loads((folder / "summary.json").read_text())["value"]
        == (folder / "curve.csv").read_text()
    )


def test_stale_partial_results_are_removed(tmp_path):
    results = Results(tmp_path)
    old, new = tmp_path / ".partial-k-1", tmp_path / ".partial-k-2"
    for folder in (old, new):
        folder.mkdir()
        (folder / "curve.csv").write_text("half")
    os.utime(old, (time.time() - 2 * store.STALE,) * 2)
    results.clean()
    assert [path.name for path in tmp_path.iterdir()] == [new.name]


def test_results_of_other_weights_are_not_found(tmp_path):
    results = Results(tmp_path)

    def with_weights(folder):
        (folder / "curve.csv").write_text("a")
        (folder / "summary.json").write_text(json.dumps({"weight_hash": "abc"}))

    results.put("k", with_weights)
    assert results.find("k", lambda: "abc") is not None
    assert results.find("k", lambda: "abd") is None


def test_links_are_read_only(tmp_path):
    kept = Results(tmp_path / "results").put("k", fill("a"))
    link(kept, tmp_path / "job")
    link(kept, tmp_path / "job")  # again is fine
    file = tmp_path / "job" / "curve.csv"
    assert file.samefile(kept / "curve.csv")
    assert file.stat().st_mode & 0o777 == 0o444
    store.write_atomically(file, lambda path: path.write_text("b") and None)
    assert (kept / "curve.csv").read_text() == "a"


def test_links_to_another_disk_are_copies(tmp_path, monkeypatch):
    def elsewhere(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", elsewhere)
    kept = Results(tmp_path / "results").put("k", fill("a"))
    link(kept, tmp_path / "job")
    assert (tmp_path / "job" / "curve.csv").read_text() == "a"
    assert not (tmp_path / "job" / "curve.csv").samefile(kept / "curve.csv")


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
    assert len({config_hash(config), *hashes.values()}) == 1 + len(copies), hashes


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
