"""Small text files that strangers wrote, and the names in them: each mistake is one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from simlab.config import ConfigError
from simlab.config.fields import Fields, brief

# Bytes. Llama 3.1 405B, the deepest known model (126 blocks), has an index of 0.1 MB and a safetensors
# header of 0.15; a config has some kB. Measured, the worst file of this size takes a second.
JSON_LIMIT = 2 << 20
YAML_LIMIT = 1 << 20  # the largest official one has 0.2 MiB


def refuse_pointer(head: bytes, path: Path) -> None:
    """Refuse a file, by its first bytes, that git-lfs stands in for. Raises ConfigError."""
    if head.startswith(b"version https://git-lfs"):
        raise ConfigError(
            f"{path}: a git-lfs pointer, not the file: run git lfs pull in its folder"
        )


def read_bytes(path: Path, limit: int, what: str) -> bytes:
    """A small file. Raises ConfigError, also where it has more than ``limit`` bytes."""
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
        with path.open("rb") as file:
            data = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    refuse_pointer(data, path)
    if len(data) > limit:
        raise ConfigError(f"{path}: larger than {limit / (1 << 20):g} MiB, not {what}")
    return data


def read_text(path: Path, limit: int) -> str:
    """A small text file. Raises ConfigError."""
    try:
        return read_bytes(path, limit, "a config or an index").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises ConfigError."""
    return parse_object(read_bytes(path, JSON_LIMIT, "a config or an index"), path)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ConfigError where a key has two values: readers take either."""
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in pairs:
            if value != values[key]:
                raise ConfigError(f"the key {brief(key)} is there twice, with other values")
    return values


def parse_object(data: bytes, path: Path, what: str = "") -> dict[str, Any]:
    """The JSON object in some bytes. what: their name, if they aren't the whole file."""
    where = f"{path}: {what}{' is ' if what else ''}"
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}not UTF-8 text") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where}not a JSON object")
    return values


def fields_of(values: dict[str, Any], path: Path) -> Fields:
    """The fields of a file's object; a line names the file, quotes texts, and suggests nothing."""
    return Fields(values, f"{path}: ", brief, lambda name, allowed: "")


def plain_name(name: object, ending: str) -> bool:
    """True if a stranger's file name is one in its own folder, and can be shown and opened."""
    if not isinstance(name, str) or not (name.isascii() and name.isprintable() and len(name) < 200):
        return False
    return name.endswith(ending) and not {"/", "\\"} & set(name) and name != ending


def checked_name(name: object, path: Path) -> str:
    """A tensor's name that can be shown in a line. Raises ConfigError."""
    if not isinstance(name, str) or not name.isprintable() or len(name) > 200:
        raise ConfigError(f"{path}: {brief(name)}: not a tensor's name")
    return name
