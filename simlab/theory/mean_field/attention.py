"""The kernel of attention's output, its noise between seeds, and its linear response.

With Gaussian q and k the average over softmax(qkᵀ/√C) has no closed form: a few heads are drawn, of
the true size C, from fixed random numbers. The rest is exact: given a head's weights a (T, T), its
output's kernel is a·Ĥ·aᵀ times the values' variance, and

    B = H·C·σ_o²·d·σ_v²·O,   O = mean over heads of aĤaᵀ.

At a finite width Ĥ varies too, together with a: groups of heads share one draw of Ĥ, a Wishart matrix
with as many degrees of freedom as the correlations' variance says. O's own error from Ĥ is taken out
by a control variate, ā(mean Ĥ − H)āᵀ. Where values are normed, each head's by itself, their kernel is
not d·σ_v²·Ĥ but the mean cosine of Gaussian vectors of C entries (``values``).

A value embedding adds g²·σ_e²·[same token] to d·σ_v²·Ĥ: its rows are independent of everything else. Of
gradients the logits' parts see these larger values; what comes back through W_v doesn't change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from simlab.theory.laws import Array
from simlab.theory.mean_field.averages import saturation
from simlab.theory.mean_field.band import pull_correlation
from simlab.theory.mean_field.branch import TINY, Input
from simlab.theory.mean_field.drawing import Array32, Context, cholesky, pieces, turn
from simlab.theory.mean_field.kernels import correlation, outer_square

# Drawn per layer. Measured on OLMo-2-1B's shape, 64 tokens, over six sets of draws: a mean square
# varies by 0.02 % (reordered) or 0.17 % (pre, fan-in), a cosine by 0.3 and 0.6 %.
HEADS = 16
FIRST_HEADS = 128  # in the first two blocks, whose error every later row carries
GRADIENT_TOKENS, MOST_GRADIENT = 256, 16  # heavy tails: few tokens have 256/N ≤ 16 times the heads
HEAD_GROUPS = 8  # of heads with a common Ĥ
IN_CACHE = 1 << 16  # entries of q that are drawn together: more leave the cache


@dataclass(frozen=True, eq=False)
class DrawnHeads:
    """Drawn heads: G groups of M, those of a group with a common Ĥ. weights: a (G, M, B, T, T).

    slope: that of the soft-cap, 1 − tanh² (G, M, B, T, T); None without one.
    The rest of q and of k, first axis: projected (2, G, M, C, N) after QK-norm and RoPE; normed,
    the same before RoPE; factor (2, G, M, N): QK-norm's divisor's inverse times √d·σ.
    """

    weights: Array32
    slope: Array32 | None
    projected: Array32
    normed: Array32
    factor: Array32


@dataclass(frozen=True, eq=False)
class AttentionKernel:
    """One layer's attention, called with a vector; ``stds``: by role, the true (truncated) ones."""

    context: Context
    layer: int
    stds: Mapping[str, float]

    @property
    def scale(self) -> np.float64:
        """H·C·σ_o²·d·σ_v², of normed values H·C·σ_o²: the output's kernel over that of ``values``."""
        model = self.context.model
        width = model.heads * model.head_dim
        o, v = np.float64(self.stds["o_proj"]), np.float64(self.stds["v_proj"])
        out = width * o**2
        return out if model.v_norm else out * model.width * v**2

    def values(self, grams: Any, spread: Array) -> Any:
        """The kernel (…, N, N) of values over d·σ_v²: Ĥ; of normed ones, over 1, of inputs Ĥ.

        Two Gaussian vectors of C entries with correlation ρ have a mean cosine ρ·(1 − (1 − ρ²)/2C) to
        first order in 1/C (Hotelling 1953, §5, for known means). eps takes m/(m + eps) of a mean
        square. spread: the relative variance (N,) of the inputs' mean squares.
        """
        model = self.context.model
        if not model.v_norm:
            return grams
        root = np.sqrt(np.maximum(grams.diagonal(axis1=-2, axis2=-1), TINY))
        rho = grams / (root[..., :, None] * root[..., None, :])
        square = np.square(root).reshape(-1, root.shape[-1]).mean(0)
        m = model.width * self.stds["v_proj"] ** 2 * square
        left = np.sqrt(saturation(m, spread + 2 / model.head_dim, model.norm.eps))
        return rho * self.shortened(rho) * np.outer(left, left)

    @property
    def embedded(self) -> Array | None:
        """g²σ_e²·[same token]/(d·σ_v²) (N, N), of a value embedding; None without."""
        model = self.context.model
        if not model.embeds_values(self.layer):
            return None
        tokens = self.context.tokens
        size = model.value_embedding_scale * self.stds["value_embedding"] / self.stds["v_proj"]
        out: Array = (tokens[:, None] == tokens[None, :]) * np.float64(size**2 / model.width)
        return out

    def shortened(self, rho: Any) -> Any:
        """1 − (1 − ρ²)/2C: the mean cosine of values over their correlation."""
        return 1 - (1 - rho**2) / (2 * self.context.model.head_dim)

    def lowers(self, v: Input, groups: int) -> Array:
        """L̂ (G, N, n) of ``groups`` draws of the input's Gram matrix, L̂L̂ᵀ = Ĥ.

        The degrees of freedom are those that give the correlations' variance τ²: (1 − ρ²)²/τ² on
        average, at most d. With more of them than tokens by Bartlett's decomposition.
        """
        kernel, width, draws = v.kernel, self.context.model.width, self.context.draws
        tokens, variance = len(kernel), v.correlation_variance
        pairs = ~np.eye(tokens, dtype=bool) & (variance > 0)
        freedom = float(width)
        if pairs.any():
            wishart = (1 - np.minimum(kernel**2 / np.maximum(outer_square(kernel), TINY), 1)) ** 2
            freedom = float(np.clip(wishart[pairs].sum() / variance[pairs].sum(), 4, width))
        if freedom > tokens:
            chi = np.sqrt(np.maximum(freedom - np.arange(tokens) - 0.5, 0.1))
            below, diagonal = np.tri(tokens, k=-1), np.arange(tokens)
            a = np.empty((groups, tokens, tokens))
            for one in a:
                np.multiply(draws(tokens, tokens), below, out=one)
                one[diagonal, diagonal] = chi + draws(tokens) / math.sqrt(2)
        else:
            freedom = int(freedom)
            a = np.stack([draws(tokens, freedom) for _ in range(groups)]).astype(np.float64)
        lowers: Array = cholesky(kernel) @ a / math.sqrt(freedom)
        if v.normed:
            size = np.maximum(np.vecdot(lowers, lowers), TINY)
            lowers *= np.sqrt(kernel.diagonal() / size)[..., None]
        return lowers

    def projected(self, lowers: Array, count: int) -> tuple[Array32, Array32]:
        """q and k of ``count`` heads a group (2, G, M, C, N) after QK-norm, before RoPE.

        And QK-norm's factors (2, G, M, N), √d·σ over its root.
        """
        model, c = self.context.model, self.context.model.head_dim
        groups, tokens, size = lowers.shape
        x = self.context.scratch("projected", 2, groups, count, c, tokens)
        for group, lower in enumerate(lowers.astype(np.float32)):
            for role in range(2):
                z = self.context.draws(count, size, c).swapaxes(-1, -2)
                np.matmul(z, lower.T, out=x[role, group])
        if model.norm.centred and model.qk_norm == "per_head":
            x -= x.mean(-2, keepdims=True)
        own = np.einsum("rgmcn,rgmcn->rgmn", x, x)
        factors = np.empty_like(own)
        sizes = np.vecdot(lowers, lowers)[:, None]
        for role, name in enumerate(("q_proj", "k_proj")):
            heads = (model.heads, model.kv_heads)[role]
            variance = model.width * self.stds[name] ** 2
            moment = np.ones(1)
            if model.qk_norm == "full":
                # The other heads' part of the mean square, at its average.
                rest = (heads - 1) * c * np.maximum(sizes, TINY)
                moment = variance * (own[role] + rest) / (heads * c)
                if model.norm.centred:
                    moment *= 1 - 1 / (heads * c)
                moment += model.norm.eps
            elif model.qk_norm == "per_head":
                moment = variance * own[role] / c + model.norm.eps
            factors[role] = np.sqrt(variance / moment)
        x *= factors[..., None, :]
        return x, factors

    def heads(self, lowers: Array, count: int) -> DrawnHeads:
        """Draw ``count`` heads for each of the Gram matrices L̂L̂ᵀ. Good until the next are drawn."""
        context, window = self.context, self.context.model.window_of(self.layer)
        normed, factors = self.projected(lowers, count)
        room = context.scratch("turned", *normed.shape)
        turned = turn(normed, context.rope(scaled=window is None), room)
        q, k = context.sequences(turned)
        weights = q @ k.swapaxes(-1, -2)
        weights *= np.float32(1 / context.model.query_divisor)
        cap, slope = context.model.attention_softcap, None
        if cap is not None:
            np.tanh(weights / np.float32(cap), out=weights)
            slope = 1 - weights**2
            weights *= np.float32(cap)
        weights += context.mask(window)
        weights -= weights.max(-1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(-1, keepdims=True)
        return DrawnHeads(weights, slope, turned, normed, factors)

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
        grams = self.values(lowers @ lowers.swapaxes(-1, -2), v.relative_variance)
        excess = grams.mean(0) - self.values(v.kernel, v.relative_variance)
        of_rows = np.zeros(len(v.kernel))
        if (embedded := self.embedded) is not None:
            grams += embedded
        kernels = np.empty((groups, count, *v.kernel.shape), np.float32)
        mean, second = np.zeros((2, context.batch, context.length, context.length))
        some = max(1, IN_CACHE // (count * len(v.kernel) * context.model.head_dim))
        for chunk in (slice(first, first + some) for first in range(0, groups, some)):
            a = self.heads(lowers[chunk], count).weights
            kernels[chunk] = sandwich(a, grams[chunk, None].astype(np.float32))
            if embedded is not None and not v.normed:
                parts = sandwich(a, embedded.astype(np.float32))
                of_rows += np.einsum("gmii->i", parts) / (groups * count)
            mean += a.sum((0, 1), dtype=np.float64) / (groups * count)
            second += np.einsum("gmbij,gmbij->bij", a, a) / (groups * count)
        kernels = kernels.reshape(-1, *v.kernel.shape)
        out = kernels.mean(0, dtype=np.float64) - sandwich(mean, excess)
        out = (out + out.T) / 2
        out *= self.scale
        of_rows *= self.scale
        return AttentionBranch(self, v, out, of_rows, kernels, mean, second, context.batch)


def sandwich(weights: Any, kernels: Any) -> Any:
    """a·K·aᵀ (…, N, N): weights a (…, B, T, T) of B sequences, K (…, N, N)."""
    *_, batch, length, _ = weights.shape
    tokens = batch * length
    blocks = kernels.reshape(*kernels.shape[:-2], batch, length, tokens)
    half = weights @ blocks  # (…, B, T, N)
    half = half.reshape(*half.shape[:-3], tokens, batch, length).swapaxes(-2, -3)
    out = (half @ weights.swapaxes(-1, -2)).swapaxes(-2, -3)  # (…, N, B, T)
    return out.reshape(*out.shape[:-3], tokens, tokens)


@dataclass(frozen=True, eq=False)
class AttentionBranch:
    """Attention's output, as ``kernels.Branch`` has it.

    of_rows: the diagonal (N,) that a value embedding adds, of an input that no norm fixes, else 0.
    kernels (M, N, N): aĤaᵀ of the drawn heads, with the embedding's rows. mean, second (B, T, T): of a
    and of a² over heads.
    """

    attention: AttentionKernel
    input: Input
    kernel: Array
    of_rows: Array
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
    def between_square(self) -> Array:
        """Cov of B_ii and B_jj (N, N) between the drawn heads, if all were like one of them."""
        diagonals = np.einsum("hii->hi", self.kernels).astype(np.float64)
        diagonals -= diagonals.mean(0)
        return self.attention.scale**2 * (diagonals.T @ diagonals / (len(diagonals) - 1))

    @property
    def between_cross(self) -> Array:
        """Var of B_ij (N, N) between the drawn heads, likewise."""
        # By a power of two, so that squares of large entries fit into float32.
        largest = 1.0 if self.attention.context.model.v_norm else self.input.kernel.diagonal().max()
        unit = 2.0 ** np.round(np.log2(max(largest, 1e-30)))
        mean, heads = self.kernels.mean(0), np.empty(self.kernel.shape)
        for rows in pieces(len(heads), self.kernels[:, 0].size):
            apart = (self.kernels[:, rows] - mean[rows]) * np.float32(1 / unit)
            heads[rows] = np.einsum("hij,hij->ij", apart, apart)
        return (self.attention.scale * unit) ** 2 * (heads / (len(self.kernels) - 1))

    @property
    def square(self) -> Array:
        """Cov(B̂_ii, B̂_jj): between heads, and of their values; of an un-normed input, x's besides."""
        model = self.attention.context.model
        own = self.between_square / model.heads + 2 * self.kernel**2 / self.units
        if not (self.input.normed or model.v_norm):
            response = self.kernel.diagonal() - self.of_rows
            response = response / np.maximum(self.input.kernel.diagonal(), TINY)
            own = own + response[:, None] * self.input.square * response[None, :]
        return own

    @property
    def cross(self) -> Array:
        """Var(B̂_ij): between heads, and of their values."""
        values = (outer_square(self.kernel) + self.kernel**2) / self.units
        return self.between_cross / self.attention.context.model.heads + values

    @property
    def lean(self) -> Array | None:
        """None: a token's branch averages over many tokens, so it leans little on its own."""
        return None

    @property
    def slope(self) -> Array:
        """0: averaging passes on the input's deviation of few pairs only."""
        return np.zeros_like(self.kernel)

    def covariance(self, functionals: Any) -> Array:
        """Between heads, Cov_h(⟨A, aĤaᵀ⟩, ⟨A', aĤaᵀ⟩)/H; cosines' in place of Gaussian values'."""
        model, count, scale = self.attention.context.model, len(self.kernels), self.attention.scale
        flat, heads = functionals.reshape(len(functionals), -1), self.kernels.reshape(count, -1)
        each = np.empty((len(flat), count))
        for some in pieces(count, heads[0].size):  # in float64
            each[:, some] = flat @ heads[some].T
        each -= each.mean(1, keepdims=True)
        between: Array = each @ each.T / (count - 1)
        between = scale**2 * between / model.heads
        if model.v_norm:
            rho = correlation(self.input.kernel)
            normed, gaussian = self._to_cosines(functionals, rho) @ rho, functionals @ self.kernel
            for sign, product in ((1, normed), (-1, gaussian)):
                between += sign * 2 / self.units * np.einsum("iab,jba->ij", product, product)
        return between

    def _to_cosines(self, functionals: Any, kernel: Array) -> Any:
        """Functionals of the output to those of a Gram matrix, of this kernel, by its cosines."""
        out = _sandwich_many(self.mean.swapaxes(-1, -2), functionals)
        slope = self.attention.scale * self.attention.shortened(correlation(kernel))
        out, diagonal = pull_correlation(out, slope, kernel)
        out[:, (index := np.arange(len(kernel))), index] = diagonal
        return out

    def pull(self, functionals: Any) -> Any:
        """āᵀAā, and on the diagonal Σ_i A_ii·Var(a_ij); of normed values through their correlations."""
        if self.attention.context.model.v_norm:
            return self._to_cosines(functionals, self.input.kernel)
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
        count *= int(np.clip(GRADIENT_TOKENS // len(gradient), 1, MOST_GRADIENT))
        upstream = model.width * stds["o_proj"] ** 2 * gradient
        if not upstream.diagonal().any():
            return np.zeros_like(gradient)
        lower_g = cholesky(upstream).astype(np.float32)
        shape = (count, context.batch, context.length, model.head_dim)
        cos, sin = context.rope(scaled=model.window_of(attention.layer) is None)
        total = np.zeros((3, *gradient.shape))
        for lower in attention.lowers(self.input, groups):
            drawn = attention.heads(lower[None], count)
            a = drawn.weights[0]
            out = (lower_g @ draws(count, len(gradient), model.head_dim)).reshape(shape)
            value = lower.astype(np.float32) @ draws(count, lower.shape[1], model.head_dim)
            value *= np.float32(math.sqrt(model.width) * stds["v_proj"])
            if model.embeds_values(attention.layer):
                tokens = context.tokens
                rows = draws(count, 1 + int(tokens.max()), model.head_dim)
                size = model.value_embedding_scale * stds["value_embedding"]
                value += np.float32(size) * rows[:, tokens]
            if model.v_norm:
                root = np.sqrt(np.square(value).mean(-1) + np.float32(model.norm.eps))
                value /= root[..., None]
            weight = out @ value.reshape(shape).swapaxes(-1, -2)
            logit = a * (weight - (a * weight).sum(-1, keepdims=True))
            logit /= np.float32(model.query_divisor)
            if drawn.slope is not None:
                logit *= drawn.slope[0]
            parts = [columns(a.swapaxes(-1, -2) @ out)]
            if model.v_norm:
                y = value.swapaxes(-1, -2)
                parts[0] -= y * ((parts[0] * y).mean(-2, keepdims=True))
                parts[0] /= root[:, None]
            for role, one in enumerate((logit, logit.swapaxes(-1, -2))):
                turned = columns(one @ context.sequences(drawn.projected[1 - role, 0]))
                parts.append(self._through_norm(turn(turned, (cos, -sin)), drawn, role))
            for i, part in enumerate(parts):
                flat = part.reshape(-1, len(gradient)).astype(np.float64)
                total[i] += flat.T @ flat / (groups * count * model.head_dim)
        sizes = [stds[role] ** 2 for role in ("v_proj", "q_proj", "k_proj")]
        width = model.heads * model.head_dim
        out64: Array = width * sum(s * part for s, part in zip(sizes, total, strict=True))
        return out64

    def _through_norm(self, gradient: Array32, drawn: DrawnHeads, role: int) -> Array32:
        """The gradient before QK-norm, of q (0) or k (1): (d − y⟨d, y⟩/n)/√(ms + eps)."""
        model, y = self.attention.context.model, drawn.normed[role, 0]
        std = self.attention.stds[("q_proj", "k_proj")[role]]
        if std == 0:  # nothing of it goes on through such a matrix
            return np.zeros_like(gradient)
        if model.qk_norm != "none":
            heads = (model.heads, model.kv_heads)[role] if model.qk_norm == "full" else 1
            along = (gradient * y).sum(-2, keepdims=True)
            gradient = gradient - y * (along / (heads * model.head_dim))
        return gradient * (drawn.factor[role, 0] / (math.sqrt(model.width) * std))[:, None]


def columns(x: Array32) -> Array32:
    """(M, C, N) of (M, B, T, C)."""
    heads, _, _, size = x.shape
    return np.moveaxis(x, -1, 1).reshape(heads, size, -1)


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
