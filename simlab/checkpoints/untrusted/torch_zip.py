"""torch.save's archives: a zip whose records are a pickle and the tensors' bytes, uncompressed.

zipfile finds the records; what it and the pickle claim is compared with the file before it is
believed, and no tensor's bytes are read.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from simlab.checkpoints.formats.fields import brief, checked_name
from simlab.checkpoints.storage import Stored, whole
from simlab.checkpoints.untrusted import pickle as pickles
from simlab.checkpoints.untrusted.pickle import Made, Storage
from simlab.config import ConfigError

# What zipfile raises for a malformed directory; NotImplementedError for a version it doesn't know.
MALFORMED = (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, IndexError, OSError)
DIRECTORY_LIMIT = 4 << 20  # bytes; some 40,000 records
PICKLE_LIMIT = 4 << 20
BUDGET = 500_000  # steps of an archive's pickle; a tensor takes about 50
LOCAL_HEADER = struct.Struct("<4s22xHH")


class Slice(io.RawIOBase):
    """A run of a file's bytes as a file; no read is larger than what is there, or than a directory."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        super().__init__()
        self.file, self.start, self.length, self.at = file, start, length, 0

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
        """As of a file. Raises OSError for a place before the start, as the system does."""
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        if at < 0:
            raise OSError("before the start")
        self.at = at
        return at

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to size bytes, less where the slice ends."""
        left = max(self.length - self.at, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > DIRECTORY_LIMIT:
            raise ConfigError(f"a zip directory of {wanted} bytes; allowed: {DIRECTORY_LIMIT}")
        self.file.seek(self.start + self.at)
        data = self.file.read(wanted)
        self.at += len(data)
        return data


@dataclass(frozen=True)
class Archive:
    """What the pickle holds, and where each storage's bytes are: key to (offset in file, size)."""

    path: Path
    value: Any
    storages: dict[str, tuple[int, int]]


def open_archive(
    file: IO[bytes], path: Path, start: int, length: int, budget: int = BUDGET
) -> Archive:
    """The archive at a run of a file's bytes, which must lie within it. Raises ConfigError.

    budget: how many opcodes its pickle may have.
    """
    file.seek(start)
    head = file.read(min(4, length))
    if head != b"PK\3\4":
        old = "torch's format from before version 1.6" if head[:1] == b"\x80" else "not a zip"
        raise ConfigError(f"{path}: not a torch.save archive ({old}); load and save it again")
    part = Slice(file, start, length)
    try:
        with zipfile.ZipFile(part) as archive:
            infos = archive.filelist
        records = _records(part, infos)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except MALFORMED as error:
        raise ConfigError(f"{path}: not a readable zip ({type(error).__name__})") from error
    found = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(found) != 1:
        raise ConfigError(f"{path}: not a torch.save archive: it holds {len(found)} data.pkl")
    prefix = found[0].removesuffix("data.pkl")

    def content(name: str, limit: int) -> bytes:
        at, size = records[name]
        if size > limit:
            raise ConfigError(f"{path}: {brief(name)} has {size} bytes; allowed: {limit}")
        file.seek(start + at)
        return file.read(size)

    order = f"{prefix}byteorder"
    if order in records and content(order, 16) != b"little":
        raise ConfigError(f"{path}: byteorder: allowed: little")
    value = pickles.load(content(found[0], PICKLE_LIMIT), path, budget)
    under = f"{prefix}data/"
    storages = {
        name.removeprefix(under): (start + at, size)
        for name, (at, size) in records.items()
        if name.startswith(under)
    }
    return Archive(path, value, storages)


def _records(part: Slice, infos: list[zipfile.ZipInfo]) -> dict[str, tuple[int, int]]:
    """Each record's place by its own header, within the slice; compressed or doubtful ones refused."""
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


def tensor(archive: Archive, value: object, name: str) -> Stored:
    """Where a tensor of the archive lies. Raises ConfigError for what isn't a plain dense one."""
    what = f"{archive.path}: tensor {brief(name)}"
    if isinstance(value, Made) and value.maker.is_("_rebuild_parameter") and value.args:
        value = value.args[0]
    rebuilt = isinstance(value, Made) and value.maker.is_("_rebuild_tensor_v2")
    if not isinstance(value, Made) or not rebuilt or len(value.args) not in (6, 7):
        raise ConfigError(f"{what}: not a tensor")
    storage, start = value.args[:2]
    shape, strides = (pickles.dimensions(value.args[i], what) for i in (2, 3))
    if not isinstance(storage, Storage) or type(start) is not int or len(shape) != len(strides):
        raise ConfigError(f"{what}: not a tensor")
    if storage.dtype not in pickles.FLOATS:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in pickles.FLOATS)
        raise ConfigError(f"{what} is {str(storage.dtype)[6:]}; allowed: {allowed}")
    if not pickles.contiguous(shape, strides):
        raise ConfigError(f"{what}: its strides are not contiguous")
    at, size = archive.storages.get(storage.key, (0, -1))
    width, numel = storage.dtype.itemsize, _count(shape)
    if storage.numel * width != size or not 0 <= start <= start + numel <= storage.numel:
        raise ConfigError(f"{what} reaches beyond its storage {brief(storage.key)}")
    return whole(name, shape, storage.dtype, archive.path, at + start * width)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def read_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a file that ``torch.save(state_dict, path)`` wrote. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            archive = open_archive(file, path, 0, path.stat().st_size)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if not isinstance(archive.value, dict):
        raise ConfigError(f"{path}: not a dictionary of tensors")
    found = {}
    for name, value in archive.value.items():
        checked_name(name, path)
        found[name] = tensor(archive, value, name)
    return found
