"""The kernel of attention's output, its noise between seeds, and its linear response.

With Gaussian q and k the average over softmax(qkᵀ/√C) has no closed form: a few heads are drawn, of
the true size C, from fixed random numbers. The rest is exact: given a head's weights a (T, T), its
output's kernel is a·Ĥ·aᵀ times the values' variance, and

    B = H·C·σ_o²·d·σ_v²·O,   O = mean over heads of aĤaᵀ.

At a finite width Ĥ varies too, together with a: groups of heads share one draw of Ĥ, a Wishart matrix
with as many degrees of freedom as the correlations' variance says. O's own error from Ĥ is taken out
by a control variate, ā(mean Ĥ − H)āᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simlab.config import ModelConfig
from simlab.schemes.rope import inverse_frequencies
from simlab.theory.laws import Array
from simlab.theory.mean_field.kernels import TINY, Input, outer_square

Array32 = NDArray[np.float32]
# Drawn per layer. Measured on OLMo-2-1B's shape, 64 tokens, over six sets of draws: a mean square
# varies by 0.02 % (reordered) or 0.17 % (pre, fan-in), a cosine by 0.3 and 0.6 %.
HEADS = 16
FIRST_HEADS = 128  # in the first two blocks, whose error every later row carries
HEAD_GROUPS = 8  # of heads with a common Ĥ
POOL = 1 << 21


class Draws:
    """Fixed standard normals, in float32: a pool drawn once, read from changing places."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = np.random.default_rng(seed)
        self.pool = self.generator.standard_normal(POOL, dtype=np.float32)

    def __call__(self, *shape: int) -> Array32:
        """Normals of a shape."""
        n = math.prod(shape)
        if n > POOL // 2:
            return self.generator.standard_normal(n, dtype=np.float32).reshape(shape)
        start = int(self.generator.integers(POOL - n))
        return self.pool[start : start + n].reshape(shape)


def cholesky(kernel: Array) -> Array:
    """L with LLᵀ = kernel; of one that is singular or not quite positive, by its eigenvectors."""
    root = np.sqrt(np.maximum(kernel.diagonal(), TINY))
    unit = kernel / np.outer(root, root)
    try:
        return root[:, None] * np.linalg.cholesky(unit + 1e-10 * np.eye(len(unit)))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(unit)
        out: Array = root[:, None] * vectors * np.sqrt(np.maximum(values, 0))
        return out


@dataclass(frozen=True, eq=False)
class Context:
    """The parts that every layer's attention uses: the model, the fixed draws and RoPE's tables.

    batch, length: B sequences of T tokens. tables: cos and sin (T, C/2) by ``scaled``, made on demand.
    """

    model: ModelConfig
    batch: int
    length: int
    draws: Draws = field(default_factory=Draws)
    tables: dict[bool, tuple[Array32, Array32]] = field(default_factory=dict)

    def rope(self, scaled: bool) -> tuple[Array32, Array32]:
        """cos and sin (T, C/2), with the model's long-context scaling or without."""
        if scaled not in self.tables:
            model = self.model
            angles, factor = inverse_frequencies(
                np.arange(model.head_dim // 2, dtype=np.float64), model.head_dim, model.rope_theta,
                model.yarn if scaled else None, model.llama3 if scaled else None,
            )  # fmt: skip
            turns = np.outer(np.arange(self.length), angles)
            self.tables[scaled] = (
                (factor * np.cos(turns)).astype(np.float32),
                (factor * np.sin(turns)).astype(np.float32),
            )
        return self.tables[scaled]

    def mask(self, window: int | None) -> NDArray[np.bool_]:
        """True (T, T) where a query may look."""
        causal = np.tril(np.ones((self.length, self.length), dtype=bool))
        return causal if window is None else causal & ~np.tril(causal, -window)


def turn(x: Array32, table: tuple[Array32, Array32], back: bool = False) -> Array32:
    """RoPE on halves (…, T, C); ``back``: its transpose, for gradients."""
    cos, sin = table
    if back:
        sin = -sin
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), -1)


