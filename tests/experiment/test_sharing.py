"""Sweep jobs that share work: each has, to the last bit, the numbers that it has alone."""

import json
from pathlib import Path

import pytest
import torch
from conftest import INPUTS, SHAPE, in_process, tiny

from simlab import experiment
from simlab.experiment import measured_curves, prepare, sharing
from simlab.experiment.sharing import SharedCurves, is_prefix, sharing_groups
from simlab.schemes.init import RULES
from simlab.schemes.placement import PLACEMENTS

DEPTH_FREE = {  # of the rules
    "normal", "transformers", "mitchell", "llama_depth", "fan_in", "ngpt", "nanochat",
}  # fmt: skip
OF_DEPTH = {
    "deepnorm",
    "residual_scale",
    "layerscale",
    "complete_p",
    "keel",
    "deep_loop",
}  # placements
STEPS = {"layerscale": (2, 19)}  # its alpha is another beyond 18 blocks


def rows(curves) -> list[tuple]:
    """Every row's place and bytes."""
    return [
        (name, seed, row.sublayer, row.block, row.kind, row.values.numpy().tobytes())
        for name, seed, curve in curves
        for row in curve.rows
    ]


def pair(*overrides, depths=(2, 3)):
    """A shallow and a deep run of the same options, their curves, and whether they are shared."""
    shallow, deep = (prepare(tiny(*overrides, f"depth={depth}")) for depth in depths)
    of_shallow, of_deep = rows(measured_curves(shallow)), measured_curves(deep)
    first = rows((n, s, c.first(shallow.config.shape.depth)) for n, s, c in of_deep)
    return of_shallow == first, is_prefix(shallow, deep)


@pytest.mark.parametrize("engine", ["dense", "weightless"])
@pytest.mark.parametrize(
    ("placement", "rule"),
    [*((p, "normal") for p in PLACEMENTS), *(("reordered", r) for r in RULES)],
)
def test_shared_if_rows_are_equal(placement, rule, engine):
    """Measured, for every placement and rule that there is: a new one is tested by being there."""
    same, shared = pair(
        f"norm={placement}", f"init={rule}", f"engine={engine}", "seeds=2", "width=24",
        "heads=4", "norm.eps=1e-3", depths=STEPS.get(placement, (2, 3)),
    )  # fmt: skip
    assert same == shared
    of_depth = placement in OF_DEPTH or rule not in DEPTH_FREE
    assert shared != of_depth


@pytest.mark.parametrize(
    ("overrides", "depths", "shared"),
    [
        (["norm=layerscale"], (2, 18), True),
        (["norm=layerscale", "norm.alpha=0.3"], (2, 19), True),
        (["norm=swin_renorm", "norm.every=2"], (2, 5), True),
        # Post-norm blocks by a half: 1 of 2 and of 3, 2 of 4.
        (["norm=mix_ln", "norm.fraction=0.5"], (2, 3), True),
        (["norm=mix_ln", "norm.fraction=0.5"], (2, 4), False),
        (["norm=minimax"], (2, 3), True),
        (["norm=nanochat"], (2, 3), False),  # its scales are linear up to the last block
        (["norm.type=layer", "model.qk_norm=per_head", "dtype=bfloat16"], (1, 4), True),
        # The last layer of a model with windows sees everything; elsewhere it has a window.
        (["model.window=4", "model.full_every=2"], (2, 5), True),
        (["model.window=4", "model.full_every=2"], (3, 5), False),
        (["init.std=3e18"], (1, 3), True),  # overflows
        (["model.experts=3", "model.experts_per_token=2"], (2, 3), True),
        (["model.value_embeddings=all"], (2, 3), True),
        # Every second layer, counted from the last.
        (["model.value_embeddings=alternate", "model.value_embedding_scale=9"], (1, 3), True),
        (["model.value_embeddings=alternate", "model.value_embedding_scale=9"], (2, 3), False),
    ],
)
def test_options_that_depend_on_depth(overrides, depths, shared):
    assert pair(*overrides, depths=depths) == (shared, shared)
    assert pair(*overrides, "engine=weightless", depths=depths) == (shared, shared)


def test_other_options_share_nothing():
    options = ["depth=4", "seeds=2"]
    shallow = prepare(tiny(*options, "depth=3"))
    assert is_prefix(shallow, prepare(tiny(*options)))
    for other in (
        "seeds=3", "seed=1 seeds=[0,1]", "engine=weightless", "init.std=0.03", "norm.eps=1e-5",
        "width=24", "dtype=bfloat16", "inputs.length=7", "gradients=true", "depth=2",
    ):  # fmt: skip
        assert not is_prefix(shallow, prepare(tiny(*options, *other.split()))), other


def test_gradients_come_from_the_end():
    runs = [prepare(tiny(f"depth={depth}", "gradients=true")) for depth in (2, 3)]
    assert not is_prefix(*runs)


