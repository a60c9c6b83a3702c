"""Model types that transformers computes, from a hub on loopback."""

import json

import pytest
from conftest import edit_json, in_process
from family_table import write_family
from hub_server import REPO, cache, hub

from simlab.checkpoints.families.checkpoint import FamilyCheckpoint
from simlab.config import ConfigError, SourceConfig
from simlab.experiment.build import open_checkpoint

__all__ = ["cache", "hub"]  # fixtures


def test_a_hub_id_is_its_folder(hub, cache, tmp_path, no_figures, one_thread):
    """In shards, with gradients and a random init: the same curves, of the commit that is said."""
    write_family(tmp_path / "m", "cohere2").save_pretrained(tmp_path / "m", max_shard_size="20KB")
    (tmp_path / "m/model.safetensors").unlink()
    shards = {path.name for path in (tmp_path / "m").glob("model-*")}
    assert len(shards) > 2
    commit, given = hub.push(REPO, tmp_path / "m"), ["source=checkpoint", "seeds=1"]
    given += ["gradients=true", "inputs.batch=2", "inputs.length=8"]
    for path, out in (("m", "folder"), (REPO, "hub")):
        more = [f"source.path={path}", f"hydra.run.dir={out}"]
        done = in_process(*given, *more, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
    tables = {
        name: [(tmp_path / out / name).read_bytes() for out in ("folder", "hub")]
        for name in ("curve.csv", "weights.csv")
    }
    assert all(ours == theirs for ours, theirs in tables.values())
    summary = json.loads((tmp_path / "hub/summary.json").read_text())
    assert commit in json.dumps(summary)
    fetched = {path.rpartition("/")[2] for method, path, _ in hub.asked if method == "GET"}
    assert {*shards, "model.safetensors.index.json"} <= fetched


AUTO = {"AutoConfig": "m.GraniteConfig", "AutoModelForCausalLM": "m.TheirModel"}
REFUSED = {
    "a type that transformers doesn't know": (
        {"model_type": "theirs", "auto_map": AUTO}, "doesn't know model_type='theirs'",
    ),
    "a type that it knows": ({"auto_map": AUTO}, "TheirModel"),
    "a list": ({"auto_map": {"AutoModel": ["m.TheirModel", None]}}, "TheirModel"),
    "not a map": ({"auto_map": "code.py"}, "auto_map="),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
    "widths": ({"hidden_size": "wide"}, "transformers refuses it"),
}  # fmt: skip


@pytest.fixture(scope="module")
def granite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("granite")
    write_family(folder, "granite")
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_weights_come(hub, cache, granite, case):
    changes, said = REFUSED[case]
    config = json.loads((granite / "config.json").read_text()) | changes
    weights = (granite / "model.safetensors").read_bytes()
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": weights}
    hub.repos[REPO] = {"main": "c" * 40}, {"c" * 40: files}
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(SourceConfig("checkpoint", path=REPO))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [path for _, path, _ in hub.asked if "/lfs/" in path]


def test_code_of_the_same_name(granite, tmp_path):
    """A repository that brings the classes that transformers has: those compute it, which is said."""
    own = {
        "AutoConfig": "a.GraniteConfig",
        "AutoModelForCausalLM": "org/repo--m.GRANITEForCausalLM",
    }
    (tmp_path / "model.safetensors").symlink_to(granite / "model.safetensors")
    (tmp_path / "config.json").write_bytes((granite / "config.json").read_bytes())
    edit_json(tmp_path / "config.json", auto_map=own)
    unread = FamilyCheckpoint(str(tmp_path)).unread
    assert unread == "not used: auto_map in config.json, code of the repository's own"
    assert not FamilyCheckpoint(str(granite)).unread
