"""Jobs that are measured together: each has, to the last bit, what it has alone."""

import json
from pathlib import Path

import pytest
import torch
from conftest import INPUTS, SHAPE, simlab, tiny

from simlab import experiment
from simlab.budget.cost import Division
from simlab.experiment import measured_curves, measured_together, prepare
from simlab.model.placement import PLACEMENTS
from simlab.schemes.init import RULES
from simlab.sweep import company
from simlab.sweep.company import Company, companies, goes_with, is_prefix

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
    passed, together = [], Company()

    def group(*depths, options=()):
        together.next([tiny("seeds=2", f"depth={depth}", *options) for depth in depths])

    def measured(depth, *options):
        passed.clear()
        ready = prepare(tiny("seeds=2", f"depth={depth}", *options))
        found = experiment.measure(ready, lambda: passed.append(None), together)
        alone = experiment.run(ready.config)
        assert found.curve.equals(alone.curve)
        assert json.dumps(found.summary) == json.dumps(alone.summary)
        return len(passed) // 2

    group(4, 3, 1, 4)
    assert [measured(depth) for depth in (4, 3, 1, 4)] == [4, 0, 0, 0]
    group(5, 2)
    assert [measured(depth) for depth in (5, 2)] == [5, 0]
    assert measured(2, "norm=pre") == 2  # of no group
    group(3, 2, options=["norm=deepnorm"])
    assert [measured(depth, "norm=deepnorm") for depth in (3, 2)] == [3, 2]
    group(3, 2)
    monkeypatch.setattr(experiment, "measure_curves", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measured(3)
    monkeypatch.undo()
    assert measured(2) == 2  # a deeper one that failed leaves nothing


WEIGHTLESS = [
    "engine=weightless",
    "inputs.length=12",
]  # 2 × 12 tokens: everything is on a cache line


def of(*options, depth=2, std=0.02, seed=0):
    """A weightless run."""
    return prepare(tiny(*WEIGHTLESS, f"depth={depth}", f"init.std={std}", f"seed={seed}", *options))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "options",
    [[f"norm={norm}"] for norm in PLACEMENTS]
    + [
        ["dtype=bfloat16"],
        ["norm.type=layer", "model.qk_norm=per_head"],
        ["model.window=4"],
        ["init=llama_depth", "model.tied=true"],
        ["inputs.batch=1", "inputs.length=64", "width=256", "d_ff=704", "heads=8", "kv_heads=8"],
        ["inputs.batch=3", "inputs.length=64", "width=64", "d_ff=128", "heads=2", "kv_heads=2"],
        ["inputs=text", "inputs.prompt=" + 24 * "a", "vocab_size=128"],  # all tokens alike
        # One short sequence: the first that a kernel for several wouldn't take as it lies.
        ["inputs.batch=1", "inputs.length=8", "width=64", "d_ff=256", "heads=4", "kv_heads=4"],
        ["inputs.batch=1", "inputs.length=8", "width=1024", "d_ff=64", "heads=8", "kv_heads=8"],
        ["inputs.batch=1", "inputs.length=16", "width=24", "d_ff=8", "heads=2", "kv_heads=2"],
    ],
    ids=" ".join,
)
def test_every_job_has_its_own_numbers_to_the_last_bit(options):
    """Three seeds with tokens of their own, two stds and two depths, measured as one batch."""
    runs = [
        of(*options, depth=depth, std=std, seed=seed)
        for depth in (3, 2)
        for std in (0.01, 0.3)
        for seed in (0, 1, 5)
    ]
    friends = [run for run in runs if goes_with(run, runs[0])]
    of_depth = any(f"norm={norm}" in options for norm in ("deepnorm", "residual_scale"))
    assert len(friends) == (6 if of_depth else 12)
    together = [rows(curves) for curves in measured_together(friends)]
    alone = [rows(measured_curves(run)) for run in friends]
    assert together == alone
    assert len({row[-1] for curve in alone[:6] for row in curve[1:2]}) == 6  # and no two alike


