"""The bundled demo model: its files, what it learned, its source, the script that made it."""

import hashlib
import json
import math
from functools import cache
from itertools import islice, pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
import train_demo
from conftest import assert_parity, ids_of, in_process
from safetensors.torch import load_file

from simlab import build_model, compose
from simlab.checkpoints.checkpoint import Checkpoint
from simlab.config import DEMO_DIR, DEMO_STEPS, ConfigError
from simlab.experiment import prepare
from simlab.report.console import show_sweep
from simlab.weights.dense import RandomWeights

TINY = [
    "--depth", "2", "--width", "16", "--heads", "2", "--d-ff", "8", "--batch", "2", "--length", "32",
]  # fmt: skip


WEIGHT_HASHES = {
    "0": "9dbbe9c62268460cb79a42f12a73c995",
    "100": "594c2f23af50ed025cf73f9b7f0ef067",
    "1000": "8fd70887faa22b8759760923b2080994",
    "final": "1591a60a1aa8d392fecfcca6b030fa3d",
}


@cache
def demo(step: str, *overrides: str):
    return compose(["source=demo", f"source.step={step}", "device=cpu", "seeds=0", *overrides])


def folder(step: str) -> Path:
    return Path(demo(step).source.location)


def provenance() -> dict:
    return json.loads((DEMO_DIR / "provenance.json").read_text())


def test_size_and_provenance():
    files = {p.relative_to(DEMO_DIR).as_posix() for p in DEMO_DIR.rglob("*") if p.is_file()}
    folders = {folder(step).name for step in DEMO_STEPS}
    held = {f"{name}/{file}" for name in folders for file in ("config.json", "model.safetensors")}
    assert files == held | {"provenance.json", "LICENSE.md"}
    assert sum((DEMO_DIR / file).stat().st_size for file in files) <= 8_000_000
    about = provenance()
    assert about["checkpoints"].keys() == folders
    for name in folders:
        data = (DEMO_DIR / name / "model.safetensors").read_bytes()
        assert hashlib.sha256(data).hexdigest() == about["checkpoints"][name]["sha256"]
    assert {"seed", "tokens_seen", "recipe", "data", "versions", "seconds"} <= about.keys()
    assert about["loss_curve"][-1]["step"] == about["steps"]
    assert "/home" not in json.dumps(about)
    assert "/root" not in json.dumps(about)


@pytest.mark.parametrize("step", DEMO_STEPS)
def test_weight_hashes_stay(step):
    """Results of earlier versions are found by them: another value here is a line in CHANGELOG.md."""
    assert Checkpoint(str(folder(step))).identity() == {"weight_hash": WEIGHT_HASHES[step]}


def test_transformers_computes_the_same():
    import transformers

    step = "final"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder(step), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert type(theirs).__name__ == "Olmo2ForCausalLM"
    ids = ids_of(demo(step))[:, :100]
    with torch.no_grad():
        assert_parity(build_model(demo(step))(ids), theirs(ids).logits, step)


def test_step_0_is_the_init():
    about = provenance()
    config = demo("0")
    own = prepare(config).config
    drawn = RandomWeights(own.shape, own.init, about["seed"])
    stored = build_model(config).state_dict()
    assert (own.init.std, own.init.truncate) == (0.02, 3.0)
    for name, tensor in stored.items():
        fresh = drawn.tensor(name, tensor.shape, torch.device("cpu"), torch.float32)
        assert torch.equal(tensor, fresh.to(torch.bfloat16).float()), name


def test_demo_loss_falls_with_its_steps():
    """On a text that no training saw, the bundled one, and on the held-out files when it was made.

    Measured there: 5.49, 3.01, 1.84, 1.38 nats per byte, and 5.51, 2.84, 1.79, 1.39 on the files. An
    untrained model is within 0.1 of ln(256) = 5.55; one that knew the bundled text's frequencies of
    bytes, and nothing of what comes before one, would be at 3.10: the final one is below half of it.
    """
    chance = math.log(256)
    ids = ids_of(demo("final"))
    losses = []
    for step in DEMO_STEPS:
        with torch.no_grad():
            logits = build_model(demo(step))(ids[:, :-1])
        losses.append(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
        )
    held_out = [
        provenance()["checkpoints"][folder(step).name]["validation_loss"] for step in DEMO_STEPS
    ]
    for each in (losses, held_out):
        assert abs(each[0] - chance) < 0.1
        assert all(after < before - 0.3 for before, after in pairwise(each)), each
        assert each[-1] < 1.55


