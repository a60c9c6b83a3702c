"""Jobs that differ in depth alone: a shallow one's curves as the first rows of a deep one's."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import INPUTS, SHAPE, simlab, tiny

from simlab import experiment
from simlab.experiment import Prefixes, is_prefix, measured_curves, prepare
from simlab.model.placement import PLACEMENTS
from simlab.sweeper import deepest_first
from simlab.weights.init import RULES

DEPTH_FREE = {"normal", "mitchell", "llama_depth", "fan_in"}  # of the rules
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
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_shared_exactly_where_the_rows_are_the_same(placement, rule, engine):
    """Measured, for every placement and rule that there is: a new one is tested by being there."""
    same, shared = pair(
        f"norm={placement}", f"init={rule}", f"engine={engine}", "seeds=2", "width=24",
        "heads=4", "norm.eps=1e-3", depths=STEPS.get(placement, (2, 3)),
    )  # fmt: skip
    assert same == shared
    of_depth = placement in ("deepnorm", "residual_scale", "layerscale") or rule not in DEPTH_FREE
    assert shared != of_depth


@pytest.mark.parametrize(
    ("overrides", "depths", "shared"),
    [
        (["norm=layerscale"], (2, 18), True),
        (["norm=layerscale", "norm.alpha=0.3"], (2, 19), True),
        (["norm=swin_renorm", "norm.every=2"], (2, 5), True),
        (["norm.type=layer", "model.qk_norm=per_head", "dtype=bfloat16"], (1, 4), True),
        # The last layer of a model with windows sees everything; elsewhere it has a window.
        (["model.window=4", "model.full_every=2"], (2, 5), True),
        (["model.window=4", "model.full_every=2"], (3, 5), False),
        (["init.std=3e18"], (1, 3), True),  # overflows
    ],
)
def test_what_else_knows_the_depth(overrides, depths, shared):
    assert pair(*overrides, depths=depths) == (shared, shared)
    assert pair(*overrides, "engine=weightless", depths=depths) == (shared, shared)


@pytest.mark.parametrize(
    "other",
    [
        ["seeds=3"],
        ["seed=1", "seeds=[0,1]"],
        ["engine=weightless"],
        ["init.std=0.03"],
        ["norm.eps=1e-5"],
        ["width=24"],
        ["dtype=bfloat16"],
        ["inputs.length=7"],
        ["gradients=true"],
        ["depth=2"],
    ],
)
def test_what_else_differs_is_not_shared(other):
    options = ["depth=4", "seeds=2"]
    shallow = prepare(tiny(*options, "depth=3"))
    assert is_prefix(shallow, prepare(tiny(*options)))
    assert not is_prefix(shallow, prepare(tiny(*options, *other)))


def test_gradients_come_from_the_end():
    runs = [prepare(tiny(f"depth={depth}", "gradients=true")) for depth in (2, 3)]
    assert not is_prefix(*runs)


def test_the_deepest_is_measured_once(monkeypatch):
    passed, curves_of = [], Prefixes()

    def measured(depth, *overrides):
        passed.clear()
        ready = prepare(tiny("seeds=2", f"depth={depth}", *overrides))
        found = experiment.measure(ready, lambda: passed.append(None), curves_of)
        alone = experiment.run(ready.config)
        assert found.curve.equals(alone.curve)
        assert json.dumps(found.summary) == json.dumps(alone.summary)
        return len(passed) // 2

    assert [measured(depth) for depth in (4, 3, 1, 4)] == [4, 0, 0, 0]
    assert [measured(depth) for depth in (5, 2)] == [5, 0]
    assert measured(2, "norm=pre") == 2  # and the other's are forgotten
    assert [measured(depth) for depth in (2, 1)] == [2, 0]
    assert [measured(depth, "norm=deepnorm") for depth in (3, 2)] == [3, 2]
    monkeypatch.setattr(experiment, "measure_curves", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measured(3)
    assert curves_of.last is None
    monkeypatch.undo()
    assert measured(2) == 2  # a deeper one that failed leaves nothing


def test_the_deepest_of_a_family_comes_first():
    options = [(depth, std) for depth in (2, 5, 3) for std in (0.02, 0.05)]
    places = [
        SimpleNamespace(
            job=SimpleNamespace(config=tiny(f"depth={depth}", f"init.std={std}")), blocks=2 * depth
        )
        for depth, std in options
    ]
    order = [places.index(place) for place in deepest_first(places)]
    assert [options[i] for i in order] == [(d, std) for std in (0.02, 0.05) for d in (5, 3, 2)]


def files(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / name).read_bytes() for name in ("curve.csv", "summary.json", "job.json")
    }


def test_a_job_has_the_bytes_that_it_has_alone(tmp_path, monkeypatch):
    """In one process's sweep: depths 2 and 5 share, 19 has another alpha; and one std overflows."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    swept = ["norm=layerscale", "depth=2,5,19", "init.std=0.05,3e18"]
    run = ["-m", *SHAPE, *INPUTS, "device=cpu", "seeds=2", *swept]
    done = simlab(*run, "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    jobs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]
    assert len(jobs) == 6
    overflowed = 0
    for job in jobs:
        alone = ["-m", *job["overrides"], "hydra.sweep.dir=alone", "results=other"]
        simlab(*alone, cwd=tmp_path)
        found = files(tmp_path / "sweep" / job["folder"])
        assert found == files(tmp_path / "alone" / "0"), job
        overflowed += bool(json.loads(found["summary.json"])["overflow"])
    assert overflowed == 3


def test_engines_that_differ_by_depth_share_nothing(monkeypatch):
    def choose(model, *_):
        return ("dense", 2.0) if model.depth < 3 else ("weightless", 3.0)

    monkeypatch.setattr(experiment, "choose", choose)
    shallow, deep, deeper = (prepare(tiny("engine=auto", f"depth={d}")) for d in (2, 3, 4))
    assert not is_prefix(shallow, deep)
    assert is_prefix(deep, deeper)


def test_threads_that_differ_by_depth_share_nothing(monkeypatch):
    """Another number of threads may be other last bits."""
    shallow, deep = (prepare(tiny("engine=weightless", f"depth={d}")) for d in (2, 3))
    assert is_prefix(shallow, deep)
    monkeypatch.setattr(experiment, "compute_threads", lambda model, *_: model.depth)
    assert not is_prefix(shallow, deep)
