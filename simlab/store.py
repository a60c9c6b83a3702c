"""Results on disk: written aside, flushed, renamed; known by the hash of what made them.

``Results`` keeps a sweep's results by that hash, a folder each, which appears whole or not at all; a
job's own folder gets links to its files.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simlab.config import RunConfig

if TYPE_CHECKING:
    import pandas as pd

SUMMARY = "summary.json"  # written last: where it is, the result is whole
PARTIAL = ".partial-"
STALE = 3600.0  # seconds; what a killed process has left is then removed
# Rooms (and modules at the root) that no result depends on: their code isn't part of a result's key. A
# test shows that the measuring code imports nothing from them.
NOT_RESULTS = (
    "report", "sweep", "regress", "__main__.py", "run.py", "sweeper.py", "pytest_plugin.py",
)  # fmt: skip
BELOW = ("torch", "numpy")  # packages whose versions are part of the key


def config_hash(config: RunConfig) -> str:
    """16 hex digits over a resolved config, with the kind of its device: CPU and CUDA draw other
    weights, which GPU of several does not matter.

    What a path leads to is not in it; a checkpoint's tensors have their own hash.
    """
    values = asdict(config) | {"device": config.device.split(":")[0]}
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
    moment leaves a whole result or none.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, key: str, weights: Callable[[], str] | None = None) -> Path | None:
        """The folder of a result, if there is one.

        weights: a checkpoint's weight hash, asked for only where a result is there to be compared.
        """
        folder = self.root / key
        try:
            summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
            whole = isinstance(summary, dict) and (folder / "curve.csv").stat().st_size > 0
        except (OSError, ValueError):
            return None
        if not whole:
            return None
        if weights is not None and summary.get("weight_hash") != weights():
            return None
        return folder

    def put(self, key: str, fill: Callable[[Path], None]) -> Path:
        """Let ``fill`` write a result's files into an empty folder, and keep that."""
        self.root.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{key}-", dir=self.root))
        folder = self.root / key
        try:
            fill(aside)
            aside.chmod(0o755)
            for path in aside.iterdir():
                path.chmod(0o444)
            flush(aside)
            self._replace(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return folder

    def _replace(self, aside: Path, folder: Path) -> None:
        """Rename ``aside`` to ``folder``, replacing what was there. Another process may do the same."""
        for _ in range(100):
            try:
                aside.rename(folder)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            old = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}old-", dir=self.root))
            with contextlib.suppress(OSError):  # another process has moved it
                folder.rename(old / "old")
            shutil.rmtree(old, ignore_errors=True)
        raise OSError(f"{folder}: can't be replaced")

    def clean(self) -> None:
        """Remove files that killed processes left behind."""
        for path in self.root.glob(f"{PARTIAL}*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE:
                    shutil.rmtree(path, ignore_errors=True)


def link(result: Path, folder: Path) -> None:
    """Give ``folder`` the files of a kept result, its summary last: hard links, so nothing is written.

    The files are read-only: editing one would edit the other. On another disk they are copies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in result.iterdir() if path.name != SUMMARY)
    for path in [*files, result / SUMMARY]:
        target = folder / path.name
        target.unlink(missing_ok=True)
        try:
            os.link(path, target)
        except OSError:
            write_atomically(target, functools.partial(_copy, path))


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def flush(folder: Path) -> None:
    """Flush a folder's entries to disk, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomically(path: Path, write: Callable[[Path], None], durable: bool = True) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk, rename it to ``path``.

    durable: flush; a file that can be made again at no cost needn't be.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """JSON has no inf or NaN: null stands for them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, values: dict[str, Any], durable: bool = True) -> None:
    """A readable JSON file."""
    text = json.dumps(_plain(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
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
