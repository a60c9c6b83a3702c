"""Write a random OLMo-2 checkpoint of any size in Hugging Face's layout, a shard per block.

    python scripts/write_random.py outputs/random-7b model=olmo2_7b dtype=bfloat16

The numbers are those that engine=dense draws for the first seed; a block at a time is in memory. For
measuring what reading a checkpoint costs where none can be downloaded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from simlab import compose
from simlab.checkpoints.formats.hugging_face import KEYS
from simlab.config import ModelConfig, RunConfig
from simlab.model.transformer import Block
from simlab.weights.dense import RandomWeights

CPU = torch.device("cpu")


def hugging_face_config(model: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json for a shape, as transformers' Olmo2Config."""
    return {
        "model_type": "olmo2",
        "architectures": ["Olmo2ForCausalLM"],
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "rms_norm_eps": model.norm.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tied,
        "dtype": str(dtype).removeprefix("torch."),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def shards(weights: RandomWeights, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """The embedding, each block, then final norm and head, by their names in the file."""
    model = weights.model
    table = (model.vocab_size, model.width)
    yield {KEYS["embedding.weight"]: weights.tensor("embedding.weight", table, CPU, dtype)}
    for layer in range(model.depth):
        with torch.device("meta"):
            names = Block(model, layer).state_dict()
        tensors = {}
        for name, parameter in names.items():
            ours = f"blocks.{layer}.{name}"
            theirs = KEYS[f"blocks.{{}}.{name}"].format(layer)
            tensors[theirs] = weights.tensor(ours, tuple(parameter.shape), CPU, dtype)
        yield tensors
    last = {KEYS["norm.weight"]: weights.tensor("norm.weight", (model.width,), CPU, dtype)}
    if not model.tied:
        last[KEYS["head.weight"]] = weights.tensor("head.weight", table, CPU, dtype)
    yield last


def write(folder: Path, run: RunConfig) -> None:
    """Write a config's random model into a folder, with a progress bar."""
    dtype = getattr(torch, run.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    values = hugging_face_config(run.shape, dtype)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    weights = RandomWeights(run.shape, run.init, run.seeds[0])
    count, size = run.shape.depth + 2, 0
    where: dict[str, str] = {}
    for i, tensors in enumerate(track(shards(weights, dtype), "shards", total=count), start=1):
        name = f"model-{i:05d}-of-{count:05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        where |= dict.fromkeys(tensors, name)
        size += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", help="config overrides, e.g. model=olmo2_7b")
    args = parser.parse_args()
    run = compose(args.overrides)
    if run.shape.norm.placement != "reordered":
        parser.error("norm: OLMo-2's layout holds norm=reordered alone")
    write(args.folder, run)
    print(args.folder)


if __name__ == "__main__":
    main()
