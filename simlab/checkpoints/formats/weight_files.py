"""The files of weights in Hugging Face's layout: one, or shards and the index that names them."""

from __future__ import annotations

import fnmatch
from collections.abc import Container, Mapping
from pathlib import Path

import torch

from simlab.checkpoints.formats.layouts import INDEX, SHARDS, instead
from simlab.checkpoints.storage import StoredTensor
from simlab.checkpoints.untrusted.files import plain_name, read_json
from simlab.checkpoints.untrusted.safetensors import read_header
from simlab.checkpoints.untrusted.torch_zip import read_torch_file
from simlab.config import ConfigError
from simlab.config.fields import brief

# A single file, the index of several, and what those are called. Older checkpoints are pickles, whose
# tensors are found without running them; transformers, too, prefers the others.
LAYOUTS = (
    ("model.safetensors", INDEX, SHARDS),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)


def layout_of(names: Container[str]) -> tuple[str, str, str] | None:
    """The layout of a folder with files of these names."""
    return next((one for one in LAYOUTS if one[0] in names or one[1] in names), None)


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The files of weights of a checkpoint folder and the tensors that its index puts in each.

    None stands for "whatever is in it" (a single file, without an index). Raises ConfigError.
    """
    there = {entry.name for entry in folder.iterdir()}
    layout = layout_of({name for name in there if (folder / name).is_file()})
    if layout is None:
        found = instead(there)
        raise ConfigError(f"{folder}: holds neither {LAYOUTS[0][0]} nor {INDEX}{found}")
    single, index = (folder / name for name in layout[:2])
    if single.is_file():
        return {single: None}
    files = read_index(index, there)
    counts = {file.partition("-of-")[2] for file in files}
    for name in sorted({*fnmatch.filter(there, layout[2])} - files.keys()):
        if name.partition("-of-")[2] in counts:  # of another count it is another save's
            raise ConfigError(
                f"{folder / name}: a shard of the same checkpoint as those in {index.name}, which "
                "doesn't mention it: get the index that belongs to the shards"
            )
    return {folder / file: names for file, names in files.items()}


def read_index(index: Path, there: Container[str] | None = None) -> dict[str, set[str]]:
    """The file names in an index, with the tensors that it puts in each. Raises ConfigError.

    there: the names of the files that there are; None: not asked.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index}: has no weight_map")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not plain_name(
            file, ".bin" if index.name.endswith(".bin.index.json") else ".safetensors"
        ):
            raise ConfigError(
                f"{index}: {brief(name)} is in {brief(file)}, which is not a file name"
            )
        if there is not None and file not in there:  # before a million that aren't are listed
            raise ConfigError(f"{index.parent / file}: no such file, and {brief(name)} is in it")
        files.setdefault(file, set()).add(name)
    return files


def tensors(
    files: Mapping[Path, set[str] | None], more: Mapping[str, torch.dtype] | None = None
) -> dict[str, StoredTensor]:
    """Where every tensor of some ``weight_files`` lies. Raises ConfigError.

    more: dtypes that are allowed besides those of weights, as ``read_header`` takes them.
    """
    places: dict[str, StoredTensor] = {}
    for path, claimed in files.items():
        if path.suffix == ".bin":
            held = read_torch_file(path, (more or {}).values())
        else:
            held = read_header(path, more)
        for name in sorted((claimed or set()) - held.keys()):
            raise ConfigError(f"{path}: {brief(name)} is missing, which the index puts there")
        for name in sorted(held.keys() - (held.keys() if claimed is None else claimed)):
            raise ConfigError(f"{path}: holds {brief(name)}, which the index doesn't put there")
        places |= held
    return places