@pytest.mark.usefixtures("one_thread")
def test_who_is_no_company():
    deep = of(depth=3)
    assert goes_with(of(), deep)
    assert goes_with(of(seed=1), deep)
    assert goes_with(of("seeds=3"), deep)
    assert goes_with(of(std=0.5), deep)
    assert not goes_with(deep, of())
    for other in (["norm.eps=1e-5"], ["width=96"], ["dtype=bfloat16"], ["inputs.length=24"]):
        assert not goes_with(of(*other), deep)
    assert not goes_with(of("gradients=true"), of("gradients=true", seed=1))
    dense = [of("engine=dense", seed=seed) for seed in (0, 1)]
    assert not goes_with(*dense)
    for odd in (
        ["inputs.length=11"],  # curves' shares of a batch begin anywhere
        ["inputs.batch=1", "inputs.length=20", "d_ff=84"],  # or end within a vector
        ["inputs.batch=1", "inputs.length=4", "width=16", "d_ff=32", "heads=2"],  # or are tiny
    ):
        assert not goes_with(of(*odd, seed=1), of(*odd))
        assert goes_with(of(*odd), of(*odd, depth=3))


def test_several_threads_are_no_company(monkeypatch):
    """Theirs are sums in another order."""
    runs = [of(seed=seed) for seed in (0, 1)]
    monkeypatch.setattr(company, "division", lambda *_: Division(2, 1, 2, 0))
    assert not goes_with(*runs)
    monkeypatch.setattr(company, "division", lambda *_: Division(2, 1, 1, 1))
    assert goes_with(*runs)


@pytest.mark.usefixtures("one_thread")
def test_too_large_for_the_memory_alone(monkeypatch):
    together = Company()
    configs = [of(depth=depth, seed=seed).config for depth in (3, 2) for seed in (0, 1, 2, 3)]
    together.next(configs)
    assert len(together.with_others(prepare(configs[0]))) == 8
    need = company.needed(configs[0], 1)
    monkeypatch.setattr(company, "available", lambda _: need + 1000)
    assert len(together.with_others(prepare(configs[0]))) == 2  # of its seed


@pytest.mark.usefixtures("one_thread")
def test_only_whole_products_are_measured():
    """Of two inits and two seeds one has been measured: the rest isn't every init with every seed."""
    together = Company()
    runs = [of(std=std, seed=seed) for std in (0.02, 0.3) for seed in (0, 1)]
    together.next([run.config for run in runs])
    assert len(together.with_others(runs[0])) == 4
    together.group = []
    together(runs[0])
    together.group = [run.config for run in runs]
    assert len(together.with_others(runs[1])) == 1


@pytest.mark.usefixtures("one_thread")
def test_a_mistake_of_one_job_is_not_the_others(monkeypatch):
    """As of too much memory: the jobs of its group are then measured alone."""
    whole = experiment.measure_curves

    def failing(weights, *args, **options):
        if 3 in weights.normals.seeds:
            raise MemoryError
        passed.append(weights.normals.seeds)
        return whole(weights, *args, **options)

    passed = []
    monkeypatch.setattr(experiment, "measure_curves", failing)
    together = Company()
    runs = [of(seed=seed) for seed in (0, 3, 1, 2)]
    together.next([run.config for run in runs])
    for run in runs:
        if run.config.seed == 3:
            with pytest.raises(MemoryError):
                together(run)
        else:
            assert rows(together(run)) == rows(measured_curves(run))
    assert len(passed) == 6  # nobody's but one's own, here and there


def test_other_tokens_are_other_curves(tmp_path):
    """A text that changes between two looks at it."""
    text = tmp_path / "text"
    options = ["inputs=text", f"inputs.path={text}", "vocab_size=256", "inputs.batch=2"]
    text.write_bytes(bytes(range(24)))
    before = of(*options)
    together = Company()
    together.next([before.config])
    first = rows(together(before))
    text.write_bytes(bytes(range(100, 124)))
    after = of(*options)
    assert after.config == before.config
    assert rows(together(after)) == rows(measured_curves(after)) != first


