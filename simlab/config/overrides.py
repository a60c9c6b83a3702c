"""Values of Python as the command line's overrides, in Hydra's grammar."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simlab.config.command_line import quoted
from simlab.config.errors import ConfigError

# What Hydra's grammar reads as the same text without quotes.
_PLAIN = re.compile(
    r"(?!(?:true|false|null|nan|inf)$)[a-z_./](?:[a-z0-9_./@% -]*[a-z0-9_./@%-])?", re.IGNORECASE
)


def as_overrides(keys: Mapping[str, Any], above: str = "") -> list[str]:
    """A dict of keys and values as the command line's overrides: ``{"depth": 8}`` as ``depth=8``."""
    given: list[str] = []
    for key, value in keys.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            given += as_overrides(value, f"{name}.")
        else:
            given.append(f"{name}={in_hydra(name, value)}")
    return given


def in_hydra(key: str, value: Any) -> str:
    """A value in Hydra's grammar. Raises ConfigError for what no config can hold."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        text = str(value)
        return text if _PLAIN.fullmatch(text) else quoted(text)
    if isinstance(value, Sequence | range | np.ndarray):
        return "[" + ",".join(in_hydra(key, each) for each in value) + "]"
    raise ConfigError(
        f"{key}={value!r}: a {type(value).__name__}; allowed: numbers, texts, true, false, lists"
    )
