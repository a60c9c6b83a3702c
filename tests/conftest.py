"""Shared fixtures, and the four tiers of tolerance. Any other stands in its test with its reason.

- bit-equal: ``torch.equal``, ``check_exact=True``: same device, same operations.
- PARITY: float32, the same mathematics in another order of operations: values of order 1 after some
  hundred operations that round to 6e-8 each. torch.testing's own default has the same atol.
- statistical: STANDARD_ERRORS of what is estimated. Beyond five, a right program fails one comparison
  in two million; seeds are fixed. Where many thousands are compared, the bound follows their number.
- GOLDEN: recorded curves (tests/baselines), relative, per dtype; a record holds for one device and
  engine. Rounding differs between machines by a sixth of it (scripts/measure_rounding.py).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from simlab.config import ConfigError, RunConfig, validate
from simlab.experiment import prepare
from simlab.sweep.plan import Composer

PARITY = {"rtol": 1e-5, "atol": 1e-5}
STANDARD_ERRORS = 5
GOLDEN = {"float64": 1e-6, "float32": 5e-5, "float16": 5e-2, "bfloat16": 2e-1}

# Of the commands that tests run: on a slow machine a line of progress would be taken for a message.
os.environ.setdefault("SIMLAB_PROGRESS_EVERY", "3600")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: together they use the cores
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests run


def assert_parity(ours: torch.Tensor, theirs: torch.Tensor, what: str = "") -> None:
    """PARITY for a stream: rounding is relative to its size, so atol is in units of its rms (≥ 1)."""
    size = max(1.0, theirs.double().pow(2).mean().sqrt().item())
    tolerance = {"rtol": PARITY["rtol"], "atol": PARITY["atol"] * size}
    torch.testing.assert_close(ours, theirs, **tolerance, msg=lambda m: f"{what}: {m}")


SHAPE = ["depth=3", "width=48", "heads=6", "kv_heads=2", "d_ff=80", "vocab_size=97"]
INPUTS = ["inputs.batch=2", "inputs.length=11"]

OWN_KEYS = {
    "swin_renorm": ["norm.every=2"],
    "attn_res": ["norm.block_size=3"],
    "mix_ln": ["norm.fraction=0.4"],
    "scaled": [
        "norm.stream_scale=[0.9,1.2]", "norm.start_scale=[0.3,-0.1]", "norm.branch_scale=[0.5,0.8]",
        "norm.start_normed=true", "norm.subtract_middle=0.6",
    ],
    "custom": ['norm.update="N(2*x + F(N(x)/sqrt(l)) - 3/L*x0)"'],
    "mhc": ["norm.mix_std=0.15"],
    "deepseek_v4": ["norm.mix_std=0.15"],
    "nanochat": ["norm.branch_scale=0.7"],
    "laurel_rw": ["norm.stream_scale=0.8", "norm.branch_scale=1.3"],
}  # fmt: skip


def placed(norm: str) -> list[str]:
    """Overrides for a norm placement, such that three blocks show all that it does."""
    return [f"norm={norm}", *OWN_KEYS.get(norm, [])]


@cache
def composer(folder: Path) -> Composer:
    """What composes a sweep's jobs: 20 times as fast as ``compose``, to the same (test_plan)."""
    with initialize_config_dir(str(folder), version_base="1.3"):
        return Composer(GlobalHydra.instance().config_loader(), "config", [])


@cache
def tiny(*overrides: str) -> RunConfig:
    """A model of three small blocks with grouped heads, dense; overrides come on top."""
    given = [*SHAPE, *INPUTS, "device=cpu", "engine=dense", "seeds=1", *overrides]
    return validate.read(composer(validate.CONF_DIR).compose(given))


def ids_of(config: RunConfig) -> torch.Tensor:
    """The token ids of a run (B, T)."""
    return torch.from_numpy(prepare(config).tokens)


def simlab(*args: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """``python -m simlab.run`` as a user runs it, in ``cwd``."""
    command = [sys.executable, "-m", "simlab.run", *args]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300
    )


