"""Weights read from a checkpoint of any known format, one block at a time.

Opening a checkpoint checks it from headers alone: the files must hold every tensor of the architecture
in its shape, and no other. Files come from strangers: nothing in them runs, no name in them leads out
of the folder, and every size that they claim is checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from simlab.checkpoints.fingerprint import Fingerprints
from simlab.checkpoints.formats import open_folder
from simlab.checkpoints.formats.own_init import OwnInit
from simlab.checkpoints.storage import READ, StoredTensor, check_pieces, main_kind
from simlab.checkpoints.streamed import StreamedLinear, StreamedMatrix, pool, row_runs
from simlab.checkpoints.untrusted.tokenizer_files import find_tokenizer
from simlab.config import ConfigError, ModelConfig
from simlab.model.describe import shapes as block_shapes
from simlab.model.transformer import Block, dense_linear
from simlab.weights.base import Shape, Weights


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its name, {} for the block; the head's also where it is tied."""
    ends = (model.vocab_size, model.width)
    whole = {"embedding.weight": ends, "head.weight": ends, "norm.weight": (model.width,)}
    whole |= {"norm.bias": (model.width,), "position.weight": (model.positions or 0, model.width)}
    return whole | {f"blocks.{{}}.{name}": shape for name, shape in block_shapes(model).items()}


def by_block(name: str) -> tuple[str, str]:
    """A parameter's name with {} for its block, and the block: ``blocks.{}.mlp…`` and ``3``."""
    start, layer, *rest = [*name.split(".", 2), ""]
    return (f"blocks.{{}}.{rest[0]}", layer) if start == "blocks" else (name, "")