def test_the_deepest_is_measured_once(monkeypatch):
    passed = []

    def measured(depth, *options):
        passed.clear()
        ready = prepare(tiny("seeds=2", f"depth={depth}", *options))
        found = experiment.measure(ready, lambda: passed.append(None), shared)
        alone = experiment.run(ready.config)
        assert found.curve.equals(alone.curve)
        assert json.dumps(found.summary) == json.dumps(alone.summary)
        return len(passed) // 2 - depth  # predicted blocks: the curve's and its band's

    shared = SharedCurves()
    assert [measured(depth) for depth in (4, 3, 1, 4)] == [4, 0, 0, 0]
    assert measured(2, "norm=pre") == 2  # another model
    shared = SharedCurves()
    assert [measured(depth, "norm=deepnorm") for depth in (3, 2)] == [3, 2]
    shared = SharedCurves()
    monkeypatch.setattr("simlab.experiment.batches.measure_curves", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measured(3)
    monkeypatch.undo()
    assert measured(2) == 2  # a deeper one that failed leaves nothing


def test_changed_text_is_measured_again(tmp_path):
    text = tmp_path / "text"
    options = ["inputs=text", f"inputs.path={text}", "vocab_size=256", "inputs.batch=2"]
    shared = SharedCurves()
    text.write_bytes(bytes(range(30, 54)))
    before = prepare(tiny(*options, "inputs.length=12"))
    first = rows(shared(before))
    text.write_bytes(bytes(range(100, 124)))
    after = prepare(tiny(*options, "inputs.length=12"))
    assert after.config == before.config
    assert rows(shared(after)) == rows(measured_curves(after)) != first


def test_groups():
    options = [(depth, std, seed) for depth in (2, 5, 3) for std in (0.02, 0.05) for seed in (0, 1)]
    configs = [tiny(f"depth={d}", f"init.std={std}", f"seed={s}") for d, std, s in options]
    configs += [tiny("norm=pre"), tiny("model.window=4", "model.full_every=2", "depth=5")]
    configs += [tiny("norm=pre", "depth=9"), tiny("model.window=4", "model.full_every=2")]
    found = sharing_groups(configs)
    assert sorted(n for group in found for n in group) == list(range(len(configs)))
    assert [[configs[n].shape.depth for n in group] for group in found] == [
        *[[5, 3, 2]] * 4, [9, 3], [5, 3]
    ]  # fmt: skip
    assert [len({(c.init, c.seed) for c in map(configs.__getitem__, g)}) for g in found] == [1] * 6


def files(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / name).read_bytes() for name in ("curve.csv", "summary.json", "job.json")
    }


LAYERSCALE = ["norm=layerscale", "depth=2,5,19", "init.std=0.05,3e18", "seeds=2"]
SEEDS = ["seed=0,1", "seeds=3", "depth=2,4", "init.std=0.05,3e18", "engine=weightless"]


@pytest.mark.parametrize(("threads", "swept", "count"), [(1, LAYERSCALE, 6), (2, SEEDS, 8)])
def test_shared_job_bytes(tmp_path, no_figures, threads, swept, count):
    """In one process's sweep: depths 2 and 5 share, 19 has another alpha; and one std overflows."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run = ["-m", *SHAPE, *INPUTS, "device=cpu", *swept]
        done = in_process(*run, "hydra.sweep.dir=sweep", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        jobs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]
        assert len(jobs) == count
        overflowed = 0
        for job in jobs if count == 6 else jobs[::3]:
            alone = ["-m", *job["overrides"], "hydra.sweep.dir=alone", "results=other"]
            in_process(*alone, cwd=tmp_path)
            shared = files(tmp_path / "sweep" / job["folder"])
            assert shared == files(tmp_path / "alone" / "0"), job
            overflowed += bool(json.loads(shared["summary.json"])["overflow"])
        assert 0 < overflowed < len(jobs)
    finally:
        torch.set_num_threads(before)


def test_engines_that_differ_by_depth_share_nothing(monkeypatch):
    def choose(model, *_):
        return ("dense", 2.0) if model.depth < 3 else ("weightless", 3.0)

    monkeypatch.setattr("simlab.budget.cost.choose", choose)
    shallow, deep, deeper = (prepare(tiny("engine=auto", f"depth={d}")) for d in (2, 3, 4))
    assert not is_prefix(shallow, deep)
    assert is_prefix(deep, deeper)


def test_threads_that_differ_by_depth_share_nothing(monkeypatch):
    """Another number of threads may be other last bits."""
    shallow, deep = (prepare(tiny("engine=weightless", f"depth={d}")) for d in (2, 3))
    assert is_prefix(shallow, deep)
    monkeypatch.setattr(sharing, "_threads", lambda config: config.shape.depth)
    assert not is_prefix(shallow, deep)
