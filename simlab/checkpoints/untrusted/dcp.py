"""torch distributed checkpoints: a pickled ``.metadata``, and files of torch.save archives.

The metadata says of each tensor its size, its chunks, and for each chunk a file, an offset and a
length, at which there is an archive of that chunk alone. Each claim is compared with the archive.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from simlab.checkpoints.storage import Piece, StoredFile, StoredTensor
from simlab.checkpoints.untrusted import pickle as pickles
from simlab.checkpoints.untrusted.files import checked_name, plain_name, read_bytes, refuse_pointer
from simlab.checkpoints.untrusted.pickle import PickledObject
from simlab.checkpoints.untrusted.torch_zip import open_archive, stored_tensor
from simlab.config import ConfigError
from simlab.config.fields import brief

METADATA = ".metadata"
# A chunk takes 69 steps, 33 objects and some 190 bytes, measured. OLMo 2 32B's and OLMo 3 32B's own
# training scripts shard 64 ways: 707 parameters and two moments of each are 136,000 chunks, 9.3 million
# steps, 4.4 million objects and 25 MB. Ten times as much would take 2 GB and 40 s, hostile or not.
METADATA_LIMIT = 32 << 20  # bytes
METADATA_BUDGET = pickles.Budget(steps=10_000_000, objects=4_600_000)
# Of a chunk's archive, which is one tensor's: its pickle, and bytes of its zip's directory, of which a
# real one takes 50 steps and 700 bytes. There may be 150,000 chunks.
CHUNK_LIMITS = pickles.Budget(steps=1000, objects=1000), 8 << 10


@dataclass(frozen=True)
class Chunk:
    """Part of a tensor: its place in the tensor and in a file."""

    name: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    path: Path
    offset: int
    length: int


def _fields(value: object, *names: str) -> dict[Any, Any]:
    """The fields of a pickled object of one of these classes; empty for any other value."""
    known = isinstance(value, PickledObject) and value.constructor.is_(*names)
    return value.fields() if isinstance(value, PickledObject) and known else {}


def _chunk_locations(
    stored: object, folder: Path, path: Path, without: tuple[str, ...] = ()
) -> dict[tuple[str, tuple[int, ...]], Any]:
    """(file, offset, length) of each chunk, by its tensor's name and its start there.

    without: of tensors whose names start with none of these.
    """
    places: dict[tuple[str, tuple[int, ...]], Any] = {}
    files: dict[str, Path] = {}  # there are many more chunks than files
    if not isinstance(stored, dict):
        raise ConfigError(f"{path}: has no storage_data")
    for key, value in stored.items():
        index, info = _fields(key, "MetadataIndex"), _fields(value, "_StorageInfo")
        name, file = index.get("fqn"), info.get("relative_path")
        if type(name) is not str or type(file) is not str:
            raise ConfigError(f"{path}: storage_data: an entry in it is malformed")
        if index.get("offset") is None or name.startswith(without):
            continue  # without an offset it is bytes, not a tensor
        what = f"{path}: {brief(name)}"
        if info.get("transform_descriptors"):
            raise ConfigError(f"{what}: transform_descriptors: compressed chunks are not supported")
        if file not in files:
            if not plain_name(file, ".distcp"):
                raise ConfigError(f"{what} is in {brief(file)}, which is not a .distcp file's name")
            files[file] = folder / file
        offset, length = info.get("offset"), info.get("length")
        if type(offset) is not int or type(length) is not int:
            raise ConfigError(f"{what}: offset and length must be integers")
        start = pickles.dimensions(index["offset"], what)
        places[name, start] = (files[file], offset, length)
    return places


def _dtype(properties: object, what: str) -> torch.dtype:
    state = properties.state if isinstance(properties, PickledObject) else None
    label = state[0] if type(state) is tuple and state else None
    if not isinstance(label, pickles.Label) or label.name not in pickles.DTYPE_BY_NAME:
        raise ConfigError(f"{what}: its properties have no dtype")
    dtype = pickles.DTYPE_BY_NAME[label.name]
    pickles.check_dtype(dtype, what)
    return dtype


def file_names(folder: Path) -> list[str]:
    """File names in a folder's ``.metadata``. Raises ConfigError."""
    metadata = _fields(_load(folder), "Metadata")
    path = folder / METADATA
    places = _chunk_locations(metadata.get("storage_data"), folder, path)
    return sorted({place[0].name for place in places.values()})


