"""The gradient back through a step whose streams each token mixes by coefficients of its own.

Letters are those of ``mixing``: Δ, κ, R, B, q, c, p, w and the logits u. A prime marks what is behind
the step, in P' and Γ', or another token's, as in q', c' and w'. C = Cov(q, q'), and m is the streams'
mean square.

Gradients of n streams are exchangeable in law as the streams are: g_t = S/n + γ_t, S their sum with the
kernel P, E⟨γ_t,i, γ_s,j⟩/d = (1[t = s] − 1/n)·Γ_ij. From those behind a step, P' and Γ', come

    at F        (1 + C/n)∘P' + (n − 1)·C∘Γ'; back through F and the read's norm it is H, the kernel of
                the gradient at the read Σ w_j x_j;
    sum         P = P' + H + nU;
    apart       Γ = κ∘Γ' + R∘H/(n − 1) + U;
    logits      U = (n·Ċ∘(P'/n² + (1 − 1/n)Γ')∘B + (n − 1)·κ̇∘Γ'∘Δ + Ṙ∘H∘Δ)/(n·√(m_i m_j)).

U comes through the coefficients themselves: a logit of q gets ⟨g_t, F⟩·∂q/∂u, one of c the sum of
⟨g_t, x_j⟩·∂c_jt/∂u_k and one of p that of ⟨g, x_j⟩·∂w_j/∂u_k with g at the read, each of mean square
d·(gradient)·(vector), as the two are independent; c's rows and columns and w sum to 1, so that of the
latter two only Γ' and Δ count. It goes on by W_k/√m, fresh and so independent in each stream. By
Price's theorem the variance of u times the mean of Σ_k ∂_k f·∂_k f' is the slope in ρ of that of f·f':
Ċ, κ̇ and Ṙ are the slopes of C, κ and R. What norms took out of S along x̄' (γ) is not along F either.

A token's coefficients also set its mean square, of relative variance s between seeds, and so what comes
back to it. If m is Gamma distributed, the mean of 1/m is 1/(1 − s) of the mean's inverse. P' falls as
m'^−a, and a is 1 behind the last norm. Where the step writes the share h of m' and q̄² has the relative
variance v, the mean of q̄²P' gets the factor 1 − a·v·h. H of an MLP, and U, divide by m once more and
get (1 − s)^−a(1 − h). Attention's H comes from other tokens, with coefficients of their own.

Measured at a std of the logits of 2.5 (4 blocks, widths 64 and 128), the rms is off by less than 2 %;
in OLMo-2-1B's shape by 11 % behind the first attention, by up to 6 % a few blocks on
(docs/theory.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simlab.theory.laws import Array
from simlab.theory.mean_field.attention import AttentionBranch
from simlab.theory.mean_field.branch import TINY
from simlab.theory.mean_field.gates import GatedBranch
from simlab.theory.mean_field.kernels import KernelStep
from simlab.theory.mean_field.mixing import MixedStreams, WrittenBranch

# Of s; beyond, a token's gradient is carried by rare coefficients and no longer by a Gamma law's.
RARE = 0.35

# Where first orders end: the least factor of P' at F, and the largest relative variance in 1/(1 − s).
LEAST_FACTOR, MOST_SPREAD = 0.1, 0.5


@dataclass(frozen=True, eq=False)
class StreamsGradient:
    """Of n streams. total: P (N, N). gone: γ of S along x̄ (N,). apart: Γ (N, N). power: a (N,)."""

    total: Array
    gone: Array
    apart: Array
    power: Array


def through_coefficients(
    mixed: MixedStreams, total: Array, apart: Array, branch: Array, read: Array
) -> Array:
    """U (N, N) of P', Γ', B and H. A head that reads and doesn't write has P', Γ' and B of 0."""
    n = mixed.n
    of_write = n * mixed.write_slope * (total / n**2 + (1 - 1 / n) * apart) * branch
    of_others = (n - 1) * mixed.kept_slope * apart * mixed.apart
    of_others = of_others + mixed.read_slope * read * mixed.apart
    out: Array = (of_write + of_others) / (n * np.sqrt(np.outer(mixed.square, mixed.square)))
    return out


