"""Find out if a deep random model begins with the layers of a shallow one: its curve then does too.

Most inits and placements depend on a layer's index alone (``normal``, ``mitchell``, ``reordered``,
``lns`` …); some depend on the depth too (``llama``, ``deepnorm`` …). There is no list of names: two
layers are compared module by module, a residual step by its scheme (``schemes.placement``).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from simlab.config import InitConfig, ModelConfig
from simlab.model.describe import PaperLinear
from simlab.model.placement import end_parts
from simlab.model.transformer import Block
from simlab.schemes.init import distribution

BARE = vars(nn.Module()).keys()  # attributes of every module: its hooks, its children


@dataclass(frozen=True)
class Part:
    """A module of a layer: its class, its attributes, and its own parameters' shapes.

    Two modules with equal parts compute the same, given the same parameters and input.
    """

    name: str
    kind: type[nn.Module]
    holds: Mapping[str, Any]
    shapes: Mapping[str, torch.Size]


def parts(model: ModelConfig, layer: int) -> tuple[Part, ...]:
    """Every module of a layer. No parameter is allocated."""
    with torch.device("meta"):
        block = Block(model, layer, PaperLinear)
    return tuple(
        Part(
            name,
            type(module),
            {key: value for key, value in vars(module).items() if key not in BARE},
            {key: value.shape for key, value in module.named_parameters(recurse=False)},
        )
        for name, module in block.named_modules()
    )


def start_shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """The parameters of what makes the first state, beside the embedding."""
    with torch.device("meta"):
        made = end_parts("start", model, PaperLinear)
    return {name: value.shape for name, value in made.named_parameters()}


@functools.lru_cache(16)  # a sweep has the same two models with other inits
def in_common(shallow: ModelConfig, deep: ModelConfig) -> tuple[str, ...]:
    """Names of the parameters in ``shallow``'s layers; none unless ``deep`` begins with these."""
    ends = [(model.positions, model.embedding_scale) for model in (shallow, deep)]
    if shallow.depth > deep.depth or ends[0] != ends[1]:
        return ()
    starts = [start_shapes(model) for model in (shallow, deep)]
    if starts[0] != starts[1]:
        return ()
    names = [f"start_parts.{name}" for name in starts[0]]
    for layer in range(shallow.depth):
        own = parts(shallow, layer)
        if own != parts(deep, layer):
            return ()
        names += [f"blocks.{layer}.{part.name}.{key}" for part in own for key in part.shapes]
    return tuple(names)


@functools.lru_cache(256)  # asked of every two jobs of a group, which have few models and inits
def begins(shallow: ModelConfig, deep: ModelConfig, init: InitConfig) -> bool:
    """True if ``deep`` begins with ``shallow``: the same embedding, then the same first layers.

    Layers are the same if their modules are and if the init draws their parameters from the same
    distributions: random weights depend on seed, name, shape and distribution alone (see ``dense``).
    """
    names = in_common(shallow, deep)
    return bool(names) and all(
        distribution(shallow, init, name) == distribution(deep, init, name)
        for name in ("embedding.weight", *names)
    )
