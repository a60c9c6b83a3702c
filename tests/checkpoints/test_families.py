"""Model types that transformers computes: streamed block by block as whole, drawn as it draws them."""

import json
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from conftest import PARITY, STANDARD_ERRORS, assert_parity, edit_json, in_process, write_olmo
from family_table import COMMON, FAMILIES, new_family, write_family
from safetensors.torch import load_file, save_file

from simlab import ConfigError
from simlab.checkpoints.checkpoint import Checkpoint
from simlab.checkpoints.families import sources
from simlab.checkpoints.families.checkpoint import FamilyCheckpoint, build
from simlab.checkpoints.families.config import is_family, read_family_config
from simlab.checkpoints.families.skeleton import auto_class
from simlab.checkpoints.formats.hugging_face_keys import MODEL_TYPES, TEXT_PARTS
from simlab.config import SourceConfig
from simlab.experiment.build import open_checkpoint
from simlab.experiment.families import streamed
from simlab.measurement.engine import measure_curves
from simlab.measurement.statistics import GRADIENT_STATISTICS, STATISTICS
from simlab.weights.base import Weights

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, FLOAT = torch.device("cpu"), torch.float32
IDS = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(0))
# What transformers calls hidden states isn't its blocks' outputs.
OTHER_STATES = {"mamba"}
FORWARD_ONLY = {"gemma3n_text", "gemma4_text"}  # every block gets something of the embedding
MULTIMODAL = {kind for kind, config in FAMILIES.items() if "text_config" in config}
# Its _init_weights leaves parameters to constructors.
UNDRAWN = {"apertus"}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


# Of some, what the stream after attention is given to.
MIDDLE = {
    "biogpt": "final_layer_norm",
    "bloom": "post_attention_layernorm",  # the add is inside of attention
    "exaone4": "mlp",
    "gemma2": "pre_feedforward_layernorm",
    "gpt2": "ln_2",
    "granite": "post_attention_layernorm",  # with a multiplier
    "opt": "final_layer_norm",  # flattened: (B·T, D)
}


def outputs(blocks, call):
    """What each of some modules gave first in a call, and what the call gave."""
    states, hooks = [], []

    def keep(_, arguments, out):
        states.append((out[0] if isinstance(out, tuple) else out).detach().clone())

    for block in blocks:
        hooks.append(block.register_forward_hook(keep))
    result = call()
    for hook in hooks:
        hook.remove()
    return states, result


def one_graph(whole, blocks, middle):
    """What blocks and model give, and each stream, with its gradient, from one autograd graph."""
    streams = []

    def keep(_, args, kwargs, out=None):
        x = args[0] if args else kwargs["hidden_states"]
        streams.append(x if out is None else out[0] if isinstance(out, tuple) else out)
        streams[-1].retain_grad()

    before = [at for b in blocks for at in (b, *([b.get_submodule(middle)] if middle else []))]
    hooks = [at.register_forward_pre_hook(keep, with_kwargs=True) for at in before]
    hooks.append(blocks[-1].register_forward_hook(keep, with_kwargs=True))
    call = {"labels": IDS, "output_hidden_states": True, "use_cache": False}
    states, out = outputs(blocks, lambda: whole(IDS, **call))
    out.loss.backward()
    for hook in hooks:
        hook.remove()
    return states, out, streams


@dataclass(frozen=True)
class Family:
    """A model type's tiny model, the weights that it had at its init, and its checkpoint."""

    kind: str
    whole: torch.nn.Module
    init: dict[str, torch.Tensor]
    checkpoint: FamilyCheckpoint


@pytest.fixture(scope="module")
def family(request, tmp_path_factory):
    """Made once for the tests of a model type, which pytest runs one after another."""
    folder = tmp_path_factory.mktemp(request.param)
    whole = new_family(request.param)
    init = weights_of(whole)
    write_family(folder, request.param, whole)
    checkpoint = FamilyCheckpoint(str(folder))
    yield Family(request.param, whole, init, checkpoint)
    checkpoint.release()
    shutil.rmtree(folder)


