"""streams.csv: every vector of a placement's state, against plain loops, and wherever rows go."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PARITY, ids_of, in_process, placed, tiny

import simlab
from simlab import build_model
from simlab.experiment import run
from simlab.model.placement import start, tensors_of
from simlab.schemes.placement import PLACEMENTS
from simlab.weights.base import Weights

KEYS = ["sublayer", "kind", "stream"]
NUMBERS = ["mean_square", "norm", "token_cosine", "cosine_watched"]
SCALED = ["norm.stream_scale=[0.9,1.2]", "norm.start_scale=[0.3,-0.1]"]
RUN = ["depth=2", "width=48", "heads=4", "vocab_size=97", "device=cpu", "seeds=2"]
RUN += ["inputs.batch=2", "inputs.length=9", "engine=weightless"]


def by_definition(sublayer, kind, vectors, x):
    """The rows of one step: its vectors (B, T, D), and the stream x."""
    rows = []
    for i, y in enumerate(y.double() for y in vectors):
        pairs = torch.cosine_similarity(y[:, :, None], y[:, None], dim=-1)
        off = ~torch.eye(y.shape[1], dtype=torch.bool)
        cosine = torch.cosine_similarity(x.double(), y, dim=-1).mean().item()
        size = y.square().mean().item(), y.norm(dim=-1).mean().item()
        rows.append((sublayer, kind, i, *size, pairs[:, off].mean().item(), cosine))
    return rows


def assert_rows(frame, rows):
    expected = pd.DataFrame(rows, columns=[*KEYS, *NUMBERS])
    assert frame[KEYS].values.tolist() == expected[KEYS].values.tolist()
    np.testing.assert_allclose(frame[NUMBERS], expected[NUMBERS], **PARITY)


def test_parallel_by_a_loop():
    """(x, x₀) after attention, x after the MLP: how many vectors there are changes."""
    config = tiny("norm=parallel", "init.std=0.1")
    model = build_model(config)
    with torch.no_grad():
        x = model.embed(ids_of(config))
        rows = by_definition(0, "embedding", [x], x)
        for i, block in enumerate(model.blocks):
            read = block.attention.norm_in(x)
            y = x + block.attention.sublayer(read)
            rows += by_definition(2 * i + 1, "attention", [y, x], y)
            x, read = y, block.mlp.norm_in(x)
            x = x + block.mlp.sublayer(read)
            rows += by_definition(2 * i + 2, "mlp", [x], x)
    assert_rows(run(config).streams, rows)


def test_the_embedding_that_is_added_by_a_loop():
    """λx + μx₀ + F(N(x)) carries (x, x₀); its x₀ is the embedding in every row."""
    config = tiny("norm=scaled", *SCALED, "init.std=0.1")
    model = build_model(config)
    with torch.no_grad():
        x = first = model.embed(ids_of(config))
        rows = by_definition(0, "embedding", [x, first], x)
        for i, block in enumerate(model.blocks):
            for k, step in enumerate((block.attention, block.mlp)):
                skip = (0.9 + 0.15 * i) * x + (0.3 - 0.2 * i) * first
                x = skip + step.sublayer(step.norm_in(x))
                rows += by_definition(2 * i + 1 + k, ("attention", "mlp")[k], [x, first], x)
    frame = run(config).streams
    assert_rows(frame, rows)
    assert frame.loc[frame["stream"] == 1, "mean_square"].nunique() == 1


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement(placement):
    """Its states' vectors by hooks on the steps; no table where each state is the stream alone."""
    config = tiny(*placed(placement), "init.std=0.1")
    model, states = build_model(config), []
    steps = [(kind, step) for block in model.blocks for kind, step in block.steps()]
    for kind, step in steps:
        step.register_forward_hook(lambda m, a, out, kind=kind: states.append((kind, out)))
    with torch.no_grad():
        states.append(
            ("embedding", start(model.embed(ids_of(config)), config.shape, model.start_parts))
        )
        model(ids_of(config))
    frame = run(config).streams
    if not any(isinstance(state, tuple) for _, state in states):
        assert frame is None
        return
    rows, sublayer = [], -1
    for kind, state in states:
        sublayer += kind != "renorm"
        watched = model.blocks[0].placement.watch(state)
        rows += by_definition(sublayer, kind, tensors_of(state), watched)
    assert_rows(frame, rows)


