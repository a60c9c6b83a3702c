"""A hub's repository at a revision: its list of files, and their way into the hub's local cache."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but not in its __all__
    WeakFileLock,
    build_hf_headers,
)

from simlab import store
from simlab.checkpoints.formats.layouts import instead
from simlab.checkpoints.formats.olmo_core import STATE
from simlab.checkpoints.hub_client import as_given, ask, told
from simlab.checkpoints.untrusted.dcp import METADATA, METADATA_LIMIT
from simlab.checkpoints.untrusted.files import JSON_LIMIT
from simlab.config import ConfigError

# Bytes that simlab reads of a small file; others are JSON, or a config.yaml, of which it reads less.
_LIMITS = {f"{STATE}/{METADATA}": METADATA_LIMIT}
_LIST_LIMIT = 32 << 20  # bytes of a list of files, of which each takes some 300
_Answer = TypeVar("_Answer")


class Stored(NamedTuple):
    """A file as the repository's list has it."""

    size: int  # bytes; 0 where the hub doesn't say
    sha256: str  # of a large file (git-lfs, Xet); else empty


def partial(stored: Stored, snapshot: Path) -> Path:
    """Where what has come of a large file is, until it is all of it."""
    return snapshot.parents[1] / "blobs" / f"{stored.sha256}.incomplete"


@dataclass(frozen=True)
class Repository:
    """A repository's revision, as the user names it."""

    id: str
    revision: str | None

    def list(self, absent: str) -> dict[str, Stored]:
        """The files. Raises ConfigError.

        absent: the file for which the hub is asked.
        """

        def call() -> dict[str, Stored]:
            info = HfApi().model_info(self.id, revision=self.revision, files_metadata=True)
            if info.siblings is None:
                raise ValueError("no list of files")
            return {
                file.rfilename: Stored(
                    int(file.size or 0),
                    file.lfs.sha256
                    if file.lfs and re.fullmatch("[0-9a-f]{64}", file.lfs.sha256)
                    else "",
                )
                for file in info.siblings
            }

        return ask(self.id, self.revision, absent, call, _LIST_LIMIT, tries=1)

    def cached(self, file: str) -> Path | None:
        """A file in the hub's cache."""
        try:
            path = try_to_load_from_cache(self.id, file, revision=self.revision)
        except HFValidationError:  # reported by the fetch
            return None
        return Path(path) if isinstance(path, str) else None  # it also says "not in the repository"

    def fetch(
        self, file: str, stored: Stored, commit: str | None = None, limit: int | None = None
    ) -> Path:
        """Fetch a small file to the hub's cache. Raises ConfigError, at once where it is too large.

        commit: of a snapshot that is here; else the revision's, which the cache then knows. limit:
        bytes, where they are another file's than the format's.
        """
        limit = limit or _LIMITS.get(file, JSON_LIMIT)
        if stored.size > limit:
            raise self._error(
                f"{file} has {stored.size} bytes; simlab reads {limit / (1 << 20):g} MiB of one at most"
            )
        return self._download(file, limit, commit)

    def fetch_weights(self, file: str, stored: Stored, snapshot: Path) -> None:
        """Fetch a file of weights to a snapshot in the hub's cache. Raises ConfigError.

        huggingface_hub's download begins anew in each process, and removes what has come at an error.
        So the bytes come here, to where the cache has a file's bytes under their hash (as documented),
        and huggingface_hub finds them there.
        """
        if not stored.sha256:
            self._download(file, stored.size or shutil.disk_usage(snapshot).free, snapshot.name)
            return
        part = partial(stored, snapshot)
        blob = part.with_suffix("")
        lock = Path(constants.HF_HUB_CACHE, ".locks", snapshot.parents[1].name, f"{blob.name}.lock")
        try:
            for path in (blob, lock):
                path.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(lock):  # huggingface_hub's for this file
                if not blob.exists():
                    self._append(file, stored, snapshot.name, part)
                    part.replace(blob)
        except OSError as error:
            raise told(self.id, self.revision, file, error) from error
        if not self._download(file, stored.size, snapshot.name).is_symlink():
            blob.unlink()  # Windows allows links to some users only: it was copied

    def fetch_aside(self, file: str, stored: Stored, commit: str, folder: Path) -> None:
        """Fetch a file of weights to a folder that isn't the cache. Raises ConfigError."""
        if stored.sha256:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            self._append(file, stored, commit, folder / file)
        else:
            self._download(file, stored.size or shutil.disk_usage(folder).free, commit, folder)

    def _append(self, file: str, stored: Stored, commit: str, part: Path) -> None:
        """Add to ``part`` what it lacks of a large file. Raises ConfigError; what has come stays."""
        if stored.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
            raise self._error(
                f"{file} has {stored.size / 1e9:.0f} GB, which the hub gives by its own protocol (Xet) "
                f"alone: `hf download {self.id} --revision {commit}` brings it to the local cache"
            )

        def call() -> None:
            with part.open("ab") as output:
                try:
                    http_get(
                        hf_hub_url(self.id, file, revision=commit),
                        output,
                        resume_size=output.tell(),
                        headers=build_hf_headers(),
                        expected_size=stored.size,
                    )
                except OSError as error:
                    if type(error) is OSError and error.errno is None:  # another size: another file
                        output.truncate(0)
                    raise

        before = part.stat().st_size if part.exists() else 0
        if before > stored.size:
            part.unlink()
        self._ask(file, call, stored.size)
        if store.file_hash(part) != stored.sha256:
            part.unlink()
            if not before:
                raise self._error(
                    f"{file} has arrived with another hash than the hub names; try again"
                )
            self._append(file, stored, commit, part)  # what an earlier run has left was wrong

    def has_no(self, files: str, names: Iterable[str] = ()) -> ConfigError:
        """The error that it has not got some files; names: the files that it has."""
        return self._error(f"the repository has no {files}{instead(names)}")

    def _download(
        self, file: str, limit: int, commit: str | None, folder: Path | None = None
    ) -> Path:
        """huggingface_hub's download: to its cache, or to a folder."""

        def call() -> str:
            revision = commit or self.revision
            return str(hf_hub_download(self.id, file, revision=revision, local_dir=folder))

        return Path(self._ask(file, call, limit))

    def _ask(self, file: str, call: Callable[[], _Answer], most: int) -> _Answer:
        try:
            return ask(self.id, self.revision, file, call, most)
        except RemoteEntryNotFoundError as error:
            raise self.has_no(file) from error

    def _error(self, text: str) -> ConfigError:
        return ConfigError(f"{as_given(self.id, self.revision)}: {text}")