def weights_of(model):
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter.detach().clone() for name, parameter in named}


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_streamed_is_whole(family):
    kind, whole, checkpoint = family.kind, family.whole, family.checkpoint
    assert is_family(checkpoint.folder) == (kind not in {*MODEL_TYPES, *TEXT_PARTS})
    assert ("outside of the decoder" in checkpoint.unread) == (kind in MULTIMODAL)
    assert kind in MULTIMODAL or not checkpoint.unread
    skeleton = checkpoint.skeleton
    most, empty = checkpoint.model.block_parameters, skeleton.empty

    def one_unit(path):
        held = [name for name in empty if not skeleton.model.get_parameter(name).is_meta]
        inside = [name for name in held if any(name.startswith(f"{p}.") for p in skeleton.units)]
        assert sum(empty[name].numel() for name in inside if empty[name].is_meta) <= most

    def forward():
        with torch.no_grad(), skeleton.filled(checkpoint.stored(skeleton), one_unit) as decoder:
            return decoder(input_ids=IDS, use_cache=False)[0]

    states, last = outputs([skeleton.units[path] for path in skeleton.blocks()], forward)
    blocks = [whole.get_submodule(path) for path in skeleton.blocks()]
    theirs, out, streams = one_graph(whole, blocks, MIDDLE.get(kind))
    assert len(states) == len(theirs) == 3
    for block, (ours, other) in enumerate(zip(states, theirs, strict=True)):
        assert_parity(ours, other, f"{kind}, block {block}")
    if kind not in OTHER_STATES:  # the last one is after the final norm
        last = last if last.shape == out.hidden_states[-1].shape else states[-1]  # Gemma 3n's isn't
        for ours, other in zip([*states[:-1], last], out.hidden_states[1:], strict=True):
            assert_parity(ours, other, kind)
    assert all(skeleton.model.get_parameter(n) is one for n, one in empty.items())  # dropped again
    if kind in FORWARD_ONLY:
        with pytest.raises(ConfigError, match=r"layers\.0 gets, beside the stream, more that"):
            streamed(skeleton, checkpoint.stored(skeleton), IDS, gradients=True)
    back = kind not in FORWARD_ONLY
    curve = streamed(skeleton, checkpoint.stored(skeleton), IDS, gradients=back)
    rows = curve.rows
    ends = {row.block: row.values[list(STATISTICS).index("mean_square")] for row in rows}
    for block, state in enumerate(theirs):  # a block's last row is its output
        assert ends[block].item() == pytest.approx(state.double().square().mean().item(), rel=1e-5)
    if not back:
        return
    assert curve.loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
    if kind not in MIDDLE:
        rows = list({row.block: row for row in rows}.values())
    assert len(rows) == len(streams)
    for row, stream in zip(rows, streams, strict=True):
        g = stream.grad.double().flatten(0, -2)
        values = dict(zip(GRADIENT_STATISTICS, row.gradient.tolist(), strict=True))
        rms, mean = g.square().mean().sqrt().item(), g.mean(0).norm().item()
        assert values["gradient_rms"] == pytest.approx(rms, rel=1e-5)
        assert values["gradient_mean_vector_norm"] == pytest.approx(mean, rel=1e-5)


def test_groups_of_sequences(gemma, monkeypatch):
    """One sequence at a time, stored and drawn: the same rows, loss and gradients."""
    checkpoint = FamilyCheckpoint(str(gemma))
    skeleton = checkpoint.skeleton
    monkeypatch.setattr(sources, "TABLE_BYTES", 32 * 4 * 10)  # ten columns of the head at a time
    for source in (checkpoint.stored(skeleton), checkpoint.drawn(skeleton, 3)):
        monkeypatch.setattr(Weights, "tokens_at_once", 2048)
        whole = streamed(skeleton, source, IDS, gradients=True)
        monkeypatch.setattr(Weights, "tokens_at_once", 11)
        passed = []
        alone = streamed(skeleton, source, IDS, passed.append, gradients=True)
        assert passed.count("model.layers.1") == 4  # forward and back, of two sequences
        assert alone.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
        for a, b in zip(alone.rows, whole.rows, strict=True):
            torch.testing.assert_close(a.values, b.values, **PARITY, equal_nan=True)
            torch.testing.assert_close(a.gradient, b.gradient, **PARITY)


