"""Reading what strangers wrote: JSON objects and numbers, each mistake one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simlab.config import ConfigError

MOST = 10**9  # of any number in a config
JSON_LIMIT = 64 << 20  # bytes; an index of a million tensors is smaller


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises ConfigError."""
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
        if path.stat().st_size > JSON_LIMIT:
            raise ConfigError(
                f"{path}: larger than {JSON_LIMIT >> 20} MiB, not a config or an index"
            )
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
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


def brief(value: object) -> str:
    """A stranger's value as it can be shown: its first 60 characters, without control codes."""
    text = (
        repr(value)[:60] if not isinstance(value, int) or abs(value) < 10**60 else "a huge integer"
    )
    return text if len(text) < 60 else text + "…"
