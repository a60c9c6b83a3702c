"""Results on disk: written aside, flushed, renamed; known by the hash of what made them.

``Results`` keeps a sweep's results by that hash, a folder each, which appears whole or not at all, and
is used only while its files are the ones that were kept; a job's own folder gets copies.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simlab.checkpoints.untrusted.files import parse_object, read_bytes
from simlab.config import ConfigError, RunConfig

if TYPE_CHECKING:
    import pandas as pd

try:
    import fcntl
except ImportError:  # Windows has neither such locks nor reflinks
    fcntl = None  # type: ignore[assignment]  # a module's name, for where there is none

SUMMARY = "summary.json"  # written last: where it is, the result is whole
# What its writer locks while it fills it. A lock is seen on one machine for sure, hence the name in it.
PARTIAL = ".partial-"
HERE = f"{PARTIAL}{re.sub('[^A-Za-z0-9]', '_', platform.node())}-"
STALE = 3600.0  # seconds; where no lock can tell, what is older was left by a killed process
FICLONE = (
    0x40049409  # Linux's ioctl that gives a file the blocks of another, until either is written
)
# Of a JSON file of ours. The plan of the most jobs that a sweep may have, 10,000, takes some 10 MB.
_MOST_BYTES, _MOST_DEPTH = 32 << 20, 100
# The keys that keeping a result adds to its summary.
FILES, KEY, SEAL = "files", "result_key", "summary_hash"
UNSEALED = f"{SUMMARY} has no hashes, as of an earlier version"
# Rooms (and modules at the root) that no result depends on: their code isn't part of a result's key. A
# test shows that the measuring code imports nothing from them.
NOT_RESULTS = (
    "report", "sweep", "regress", "trackers", "__main__.py", "results", "api.py", "run.py",
    "sweeper.py", "pytest_plugin.py",
)  # fmt: skip
BELOW = ("torch", "numpy")  # packages whose versions are part of the key


def config_hash(config: RunConfig) -> str:
    """16 hex digits over a resolved config, with the kind of its device: CPU and CUDA draw other
    weights, which GPU of several does not matter.

    What a path leads to is not in it; a checkpoint's tensors have their own hash.
    """
    values = asdict(config) | {"device": config.device.split(":")[0]}
    del values["source"]["keep"]  # of the download, not of the run
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def result_code() -> list[Path]:
    """The source files that results depend on."""
    root = Path(__file__).parent
    files = sorted(root.rglob("*.py"))
    return [path for path in files if path.relative_to(root).parts[0] not in NOT_RESULTS]


@functools.cache
def code_hash() -> str:
    """Part of a result's key: results of another simlab, torch or NumPy version are not reused."""
    digest = hashlib.sha256(" ".join(map(version, BELOW)).encode())
    for path in result_code():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def result_key(config: RunConfig, tokens: bytes) -> str:
    """The key of a result, 32 hex digits over the resolved config, the token ids and simlab's code.

    A checkpoint's path is part of it and its weights are not; ``Results.find`` compares those.
    """
    digest = hashlib.sha256(f"{config_hash(config)}/{code_hash()}/".encode())
    digest.update(tokens)
    return digest.hexdigest()[:32]