@pytest.mark.parametrize("kind", ["gpt2", "hunyuan_v1_moe"])  # the latter's routers stay in float32
def test_half_precision(tmp_path, kind):
    write_family(tmp_path, kind)
    half = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **half).eval()
    checkpoint = FamilyCheckpoint(str(tmp_path))
    skeleton = checkpoint.skeleton_for(torch.bfloat16, CPU)
    with torch.no_grad(), skeleton.filled(checkpoint.stored(skeleton)) as decoder:
        ours = decoder(input_ids=IDS, use_cache=False)[0]
        theirs = whole.get_submodule(skeleton.path)(input_ids=IDS, use_cache=False)[0]
    assert torch.equal(ours, theirs)


def test_pickled_weights(tmp_path):
    """As ``torch.save`` writes a state dict, where a tied head and the embedding are one storage."""
    whole = write_family(tmp_path, "bloom")
    (tmp_path / "model.safetensors").unlink()
    torch.save(whole.state_dict(), tmp_path / "pytorch_model.bin")
    checkpoint = FamilyCheckpoint(str(tmp_path))
    skeleton = checkpoint.skeleton
    with torch.no_grad(), skeleton.filled(checkpoint.stored(skeleton)) as decoder:
        ours = decoder(input_ids=IDS, use_cache=False)[0]
        assert torch.equal(ours, whole.transformer(input_ids=IDS, use_cache=False)[0])


def test_beyond_the_positions(tmp_path):
    write_family(tmp_path, "gpt2")
    checkpoint = FamilyCheckpoint(str(tmp_path))
    skeleton, ids = checkpoint.skeleton, torch.zeros(1, 70, dtype=torch.long)
    for source in (checkpoint.stored(skeleton), checkpoint.drawn(skeleton, 0)):
        with pytest.raises(
            ConfigError, match=r"wpe\.weight has 64 rows, and row 69 .*inputs\.length"
        ):
            streamed(skeleton, source, ids)


def family_skeleton(folder, kind, **changes):
    config = transformers.CONFIG_MAPPING[kind](**FAMILIES[kind] | changes)
    config.save_pretrained(folder)
    path = folder / "config.json"
    return build(read_family_config(path, 1000)[0], path, FLOAT, CPU), config


def drawn_weights(skeleton, seed=3):
    """Every weight of the decoder, as a random init draws it, by name."""
    source, drawn = sources.DrawnWeights(skeleton, seed), {}
    for path in ("", *skeleton.units):
        source.fill(path)
        drawn |= {n: skeleton.model.get_parameter(n).data.clone() for n in skeleton.names(path)}
        skeleton.empty_again(skeleton.names(path))
    for name, module in skeleton.tables.items():
        drawn[name] = source.rows(name, torch.arange(module.num_embeddings))
    head = source.head(0, skeleton.model.get_submodule(skeleton.head).out_features)
    return drawn | {f"{skeleton.head}.{name}": rows for name, rows in head.items()}


def unlike(drawn, init):
    """The names whose mean or spread differs: of standard errors of two Gaussian samples."""
    names = []
    for name, ours in drawn.items():
        a, b = ours.double().flatten(), init[name].double().flatten()
        spread = max(a.std(correction=0), b.std(correction=0))
        error = STANDARD_ERRORS * spread * (2 / len(a)) ** 0.5
        off = max((a.mean() - b.mean()).abs(), (a.std(correction=0) - b.std(correction=0)).abs())
        if off > error + 1e-6:  # constants are equal, to rounding
            names.append(name)
    return names


@pytest.mark.parametrize(
    "family", [kind for kind in FAMILIES if kind not in UNDRAWN], indirect=True
)
def test_random_init_is_the_familys(family):
    skeleton = family.checkpoint.skeleton
    drawn = drawn_weights(skeleton)
    parts = tuple(f"{path}." for path in (skeleton.path, skeleton.head))
    names = {name for name in family.init if name.startswith(parts)}
    assert drawn.keys() == names
    assert family.kind in MULTIMODAL or names == skeleton.empty.keys()
    assert not unlike(drawn, family.init)


