"""The local folder of a checkpoint that a user names: a folder, or a hub id with a revision."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path
from typing import cast

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
)

from simlab.checkpoints.formats.hugging_face_keys import read_family
from simlab.checkpoints.formats.layouts import instead
from simlab.checkpoints.formats.olmo_core import STATE
from simlab.checkpoints.untrusted.dcp import METADATA, file_names
from simlab.checkpoints.untrusted.files import fields_of, read_json
from simlab.config import ConfigError, nearest

# httpx's, under the name by which huggingface_hub has it: what a broken download raises.
HTTPError = cast("type[Exception]", HfHubHTTPError.__mro__[1])
_ADAPTER = "adapter_config.json"
INDEX, SINGLE, PICKLED = "model.safetensors.index.json", "model.safetensors", "model.pt"


def locate(path: str, revision: str | None) -> Path:
    """The checkpoint's local folder; of a hub id, the snapshot in the hub's cache.

    Files in the cache aren't downloaded again, so that a complete snapshot works offline.
    Raises ConfigError for a folder that isn't there or a hub id that can't be downloaded.
    """
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(
                f"source.revision={revision}: revisions are for hub ids, and {path} is a folder"
            )
        return folder.resolve()
    if folder.exists():
        raise ConfigError(f"source.path={path}: is a file; give the checkpoint's folder")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) or folder.parent.is_dir():
        beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
        hint = nearest(folder.name, (entry.name for entry in beside))
        raise ConfigError(f"source.path={path}: no such folder{hint}")
    return _snapshot(path, revision)


def _snapshot(repo: str, revision: str | None) -> Path:
    """Download a repository's checkpoint, of any known format, and return its folder in the cache."""
    names = ("config.json", "config.yaml")
    cached = (_cached(repo, name, revision) for name in names)  # both, before the hub is asked
    fetched = (_fetch_if_any(repo, name, revision) for name in names)
    config = next(filter(None, itertools.chain(cached, fetched)), None)
    if config is None:
        adapter = _fetch_if_any(repo, _ADAPTER, revision)
        found = instead([_ADAPTER] if adapter else [])
        raise ConfigError(
            f"source.path={repo}: the repository has no config.json or config.yaml{found}"
        )
    legacy = config.name == "config.yaml"
    folder = config.parent  # …/snapshots/<commit>: the other files come from the same commit
    if not legacy and "model_type" in (values := read_json(config)):
        read_family(values, fields_of(values, config))  # refused before its weights are fetched
    if _complete(folder):
        return folder
    for file in ("tokenizer.json", _ADAPTER):  # before the weights: they may be cut short
        _fetch_if_any(repo, file, folder.name)
    index = None if legacy else _fetch_if_any(repo, INDEX, folder.name)
    if index is not None:
        for file in _shards(index):
            _fetch(repo, file, folder.name)
    elif _fetch_if_any(repo, SINGLE, folder.name) is None:
        if legacy:
            _fetch(repo, PICKLED, folder.name)
        elif _fetch_if_any(repo, f"{STATE}/{METADATA}", folder.name) is not None:
            for file in file_names(folder / STATE):
                _fetch(repo, f"{STATE}/{file}", folder.name)
        else:
            raise ConfigError(f"source.path={repo}: the repository has no {SINGLE}")
    return folder


def _complete(folder: Path) -> bool:
    """True if a snapshot has all files of its weights."""
    index = folder / INDEX
    if index.exists():
        return all((folder / file).exists() for file in _shards(index))
    if (folder / STATE / METADATA).exists():
        return all((folder / STATE / file).exists() for file in file_names(folder / STATE))
    return (folder / SINGLE).exists() or (folder / PICKLED).exists()


def _shards(index: Path) -> list[str]:
    """File names in an index; opening the checkpoint reports an index that is malformed."""
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    return sorted(file for file in files if isinstance(file, str) and Path(file).name == file)


def _fetch(repo: str, file: str, revision: str | None) -> Path:
    """Fetch one file of a hub repository. Raises ConfigError where the repository hasn't it."""
    path = _fetch_if_any(repo, file, revision)
    if path is None:
        raise ConfigError(f"source.path={repo}: the repository has no {file}")
    return path


def _cached(repo: str, file: str, revision: str | None) -> Path | None:
    try:
        return Path(hf_hub_download(repo, file, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):  # the latter is reported by the fetch
        return None


def _fetch_if_any(repo: str, file: str, revision: str | None) -> Path | None:
    """Fetch one file of a hub repository, from the cache or the hub; None if it isn't there.

    Raises ConfigError for a revision, a repository or a connection that fails.
    """
    what = f"source.path={repo}" + (f" source.revision={revision}" if revision else "")
    try:
        try:
            return Path(hf_hub_download(repo, file, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(hf_hub_download(repo, file, revision=revision))
    except RemoteEntryNotFoundError:
        return None
    except HfHubHTTPError as error:
        raise ConfigError(f"{what}: the hub says: {str(error).splitlines()[0]}") from error
    except HFValidationError as error:
        raise ConfigError(f"{what}: {str(error).splitlines()[0]}") from error
    except (OSError, HTTPError) as error:
        raise ConfigError(
            f"{what}: no such folder, {file} of it is not in the local hub cache, "
            "and the hub can't be reached"
        ) from error