class Results:
    """Results by key, a folder each. Safe with any number of processes, on a shared disk too.

    A folder is filled under another name, flushed to disk, and renamed: a process that is killed at any
    moment leaves a whole result or none. spoiled: why a result that is there isn't used, by its key.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.spoiled: dict[str, str] = {}

    def find(self, key: str, weights: Callable[[], str] | None = None) -> Path | None:
        """The folder of a result, if there is one and its files are the ones that were kept.

        weights: a checkpoint's weight hash, asked for only where a result is there to be compared.
        """
        folder = self.root / key
        if not os.path.lexists(folder):
            return None
        try:
            summary = verified(folder)
            if summary.get(KEY) != key:
                raise ValueError(f"{SUMMARY} is another result's")
        except (OSError, ValueError) as error:
            self.spoiled[key] = _reason(error)
            return None
        if weights is not None and summary.get("weight_hash") != weights():
            return None
        return folder

    def put(self, key: str, fill: Callable[[Path], object], summary: Mapping[str, Any]) -> Path:
        """Let ``fill`` write a result's tables into an empty folder, and keep it with its summary."""
        self.root.mkdir(parents=True, exist_ok=True)
        folder = self.root / key
        with scratch(self.root, key, Path.mkdir) as aside:
            fill(aside)
            hashes = {path.name: file_hash(path) for path in sorted(aside.iterdir())}
            sealed = {**summary, KEY: key, FILES: hashes}
            write_json(aside / SUMMARY, sealed | {SEAL: _content_hash(sealed)})
            for path in aside.iterdir():
                path.chmod(path.stat().st_mode & 0o444)
            flush(aside)
            self._replace(aside, folder)
        return folder

    def _replace(self, aside: Path, folder: Path) -> None:
        """Rename ``aside`` to ``folder``, replacing what was there. Another process may do the same."""
        for _ in range(100):
            try:
                aside.rename(folder)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
            with (
                scratch(self.root, "old", Path.mkdir) as old,
                contextlib.suppress(OSError),  # another process has moved it
            ):
                folder.rename(old / "old")
        raise OSError(f"{folder}: can't be replaced")

    def clean(self) -> None:
        """Remove what killed processes left behind."""
        remove_left(self.root)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of ours, which someone may have changed. Raises ConfigError."""
    whole = parse_object(read_bytes(path, _MOST_BYTES, "what simlab writes"), path)
    level: list[Any] = [whole]
    for _ in range(_MOST_DEPTH):
        lists = [each.values() if isinstance(each, dict) else each for each in level]
        level = [one for each in lists for one in each if isinstance(one, dict | list)]
        if not level:
            return whole
    raise ConfigError(f"{path}: nested deeper than anything that simlab writes")


def file_hash(path: Path) -> str:
    """A file's SHA-256, as ``sha256sum`` prints it. Raises OSError, also for a pipe."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content_hash(summary: Mapping[str, Any]) -> str:
    """The SHA-256 of a summary's content, whatever its layout as a file."""
    content = json.loads(json.dumps(plain_values(dict(summary))))
    content.pop(SEAL, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verified(folder: Path) -> dict[str, Any]:
    """The summary in a kept result's or a job's folder, once it and its files fit their hashes.

    Raises OSError, and ValueError with what doesn't fit.
    """
    try:
        summary = read_object(folder / SUMMARY)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix(f"{folder}{os.sep}")) from error
    files = summary.get(FILES)
    if not {FILES, KEY, SEAL} & summary.keys():
        raise ValueError(UNSEALED)
    if not isinstance(files, dict) or summary.get(SEAL) != _content_hash(summary):
        raise ValueError(f"{SUMMARY} has changed")
    for name, known in files.items():
        if Path(name).name != name or file_hash(folder / name) != known:
            raise ValueError(f"{name} has changed")
    return summary


def spoiled(folder: Path, hashes: Collection[str]) -> str | None:
    """Why the files in a job's folder aren't the ones that it wrote; None where they are.

    hashes: the config hashes that the job may have. None of a sweep of an earlier version: its files
    may have no hashes either, and are then taken as they are.
    """
    try:
        summary = verified(folder)
    except (OSError, ValueError) as error:
        return None if not hashes and str(error) == UNSEALED else _reason(error)
    if hashes and summary.get("config_hash") not in hashes:
        return f"{SUMMARY} is another job's"
    return None


def _reason(error: OSError | ValueError) -> str:
    """Why a result can't be used, in words that several results may share."""
    if isinstance(error, OSError):
        name = Path(error.filename).name if error.filename else SUMMARY
        return f"{name}: {error.strerror}"
    return str(error)


