"""Which random models begin with the same layers: a deep one's curve then begins with a shallow one's.

Most inits and placements know a layer's number and not how many there are (``normal``, ``mitchell``,
``reordered``, ``lns`` …); some divide by the depth (``llama``, ``deepnorm`` …). Nothing here has their
names: layers are compared by what they are made of.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from simlab.config import InitConfig, ModelConfig
from simlab.model.transformer import Block
from simlab.schemes.init import distribution

BARE = vars(nn.Module()).keys()  # what every module holds: its hooks, its parts


@dataclass(frozen=True)
class Part:
    """A module of a layer: its class, what it holds, and its own parameters' shapes.

    What it computes is a function of these, of its parameters and of its input.
    """

    name: str
    kind: type[nn.Module]
    holds: Mapping[str, Any]
    shapes: Mapping[str, torch.Size]


class Place(nn.Module):
    """Where a linear layer is, with its parameters: ``nn.Linear`` also takes time to initialise it."""

    def __init__(self, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None


def parts(model: ModelConfig, layer: int) -> tuple[Part, ...]:
    """Every module of a layer, whose parameters aren't allocated."""
    with torch.device("meta"):
        block = Block(model, layer, Place)
    return tuple(
        Part(
            name,
            type(module),
            {key: value for key, value in vars(module).items() if key not in BARE},
            {key: value.shape for key, value in module.named_parameters(recurse=False)},
        )
        for name, module in block.named_modules()
    )


@functools.lru_cache(16)  # a sweep has the same two models with other inits
def in_common(shallow: ModelConfig, deep: ModelConfig) -> tuple[str, ...]:
    """The parameters of ``shallow``'s layers if ``deep`` begins with the same modules, else none."""
    if shallow.depth > deep.depth:
        return ()
    names = []
    for layer in range(shallow.depth):
        found = parts(shallow, layer)
        if found != parts(deep, layer):
            return ()
        names += [f"blocks.{layer}.{part.name}.{key}" for part in found for key in part.shapes]
    return tuple(names)


@functools.lru_cache(256)  # asked of every two jobs of a group, which have few models and inits
def begins(shallow: ModelConfig, deep: ModelConfig, init: InitConfig) -> bool:
    """Whether the first layers of ``deep``, and its embedding, are those of ``shallow``.

    The same modules, their parameters drawn from the same law: random weights are a function of
    their seed, name, shape and law alone (see weights.dense).
    """
    names = in_common(shallow, deep)
    return bool(names) and all(
        distribution(shallow, init, name) == distribution(deep, init, name)
        for name in ("embedding.weight", *names)
    )
