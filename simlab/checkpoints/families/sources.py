"""Where a skeleton's weights come from: a checkpoint's files, or its family's own random init."""

from __future__ import annotations

import copy
import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simlab.checkpoints.families.conversion import Conversion
from simlab.checkpoints.families.skeleton import Skeleton, initialize
from simlab.checkpoints.fingerprint import Fingerprints
from simlab.checkpoints.storage import READ, SCRATCH, StoredTensor, in_one_piece
from simlab.checkpoints.streamed import row_runs
from simlab.config import ConfigError

MAPPED_BYTES = 1 << 18  # from which on a tensor's memory is mapped for it alone
TABLE_BYTES = 16 << 20  # of a table of random numbers, in float32, that are drawn with one seed


class StoredWeights:
    """The weights in files, converted to the run's dtype as they are read.

    Args:
        skeleton: What is filled.
        conversion: Which tensors become which.
        fingerprints: Get every tensor's runs as they are read.
        same: The model's names that have another one's weights (tied).
    """

    def __init__(
        self,
        skeleton: Skeleton,
        conversion: Conversion,
        fingerprints: Fingerprints,
        same: dict[str, str],
    ) -> None:
        self.skeleton, self.conversion, self.same = skeleton, conversion, same
        self.fingerprints = fingerprints

    def fill(self, path: str) -> None:
        """Read a unit's tensors; with those outside of units also the buffers that the files hold."""
        names = self.skeleton.names(path)
        if not path:
            held = {*self.conversion.by_target}
            names = [*names, *(n for n, _ in self.skeleton.model.named_buffers() if n in held)]
        sources = {name: self.same.get(name, name) for name in names}
        made: dict[str, Tensor] = {}
        for group in self.conversion.groups_of(sources.values()):
            dtype = self.skeleton.dtype_of(group.name)
            made |= self.conversion.convert(group, partial(self.read, dtype=dtype))
        self.skeleton.place({name: made[source] for name, source in sources.items()})

    def read(self, key: str, dtype: torch.dtype) -> Tensor:
        """A file's whole tensor, in the run's dtype where it has fractions, on the run's device."""
        stored = self.conversion.tensors[key]
        flat = one_dimension(stored)
        wanted = dtype if stored.dtype.is_floating_point else stored.dtype
        out = mapped(flat.shape, wanted)
        # Moments are of the file's values or float32's.
        direct = wanted in (torch.float32, stored.dtype)
        for start, stop in row_runs(flat, 0, flat.shape[0]):
            rows = out[start:stop]
            if not direct:
                rows = READ.empty(rows.shape, stored.dtype)
            take_in(self.fingerprints, key, flat, start, rows)
            if not direct:
                out[start:stop] = rows
        return out.view(stored.shape).to(self.skeleton.device)

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows of an embedding: no others are read, where the file has them as they are."""
        group = self.conversion.by_target[self.same.get(name, name)]
        device, dtype = self.skeleton.device, self.skeleton.dtype_of(name)
        if group.converter is not None:
            made = self.conversion.convert(group, partial(self.read, dtype=dtype))
            return made[self.same.get(name, name)][ids.to(device)]
        stored = self.conversion.tensors[group.sources[0][1]]
        unique, where = ids.cpu().unique(return_inverse=True)
        rows = [stored.rows(i, i + 1) for i in unique.tolist()]
        return torch.cat(rows).to(device, dtype)[where.to(device)]

    def head(self, start: int, stop: int) -> dict[str, Tensor]:
        """The rows from start to stop of the head's weight and bias, which aren't fingerprinted."""
        module, found = self.skeleton.model.get_submodule(self.skeleton.head), {}
        for last in (n for n, one in module._parameters.items() if one is not None):
            name = f"{self.skeleton.head}.{last}"
            source = self.same.get(name, name)
            group, dtype = self.conversion.by_target[source], self.skeleton.dtype_of(name)
            if group.converter is None:
                rows = self.conversion.tensors[group.sources[0][1]].rows(start, stop)
            else:
                rows = self.conversion.convert(group, partial(self.read, dtype=dtype))[source]
                rows = rows[start:stop]
            found[last] = rows.to(self.skeleton.device, dtype)
        return found


class DrawnWeights:
    """Random weights by a family's own init, on the CPU in float32: by (seed, unit), so that a block's
    don't depend on how many blocks there are. Embeddings are drawn some rows at a time.
    """

    def __init__(self, skeleton: Skeleton, seed: int) -> None:
        self.skeleton, self.seed = skeleton, seed
        self.kept: dict[str, torch.dtype] = {}

    def fill(self, path: str) -> None:
        """Draw a unit's weights."""
        skeleton, names = self.skeleton, self.skeleton.names(path)
        if not names:
            return
        shapes = {name: skeleton.empty[name].shape for name in names}
        skeleton.place({name: torch.full(shape, torch.nan) for name, shape in shapes.items()})
        with _seeded(self.seed, path):
            initialize(skeleton.model, skeleton.units.get(path, skeleton.decoder))
        drawn = {name: skeleton.model.get_parameter(name).data for name in names}
        for name, tensor in drawn.items():
            refuse_undrawn(skeleton, name, tensor)
        skeleton.place(
            {name: drawn[name].to(skeleton.device, skeleton.dtype_of(name)) for name in names}
        )

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows of an embedding: of a large one those that share a seed with them are drawn, too."""
        module = self.skeleton.tables[name]
        count, width = module.weight.shape
        step = rows_at_once(width)
        unique, where = ids.cpu().unique(return_inverse=True)
        out = torch.empty(len(unique), width)
        for start in sorted({i - i % step for i in unique.tolist()}):
            here = (unique >= start) & (unique < start + step)
            part = self._part(module, start, min(start + step, count), name)["weight"]
            out[here] = part[unique[here] - start]
        return out.to(self.skeleton.device, self.skeleton.dtype_of(name))[
            where.to(self.skeleton.device)
        ]

    def head(self, start: int, stop: int) -> dict[str, Tensor]:
        """The rows from start to stop of the head's weight and bias; of a tied one the embedding's."""
        skeleton = self.skeleton
        name, device = f"{skeleton.head}.weight", skeleton.device
        if (other := skeleton.tied.get(name)) in skeleton.tables:
            return {"weight": self.rows(other, torch.arange(start, stop))}
        module = skeleton.model.get_submodule(skeleton.head)
        part = self._part(module, start, stop, name)
        return {n: one.to(device, skeleton.dtype_of(name)) for n, one in part.items()}

    def _part(self, module: nn.Module, start: int, stop: int, name: str) -> dict[str, Tensor]:
        """Rows start … stop − 1 of the parameters of a table or a head, as the family draws them."""
        part: Any = copy.copy(module)
        part._parameters = {
            last: None
            if one is None
            else nn.Parameter(torch.full((stop - start, *one.shape[1:]), torch.nan))
            for last, one in module._parameters.items()
        }
        if isinstance(module, nn.Embedding):
            padding = -1 if module.padding_idx is None else module.padding_idx
            part.num_embeddings = stop - start
            part.padding_idx = padding - start if start <= padding < stop else None
        with _seeded(self.seed, f"{name} {start}"):
            initialize(self.skeleton.model, part)
        drawn = {last: one.data for last, one in part._parameters.items() if one is not None}
        for last, tensor in drawn.items():
            refuse_undrawn(self.skeleton, f"{name.rpartition('.')[0]}.{last}", tensor)
        return drawn


def rows_at_once(width: int) -> int:
    """Rows of a table or a head that are drawn with one seed, or are in memory at a time."""
    return max(1, TABLE_BYTES // (4 * width))


def refuse_undrawn(skeleton: Skeleton, name: str, drawn: Tensor) -> None:
    """Raise ConfigError where a family's init has left a parameter as it was: NaN."""
    if drawn.isnan().any():
        kind = skeleton.model.config.model_type
        raise ConfigError(
            f"{skeleton.where}: transformers' {kind} has no random init of {name} (its _init_weights "
            "leaves it out): seeds=0 measures the checkpoint alone"
        )


@contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    """torch's own generator, begun by a seed and a name; afterwards it is where it was."""
    words = np.random.SeedSequence([seed, *name.encode()]).generate_state(1, np.uint64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(words[0] >> np.uint64(1)))
        yield


def one_dimension(stored: StoredTensor) -> StoredTensor:
    """The tensor itself, or a single number as a tensor of one row."""
    if stored.shape:
        return stored
    (piece,) = stored.pieces
    return in_one_piece(stored.name, (1,), stored.dtype, piece.file, piece.offset)


def mapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor, whose memory goes back to the system with it where it is large.

    glibc keeps freed tensors of some MiB, as experts before they are fused: measured, 0.7 of a block.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < MAPPED_BYTES:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)


def take_in(
    fingerprints: Fingerprints, key: str, stored: StoredTensor, start: int, rows: Tensor
) -> None:
    """Read a run of rows from ``start`` on into ``rows``, and add it to the fingerprints."""
    hashed = fingerprints.started(key, start)
    stored.rows(start, start + len(rows), rows, hashed.update if hashed else None)
    if fingerprints.with_moments:  # they overwrite what they are given
        rows = SCRATCH.copy(rows, rows.dtype if rows.is_floating_point() else torch.float32)
    fingerprints.add(key, start, hashed, rows, stored.dtype)


def entries(stored: StoredTensor) -> int:
    """How many numbers a tensor has."""
    return math.prod(stored.shape)
