"""The local folder of a checkpoint that a user names: a folder, or a hub id with a revision.

Of a hub's repository the small files are fetched first: its list of files, the config, the tokenizer,
the index. They tell what can't be read before the weights are fetched, and what a sweep's plan needs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import constants

from simlab import store
from simlab.checkpoints.families.config import is_family
from simlab.checkpoints.formats.hugging_face_keys import read_family, read_values
from simlab.checkpoints.formats.layouts import BESIDE, INDEX, refuse_beside
from simlab.checkpoints.formats.olmo_core import STATE
from simlab.checkpoints.formats.weight_files import layout_of, read_index
from simlab.checkpoints.hub_client import as_given
from simlab.checkpoints.hub_repository import Repository, Stored, partial
from simlab.checkpoints.untrusted.dcp import METADATA, file_names
from simlab.checkpoints.untrusted.files import fields_of, read_json
from simlab.checkpoints.untrusted.tokenizer import FILE_LIMIT
from simlab.checkpoints.untrusted.tokenizer_files import tokenizer_files
from simlab.config import ConfigError, nearest

CONFIGS = ("config.json", "config.yaml")
SINGLE, PICKLED = "model.safetensors", "model.pt"
_SAID_FROM = 100 << 20  # bytes; a download of more is said


@dataclass(frozen=True)
class Found:
    """A checkpoint's folder or GGUF file; of a hub's repository weights may be missing.

    repo: None of a user's folder; else ``folder.name`` is the commit. missing: the weights' files that
    aren't here.
    """

    folder: Path
    repo: Repository | None = None
    missing: Mapping[str, Stored] = field(default_factory=dict)

    @property
    def commit(self) -> str | None:
        """The commit of a hub's repository; None of a user's folder."""
        return self.folder.name if self.repo else None

    def fetch_for(self, owner: object, keep: bool) -> tuple[Path, Callable[[], None]]:
        """``fetch``; also what removes the files that aren't kept, at the latest with their owner."""
        downloads = contextlib.ExitStack()
        removal = weakref.finalize(owner, downloads.close)
        return self.fetch(None if keep else downloads), removal

    def fetch(self, stack: contextlib.ExitStack | None = None) -> Path:
        """Fetch what is missing, and return the folder that has it all. Raises ConfigError.

        stack: where given, what is fetched goes to a folder of its own, beside links to what is here
        already; closing the stack removes that folder, and so does the next fetch of this kind after
        the process was killed.
        """
        if self.repo is None or not self.missing:
            return self.folder
        size = sum(stored.size for stored in self.missing.values())
        if stack is None:
            parts = [partial(stored, self.folder) for stored in self.missing.values()]
            size -= sum(part.stat().st_size for part in parts if part.exists())
        room = _free(Path(constants.HF_HUB_CACHE))
        what = as_given(self.repo.id, self.repo.revision)
        if size > room:
            raise ConfigError(
                f"{what}: its weights take {size / 1e9:.1f} GB, and {room / 1e9:.1f} are free at "
                f"{constants.HF_HUB_CACHE}; HF_HOME names another folder"
            )
        if size > _SAID_FROM:
            print(f"simlab: {what}: downloading {size / 1e9:.1f} GB", file=sys.stderr, flush=True)
        if stack is None:
            for file, stored in self.missing.items():
                self.repo.fetch_weights(file, stored, self.folder)
            return self.folder
        return self._fetch_aside(self.repo, stack)

    def _fetch_aside(self, repo: Repository, stack: contextlib.ExitStack) -> Path:
        cache = Path(constants.HF_HUB_CACHE)
        folder = stack.enter_context(store.scratch(cache, "weights", Path.mkdir)) / self.folder.name
        for path in self.folder.rglob("*"):
            if path.is_file():
                link = folder / path.relative_to(self.folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                try:
                    link.symlink_to(path.resolve())
                except OSError:  # Windows allows links to some users only
                    shutil.copyfile(path, link)
        for file, stored in self.missing.items():
            repo.fetch_aside(file, stored, self.folder.name, folder)
        return folder


def find(path: str, revision: str | None) -> Found:
    """The checkpoint's folder, without its weights where those have to be downloaded.

    Files in the cache aren't downloaded again, so that a complete snapshot works offline.
    Raises ConfigError for a folder that isn't there or a hub id that can't be downloaded.
    """
    folder = Path(os.path.expanduser(path))
    if folder.is_dir() or (folder.exists() and folder.suffix == ".gguf"):
        if revision is not None:
            what = "folder" if folder.is_dir() else "file"
            raise ConfigError(
                f"source.revision={revision}: revisions are for hub ids, and {path} is a {what}"
            )
        return Found(folder.resolve())
    if folder.exists():
        raise ConfigError(f"source.path={path}: is a file; give the checkpoint's folder")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) or folder.parent.is_dir():
        beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
        hint = nearest(folder.name, (entry.name for entry in beside))
        what = "file" if folder.suffix == ".gguf" else "folder"
        raise ConfigError(f"source.path={path}: no such {what}{hint}")
    return _snapshot(Repository(path, revision))


