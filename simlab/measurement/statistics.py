"""The statistics of a step of the residual stream: small named functions of one ``Step``.

Each function returns one number per token; the probe takes these numbers to float64 (float32 on
devices without it) and reduces over tokens as the statistic's ``reduce`` says. ``Step`` caches the
intermediate tensors that several statistics use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vecdot, vector_norm

from simlab.model.attention import HEADS_AT_ONCE


def wide(x: Tensor) -> Tensor:
    """x in float64, where squares of any float32 fit and sums keep their digits; on MPS in float32."""
    return x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64)


def sequences(x: Tensor, axis: int | None) -> Tensor:
    """Several streams as sequences (B·n, T, D): n of them lie along an axis of x. Else x, (B, T, D).

    The n streams of a sequence are adjacent.
    """
    return x if axis is None else x.movedim(axis, 1).flatten(0, 1)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """⟨x, y⟩ over the last dimension.

    On a CPU NumPy computes it without a tensor of products, in half of torch's time (measured), and
    with sums that don't depend on the batch, to the last bit.
    """
    if x.device.type != "cpu":
        return vecdot(x, y)
    with np.errstate(invalid="ignore", over="ignore"):  # an overflow is the curve's to tell
        return torch.from_numpy(np.asarray(np.vecdot(x.numpy(), y.numpy())))


@dataclass(frozen=True)
class Step:
    """One step of the residual stream, as the probe saw it. Tensors (B, T, D), D = d_model, any dtype.

    ``after`` is the stream after the step. For a residual add, ``skip`` and ``branch`` are its two
    inputs, ``read`` is what the attention or MLP module gets, and ``raw`` what it gives, before any
    norm. ``moment`` (B, T) is the mean square (LayerNorm: variance) by which the step's last norm
    divides, ``eps`` its eps, and ``gain`` (D,) its gain. ``attention`` is the dict of
    ``attention_statistics``, each entry (B, T).
    """

    after: Tensor
    skip: Tensor | None = None
    branch: Tensor | None = None
    raw: Tensor | None = None
    read: Tensor | None = None
    moment: Tensor | None = None
    eps: float = 0.0
    gain: Tensor | None = None
    attention: dict[str, Tensor] | None = None

    @cached_property
    def wide(self) -> Tensor:
        """x (B, T, D), wide."""
        return wide(self.after)

    @cached_property
    def wide_skip(self) -> Tensor | None:
        """The stream to which the branch was added (B, T, D), wide."""
        return None if self.skip is None else wide(self.skip)

    @cached_property
    def wide_branch(self) -> Tensor | None:
        """The branch, after all norms (B, T, D), wide."""
        if self.branch is self.after:  # as of gradients
            return self.wide
        return None if self.branch is None else wide(self.branch)

    @property
    def width(self) -> int:
        """D."""
        return self.after.shape[-1]

    @cached_property
    def norm(self) -> Tensor:
        """‖x‖ (B, T)."""
        return vector_norm(self.wide, dim=-1)

    @cached_property
    def skip_norm(self) -> Tensor:
        """‖x‖ (B, T) of the stream before the add; NaN where nothing is added."""
        return self.nan if self.wide_skip is None else vector_norm(self.wide_skip, dim=-1)

    @cached_property
    def square(self) -> Tensor:
        """‖x‖² (B, T). A norm's square: measured, four times as fast as a dot product with itself."""
        return self.norm.square()

    @cached_property
    def mean_square(self) -> Tensor:
        """Mean over width of x² (B, T)."""
        return self.square / self.width

    @cached_property
    def narrow(self) -> Tensor:
        """x (B, T, D) in float32: exact, as no stream is wider, and half of float64's time."""
        return self.after.float()

    @cached_property
    def magnitude(self) -> Tensor:
        """|x_i| (B, T, D) in float32."""
        return self.narrow.abs()

    @cached_property
    def max_abs(self) -> Tensor:
        """max |x_i| (B, T)."""
        return self.magnitude.amax(-1).to(self.wide.dtype)

    @cached_property
    def unit(self) -> Tensor:
        """x/‖x‖ (B, T, D) in float32: no power of it overflows. NaN for x = 0."""
        return self.narrow * (1 / self.norm).float()[..., None]

    @cached_property
    def nan(self) -> Tensor:
        """NaN (B, T), for statistics that this step lacks."""
        return torch.full_like(self.norm, torch.nan)

    @cached_property
    def branch_square(self) -> Tensor:
        """‖b‖² (B, T), NaN where nothing is added."""
        return (
            self.nan if self.wide_branch is None else vector_norm(self.wide_branch, dim=-1).square()
        )

    @cached_property
    def cross(self) -> Tensor:
        """⟨x, b⟩ (B, T), with x the stream before the add; NaN where nothing is added."""
        if self.wide_skip is None or self.wide_branch is None:
            return self.nan
        return dot(self.wide_skip, self.wide_branch)

    def attended(self, name: str) -> Tensor:
        """An attention statistic (B, T), NaN where the step is no attention."""
        return self.nan if self.attention is None else self.attention[name]


