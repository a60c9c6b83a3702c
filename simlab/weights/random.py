"""Random weights, each from its own generator, seeded by (seed, parameter name).

So a model of depth 8 is the first 8 blocks of the one of depth 64, a streamed block equals the
resident one, and the order of work doesn't matter. Numbers are drawn in float32 and rounded to
the dtype asked for: a bfloat16 model is the rounded float32 model.

On the CPU a matrix is drawn in pieces of whole rows, each piece from its own stream of NumPy's
SFC64, spawned by ``SeedSequence`` from the seed, the name's hash and the piece's number (torch's CPU
generator keeps 32 bits of its seed, too few for millions of weights). Pieces run on all threads
and the embedding's rows are pieces, so only those that occur are drawn. On CUDA the weight is
drawn on the device by its own Philox generator, seeded with 64 bits of the same hash.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from simlab.config import InitConfig, ModelConfig
from simlab.weights.init import Constant, Gaussian, distribution
from simlab.weights.source import Shape

PIECE = 1 << 16  # numbers per piece: 256 KiB of float32, which a core's cache holds


def _hash(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()


def _draw_piece(out: np.ndarray, entropy: int, piece: int, law: Gaussian) -> None:
    """Fill a float32 array with draws of the law; beyond the cut, a number is drawn again."""
    sequence = np.random.SeedSequence(entropy, spawn_key=(piece,))
    generator = np.random.Generator(np.random.SFC64(sequence))
    flat = out.reshape(-1)
    generator.standard_normal(out=flat, dtype=np.float32)
    if law.truncate is not None:
        again = np.flatnonzero(np.abs(flat) > law.truncate)
        while again.size:
            fresh = generator.standard_normal(again.size, dtype=np.float32)
            flat[again] = fresh
            again = again[np.abs(fresh) > law.truncate]
    flat *= np.float32(law.sigma)


def _on_cpu(
    entropy: bytes,
    law: Gaussian,
    pieces: list[tuple[int, slice]],
    out: Tensor,
    pool: ThreadPoolExecutor,
) -> None:
    """Draw the given pieces into rows of ``out`` (float32 in place, else by way of a buffer)."""
    key = int.from_bytes(entropy, "little")
    rows = out.view(out.shape[0], -1)

    def draw(task: tuple[int, slice]) -> None:
        piece, where = task
        if out.dtype is torch.float32:
            _draw_piece(rows[where].numpy(), key, piece, law)
        else:
            buffer = np.empty(tuple(rows[where].shape), np.float32)
            _draw_piece(buffer, key, piece, law)
            rows[where] = torch.from_numpy(buffer)

    list(pool.map(draw, pieces))


def _on_cuda(entropy: bytes, law: Gaussian, shape: Shape, device: torch.device) -> Tensor:
    """The whole weight by inversion on the device, without a synchronisation: float32.

    z = √2·erf⁻¹(u), u uniform on ± erf(c/√2): N(0, 1) cut at ± c.
    """
    generator = torch.Generator(device).manual_seed(int.from_bytes(entropy[:8], "little") >> 1)
    out = torch.empty(tuple(shape), device=device)
    if law.truncate is None:
        return out.normal_(generator=generator).mul_(law.sigma)
    edge = math.erf(law.truncate / math.sqrt(2))
    cut = law.truncate * law.sigma
    out.uniform_(-edge, edge, generator=generator).erfinv_().mul_(math.sqrt(2) * law.sigma)
    return out.clamp_(-cut, cut)


class RandomWeights:
    """The weights of one random init; see the module's docstring."""

    def __init__(self, model: ModelConfig, init: InitConfig, seed: int) -> None:
        self.model, self.init, self.seed = model, init, seed
        self.pool = ThreadPoolExecutor(torch.get_num_threads())

    def tensor(self, name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The whole parameter; a head tied to the embedding is the embedding."""
        if name == "head.weight" and self.model.tied:
            name = "embedding.weight"
        law = distribution(self.model, self.init, name)
        if isinstance(law, Constant):
            return torch.full(tuple(shape), law.value, device=device, dtype=dtype)
        if name == "embedding.weight":  # row by row, as rows() draws it
            return self.rows(name, shape, torch.arange(shape[0]), device, dtype)
        if device.type == "cuda":
            return _on_cuda(_hash(self.seed, name), law, shape, device).to(dtype)
        rows = max(1, PIECE // math.prod(shape[1:]))
        pieces = [
            (i, slice(start, min(start + rows, shape[0])))
            for i, start in enumerate(range(0, shape[0], rows))
        ]
        out = torch.empty(tuple(shape), dtype=dtype)
        _on_cpu(_hash(self.seed, name), law, pieces, out, self.pool)
        return out.to(device)

    def rows(
        self, name: str, shape: Shape, ids: Tensor, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Rows of a matrix that is drawn row by row (the embedding); each occurring row once."""
        law = distribution(self.model, self.init, name)
        assert isinstance(law, Gaussian)
        unique, where = ids.cpu().unique(return_inverse=True)
        columns = tuple(shape[1:])
        if device.type == "cuda":
            drawn = torch.empty((len(unique), *columns), device=device, dtype=dtype)
            for i, row in enumerate(unique.tolist()):
                drawn[i] = _on_cuda(_hash(self.seed, f"{name}[{row}]"), law, columns, device)
        else:
            drawn = torch.empty((len(unique), *columns), dtype=dtype)
            pieces = [(row, slice(i, i + 1)) for i, row in enumerate(unique.tolist())]
            _on_cpu(_hash(self.seed, name), law, pieces, drawn, self.pool)
        return drawn.to(device)[where.to(device)]

    def identity(self) -> dict[str, object]:
        """The seed that these weights are drawn from."""
        return {"seed": self.seed}


Drawer = Callable[[ModelConfig, InitConfig, int], RandomWeights]
