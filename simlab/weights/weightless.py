"""Weightless simulation: a random linear layer's output for one batch, without its weights.

A matrix W (d_out × d_in) with i.i.d. N(0, σ²) entries meets the N tokens X (N × d_in) of a batch.
Given X, the columns of Y = XWᵀ are independent N(0, σ²XXᵀ). With XXᵀ = LLᵀ (Cholesky), Y has the
law of

    Y = σLZ,    Z (N × d_out) i.i.d. N(0, 1),

jointly over all tokens, at any width: Z is drawn, never W.

Backward, G (N × d_out) arrives and dX = GW is asked for. What Y has shown of W is its part in the
span of X's rows, WQQᵀ = σZᵀQᵀ with Qᵀ = L⁻¹X; G is a function of that part and of other things, but
not of the rest of W, which is therefore still i.i.d. Gaussian. With GGᵀ = L_g L_gᵀ,

    dX = σ[GZᵀQᵀ + L_g Z₂(I − QQᵀ)],    Z₂ (N × d_in) i.i.d. N(0, 1)

(conditioning on linear observations: Bolthausen, arXiv 1201.2891, §3; Doucet 2010 for the sampling).

Layers with the same input share L and Q. For them the sum over layers of dX is Gaussian given the
G's, with the one factor L_g of Σσ²GGᵀ: one Z₂ serves them all.

Singular XXᵀ: rows of X are scaled to length 1 and j = JITTER is added to the diagonal, which says
that a token's input is known to a relative √j = 3e-7, about float32's rounding. It is not ignored in
the backward: Y = XWᵀ + √jE is the observation, and dX is a draw given that,

    dX = σ[(GZᵀ − L_g(Z₂Q + √j·Z₃L⁻ᵀ))Qᵀ + L_g Z₂],    Z₃ (N × N) i.i.d. N(0, 1),

so that the implied W has exactly i.i.d. N(0, σ²) entries however the tokens lie. With N ≥ d_in there
is nothing to gain, and L = X, Z = Wᵀ: the layer draws its weights like a dense one.

A truncated init is matched by its variance: W's entries are then not Gaussian, and Y only nearly
so, its kurtosis by some 1/d_in (docs/weightless.md).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simlab.config import InitConfig, ModelConfig
from simlab.model.describe import describe
from simlab.model.transformer import Block
from simlab.schemes.init import Gaussian, distribution
from simlab.weights.base import COLUMNS_AT_ONCE, Columns, Shape
from simlab.weights.dense import RandomWeights
from simlab.weights.rng import Normals

JITTER = 1e-13  # far above the rounding of float64 sums of 10^5 squares
AHEAD = 4  # layers whose Z is drawn while one computes: measured, 7 are 5 % slower
# Entries of the widest activation of all curves of a batch. Measured in ms per block and curve on 2
# cores, d_ff four times the width, for 2²⁰, 1.5·2²⁰, 2²¹ and 2²²: 64 tokens of width 256 6.7, 6.6, 6.6,
# 5.3; of 1024 22.8, 19.6, 17.2, 16.7; of 2048 46, 47, 43, 38; 256 tokens of width 256 45, 41, 42, 42;
# with gradients 64 of width 512 51, 50, 45, 42.
TOGETHER = 1 << 22
GRAM_COLUMNS = 4096  # of X, widened to float64 at a time


def widest(model: ModelConfig, gradients: bool) -> int:
    """Entries of a token's largest activation."""
    logits = min(model.vocab_size, COLUMNS_AT_ONCE) if gradients else 0
    return max(describe(model).widest, logits)