@dataclass(frozen=True, eq=False)
class DrawnHeads:
    """Some drawn heads with a common Ĥ. lower: L̂ (N, n), L̂L̂ᵀ = Ĥ. weights: a (M, B, T, T).

    projected: q and k after QK-norm and RoPE; before RoPE: ``normed``; factor (M, N): QK-norm's
    divisor's inverse times √d·σ.
    """

    lower: Array
    weights: Array32
    projected: tuple[Array32, Array32]
    normed: tuple[Array32, Array32]
    factor: tuple[Array32, Array32]


@dataclass(frozen=True, eq=False)
class AttentionKernel:
    """One layer's attention, called with a vector; ``stds``: by role, the true (truncated) ones."""

    context: Context
    layer: int
    stds: Mapping[str, float]

    @property
    def scale(self) -> float:
        """H·C·σ_o²·d·σ_v²: the output's kernel over that of an average of inputs."""
        model = self.context.model
        width = model.heads * model.head_dim
        return width * self.stds["o_proj"] ** 2 * model.width * self.stds["v_proj"] ** 2

    def lowers(self, v: Input, groups: int) -> list[Array]:
        """L̂ (N, n) of ``groups`` draws of the input's Gram matrix.

        The degrees of freedom are those that give the correlations' variance τ²: (1 − ρ²)²/τ² on
        average, at most d. With more of them than tokens by Bartlett's decomposition.
        """
        kernel, width, draws = v.kernel, self.context.model.width, self.context.draws
        lower, tokens = cholesky(kernel), len(kernel)
        variance = v.correlation_variance
        pairs = ~np.eye(tokens, dtype=bool) & (variance > 0)
        freedom = float(width)
        if pairs.any():
            wishart = (1 - np.minimum(kernel**2 / np.maximum(outer_square(kernel), TINY), 1)) ** 2
            freedom = float(np.clip(wishart[pairs].sum() / variance[pairs].sum(), 4, width))
        drawn = []
        for _ in range(groups):
            if freedom > tokens:
                a = np.tril(draws(tokens, tokens).astype(np.float64), -1)
                chi = np.sqrt(np.maximum(freedom - np.arange(tokens) - 0.5, 0.1))
                np.fill_diagonal(a, chi + draws(tokens) / math.sqrt(2))
                one = lower @ a / math.sqrt(freedom)
            else:
                a = draws(tokens, int(freedom)).astype(np.float64)
                one = lower @ a / math.sqrt(a.shape[1])
            if v.normed:
                size = np.maximum((one**2).sum(1), TINY)
                one = one * np.sqrt(kernel.diagonal() / size)[:, None]
            drawn.append(one)
        return drawn

    def project(self, role: str, lower: Array, count: int) -> tuple[Array32, Array32]:
        """q or k of some heads (M, N, C) after QK-norm, before RoPE, and the norm's factor (M, N)."""
        model, draws = self.context.model, self.context.draws
        heads = model.heads if role == "q_proj" else model.kv_heads
        variance = model.width * self.stds[role] ** 2
        size = lower.shape[1]
        x = np.matmul(lower.astype(np.float32), draws(count, size, model.head_dim))
        if model.norm.type == "layer" and model.qk_norm == "per_head":
            x = x - x.mean(-1, keepdims=True)
        own = np.square(x).sum(-1)
        c = model.head_dim
        if model.qk_norm == "full":
            # The other heads' part of the mean square, at its average.
            rest = (heads - 1) * c * np.maximum((lower**2).sum(1), TINY)
            moment = variance * (own + rest) / (heads * c)
            moment = moment * (1 - 1 / (heads * c)) if model.norm.type == "layer" else moment
            factor = math.sqrt(variance) / np.sqrt(moment + model.norm.eps)
        elif model.qk_norm == "per_head":
            factor = math.sqrt(variance) / np.sqrt(variance * own / c + model.norm.eps)
        else:
            factor = np.full_like(own, math.sqrt(variance))
        narrow = factor.astype(np.float32)
        return x * narrow[..., None], narrow

    def heads(self, lower: Array, count: int) -> DrawnHeads:
        """Draw ``count`` heads that see a Gram matrix L̂L̂ᵀ."""
        context, model = self.context, self.context.model
        window = model.window_of(self.layer)
        table = context.rope(scaled=window is None)
        shape = (count, context.batch, context.length, model.head_dim)
        (q, q_factor), (k, k_factor) = (self.project(r, lower, count) for r in ("q_proj", "k_proj"))
        turned = turn(q.reshape(shape), table), turn(k.reshape(shape), table)
        logits = turned[0] @ turned[1].swapaxes(-1, -2) / np.float32(math.sqrt(model.head_dim))
        logits = np.where(context.mask(window), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return DrawnHeads(lower, weights, turned, (q, k), (q_factor, k_factor))

    def counts(self) -> tuple[int, int]:
        """Groups, and heads in each."""
        heads = HEADS if self.layer >= 2 else FIRST_HEADS
        groups = max(1, min(HEAD_GROUPS, heads // 4))
        return groups, heads // groups

    def __call__(self, v: Input) -> AttentionBranch:
        """Attention's output for inputs v."""
        context = self.context
        groups, count = self.counts()
        lowers = self.lowers(v, groups)
        outs, weights = [], []
        for lower in lowers:
            drawn = self.heads(lower, count)
            outs.append(sandwich(drawn.weights, (lower @ lower.T).astype(np.float32)))
            weights.append(drawn.weights)
        kernels = np.concatenate(outs)  # (M, N, N)
        a = np.concatenate(weights).astype(np.float64)
        mean, second = a.mean(0), np.square(a).mean(0)
        excess = sum(lower @ lower.T for lower in lowers) / groups - v.kernel
        out = kernels.mean(0, dtype=np.float64) - sandwich(mean[None], excess)[0]
        out = (out + out.T) / 2
        return AttentionBranch(self, v, self.scale * out, kernels, mean, second, context.batch)


def sandwich(weights: Any, kernel: Any) -> Any:
    """a·K·aᵀ for every head: weights (M, B, T, T), K (N, N), to (M, N, N)."""
    heads, batch, length, _ = weights.shape
    tokens = batch * length
    half = (weights @ kernel.reshape(batch, length, tokens)[None]).reshape(heads, tokens, tokens)
    turned = half.reshape(heads, tokens, batch, length).transpose(0, 2, 1, 3)
    out = turned @ weights.swapaxes(-1, -2)
    return out.transpose(0, 2, 1, 3).reshape(heads, tokens, tokens)


@dataclass(frozen=True, eq=False)
class AttentionBranch:
    """Attention's output, as ``kernels.Branch`` has it.

    kernels (M, N, N): aĤaᵀ of the drawn heads. mean, second (B, T, T): of a and of a² over heads.
    """

    attention: AttentionKernel
    input: Input
    kernel: Array
    kernels: Array32
    mean: Array
    second: Array
    batch: int

    @property
    def units(self) -> int:
        """K·C, entries of all value heads: those of a group of query heads are the same."""
        model = self.attention.context.model
        return model.kv_heads * model.head_dim

    @property
    def square(self) -> Array:
        """Cov(B̂_ii, B̂_jj): between heads, and of their values; of an un-normed input, x's besides."""
        model, scale = self.attention.context.model, self.attention.scale
        diagonals = np.einsum("hii->hi", self.kernels).astype(np.float64)
        between = np.atleast_2d(np.cov(diagonals.T))
        own = scale**2 * between / model.heads + 2 * self.kernel**2 / self.units
        if not self.input.normed:
            response = self.kernel.diagonal() / np.maximum(self.input.kernel.diagonal(), TINY)
            own = own + response[:, None] * self.input.square * response[None, :]
        return own

    @property
    def cross(self) -> Array:
        """Var(B̂_ij): between heads, and of their values."""
        heads = self.kernels.var(0, ddof=1, dtype=np.float64) / self.attention.context.model.heads
        values = (outer_square(self.kernel) + self.kernel**2) / self.units
        return self.attention.scale**2 * heads + values

    @property
    def lean(self) -> Array | None:
        """None: a token's branch averages over many tokens, so it leans little on its own."""
        return None

    @property
    def slope(self) -> Array:
        """0: averaging passes on the input's deviation of few pairs only."""
        return np.zeros_like(self.kernel)

    def covariance(self, functionals: Any) -> Array:
        """Between heads: Cov_h(⟨A, aĤaᵀ⟩, ⟨A', aĤaᵀ⟩)/H."""
        count, scale = len(self.kernels), self.attention.scale
        each = functionals.reshape(len(functionals), -1) @ self.kernels.reshape(count, -1).T
        return scale**2 * np.atleast_2d(np.cov(each)) / self.attention.context.model.heads

    def pull(self, functionals: Any) -> Any:
        """āᵀAā, and on the diagonal Σ_i A_ii·Var(a_ij)."""
        rows, tokens, _ = functionals.shape
        out = _sandwich_many(self.mean.swapaxes(-1, -2), functionals)
        diagonal = functionals.diagonal(axis1=1, axis2=2).reshape(rows, self.batch, -1)
        spread = np.einsum("rbi,bij->rbj", diagonal, self.second - self.mean**2)
        index = np.arange(tokens)
        out[:, index, index] += spread.reshape(rows, tokens)
        return self.attention.scale * out

    def pull_gradient(self, gradient: Array) -> Array:
        """Through drawn heads, fresh ones: dv = aᵀdo, dl = a∘(do·vᵀ − row sums), dq, dk."""
        attention, context = self.attention, self.attention.context
        model, stds, draws = context.model, attention.stds, context.draws
        groups, count = attention.counts()
        upstream = model.width * stds["o_proj"] ** 2 * gradient
        if not upstream.diagonal().any():
            return np.zeros_like(gradient)
        lower_g = cholesky(upstream).astype(np.float32)
        shape = (count, context.batch, context.length, model.head_dim)
        table = context.rope(scaled=model.window_of(attention.layer) is None)
        total = np.zeros((3, *gradient.shape))
        for lower in attention.lowers(self.input, groups):
            drawn = attention.heads(lower, count)
            a = drawn.weights
            out = (lower_g @ draws(count, len(gradient), model.head_dim)).reshape(shape)
            value = lower.astype(np.float32) @ draws(count, lower.shape[1], model.head_dim)
            value *= np.float32(math.sqrt(model.width) * stds["v_proj"])
            weight = out @ value.reshape(shape).swapaxes(-1, -2)
            logit = a * (weight - (a * weight).sum(-1, keepdims=True))
            logit /= np.float32(math.sqrt(model.head_dim))
            parts = [a.swapaxes(-1, -2) @ out]
            for i, other in enumerate((drawn.projected[1], drawn.projected[0])):
                turned = turn((logit if i == 0 else logit.swapaxes(-1, -2)) @ other, table, True)
                role = ("q_proj", "k_proj")[i]
                parts.append(self._through_norm(turned, drawn, i, role))
            for i, part in enumerate(parts):
                flat: Any = part.reshape(count, len(gradient), -1).transpose(1, 0, 2)
                flat = flat.reshape(len(gradient), -1).astype(np.float64)
                total[i] += flat @ flat.T / (groups * count * model.head_dim)
        sizes = [stds[role] ** 2 for role in ("v_proj", "q_proj", "k_proj")]
        width = model.heads * model.head_dim
        out64: Array = width * sum(s * part for s, part in zip(sizes, total, strict=True))
        return out64

    def _through_norm(self, gradient: Array32, drawn: DrawnHeads, i: int, role: str) -> Array32:
        """The gradient before QK-norm, of q (0) or k (1): (d − y⟨d, y⟩/n)/√(ms + eps)."""
        model, y = self.attention.context.model, drawn.normed[i]
        flat = gradient.reshape(y.shape)
        if model.qk_norm != "none":
            heads = (model.heads, model.kv_heads)[i] if model.qk_norm == "full" else 1
            flat = flat - y * ((flat * y).sum(-1, keepdims=True) / (heads * model.head_dim))
        factor = drawn.factor[i] / (math.sqrt(model.width) * self.attention.stds[role])
        out: Array32 = flat * factor[..., None]
        return out


def _sandwich_many(weights: Any, kernels: Any) -> Any:
    """a·K·aᵀ of one head's a (B, T, T) for many K (R, N, N)."""
    rows, tokens, _ = kernels.shape
    batch, length, _ = weights.shape
    blocks = kernels.reshape(rows, batch, length, batch, length).transpose(1, 2, 0, 3, 4)
    half = weights @ blocks.reshape(batch, length, -1)  # b, i, (r, b', j)
    half = half.reshape(batch, length, rows, batch, length).transpose(3, 4, 2, 0, 1)
    out = weights @ half.reshape(batch, length, -1)  # b', j, (r, b, i)
    out = out.reshape(batch, length, rows, batch, length).transpose(2, 3, 4, 0, 1)
    return out.reshape(rows, tokens, tokens)
