"""Write an OLMo-2 checkpoint folder with transformers: random, or trained for a minute on a text.

    python scripts/make_checkpoint.py outputs/checkpoint --steps 200

It needs transformers (pip install transformers). The model reads bytes; without a tokenizer.json
in the folder simlab feeds it bytes too. The numbers are those of the run's seed and machine.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import Olmo2Config, Olmo2ForCausalLM


def text_bytes(path: Path | None) -> torch.Tensor:
    """A file's bytes as ids; by default the sources of Python's standard library, 4 MB of them."""
    if path is not None:
        return torch.tensor(list(path.read_bytes()))
    data = bytearray()
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        data += source.read_bytes()
    return torch.tensor(list(data[: 4 << 20]))


def train(model: Olmo2ForCausalLM, data: torch.Tensor, steps: int) -> None:
    """AdamW with a linear warm-up of a tenth and a linear decay, 8 sequences of 128 bytes a step."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    warm = max(1, steps // 10)
    for step in range(steps):
        rate = min((step + 1) / warm, (steps - step) / max(1, steps - warm))
        optimiser.param_groups[0]["lr"] = 1e-3 * rate
        starts = torch.randint(len(data) - 128, (8,)).tolist()
        ids = torch.stack([data[start : start + 128] for start in starts])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)


def main() -> None:
    """Parse the command line, make the model, train it, save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=0, help="training steps; 0: a random init")
    parser.add_argument(
        "--text", type=Path, help="a file to train on; default: Python's own sources"
    )
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--shard-size", default="5GB", help="as in save_pretrained, e.g. 1MB")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    config = Olmo2Config(
        vocab_size=256,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Olmo2ForCausalLM(config)
    if args.steps:
        train(model, text_bytes(args.text), args.steps)
    model.save_pretrained(args.folder, max_shard_size=args.shard_size)
    print(args.folder)


if __name__ == "__main__":
    main()
