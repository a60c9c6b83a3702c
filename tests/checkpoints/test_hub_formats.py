"""Checkpoints of the other formats in a hub repository, from the cache, offline."""

import shutil
import sys

import pytest
from conftest import write_olmo
from test_legacy_olmo import OLMO2, fused, write_legacy

from simlab.checkpoints.checkpoint import Checkpoint
from simlab.checkpoints.hub import locate
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
    assert locate("org/core", None) == folder
    assert Checkpoint("org/core").opened.format == "olmo_core"
    (folder / "model_and_optim" / "__0_0.distcp").unlink()
    with pytest.raises(ConfigError, match="not in the local hub cache"):
        locate("org/core", None)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_legacy(hub, tmp_path, kind):
    folder = hub("legacy")
    write_legacy(folder, fused(write_olmo(tmp_path / "hf")), OLMO2, kind)
    assert locate("org/legacy", "a" * 40) == folder
    assert Checkpoint("org/legacy").opened.format == "legacy_olmo"
    (folder / f"model.{kind}").unlink()
    with pytest.raises(ConfigError, match="not in the local hub cache"):
        locate("org/legacy", None)


def test_what_is_fetched_before_the_weights(tmp_path, monkeypatch):
    """A config that isn't read, and an adapter, are seen before gigabytes are fetched."""
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    from simlab.checkpoints.hub import HTTPError

    httpx = sys.modules[HTTPError.__module__.partition(".")[0]]
    response = httpx.Response(404, request=httpx.Request("GET", "http://localhost"))
    asked, there = [], {"config.json": '{"model_type": "qwen2"}', "adapter_config.json": "{}"}

    def answer(repo, file, revision=None, local_files_only=False):
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        asked.append(file)
        if file not in there:
            raise RemoteEntryNotFoundError("404", response=response)
        (tmp_path / file).write_text(there[file])
        return str(tmp_path / file)

    monkeypatch.setattr("simlab.checkpoints.hub.hf_hub_download", answer)
    with pytest.raises(ConfigError, match="model_type='qwen2'"):
        locate("org/qwen", None)
    assert "model.safetensors" not in asked
    del there["config.json"]
    with pytest.raises(ConfigError, match="an adapter alone"):
        locate("org/adapter", None)