def _cosine(step: Step) -> Tensor:
    """0 where x is 0, as a padding token's embedding; NaN where b alone is, as all of ReZero's."""
    if step.wide_skip is None:
        return step.nan
    size = step.skip_norm
    return torch.where(size == 0, 0.0, step.cross / (size * step.branch_square.sqrt()))


def _gradient_cosine(step: Step) -> Tensor:
    """0 where x is 0, or g, as it is at a sequence's last token, which predicts nothing."""
    return torch.where(step.branch_square == 0, 0.0, _cosine(step))


def _read_mean_square(step: Step) -> Tensor:
    """Mean over width of r² (B, T), r what the attention or MLP module gets.

    r is the norm's output where the placement has one in front of the module, g·x/√(m + eps) with its
    gain g, and else the stream itself, or what the placement makes of its state. Of attention it is
    what q, k and v are projected from, before QK-norm and RoPE.
    """
    if step.read is None:
        return step.nan
    if step.read is step.skip:  # no norm in front: known already
        return step.skip_norm.square() / step.width
    return vector_norm(wide(step.read), dim=-1).square() / step.width


def _raw_mean_square(step: Step) -> Tensor:
    return step.nan if step.raw is None else vector_norm(step.raw, dim=-1).square() / step.width


def _eps_factor(step: Step) -> Tensor:
    return step.nan if step.moment is None else step.moment / (step.moment + step.eps)


def _median_abs(step: Step) -> Tensor:
    """Median over width of |x|: of an even number of entries, the upper of the two in the middle."""
    x, middle = step.magnitude, step.width // 2
    if x.device.type != "cpu":
        return x.kthvalue(middle + 1, dim=-1).values.to(step.wide.dtype)
    # NumPy selects with vector instructions: measured, 8 times as fast as torch on a CPU.
    median = np.partition(x.numpy(), middle, axis=-1)[..., middle]
    return torch.from_numpy(np.ascontiguousarray(median)).to(step.wide.dtype)


def _kurtosis(step: Step) -> Tensor:
    """mean(x⁴)/mean(x²)² over width: 3 for Gaussian entries, d where one entry is all."""
    return vector_norm(step.unit.square(), dim=-1).to(step.wide.dtype).square() * step.width


def _token_cosine(step: Step) -> Tensor:
    """Mean cosine of a token's x with the other tokens' of its sequence (B, T); NaN for one token.

    With u = x/‖x‖: (⟨u_t, Σ_s u_s⟩ − 1)/(T − 1), so no T × T matrix is made.
    """
    count = step.after.shape[1]
    if count == 1:
        return step.nan
    total = step.unit.sum(1, keepdim=True)
    return (dot(step.unit, total).to(step.wide.dtype) - 1) / (count - 1)


def _gain(step: Step, of: Callable[[Tensor], Tensor]) -> Tensor:
    return step.nan if step.gain is None else of(step.gain).expand_as(step.nan)


# Of two tokens' mean squares, relative: nearer ones are a tie. Tokens that are alike in law, as a BOS
# at position 0 of every sequence, differ by rounding: measured, by 5e-7 in float32.
ALIKE = 1e-5


def _first_of_largest(v: Tensor) -> Tensor:
    """(…, B, T) to (…): the index in B·T of the largest number, of a tie the first one's."""
    flat = v.flatten(-2)
    return (flat >= (1 - ALIKE) * flat.amax(-1, keepdim=True)).byte().argmax(-1)


REDUCE: dict[str, Callable[[Tensor], Tensor]] = {  # over the tokens of a whole batch (…, B, T)
    "mean": lambda v: v.mean((-2, -1)),
    "max": lambda v: v.amax((-2, -1)),
    "index": _first_of_largest,
    "rms": lambda v: v.mean((-2, -1)).sqrt(),
    "median": lambda v: v.flatten(-2).quantile(0.5, dim=-1),
    "p05": lambda v: v.flatten(-2).quantile(0.05, dim=-1),
    "p95": lambda v: v.flatten(-2).quantile(0.95, dim=-1),
    "first": lambda v: v[..., 0].mean(-1),
    "rest": lambda v: v[..., 1:].mean((-2, -1)),
}


@dataclass(frozen=True)
class Statistic:
    """A function of a step to a number per token (B, T), and how tokens are reduced.

    reduce: a key of REDUCE (``first`` is position 0 of each sequence, ``rest`` all others); or
    ``vector``, for which the function gives a vector per token (B, T, D) and the result is the norm
    of their mean.
    """

    of: Callable[[Step], Tensor]
    reduce: str = "mean"


_norm = Statistic(lambda s: s.norm)
_mean_vector_norm = Statistic(lambda s: s.wide, "vector")

