"""Tensors in files as runs of bytes: what every checkpoint format comes down to.

A format's reader looks at headers alone and says of each tensor its shape, its dtype and where its
bytes lie: one run for a whole tensor, or one per shard. From then on all formats are read the same
way: files are mapped, and rows of a tensor are views of the mapping wherever they lie in one run.
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

AHEAD = 8 << 20  # bytes that the system is asked for at once


@dataclass(frozen=True)
class Piece:
    """A rectangular part of a tensor, row-major in one run of a file's bytes.

    offset: of its first byte in the file. start: the index of its first entry in the tensor.
    """

    path: Path
    offset: int
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor in files: pieces that make a grid and cover it exactly once (``check`` sees to it)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


def whole(name: str, shape: tuple[int, ...], dtype: torch.dtype, path: Path, offset: int) -> Stored:
    """A tensor that lies in one run."""
    return Stored(name, shape, dtype, (Piece(path, offset, (0,) * len(shape), shape),))


def check(tensors: Iterable[Stored]) -> None:
    """That pieces lie within their files, apart from each other, and cover their tensors once.

    So no more is read than the files hold, whatever headers claim. Raises ConfigError naming the
    tensor.
    """
    runs: dict[Path, list[tuple[int, int, str]]] = {}
    for tensor in tensors:
        _check_grid(tensor)
        for piece in tensor.pieces:
            size = math.prod(piece.shape) * tensor.dtype.itemsize
            runs.setdefault(piece.path, []).append((piece.offset, piece.offset + size, tensor.name))
    for path, found in runs.items():
        length, end, before = path.stat().st_size, 0, ""
        for start, stop, name in sorted(found):
            if start < 0 or stop > length:
                raise ConfigError(f"{path}: tensor {name} reaches beyond the end of the file")
            if start < end and start < stop:
                raise ConfigError(f"{path}: tensors {before} and {name} overlap")
            if stop > end:
                end, before = stop, name


def _check_grid(tensor: Stored) -> None:
    """The pieces are the cells of a grid: cuts along each dimension, every cell there once."""
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


class Files:
    """Mapped files, by path. Threads may share it."""

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

    def rows(self, tensor: Stored, start: int, stop: int) -> Tensor:
        """Rows start … stop − 1 of a tensor; a view of the file where one run has them."""
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

    def _of_piece(self, tensor: Stored, piece: Piece, start: int, stop: int) -> Tensor:
        """Rows of the tensor that lie in this piece: a view, or a copy where bytes aren't aligned."""
        shape, size = (stop - start, *piece.shape[1:]), tensor.dtype.itemsize
        row = math.prod(piece.shape[1:]) * size
        offset = piece.offset + (start - piece.start[0]) * row
        data = torch.frombuffer(
            self._map(piece.path), dtype=torch.uint8, count=(stop - start) * row, offset=offset
        )
        return (data.clone() if offset % size else data).view(tensor.dtype).view(shape)

    def release(self, tensor: Stored) -> None:
        """Let go of the pages of a tensor that has been read; they stay in the system's cache."""
        for piece, start, stop in self._runs(tensor):
            if hasattr(mmap, "MADV_DONTNEED"):
                start -= start % mmap.PAGESIZE
                self._map(piece.path).madvise(mmap.MADV_DONTNEED, start, stop - start)

    def ahead(self, tensor: Stored) -> None:
        """Ask the system to read a tensor into its cache while something else computes."""
        for piece, start, stop in self._runs(tensor):
            if hasattr(os, "posix_fadvise"):
                self._map(piece.path)
                for at in range(start, stop, AHEAD):
                    size = min(AHEAD, stop - at)
                    os.posix_fadvise(self.handles[piece.path], at, size, os.POSIX_FADV_WILLNEED)

    def _runs(self, tensor: Stored) -> Iterator[tuple[Piece, int, int]]:
        """Of each piece that isn't empty, the first byte in its file and the one after its last."""
        for piece in tensor.pieces:
            size = math.prod(piece.shape) * tensor.dtype.itemsize
            if size:
                yield piece, piece.offset, piece.offset + size
