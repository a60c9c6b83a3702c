"""The config: presets, the frozen RunConfig, and one clear line for every mistake."""

import dataclasses
from itertools import cycle

import pytest
from conftest import tiny

import simlab
from simlab import config
from simlab.config import CONF_DIR, ConfigError
from simlab.config.choices import as_choices
from simlab.config.cli_errors import fail
from simlab.config.validate import compose, options
from simlab.model.mlp import MLPS
from simlab.model.transformer import parameter_count
from simlab.schemes.init import RULES
from simlab.schemes.placement import PLACEMENTS
from simlab.theory.size import parameters_on_paper

# Released parameter counts: the totals in the hub's model metadata.
RELEASED = {
    "olmo2_1b": 1_484_916_736,
    "olmo2_7b": 7_298_617_344,
    "olmo2_13b": 13_716_198_400,
    "olmo2_32b": 32_234_279_936,
    "olmo3_7b": 7_298_011_136,
    "olmo3_32b": 32_233_522_176,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "qwen3_32b": 32_762_123_264,
    "mistral_7b": 7_241_732_096,
    "phi4_14b": 14_659_507_200,
    "stablelm_3b": 2_795_443_200,
    "qwen2_5_72b": 72_706_203_648,
    "gpt2_xl": 1_557_611_200,
    "pythia_12b": 11_846_072_320,
    "gemma2_27b": 27_227_128_320,
    "nanochat_d12": 286_283_520,  # nanochat's own counts: tests/model/test_nanochat.py
    "nanochat_d20": 896_590_080,
    "gemma3_27b": 27_009_346_304,  # without image encoder and projector, 423,060,336
}


@pytest.mark.parametrize("preset", RELEASED)
def test_presets_have_the_released_parameter_counts(preset):
    model = compose([f"model={preset}"]).shape
    assert parameter_count(model) == parameters_on_paper(model) == RELEASED[preset]
    # The comment in the preset's file says the same.
    assert f"{RELEASED[preset]:,}" in (CONF_DIR / "model" / f"{preset}.yaml").read_text()


def test_olmo3_attention_pattern():
    model = compose(["model=olmo3_7b"]).shape
    windows = [model.window_of(layer) for layer in range(8)]
    assert windows == [4096, 4096, 4096, None, 4096, 4096, 4096, None]
    assert compose(["model=olmo3_7b", "depth=6"]).shape.window_of(5) is None  # the last is full
    gemma = compose(["model=gemma3_27b"]).shape  # of 62 blocks the last isn't
    assert [i for i in range(62) if gemma.window_of(i) is None] == [*range(5, 62, 6)]


def test_command_line_overrides_preset():
    model = compose(["model=olmo2_32b", "depth=3", "kv_heads=20"]).shape
    assert (model.depth, model.width, model.kv_heads) == (3, 5120, 20)
    model = compose(["depth=3", "model=olmo2_32b"]).shape
    assert model.depth == 3


def test_kv_heads_follow_heads():
    assert compose(["heads=8"]).shape.kv_heads == 8
    assert compose(["heads=8", "kv_heads=2"]).shape.kv_heads == 2
    assert compose(["model=olmo2_32b", "heads=16"]).shape.kv_heads == 8
    with pytest.raises(ConfigError, match=r"^kv_heads=8: must divide heads=20; .* is 10$"):
        compose(["model=olmo2_32b", "heads=20"])


def test_every_choice_composes():
    others = set(options("norm")) - {"from_checkpoint"} - set(PLACEMENTS)
    placements = {compose([f"norm={name}"]).shape.norm.placement for name in others}
    assert placements == {"scaled", "pre", "attn_res", "mhc", "deepseek_v4"}
    assert set(PLACEMENTS) <= set(options("norm"))
    assert set(options("init")) - {"from_checkpoint"} == set(RULES)
    assert tuple(MLPS) == config.MLP_NAMES
    assert len(PLACEMENTS) >= max(len(RULES), len(MLPS))  # each of the others comes at least once
    choices = zip(PLACEMENTS, cycle(RULES), cycle(MLPS), cycle(("random", "zipf")))
    for norm, init, mlp, inputs in choices:
        run = compose([f"norm={norm}", f"init={init}", f"model.mlp={mlp}", f"inputs={inputs}"])
        assert (run.shape.norm.placement, run.init.rule) == (norm, init)
        assert (run.shape.mlp, run.inputs.kind) == (mlp, inputs)


