"""Moves the token batch through the blocks, one block's weights at a time.

A block is materialised when its turn comes, every batch of sequences passes through it, and it goes:
memory is one block and the residual stream, whatever the depth. Statistics stay on the device until
the run's end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from simlab.config import ConfigError, ModelConfig
from simlab.probe import Probe, Reducer, wide
from simlab.statistics import Step
from simlab.weights.source import Weights, materialise_block

TOKENS_AT_ONCE = 2048  # whole sequences are grouped up to this: bounds a sublayer's activations


@dataclass(frozen=True)
class Row:
    """Where a row of the curve was measured. ``values`` holds one number per STATISTICS entry."""

    sublayer: int
    block: int | None
    kind: str
    values: Tensor


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda[:N]`` or ``mps`` to a device that is there.

    Raises ConfigError for a device that isn't.
    """
    if name == "auto":
        best = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device("mps" if torch.backends.mps.is_available() else best)
    here = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here = ["cpu", *(["cuda"] if here else []), *here]
    here += ["mps"] if torch.backends.mps.is_available() else []
    if name not in here:
        raise ConfigError(f"device={name}: not on this machine, which has {', '.join(here)}")
    return torch.device(name)


@torch.no_grad()
def forward(
    model: ModelConfig,
    weights: Weights,
    ids: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    on_block: Callable[[], None] = lambda: None,
) -> list[Row]:
    """The residual stream's statistics after the embedding and after every step of every block.

    ids: (B, T) token ids. ``on_block`` is called after each block. Nothing waits for the device.
    """
    shape = (model.vocab_size, model.width)
    at_once = max(1, TOKENS_AT_ONCE // ids.shape[1])
    embedded = weights.rows("embedding.weight", shape, ids, device, dtype)
    streams = list(embedded.split(at_once))
    del embedded
    embedding = Reducer()
    for stream in streams:
        embedding.add(Step(after=wide(stream)))
    rows = [Row(0, None, "embedding", embedding.result())]
    sublayer = 0
    for layer in range(model.depth):
        block = materialise_block(model, layer, weights, device, dtype)
        with Probe(block) as probe:
            for i, stream in enumerate(streams):
                streams[i] = block(stream)
        for kind, values in probe.results():
            sublayer += kind != "renorm"
            rows.append(Row(sublayer, layer, kind, values))
        on_block()
    return rows
