"""Results on disk: written aside, flushed, renamed; known by the hash of what made them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from simlab.config import RunConfig


def config_hash(config: RunConfig) -> str:
    """16 hex digits over a resolved config, its device included: CPU and CUDA draw other weights.

    What a path leads to is not in it; a checkpoint's tensors have their own hash.
    """
    text = json.dumps(asdict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk, rename it to ``path``."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
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


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A readable JSON file."""
    text = json.dumps(_plain(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def summaries(folder: Path) -> dict[str, dict[str, Any]]:
    """Of a sweep's folder, each job's summary.json, in the order of their numbers."""
    jobs = [path.parent.name for path in folder.glob("*/summary.json")]
    return {
        job: json.loads((folder / job / "summary.json").read_text(encoding="utf-8"))
        for job in sorted(jobs, key=lambda name: (len(name), name))
    }


def same_weights(jobs: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """The weight hashes that more than one job's summary has, with these jobs.

    Some branches of published checkpoints hold the same bytes.
    """
    found: dict[str, list[str]] = {}
    for job, summary in jobs.items():
        if "weight_hash" in summary:
            found.setdefault(summary["weight_hash"], []).append(job)
    return {weights: jobs for weights, jobs in found.items() if len(jobs) > 1}


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """A tidy CSV; floats keep their digits."""
    write_atomically(path, lambda temporary: frame.to_csv(temporary, index=False))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
