"""Checkpoints written by ai2-olmo-core and by torch, every sublayer's state, and the logits."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import edit_json, refused
from largest import metadata
from safetensors.torch import load_file, save_file
from test_architectures import assert_same
from write_olmo_core import CASES, IDS, configs

from simlab.checkpoints.checkpoint import Checkpoint
from simlab.checkpoints.untrusted import dcp as distributed
from simlab.checkpoints.untrusted import pickle as pickles
from simlab.config import ConfigError


def assert_states(folder, expected):
    states = load_file(expected / "states.safetensors")
    logits = states.pop("logits")
    assert_same(folder, [states[name] for name in sorted(states)], logits, IDS)


@pytest.fixture
def olmo2(tmp_path, written):
    shutil.copytree(written / "olmo2", tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("case", CASES)
def test_every_hidden_state(written, case):
    assert_states(written / case, written / case)


def test_no_case_is_left_out():
    assert set(configs()) == set(CASES)


def test_the_bare_folder(olmo2, tmp_path, written):
    assert_states(olmo2 / "model_and_optim", written / "olmo2")  # config.json is above
    bare = tmp_path / "elsewhere" / "bare"
    shutil.copytree(olmo2 / "model_and_optim", bare)
    refused(bare, "without its config.json")
    shutil.copy(olmo2 / "config.json", bare)
    assert_states(bare, written / "olmo2")


def model_config(folder):
    return json.loads((folder / "config.json").read_text())["model"]


def test_other_spellings_of_the_config(olmo2, written):
    """``block.attention`` before ``block.sequence_mixer``; the model's section alone; a pattern."""
    before = model_config(olmo2)
    model = before | {"block": before["block"].copy()}
    model["block"]["attention"] = model["block"].pop("sequence_mixer")
    edit_json(olmo2 / "config.json", model=model)
    assert_states(olmo2, written / "olmo2")
    (olmo2 / "config.json").write_text(json.dumps(model))
    assert_states(olmo2, written / "olmo2")
    block = before["block"]
    model = before | {"block": {"a": block, "b": block}, "block_pattern": ["a", "b", "a"]}
    (olmo2 / "config.json").write_text(json.dumps({"model": model}))
    assert_states(olmo2, written / "olmo2")


def put(values, path, value):
    *parents, last = path.split(".")
    for key in parents:
        values = values.setdefault(key, {})
    values[last] = value


