"""The kernel of the loss's gradient with respect to the stream, G_ij = E⟨g_i, g_j⟩/d, row by row.

A scheme's formula is linear in its base vectors, so a gradient goes back through the same factors:
the base b of a term gets D_i·G_ij·D_j. Every norm on the way takes out the part along its own output,
1/d of it, and its divisor varies between seeds: E 1/m > 1/E m on the diagonal. A sublayer's matrices
are fresh, so what comes back through it is uncorrelated with what passes by it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from simlab.config import ModelConfig
from simlab.theory.laws import Array
from simlab.theory.mean_field.kernels import TINY, KernelStep, Term


def loss_gradient(state: Array, model: ModelConfig, head: float, ids: NDArray[np.int64]) -> Array:
    """G (N, N) after the last block, of the mean cross-entropy over tokens (B, T) with a next one.

    Logits are N(0, C), C = d·σ_head²·K of the normed stream: E Σ_v p_i p_j = e^{C_ij}/V, E p_y = 1/V.
    """
    targets = np.full(ids.shape, -1)
    targets[:, :-1] = ids[:, 1:]
    next_one, vocab = targets.reshape(-1), model.vocab_size
    predicted = next_one >= 0
    root = 1 / np.sqrt(np.maximum(state.diagonal(), TINY) + model.norm.eps)
    logits = model.width * head**2 * state * np.outer(root, root)
    both = np.exp(np.minimum(logits, math.log(vocab))) / vocab
    same = next_one[:, None] == next_one[None, :]
    asked = np.outer(predicted, predicted) / predicted.sum() ** 2
    gradient = head**2 * (both - 2 / vocab + same) * asked
    out: Array = gradient * np.outer(root, root) * (1 - 1 / model.width)
    return out


def loss_error(state: Array, model: ModelConfig, head: float) -> float:
    """The relative error of ``loss_gradient`` that a finite vocabulary V makes, at most over tokens.

    E Σp² = (e^C/V)·(1 − 2(e^{2C} − 1)/V + …), the ratio's first correction, beside the 1 of the token
    that is predicted: (e^C/V)·2(e^{2C} − 1)/V. inf where a few tokens share all the probability. A
    soft-cap c of the logits takes l³/3c² off l and 1 − l²/c² off its slope: 2C/c² of the square.
    """
    root = 1 / np.sqrt(np.maximum(state.diagonal(), TINY) + model.norm.eps)
    logits = np.minimum(model.width * head**2 * state.diagonal() * root**2, 200.0)
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
    root = 1 / np.sqrt(np.maximum(state.diagonal(), TINY) + model.norm.eps)
    variance = model.width * head**2 * state.diagonal() * root**2
    above = own * model.width * head**2 * root - variance / 2 - math.log(model.vocab_size)
    out: Array = 1 / (1 + np.exp(-np.clip(above, -500, 500)))
    return out


def pull_gradient(step: KernelStep, out: tuple[Term, ...], gradient: Array) -> Array:
    """G (N, N) before a step, from that after it."""
    by_base: dict[int, Array] = {}

    def through(terms: tuple[Term, ...], upstream: Array) -> None:
        for base in {term.base for term in terms}:
            own = [term for term in terms if term.base == base]
            factor = np.sum([step.factor(term) for term in own], axis=0)
            passed = _norms(step, own[-1], upstream * np.outer(factor, factor))
            by_base[base] = by_base.get(base, 0.0) + passed

    through(out, gradient)
    for kind, index in reversed(step.events):
        if kind == "branch" and index in by_base:
            branch, terms = step.branches[index]
            through(terms, branch.pull_gradient(by_base.pop(index)))
    return by_base[0]


def _norms(step: KernelStep, term: Term, gradient: Array) -> Array:
    for index in term.norms:
        norm = step.norms[index]
        spread = np.minimum(norm.spread * norm.saturation**2, 1.0)
        gradient = gradient * (1 - 1 / step.width)
        places = np.arange(len(gradient))
        gradient[places, places] *= 1 + spread
    return gradient
