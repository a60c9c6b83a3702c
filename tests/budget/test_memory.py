"""Memory: the estimate's parts against the code's constants and a real peak, and the refusal."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from conftest import ids_of, tiny

from simlab.budget import memory
from simlab.budget.cost import Curve, curves_to_measure, seconds
from simlab.budget.machine import Rates
from simlab.budget.memory import fitting, needed, peak, refuse
from simlab.budget.trace import Counter
from simlab.config import ConfigError
from simlab.config.validate import compose, options
from simlab.experiment import prepare
from simlab.experiment.batches import ENGINE_WEIGHTS
from simlab.measurement.engine import measure_curves

# Preset -> gigabytes in which each of the runs below must fit, and in half of which not all do.
PRESETS = {
    "small": 0.4, "olmo2_1b": 0.55, "olmo2_7b": 1.4, "olmo2_13b": 2.0, "olmo2_32b": 3.0,
    "olmo3_7b": 1.4, "olmo3_32b": 3.0, "llama3_8b": 1.4, "llama3_70b": 5.0, "llama3_405b": 18.0,
    "qwen3_32b": 3.0, "mistral_7b": 1.4, "qwen2_5_72b": 5.0, "gpt2_xl": 0.55, "pythia_12b": 2.0,
    "phi4_14b": 2.0, "stablelm_3b": 0.8, "gemma2_27b": 3.5, "gemma3_27b": 3.0,
    "olmoe_7b": 2.2, "mixtral_8x7b": 7.0, "nanochat_d12": 0.4, "nanochat_d20": 0.4,
}  # fmt: skip


@pytest.fixture
def gigabytes(monkeypatch):
    """Sets how much memory is free, in 10⁹ bytes."""

    def free(size):
        def available(device, share=1):
            return int(size * 1e9) // share

        monkeypatch.setattr(memory, "available", available)
        return int(size * 1e9)

    return free


def test_fragmentation_allows_for_what_malloc_keeps():
    from simlab.budget import process

    assert memory.MOST_FRAGMENTED > process.KEPT


def curve(*overrides: str) -> Curve:
    config = compose(["model=olmo2_1b", "seeds=1", "device=cpu", *overrides])
    (measured,) = curves_to_measure(config, 2)
    return measured


def test_memory_grows_with_requests():
    base = ["engine=dense", "inputs.batch=4", "inputs.length=512"]
    small = peak(curve(*base))
    more = "inputs.batch=8", "inputs.length=4096", "gradients=true", "width=4096", "d_ff=16384"
    for asked in more:
        assert peak(curve(*base, asked)) > small, asked
    assert peak(curve(*base, "dtype=bfloat16")) < small
    assert peak(curve(*base, "depth=1000")) < 1.1 * small  # one block at a time: only rows are more
    deep = [peak(curve(*base, "gradients=true", f"depth={n}")) for n in (100, 200)]
    assert deep[1] - deep[0] == pytest.approx(100 * curve(*base).stream, rel=0.1)
    few = ["inputs.batch=1", "inputs.length=64"]
    assert peak(curve(*few, "engine=weightless")) < peak(curve(*few, "engine=dense")) / 3


@pytest.mark.parametrize(
    ("placement", "made"),
    [
        (["norm=hyper_connections", "norm.streams=8"], 8),
        (["norm=scaled", "norm.start_scale=1"], 1),  # x₀ is handed on, not made anew
    ],
)
def test_every_vector_of_the_states_is_counted(placement, made):
    """With gradients the states before every block are kept, and forward alone one: of n vectors."""
    base = ["engine=dense", "inputs.batch=4", "inputs.length=512"]
    stream = curve(*base).stream
    deep = [peak(curve(*base, *placement, "gradients=true", f"depth={n}")) for n in (100, 200)]
    assert deep[1] - deep[0] == pytest.approx(100 * made * stream, rel=0.1)
    assert peak(curve(*base, *placement)) > peak(curve(*base, "norm=pre")) + made * stream


VECTORS = [
    ["norm=pre"],
    ["norm=hyper_connections", "norm.streams=16"],
    ["norm=mhc"],
    ["norm=attn_res_block"],
    ["norm=scaled", "norm.start_scale=1"],
]


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("engine", ["dense", "weightless"])
@pytest.mark.parametrize("placement", VECTORS, ids=lambda placement: placement[0])
def test_tensors_of_a_run(placement, engine, gradients, monkeypatch):
    """The estimate of what lives at a time, against a count of every tensor that a run makes."""
    shape = ["depth=4", "width=256", "d_ff=256", "inputs.batch=2", "inputs.length=48", "heads=4"]
    asked = [*shape, *placement, f"engine={engine}", f"gradients={str(gradients).lower()}"]
    config = tiny(*asked, "kv_heads=4", "vocab_size=50")
    weights = ENGINE_WEIGHTS[engine](config.shape, config.init, 0)
    monkeypatch.setattr(memory, "MIB", 0)  # a thread's random numbers, which aren't tensors
    (asked_for,) = curves_to_measure(config, 1)
    with Counter() as count:
        measure_curves(weights, ids_of(config), torch.device("cpu"), torch.float32, gradients)
    assert 0.85 < memory.live_bytes(asked_for) / count.peak < 1.3


def test_long_sequences_are_squared():
    """1 × 16384: four float32 matrices of T × T for one head, and the mask and its inverse."""
    size = peak(curve("engine=dense", "width=256", "inputs.batch=1", "inputs.length=16384"))
    assert size == pytest.approx(18 * 16384**2, rel=0.3)


CASE = """
import resource, sys
from simlab.budget.process import tune_process
tune_process()
from simlab import compose, experiment
from simlab.experiment import batches, pipeline  # torch, which INTERPRETER counts
def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not ru_maxrss: Linux begins it at the size of the process that started this one.
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
before = peak()
experiment.run(compose(sys.argv[1:]))
print(peak() - before)
"""


ONE = ["depth=1", "inputs.batch=1", "engine=dense"]


@pytest.mark.parametrize(
    "overrides",
    [
        [*ONE, "width=2048", "heads=16", "kv_heads=16", "d_ff=14336", "inputs.length=64"],
        [*ONE, "width=128", "heads=2", "kv_heads=2", "d_ff=128", "inputs.length=6000"],
        [
            "engine=dense",
            "width=256",
            "heads=4",
            "kv_heads=4",
            "d_ff=256",
            "inputs.length=2048",
            "vocab_size=500",
            "gradients=true",
            "norm=hyper_connections",
            "norm.streams=16",
            "depth=6",
        ],
    ],
    ids=["a large block", "a long sequence", "many vectors"],
)
def test_a_real_peak(overrides):
    """Cases that large tensors or many decide; scripts/benchmark_estimates.py has the others."""
    asked = ["model=small", "seeds=1", "device=cpu", *overrides]
    done = subprocess.run(
        [sys.executable, "-c", CASE, *asked],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert 0.8 < needed(compose(asked), 2) / int(done.stdout) < 1.5


def test_time_grows_with_requests():
    rates = Rates(1e-11, 1e-11, 5e-9, 1e-9, 1e-6)
    base = seconds(curve("engine=dense"), rates)
    assert seconds(curve("engine=dense", "seeds=8"), rates) == pytest.approx(8 * base)
    assert seconds(curve("engine=dense", "gradients=true"), rates) > 1.5 * base
    assert seconds(curve("engine=dense", "depth=64"), rates) == pytest.approx(4 * base, rel=0.2)
    assert seconds(curve("engine=weightless", "inputs.batch=1"), rates) < base
    assert seconds(curve("engine=dense")) > 0  # with this machine's rates


def test_curves_of_checkpoint_and_init(checkpoint):
    given = ["source=checkpoint", f"source.path={checkpoint}", "seeds=3", "inputs.length=9"]
    config = prepare(compose([*given, "device=cpu", "engine=weightless"])).config
    assert [(c.stored, c.engine, c.seeds) for c in curves_to_measure(config, 2)] == [
        (True, "dense", 1), (False, "weightless", 3),
    ]  # fmt: skip
    alone = dataclasses.replace(config, seeds=(), engine="dense")
    assert [c.stored for c in curves_to_measure(alone, 2)] == [True]


@pytest.mark.parametrize("model", PRESETS)
def test_presets_fit_in_little_memory(model, gigabytes):
    base = compose([f"model={model}", "device=cpu"])
    runs = [
        base,
        dataclasses.replace(base, gradients=True),
        dataclasses.replace(base, engine="dense"),
        dataclasses.replace(
            base, engine="weightless", inputs=dataclasses.replace(base.inputs, length=512)
        ),
    ]
    gigabytes(PRESETS[model])
    for asked in runs:
        refuse(asked, 2)
    gigabytes(PRESETS[model] / 2)
    with pytest.raises(ConfigError, match="would fit"):
        refuse(max(runs, key=lambda asked: needed(asked, 2)), 2)


def test_every_preset_is_tried():
    assert set(PRESETS) == set(options("model")) - {"from_checkpoint"}


HUGE = ["inputs.batch=4096", "inputs.length=4096"]


@pytest.mark.parametrize("free", [1.5, 8])
@pytest.mark.parametrize(
    "overrides",
    [
        ["model=olmo2_7b", "engine=dense", *HUGE, "gradients=true"],
        ["model=olmo2_32b", "engine=dense", "inputs.batch=64", "inputs.length=4096"],
        ["model=olmo2_32b", "engine=weightless", *HUGE],
        ["model=olmo2_32b", "engine=dense", "inputs.batch=1", "inputs.length=64"],
        ["model=small", "engine=dense", "inputs.batch=1", "inputs.length=1000000"],
    ],
)
def test_suggestions_fit(overrides, free, gigabytes):
    size = gigabytes(free)
    config = compose([*overrides, "device=cpu"])
    if needed(config, 2) <= size:
        refuse(config, 2)
        return
    with pytest.raises(
        ConfigError, match=r"needs about .* GB, .* GB are free; .* would fit"
    ) as error:
        refuse(config, 2)
    message = str(error.value)
    assert message.startswith(" ".join(overrides))
    options = message.rpartition("; ")[2].removesuffix(" would fit").split(" or ")
    assert 1 <= len(options) <= 2
    for option in options:
        refuse(compose([*overrides, "device=cpu", *option.split()]), 2)


def test_suggestion_is_a_power_of_two(gigabytes):
    free = gigabytes(8)
    config = compose(["model=olmo2_7b", "engine=dense", *HUGE, "device=cpu", "gradients=true"])
    ((text, changed),) = (o for o in fitting(config, 2, free) if o[0].startswith("inputs."))
    assert text == f"inputs.batch={changed.inputs.batch}"
    twice = dataclasses.replace(changed.inputs, batch=2 * changed.inputs.batch)
    with pytest.raises(ConfigError, match=r"inputs\.batch"):
        refuse(dataclasses.replace(config, inputs=twice), 2)


def test_a_checkpoint_has_no_other_engine(gigabytes, checkpoint):
    ready = prepare(
        compose(
            ["source=checkpoint", f"source.path={checkpoint}", "seeds=0", "device=cpu",
             "inputs.batch=200", "inputs.length=900"]
        )
    )  # fmt: skip
    gigabytes(0.16)
    with pytest.raises(
        ConfigError, match=r"source=checkpoint engine=dense inputs\.batch=200"
    ) as error:
        refuse(ready.config, 2)
    assert "weightless" not in str(error.value)
    assert "inputs.batch=" in str(error.value).rpartition(";")[2]


def test_nothing_fits(gigabytes):
    gigabytes(0.001)
    with pytest.raises(ConfigError, match="nothing of this model fits"):
        prepare(tiny())


def test_runs_at_a_time_share(gigabytes):
    config = compose(["model=olmo2_7b", "engine=dense", "device=cpu"])
    gigabytes(1.5 * needed(config, 2) / 1e9)
    refuse(config, 2)
    with pytest.raises(ConfigError, match="are free"):
        refuse(config, 2, share=2)