def test_random_init_of_another_range_is_seen(tmp_path):
    skeleton, _ = family_skeleton(tmp_path, "gpt2", initializer_range=0.03)
    _, config = family_skeleton(tmp_path, "gpt2")
    whole = auto_class(config).from_config(config)
    assert "transformer.h.1.mlp.c_proj.weight" in unlike(drawn_weights(skeleton), weights_of(whole))


def test_random_init_that_is_left_out(tmp_path):
    with pytest.raises(ConfigError, match=r"apertus has no random init of .*alpha_p.*seeds=0"):
        drawn_weights(family_skeleton(tmp_path, "apertus")[0])


def test_draws_are_by_seed_and_block(tmp_path, monkeypatch):
    short, _ = family_skeleton(tmp_path, "vaultgemma")
    deep, _ = family_skeleton(tmp_path, "vaultgemma", num_hidden_layers=5)
    one, again, other = drawn_weights(short), drawn_weights(deep), drawn_weights(short, seed=4)
    assert all(torch.equal(weight, again[name]) for name, weight in one.items())
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert not torch.equal(one[name.format(0)], other[name.format(0)])
    assert not torch.equal(one[name.format(0)], one[name.format(1)])
    monkeypatch.setattr(sources, "TABLE_BYTES", 32 * 4 * 10)  # ten rows share a seed
    source, table = sources.DrawnWeights(short, 3), "model.embed_tokens.weight"
    ids = torch.tensor([[5, 96, 5], [33, 0, 12]])
    rows = source.rows(table, ids)
    assert torch.equal(rows, source.rows(table, torch.arange(97))[ids])
    assert len(rows.flatten(0, 1).unique(dim=0)) == 5


def test_streamed_is_simlabs_own(tmp_path):
    """Of a Llama, which simlab reads itself: every statistic of every row."""
    write_olmo(tmp_path, "Llama")
    ids = IDS % 61
    (ours,) = measure_curves(Checkpoint(str(tmp_path)), ids, CPU, FLOAT)
    checkpoint = FamilyCheckpoint(str(tmp_path), statistics=True)
    theirs = streamed(checkpoint.skeleton, checkpoint.stored(checkpoint.skeleton), ids)
    assert [row.kind for row in ours.rows] == [row.kind for row in theirs.rows]
    values = [torch.stack([row.values for row in curve.rows]) for curve in (ours, theirs)]
    for name, a, b in zip(STATISTICS, *(v.double().T for v in values), strict=True):
        if name != "attention_max_logit":  # which attention's output doesn't show
            torch.testing.assert_close(
                a, b, **PARITY, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )


BEYOND = {  # what simlab's own model lacks of its own model types
    "llama": ({"attention_bias": True}, "attention_bias=True"),
    "qwen3": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "olmo2": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "rope_parameters.rope_type='linear'",
    ),
    "gemma3_text": (
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
            }
        },
        "rope_parameters.sliding_attention.rope_type='linear'",
    ),
}


@pytest.mark.parametrize("kind", BEYOND)
def test_what_the_own_model_lacks(tmp_path, kind, monkeypatch):
    changes, said = BEYOND[kind]
    for name, more in (("own", {}), ("beyond", changes)):
        monkeypatch.setitem(FAMILIES, kind, COMMON | more)
        whole = write_family(tmp_path / name, kind)
    source = SourceConfig("checkpoint", path=str(tmp_path / "own"))
    assert isinstance(open_checkpoint(source), Checkpoint)
    checkpoint = open_checkpoint(replace(source, path=str(tmp_path / "beyond")))
    why = f"transformers computes it, since simlab's own model doesn't have {said}: "
    assert checkpoint.unread.startswith(why)
    last = streamed(checkpoint.skeleton, checkpoint.stored(checkpoint.skeleton), IDS).rows[-1]
    blocks = [whole.get_submodule(path) for path in checkpoint.skeleton.blocks()]
    state = outputs(blocks, lambda: whole(IDS))[0][-1]
    mean_square = last.values[list(STATISTICS).index("mean_square")]
    assert mean_square.item() == pytest.approx(state.double().square().mean().item(), rel=1e-5)
    edit_json(tmp_path / "beyond/config.json", frobnicate=3, **dict.fromkeys(changes))
    with pytest.raises(ConfigError, match="frobnicate=3: not supported"):
        open_checkpoint(replace(source, path=str(tmp_path / "beyond")))


