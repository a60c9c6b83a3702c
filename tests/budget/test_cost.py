"""The rule of engine=auto: counts by hand, and where it turns."""

import dataclasses
import math

import pytest
from conftest import tiny

from simlab.budget.cost import choose, costs, drawing_threads
from simlab.config.validate import compose
from simlab.experiment import prepare, run
from simlab.report.console import announce
from simlab.weights.rng import Normals


def test_counts_match_draws(monkeypatch):
    """Counted in the draws themselves, dense and weightless, without and with gradients."""
    drawn = []
    import simlab.weights.dense as random
    import simlab.weights.rng as normals

    def counting(original):
        def draw(out, *args):
            drawn.append(math.prod(out.shape))
            original(out, *args)

        return draw

    monkeypatch.setattr(random, "draw_on_cpu", counting(random.draw_on_cpu))
    monkeypatch.setattr(normals, "draw_normals", counting(normals.draw_normals))
    for engine in ("dense", "weightless"):
        config = tiny(f"engine={engine}", "width=96", "d_ff=160")
        drawn.clear()
        run(config)
        embedding = 97 * 96  # one piece, drawn whole
        wanted = costs(config.shape, 22, False)[engine].numbers
        assert sum(drawn) - embedding == wanted
    drawn.clear()
    run(tiny("engine=weightless", "width=96", "d_ff=160", "gradients=true", "inputs.batch=1"))
    # 11 tokens; the head sees 10 of them, the formula counts 11; the jitter's N×N are left out.
    wanted = costs(config.shape, 11, True)["weightless"].numbers
    assert sum(drawn) - embedding == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("model", ["olmo2_1b", "olmo2_7b", "olmo2_32b"])
@pytest.mark.parametrize("gradients", [False, True])
def test_few_tokens_weightless_many_dense(model, gradients):
    shape = compose([f"model={model}"]).shape
    assert choose(shape, 64, gradients, "cpu")[0] == "weightless"
    assert choose(shape, 4 * shape.d_ff, gradients, "cpu")[0] == "dense"
    turns = [choose(shape, n, gradients, "cpu")[0] for n in range(64, 2 * shape.width, 64)]
    assert turns == sorted(turns, reverse=True)  # once, from weightless to dense


def test_the_measured_crossover():
    """scripts/benchmark.py crossover, 2 cores: 1B turns between 1024 and 1536 tokens."""
    shape = compose(["model=olmo2_1b"]).shape
    for gradients in (False, True):
        assert choose(shape, 832, gradients, "cpu")[0] == "weightless"
        assert choose(shape, 1536, gradients, "cpu")[0] == "dense"


def test_engine_and_reason_are_reported():
    ready = prepare(tiny("engine=auto", "width=96", "inputs.batch=1"))
    assert ready.engines == {"random": "weightless"}
    assert "cheaper than dense" in ready.reason
    assert prepare(tiny("engine=auto", "inputs.batch=100")).engines == {"random": "dense"}
    assert prepare(tiny()).reason == "as asked"
    summary = run(tiny("engine=auto", "width=96", "inputs.batch=1")).summary
    assert summary["engine"] == "weightless"
    assert "cheaper" in summary["engine_reason"]
    assert summary["config"]["engine"] == "weightless"


def test_a_checkpoint_is_always_dense(checkpoint, capsys):
    """In its curves and in the header, also beside random inits whose engine was chosen."""
    config = compose(
        ["source=checkpoint", f"source.path={checkpoint}", "engine=weightless", "seeds=2",
         "inputs.batch=2", "inputs.length=9", "device=cpu", "gradients=true"]
    )  # fmt: skip
    summary = run(config).summary
    assert summary["engines"] == {"checkpoint": "dense", "random": "weightless"}
    assert summary["loss"].keys() == {"checkpoint", "random"}
    ready = prepare(dataclasses.replace(config, engine="auto"))
    announce(ready.config, 0, ready.unit, ready.engines, ready.reason)
    header = " ".join(capsys.readouterr().out.split())
    assert header.endswith(") for random inits; always dense for a checkpoint")
    alone = prepare(dataclasses.replace(config, seeds=()))
    assert (alone.config.engine, alone.engines) == ("dense", {"checkpoint": "dense"})
    assert alone.reason == "a checkpoint has its weights"


def test_threads_are_shared_in_proportion():
    shape = compose(["model=olmo2_32b"]).shape

    def threads(tokens, count):
        return count - drawing_threads(shape, tokens, False, count)

    assert threads(64, 2) == 1
    assert threads(2048, 2) == 2
    assert threads(64, 1) == 1
    assert 1 < threads(64, 16) < 16


def test_normals_are_not_drawn_twice(monkeypatch):
    """What is drawn ahead is used: nothing is left over when a curve ends."""
    left = []
    original = Normals.__call__

    def watched(self, *args):
        value = original(self, *args)
        left.append(self.started)
        return value

    monkeypatch.setattr(Normals, "__call__", watched)
    run(tiny("engine=weightless", "gradients=true", "inputs.batch=1"))
    assert left
    assert not left[-1]
