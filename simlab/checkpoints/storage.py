"""Tensors in files: where their bytes are, and rows of them.

A format's reader looks at headers alone and gives each tensor's shape, dtype and the place of its
bytes: one run for a whole tensor, or one per shard. From there all formats are read by this module.

Files are read, not mapped into memory: a mapped file that another program cuts short ends the process
with SIGBUS, which nothing can catch. Measured in the system's cache, pieces of 1 MiB that are converted
and hashed while they are in a core's cache cost what mapped pages do (2.2 GB a second).
"""

from __future__ import annotations

import errno
import math
import os
import stat
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simlab.config import ConfigError

PREFETCH_BYTES = 8 << 20  # asked of the system in one call
NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # opening a pipe would wait
READ_BYTES = 1 << 20  # read in one call: it then stays in a core's cache


class Scratch(threading.local):
    """A thread's buffers, one per dtype, used again and again.

    Thousands of short-lived megabytes on several threads, with small results between them, fragment
    glibc's arenas: measured, a 7B checkpoint left 20 GB behind.
    """

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape, valid until this thread's next call for that dtype."""
        buffer, count = self.buffers.get(dtype), math.prod(shape)
        if buffer is None or buffer.numel() < count:
            buffer = self.buffers[dtype] = torch.empty(count, dtype=dtype)
        return buffer[:count].view(tuple(shape))

    def copy(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x in another dtype, valid until this thread's next call for that dtype."""
        return self.empty(x.shape, dtype).copy_(x)


READ, SCRATCH, _FEW = Scratch(), Scratch(), Scratch()  # rows, copies of them, bytes to convert


def _allow_more(handle: int) -> None:
    """Raise the soft limit of open files towards the hard one, where a file's number nears it.

    A checkpoint may have more shards than the usual 1024, and the run opens other files.
    """
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and handle > soft // 2:
        # Where macOS's hard limit is none, it refuses more than OPEN_MAX, 10240.
        most = 10_240 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


class StoredFile:
    """A file of weights, opened once: its header and its tensors are read through one descriptor.

    If another file takes its name, the one that was opened is read on. One that is cut, grown or
    written to is refused by the next read, before what was read is used. Threads may share it.

    Raises ConfigError for a file that can't be opened or read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        try:
            self.handle = os.open(path, os.O_RDONLY | NO_WAIT)
            self.closing = weakref.finalize(self, os.close, self.handle)
            _allow_more(self.handle)
            about = os.fstat(self.handle)
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file") from None
        except OSError as error:
            many = ": raise the limit (ulimit -n)" if error.errno == errno.EMFILE else ""
            raise ConfigError(f"{path}: {error.strerror}{many}") from error
        if not stat.S_ISREG(about.st_mode):
            raise ConfigError(f"{path}: not a file")
        self.size, self.written = about.st_size, about.st_mtime_ns

    def close(self) -> None:
        """Close the file; reading it then raises ConfigError."""
        self.closing()
        self.handle = -1  # the system may give the number to another file

    def read(self, offset: int, count: int) -> bytes:
        """Bytes of the file, fewer at its end. Raises ConfigError."""
        data = bytearray(max(0, min(count, self.size - offset)))
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from ``offset`` on. Raises ConfigError."""
        at, count = 0, 1
        try:
            while at < len(view) and count:
                count = self._read_once(view[at:], offset + at)
                at += count
            about = os.fstat(self.handle)
        except OSError as error:
            raise ConfigError(f"{self.path}: {error.strerror}") from error
        if at < len(view) or (about.st_size, about.st_mtime_ns) != (self.size, self.written):
            raise ConfigError(f"{self.path}: the file was changed after it was opened; start again")

    def _read_once(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.handle, [view], offset)
        with self.lock:  # Windows
            os.lseek(self.handle, offset, os.SEEK_SET)
            data = os.read(self.handle, len(view))
        view[: len(data)] = data
        return len(data)

    def prefetch(self, start: int, stop: int) -> None:
        """Ask the system to read some bytes into its file cache, in the background."""
        if hasattr(os, "posix_fadvise"):
            for at in range(start, stop, PREFETCH_BYTES):
                size = min(PREFETCH_BYTES, stop - at)
                os.posix_fadvise(self.handle, at, size, os.POSIX_FADV_WILLNEED)


@dataclass(frozen=True)
class Piece:
    """A rectangular part of a tensor, row-major in one run of a file's bytes.

    Args:
        file: The file.
        offset: The first byte in the file.
        start: The index of the first entry in the tensor, one number per dimension.
        shape: The part's shape.
    """

    file: StoredFile
    offset: int
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in files. Its pieces form a grid and cover it exactly once: ``check_pieces``."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @property
    def kind(self) -> str:
        """The type of its entries in the file, as a name: ``bfloat16``, ``Q4_K``."""
        return str(self.dtype).removeprefix("torch.")

    def size_of(self, shape: tuple[int, ...]) -> int:
        """Bytes that some of its entries take in a file."""
        return math.prod(shape) * self.dtype.itemsize

    def rows(
        self,
        start: int,
        stop: int,
        out: Tensor | None = None,
        seen: Callable[[memoryview], object] | None = None,
    ) -> Tensor:
        """Rows start … stop − 1: (stop − start, …), in ``out`` if it is given. Raises ConfigError.

        out: contiguous, of that shape; it has the rows in its own dtype, else they have the file's.
        seen: called with the rows' bytes as they are in the file, piece after piece.
        """
        wanted = (stop - start, *self.shape[1:])
        if out is None:
            out = torch.empty(wanted, dtype=self.dtype)
        if not math.prod(wanted):
            return out
        parts = [p for p in self.pieces if p.start[0] < stop and p.start[0] + p.shape[0] > start]
        if len(parts) == 1:
            self._read(parts[0], start, out, seen)
            return out
        whole = out if out.dtype == self.dtype else torch.empty(wanted, dtype=self.dtype)
        for p in parts:
            first, last = max(start, p.start[0]), min(stop, p.start[0] + p.shape[0])
            part = torch.empty((last - first, *p.shape[1:]), dtype=self.dtype)
            self._read(p, first, part, None)
            where = [slice(s, s + n) for s, n in zip(p.start[1:], p.shape[1:], strict=True)]
            whole[(slice(first - start, last - start), *where)] = part
        if seen is not None:
            seen(bytes_of(whole.view(-1)))
        return out if whole is out else out.copy_(whole)

    def _read(
        self, piece: Piece, start: int, out: Tensor, seen: Callable[[memoryview], object] | None
    ) -> None:
        """The rows of a piece from ``start`` on, as many as ``out`` has."""
        size, flat = self.dtype.itemsize, out.view(-1)
        offset = piece.offset + (start - piece.start[0]) * math.prod(piece.shape[1:]) * size
        step = READ_BYTES // size
        same = out.dtype == self.dtype
        buffer = flat if same else _FEW.empty((min(step, len(flat)),), self.dtype)
        for at in range(0, len(flat), step):
            count = min(step, len(flat) - at)
            few = buffer[at : at + count] if same else buffer[:count]
            view = bytes_of(few)
            piece.file.read_into(view, offset + at * size)
            if not same:
                flat[at : at + count] = few
            if seen is not None:
                seen(view)

    def prefetch(self) -> None:
        """Ask the system to read the tensor into its file cache, in the background."""
        for piece in self.pieces:
            piece.file.prefetch(piece.offset, piece.offset + self.size_of(piece.shape))


def bytes_of(flat: Tensor) -> memoryview:
    """The memory of a contiguous tensor of one dimension."""
    return flat.view(torch.uint8).numpy().data


def in_one_piece(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, file: StoredFile, offset: int
) -> StoredTensor:
    """A tensor whose bytes are one run of a file, from ``offset`` on."""
    return StoredTensor(name, shape, dtype, (Piece(file, offset, (0,) * len(shape), shape),))


def main_kind(tensors: Iterable[StoredTensor]) -> str:
    """The type in which most of some tensors' numbers are stored: ``bfloat16``, ``Q4_K``."""
    numbers = Counter[str]()
    for tensor in tensors:
        numbers[tensor.kind] += math.prod(tensor.shape)
    return numbers.most_common(1)[0][0] if numbers else ""


def check_pieces(tensors: Iterable[StoredTensor]) -> None:
    """Check that pieces lie within their files, don't overlap, and cover their tensors once.

    No more is then read than the files hold, whatever headers claim. Raises ConfigError, which names
    the tensor.
    """
    runs: dict[StoredFile, list[tuple[int, int, str]]] = {}
    for tensor in tensors:
        _check_grid(tensor)
        for piece in tensor.pieces:
            size = tensor.size_of(piece.shape)
            runs.setdefault(piece.file, []).append((piece.offset, piece.offset + size, tensor.name))
    for file, in_file in runs.items():
        end, before = 0, ""
        for start, stop, name in sorted(in_file):
            if start < 0 or stop > file.size:
                raise ConfigError(f"{file.path}: tensor {name} reaches beyond the end of the file")
            if start < end and start < stop:
                raise ConfigError(f"{file.path}: tensors {before} and {name} overlap")
            if stop > end:
                end, before = stop, name


def _check_grid(tensor: StoredTensor) -> None:
    """Check that a tensor's pieces are the cells of a grid over its dimensions, each cell once."""
    dimensions = len(tensor.shape)
    starts = [p.start for p in tensor.pieces]
    good = bool(starts) and all(
        len(p.start) == len(p.shape) == dimensions and min((0, *p.start, *p.shape)) >= 0
        for p in tensor.pieces
    )
    if good:
        cuts = [sorted({start[d] for start in starts}) for d in range(dimensions)]
        ends = [
            dict(zip(c, [*c[1:], n], strict=True)) for c, n in zip(cuts, tensor.shape, strict=True)
        ]
        good = (
            all(c[0] == 0 for c in cuts)
            and len(set(starts)) == len(starts) == math.prod(len(c) for c in cuts)
            and all(
                s + n == ends[d][s]
                for p in tensor.pieces
                for d, (s, n) in enumerate(zip(p.start, p.shape, strict=True))
            )
        )
    if not good:
        where = f"{tensor.pieces[0].file.path}: " if tensor.pieces else ""
        raise ConfigError(f"{where}tensor {tensor.name}: its parts don't make a whole")