MIXER = "block.sequence_mixer"
EACH = dict.fromkeys((f"force_full_attention_on_{end}_layer" for end in ("first", "last")), False)
REFUSED = [
    ("name", "moe", "default"), ("embed_scale", 4.0, "1.0"), ("embedding_norm", {}, "null"),
    ("block.name", "normalized", "peri_norm"), ("block.name", "default_scaled", "peri_norm"),
    ("block.attention_residual_alpha", 0.5, "1.0"), ("block.feed_forward_moe", {"n": 1}, "not supp"),
    ("block.feed_forward.bias", None, "false"), ("block.feed_forward.activation", "gelu_tanh", "silu"),
    ("block.layer_norm.name", "l2_norm", "rms"), ("block.layer_norm.bias", None, "false"),
    ("block.layer_norm.eps", 1e-5, "layer_norm is"), ("block.layer_norm", None, "null"),
    (f"{MIXER}.type", "gated_delta_net", "attention"), (f"{MIXER}.name", "fused", "default"),
    (f"{MIXER}.bias", None, "false"), (f"{MIXER}.clip_qkv", 8.0, "not supported"),
    (f"{MIXER}.gate", {"granularity": "headwise"}, "not supported"),
    (f"{MIXER}.attention_sinks", True, "not supported"), (f"{MIXER}.scalable_softmax", True, "not"),
    (f"{MIXER}.qk_norm_per_head_gains", True, "not supported"), (f"{MIXER}.new_thing", 3, "not"),
    (f"{MIXER}.rope", None, "without RoPE"), (f"{MIXER}.rope.name", "complex", "default"),
    (f"{MIXER}.rope.no_global_rope", True, "false"), (f"{MIXER}.rope.theta", 0, "number"),
    (f"{MIXER}.rope.partial_rotary_factor", 0.5, "1.0"),
    (f"{MIXER}.rope.scaling", {"_CLASS_": "x.PIRoPEScalingConfig"}, "YaRNRoPEScalingConfig"),
    (f"{MIXER}.rope.scaling", {"_CLASS_": "x.YaRNRoPEScalingConfig"}, "ramp"),
    (f"{MIXER}.sliding_window", EACH | {"pattern": [4, 8]}, "more than one size"),
    (f"{MIXER}.sliding_window", {"pattern": [0]}, "window sizes"),
    ("lm_head.bias", None, "false"), ("lm_head.name", "normalized", "default"),
    ("lm_head.layer_norm", None, "null"), ("n_layers", 10**9, "holds"), ("d_model", "x", "integer"),
    ("block_overrides", {"9": {}}, "layer"), ("block_overrides", {"1": {"name": "default"}}, "false"),
    ("block_pattern", ["a"], "names of blocks"), ("new_thing", False, "doesn't know this key"),
    ("block.attention", {"n_heads": 4}, "old name"), (f"{MIXER}.new_thing", False, "doesn't know"),
    (f"{MIXER}.rope.new_thing", 3, "doesn't know"), (f"{MIXER}.sliding_window", {"a": 1}, "doesn't"),
    (f"{MIXER}.rope.scaling", {"_CLASS_": "x.ABFRoPEScalingConfig", "factor": 2.0}, "doesn't know"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "part"), REFUSED)
def test_unsupported_configs_are_refused(olmo2, key, value, part):
    model = model_config(olmo2)
    put(model, key, value)
    edit_json(olmo2 / "config.json", model=model)
    refused(olmo2, part)


RANK = """
import os, sys, warnings
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

store, rank, tensors, folder = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
mesh = init_device_mesh("cpu", (2,))
state = {}
for i, (name, value) in enumerate(sorted(load_file(tensors).items())):
    dim = 0 if value.dim() == 1 else i % 2  # rows in two files, or columns
    state[name] = distribute_tensor(value, mesh, [Shard(dim)])
dcp.save({"model": state}, checkpoint_id=folder)
dist.barrier()
os._exit(0)  # gloo's threads may outlive the group and abort
"""


def tensors_of(folder):
    opened = Checkpoint(str(folder))
    stored = opened.opened.tensors.items()
    return {name: t.rows(0, t.shape[0]) for name, t in stored}


