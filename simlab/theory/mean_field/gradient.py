"""The kernel of the loss's gradient with respect to the stream, G_ij = E⟨g_i, g_j⟩/d, row by row.

A scheme's formula is linear in its base vectors, so a gradient goes back through the same factors:
the base b of a term gets D_i·G_ij·D_j. Every norm on the way takes out the part along its own output,
1/d of it, and its divisor varies between seeds: E 1/m > 1/E m on the diagonal. A sublayer's matrices
are fresh, so what comes back through it is uncorrelated with what passes by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from simlab.config import ModelConfig
from simlab.theory.laws import Array
from simlab.theory.mean_field.branch import TINY
from simlab.theory.mean_field.kernels import KernelStep, Term, Terms, pairs_of
from simlab.theory.mean_field.squash import Squash


class FinalNorm:
    """The final norm y of a stream x with a kernel.

    kernel: of y (N, N). linear: the number (N,) of x_i in y_i. back: the gradient's kernel before the
    norm over that after it (N, N).
    """

    def __init__(self, state: Array, model: ModelConfig) -> None:
        if model.norm.elementwise:
            squash = Squash.of(model, "final")
            pair = squash.pairs(state)
            self.linear, self.kernel, self.back = squash.linear(state), pair.kernel, pair.slope
        else:
            self.linear = 1 / np.sqrt(np.maximum(state.diagonal(), TINY) + model.norm.eps)
            both = np.outer(self.linear, self.linear)
            self.kernel, self.back = state * both, both * (1 - 1 / model.width)


def loss_gradient(state: Array, model: ModelConfig, head: float, ids: NDArray[np.int64]) -> Array:
    """G (N, N) after the last block, of the mean cross-entropy over tokens (B, T) with a next one.

    Logits are N(0, C), C = d·σ_head²·K of the normed stream: E Σ_v p_i p_j = e^{C_ij}/V, E p_y = 1/V.
    """
    targets = np.full(ids.shape, -1)
    targets[:, :-1] = ids[:, 1:]
    next_one, vocab = targets.reshape(-1), model.vocab_size
    predicted = next_one >= 0
    final = FinalNorm(state, model)
    logits = model.width * head**2 * final.kernel
    both = np.exp(np.minimum(logits, math.log(vocab))) / vocab
    same = next_one[:, None] == next_one[None, :]
    asked = np.outer(predicted, predicted) / predicted.sum() ** 2
    gradient = head**2 * (both - 2 / vocab + same) * asked
    return gradient * final.back


def loss_error(state: Array, model: ModelConfig, head: float) -> float:
    """The relative error of ``loss_gradient`` that a finite vocabulary V makes, at most over tokens.

    E Σp² = (e^C/V)·(1 − 2(e^{2C} − 1)/V + …), the ratio's first correction, beside the 1 of the token
    that is predicted: (e^C/V)·2(e^{2C} − 1)/V. inf where a few tokens share all the probability. A
    soft-cap c of the logits takes l³/3c² off l and 1 − l²/c² off its slope: 2C/c² of the square.
    """
    logits = np.minimum(model.width * head**2 * FinalNorm(state, model).kernel.diagonal(), 200.0)
    errors: Array = 2 * np.exp(logits) * np.expm1(2 * logits) / model.vocab_size**2
    if model.logit_softcap is not None:
        errors += 2 * logits / model.logit_softcap**2
    return float(errors.max())


def own_probability(state: Array, model: ModelConfig, head: float, own: Array) -> Array:
    """The probability w (N,) that a head tied to the embedding gives each token itself.

    own: how much of its token's row each stream still has, x_i = own_i·e_i + … . That token's logit is
    larger by μ_i = own_i·d·σ²/√m_i than the others', of variance C: w = e^μ/(e^μ + V·e^{C/2}).
    ``loss_gradient`` holds where w is small.
    """
    final = FinalNorm(state, model)
    variance = model.width * head**2 * final.kernel.diagonal()
    above = own * model.width * head**2 * final.linear - variance / 2 - math.log(model.vocab_size)
    out: Array = 1 / (1 + np.exp(-np.clip(above, -500, 500)))
    return out


def pull_gradient(step: KernelStep, outs: Sequence[Terms], gradient: Array) -> Array:
    """G (nN, nN) before a step of n incoming vectors, from that after it, of those in ``outs``."""
    by_bases: dict[tuple[int, int], Array] = {}
    starts = range(step.starts)

    def through(first: Terms, second: Terms, upstream: Array) -> None:
        for left, right in product(_by_base(first), _by_base(second)):
            bases = left[-1].base, right[-1].base
            if bases[0] != bases[1] and not {*bases} <= {*starts}:
                continue  # two fresh matrices', or one's and the stream's: uncorrelated
            factors = [np.sum([step.factor(term) for term in own], axis=0) for own in (left, right)]
            common = [norm for norm in left[-1].norms if norm in right[-1].norms]
            passed = _norms(step, common, upstream * np.outer(*factors))
            by_bases[bases] = by_bases.get(bases, 0.0) + passed

    for a, b, one, other in pairs_of(outs, len(step.start.kernel)):
        through(one, other, gradient[a, b])
    for kind, index in reversed(step.events):
        if kind != "norm" and (index, index) in by_bases:
            branch, terms = step.branches[index]
            through(terms, terms, branch.pull_gradient(by_bases.pop((index, index))))
    nothing = np.zeros_like(step.start.kernel)
    blocks = [[by_bases.get((a, b), nothing) for b in starts] for a in starts]
    return np.block(blocks) if len(starts) > 1 else blocks[0][0]


def _by_base(terms: Terms) -> list[list[Term]]:
    return [[t for t in terms if t.base == base] for base in {term.base for term in terms}]


def _norms(step: KernelStep, norms: Sequence[int], gradient: Array) -> Array:
    for index in norms:
        norm = step.norms[index]
        spread = np.minimum(norm.spread * norm.saturation**2, 1.0)
        gradient = gradient * (1 - 1 / step.width)
        places = np.arange(len(gradient))
        gradient[places, places] *= 1 + spread
    return gradient