def together(model: ModelConfig, tokens: int, gradients: bool, seeds: int) -> int:
    """The number of seeds measured as one batch, such that batches are of about the same size.

    tokens: of one seed. Seeds with experts are measured one by one, since an expert gets another
    number of tokens in each.
    """
    if model.experts:
        return 1
    most = max(1, TOGETHER // (tokens * widest(model, gradients)))
    batches = -(-max(1, seeds) // most)
    return -(-max(1, seeds) // batches)


def _home(device: torch.device) -> torch.device:
    """The device that factorises for a device: float64 is needed, and MPS has none."""
    return torch.device("cpu") if device.type == "mps" else device


def gram(x: Tensor) -> Tensor:
    """XXᵀ (S, N, N) in float64, of X (S, N, d) in any dtype."""
    shape = (*x.shape[:-1], x.shape[-2])
    total = torch.zeros(shape, dtype=torch.float64, device=_home(x.device))
    for columns in x.split(GRAM_COLUMNS, dim=-1):
        wide = columns.to(total)
        total.baddbmm_(wide, wide.mT)
    return total


def factor(square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths D (S, N, 1), lower triangular L (S, N, N), j (S, 1, 1): LLᵀ = D⁻¹·square·D⁻¹ + j·I.

    square: Gram matrices (S, N, N) in float64. Where one isn't finite, its L is NaN.
    """
    scale = square.diagonal(dim1=-2, dim2=-1).sqrt()[..., None]
    inverse = _inverse(scale)
    unit, jitter = inverse * square * inverse.mT, JITTER
    diagonal = unit.diagonal(dim1=-2, dim2=-1)
    failed = torch.ones_like(diagonal[:, :1])
    total = torch.zeros_like(failed)
    while True:
        added = jitter * failed  # each matrix gets what it would get alone
        diagonal.add_(added)
        total += added
        lower, info = torch.linalg.cholesky_ex(unit)
        if not info.any():
            break
        failed = (info != 0)[:, None].to(failed)
        if jitter > 1e-6 or not (failed * square.isfinite().all(-1).all(-1, keepdim=True)).any():
            lower = lower.masked_fill(failed[..., None] > 0, torch.nan)
            break
        jitter *= 10
    return scale, lower, total[..., None]


def _inverse(scale: Tensor) -> Tensor:
    """1/scale, and 0 for a row of zeros."""
    return torch.where(scale > 0, 1 / scale, 0.0)


class _Coordinates(torch.autograd.Function):
    """X (S, N, d) to L (S, N, N), float32, and a zero like L whose "gradient" is Σσ²GGᵀ: the tap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, normals: Normals, name: str) -> tuple[Tensor, Tensor]:
        scale, lower, jitter = factor(gram(x.detach()))
        ctx.save_for_backward(x, scale, lower, jitter)
        ctx.normals, ctx.name = normals, f"{name}/backward"
        tap = torch.zeros((), dtype=torch.float64, device=lower.device).expand_as(lower)
        return (scale * lower).to(x.device, torch.float32), tap

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        row_space, square = gradients
        x, scale, lower, jitter = ctx.saved_tensors
        inverse = _inverse(scale)

        def solve(right: Tensor) -> Tensor:
            return torch.linalg.solve_triangular(lower, right, upper=False)

        def narrow(wide: Tensor) -> Tensor:
            return wide.to(x.device, torch.float32)

        q = torch.cat(
            [narrow(solve(inverse * part.to(lower))) for part in x.split(GRAM_COLUMNS, dim=-1)], -1
        )
        scale_g, lower_g, _ = factor(square)
        down = narrow(scale_g * lower_g)
        fresh = ctx.normals(ctx.name, x.shape[1:], x.device)
        noise = ctx.normals(f"{ctx.name}/jitter", lower.shape[1:], lower.device).to(lower)
        noise = jitter.sqrt() * solve(noise.mT).mT
        projected = torch.baddbmm(narrow(noise), fresh, q.mT)
        out = (row_space - down @ projected) @ q + down @ fresh
        return out.to(x.dtype), None, None


class _Product(torch.autograd.Function):
    """LZ, and back: GZᵀ to L, GGᵀ to the tap. Both inputs come with their σ."""

    @staticmethod
    def forward(ctx: Any, coordinates: Tensor, tap: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return coordinates @ z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (z,) = ctx.saved_tensors
        (g,) = gradients
        return g @ z.mT, gram(g), None


class Inputs:
    """Holds the factorisation of the last input, which layers with the same input share."""

    def __init__(self, normals: Normals) -> None:
        self.normals = normals
        self.x: Tensor | None = None
        self.factored: tuple[Tensor, Tensor | None]

    def tokens(self, x: Tensor) -> int:
        """N: the tokens of each curve in x (…, d)."""
        return x.shape[:-1].numel() // len(self.normals.seeds)

    def start(self, x: Tensor, name: str) -> None:
        """Start drawing the normals that the backward through x needs, if x requires a gradient."""
        tokens, d = self.tokens(x), x.shape[-1]
        if x.requires_grad and self.x is not x and tokens < d:
            self.normals.start(f"{name}/backward", (tokens, d))

    def coordinates(self, x: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
        """L (S, N, N) and its tap for x, named after the first layer that asks; x itself if N ≥ d.

        x (…, d): all tokens of the first curve, then all of the next; itself as (S, N, d).
        """
        if self.x is not x:
            flat = x.reshape(len(self.normals.seeds), -1, x.shape[-1])
            wide = flat.shape[1] < flat.shape[2]
            factored = (
                _Coordinates.apply(flat, self.normals, name) if wide else (flat.float(), None)
            )
            self.x, self.factored = x, factored
        return self.factored


@dataclass(frozen=True)
class LinearShape:
    """A linear layer: the name of its weight, and its dimensions."""

    name: str
    d_in: int
    d_out: int

    @property
    def expert(self) -> str:
        """The expert that it is of, by name, or an empty string: it then meets every token."""
        before, routed, after = self.name.partition(".experts.")
        return before + routed + after.partition(".")[0] if routed else ""

    def z(self, tokens: int) -> Shape:
        """The shape of a seed's Z for a batch of ``tokens`` tokens."""
        return min(tokens, self.d_in), self.d_out


class GaussianLinear(nn.Module):
    """(…, d_in) to (…, d_out): x Wᵀ + b in law, for W with i.i.d. N(0, std²) entries. Use it once.

    The bias b (d_out), where there is one, is a parameter like a norm's gain, and every curve's.

    Each curve has its own W, and its share of x: the first 1/S of the tokens are the first curve's,
    and so on. ``bind`` gives it its name, its std and what it shares with its block's other layers.
    """

    inputs: Inputs

    def __init__(self, d_in: int, d_out: int, bias: bool = False) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def bind(
        self, name: str, std: float, inputs: Inputs, later: Sequence[LinearShape] = ()
    ) -> None:
        """name: of the weight. later: next layers with as many tokens, drawn ahead of use."""
        self.shape, self.std, self.inputs = LinearShape(name, self.d_in, self.d_out), std, inputs
        self.later = list(later)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) to (…, d_out), in x's dtype; computed in float32."""
        normals, tokens = self.inputs.normals, self.inputs.tokens(x)
        normals.start(self.shape.name, self.shape.z(tokens))
        self.inputs.start(x, self.shape.name)
        for following in self.later:
            if tokens < following.d_in:  # else Z is a whole matrix, of which a block's are enough
                normals.start(following.name, following.z(tokens))
        coordinates, tap = self.inputs.coordinates(x, self.shape.name)
        z = normals(self.shape.name, self.shape.z(tokens), x.device)
        scaled = coordinates * self.std
        y = scaled @ z if tap is None else _Product.apply(scaled, tap * self.std**2, z)
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], self.d_out)


class GaussianWeights(RandomWeights):
    """Random inits whose matrices are never drawn; their gains and embeddings are as in dense ones.

    Several seeds are measured as one batch: their sequences pass through the blocks together, and
    each curve agrees with the one measured alone to float32's rounding. All numbers are drawn on the
    CPU, so every device gives the same curve, to rounding.
    """

    def __init__(self, model: ModelConfig, init: InitConfig, *seeds: int, drawing: int = 0) -> None:
        if model.experts and len(seeds) > 1:
            raise ValueError(f"{len(seeds)} seeds: a model with experts is measured one by one")
        super().__init__(model, init, seeds[0], drawing)
        self.dense = [RandomWeights(model, init, seed) for seed in seeds]
        self.curves = len(seeds)
        self.normals = Normals(seeds, self.pool)
        self.last = -1  # the block that was asked for last

    tokens_at_once = sys.maxsize  # a matrix meets all of them at once, or it isn't one matrix

    def linear(self, d_in: int, d_out: int, bias: bool) -> nn.Module:
        """A GaussianLinear, which ``block`` binds."""
        return GaussianLinear(d_in, d_out, bias)

    def block(self, layer: int, device: torch.device, dtype: torch.dtype) -> Block:
        """One block, its linear layers bound to their names and stds."""
        block = super().block(layer, device, dtype)
        inputs = Inputs(self.normals)
        linears = {n: m for n, m in block.named_modules() if isinstance(m, GaussianLinear)}
        follows = layer + (1 if layer > self.last else -1)  # forward, or back again
        self.last = layer
        layers = [
            LinearShape(f"blocks.{i}.{inner}.weight", linear.d_in, linear.d_out)
            for i in (layer, follows)
            if 0 <= i < self.model.depth
            for inner, linear in linears.items()
        ]
        for i, linear in enumerate(linears.values()):
            # It isn't known how many tokens another expert gets.
            later = [one for one in layers[i + 1 :] if one.expert == layers[i].expert]
            linear.bind(layers[i].name, self.std(layers[i].name), inputs, later[:AHEAD])
        return block

    def end_parts(self, end: str, device: torch.device, dtype: torch.dtype) -> nn.ModuleDict:
        """As in Weights, its linear layers bound to their names and stds."""
        parts, inputs = super().end_parts(end, device, dtype), Inputs(self.normals)
        for inner, linear in parts.named_modules():
            if isinstance(linear, GaussianLinear):
                name = f"{end}_parts.{inner}.weight"
                linear.bind(name, self.std(name), inputs)
        return parts

    def head(self, x: Tensor, ids: Tensor) -> tuple[list[Columns], Tensor]:
        """As in Weights. A tied head reuses the batch's embeddings and draws the other rows."""
        count, parts = self.model.vocab_size, []
        targets = ids[:, 1:].flatten()
        if self.model.tied:
            distinct, where = ids.unique(return_inverse=True)
            cpu = torch.device("cpu")
            parts_of = [dense.vectors(distinct[None], cpu, x.dtype) for dense in self.dense]
            rows = torch.cat(parts_of).to(x.device)
            parts.append(Columns(x, lambda: iter([rows.mT])))
            targets, count = where[:, 1:].flatten(), count - len(distinct)
        coordinates, tap = Inputs(self.normals).coordinates(x, "head.weight")
        std, d_in = self.std("head.weight"), coordinates.shape[-1]

        def chunks() -> Iterator[Tensor]:
            for start in range(0, count, COLUMNS_AT_ONCE):
                shape = (d_in, min(COLUMNS_AT_ONCE, count - start))
                yield self.normals(f"head.weight/{start}", shape, x.device)

        tap = None if tap is None else tap * std**2
        return [*parts, Columns(coordinates * std, chunks, tap)], targets

    def std(self, name: str) -> float:
        """The standard deviation of a matrix's entries, its truncation taken into account.

        A tied head is the embedding.
        """
        if name == "head.weight" and self.model.tied:
            name = "embedding.weight"
        law = distribution(self.model, self.init, name)
        assert isinstance(law, Gaussian)
        return law.std

    def value_rows(
        self, name: str, ids: Tensor, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """As in Weights; the same as dense models' on the CPU."""
        cpu = torch.device("cpu")
        rows = [dense.value_rows(name, ids, cpu, dtype) for dense in self.dense]
        return torch.cat(rows).to(device)

    def embedded(self, ids: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """As in Weights; the same as dense models' on the CPU."""
        cpu = torch.device("cpu")
        return torch.cat([dense.embedded(ids, cpu, dtype) for dense in self.dense]).to(device)
