"""Checkpoints of the other formats in a hub repository, from the cache, offline."""

import shutil

import pytest
from conftest import write_olmo
from test_legacy_olmo import OLMO2, fused, write_legacy

from simlab.checkpoints.checkpoint import Checkpoint
from simlab.checkpoints.hub import find
from simlab.config import ConfigError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An offline hub cache with one repository of each format."""
    cache = tmp_path / "hub"

    def snapshot(name):
        repo = cache / f"models--org--{name}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("a" * 40)
        (repo / "snapshots").mkdir()
        return repo / "snapshots" / ("a" * 40)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_olmo_core(hub, written):
    folder = hub("core")
    shutil.copytree(written / "olmo2", folder)
    assert find("org/core", None).fetch() == folder
    assert Checkpoint("org/core").opened.format == "olmo_core"
    (folder / "model_and_optim" / "__0_0.distcp").unlink()
    with pytest.raises(ConfigError, match="not in the local hub cache"):
        find("org/core", None).fetch()


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_legacy(hub, tmp_path, kind):
    folder = hub("legacy")
    write_legacy(folder, fused(write_olmo(tmp_path / "hf")), OLMO2, kind)
    assert find("org/legacy", "a" * 40).fetch() == folder
    assert Checkpoint("org/legacy").opened.format == "legacy_olmo"
    (folder / f"model.{kind}").unlink()
    with pytest.raises(ConfigError, match="not in the local hub cache"):
        find("org/legacy", None).fetch()
