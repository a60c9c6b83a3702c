"""``simlab.probe(…, random=8)``: the model beside its random inits, as a run's result."""

import copy

import pandas as pd
import pytest
import torch
import transformers
from conftest import ids_of, tiny
from probed import IDS, Own, refused, theirs
from test_probe_gradients import assert_unchanged, state

import simlab
from simlab import build_model, probe
from simlab.measurement.model_probe import ModelProbe

GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 3, "vocab_size": 61, "n_positions": 16}


def gpt2():
    torch.manual_seed(5)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, initializer_range=0.1))


def qwen3():
    return theirs("Qwen3", head_dim=8, num_hidden_layers=3)


@pytest.mark.parametrize("make", [gpt2, qwen3])
def test_random_inits_of_a_family_are_its_own(make):
    """As the class draws a new model after torch.manual_seed; the model itself keeps all it had."""
    model = make()
    before = state(model)
    result = probe(model, IDS, gradients=True, random=2)
    assert_unchanged(model, before)
    rows = result.rows()
    assert list(rows["curve"].unique()) == ["model", "random"]
    alone = probe(model, IDS, gradients=True).rows()
    own = rows[rows["curve"] == "model"]
    pd.testing.assert_frame_equal(own[alone.columns], alone, check_exact=True)
    for seed in range(2):
        torch.manual_seed(seed)
        by_hand = type(model)(model.config)
        expected = probe(by_hand, IDS, curve="random", seed=seed, gradients=True).rows()
        drawn = rows[(rows["curve"] == "random") & (rows["seed"] == seed)].reset_index(drop=True)
        columns = [c for c in alone.columns if not c.startswith("law_")]  # of all seeds together
        pd.testing.assert_frame_equal(drawn[columns], expected[columns], check_exact=True)
    assert result.summary["loss"].keys() == {"model", "random"}


@pytest.mark.parametrize("wrapped", [False, True])
def test_dtype_is_the_models(wrapped):
    """Of a compiled model, too, of which compiling each layer gives other names to its parameters."""
    model = gpt2().to(torch.bfloat16)
    if wrapped:
        model.transformer.h[1] = torch.compile(model.transformer.h[1], backend="eager")
        model = torch.compile(model, backend="eager")
    rows = probe(model, IDS, random=1)
    assert rows.summary["dtype"] == "bfloat16"
    drawn = rows.curves[rows.curves["curve"] == "random"].reset_index(drop=True)
    config = gpt2().config
    torch.manual_seed(0)
    by_hand = transformers.GPT2LMHeadModel(config).to(torch.bfloat16)
    expected = probe(by_hand, IDS).rows()
    pd.testing.assert_series_equal(drawn["mean_square"], expected["mean_square"], check_exact=True)


def test_a_factory_of_any_module(monkeypatch):
    """One random init in memory at a time; the user's generator stays where it was."""
    made, alive = [], []

    def factory():
        import weakref

        alive.append(sum(ref() is not None for ref in made))
        new = Own()
        made.append(weakref.ref(new))
        return new

    model = Own()
    before = state(model)
    result = probe(model, IDS, random=3, factory=factory)
    assert_unchanged(model, before)
    assert alive == [0, 0, 0]
    for seed in range(3):
        torch.manual_seed(seed)
        expected = probe(Own(), IDS).rows()["mean_square"]
        drawn = result.curves[
            (result.curves["curve"] == "random") & (result.curves["seed"] == seed)
        ]
        assert drawn["mean_square"].tolist() == expected.tolist()


@pytest.fixture(scope="module")
def trained():
    """simlab's own model whose blocks are scaled, beside eight inits of it."""
    config = tiny("depth=3", "inputs.batch=3", "inputs.length=11")
    model = build_model(config)
    with torch.no_grad():
        for p in model.blocks.parameters():
            p.mul_(1.5 if p.ndim > 1 else 1.0)
        model.embedding.weight.mul_(3.0)

    def factory():
        new = build_model(config)
        for p in new.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.02)
        return new

    return probe(model, ids_of(config), random=8, factory=factory, gradients=True)


def test_the_result_is_a_runs(trained, tmp_path):
    """Verdict, departure, λ's, figure, page, files, comparison; what is read again is the same."""
    assert isinstance(trained, simlab.Result)
    assert trained.headline.startswith("The mean square of this model's residual stream ends ")
    assert "outside their band for good from the embedding on" in trained.headline
    assert trained.verdict.splitlines()[0].startswith("Model: ")
    assert "The model leaves the random inits' band at the embedding" in trained.verdict
    assert trained.summary["lambda"]["model"]["lambda_token"]["value"] is not None
    assert (trained.curves.groupby("curve").size() == pd.Series({"model": 7, "random": 56})).all()
    assert trained.command == (
        "simlab.probe(model, batch, gradients=True, random=8, factory=factory)"
    )
    folder = trained.save(tmp_path / "probed")
    again = simlab.load_run(folder)
    assert repr(again) == repr(trained)  # the model's class, as of a probe
    assert (again.headline, again.verdict) == (trained.headline, trained.verdict)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "curve.csv",
        "summary.json",
        "report.html",
        *(f"{n}.png" for n in ("growth", "lambda", "inside")),
    }
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert trained.command in page
    assert trained.layout in page
    assert "<img" in trained._repr_html_()
    assert "this model's" in repr(trained)
    assert set(trained.table()) == {"after", "model", "random", "random ± seeds"}
    both = simlab.compare(trained, again, labels=["a", "b"])
    assert both.table["mean_square"].notna().all()


