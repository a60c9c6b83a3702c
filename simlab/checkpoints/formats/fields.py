"""Reading what strangers wrote: JSON objects and numbers, each mistake one line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from simlab.config import ConfigError, divides, nearest

MOST = 10**9  # of any number in a config
JSON_LIMIT = 64 << 20  # bytes; an index of a million tensors is smaller
YAML_LIMIT = 1 << 20  # the largest official one has 0.2 MiB
ABOVE_1 = 1.000001  # the least useful rope_theta


def read_text(path: Path, limit: int) -> str:
    """A small text file. Raises ConfigError."""
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
        if path.stat().st_size > limit:
            raise ConfigError(f"{path}: larger than {limit >> 20} MiB, not a config or an index")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises ConfigError."""
    text = read_text(path, JSON_LIMIT)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return values


def positive(values: dict[str, Any], key: str, path: Path, default: Any = None) -> int:
    """An integer from 1 to MOST; a missing or null one is the default. Raises ConfigError."""
    value = values.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise ConfigError(f"{path}: {key}={brief(value)}: must be an integer from 1 to {MOST}")
    return value


def number(
    values: dict[str, Any], key: str, path: Path, default: Any = None, low: float = 0.0
) -> float:
    """A number from low to MOST; a missing or null one is the default. Raises ConfigError."""
    value = values.get(key)
    value = default if value is None else value
    bad = isinstance(value, bool) or not isinstance(value, int | float)
    if bad or not low <= value <= MOST:  # which no NaN is
        raise ConfigError(
            f"{path}: {key}={brief(value)}: must be a number from {low:g} to {MOST:g}"
        )
    return float(value)


def layers(values: dict[str, Any], key: str, path: Path, tensors: int) -> int:
    """The number of blocks, which the tensors' number bounds before anything is made per block."""
    depth = positive(values, key, path)
    if depth > tensors:
        raise ConfigError(f"{path}: {key}={depth}, but the checkpoint holds {tensors} tensors")
    return depth


def flag(values: dict[str, Any], key: str, path: Path, default: bool) -> bool:
    """true or false; a missing or null one is the default. Raises ConfigError."""
    value = values.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ConfigError(f"{path}: {key}={brief(value)}: must be true or false")
    return value


def choice(
    values: dict[str, Any], key: str, path: Path, allowed: Iterable[str], default: str | None
) -> str:
    """One of the allowed words; a missing or null one is the default. Raises ConfigError."""
    value = values.get(key)
    value = default if value is None else value
    allowed = tuple(allowed)
    if not isinstance(value, str) or value not in allowed:
        hint = nearest(value, allowed) if isinstance(value, str) and len(value) < 100 else ""
        raise ConfigError(f"{path}: {key}={brief(value)}: allowed: {', '.join(allowed)}{hint}")
    return value


def section(values: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    """An object; a missing or null one is empty. Raises ConfigError."""
    value = values.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {key}={brief(value)}: must be an object")
    return value


def only(values: dict[str, Any], path: Path, **allowed: object) -> None:
    """Refuse keys whose value is neither the one allowed nor null, naming both. Raises ConfigError.

    The allowed value is the one that leaves what simlab computes as it is.
    """
    for key, wanted in allowed.items():
        value = values.get(key)
        if value is not None and (
            isinstance(value, bool) != isinstance(wanted, bool) or value != wanted
        ):
            shown = "null" if wanted is None else json.dumps(wanted)
            raise ConfigError(f"{path}: {key}={brief(value)}: not supported; allowed: {shown}")


def head_shape(
    values: dict[str, Any],
    path: Path,
    names: tuple[str, str, str, str],
    kv_default: int | None = None,
) -> tuple[int, int, int, int]:
    """Width, heads, key/value heads and head_dim, of which the first two decide the others' defaults.

    names: what the format calls them. Raises ConfigError where they don't divide.
    """
    width, heads = positive(values, names[0], path), positive(values, names[1], path)
    kv_heads = positive(values, names[2], path, kv_default or heads)
    divides(f"{path}: {names[2]}", kv_heads, names[1], heads)
    if values.get(names[3]) is None:
        divides(f"{path}: {names[1]}", heads, names[0], width)
    head_dim = positive(values, names[3], path, width // heads or 1)
    if head_dim % 2:
        raise ConfigError(f"{path}: {names[3]}={head_dim}: must be even, RoPE turns pairs")
    if heads * head_dim > MOST:
        raise ConfigError(
            f"{path}: {names[1]}={heads} {names[3]}={head_dim}: together at most {MOST}"
        )
    return width, heads, kv_heads, head_dim


def plain_name(name: object, ending: str) -> bool:
    """Whether a stranger's file name is one in its own folder, and can be shown and opened."""
    if not isinstance(name, str) or not (name.isascii() and name.isprintable() and len(name) < 200):
        return False
    return name.endswith(ending) and not {"/", "\\"} & set(name) and name != ending


def checked_name(name: object, path: Path) -> str:
    """A tensor's name that can be shown in a line. Raises ConfigError."""
    if not isinstance(name, str) or not name.isprintable() or len(name) > 200:
        raise ConfigError(f"{path}: {brief(name)}: not a tensor's name")
    return name


def brief(value: object) -> str:
    """A stranger's value as it can be shown: its first 60 characters, without control codes."""
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a huge integer"
    if isinstance(value, str):
        value = value[:100]
    elif not isinstance(value, int | float | dict | list | None):
        return f"a {type(value).__name__}"  # the copies in a pickle's tuples may have no end
    text = repr(value)[:60]
    return text if len(text) < 60 else text + "…"