class Checkpoint(Weights):
    """An opened checkpoint: its shape, and its tensors by name, read from the file when asked for.

    Args:
        path: A folder or a hub id.
        revision: A hub branch, tag or commit.
        statistics: Also collect what ``table`` needs while weights are read.
        keep: False: weights that have to be downloaded are removed at ``release``, or with this object.

    Raises ConfigError for a checkpoint that is missing, malformed or not supported.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        *,
        statistics: bool = False,
        keep: bool = True,
    ) -> None:
        from simlab.checkpoints.hub import find  # late: random runs need no hub

        found = find(path, revision)
        self.commit = found.commit
        self.folder, self.removal = found.fetch_for(self, keep)
        self.opened = open_folder(self.folder)
        self.model = self.opened.model
        self.parts = dict(self._parts())
        self._check()
        self.threads, self.reader = pool(), ThreadPoolExecutor(1)
        self.fingerprints = Fingerprints(statistics)
        self.last_block = -1  # the block that was asked for last

    def release(self) -> None:
        """Close the files, and remove those that were downloaded for this object alone."""
        self.reader.shutdown()
        for file in {piece.file for t in self.opened.tensors.values() for piece in t.pieces}:
            file.close()  # a file that is removed takes room on the disk until then
        self.removal()

    @property
    def unread(self) -> str:
        """How the weights are quantised, and what is in or beside the files and isn't measured."""
        return "; ".join(filter(None, (self.opened.stored_as, self.opened.unread)))

    @property
    def about(self) -> dict[str, str]:
        """Model type, files' format, the type of most weights, who computes it, what its init is."""
        opened = self.opened
        return {
            "model_type": opened.model_type or opened.format,
            "format": opened.format,
            "stored_in": main_kind(opened.tensors.values()),
            "computed_by": "simlab",
            "init": "a guess" if self.init.guess else "its own",
        }

    @property
    def init(self) -> OwnInit:
        """How its weights were drawn before training."""
        return self.opened.init

    @property
    def tokenizer(self) -> Path | None:
        """The checkpoint's tokenizer.json, another tokenizer's file, or None where it has neither."""
        return find_tokenizer(self.folder)

    def _parts(self) -> Iterator[tuple[str, tuple[str, int, int]]]:
        """Our parameter names ({} for the block), each with the file's name and its rows there."""
        by_name = parameter_shapes(self.model)
        ends: dict[str, int] = {}
        for name, theirs in self.opened.keys.items():
            if name == "head.weight" and (self.model.tied or theirs not in self.opened.tensors):
                continue
            start = ends.get(theirs, 0)
            ends[theirs] = start + by_name[name][0]
            yield name, (theirs, start, ends[theirs])

    def expected(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The file's name and shape of every tensor of the architecture."""
        by_name = parameter_shapes(self.model)
        rows: dict[str, int] = {}
        rest: dict[str, tuple[int, ...]] = {}
        for name, (theirs, _, stop) in self.parts.items():
            rows[theirs] = max(rows.get(theirs, 0), stop)
            rest[theirs] = by_name[name][1:]
        for theirs, count in rows.items():
            for layer in range(self.model.depth) if "{}" in theirs else range(1):
                yield theirs.format(layer), (count, *rest[theirs])

    def _check(self) -> None:
        """Compare the files' tensors with the architecture's, then check where their bytes are."""
        tensors, config = self.opened.tensors, self.opened.config
        expected = dict(self.expected())
        others = sorted(tensors.keys() - expected.keys())
        for name in sorted(expected.keys() - tensors.keys()):
            there = ""
            if others:
                there = f", and {tensors[others[0]].name} is not part of this architecture"
            raise ConfigError(f"{self.folder}: tensor {name} is missing{there}")
        for name in others:
            where = tensors[name].pieces[0].file.path if tensors[name].pieces else self.folder
            raise ConfigError(
                f"{where}: tensor {tensors[name].name} is not part of this architecture"
            )
        for name, shape in expected.items():
            if (has := tensors[name].shape) != shape:
                raise ConfigError(
                    f"{self.folder}: tensor {name} has shape {has}, but {config.name} implies {shape}"
                )
        check_pieces(tensors.values())

    @cached_property
    def head_name(self) -> str:
        """The parameter that the head is: itself, or the embedding that it is tied to.

        Raises ConfigError where the files hold no head, or another one than the config says. A forward
        pass through the blocks reads none: only gradients and whole models need it.
        """
        theirs, other = self.opened.keys["head.weight"], self.opened.other_head
        if other:
            raise ConfigError(
                f"{self.folder}: holds {other}, another task's head; gradients and the loss need "
                f"{theirs}"
            )
        if not self.model.tied:
            if "head.weight" not in self.parts:
                raise ConfigError(
                    f"{self.folder}: holds no {theirs}: gradients and the loss need the head"
                )
            return "head.weight"
        embedding, head = self.stored("embedding.weight")[0], self.opened.head
        if head is not None and not self._same(head, embedding):
            raise ConfigError(
                f"{self.opened.config}: ties the head to the embedding, but the files hold another "
                f"{theirs}: remove it, or untie them (transformers 5 uses the stored one, 4 does not)"
            )
        return "embedding.weight"

    def _same(self, a: StoredTensor, b: StoredTensor) -> bool:
        """True if two stored tensors have the same values."""
        if a.pieces == b.pieces or a.shape != b.shape:
            return a.shape == b.shape
        check_pieces([a, b])
        return all(
            torch.equal(a.rows(*run).double(), b.rows(*run).double())
            for run in row_runs(a, 0, a.shape[0])
        )

    def stored(self, name: str) -> tuple[StoredTensor, int, int]:
        """A parameter's stored tensor, and start and stop of its rows. A tied head is the embedding."""
        if name == "head.weight":
            name = self.head_name
        ours, layer = by_block(name)
        theirs, start, stop = self.parts[ours]
        return self.opened.tensors[theirs.format(layer)], start, stop

    def has(self, name: str) -> bool:
        """True if the files hold a parameter. A norm without a gain isn't in them."""
        return by_block(name)[0] in self.parts or name == "head.weight"

    def linear(self, d_in: int, d_out: int, bias: bool) -> nn.Module:
        """A linear layer: on a CPU its weight is streamed, on a device it is read whole."""
        return (StreamedLinear if self.streams else dense_linear)(d_in, d_out, bias)

    def block(self, layer: int, device: torch.device, dtype: torch.dtype) -> Block:
        """One block. The system begins to read the next one's bytes, in either direction."""
        self.streams = device.type == "cpu"
        block = super().block(layer, device, dtype)
        for inner, module in block.named_modules():
            if isinstance(module, StreamedLinear):
                name = f"blocks.{layer}.{inner}.weight"
                where = self.stored(name)
                module.bind(StreamedMatrix(name, *where, self.threads, self.fingerprints))
        follows = layer + (1 if layer > self.last_block else -1)
        self.last_block = layer
        if 0 <= follows < self.model.depth:
            self.reader.submit(self._prefetch, follows)
        return block

    def _prefetch(self, layer: int) -> None:
        for theirs in dict.fromkeys(theirs for theirs, *_ in self.parts.values() if "{}" in theirs):
            self.opened.tensors[theirs.format(layer)].prefetch()

    def tensor(self, name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The whole parameter, in the dtype asked for."""
        if not self.has(name):
            return torch.ones(tuple(shape), device=device, dtype=dtype)
        self._fingerprint(name)
        stored, start, stop = self.stored(name)
        out = torch.empty((stop - start, *stored.shape[1:]), device=device, dtype=dtype)
        if device.type == "cpu":
            return stored.rows(start, stop, out)
        for a, b in row_runs(stored, start, stop):
            rows = stored.rows(a, b, READ.empty((b - a, *stored.shape[1:]), stored.dtype))
            # A device gets the file's dtype and converts it: torch would convert on the CPU first.
            out[a - start : b - start] = rows.to(device)
        return out

    def rows(
        self, name: str, shape: Shape, ids: Tensor, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Rows of a matrix by id: no others are read."""
        stored, start, _ = self.stored(name)
        unique, where = ids.cpu().unique(return_inverse=True)
        rows = [stored.rows(start + i, start + i + 1) for i in unique.tolist()]
        return torch.cat(rows).to(device, dtype)[where.to(device)]

    def identity(self) -> dict[str, str]:
        """``weight_hash``: over name, dtype, shape and bytes of the embedding and every block.

        Of our names, so that the same weights have the same hash in every format. Final norm and head
        stay out, which only gradients read: one checkpoint, one hash. Most rows are hashed as they pass
        through their products; the rest, as of the embedding, is read here.
        """
        digest = xxhash.xxh3_128()
        for name in sorted(self.names()):
            if name in ("norm.weight", "norm.bias", "head.weight"):
                continue
            self._fingerprint(name)
            stored, start, stop = self.stored(name)
            digest.update(f"{name} {stored.dtype} {(stop - start, *stored.shape[1:])} ".encode())
            digest.update(self.fingerprints.digest(name))
        return {"weight_hash": digest.hexdigest()}

    def table(self) -> list[dict[str, Any]]:
        """A row per tensor: our name, the file's, shape, dtype, size, and ``Moments.statistics``."""
        rows = []
        for name in self.names():
            self._fingerprint(name)
            stored, start, stop = self.stored(name)
            shape = (stop - start, *stored.shape[1:])
            about = {
                "tensor": name,
                "in_file": stored.name,
                "shape": "×".join(map(str, shape)),
                "dtype": stored.kind,
                "entries": math.prod(shape),
            }
            rows.append(about | self.fingerprints.statistics(name))
        return rows

    def names(self) -> Iterator[str]:
        """Our names of all parameters in the files: embeddings, block after block, final norm, head."""
        blocks = [name for name in self.parts if "{}" in name]
        starts = [name for name in ("embedding.weight", "position.weight") if name in self.parts]
        ends = [n for n in ("norm.weight", "norm.bias", "head.weight") if n in self.parts]
        yield from starts
        for layer in range(self.model.depth):
            yield from (name.format(layer) for name in blocks)
        yield from ends

    def _fingerprint(self, name: str) -> None:
        """Read a parameter's rows for its fingerprint, unless a product has read them."""
        if self.fingerprints.has(name):
            return
        stored, start, stop = self.stored(name)
        # A vector is one run.
        runs = row_runs(stored, start, stop) if len(stored.shape) > 1 else [(start, stop)]

        def work(run: tuple[int, int]) -> None:
            hashed = self.fingerprints.started(name, run[0] - start)
            rows = READ.empty((run[1] - run[0], *stored.shape[1:]), stored.dtype)
            stored.rows(*run, rows, hashed.update if hashed else None)
            self.fingerprints.add(name, run[0] - start, hashed, rows, stored.dtype)

        for _ in self.threads.map(work, runs):
            pass