def test_list_of_families():
    page = (Path(__file__).parents[2] / "docs/families.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\w+) \| (yes|–) \|", page, flags=re.M)
    native = {kind for kind, word in listed if word == "yes"}
    assert {kind for kind, _ in listed} == {*FAMILIES} | native
    assert native <= {*MODEL_TYPES, *TEXT_PARTS}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vaultgemma")
    write_family(folder, "vaultgemma")
    return folder


def test_run(gemma, tmp_path, no_figures):
    given = ["source=checkpoint", f"source.path={gemma}", "seeds=2", "hydra.run.dir=out"]
    given += ["gradients=true"]
    done = in_process(*given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "computed by transformers' vaultgemma" in done.stdout
    assert "Theory predicts no curve here: theory has no formula for transformers' vaultgemma" in (
        " ".join(done.stdout.split())
    )
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    name = summary["config"]["model"]["name"]
    twice = "" if name == "vaultgemma" else ", vaultgemma"
    assert summary["title"].startswith(f"{name}: depth ")
    assert summary["title"].endswith(f"{twice}, random init as transformers draws it")
    assert summary["title"].count("vaultgemma") == name.count("vaultgemma") + bool(twice)
    assert summary["engines"] == {"checkpoint": "dense", "random": "dense"}
    assert summary["config"]["model"]["transformers"] == transformers.__version__
    model = transformers.AutoModelForCausalLM.from_pretrained(gemma)
    assert summary["parameters"] == model.num_parameters()
    curve = (tmp_path / "out/curve.csv").read_text().splitlines()
    assert len(curve) == 1 + 3 * 7
    weights = (tmp_path / "out/weights.csv").read_text().splitlines()
    assert len(weights) == 1 + len(load_file(gemma / "model.safetensors"))


def test_inits_have_the_checkpoints_steps(tmp_path, no_figures):
    """A Doge's residual scales are 1 at init: its steps are found then, and not when it's trained."""
    write_family(tmp_path / "model", "doge")
    run = ["source=checkpoint", f"source.path={tmp_path / 'model'}", "seeds=2", "hydra.run.dir=out"]
    done = in_process(*run, "gradients=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    curve = pd.read_csv(tmp_path / "out/curve.csv")
    kinds = curve.groupby(["curve", "seed"])["kind"].agg(list)
    assert len(kinds) == 3
    assert all(of == ["embedding", "block", "block", "block"] for of in kinds)


WRONG = [
    ("engine=weightless", "engine=weightless: model_type=vaultgemma is computed"),
    ("engine=theory", "engine=theory: model_type=vaultgemma is computed"),
    ("init=mitchell", "init=mitchell: model_type=vaultgemma is computed"),
    ("init.std=0.1", "init.std=0.1: model_type=vaultgemma is computed"),
]


@pytest.mark.parametrize(("override", "line"), WRONG)
def test_what_a_run_cant_do(gemma, tmp_path, override, line):
    given = ["source=checkpoint", f"source.path={gemma}", override]
    done = in_process(*given, cwd=tmp_path)
    assert done.returncode == 2
    (printed,) = done.stderr.splitlines()
    assert line in printed


def changed(folder, tensors=(), drop=(), **config):
    """A VaultGemma's folder with other tensors or keys."""
    write_family(folder, "vaultgemma")
    held = load_file(folder / "model.safetensors") | dict(tensors)
    save_file({k: v for k, v in held.items() if k not in drop}, folder / "model.safetensors")
    edit_json(folder / "config.json", **config)


NORM = "model.layers.1.input_layernorm.weight"
BAD = {
    "missing": ({"drop": [NORM]}, [f"tensor {NORM} is missing"]),
    "extra": (
        {"tensors": {"model.layers.1.self_attn.q_proj.bias": torch.ones(32)}},
        ["model.layers.1.self_attn.q_proj.bias is not part of transformers' vaultgemma"],
    ),
    "shape": ({"tensors": {NORM: torch.ones(31)}}, [NORM, "(31,)", "implies (32,)"]),
    "layers": ({"num_hidden_layers": 10**9}, ["'num_hidden_layers'=1000000000"]),
    "layer types": ({"num_hidden_layers": 2}, ["transformers refuses it", "layer_types"]),
    "fewer layers": (
        {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
        ["model.layers.2.", "is not part of transformers' vaultgemma"],
    ),
    "encoder": (
        {"model_type": "bert", "layer_types": None},
        ["model_type='bert': with is_decoder=false"],
    ),
    "no decoder": (
        {"model_type": "t5", "layer_types": None},
        ["model_type='t5': transformers has no"],
    ),
    "listed": ({"eos_token_id": [10**12]}, ["'eos_token_id'=1000000000000"]),
    "heads": ({"num_attention_heads": "four"}, ["transformers refuses it"]),
    "width": ({"hidden_size": 2**61}, ["config.json"]),
    "quantised": (
        {"quantization_config": {"quant_method": "fp8"}},
        ["quantization_config=", "are quantised"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(tmp_path, case):
    changes, parts = BAD[case]
    changed(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        FamilyCheckpoint(str(tmp_path))
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_what_isnt_used_is_said(tmp_path):
    more = {"vision.weight": torch.ones(2), "model.rotary_emb.inv_freq": torch.ones(4)}
    changed(tmp_path, tensors=more, frobnicate=3)
    unread = FamilyCheckpoint(str(tmp_path)).unread
    assert "not used: vision.weight, for which transformers' vaultgemma has no place" in unread
    assert "not used: frobnicate in config.json" in unread
    assert "inv_freq" not in unread


def test_weight_hash(gemma, tmp_path):
    """Of what was read as of what wasn't, in any dtype; another weight has another."""
    read = FamilyCheckpoint(str(gemma))
    streamed(read.skeleton, read.stored(read.skeleton), IDS)
    half = FamilyCheckpoint(str(gemma), statistics=True)
    skeleton = half.skeleton_for(torch.bfloat16, CPU)
    streamed(skeleton, half.stored(skeleton), IDS)
    unread = FamilyCheckpoint(str(gemma), statistics=True)
    assert read.identity() == half.identity() == unread.identity()
    assert half.table() == unread.table()
    weight = load_file(gemma / "model.safetensors")[NORM]
    changed(tmp_path, tensors={NORM: weight + 1})
    assert FamilyCheckpoint(str(tmp_path)).identity() != read.identity()


def test_code_of_a_repository(tmp_path):
    code = {"auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "theirs", **code}))
    with pytest.raises(ConfigError, match=r"auto_map=.* doesn't know model_type='theirs'"):
        is_family(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "theirs"}))
    assert not is_family(tmp_path)


def test_without_transformers(gemma, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = in_process("source=checkpoint", f"source.path={gemma}", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("pip install transformers")


@pytest.mark.parametrize("memory", [False, True])
def test_a_decoder_that_needs_all_weights_at_once(tmp_path, monkeypatch, memory):
    """Where transformers' code fails it is one line; a lack of memory goes on to its own line."""
    write_family(tmp_path / "model", "gemma")

    def failing(*_):
        if memory:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return torch.empty(1, device="meta").item()

    monkeypatch.setattr(transformers.models.gemma.modeling_gemma.GemmaMLP, "forward", failing)
    checkpoint = FamilyCheckpoint(str(tmp_path / "model"))
    said = "can't allocate memory" if memory else "transformers' Gemma.* can't be streamed: "
    with pytest.raises(RuntimeError if memory else ConfigError, match=said):
        streamed(checkpoint.skeleton, checkpoint.stored(checkpoint.skeleton), IDS)
