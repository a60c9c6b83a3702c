"""Random weights, each from its own generators, seeded by (seed, parameter name, piece).

So a model of depth 8 is the first 8 blocks of the one of depth 64, a streamed block equals the
resident one, and the order of work doesn't matter. Numbers are drawn in float32 and rounded to
the dtype asked for: a bfloat16 model is the rounded float32 model.

A matrix is drawn in pieces of whole rows, about DENSE_PIECE numbers each, so that of the embedding only
pieces with a token in them are drawn. On the CPU a piece has its own stream of NumPy's SFC64,
seeded through ``SeedSequence`` (torch's CPU generator keeps 32 bits of its seed, too few for
millions of streams), and the pieces run on all threads. On CUDA they are drawn on the device by
torch's Philox generator, seeded with 63 bits of a hash; a block's matrix is one piece there, and the
embedding's and the head's pieces are larger (CUDA_PIECE). CPU and
CUDA draw different numbers, and so do two CUDA devices that differ in their number of multiprocessors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from simlab.config import InitConfig, ModelConfig
from simlab.schemes.init import Constant, Gaussian, distribution
from simlab.weights.base import Shape, Weights

BY_ROWS = (
    "embedding.weight",
    "position.weight",
    "head.weight",
)  # ``rows`` draws some of theirs
DENSE_PIECE = 1 << 16  # numbers per piece: 256 KiB of float32, which a core's cache holds
# Numbers per piece of a large embedding: a batch needs a few rows from many places, and every piece
# with one of them is drawn whole. Measured at width 1024, 64 tokens: 14 ms, with pieces of 2^16 44 ms.
EMBEDDING_PIECE = 1 << 13
# On CUDA a piece costs 160 µs of calls and a synchronisation, however small it is: of OLMo-2-1B, 2048
# tokens need 2000 of the CPU's pieces, 330 ms on an H200, and these 49 take 8 ms.
CUDA_PIECE = 1 << 22


def by_rows(name: str) -> bool:
    """True of a matrix of which ``rows`` draws some rows."""
    return name in BY_ROWS or name.endswith(".value_embedding.weight")


def entropy_of(*key: object) -> int:
    """128 bits of a hash of the key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def drawn_name(model: ModelConfig, name: str) -> str:
    """The parameter whose numbers a parameter has: of a tied head the embedding, of a block that is
    visited again the first visit's.
    """
    if name == "head.weight" and model.tied:
        return "embedding.weight"
    first, _, rest = name.partition(".")
    if first != "blocks" or (model.norm.loops or 1) == 1:
        return name
    layer, _, inner = rest.partition(".")
    return f"blocks.{int(layer) % model.distinct}.{inner}"


def draw_on_cpu(out: np.ndarray, entropy: int, piece: int, law: Gaussian) -> None:
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
    if law.sigma != 1:
        flat *= np.float32(law.sigma)


def draw_on_cuda(out: Tensor, entropy: int, piece: int, law: Gaussian) -> None:
    """Fill a float32 tensor on the device with draws of the law, without a synchronisation.

    By inversion: z = √2·erf⁻¹(u), u uniform on ± erf(c/√2), is N(0, 1) cut at ± c.
    """
    generator = torch.Generator(out.device)
    generator.manual_seed(entropy_of(entropy, piece) >> 65)
    if law.truncate is None:
        out.normal_(generator=generator).mul_(law.sigma)
        return
    edge, cut = math.erf(law.truncate / math.sqrt(2)), law.truncate * law.sigma
    out.uniform_(-edge, edge, generator=generator).erfinv_().mul_(math.sqrt(2) * law.sigma)
    out.clamp_(-cut, cut)


def fill_piece(out: Tensor, entropy: int, piece: int, law: Gaussian) -> Tensor:
    """Fill a float32 tensor, on the CPU or a CUDA device, and return it."""
    if out.device.type == "cuda":
        draw_on_cuda(out, entropy, piece, law)
    else:
        draw_on_cpu(out.numpy(), entropy, piece, law)
    return out


class RandomWeights(Weights):
    """The weights of one random init; see the module's docstring.

    drawing: extra threads that draw random numbers while torch's threads multiply; 0: as many threads
    as torch has draw, and with one the thread that asks.
    """

    def __init__(self, model: ModelConfig, init: InitConfig, seed: int, drawing: int = 0) -> None:
        self.model, self.init, self.seed = model, init, seed
        threads = drawing or torch.get_num_threads()
        self.pool = ThreadPoolExecutor(threads) if drawing or threads > 1 else None

    def tensor(self, name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The whole parameter; a tied one is the one that it is tied to."""
        name = drawn_name(self.model, name)
        law = distribution(self.model, self.init, name)
        if isinstance(law, Constant):
            return torch.full(tuple(shape), law.value, device=device, dtype=dtype)
        out = torch.empty(tuple(shape), dtype=dtype, device=_home(device))
        in_pieces = by_rows(name) or out.device.type == "cpu"
        per = rows_per_piece(name, shape, out.device.type) if in_pieces else shape[0]
        entropy = entropy_of(self.seed, name)

        def draw(piece: int) -> None:
            part = out[piece * per : (piece + 1) * per]
            if dtype is torch.float32:
                fill_piece(part, entropy, piece, law)
            else:
                part.copy_(
                    fill_piece(torch.empty_like(part, dtype=torch.float32), entropy, piece, law)
                )

        self._each(draw, range(math.ceil(shape[0] / per)), out.device)
        return out.to(device)

    def rows(
        self, name: str, shape: Shape, ids: Tensor, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Rows of an embedding or the head, from the pieces in which they lie."""
        name = drawn_name(self.model, name)
        law = distribution(self.model, self.init, name)
        assert isinstance(law, Gaussian)
        unique, where = ids.cpu().unique(return_inverse=True)
        out = torch.empty((len(unique), *shape[1:]), dtype=dtype, device=_home(device))
        per = rows_per_piece(name, shape, out.device.type)
        entropy = entropy_of(self.seed, name)

        def draw(piece: int) -> None:
            rows = min(per, shape[0] - piece * per)
            part = torch.empty((rows, *shape[1:]), device=out.device)
            fill_piece(part, entropy, piece, law)
            here = (unique // per == piece).nonzero().flatten()
            chosen = (unique[here] - piece * per).to(out.device)
            out[here.to(out.device)] = part[chosen].to(dtype)

        self._each(draw, (unique // per).unique().tolist(), out.device)
        return out.to(device)[where.to(device)]

    def _each(
        self, draw: Callable[[int], None], pieces: Iterable[int], device: torch.device
    ) -> None:
        """Draw every piece: on all threads of a CPU, one after another on a device."""
        pieces = list(pieces)
        alone = device.type == "cuda" or len(pieces) == 1
        for _ in map(draw, pieces) if alone or not self.pool else self.pool.map(draw, pieces):
            pass


def _home(device: torch.device) -> torch.device:
    """The device that draws the numbers for a device: itself for CUDA, else the CPU."""
    return device if device.type == "cuda" else torch.device("cpu")


def rows_per_piece(name: str, shape: Shape, device: str) -> int:
    """How many rows of a matrix are drawn by one generator on a device, ``cpu`` or ``cuda``."""
    large_embedding = name.endswith("embedding.weight") and math.prod(shape) > DENSE_PIECE
    on_cpu = EMBEDDING_PIECE if large_embedding else DENSE_PIECE
    return max(1, (CUDA_PIECE if device == "cuda" else on_cpu) // math.prod(shape[1:]))