def test_an_init_stays_within_its_band(trained):
    """The negative control: one more init of the same law isn't outside, as a rule."""
    config = gpt2().config
    torch.manual_seed(1234)
    fresh = transformers.GPT2LMHeadModel(config)
    result = probe(fresh, IDS, random=8)
    outside = result.curves.loc[result.curves["curve"] == "model", "outside"]
    assert outside.mean() < 0.5
    assert trained.curves.loc[trained.curves["curve"] == "model", "outside"].eq(1).all()


def test_a_random_model_is_told_as_one():
    result = probe(gpt2(), IDS, curve="random")
    assert result.headline.startswith("At init, the residual stream's mean square ")


def test_a_with_block_has_a_result():
    model = gpt2()
    with probe(model, curve="gpt2", gradients=True) as result:
        assert "no forward call yet" in repr(result)
        (model(input_ids=IDS, labels=IDS).loss * 2).backward()
    assert "The gradient's rms" in result.verdict
    assert "loss" not in result.summary  # the user's own isn't known
    assert result.rows()["curve"].unique().tolist() == ["gpt2"]
    assert result.curves["curve"].unique().tolist() == ["model"]
    count = len(result.rows())
    with result:
        model(input_ids=IDS[:1], labels=IDS[:1]).loss.backward()
    assert result.summary["tokens"] == [4, 11]
    assert len(result.rows()) == count


class OneStep(torch.nn.Module):
    """A block whose residual add nobody sees, so that the stream after the block is measured."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(32, 32)

    def forward(self, x):
        return 0.5 * x + 0.25 * self.mix(x).tanh()


def test_blocks_of_one_step():
    """No sentence takes a block for two sublayers, and a whole curve doesn't end early."""

    def factory():
        model = Own()
        model.h = torch.nn.ModuleList(OneStep() for _ in range(4))
        return model

    result = probe(factory(), IDS, random=8, factory=factory)
    assert set(result.curves["kind"]) == {"embedding", "block"}
    assert "per layer" not in result.verdict
    assert "ends at sublayer" not in result.verdict
    assert "at sublayer 4," not in result.headline
    ax = result.figure().axes[0]
    assert ax.get_xlabel() == "sublayer (0: the embedding)"


class Scaled(Own):
    """The residual stream of each block is multiplied by a parameter, 1 at init."""

    def __init__(self):
        super().__init__()
        for block in self.h:
            block.scale = torch.nn.Parameter(torch.ones(()))
            block.forward = lambda x, of=block: (of.scale - 1) * x + type(of).forward(of, x)


def test_inits_have_the_models_steps():
    """Where training has left no sum to find, inits beside it are measured by blocks, too."""
    model = Scaled()
    assert set(probe(model, IDS).curves["kind"]) == {"embedding", "attention", "mlp"}
    model.h[1].scale.data.fill_(1.2)
    result = probe(model, IDS, random=2, factory=Scaled)
    kinds = result.curves.groupby(["curve", "seed"])["kind"].agg(list)
    assert len(kinds) == 3
    assert all(of == ["embedding", *STEPS, "block", *STEPS] for of in kinds)


STEPS = ["attention", "mlp"]
WRONG = {
    "no factory": ({"random": 2}, "how a Own is drawn: give factory"),
    "of nothing": ({"factory": Own}, "say how many"),
    "no number": ({"random": True}, "must be a number"),
    "negative": ({"random": -1, "factory": Own}, "must be a number"),
    "a name that is taken": ({"random": 2, "factory": Own, "curve": "random"}, "another curve="),
    "no function": ({"random": 2, "factory": 3}, "factory is a int: must be a function"),
    "no name": ({"curve": None}, "curve=None: must be of type str"),
    "no seed": ({"seed": "x"}, "seed='x': must be of type int"),
    "no layout": ({"layout": "h"}, "layout is a str: must be a simlab.Layout"),
    "no module": ({"random": 2, "factory": dict}, "must give an nn.Module"),
    "other steps": (
        {"random": 2, "factory": lambda: shallow()},
        "other steps (5) than the model (7)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_random_inits_are_refused(case):
    options, words = WRONG[case]
    assert words in refused(Own(), **options)


def shallow():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | {"n_layer": 2}))


def test_the_models_own_weights_are_no_random_init():
    model = Own()
    twin = Own()
    for factory, words in (
        (lambda: model, "own parameters"),
        (lambda: copy.deepcopy(model), "seed 0 is the same as the model itself"),
        (lambda: copy.deepcopy(twin), "seed 1 is the same as seed 0"),
    ):
        assert words in refused(model, random=2, factory=factory)
    with pytest.raises(simlab.ConfigError, match="give the batch"):
        probe(model, random=2, factory=Own)
    with (
        pytest.raises(simlab.ConfigError, match="pass a batch alone"),
        probe(model, IDS, random=1, factory=Own),
    ):
        pass


def test_progress_counts_every_block():
    model, seen = Own(), []
    measuring = ModelProbe(model)
    measuring.on_block = lambda: seen.append(1)
    measuring.measure(IDS)
    assert len(seen) == 3
