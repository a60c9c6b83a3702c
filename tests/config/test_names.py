"""Which name a mistake's line suggests: by meaning, by spelling, and none that is far off."""

import pytest

from simlab import config
from simlab.config import names, nearest
from simlab.config.command_line import OTHER_KEYS
from simlab.config.keys import known_keys
from simlab.config.names import nearest_key, some
from simlab.config.validate import options
from simlab.report.page.quantities import BY_SUBLAYER

KEYS = {
    # by meaning
    "n_layers": "depth", "num_hidden_layers": "depth", "model.nLayers": "depth",
    "hidden_size": "width", "d_model": "width", "n_heads": "heads", "intermediate_size": "d_ff",
    "seq_len": "inputs.length", "batch_size": "inputs.batch", "inputs.text": "inputs.prompt",
    "inputs.file": "inputs.path", "source.file": "source.path",
    "inputs.add_bos": "inputs.special_tokens",
    "source.ref": "source.revision", "output_dir": "hydra.run.dir", "launcher": "hydra/launcher",
    # by spelling, of the last part alone
    "dpeth": "depth", "nrom": "norm", "norm.gian": "norm.gain", "init.embed_std": "init.embedding_std",
    "experiments": "+experiment",
    # the right name elsewhere
    "model.depth": "depth", "std": "init.std", "path": "inputs.path or source.path",
}  # fmt: skip
FAR = ("lr", "source.token", "init.scale", "inputs.xyz", "norm.size", "foo.bar")


@pytest.mark.parametrize("key", KEYS)
def test_keys(key):
    assert nearest_key(key, [*known_keys(), *OTHER_KEYS]) == f"; did you mean {KEYS[key]}?"


@pytest.mark.parametrize("key", FAR)
def test_keys_that_are_near_none(key):
    said = nearest_key(key, [*known_keys(), *OTHER_KEYS])
    assert "did you mean" not in said
    group = key.partition(".")[0]
    assert said.startswith(f"; {group} has ") == (group in ("source", "init", "inputs", "norm"))


NORMS, DTYPES, DEVICES = options("norm"), config.DTYPES, ("auto", "cpu", "cuda", "mps")
VALUES = [
    ("prenorm", NORMS, "pre"), ("pre_norm", NORMS, "pre"), ("pre-LN", NORMS, "pre"),
    ("postnorm", NORMS, "post"), ("swinrenorm", NORMS, "swin_renorm"), ("rmsnorm", NORMS, None),
    ("mch", NORMS, "mhc"), ("dty", NORMS, "dyt"), ("cup", DEVICES, "cpu"), ("hcm", NORMS, None),
    ("attention_residuals", NORMS, "attn_res"), ("hc", NORMS, "hyper_connections"),
    ("gpu", DEVICES, "cuda"), ("tpu", DEVICES, None), ("ln", NORMS, None),
    ("tb", config.LOGGERS, "tensorboard"), ("wb", config.LOGGERS, "wandb"),
    ("hf", options("source"), "checkpoint"), ("ckpt", options("source"), "checkpoint"),
    ("7b", ["olmo2_7b", "olmo2_13b", "olmo3_7b", "small"], "olmo2_7b or olmo3_7b"),
    ("a", ["a_1", "a_2", "a_3"], "a_1, a_2 or a_3"), ("a", [f"a_{i}" for i in range(5)], None),
    ("branch", ["cosine", "branch_mean_square", "branch_raw_mean_square"], "branch_mean_square"),
   
    ("fp16", DTYPES, "float16"), ("half", DTYPES, "float16"), ("bf16", DTYPES, "bfloat16"),
    ("fp32", DTYPES, "float32"), ("float23", DTYPES, "float32"), ("float64", DTYPES, None),
    ("half", config.QK_NORMS, None), ("OLMo-2-7B", options("model"), "olmo2_7b"),
    ("olmo2_8b", options("model"), None), ("note.txt", ["other.txt", "notes.txt"], "notes.txt"),
    ("xyz.txt", ["other.txt", "notes.txt"], None), ("", NORMS, None), ("abc", [], None),
]  # fmt: skip


@pytest.mark.parametrize(("value", "allowed", "meant"), VALUES)
def test_values(value, allowed, meant):
    assert nearest(value, allowed) == (f"; did you mean {meant}?" if meant else "")


def test_of_many_names_the_first_are_listed():
    assert some([*"abcdefgh"]) == "a, b, c, d, e, f, g, h"
    assert some([*"abcdefghij"]) == "a, b, c, d, e, f, g, h and 2 others"


def test_the_table_names_what_there_is():
    """And no name that is ours, for another thing."""
    keys = {*known_keys(), *OTHER_KEYS}
    values = {*NORMS, *DTYPES, *DEVICES, *config.NORM_TYPES, *config.LOGGERS}
    others = {*options("source"), *BY_SUBLAYER}
    assert set(names._CALLED) <= keys | values | others
    assert not {word for words in names._CALLED.values() for word in words.split()} & (
        keys | values
    )