STATISTICS: dict[str, Statistic] = {
    # Of the stream x after the step.
    "norm": _norm,
    "mean_square": Statistic(lambda s: s.mean_square),
    "mean": Statistic(lambda s: s.wide.mean(-1)),
    "mean_abs": Statistic(lambda s: s.magnitude.mean(-1).to(s.wide.dtype)),
    "max_abs": Statistic(lambda s: s.max_abs, "max"),
    "mean_vector_norm": _mean_vector_norm,
    # Of what the attention or MLP module gets.
    "read_mean_square": Statistic(_read_mean_square),
    # Of what was added: b after all norms, raw before any.
    "branch_mean_square": Statistic(lambda s: s.branch_square / s.width),
    "branch_raw_mean_square": Statistic(_raw_mean_square),
    "cosine": Statistic(_cosine),
    # Δ‖x‖² = ‖b‖² + 2⟨x, b⟩.
    "delta_branch": Statistic(lambda s: s.branch_square),
    "delta_cross": Statistic(lambda s: 2 * s.cross),
    # m / (m + eps): the mean square that a norm of gain 1 gives by its definition.
    "eps_factor": Statistic(_eps_factor),
    # How tokens differ: one with a huge entry carries a mean, but no median.
    "mean_square_median": Statistic(lambda s: s.mean_square, "median"),
    "mean_square_p05": Statistic(lambda s: s.mean_square, "p05"),
    "mean_square_p95": Statistic(lambda s: s.mean_square, "p95"),
    "mean_square_first": Statistic(lambda s: s.mean_square, "first"),
    "mean_square_rest": Statistic(lambda s: s.mean_square, "rest"),
    "mean_square_max": Statistic(lambda s: s.mean_square, "max"),
    "max_token": Statistic(lambda s: s.mean_square, "index"),  # sequence × length + position
    "median_abs": Statistic(_median_abs, "median"),
    "kurtosis": Statistic(_kurtosis),
    "token_cosine": Statistic(_token_cosine),
    # Of the attention's weights a and logits, over heads and queries.
    "attention_entropy": Statistic(lambda s: s.attended("entropy")),
    "attention_max_logit": Statistic(lambda s: s.attended("max_logit"), "max"),
    "attention_first": Statistic(lambda s: s.attended("first"), "rest"),
    # Of the gain of the step's last norm.
    "gain_mean_square": Statistic(lambda s: _gain(s, lambda g: g.square().mean())),
    "gain_max_abs": Statistic(lambda s: _gain(s, lambda g: g.abs().amax())),
    # 1 where a token's stream holds an inf or a NaN.
    "non_finite": Statistic(lambda s: (~s.max_abs.isfinite()).to(s.wide.dtype), "max"),
}

# Of the loss's gradient g with respect to the stream x: a step's ``after`` and ``branch`` are then g,
# its ``skip`` x.
GRADIENT_STATISTICS: dict[str, Statistic] = {
    "gradient_norm": _norm,
    "gradient_rms": Statistic(lambda s: s.mean_square, "rms"),
    "gradient_mean_vector_norm": _mean_vector_norm,
    "gradient_cosine": Statistic(_gradient_cosine),
}

# Of a vector y of a state of several: a step's ``after`` and ``branch`` are then y, its ``skip`` is the
# stream x. The columns of streams.csv.
VECTOR_STATISTICS: dict[str, Statistic] = {
    **{name: STATISTICS[name] for name in ("mean_square", "norm", "token_cosine")},
    "cosine_watched": STATISTICS["cosine"],
}


@torch.no_grad()
def attention_statistics(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    divisor: float | None = None,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    """Statistics of the attention weights a = softmax(QKᵀ/√C), per token (B, T), in float32.

    q, k (B, H, T, C), after QK-norm and RoPE; mask (T, T), True where a query may look, or None for
    causal. divisor, softcap: as of ``simlab.model.attention.Attend``. entropy: −Σ a ln a of each
    query, the mean over heads, in nats (ln of the tokens in sight where they count alike). max_logit:
    the largest of a query's logits over heads. first: the weight on position 0, the mean over heads (at
    position 0 itself it is 1).
    """
    heads, length, width = q.shape[1:]
    divisor = divisor or width**0.5
    q, k = q.contiguous(), k.contiguous()  # else one sequence's product is another kernel's
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    entropy, most, first = [], [], []
    for a in range(0, heads, step := max(1, HEADS_AT_ONCE // (len(q) * length * length))):
        logits = (q[:, a : a + step].float() / divisor) @ k[:, a : a + step].float().mT
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        masked = logits.masked_fill(~mask, -torch.inf)
        weights, top = masked.softmax(-1), masked.amax(-1)
        # With z the logits less their largest: −ln max a − Σ a z, without a logarithm of each a.
        spread = (weights * logits.sub_(top[..., None])).sum(-1)
        entropy.append(-weights.amax(-1).log() - spread)
        most.append(top.amax(1))
        first.append(weights[..., 0].clone())  # a view would keep them all
    return {  # summed at the end: the same to the last bit however many heads are held at a time
        "entropy": torch.cat(entropy, 1).sum(1) / heads,
        "max_logit": torch.stack(most).amax(0),
        "first": torch.cat(first, 1).sum(1) / heads,
    }
