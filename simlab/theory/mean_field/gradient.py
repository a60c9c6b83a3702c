"""The kernel of the loss's gradient with respect to the stream, G_ij = E⟨g_i, g_j⟩/d, row by row.

A scheme's formula is linear in its base vectors, so a gradient goes back through the same factors:
the base b of a term gets D_i·G_ij·D_j. Every norm on the way takes out the part along its own output,
and its divisor varies between seeds: E 1/m > 1/E m on the diagonal. A sublayer's matrices are fresh, so
what comes back through it is uncorrelated with what passes by it.

The part along a direction v̂ is E⟨g_i, v̂_i⟩² = (1 − γ_i)·G_ii, with γ = 0 of an isotropic gradient. A
norm with output v̂ leaves G·(1 − (1 − γ)/d) and γ = 1. Of what is gone along v̂, cos²(v, w) is gone
along ŵ: the gradient at N(αx + b) comes to x by αx with γ = cos²(x, αx + b), through the sublayer with
γ = 0, or 1 where it norms x itself, and their sum has the mean γ, weighted by their G_ii. So norms of a
stream that hardly turns take out one part between them, not one each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simlab.config import ModelConfig
from simlab.schemes.placement import placement_of
from simlab.theory.laws import Array
from simlab.theory.mean_field.branch import TINY
from simlab.theory.mean_field.kernels import KernelStep, KernelVector, Term, Terms, pairs_of
from simlab.theory.mean_field.squash import Squash, norm_of


class Ending:
    """From the last state to the head: ``out``, which the final norm gets, and ``normed``, its output.

    step: one that starts with the last state, with a gain of 1. parts: those that ``finish`` takes.
    linear: the number (N,) of out_i in normed_i.
    """

    def __init__(self, model: ModelConfig, step: KernelStep, parts: Mapping[str, Any]) -> None:
        self.step = step
        self.out: KernelVector = placement_of(model).finish(step.state, step.norm, model, **parts)
        self.normed = norm_of(step, model, "final")(self.out)
        if model.norm.elementwise:
            self.linear = Squash.of(model, "final").linear(self.out.kernel)
        else:
            self.linear = step.norms[-1].factor


def loss_gradient(normed: Array, model: ModelConfig, head: float, ids: NDArray[np.int64]) -> Array:
    """G (N, N) behind the final norm, of the mean cross-entropy over tokens (B, T) with a next one.

    normed: its output's kernel. Logits are N(0, C), C = d·σ_head²·K of it: E Σ_v p_i p_j = e^{C_ij}/V,
    E p_y = 1/V.
    """
    targets = np.full(ids.shape, -1)
    targets[:, :-1] = ids[:, 1:]
    next_one, vocab = targets.reshape(-1), model.vocab_size
    predicted = next_one >= 0
    logits = model.width * head**2 * normed
    both = np.exp(np.minimum(logits, math.log(vocab))) / vocab
    same = next_one[:, None] == next_one[None, :]
    asked = np.outer(predicted, predicted) / predicted.sum() ** 2
    gradient: Array = head**2 * (both - 2 / vocab + same) * asked
    return gradient


def loss_error(normed: Array, model: ModelConfig, head: float) -> float:
    """The relative error of ``loss_gradient`` that a finite vocabulary V makes, at most over tokens.

    E Σp² = (e^C/V)·(1 − 2(e^{2C} − 1)/V + …), the ratio's first correction, beside the 1 of the token
    that is predicted: (e^C/V)·2(e^{2C} − 1)/V. inf where a few tokens share all the probability. A
    soft-cap c of the logits takes l³/3c² off l and 1 − l²/c² off its slope: 2C/c² of the square.
    """
    logits = np.minimum(model.width * head**2 * normed.diagonal(), 200.0)
    errors: Array = 2 * np.exp(logits) * np.expm1(2 * logits) / model.vocab_size**2
    if model.logit_softcap is not None:
        errors += 2 * logits / model.logit_softcap**2
    return float(errors.max())


def own_probability(last: Ending, model: ModelConfig, head: float, own: Array) -> Array:
    """The probability w (N,) that a head tied to the embedding gives each token itself.

    own: how much of its token's row each stream still has, x_i = own_i·e_i + … . That token's logit is
    larger by μ_i = own_i·d·σ²/√m_i than the others', of variance C: w = e^μ/(e^μ + V·e^{C/2}).
    ``loss_gradient`` holds where w is small.
    """
    variance = model.width * head**2 * last.normed.kernel.diagonal()
    above = own * model.width * head**2 * last.linear - variance / 2 - math.log(model.vocab_size)
    out: Array = 1 / (1 + np.exp(-np.clip(above, -500, 500)))
    return out


def pull_gradient(
    step: KernelStep, outs: Sequence[Terms], gradient: Array, gone: Array | None = None
) -> tuple[Array, Array]:
    """G (nN, nN) and ``gone`` (nN,) before a step of n incoming vectors, from those after it.

    gone: γ along each vector's own direction; None: 0.
    """
    by_bases: dict[tuple[int, int], Array] = {}
    taken: dict[int, Array] = {}  # gone_i·G_ii of a base's gradient
    starts, fresh = range(step.starts), np.zeros(len(step.start.kernel))

    def through(first: Terms, second: Terms, upstream: Array, gone: Array = fresh) -> None:
        for left, right in product(_by_base(first), _by_base(second)):
            bases = left[-1].base, right[-1].base
            if bases[0] != bases[1] and not {*bases} <= {*starts}:
                continue  # two fresh matrices', or one's and the stream's: uncorrelated
            factors = [np.sum([step.factor(term) for term in own], axis=0) for own in (left, right)]
            common = [norm for norm in left[-1].norms if norm in right[-1].norms]
            passed, along, at = _norms(step, common, upstream * np.outer(*factors), gone, first)
            by_bases[bases] = by_bases.get(bases, 0.0) + passed
            if first is second and bases[0] == bases[1]:
                along = along * _cosine(step, at, (Term(bases[0], 1.0),)) ** 2 * passed.diagonal()
                taken[bases[0]] = taken.get(bases[0], 0.0) + along

    gone = np.zeros(len(gradient)) if gone is None else gone
    for a, b, one, other in pairs_of(outs, len(step.start.kernel)):
        through(one, other, gradient[a, b], gone[a] if one is other else fresh)
    for kind, index in reversed(step.events):
        if kind != "norm" and (index, index) in by_bases:
            branch, terms = step.branches[index]
            through(terms, terms, branch.pull_gradient(by_bases.pop((index, index))))
    nothing = np.zeros_like(step.start.kernel)
    blocks = [[by_bases.get((a, b), nothing) for b in starts] for a in starts]
    share = [taken.get(a, fresh) / np.maximum(blocks[a][a].diagonal(), TINY) for a in starts]
    joint = np.block(blocks) if len(starts) > 1 else blocks[0][0]
    return joint, np.clip(np.concatenate(share), 0, 1)


def _by_base(terms: Terms) -> list[list[Term]]:
    return [[t for t in terms if t.base == base] for base in {term.base for term in terms}]


def _norms(
    step: KernelStep, norms: Sequence[int], gradient: Array, gone: Array, at: Terms
) -> tuple[Array, Array, Terms]:
    """Back through norms: G (N, N), and ``gone`` along a vector ``at``, then along the norms' input."""
    for index in reversed(norms):
        norm = step.norms[index]
        spread = np.minimum(norm.spread * norm.saturation**2, 1.0)
        gone = gone * _cosine(step, at, norm.terms) ** 2
        left = (1 - norm.saturation) ** 2 * (1 - gone)  # eps leaves (eps/(m + eps))²
        root = np.sqrt(1 - (1 - gone - left) / step.width)
        gradient = gradient * np.outer(root, root)
        places = np.arange(len(gradient))
        gradient[places, places] *= 1 + spread
        gone, at = 1 - left, norm.terms
    return gradient, gone, at


def _cosine(step: KernelStep, one: Terms, other: Terms) -> Array:
    """⟨v_i, w_i⟩/(‖v_i‖‖w_i‖) (N,) of two vectors."""
    both = step.inner(one, one) * step.inner(other, other)
    return step.inner(one, other) / np.sqrt(np.maximum(both, TINY))