@pytest.mark.slow
def test_demo_run(tmp_path, figure_names):
    done = in_process("source=demo", "seeds=2", "device=cpu", "inputs.length=64", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "demo (final): depth 24, width 64" in done.stdout
    assert "× 64 text bytes" in done.stdout
    (out,) = (tmp_path / "outputs").glob("*/*")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["weight_hash"] == WEIGHT_HASHES["final"]
    frame = pd.read_csv(out / "curve.csv")
    assert frame.groupby("curve")["seed"].nunique().to_dict() == {"checkpoint": 1, "random": 2}
    last = frame[frame["sublayer"] == 48].groupby("curve")["mean_square"].mean()
    assert figure_names == ["growth", "lambda", "inside"]
    assert last["checkpoint"] < last["random"] / 2  # measured on 256 bytes: 13.2 against 45.7


def test_sweep_table_of_checkpoints(capsys):
    """Only those that were held against random inits; a single one has its own lines."""
    departure = {
        "growth": 26.5, "ratio": 0.58, "sublayer": 29,
        "checkpoint": {"branches": 26.9, "alignment": -0.4},
    }  # fmt: skip
    job = {"departure": departure, "config": {"model": {"name": "demo (step 1000)"}}}
    later = job | {"departure": departure | {"sublayer": None, "checkpoint": None}}
    summaries = {"0": job, "1": {"config": {}}, "10": later}
    show_sweep("3 jobs", pd.DataFrame(), {}, summaries, {}, [], 0, [])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[3].split() == ["0", "demo", "(step", "1000)", "26.5", "26.9", "-0.4", "0.58", "29"]
    assert lines[4].split() == ["10", "demo", "(step", "1000)", "26.5", "0.58"]
    show_sweep("1 job", pd.DataFrame(), {}, {"0": job}, {}, [], 0, [])
    assert capsys.readouterr().out == "1 job\n"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["source=demo", "source.step=10"], "allowed: 0, 100, 1000, final; did you mean 100?"),
        (["source=demo", "source.step=null"], "source.step=null: allowed: 0, 100, 1000, final"),
        (["source=demo", "depth=3"], "depth=3: with source=demo it is read from the checkpoint"),
        (["source=demo", "model=gemma3_27b"], "model=gemma3_27b: with source=demo it is read from"),
        (
            ["source=demo", "norm=post"],
            "norm=post: with source=demo it is read from the checkpoint",
        ),
        (["source.step=0"], "source.step=0: only with source=demo"),
        (["source=deno"], "did you mean demo?"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, overrides, said):
    done = in_process(*overrides, cwd=tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_inputs_override_bundled_text(tmp_path):
    assert demo("0").inputs.prompt.startswith('"""A shelf')
    assert demo("0", "inputs.prompt=abc").inputs.prompt == "abc"
    assert demo("0", "inputs.path=file").inputs.prompt is None
    random = demo("0", "inputs=random").inputs
    assert (random.kind, random.prompt, random.batch, random.length) == ("random", None, 1, 64)
    with pytest.raises(ConfigError, match="one of"):
        demo("0", "inputs.prompt=abc", "inputs.path=file")


@pytest.fixture
def train(monkeypatch):
    """The main of scripts/train_demo.py, on the standard library's first files."""
    sources = train_demo.sources
    monkeypatch.setattr(train_demo, "sources", lambda root: islice(sources(root), 100))
    monkeypatch.setattr(train_demo, "tune_process", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return train_demo.main


def test_training_writes_the_same_bytes_again(tmp_path, train, one_thread, capsys):
    for name in ("a", "b"):
        train([str(tmp_path / name), "--steps", "3", *TINY])
    assert "step     3 of 3  loss " in capsys.readouterr().out
    wanted = {f"{s}/{f}" for s in ("step-0", "final") for f in ("config.json", "model.safetensors")}
    for name in ("a", "b"):
        files = {p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*.*")}
        assert {path.as_posix() for path in files} == wanted | {"provenance.json"}
    for file in wanted:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    before = load_file(tmp_path / "a" / "step-0" / "model.safetensors")
    after = load_file(tmp_path / "a" / "final" / "model.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in before)
    opened = compose(["source=checkpoint", f"source.path={tmp_path / 'a' / 'final'}", "seeds=0"])
    assert build_model(opened)(torch.zeros(1, 5, dtype=torch.long)).shape == (1, 5, 256)
    about = json.loads((tmp_path / "a" / "provenance.json").read_text())
    assert about["tokens_seen"] == 3 * 2 * 32
    assert {"train", "validation"} <= about["loss_curve"][-1].keys()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--steps", "0"], "--steps 0: must be above 0"),
        (["--rate", "nan"], "--rate nan: must be above 0"),
        (["--stepz", "3"], "unrecognized arguments: --stepz 3"),
        (["--heads", "3"], "heads=3: must divide width=64; the nearest that does is 2"),
        (["--length", "100000000"], "--length is too long"),
        (["--minutes", "1e-6", "--every", "1", *TINY], "at this pace 2500 steps take"),
    ],
)
def test_training_mistakes(tmp_path, train, capsys, args, said):
    with pytest.raises(SystemExit) as ended:
        train([str(tmp_path / "out"), *args])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("train_demo: ")
    assert said in err
    assert len(err.splitlines()) == 1
