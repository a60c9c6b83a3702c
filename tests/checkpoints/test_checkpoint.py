"""Checkpoints that are wrong, hostile or somewhere else: one clear line, nothing run or followed."""

import json
import shutil
import struct

import pytest
import torch
from conftest import edit_json, refused, write_olmo
from safetensors.torch import load_file, save_file

from simlab import compose
from simlab.checkpoints.checkpoint import Checkpoint
from simlab.checkpoints.hub import find
from simlab.config import ConfigError
from simlab.experiment import prepare


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LAYER = "model.layers.3.self_attn.k_proj.weight"


def test_wrong_tensors_are_named(checkpoint):
    rewrite(checkpoint, lambda t: t.pop(LAYER))
    refused(checkpoint, LAYER, "missing")
    rewrite(checkpoint, lambda t: t.update({LAYER: torch.zeros(16, 47)}))
    refused(checkpoint, LAYER, "(16, 47)", "(16, 48)")
    rewrite(checkpoint, lambda t: t.update({LAYER: torch.zeros(16, 48, dtype=torch.int32)}))
    refused(checkpoint, LAYER, "I32", "BF16")
    good = torch.zeros(16, 48)
    rewrite(
        checkpoint, lambda t: t.update({LAYER: good, "model.layers.3.extra.bias": good.clone()})
    )
    refused(checkpoint, "model.layers.3.extra.bias", "not part of this architecture")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers=1000000000", "tensors"]),
        ({"num_hidden_layers": 10**4000}, ["num_hidden_layers=a huge integer", "1000000000"]),
        ({"num_hidden_layers": 4}, ["model.layers.4", "not part of"]),
        ({"num_hidden_layers": 6}, ["model.layers.5", "missing"]),
        ({"num_hidden_layers": "five"}, ["num_hidden_layers='five'", "integer"]),
        ({"hidden_size": 6 * 10**8}, ["shape", "600000000"]),
        ({"hidden_size": 6 * 10**11}, ["hidden_size=600000000000", "1000000000"]),
        ({"hidden_size": 50}, ["num_attention_heads=6", "hidden_size=50"]),
        ({"num_key_value_heads": 4}, ["num_key_value_heads=4", "num_attention_heads=6"]),
        ({"num_attention_heads": 0}, ["num_attention_heads=0"]),
        ({"model_type": "qwen9"}, ["model_type='qwen9'", "olmo2, olmo3, llama"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "silu"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"rms_norm_eps": -1.0}, ["rms_norm_eps=-1.0"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps=nan"]),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, ["'longrope'", "yarn"]),
        ({"rope_parameters": [1]}, ["rope_parameters", "object"]),
        ({"vocab_size": None}, ["vocab_size=None"]),
        ({"rms_norm_eps": 10**400}, ["rms_norm_eps=a huge integer"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings='yes'"]),
        ({"rope_parameters": {"rope_theta": 0}}, ["rope_theta=0"]),
        ({"rope_parameters": {"rope_theta": 1.0}}, ["rope_theta=1.0"]),
        ({"rope_parameters": {"sliding_attention": 5}}, ["sliding_attention=5", "no such key"]),
        ({"rope_parameters": YARN | {"factor": 0}}, ["factor=0"]),
        ({"rope_parameters": YARN | {"beta_fast": 0}}, ["beta_fast=0"]),
        ({"rope_parameters": YARN | {"beta_slow": 1e-320}}, ["beta_slow=1e-320"]),
        ({"rope_parameters": YARN | {"attention_factor": 0}}, ["attention_factor=0"]),
        (
            {"rope_parameters": YARN | {"original_max_position_embeddings": 10**400}},
            ["original_max_position_embeddings=a huge"],
        ),
    ],
)
def test_wrong_configs_are_named(checkpoint, changes, parts):
    edit_json(checkpoint / "config.json", **changes)
    refused(checkpoint, *parts)


def test_broken_files(checkpoint):
    file, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    whole, text = file.read_bytes(), config.read_text()
    for broken in (b"", whole[:5], whole[:100], whole[:-1], struct.pack("<Q", 1 << 60) + whole[8:]):
        file.write_bytes(broken)
        refused(checkpoint, "model.safetensors", "not a readable safetensors file")
    file.write_bytes(whole)
    for broken in ("", "{", "[1]", "[" * 100_000, '{"model_type": "olmo2"}'):
        config.write_text(broken)
        refused(checkpoint, "config.json")
    config.unlink()
    refused(checkpoint, "config.json", "no such file")
    config.write_text(text)
    file.unlink()
    refused(checkpoint, "model.safetensors.index.json")


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "a\\b", "", 3, None]
)
def test_index_stays_in_folder(tmp_path, file):
    write_olmo(tmp_path / "m", shards="40KB")
    shutil.copy(next((tmp_path / "m").glob("model-*.safetensors")), tmp_path / "secret.safetensors")
    index = tmp_path / "m" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"][LAYER] = file
    index.write_text(json.dumps(values))
    refused(tmp_path / "m", LAYER, "not a file name")


