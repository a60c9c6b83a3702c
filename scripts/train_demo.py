"""Train the demo model: a small, deep, byte-level OLMo-2 on the sources of Python's standard library.

    python scripts/train_demo.py outputs/demo             # the bundled one: about 20 minutes
    python scripts/train_demo.py outputs/demo --steps 20 --depth 4

It writes Hugging Face checkpoints (step-0, step-100, step-1000, final) and provenance.json. The model
is simlab's own, its init what ``RandomWeights`` draws for the seed, and the recipe OLMo 2's in small:
AdamW without weight decay on the embedding, warm-up, z-loss, clipped gradients (arXiv 2501.00656).
The same seed gives the same bytes on the same machine with the same Python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from write_random import hugging_face_config

from simlab import ConfigError, build_model, compose
from simlab.budget.process import tune_process
from simlab.checkpoints.checkpoint import by_block
from simlab.checkpoints.formats.hugging_face import KEYS
from simlab.config import ModelConfig
from simlab.store import write_atomically, write_json

DTYPE = torch.bfloat16  # of the files
EARLIER = (0, 100, 1000)  # the steps whose weights are kept beside the final ones
HELD_OUT = 20  # every 20th file is for validation
VALIDATION = 128  # sequences
# Not the standard library, or tables rather than code, or made by the build of this Python.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}
GENERATED = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the numbers, but for the data."""

    steps: int
    seed: int
    depth: int
    width: int
    heads: int
    d_ff: int
    batch: int
    length: int
    rate: float
    warm_up: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0
    z_loss: float = 1e-5

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, from 0: linear to its peak, then linear to zero."""
        warm = min(self.warm_up, max(1, self.steps // 10))
        return self.rate * min((step + 1) / warm, (self.steps - step) / max(1, self.steps - warm))


@dataclass(frozen=True)
class Data:
    """The text as bytes, and what of it nothing is trained on."""

    training: np.ndarray
    held_out: np.ndarray
    about: dict[str, Any]


def sources(root: Path) -> Iterator[Path]:
    """The standard library's sources in the order of their names."""
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        parts = path.relative_to(root).parts
        if not LEFT_OUT & set(parts) and not any(part.startswith(GENERATED) for part in parts):
            yield path


def read_data(length: int) -> Data:
    """Every HELD_OUT-th file apart, the others one after another. Raises ConfigError."""
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for i, path in enumerate(sources(Path(sysconfig.get_path("stdlib")))):
        parts[i % HELD_OUT == HELD_OUT - 1].append(path.read_bytes())
    texts = {held: b"".join(files) for held, files in parts.items()}
    if min(len(text) for text in texts.values()) <= length:
        raise ConfigError(
            "Python's standard library has no sources here (is it zipped?), or --length is too long"
        )
    about: dict[str, Any] = {
        "description": "the *.py files of Python's standard library, as bytes, in the order of their "
        f"names, without {', '.join(sorted(LEFT_OUT))} and generated files; every {HELD_OUT}th file is "
        "held out for validation",
        "licence": "Python Software Foundation License, see LICENSE.md",
    }
    for held, name in ((False, "training"), (True, "held_out")):
        digest = hashlib.sha256(texts[held]).hexdigest()
        about[name] = {"files": len(parts[held]), "bytes": len(texts[held]), "sha256": digest}
    training, held_out = (np.frombuffer(texts[held], dtype=np.uint8) for held in (False, True))
    return Data(training, held_out, about)


def windows(data: np.ndarray, starts: np.ndarray, length: int) -> Tensor:
    """(number of starts, length + 1) ids."""
    return torch.from_numpy(data[starts[:, None] + np.arange(length + 1)].astype(np.int64))