def _snapshot(repo: Repository) -> Found:
    """A repository's snapshot in the hub's cache, with the small files of a checkpoint."""
    absent = CONFIGS[0]
    config = next(filter(None, map(repo.cached, CONFIGS)), None)
    if config is not None:
        _refuse_unread(config)
        absent = _absent(config)
        if not absent:
            return Found(config.parent, repo)
    there = repo.list(absent)
    name = next((name for name in CONFIGS if name in there), None)
    if name is None:
        raise repo.has_no(" or ".join(CONFIGS), there)
    config = repo.fetch(name, there[name])
    _refuse_unread(config)
    folder = config.parent  # …/snapshots/<commit>: the other files come from the same commit
    for file in tokenizer_files(there):
        repo.fetch(file, there[file], folder.name, FILE_LIMIT)
    for file in BESIDE:
        if file in there:
            repo.fetch(file, there[file], folder.name)
    weights = _weights(repo, config, there)
    return Found(folder, repo, {w: there[w] for w in weights if not (folder / w).exists()})


def _refuse_unread(config: Path) -> None:
    """Refuse a family that simlab doesn't read. Raises ConfigError."""
    if is_family(config.parent):
        return
    if config.name == "config.json" and "model_type" in read_json(config):
        values = read_values(config)
        read_family(values, fields_of(values, config))


def _weights(repo: Repository, config: Path, there: Mapping[str, Stored]) -> list[str]:
    """The names of the weights' files, all of them in the repository. Raises ConfigError."""
    folder = config.parent
    if config.name == "config.yaml":
        wanted = [SINGLE if SINGLE in there else PICKLED]
        if wanted[0] not in there:
            raise repo.has_no(f"{SINGLE} and no {PICKLED}", there)
    elif layout := layout_of(there):
        refuse_beside(folder)
        single, index, _ = layout
        wanted = [single]
        if single not in there:
            wanted = sorted(read_index(repo.fetch(index, there[index], folder.name), there))
    elif (metadata := f"{STATE}/{METADATA}") in there:
        repo.fetch(metadata, there[metadata], folder.name)
        wanted = [f"{STATE}/{file}" for file in file_names(folder / STATE)]
    else:
        raise repo.has_no(f"{SINGLE}, no {INDEX} and no {metadata}", there)
    for file in wanted:
        if file not in there:
            raise repo.has_no(file, there)
    return wanted


def _absent(config: Path) -> str:
    """The first file of a snapshot's weights that isn't in it, as far as its files tell; "" if none."""
    folder = config.parent
    if config.name == "config.yaml" and any((folder / name).exists() for name in (SINGLE, PICKLED)):
        return ""
    files = [SINGLE]
    if layout := layout_of({entry.name for entry in folder.iterdir() if entry.exists()}):
        single, index, _ = layout
        files = [single] if (folder / single).exists() else sorted(read_index(folder / index))
    elif (folder / STATE / METADATA).exists():
        files = [f"{STATE}/{file}" for file in file_names(folder / STATE)]
    return next((file for file in files if not (folder / file).exists()), "")


def _free(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, or of the nearest one around it that is there."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
