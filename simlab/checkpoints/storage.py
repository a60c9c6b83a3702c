"""Tensors in files: where their bytes are, and rows of them as views of mapped files.

A format's reader looks at headers alone and gives each tensor's shape, dtype and the place of its
bytes: one run for a whole tensor, or one per shard. From there all formats are read by this module.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simlab.config import ConfigError

PREFETCH_BYTES = 8 << 20  # asked of the system in one call


@dataclass(frozen=True)
class Piece:
    """A rectangular part of a tensor, row-major in one run of a file's bytes.

    Args:
        path: The file.
        offset: The first byte in the file.
        start: The index of the first entry in the tensor, one number per dimension.
        shape: The part's shape.
    """

    path: Path
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


def in_one_piece(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, path: Path, offset: int
) -> StoredTensor:
    """A tensor whose bytes are one run of a file, from ``offset`` on."""
    return StoredTensor(name, shape, dtype, (Piece(path, offset, (0,) * len(shape), shape),))


def check_pieces(tensors: Iterable[StoredTensor]) -> None:
    """Check that pieces lie within their files, don't overlap, and cover their tensors once.

    No more is then read than the files hold, whatever headers claim. Raises ConfigError, which names
    the tensor.
    """
    runs: dict[Path, list[tuple[int, int, str]]] = {}
    for tensor in tensors:
        _check_grid(tensor)
        for piece in tensor.pieces:
            size = math.prod(piece.shape) * tensor.dtype.itemsize
            runs.setdefault(piece.path, []).append((piece.offset, piece.offset + size, tensor.name))
    for path, in_file in runs.items():
        length, end, before = path.stat().st_size, 0, ""
        for start, stop, name in sorted(in_file):
            if start < 0 or stop > length:
                raise ConfigError(f"{path}: tensor {name} reaches beyond the end of the file")
            if start < end and start < stop:
                raise ConfigError(f"{path}: tensors {before} and {name} overlap")
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
        where = f"{tensor.pieces[0].path}: " if tensor.pieces else ""
        raise ConfigError(f"{where}tensor {tensor.name}: its parts don't make a whole")


def _close(handles: dict[Path, int]) -> None:
    for handle in handles.values():
        os.close(handle)


class MappedFiles:
    """Files mapped into memory on first use. Threads may share it."""

    def __init__(self) -> None:
        self.maps: dict[Path, mmap.mmap] = {}
        self.handles: dict[Path, int] = {}
        self.lock = threading.Lock()
        weakref.finalize(self, _close, self.handles)

    def _map(self, path: Path) -> mmap.mmap:
        with self.lock:
            if path not in self.maps:
                self.handles[path] = os.open(path, os.O_RDONLY)
                # Private: torch wants memory that is writable, and no write would reach the file.
                self.maps[path] = mmap.mmap(self.handles[path], 0, access=mmap.ACCESS_COPY)
            return self.maps[path]

    def rows(self, tensor: StoredTensor, start: int, stop: int) -> Tensor:
        """Rows start … stop − 1 of a tensor: a view of the file where they are one run, else a copy."""
        wanted = (stop - start, *tensor.shape[1:])
        if not math.prod(wanted):
            return torch.empty(wanted, dtype=tensor.dtype)
        parts = [p for p in tensor.pieces if p.start[0] < stop and p.start[0] + p.shape[0] > start]
        if len(parts) == 1:
            return self._of_piece(tensor, parts[0], start, stop)
        out = torch.empty(wanted, dtype=tensor.dtype)
        for p in parts:
            first, last = max(start, p.start[0]), min(stop, p.start[0] + p.shape[0])
            where = [slice(s, s + n) for s, n in zip(p.start[1:], p.shape[1:], strict=True)]
            out[(slice(first - start, last - start), *where)] = self._of_piece(
                tensor, p, first, last
            )
        return out

    def _of_piece(self, tensor: StoredTensor, piece: Piece, start: int, stop: int) -> Tensor:
        """Rows of a tensor from one of its pieces: a view, or a copy where bytes aren't aligned."""
        shape, size = (stop - start, *piece.shape[1:]), tensor.dtype.itemsize
        row = math.prod(piece.shape[1:]) * size
        offset = piece.offset + (start - piece.start[0]) * row
        data = torch.frombuffer(
            self._map(piece.path), dtype=torch.uint8, count=(stop - start) * row, offset=offset
        )
        return (data.clone() if offset % size else data).view(tensor.dtype).view(shape)

    def release(self, tensor: StoredTensor) -> None:
        """Unmap the pages of a tensor that has been read; they stay in the system's file cache."""
        for piece, start, stop in self._runs(tensor):
            if hasattr(mmap, "MADV_DONTNEED"):
                start -= start % mmap.PAGESIZE
                self._map(piece.path).madvise(mmap.MADV_DONTNEED, start, stop - start)

    def prefetch(self, tensor: StoredTensor) -> None:
        """Ask the system to read a tensor into its file cache, in the background."""
        for piece, start, stop in self._runs(tensor):
            if hasattr(os, "posix_fadvise"):
                self._map(piece.path)
                for at in range(start, stop, PREFETCH_BYTES):
                    size = min(PREFETCH_BYTES, stop - at)
                    os.posix_fadvise(self.handles[piece.path], at, size, os.POSIX_FADV_WILLNEED)

    def _runs(self, tensor: StoredTensor) -> Iterator[tuple[Piece, int, int]]:
        """Each piece that isn't empty, with its first byte in its file and the byte after its last."""
        for piece in tensor.pieces:
            size = math.prod(piece.shape) * tensor.dtype.itemsize
            if size:
                yield piece, piece.offset, piece.offset + size