COMMANDS = {
    "run": "simlab.run",
    "sweep": "simlab.sweep.__main__",
    "regress": "simlab.regress.__main__",
}


def in_process(*args: str, cwd: Path, command: str = "run") -> subprocess.CompletedProcess:
    """``python -m simlab.run`` (or ``sweep``, ``regress``) without a process of its own.

    Ten times as fast as ``simlab``, which has to import torch. An exception that the command lets
    through, for which Python prints a traceback, is raised here.
    """
    main = importlib.import_module(COMMANDS[command]).main
    out, err = io.StringIO(), io.StringIO()
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        with (
            mock.patch.object(sys, "argv", [f"simlab.{command}", *args]),
            mock.patch.dict(os.environ),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            contextlib.chdir(cwd),
        ):
            main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
        for added in set(root.handlers) - set(handlers):
            added.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
    return subprocess.CompletedProcess(list(args), status, out.getvalue(), err.getvalue())


CHECKPOINT = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 5,
    "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 3e-4,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    "attn_implementation": "eager",
}  # fmt: skip


# What families call these keys; None: they haven't got them.
RENAMED = {
    "Olmo": {"rms_norm_eps": None},  # its norm has an eps of its own
    "GPT2": {
        "hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head", "num_key_value_heads": None,
        "rms_norm_eps": "layer_norm_epsilon",
    },
    "StableLm": {"rms_norm_eps": "layer_norm_eps"},
    "GPTNeoX": {"num_key_value_heads": None, "rms_norm_eps": "layer_norm_eps"},
}  # fmt: skip


def keys_of(kind: str, keys: dict) -> dict:
    """Keys of a config, as the family of this class calls them."""
    names = RENAMED.get(kind, {})
    named = {names.get(key, key): value for key, value in keys.items()}
    return {name: value for name, value in named.items() if name is not None}


def write_olmo(folder: Path, kind: str = "Olmo2", shards: str = "5GB", **changes):
    """A random checkpoint written by transformers, with nothing at its default; and the model."""
    import transformers

    keys = copy.deepcopy(keys_of(kind, CHECKPOINT | changes))  # transformers adds to its sections
    config = getattr(transformers, f"{kind}Config")(**keys)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # gains away from 1, weights large enough for attention to matter
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder, max_shard_size=shards)
    return model


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> Path:
    """A checkpoint for each case of write_olmo_core, by ai2-olmo-core."""
    from write_olmo_core import CASES, write

    folder = tmp_path_factory.mktemp("written")
    for case in CASES:
        (folder / case).mkdir()
        write(folder / case, case)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A single-file OLMo-2 checkpoint folder."""
    write_olmo(tmp_path / "olmo")
    return tmp_path / "olmo"


def refused(folder: Path, *parts: str) -> None:
    """Asserts that opening this checkpoint raises ConfigError, whose one line has these parts."""
    from simlab.checkpoints.checkpoint import Checkpoint

    with pytest.raises(ConfigError) as caught:
        Checkpoint(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def edit_json(path: Path, **changes) -> None:
    """Change keys of a JSON file in place."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def figure_names(monkeypatch) -> list[str]:
    """The names of the figures that are made while this fixture holds; none is drawn or written."""
    names: list[str] = []

    def save(figure, folder, name, *, svg=False):
        names.append(name)
        return []

    monkeypatch.setattr("simlab.report.style.save", save)
    return names


@pytest.fixture
def no_figures(monkeypatch):
    """Runs and sweeps in this process draw nothing, which takes most of a small one's time."""
    for name in (
        "growth_figure.growth_figure",
        "figure.lambda_figure",
        "checkpoint_figure.inside_figure",
    ):
        monkeypatch.setattr(f"simlab.report.{name}", lambda *_: None)
    monkeypatch.setattr("simlab.report.sweep_figures.figures", lambda *_: {})


@pytest.fixture(scope="module")
def one_thread():
    """Matrices this small are quicker so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))
