"""torch.save's archives: a zip whose records are a pickle and the tensors' bytes, uncompressed.

zipfile finds the records. Every claim of the zip and of the pickle is checked against the file; no
tensor's bytes are read.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from simlab.checkpoints.storage import StoredFile, StoredTensor, in_one_piece
from simlab.checkpoints.untrusted import pickle as pickles
from simlab.checkpoints.untrusted.files import checked_name, refuse_pointer
from simlab.checkpoints.untrusted.pickle import PickledObject, StorageLabel
from simlab.config import ConfigError
from simlab.config.fields import brief

# All that zipfile raises for bytes that are no archive: BadZipFile where it checks, NotImplementedError
# for a version or a compression that it doesn't know, struct.error, IndexError and ValueError where it
# unpacks fields without checking, OSError for an offset outside the file.
_MALFORMED = (
    zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, IndexError, OSError,
)  # fmt: skip
DIRECTORY_LIMIT = 2 << 20  # bytes; some 30,000 records, of which each tensor is one
PICKLE_LIMIT = 4 << 20
# Of an archive's pickle: a tensor takes about 50 steps and 20 objects.
PICKLE_BUDGET = pickles.Budget(steps=500_000, objects=500_000)
LOCAL_HEADER = struct.Struct("<4s22xHH")


class FileSlice(io.RawIOBase):
    """A run of a file's bytes as a file. It bounds reads by its length and by ``most`` bytes."""

    def __init__(self, file: StoredFile, start: int, length: int, most: int) -> None:
        super().__init__()
        self.file, self.start, self.length, self.most, self.at = file, start, length, most, 0

    def seekable(self) -> bool:
        """It is."""
        return True

    def readable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The position from the slice's start."""
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move the position. Raises OSError for one before the start, as a file does."""
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        if at < 0:
            raise OSError("before the start")
        self.at = at
        return at

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to size bytes, fewer at the slice's end."""
        left = max(self.length - self.at, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > self.most:
            raise ConfigError(f"a zip directory of {wanted} bytes; allowed: {self.most}")
        data = self.file.read(self.start + self.at, wanted)
        self.at += len(data)
        return data


@dataclass(frozen=True)
class Archive:
    """A pickle's value, and where each storage's bytes are: key to (offset in file, size)."""

    file: StoredFile
    value: Any
    storages: dict[str, tuple[int, int]]


def open_archive(
    file: StoredFile,
    start: int,
    length: int,
    budget: pickles.Budget = PICKLE_BUDGET,
    directory: int = DIRECTORY_LIMIT,
) -> Archive:
    """Open the archive in ``length`` bytes of a file from ``start`` on. Raises ConfigError.

    budget: what its pickle may take. directory: the most bytes of the zip's directory.
    """
    path, head = file.path, file.read(start, min(4, length))
    if head != b"PK\3\4":
        old = "torch's format from before version 1.6" if head[:1] == b"\x80" else "not a zip"
        raise ConfigError(f"{path}: not a torch.save archive ({old}); load and save it again")
    part = FileSlice(file, start, length, directory)
    try:
        with zipfile.ZipFile(part) as archive:
            infos = archive.filelist
        records = _records(part, infos)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except _MALFORMED as error:
        raise ConfigError(f"{path}: not a readable zip ({type(error).__name__})") from error
    names = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(names) != 1:
        raise ConfigError(f"{path}: not a torch.save archive: it holds {len(names)} data.pkl")
    prefix = names[0].removesuffix("data.pkl")

    def content(name: str, limit: int) -> bytes:
        at, size = records[name]
        if size > limit:
            raise ConfigError(f"{path}: {brief(name)} has {size} bytes; allowed: {limit}")
        return file.read(start + at, size)

    order = f"{prefix}byteorder"
    if order in records and content(order, 16) != b"little":
        raise ConfigError(f"{path}: byteorder: allowed: little")
    value = pickles.load(content(names[0], PICKLE_LIMIT), path, budget)
    under = f"{prefix}data/"
    storages = {
        name.removeprefix(under): (start + at, size)
        for name, (at, size) in records.items()
        if name.startswith(under)
    }
    return Archive(file, value, storages)


def _records(part: FileSlice, infos: list[zipfile.ZipInfo]) -> dict[str, tuple[int, int]]:
    """Each record's offset and size, from its own header. Compressed records are refused."""
    records: dict[str, tuple[int, int]] = {}
    for info in infos:
        name = info.orig_filename
        if name in records:
            raise ConfigError(f"the record {brief(name)} is there twice")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ConfigError(f"the record {brief(name)} is compressed or encrypted")
        part.seek(info.header_offset)
        header = part.read(LOCAL_HEADER.size)
        signature, name_length, extra_length = LOCAL_HEADER.unpack(header)
        at = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
        same = part.read(name_length) == name.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        if signature != b"PK\3\4" or not same or info.file_size != info.compress_size:
            raise ConfigError(f"the record {brief(name)} is not where the directory says")
        if at + info.file_size > part.length:
            raise ConfigError(f"the record {brief(name)} reaches beyond the end")
        records[name] = (at, info.file_size)
    return records


def stored_tensor(
    archive: Archive, value: object, name: str, more: Collection[torch.dtype] = ()
) -> StoredTensor:
    """A tensor's place in the archive's file. Raises ConfigError for one that isn't plain and dense.

    more: dtypes that are allowed besides those of weights.
    """
    what = f"{archive.file.path}: tensor {brief(name)}"
    args = pickles.arguments_of(value, "_rebuild_parameter")
    inner = args[0] if args else value
    args = pickles.arguments_of(inner, "_rebuild_tensor_v2")
    if len(args) not in (6, 7):
        kind = "" if isinstance(value, PickledObject) else f", {_kind(value)}"
        raise ConfigError(f"{what}: not a tensor{kind}")
    if len(args) == 7 and args[6]:  # torch then reads the bytes with another sign
        raise ConfigError(
            f"{what}: has torch's negation or conjugation bit; save it again after resolve_neg()"
        )
    if any(isinstance(v, PickledObject) and v.state is not None for v in (value, inner)):
        raise ConfigError(f"{what}: has a state beside its storage, which torch would set it to")
    storage, start = args[:2]
    shape, strides = (pickles.dimensions(args[i], what) for i in (2, 3))
    plain = isinstance(storage, StorageLabel) and type(start) is int
    if not plain or len(shape) != len(strides):
        raise ConfigError(f"{what}: not a tensor")
    if storage.dtype not in more:
        pickles.check_dtype(storage.dtype, what)
    if not pickles.is_contiguous(shape, strides):
        raise ConfigError(
            f"{what}: its strides are not contiguous, as of a transposed one; save it again after "
            ".contiguous()"
        )
    at, size = archive.storages.get(storage.key, (0, -1))
    width, numel = storage.dtype.itemsize, math.prod(shape)
    if storage.numel * width != size or not 0 <= start <= start + numel <= storage.numel:
        raise ConfigError(f"{what} reaches beyond its storage {brief(storage.key)}")
    return in_one_piece(name, shape, storage.dtype, archive.file, at + start * width)


def _kind(value: object) -> str:
    """What a value of a pickle is, in words."""
    name = "dictionary" if isinstance(value, dict) else type(value).__name__
    return f"an {name}" if name[0] in "aeioAEIO" else f"a {name}"


def _is_tensor(value: object) -> bool:
    made_by = value.constructor if isinstance(value, PickledObject) else None
    return made_by is not None and made_by.is_("_rebuild_parameter", "_rebuild_tensor_v2")


def read_torch_file(path: Path, more: Collection[torch.dtype] = ()) -> dict[str, StoredTensor]:
    """The tensors of a file that ``torch.save(state_dict, path)`` wrote. Raises ConfigError.

    more: dtypes that are allowed besides those of weights.
    """
    file = StoredFile(path)
    refuse_pointer(file.read(0, 64), path)
    archive = open_archive(file, 0, file.size)
    if not isinstance(archive.value, dict):
        raise ConfigError(f"{path}: {_kind(archive.value)}, not a dictionary of tensors")
    for name, value in archive.value.items():
        if isinstance(value, dict) and any(map(_is_tensor, value.values())):
            raise ConfigError(
                f"{path}: holds a dictionary of tensors under {brief(name)}, not the tensors "
                f"themselves; save them alone: torch.save(torch.load(path)[{brief(name)}], path)"
            )
    return {
        checked_name(name, path): stored_tensor(archive, value, name, more)
        for name, value in archive.value.items()
    }
