"""The weight hash is the weights': of every bit, name, shape and dtype, and of no file's layout."""

import pytest
import torch
from conftest import write_olmo
from safetensors.torch import load_file, save_file

from simlab.checkpoints import streamed
from simlab.checkpoints.checkpoint import Checkpoint
from simlab.measurement.engine import measure_curves

K = "model.layers.3.self_attn.k_proj.weight"
GAIN = "model.layers.1.post_attention_layernorm.weight"
CPU = torch.device("cpu")


def weight_hash(folder):
    return Checkpoint(str(folder)).identity()["weight_hash"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "m"
    write_olmo(folder)
    return folder


@pytest.fixture(scope="module")
def its_hash(original):
    return weight_hash(original)


def flip_a_bit(tensors, name):
    tensors[name].view(torch.int32).view(-1)[7] ^= 1


def swap_rows(tensors, name):
    tensors[name] = tensors[name][[1, 0, *range(2, len(tensors[name]))]]


def swap_layers(tensors, name):
    other = name.replace("layers.3", "layers.2")
    tensors[name], tensors[other] = tensors[other], tensors[name]


def widen(tensors, name):
    """The same numbers in another dtype."""
    tensors[name] = tensors[name].double()


CHANGES = {
    "a bit": (flip_a_bit, K),
    "a bit of a gain": (flip_a_bit, GAIN),
    "a bit of the embedding": (flip_a_bit, "model.embed_tokens.weight"),
    "two rows": (swap_rows, K),
    "two layers": (swap_layers, K),
    "a dtype": (widen, K),
    "a gain's dtype": (widen, GAIN),
    "a bit of the head": (flip_a_bit, "lm_head.weight"),
    "a bit of the last norm": (flip_a_bit, "model.norm.weight"),
}
OUTSIDE = ("lm_head.weight", "model.norm.weight")


@pytest.mark.parametrize("what", CHANGES)
def test_changed_weights_change_the_hash(tmp_path, original, its_hash, what):
    """Any but of the head and of the norm before it."""
    change, name = CHANGES[what]
    tensors = load_file(original / "model.safetensors")
    change(tensors, name)
    (tmp_path / "config.json").write_bytes((original / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert (weight_hash(tmp_path) == its_hash) == (name in OUTSIDE)


def test_shards_do_not_matter(tmp_path, its_hash):
    write_olmo(tmp_path / "m", shards="40KB")
    assert weight_hash(tmp_path / "m") == its_hash


@pytest.mark.parametrize("run_bytes", [streamed.RUN_BYTES, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measuring_keeps_the_hash(original, monkeypatch, run_bytes, dtype):
    """Rows hashed as they pass through products, forward and back, or read for the hash alone."""
    monkeypatch.setattr(streamed, "RUN_BYTES", run_bytes)
    opened = Checkpoint(str(original), statistics=True)
    measure_curves(opened, torch.tensor([[3, 60, 3]]), CPU, dtype, True)
    assert opened.identity()["weight_hash"] == weight_hash(original)