def test_groups_are_whole_and_the_deepest_comes_first():
    options = [(depth, std, seed) for depth in (2, 5, 3) for std in (0.02, 0.05) for seed in (0, 1)]
    configs = [tiny(f"depth={d}", f"init.std={std}", f"seed={s}") for d, std, s in options]
    configs += [tiny("norm=pre"), tiny("init.std=0.1", "depth=5"), tiny("norm=pre", "depth=9")]
    groups = companies(configs)
    assert sorted(n for group in groups for n in group) == list(range(len(configs)))
    depths = [[configs[n].shape.depth for n in group] for group in groups]
    assert depths == [[5] * 4 + [3] * 4 + [2] * 4, [5], [9, 3]]  # an init with fewer seeds apart
    configs = [tiny("depth=40"), *(tiny("depth=2", f"seed={seed}") for seed in range(1, 4))]
    assert companies(configs) == [[0], [1, 2, 3]]  # and none is measured deeper than asked


def test_a_group_is_not_too_large(monkeypatch):
    """Of curves: a job's own seeds stay together, then come inits, then other seeds."""

    def sizes(most, *options):
        monkeypatch.setattr(company, "CURVES", most)
        configs = [
            tiny(f"init.std={std}", f"seed={10 * seed}", *options)
            for seed in range(4)
            for std in (0.01, 0.02, 0.04)
        ]
        groups = companies(configs)
        assert sorted(n for group in groups for n in group) == list(range(12))
        return [
            (len({configs[n].init for n in group}), len({configs[n].seed for n in group}))
            for group in groups
        ]

    assert sizes(64) == [(3, 4)]
    assert sizes(6) == [(3, 2)] * 2
    assert sizes(2) == [(2, 1)] * 4 + [(1, 2)] * 2
    assert sizes(1) == [(1, 1)] * 12
    assert sizes(12, "seeds=8") == [(1, 1)] * 12
    assert sizes(16, "seeds=8") == [(2, 1)] * 4 + [(1, 2)] * 2
    monkeypatch.setattr(company, "OPERATIONS", 1)  # and one job at least
    assert sizes(64) == [(1, 1)] * 12
    monkeypatch.undo()
    text = ["inputs=text", "inputs.prompt=a", "inputs.batch=null", "inputs.length=null"]
    wide = ["width=512", "heads=8", "kv_heads=8", "d_ff=2048", "depth=24", *text]
    configs = [tiny(*wide, f"seed={seed}") for seed in range(4)]
    assert companies(configs) == [[0, 1], [2, 3]]  # a text's own length isn't known yet


@pytest.mark.usefixtures("one_thread")
def test_a_mistake_in_one_batch_ends_the_others(monkeypatch):
    monkeypatch.setattr(experiment, "division", lambda *_: Division(1, 2, 1, 0))
    passed = []

    def stop():
        passed.append(None)
        if len(passed) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured_curves(of("seeds=8", depth=20), stop)
    assert len(passed) < 80  # of 160: those before it have ended, and the rest with their block
    assert torch.get_num_threads() == 1


def files(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / name).read_bytes() for name in ("curve.csv", "summary.json", "job.json")
    }


LAYERSCALE = ["norm=layerscale", "depth=2,5,19", "init.std=0.05,3e18", "seeds=2"]
SEEDS = ["seed=0,1,2,3", "depth=2,4", "init.std=0.05,3e18", *WEIGHTLESS]


@pytest.mark.parametrize(
    ("threads", "swept", "count"), [("1", LAYERSCALE, 6), ("1", SEEDS, 16), ("2", SEEDS, 16)]
)
def test_a_job_has_the_bytes_that_it_has_alone(tmp_path, monkeypatch, threads, swept, count):
    """In one process's sweep: depths 2 and 5 share, 19 has another alpha; and one std overflows."""
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    run = ["-m", *SHAPE, *INPUTS, "device=cpu", *swept]
    done = simlab(*run, "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    jobs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]
    assert len(jobs) == count
    overflowed = 0
    for job in jobs if count < 10 else jobs[::5]:
        alone = ["-m", *job["overrides"], "hydra.sweep.dir=alone", "results=other"]
        simlab(*alone, cwd=tmp_path)
        found = files(tmp_path / "sweep" / job["folder"])
        assert found == files(tmp_path / "alone" / "0"), job
        overflowed += bool(json.loads(found["summary.json"])["overflow"])
    assert 0 < overflowed < len(jobs)


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
    monkeypatch.setattr(company, "division", lambda run, _: run.config.shape.depth)
    assert not is_prefix(shallow, deep)