@cache
def scaled_run(*more):
    return run(tiny("norm=scaled", *SCALED, "seeds=3", "init.std=0.1", *more))


@pytest.mark.parametrize("more", [(), ("engine=weightless",), ("gradients=true",)])
def test_beside_the_curve(more):
    """Of the stream that is reported, the numbers of curve.csv to the bit; gradients change nothing."""
    result = scaled_run(*more)
    x = result.streams[result.streams["stream"] == 0].reset_index(drop=True)
    shared = ["curve", "seed", "sublayer", "block", "kind", *NUMBERS[:3]]
    pd.testing.assert_frame_equal(x[shared], result.curve[shared], check_exact=True)
    np.testing.assert_allclose(x["cosine_watched"], 1, rtol=1e-12)
    if "gradients=true" in more:
        pd.testing.assert_frame_equal(result.streams, scaled_run().streams, check_exact=True)


def test_in_batches(monkeypatch):
    whole = scaled_run("inputs.batch=5").streams
    monkeypatch.setattr(Weights, "tokens_at_once", 2 * 11)
    parts = run(tiny("norm=scaled", *SCALED, "seeds=3", "init.std=0.1", "inputs.batch=5")).streams
    np.testing.assert_allclose(parts[NUMBERS], whole[NUMBERS], rtol=1e-6)


def test_a_curve_that_overflows_ends_here_too():
    result = run(tiny("norm=scaled", "norm.stream_scale=300", "norm.start_scale=1", "dtype=float16",
                      "init.std=0.5"))  # fmt: skip
    assert result.summary["overflow"]
    last = result.curve["sublayer"].max()
    assert last < 6
    assert result.streams["sublayer"].max() == last
    assert len(result.streams) == 2 * len(result.curve)


def test_a_probe_of_simlabs_own_model():
    config = tiny("norm=scaled", *SCALED, "init.std=0.1")
    measured = run(config).streams
    with torch.no_grad():
        probed = simlab.probe(build_model(config), ids_of(config))
    names = [*KEYS, "block", *NUMBERS]
    pd.testing.assert_frame_equal(probed.streams[names], measured[names])
    assert simlab.probe(build_model(tiny()), ids_of(tiny())).streams is None


def test_files_of_runs_and_sweeps(tmp_path):
    """The same bytes from a run, a sweep whose jobs share work, and a sweep of kept results."""
    single = tmp_path / "single"
    done = in_process(*RUN, "norm=parallel", f"hydra.run.dir={single}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    jobs, kept = ["-m", *RUN, "norm=parallel", "depth=2,3"], f"results={tmp_path / 'kept'}"
    for name in ("fresh", "again"):
        done = in_process(*jobs, kept, f"hydra.sweep.dir={tmp_path / name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        sweep = simlab.load_sweep(tmp_path / name)
        assert set(sweep.streams["depth"]) == {2, 3}
        number = int(sweep.streams.loc[sweep.streams["depth"] == 2, "job"].iloc[0])
        written = (sweep.folders[number] / "streams.csv").read_bytes()
        assert written == (single / "streams.csv").read_bytes()
        pd.testing.assert_frame_equal(sweep.job(number).streams, simlab.load_run(single).streams)
    tables = [(tmp_path / name / "streams.parquet").read_bytes() for name in ("fresh", "again")]
    assert tables[0] == tables[1]
    # A run without several vectors leaves none of an earlier run's.
    done = in_process(*RUN, "norm=pre", f"hydra.run.dir={single}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (single / "streams.csv").exists()


def test_in_python(tmp_path):
    result = simlab.measure(
        None, norm="parallel", depth=2, width=48, heads=4, vocab_size=97, seeds=1
    )
    loaded = simlab.load_run(result.save(tmp_path / "saved"))
    pd.testing.assert_frame_equal(loaded.streams, result.streams)
    assert simlab.measure(None, depth=1, width=48, heads=4, vocab_size=97, seeds=1).streams is None
