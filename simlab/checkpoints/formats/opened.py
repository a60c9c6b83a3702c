"""The result of opening a checkpoint folder, the same for every format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from simlab.checkpoints.storage import StoredTensor
from simlab.config import ModelConfig


@dataclass(frozen=True)
class Opened:
    """A checkpoint's shape, and where its tensors lie.

    keys: our parameter names to the file's, {} standing for the block. Several of ours with one of
    theirs are stacked in it by rows, in the map's order (a fused q‖k‖v). A norm without an entry has
    no gain: it is 1. tensors: the file's names to where their bytes are, optimizer state left out.
    config: the file that says the shape, and depth_key what it calls the number of blocks.
    """

    format: str
    model: ModelConfig
    keys: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]
    config: Path
    depth_key: str