def test_missing_shard_and_wrong_index(tmp_path):
    write_olmo(tmp_path / "m", shards="40KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    other = next(f for f in values["weight_map"].values() if f != values["weight_map"][LAYER])
    lying = values | {"weight_map": values["weight_map"] | {LAYER: other}}
    index.write_text(json.dumps(lying))
    refused(tmp_path / "m", LAYER, "missing, which the index puts there")
    index.write_text(json.dumps(values))
    (tmp_path / "m" / values["weight_map"][LAYER]).unlink()
    refused(tmp_path / "m", values["weight_map"][LAYER])


def test_old_spelling_of_rope(checkpoint):
    """transformers before version 5 wrote rope_theta and rope_scaling."""
    values = json.loads((checkpoint / "config.json").read_text())
    del values["rope_parameters"]
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    (checkpoint / "config.json").write_text(
        json.dumps(values | {"rope_theta": 123.0, "rope_scaling": scaling})
    )
    model = Checkpoint(str(checkpoint)).model
    assert (model.rope_theta, model.yarn.factor, model.yarn.original_length) == (123.0, 4.0, 32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(tmp_path, dtype):
    """A bfloat16 file, measured in bfloat16, is what is in the file."""
    write_olmo(tmp_path / "m").to(getattr(torch, dtype)).save_pretrained(tmp_path / "m")
    opened = Checkpoint(str(tmp_path / "m"))
    ours = opened.tensor(
        "blocks.3.attention.sublayer.k_proj.weight",
        (16, 48),
        torch.device("cpu"),
        getattr(torch, dtype),
    )
    assert torch.equal(ours, load_file(tmp_path / "m" / "model.safetensors")[LAYER])


@pytest.fixture
def hub(tmp_path, monkeypatch, checkpoint):
    """A hub cache as huggingface_hub lays it out, one repository, two revisions, no network."""
    cache = tmp_path / "hub"
    repo = cache / "models--some-org--olmo"
    for commit, branch in (("a" * 40, "main"), ("b" * 40, "stage1-step10-tokens1B")):
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repo / "blobs").mkdir(exist_ok=True)
        for file in checkpoint.iterdir():
            blob = repo / "blobs" / f"{commit}-{file.name}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / branch).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repo


def test_hub_id_offline(hub):
    assert find("some-org/olmo", None).fetch().name == "a" * 40
    assert find("some-org/olmo", "stage1-step10-tokens1B").fetch().name == "b" * 40
    assert find("some-org/olmo", "b" * 40).fetch().name == "b" * 40
    config = compose(["source=checkpoint", "source.path=some-org/olmo", "seeds=0"])
    assert prepare(config).config.shape.depth == 5


def test_missing_hub_id(hub):
    for path, revision in (("some-org/other", None), ("some-org/olmo", "nope")):
        with pytest.raises(ConfigError, match="not in the local hub cache") as caught:
            find(path, revision).fetch()
        assert path in str(caught.value)
        assert "\n" not in str(caught.value)
    (hub / "snapshots" / ("a" * 40) / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="not in the local hub cache"):
        find("some-org/olmo", None).fetch()


def test_missing_paths(tmp_path, checkpoint):
    with pytest.raises(ConfigError, match="no such folder; did you mean olmo"):
        find(str(tmp_path / "olmp"), None).fetch()
    with pytest.raises(ConfigError, match="is a file"):
        find(str(checkpoint / "config.json"), None).fetch()
    with pytest.raises(ConfigError, match="revisions are for hub ids"):
        find(str(checkpoint), "main").fetch()
    with pytest.raises(ConfigError, match="no such folder"):
        find("a/b/c", None).fetch()