def losses(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Next-byte cross-entropy, and the mean square of the logits' log-normaliser (z-loss)."""
    logits = model(ids[:, :-1]).flatten(0, 1)
    return (
        nn.functional.cross_entropy(logits, ids[:, 1:].flatten()),
        logits.logsumexp(-1).square().mean(),
    )


@torch.no_grad()
def validate(model: nn.Module, data: np.ndarray, length: int) -> float:
    """The loss in nats per byte on sequences spread evenly over the text."""
    starts = np.linspace(0, len(data) - length - 1, VALIDATION).astype(np.int64)
    parts = np.array_split(starts, VALIDATION // 16)
    return math.fsum(
        losses(model, windows(data, part, length))[0].item() * len(part) / VALIDATION
        for part in parts
    )


def config_json(model: ModelConfig, length: int) -> dict[str, Any]:
    """config.json as transformers spells it, for version 5 and for those before."""
    values = hugging_face_config(model, DTYPE)
    return values | {
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "initializer_range": 0.02,
        "rope_theta": model.rope_theta,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": values["dtype"],
    }


def their_name(ours: str) -> str:
    """``blocks.3.mlp.norm_out.weight`` → ``model.layers.3.post_feedforward_layernorm.weight``."""
    name, layer = by_block(ours)
    return KEYS[name].format(layer)


def save(
    model: nn.Module, shape: ModelConfig, folder: Path, data: Data, length: int
) -> dict[str, Any]:
    """Write a checkpoint folder; return its loss (of the weights as rounded), size and hash."""
    folder.mkdir(parents=True, exist_ok=True)
    rounded = {name: p.detach().to(DTYPE) for name, p in model.state_dict().items()}
    tensors = {their_name(name): p for name, p in rounded.items()}
    path = folder / "model.safetensors"
    write_atomically(path, lambda file: save_file(tensors, file, {"format": "pt"}))
    write_json(folder / "config.json", config_json(shape, length))
    exact = {name: p.clone() for name, p in model.state_dict().items()}
    model.load_state_dict(rounded)  # into float32 again
    loss = validate(model, data.held_out, length)
    model.load_state_dict(exact)
    return {
        "validation_loss": round(loss, 4),
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def optimiser_of(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; the embedding doesn't decay."""
    decayed = [p for name, p in model.named_parameters() if name != "embedding.weight"]
    embedding = [p for name, p in model.named_parameters() if name == "embedding.weight"]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": embedding, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=recipe.rate, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay
    )


def train(recipe: Recipe, folder: Path, minutes: float | None, every: int) -> None:
    """Train, printing a line every ``every`` steps, and write everything. Raises ConfigError."""
    shape = [f"{key}={getattr(recipe, key)}" for key in ("depth", "width", "heads", "d_ff")]
    config = compose(
        ["model=small", "model.name=demo", *shape, f"kv_heads={recipe.heads}", "vocab_size=256",
         "norm=reordered", "init=normal", f"seeds=[{recipe.seed}]", "device=cpu", "engine=dense"]
    )  # fmt: skip
    data = read_data(recipe.length)
    model = build_model(config).train().requires_grad_(True)
    optimiser = optimiser_of(model, recipe)
    generator = np.random.default_rng(np.random.SeedSequence(recipe.seed, spawn_key=(1,)))
    folder.mkdir(parents=True, exist_ok=True)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(data.training):,} bytes to train on", flush=True)

    checkpoints: dict[str, Any] = {}
    curve: list[dict[str, float]] = []
    start, cpu = time.perf_counter(), time.process_time()

    def keep(name: str) -> None:
        checkpoints[name] = save(model, config.shape, folder / name, data, recipe.length)

    recent: list[float] = []
    for step in range(recipe.steps):
        if step in EARLIER:
            keep(f"step-{step}")
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate_at(step)
        starts = generator.integers(len(data.training) - recipe.length, size=recipe.batch)
        loss, z = losses(model, windows(data.training, starts, recipe.length))
        (loss + recipe.z_loss * z).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimiser.step()
        optimiser.zero_grad()
        recent.append(loss.item())
        done, spent = step + 1, time.perf_counter() - start
        if done % every == 0 or done == recipe.steps:
            row = {"step": done, "train": round(float(np.mean(recent)), 4)}
            if done % (5 * every) == 0 or done == recipe.steps:
                row["validation"] = round(validate(model, data.held_out, recipe.length), 4)
            curve.append(row)
            left = spent / done * (recipe.steps - done)
            held = f"  held out {row['validation']:.3f}" if "validation" in row else ""
            print(
                f"step {done:5d} of {recipe.steps}  loss {row['train']:.3f}{held}"
                f"  {spent / 60:.1f} min, {left / 60:.1f} to go",
                flush=True,
            )
            recent.clear()
            if minutes is not None and (spent + left) / 60 > minutes:
                fits = int(done * minutes * 60 / spent)
                raise ConfigError(
                    f"--minutes {minutes:g}: at this pace {recipe.steps} steps take "
                    f"{(spent + left) / 60:.0f}; try --steps {fits}"
                )
    keep("final")
    write_json(
        folder / "provenance.json",
        {
            "made_by": "scripts/train_demo.py",
            "seed": recipe.seed,
            "steps": recipe.steps,
            "tokens_seen": recipe.steps * recipe.batch * recipe.length,
            "parameters": parameters,
            "recipe": asdict(recipe),
            "init": asdict(config.init),
            "norm": asdict(config.shape.norm),
            "data": data.about,
            "checkpoints": checkpoints,
            "loss_curve": curve,
            "loss_unit": "nats per byte; train: mean over the steps since the row before",
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("torch", "numpy", "simlab")},
            "machine": platform.machine(),
        },
    )
    print(json.dumps({name: about["validation_loss"] for name, about in checkpoints.items()}))
    print(folder)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse(args: list[str] | None) -> tuple[Recipe, argparse.Namespace]:
    """The command line. Raises ConfigError."""
    parser = _Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the checkpoints go")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--d-ff", type=int, default=112)
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--length", type=int, default=256, help="bytes per sequence")
    parser.add_argument("--rate", type=float, default=4e-3, help="the learning rate's peak")
    parser.add_argument("--minutes", type=float, help="give up if it would take longer")
    parser.add_argument(
        "--threads", type=int, default=1, help="more than 1 helps only where all of them are idle"
    )
    parser.add_argument("--every", type=int, default=50, help="steps between two lines of progress")
    given = parser.parse_args(args)
    for name in ("steps", "batch", "length", "threads", "every", "rate", "minutes"):
        value = getattr(given, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name} {value}: must be above 0")
    known = {key: getattr(given, key) for key in Recipe.__dataclass_fields__ if hasattr(given, key)}
    return Recipe(**known), given


def main(args: list[str] | None = None) -> None:
    """Mistakes: one line and exit status 2; Ctrl-C: 130, and what was written is whole."""
    try:
        recipe, given = parse(args)
        tune_process()
        torch.set_num_threads(given.threads)
        train(recipe, given.folder, given.minutes, given.every)
    except (ConfigError, OSError) as error:
        print(f"train_demo: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("train_demo: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