def _load(folder: Path) -> Any:
    path = folder / METADATA
    data = read_bytes(path, METADATA_LIMIT, "the metadata of a checkpoint")
    return pickles.load(data, path, METADATA_BUDGET)


@pickles.without_collections()
def read_distributed_checkpoint(folder: Path, without: tuple[str, ...]) -> dict[str, StoredTensor]:
    """The place of every tensor of the checkpoint whose name doesn't start with ``without``.

    Raises ConfigError, which names the tensor.
    """
    path = folder / METADATA
    metadata = _fields(_load(folder), "Metadata")
    described = metadata.get("state_dict_metadata")
    if not isinstance(described, dict) or not described:
        raise ConfigError(f"{path}: not the metadata of a distributed checkpoint")
    places = _chunk_locations(metadata.get("storage_data"), folder, path, without)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    chunks: list[Chunk] = []
    for name, value in described.items():
        checked_name(name, path)
        tensor_fields = _fields(value, "TensorStorageMetadata")
        if name.startswith(without) or not tensor_fields:
            continue
        what = f"{path}: tensor {brief(name)}"
        shape = pickles.dimensions(tensor_fields.get("size"), what)
        shapes[name] = (shape, _dtype(tensor_fields.get("properties"), what))
        chunks += _chunks(name, tensor_fields.get("chunks"), places, what)
    pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
    for chunk, piece in _open(chunks, {name: dtype for name, (_, dtype) in shapes.items()}):
        pieces[chunk.name].append(piece)
    return {
        name: StoredTensor(name, shape, dtype, tuple(sorted(pieces[name], key=lambda p: p.start)))
        for name, (shape, dtype) in shapes.items()
    }


def _chunks(name: str, chunks: object, places: dict[Any, Any], what: str) -> Iterator[Chunk]:
    if type(chunks) is not list or not chunks:
        raise ConfigError(f"{what} has no chunks")
    for chunk in chunks:
        fields = _fields(chunk, "ChunkStorageMetadata")
        start = pickles.dimensions(fields.get("offsets"), what)
        shape = pickles.dimensions(fields.get("sizes"), what)
        if (name, start) not in places:
            raise ConfigError(f"{what}: its chunk at {start} is in no file")
        yield Chunk(name, start, shape, *places[name, start])


def _open(chunks: list[Chunk], dtypes: dict[str, torch.dtype]) -> Iterator[tuple[Chunk, Piece]]:
    """Each chunk's bytes, file by file, after comparing the chunk's archive with the metadata."""
    by_path: dict[Path, list[Chunk]] = {}
    for chunk in chunks:
        by_path.setdefault(chunk.path, []).append(chunk)
    files: dict[Path, StoredFile] = {}
    for path, here in by_path.items():  # all of them first: else one run could be read for ever
        if not path.is_file():
            raise ConfigError(f"{path}: no such file, and {here[0].name} is in it")
        files[path], end = StoredFile(path), 0
        refuse_pointer(files[path].read(0, 64), path)
        for chunk in sorted(here, key=lambda c: c.offset):
            what = f"{path}: tensor {brief(chunk.name)}"
            if not 0 <= chunk.offset <= chunk.offset + chunk.length <= files[path].size:
                raise ConfigError(f"{what} reaches beyond the end of the file")
            if chunk.offset < end:
                raise ConfigError(f"{what} overlaps another")
            end = chunk.offset + chunk.length
    for path, here in sorted(by_path.items()):
        for chunk in here:
            what = f"{path}: tensor {brief(chunk.name)}"
            archive = open_archive(files[path], chunk.offset, chunk.length, *CHUNK_LIMITS)
            has = stored_tensor(archive, archive.value, chunk.name)
            if has.shape != chunk.shape or has.dtype != dtypes[chunk.name]:
                raise ConfigError(
                    f"{what}: is {has.shape}, not the {chunk.shape} that {METADATA} says"
                )
            yield chunk, Piece(files[path], has.pieces[0].offset, chunk.start, chunk.shape)
