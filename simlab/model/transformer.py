"""The transformer, written once: blocks around a linear factory, and the whole model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from simlab.config import ModelConfig
from simlab.model.attention import Attention, Linear
from simlab.model.mlp import feed_forward
from simlab.model.norms import NORMS
from simlab.model.placement import (
    ENDS,
    Carried,
    Renorm,
    ResidualStep,
    end_parts,
    finished,
    start,
)
from simlab.schemes.placement import at, placement_of, renorm_after


def dense_linear(d_in: int, d_out: int, bias: bool = False) -> nn.Module:
    """The default linear factory: nn.Linear."""
    return nn.Linear(d_in, d_out, bias=bias)


def scaled(x: Tensor, scale: float) -> Tensor:
    """x times a number that is first rounded to x's dtype, as Gemma scales its embeddings."""
    return x if scale == 1 else x * x.new_tensor(scale)


class Block(nn.Module):
    """Attention, then MLP, each in its residual step, then a re-norm if the placement has one."""

    def __init__(self, config: ModelConfig, layer: int, linear: Linear = dense_linear) -> None:
        super().__init__()
        attention, mlp = Attention(config, layer, linear), feed_forward(config, linear)
        self.attention = ResidualStep(attention, at(config, layer, "attention"), config, linear)
        self.mlp = ResidualStep(mlp, at(config, layer, "mlp"), config, linear)
        self.renorm = Renorm(config) if renorm_after(config, layer) else None
        self.placement = placement_of(config)

    def steps(self) -> Iterator[tuple[str, ResidualStep | Renorm]]:
        """The block's residual steps with their kind, in the order they happen."""
        yield "attention", self.attention
        yield "mlp", self.mlp
        if self.renorm is not None:
            yield "renorm", self.renorm

    def forward(self, state: Carried, ids: Tensor | None = None) -> Carried:
        """(B, T, D) to (B, T, D), or a state to a state. ids (B, T): for value embeddings."""
        for _, step in self.steps():
            state = step(state, ids)
        return state


class Transformer(nn.Module):
    """Embedding, blocks, final norm, head: token ids (B, T) to logits (B, T, vocabulary)."""

    def __init__(self, config: ModelConfig, linear: Linear = dense_linear) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.config = config
        self.embedding_scale, self.logit_softcap = config.embedding_scale, config.logit_softcap
        self.position = nn.Embedding(config.positions, config.width) if config.positions else None
        self.start_parts, self.finish_parts = (end_parts(end, config, linear) for end in ENDS)
        self.blocks = nn.ModuleList(Block(config, i, linear) for i in range(config.depth))
        self.norm = NORMS[config.norm.type](config.width, config.norm.eps)
        self.head = linear(config.width, config.vocab_size, False)
        if config.tied:
            self.head.weight = self.embedding.weight

    def embed(self, ids: Tensor) -> Tensor:
        """The stream before the first block (B, T, D) of token ids (B, T)."""
        x = scaled(self.embedding(ids), self.embedding_scale)
        return x if self.position is None else x + self.position.weight[: ids.shape[-1]]

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) to logits (B, T, vocabulary)."""
        state = start(self.embed(ids), self.config, self.start_parts)
        for block in self.blocks:
            state = block(state, ids)
        last = finished(state, self.config, self.finish_parts)
        logits: Tensor = self.head(self.norm(last))
        if self.logit_softcap is not None:
            logits = torch.tanh(logits / self.logit_softcap) * self.logit_softcap
        return logits


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the whole model, gains included, a tied head counted once; none is allocated."""
    kinds = [  # blocks with the same norms, parts and embeddings have as many parameters
        (
            *((step.norms, step.parts) for step in steps),
            renorm_after(config, i),
            config.embeds_values(i),
        )
        for i in range(config.distinct)
        for steps in [[at(config, i, kind) for kind in ("attention", "mlp")]]
    ]
    blocks = 0
    for kind, count in Counter(kinds).items():
        with torch.device("meta"):
            block = Block(config, kinds.index(kind))
        blocks += count * sum(p.numel() for p in block.parameters())
    with torch.device("meta"):
        final = NORMS[config.norm.type](config.width, config.norm.eps)
        outer = nn.ModuleList([final, *(end_parts(end, config, dense_linear) for end in ENDS)])
    ends = (2 - config.tied) * config.vocab_size + (config.positions or 0)
    return blocks + sum(p.numel() for p in outer.parameters()) + config.width * ends