@pytest.mark.slow
def test_shards_of_two_processes(olmo2, tmp_path, written):
    """Written by torch.distributed.checkpoint itself, rows or columns of each tensor in two files."""
    plain = {name.removeprefix("model."): tensor for name, tensor in tensors_of(olmo2).items()}
    save_file(plain, tmp_path / "plain.safetensors")
    shutil.rmtree(olmo2 / "model_and_optim")
    command = [sys.executable, "-W", "ignore", "-c", RANK, str(tmp_path / "store")]
    tail = [str(tmp_path / "plain.safetensors"), str(olmo2 / "model_and_optim")]
    ranks = [subprocess.Popen([*command, str(rank), *tail]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    sharded = Checkpoint(str(olmo2))
    assert {len(stored.pieces) for stored in sharded.opened.tensors.values()} == {2}
    assert_states(olmo2, written / "olmo2")


def write_grid(folder, tensors, cut):
    """A distributed checkpoint in chunks of at most cut × cut, by torch's own classes."""
    from torch.distributed.checkpoint import metadata as md
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    described, stored = {}, {}
    with (folder / "__0_0.distcp").open("wb") as file:
        for name, value in tensors.items():
            chunks = []
            for i in range(0, value.shape[0], cut):
                for j in range(0, value.shape[1], cut) if value.dim() == 2 else (0,):
                    corner = (i, j)[: value.dim()]
                    part = value[i : i + cut]
                    part = (part[:, j : j + cut] if value.dim() == 2 else part).clone()
                    chunks.append(md.ChunkStorageMetadata(torch.Size(corner), part.size()))
                    at = file.tell()
                    torch.save(part, file)
                    index = md.MetadataIndex(name, corner)
                    stored[index] = _StorageInfo("__0_0.distcp", at, file.tell() - at)
            properties = md.TensorProperties.create_from_tensor(value)
            described[name] = md.TensorStorageMetadata(properties, value.size(), chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(md.Metadata(described, None, stored)))


def test_a_grid_of_chunks(olmo2, written):
    tensors = tensors_of(olmo2)
    shutil.rmtree(olmo2 / "model_and_optim")
    (olmo2 / "model_and_optim").mkdir()
    write_grid(olmo2 / "model_and_optim", tensors, 7)
    assert len(Checkpoint(str(olmo2)).opened.tensors["model.embeddings.weight"].pieces) == 27
    assert_states(olmo2, written / "olmo2")


def test_compressed_chunks_are_refused(olmo2):
    from torch.distributed.checkpoint import metadata as md
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    value = torch.zeros(3)
    chunks = [md.ChunkStorageMetadata(torch.Size([0]), value.size())]
    properties = md.TensorProperties.create_from_tensor(value)
    described = {"model.x": md.TensorStorageMetadata(properties, value.size(), chunks)}
    stored = {md.MetadataIndex("model.x", [0]): _StorageInfo("__0_0.distcp", 0, 9, ["zstd"])}
    metadata = pickle.dumps(md.Metadata(described, None, stored))
    (olmo2 / "model_and_optim" / ".metadata").write_bytes(metadata)
    refused(olmo2, "transform_descriptors")


def test_overlapping_chunks_are_refused(olmo2, monkeypatch):
    """Else a few megabytes could name one archive ten thousand times."""
    path = olmo2 / "model_and_optim" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    first, second = [i for i in metadata.storage_data if i.fqn.startswith("model.")][:2]
    metadata.storage_data[second] = metadata.storage_data[first]
    path.write_bytes(pickle.dumps(metadata))
    monkeypatch.setattr(distributed, "open_archive", lambda *_: pytest.fail("one was read"))
    refused(olmo2, "overlaps another")


def test_the_largest_real_metadata_fits():
    """OLMo 2 32B over 64 ranks with two moments has 100 times as many chunks."""
    most = distributed.METADATA_BUDGET
    budget, data = pickles.Budget(most.steps // 100, most.objects // 100), metadata(1357)
    assert len(data) < distributed.METADATA_LIMIT / 100
    assert pickles.load(data, Path("x"), budget).fields().keys() > {"storage_data"}


@pytest.mark.parametrize("unit", [b"](]e", b"}", b"\x8c\x02ab", b"J\1\1\1\1", b")\x85"])
def test_objects_count(unit):
    """What takes memory is bounded tighter than steps are."""
    data = b"\x80\x04" + unit * 200_000 + b"."
    with pytest.raises(ConfigError, match="it holds too much"):
        pickles.load(data, Path("x"), pickles.Budget(10_000_000, 100_000))


def test_a_gap_in_the_memo_is_refused():
    with pytest.raises(ConfigError, match="memo has a gap"):
        pickles.load(b"\x80\x02Nr\xff\xff\xff\x7f.", Path("x"), pickles.Budget(10, 10))


@pytest.mark.parametrize("opcode", [b"N", b"]", b"}\x94", b"(", b"K\x01", b")"])
def test_every_opcode_counts(opcode):
    data = b"\x80\x04" + opcode * 2000 + b"."
    with pytest.raises(ConfigError, match="too many steps"):
        pickles.load(data, Path("x"), pickles.Budget(1000, 10_000))
