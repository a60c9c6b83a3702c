"""Checkpoint formats: one module and one key map each, one dict that names them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from simlab.checkpoints.formats import hugging_face, legacy_olmo, olmo_core
from simlab.checkpoints.formats.opened import Opened
from simlab.config import ConfigError

# Whether a folder is of the format, and how it is opened. The first that says yes is taken.
FORMATS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], Opened]]] = {
    "olmo_core": (olmo_core.found, olmo_core.open_folder),
    "legacy_olmo": (legacy_olmo.found, legacy_olmo.open_folder),
    "hugging_face": (hugging_face.found, hugging_face.open_folder),
}


def open_folder(folder: Path) -> Opened:
    """Open a checkpoint folder of any format. Raises ConfigError, one line, for what is wrong."""
    for found, opener in FORMATS.values():
        if found(folder):
            return opener(folder)
    raise ConfigError(f"{folder}: holds no checkpoint: no config.json, config.yaml or .metadata")