def test_seeds_count_or_list():
    assert compose(["seeds=3", "seed=5"]).seeds == (5, 6, 7)
    assert compose(["seeds=[4,2]"]).seeds == (4, 2)


def test_frozen_and_hashable():
    frozen = tiny()
    with pytest.raises(dataclasses.FrozenInstanceError):
        frozen.seed = 3
    assert hash(frozen) == hash(tiny())


# Each mistake, and what its one line must say: the key, the value, what is allowed or nearest.
MISTAKES = {
    "depth=-1": ["depth=-1", "at least 1"],
    "depth=abc": ["depth=abc", "integer"],
    "depth=1.5": ["depth=1.5", "integer"],
    "depth=true": ["depth=true", "integer"],
    "depth=null": ["depth=null", "integer"],
    "heads=7": ["heads=7", "width=48", "6"],
    "kv_heads=4": ["kv_heads=4", "heads=6", "3"],
    "width=30": ["head_dim=5", "even"],
    "init.std=nan": ["init.std=nan", "above 1e-12"],
    "init.std=0": ["init.std=0", "above 1e-12"],
    "init.truncate=-1": ["init.truncate=-1", "at least 0.5"],
    "norm.eps=inf": ["norm.eps=inf", "at least 0"],
    "norm.placement=swinrenorm": ["norm.placement=swinrenorm", "did you mean swin_renorm?"],
    "norm.type=batch": ["norm.type=batch", "rms, rms_plus_one, layer"],
    "+norm.every=3": ["norm.every=3", "norm=reordered has no such key"],
    "+init.sigma=3": ["init.sigma=3", "init=normal has no such key"],
    "+dpeth=3": ["dpeth=3", "did you mean depth?"],
    "+model.qknorm=full": ["model.qknorm=full", "did you mean qk_norm?"],
    "model.qk_norm=half": ["model.qk_norm=half", "none, full, per_head"],
    "model.full_every=2": ["model.full_every=2", "window"],
    "model.tied=maybe": ["model.tied=maybe", "true, false"],
    "model.mlp=swigl": ["model.mlp=swigl", "did you mean swiglu?"],
    "model.mlp=relu": ["model.mlp=relu", "swiglu, geglu, gelu"],
    "model.rope_local_theta=9": ["model.rope_local_theta=9", "needs a model.window"],
    "model.rope_linear=0.5": ["model.rope_linear=0.5", "at least 1"],
    "model.embedding_scale=0": ["model.embedding_scale=0", "above 0"],
    "model.attention_softcap=0": ["model.attention_softcap=0", "above 0", "null"],
    "model.query_pre_attn_scalar=-1": ["model.query_pre_attn_scalar=-1", "above 0"],
    "model.rotary=0.4": ["rotary=0.4", "3 of 8 channels: must be even"],
    "model.bias=1": ["model.bias=1", "true, false"],
    "dtype=float23": ["dtype=float23", "did you mean float32?"],
    "engine=sparse": ["engine=sparse", "auto, dense, weightless"],
    "engine=weigthless": ["engine=weigthless", "did you mean weightless?"],
    "gradients=maybe": ["gradients=maybe", "true, false"],
    "device=gpu": ["device=gpu", "cuda"],
    "seeds=0": ["seeds=0", "at least 1"],
    "seeds=[1,1]": ["seeds=[1, 1]", "different"],
    "seeds=[a]": ["seeds=['a']", "list"],
    "seed=-1": ["seed=-1", "at least 0"],
    "depth=99999999999999999999": ["depth=9999", "at most 1000000"],
    "seeds=100000000000": ["seeds=100000000000", "at most"],
    "inputs.length=99999999": ["inputs.batch=2 inputs.length=99999999", "at most 100000000 tokens"],
    "norm=from_checkpoint": ["norm=from_checkpoint", "only with source=checkpoint"],
    "init=from_checkpoint": ["init=from_checkpoint", "only with source=checkpoint"],
    "model=from_checkpoint": ["model=from_checkpoint", "only with source=checkpoint"],
    "model.rope_theta=1": ["model.rope_theta=1", "above 1"],
    "inputs.batch=0": ["inputs.batch=0", "at least 1"],
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_get_one_line(override):
    with pytest.raises(ConfigError) as caught:
        tiny(override)
    message = str(caught.value)
    assert "\n" not in message
    for part in MISTAKES[override]:
        assert part in message, message


# What Hydra itself refuses, in words of its own; each is to be a ConfigError of one line.
UNKNOWN = {
    "dpeth=3": "dpeth=3: no such key; did you mean depth?",
    "nrom=pre": "nrom=pre: no such key; did you mean norm?",
    "norm=swinrenorm": "; did you mean swin_renorm?",
    "norm.placement=nanochat": "; did you mean norm=nanochat?",
    "norm=null": "norm=null: allowed: attn_res, ",
    "model.value_embeddings=every": "model.value_embeddings=every: allowed: none, alternate, all",
    "model.value_embedding_scale=-1": "model.value_embedding_scale=-1: allowed: a number, at least 0",
    "init=true": "init=true: allowed: fan_in, ",
    "norm=dyt norm.type=layer": "norm.type=layer: not with norm=dyt or derf",
    "norm.every=3": "only with norm=swin_renorm; norm=reordered has placement, type, eps, gain",
    "norm=dyt norm.alpha=0.7": "final_alpha",
    "norm=mhc norm.n=2": "norm.n=2: no such key; norm=mhc has placement, type, eps, gain, streams, ",
    "model=llama3_8b norm.n=2": "; norm=pre has placement, type, eps, gain",
    "norm=mch": "; did you mean mhc?",
    "norm=x+F(x)": "norm=x+F(x): a formula is 'norm=custom norm.update=\"x+F(x)\"'",
    'norm="x+F(x)"': "norm=x+F(x): no such choice; a formula is norm.update, of norm=custom",
    "experiment=norm_zoo": "experiment=norm_zoo: did you mean +experiment=norm_zoo?",
    "depth": "depth: not of the form key=value",
    "depth=1,2": "depth=1,2",
    "depth=${wdith}": "wdith",
}


@pytest.mark.parametrize("override", UNKNOWN)
def test_unknown_names_get_one_line(override, monkeypatch):
    monkeypatch.setattr("sys.argv", ["a_program", "--dpeth", "nrom"])  # not simlab's to read
    with pytest.raises(ConfigError) as caught:
        simlab.compose(override.split(" "))
    assert UNKNOWN[override] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mhc", "scaled", "custom", "swin_renorm"])
def test_a_placement_by_its_key_has_its_files_numbers(name):
    assert compose([f"norm.placement={name}"]).shape.norm == compose([f"norm={name}"]).shape.norm


def test_a_choice_named_inside_its_group():
    keys = {
        "norm": {"placement": "mhc", "streams": 2},
        "init": {"std": 1},
        "model": {"name": "mine"},
    }
    others = {"init": {"std": 1}, "model": {"name": "mine"}}
    assert as_choices(keys) == {"norm": "mhc", "norm.streams": 2, **others}
    assert as_choices({"model": {"name": "small"}}) == {"model": "small"}


def test_a_terminals_line_ends_between_words(monkeypatch, capsys):
    """But what is in quotes, which may be copied, stays in one line."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    said = []
    for line in ("one, two, three, " * 9, "write 'norm.update=\"x + F(x)\"', " * 9):
        with pytest.raises(SystemExit):
            fail(line)
        said.append(capsys.readouterr().err)
        assert " ".join(said[-1].split()) == f"simlab: {line}".strip()
    assert [max(map(len, text.splitlines())) <= 60 for text in said] == [True, False]


@pytest.mark.parametrize("value", ["[1,2,3]", "abc", "[1,true]", "1e9"])
def test_scales_are_a_number_or_two(value):
    with pytest.raises(ConfigError, match=r"^norm.stream_scale=.*: allowed: a number, or two"):
        compose(["norm=scaled", f"norm.stream_scale={value}"])
    assert compose(["norm=scaled", "norm.stream_scale=2"]).shape.norm.stream_scale == (2.0, 2.0)


def test_missing_pieces():
    with pytest.raises(ConfigError, match=r"source\.path is missing"):
        compose(["source=checkpoint"])
    with pytest.raises(ConfigError, match=r"inputs\.prompt=TEXT"):
        compose(["inputs=text"])
    for given in ("depth=3", "model=olmo2_1b", "norm=pre", "norm.eps=1e-5"):
        with pytest.raises(ConfigError, match="is read from the checkpoint"):
            compose(["source=checkpoint", "source.path=somewhere", given])