def copy_result(result: Path, folder: Path) -> None:
    """Give ``folder`` copies of a kept result's files, its summary last.

    A copy takes no room until it is edited, where the disk has reflinks. Not hard links: whoever edits
    one edits the other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary = read_object(result / SUMMARY)
    for name in [*summary[FILES], SUMMARY]:  # nothing else that may lie there
        write_atomically(folder / name, functools.partial(_copy, result / name), durable=False)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as old, target.open("wb") as new:
        try:
            fcntl.ioctl(new.fileno(), FICLONE, old.fileno())
        except (AttributeError, OSError):  # no such call, or another kind of disk
            shutil.copyfileobj(old, new)


def flush(folder: Path) -> None:
    """Flush a folder's entries to disk, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def scratch(folder: Path, name: str, make: Callable[[Path], None]) -> Iterator[Path]:
    """A new file or folder in ``folder``, made by ``make``, locked in this block and then removed.

    The end of ``name`` ends its name: all of it may be as long as a name may be. What killed processes
    left in ``folder`` goes.
    """
    remove_left(folder)
    while True:
        path = folder / f"{HERE}{secrets.token_hex(6)}-{name[-40:]}"
        make(path)
        try:
            with locked(path) as mine:
                if mine is not False and path.exists():  # nobody removed it before it was locked
                    yield path
                    return
        finally:
            remove(path)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool | None]:
    """Lock a file or folder for this block, or until this process dies.

    Yields True, or False where another process has locked it, or None where there are no locks.
    """
    handle, mine = None, None
    if fcntl is not None:
        with contextlib.suppress(OSError):  # it has just been removed
            handle = os.open(path, os.O_RDONLY)
    try:
        if handle is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = True
            except BlockingIOError:
                mine = False
            except OSError:  # some network disks have none, or none of folders
                pass
        yield mine
    finally:
        if handle is not None:
            os.close(handle)


def remove_left(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder, and nothing that is being written."""
    for path in folder.glob(f"{PARTIAL}*"):
        with contextlib.suppress(OSError), locked(path) as mine:
            known = mine is not None and path.name.startswith(HERE)
            old = time.time() - path.stat().st_mtime > STALE
            if mine if known else old and mine is not False:
                remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def make_way(path: Path) -> None:
    """Rename what stands where simlab must write: whose it is, isn't known, so it stays beside."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.aside-{number}")):
        number += 1
    path.rename(aside)


def write_atomically(path: Path, write: Callable[[Path], None], durable: bool = True) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk, rename it to ``path``.

    durable: flush; a file that can be made again at no cost needn't be.
    """
    with scratch(
        path.parent, path.name, functools.partial(Path.touch, exist_ok=False)
    ) as temporary:
        write(temporary)
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        try:
            temporary.replace(path)
        except IsADirectoryError:
            make_way(path)
            temporary.replace(path)


def plain_values(value: Any) -> Any:
    """JSON has no inf or NaN: null stands for them."""
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, values: dict[str, Any], durable: bool = True) -> None:
    """A readable JSON file."""
    text = json.dumps(plain_values(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: write_text(temporary, text), durable)


def same_weights(jobs: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """The weight hashes that more than one job's summary has, with these jobs.

    Some branches of published checkpoints hold the same bytes.
    """
    folders: dict[str, list[str]] = {}
    for job, summary in jobs.items():
        if "weight_hash" in summary:
            folders.setdefault(summary["weight_hash"], []).append(job)
    return {weights: jobs for weights, jobs in folders.items() if len(jobs) > 1}


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """A tidy CSV; floats keep their digits."""
    write_atomically(path, lambda temporary: frame.to_csv(temporary, index=False))


def read_csv(path: Path) -> pd.DataFrame:
    """Read a file of ``write_csv``; floats are read exactly, and an empty column is NaN."""
    import pyarrow
    import pyarrow.csv

    table = pyarrow.csv.read_csv(path)
    fields = [
        pyarrow.field(f.name, pyarrow.float64() if pyarrow.types.is_null(f.type) else f.type)
        for f in table.schema
    ]
    frame: pd.DataFrame = table.cast(pyarrow.schema(fields)).to_pandas()
    return frame


def write_text(path: Path, text: str) -> None:
    """UTF-8, whatever the system's own encoding."""
    path.write_text(text, encoding="utf-8")
