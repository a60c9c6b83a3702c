"""Checkpoint formats: one module and one key map each, one dict that names them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from simlab.checkpoints.formats import gguf, hugging_face, legacy_olmo, olmo_core
from simlab.checkpoints.formats.layouts import INDEX, instead, unwrapped
from simlab.checkpoints.formats.opened import Opened
from simlab.checkpoints.formats.own_init import OwnInit
from simlab.checkpoints.untrusted.safetensors import read_header
from simlab.config import ConfigError, ModelConfig

# A format's test of a folder or file, and its reader; the first format whose test passes reads it.
FORMATS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], Opened]]] = {
    "gguf": (gguf.matches, gguf.open_file),
    "olmo_core": (olmo_core.matches, olmo_core.open_folder),
    "legacy_olmo": (legacy_olmo.matches, legacy_olmo.open_folder),
    "hugging_face": (hugging_face.matches, hugging_face.open_folder),
}


_MOST_TENSORS = 100_000  # of a checkpoint that isn't here; its depth is bounded by it


def read_shape(folder: Path) -> tuple[ModelConfig, OwnInit]:
    """The shape and the init of a checkpoint whose weights may be missing, from its config alone.

    Raises ConfigError as ``open_folder`` does, for what its config shows.
    """
    path = folder / "config.json"
    if (folder / "config.yaml").is_file() and not path.is_file():
        model, _, init = legacy_olmo.read_config(folder / "config.yaml", _MOST_TENSORS)
    elif olmo_core.matches(folder):
        model, _, init = olmo_core.read_config(path, _MOST_TENSORS)
    else:
        model, _, init = hugging_face.read_config(path, _MOST_TENSORS)
    return model, init


def _configs(folder: Path) -> list[str]:
    """The names of the config files in a folder: config.yaml, config.json, both or none."""
    return [name for name in ("config.yaml", "config.json") if (folder / name).is_file()]


def _is_hugging_faces(folder: Path) -> bool:
    """Of a folder with both configs, whose the weights are. Raises ConfigError where they are both's.

    Conversion writes Hugging Face's files beside the old trainer's; and a repository in Hugging Face's
    layout may have a config.yaml of another program.
    """
    if len(_configs(folder)) < 2:
        return False
    single, pickled = folder / "model.safetensors", folder / "model.pt"
    held = unwrapped(read_header(single), folder) if single.is_file() else {}
    old = "transformer.wte.weight" in held
    if (old or pickled.is_file()) and ((held and not old) or (folder / INDEX).is_file()):
        raise ConfigError(
            f"{folder}: holds weights for both config.yaml (the old OLMo trainer's) and config.json "
            "(Hugging Face's): move one config away to choose the other"
        )
    return not old and not pickled.is_file()


def open_folder(folder: Path) -> Opened:
    """Open a checkpoint of any format, a folder or one file. Raises ConfigError for what is wrong."""
    for name, (matches, opener) in FORMATS.items():
        if matches(folder) and (name != "legacy_olmo" or not _is_hugging_faces(folder)):
            opened = opener(folder)
            others, lines = {*_configs(folder)} - {opened.config.name}, [opened.unread]
            if others and name != "olmo_core":
                lines.insert(0, f"read as {opened.config.name} says; not read: {others.pop()}")
            tensors = unwrapped(opened.tensors, folder)
            # Where the head is tied, a stored one is only read to see that it is the embedding.
            head = tensors.pop(opened.keys["head.weight"], None) if opened.model.tied else None
            embedding = tensors.get(opened.keys["embedding.weight"])
            if head and embedding and head.pieces != embedding.pieces:
                lines.append(
                    f"not used: {head.name}, for {opened.config.name} ties the head to the embedding"
                )
            if opened.other_head:
                lines.append(f"not used: {opened.other_head}, another task's head")
            return replace(
                opened, tensors=tensors, head=head, unread="; ".join(filter(None, lines))
            )
    raise ConfigError(
        f"{folder}: holds no checkpoint: no config.json, config.yaml or .metadata"
        f"{instead(entry.name for entry in folder.iterdir())}"
    )
