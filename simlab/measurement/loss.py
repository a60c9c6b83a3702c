"""Next-token cross-entropy through the final norm and the head, and its gradient.

The head is read twice, some columns at a time: first for log Σ exp of the logits, then for the
gradient. Memory never holds the whole head or all logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simlab.model.norms import NORMS
from simlab.weights.base import Weights, fill_parameters
from simlab.weights.weightless import gram


def next_token(weights: Weights, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each curve's loss (S,) in nats per predicted token, and the gradient of the losses' sum.

    x (S·B, T, D): the residual stream after the last block, all of the batch. ids (B, T), T ≥ 2.
    A loss is the mean over the B·(T − 1) tokens that have a predecessor, as in transformers; the
    gradient (S·B, T, D), with respect to x, is of the sum, which float16 can hold.
    """
    model = weights.model
    with torch.device("meta"):
        norm = NORMS[model.norm.type](model.width, model.norm.eps)
    fill_parameters(norm, weights, "norm.", x.device, x.dtype)
    norm.requires_grad_(False)
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        last = norm(x)[:, :-1].reshape(weights.curves, -1, model.width)
        parts, targets = weights.head(last, ids.to(x.device))
    cap = model.logit_softcap
    log_sum = torch.full(last.shape[:2], -torch.inf, device=x.device)
    hit = torch.zeros_like(log_sum)
    with torch.no_grad():
        start = 0
        for part in parts:
            for chunk in part.chunks():
                here, column = _in(chunk, targets - start)
                logits = _capped((part.coordinates @ chunk).float(), cap)
                log_sum = torch.logaddexp(log_sum, logits.logsumexp(-1))
                hit += here * logits.gather(2, column.expand(len(logits), -1, -1)).squeeze(2)
                start += chunk.shape[2]
        outputs: list[Tensor] = []
        gradients: list[Tensor] = []
        start = 0
        for part in parts:
            gradient = torch.zeros(part.coordinates.shape, device=x.device)
            square = None if part.tap is None else torch.zeros_like(part.tap).contiguous()
            for chunk in part.chunks():
                here, column = _in(chunk, targets - start)
                logits = _capped((part.coordinates @ chunk).float(), cap)
                g = (logits - log_sum[..., None]).exp_()
                known_ones = (-here[:, None].to(g)).expand(len(g), -1, -1)
                g.scatter_add_(2, column.expand(len(g), -1, -1), known_ones)
                if cap is not None:  # the slope of c·tanh(l/c) is 1 − tanh²
                    g -= g * logits.div_(cap).square_()
                gradient.baddbmm_(g, chunk.mT.float())
                if square is not None:
                    square += gram(g)
                start += chunk.shape[2]
            outputs.append(part.coordinates)
            gradients.append(gradient.to(part.coordinates.dtype))
            if part.tap is not None and square is not None:
                outputs.append(part.tap)
                gradients.append(square)
    (gradient,) = torch.autograd.grad(outputs, x, gradients)
    return (log_sum - hit).mean(1), gradient


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    """c·tanh(l/c) of logits l, in place; without a cap they themselves."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def summed_loss(
    logits_of: Callable[[Tensor, int, int], Tensor], x: Tensor, ids: Tensor, columns: int, step: int
) -> tuple[Tensor, Tensor]:
    """The sum of ids' next-token losses in nats, and its gradient with respect to x, in float32.

    For a head that only its model's own code knows. logits_of(x, start, stop): the logits
    (B, T − 1, stop − start) of some of the vocabulary's ``columns``, ``step`` at a time; each is asked
    for twice. x (B, T − 1, D): what the head gets at every position but the last. ids (B, T).
    """
    targets = ids[:, 1:]
    spans = [(start, min(start + step, columns)) for start in range(0, columns, step)]
    log_sum = torch.full(targets.shape, -torch.inf, device=x.device)
    hit = torch.zeros_like(log_sum)
    with torch.no_grad():
        for start, stop in spans:
            logits = logits_of(x, start, stop).float()
            here, column = _in(logits, targets - start)
            log_sum = torch.logaddexp(log_sum, logits.logsumexp(-1))
            hit += here * logits.gather(2, column).squeeze(2)
    gradient = torch.zeros(x.shape, device=x.device)
    x = x.detach().requires_grad_()
    for start, stop in spans:
        with torch.enable_grad():
            logits = logits_of(x, start, stop)
        g = (logits.detach().float() - log_sum[..., None]).exp_()
        here, column = _in(logits, targets - start)
        g.scatter_add_(2, column, -here[..., None].to(g))
        gradient += torch.autograd.grad(logits, x, g.to(logits.dtype))[0]
    return (log_sum - hit).sum(), gradient


def _in(chunk: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """A mask (N,) of the tokens whose target column is in the chunk, and the column (N, 1), else 0."""
    here = (column >= 0) & (column < chunk.shape[2])
    return here, torch.where(here, column, 0)[..., None]