def pull_read(step: KernelStep, read: Array, gone: Array) -> StreamsGradient:
    """Before a head, from the kernel of the gradient at what it reads, and γ along that.

    It reads Σ w_j x_j, or the streams' mean, where the step has no coefficients.
    """
    nothing, ones = np.zeros_like(read), np.ones(len(read))
    if step.mixed is None:
        return StreamsGradient(read, gone, nothing, ones)
    mixed = step.mixed()
    logits = through_coefficients(mixed, nothing, nothing, nothing, read)
    logits[np.diag_indices_from(logits)] /= (1 - spread_of(step)) ** 2
    apart = mixed.read * read / (mixed.n - 1) + logits
    beside = mixed.read.diagonal() * mixed.apart.diagonal()
    gone = gone * mixed.mean / np.maximum(mixed.mean + beside, TINY)
    return _with_logits(mixed, StreamsGradient(read, gone, apart, ones), logits, read.diagonal())


def pull_mixed(step: KernelStep, after: StreamsGradient) -> StreamsGradient:
    """Before a step, from after it."""
    assert step.mixed is not None
    mixed, places = step.mixed(), np.arange(len(after.total))
    branch, terms = next(b for b in step.branches.values() if isinstance(b[0], WrittenBranch))
    norm = step.norms[terms[0].norms[0]]
    assert isinstance(branch, WrittenBranch)

    added = branch.kernel.diagonal()
    share = added / np.maximum(mixed.mean + added, TINY)  # h
    written = after.total.copy()
    of_gates = 1 - after.power * branch.relative_variance * share
    written[places, places] *= np.maximum(of_gates, LEAST_FACTOR)
    read = branch.pull_gradient(written)  # H from here on
    read = read + branch.inner.pull_gradient((mixed.n - 1) * mixed.write * after.apart)
    left = (1 - norm.saturation) ** 2
    factor = norm.factor * np.sqrt(1 - (1 - left) / step.width)
    read = read * np.outer(factor, factor)
    spread = spread_of(step)
    together = (1 - spread) ** (-after.power * (1 - share))
    read[places, places] /= 1 - np.minimum(norm.spread * norm.saturation**2, MOST_SPREAD)
    if not isinstance(branch.inner, AttentionBranch | GatedBranch):
        read[places, places] *= together

    root = np.sqrt(np.maximum(1 - after.gone * share, 0))  # what is left of S along F
    seen = after.total * np.outer(root, root)
    logits = through_coefficients(mixed, seen, after.apart, branch.inner.kernel, read)
    logits[places, places] *= together / (1 - spread)

    apart = mixed.kept * after.apart + mixed.read * read / (mixed.n - 1) + logits
    heard, passed = read.diagonal(), after.total.diagonal()
    turned = mixed.mean / np.maximum(norm.divisor, TINY)  # cos²(Σ w_j x_j, x̄)
    gone = after.gone * (1 - share) * passed + (1 - left) * np.minimum(turned, 1) * heard
    gone = gone / np.maximum(passed + heard, TINY)
    before = StreamsGradient(after.total + read, gone, apart, after.power * (1 - share))
    return _with_logits(mixed, before, logits, passed)


def spread_of(step: KernelStep) -> Array:
    """s (N,), at most MOST_SPREAD."""
    mean = np.maximum(step.start.kernel.diagonal(), TINY)
    out: Array = np.minimum(step.start.square.diagonal() / mean**2, MOST_SPREAD)
    return out


def _with_logits(
    mixed: MixedStreams, rest: StreamsGradient, logits: Array, passed: Array
) -> StreamsGradient:
    """P with nU, γ and a with U's; Γ has it. passed: P_ii of what isn't divided by m once more.

    What the logits' norm takes out along all streams is the share (x̄'s mean square)/m along x̄.
    """
    before, more = rest.total.diagonal(), mixed.n * logits.diagonal()
    whole = np.maximum(before + more, TINY)
    gone = (rest.gone * before + mixed.mean / np.maximum(mixed.square, TINY) * more) / whole
    total, power = rest.total + mixed.n * logits, rest.power + 1 - passed / whole
    return StreamsGradient(total, np.clip(gone, 0, 1), rest.apart, power)
