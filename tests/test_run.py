"""The command as a user types it, in an empty folder."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from importlib.metadata import version as simlab_version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import INPUTS, SHAPE, in_process, simlab, write_olmo
from safetensors.torch import load_file, save_file

SMALL = [*SHAPE, *INPUTS, "device=cpu"]
FIGURES = ["growth.png", "lambda.png"]
FILES = ["curve.csv", *FIGURES, "report.html", "summary.json"]


def only_run(folder: Path) -> Path:
    (found,) = (folder / "outputs").glob("2*/*")
    return found


def test_main_job(tmp_path):
    """Its files and its words; and the same command writes the same bytes again."""
    run = [*SMALL, "depth=4", "norm=swin_renorm", "norm.every=2", "seeds=8"]
    done = in_process(*run, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    out = only_run(tmp_path)
    assert sorted(p.name for p in out.iterdir()) == [".hydra", *FILES]
    told = (
        done.stdout.index("per sublayer"),
        done.stdout.index(str(out / "growth.png")),
        done.stdout.index("block after"),
    )
    assert list(told) == sorted(told)  # the verdict, where the figure is, the table
    assert str(out / "report.html") in done.stdout
    assert "per sublayer" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if str(out) not in line) <= 80
    frame = pd.read_csv(out / "curve.csv")
    assert len(frame) == 8 * (1 + 8 + 2)
    assert frame.columns[:5].tolist() == ["curve", "seed", "sublayer", "block", "kind"]
    assert frame.groupby("kind")["branch_mean_square"].count().to_dict() == {
        "attention": 32, "embedding": 0, "mlp": 32, "renorm": 0,
    }  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert summary["config"]["model"]["norm"]["every"] == 2
    sentence = summary["verdict"]["random"]["sentence"]
    assert " ".join(sentence.split()) in " ".join(done.stdout.split())
    keys = {"config_hash", "engine", "device", "dtype", "versions", "theories", "verdict"}
    assert keys <= summary.keys()
    statuses = {law: fit["status"] for law, fit in summary["theories"]["random"].items()}
    # So narrow, eight seeds don't tell the laws to 5 %: neither holds nor fails.
    assert statuses == {"additive": "unknown", "sqrt2": "fails", "mean_field": "unknown"}
    in_process(*run, "hydra.run.dir=again", "svg=true", cwd=tmp_path)
    assert sorted(p.name for p in (tmp_path / "again").glob("*.svg")) == [
        "growth.svg",
        "lambda.svg",
    ]
    for file in FILES:
        pair = [(folder / file).read_bytes() for folder in (out, tmp_path / "again")]
        if file == "report.html":  # has the day and the command
            pair = [re.sub(rb"2\d{3}-\d\d-\d\d| svg=true", b"", text) for text in pair]
        assert pair[0] == pair[1], file


MISTAKES = {
    "depth=-1": "depth=-1: allowed: an integer, at least 1",
    "heads=7": "heads=7: must divide width=48; the nearest that does is 6",
    "norm=swinrenorm": "did you mean swin_renorm?",
    "init.std=nan": "init.std=nan: allowed: a number, above 1e-12",
    "dpeth=3": "dpeth=3: no such key; did you mean depth?",
    "+dpeth=3": "did you mean depth?",
    "norm.every=3": "norm.every=3: only with norm=swin_renorm",
    "device=cuda:99": "device=cuda:99: not on this machine",
    "inputs.path=nowhere.txt": "inputs.path=nowhere.txt: only with inputs=text",
    "depth==3": "depth==3: not of the form key=value",
    "seeds=1,2": "seeds",
    "norm=null": "norm=null: allowed: attn_res",
    "hydra.run.dir=/proc/nowhere/x": "/proc/nowhere: No such file or directory",
    "device=cuda:99999999999999999999": "not on this machine",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_are_one_line(tmp_path, override):
    done = in_process(*SMALL, override, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert MISTAKES[override] in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_missing_files(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for overrides, said in (
        (["inputs=text", "inputs.path=note.txt"], "did you mean notes.txt?"),
        (["source=checkpoint", "source.path=./nowhere"], "source.path=./nowhere: no such folder"),
        (["source=checkpoint", "source.path=notes.txt"], "is a file"),
    ):
        done = in_process(*overrides, cwd=tmp_path)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert said in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_real_interrupt(tmp_path):
    """A real signal, while Hydra writes .hydra/ or soon after."""
    command = [sys.executable, "-m", "simlab.run", "depth=2000", "seeds=8"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("outputs/*/*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines() == ["simlab: interrupted; nothing of the unfinished run was kept"]
    assert list(tmp_path.iterdir()) == []


MOMENTS = {
    "imports": "simlab.run.prefer_our_launchers",
    "checks before the folder": "simlab.experiment.prepare",
    "writing .hydra": "hydra.core.utils._save_config",
    "before the task": "hydra._internal.callbacks.Callbacks.on_job_start",
    "measuring": "simlab.experiment.measure",
    "writing": "simlab.report.style.save",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupt_leaves_nothing(tmp_path, monkeypatch, moment):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(MOMENTS[moment], interrupt)
    done = in_process(*SMALL, "seeds=1", cwd=tmp_path)
    assert done.returncode == 130
    assert done.stderr == "simlab: interrupted; nothing of the unfinished run was kept\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("outputs", ["symbolic link", "mount"])
def test_cleaning_up_does_not_hide_the_error(tmp_path, monkeypatch, outputs):
    """outputs/ can't be removed then; a disk that is full while the results are written."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def busy(path):
        raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr("simlab.report.style.save", full)
    if outputs == "mount":
        monkeypatch.setattr(Path, "rmdir", busy)
    else:
        (tmp_path / "disk").mkdir()
        (tmp_path / "outputs").symlink_to("disk")
    done = in_process(*SMALL, "seeds=1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "simlab: error: No space left on device"
    assert not [path for path in (tmp_path / "outputs").rglob("*") if path.is_file()]


@pytest.mark.filterwarnings("ignore:Experimental rerun CLI option")
def test_folders_of_earlier_versions(tmp_path, no_figures):
    """They can be run again: their .hydra/ name the callback and, not simlab's sweeper, Hydra's."""
    pickled = "+hydra.callbacks.pickle._target_=hydra.experimental.callbacks.PickleJobInfoCallback"
    in_process(*SMALL, "seeds=1", "hydra.run.dir=old", pickled, cwd=tmp_path)
    in_process("-m", *SMALL, "seeds=1", "depth=1,2", "hydra.sweep.dir=sweep", cwd=tmp_path)
    before = (tmp_path / "old" / "curve.csv").read_bytes()
    again = in_process("-cp", str(tmp_path / "old/.hydra"), "hydra.run.dir=new", cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")
    assert (tmp_path / "new" / "curve.csv").read_bytes() == before
    (tmp_path / "old" / "curve.csv").unlink()
    again = in_process("--experimental-rerun", "old/.hydra/config.pickle", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "old" / "curve.csv").read_bytes() == before
    whole = tmp_path / "sweep" / "multirun.yaml"
    text = whole.read_text()
    ours, theirs = (
        "hydra_plugins.simlab_sweeper.SimlabSweeper",
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    )
    assert ours in text
    assert "simlab.sweeper.Around" in text
    whole.write_text(text.replace(ours, theirs))
    before = (tmp_path / "sweep" / "sweep.parquet").read_bytes()
    again = in_process(
        "-cp", str(tmp_path / "sweep"), "-cn", "multirun", "-m", "depth=1,2", "hydra.sweep.dir=new",
        cwd=tmp_path,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "new" / "sweep.parquet").read_bytes() == before


def test_commands_that_need_no_torch(tmp_path):
    """What there is, versions and the help, whose choices are conf/'s."""
    code = (
        "import runpy, sys\n"
        "for given in ('simlab', 'simlab --version', 'simlab.run --version',\n"
        "              'simlab.sweep --version',\n"
        "              'simlab.regress --version', 'simlab.regress --help',\n"
        "              'simlab.sweep --help', 'simlab.run --help'):\n"
        "    sys.argv = given.split()\n"
        "    try: runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "    except SystemExit as end: assert not end.code\n"
        "    assert 'torch' not in sys.modules\n"
        "    print('====')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    commands, *versions, regress, sweep, usage, _ = done.stdout.split("====\n")
    for shown in (regress, sweep):
        assert max(map(len, shown.splitlines())) <= 80
    assert versions == [f"simlab {simlab_version('simlab')}\n"] * 4
    for part in ("run", "sweep", "regress"):
        assert f"python -m simlab.{part} " in commands
    for package in ("simlab", "torch", "numpy", "hydra", "Python"):
        assert re.search(rf"\b{package} \d+\.\d+", commands)
    for choice in ("swin_renorm", "olmo2_32b", "mitchell", "zipf", "checkpoint"):
        assert choice in usage
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("std", ["500", "1e6"])
def test_an_overflow_at_once_is_a_result(tmp_path, std):
    """float16 overflows in the first sublayer, or already at the embedding: the run succeeds."""
    done = in_process(
        *SMALL, "dtype=float16", "norm=none", f"init.std={std}", "seeds=2", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Overflow (random init, 2 curves)" in done.stdout
    assert "nan" not in done.stdout
    files = [name for name in FILES if not name.startswith("lambda")]  # there is no λ
    assert sorted(p.name for p in only_run(tmp_path).iterdir()) == [".hydra", *files]


def test_an_earlier_result_survives_a_mistake(tmp_path, no_figures):
    in_process(*SMALL, "seeds=1", "hydra.run.dir=kept", cwd=tmp_path)
    before = {p.name: p.read_bytes() for p in (tmp_path / "kept").iterdir() if p.is_file()}
    assert in_process(*SMALL, "depth=0", "hydra.run.dir=kept", cwd=tmp_path).returncode == 2
    assert {p.name: p.read_bytes() for p in (tmp_path / "kept").iterdir() if p.is_file()} == before


@pytest.mark.parametrize("moment", ["measuring", "writing"])
def test_failed_run_in_a_sweeps_folder(tmp_path, monkeypatch, no_figures, moment):
    """It removes what it wrote itself, and nothing else."""
    folder = tmp_path / "sweep"
    in_process("-m", *SMALL, "seeds=1", "depth=1,2", "hydra.sweep.dir=sweep", cwd=tmp_path)
    for name in ("lambda.png", ".hydra/config.yaml", ".hydra/mine.yaml"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    where = {"measuring": "experiment.measure", "writing": "sweep.job.write_tables"}[moment]
    monkeypatch.setattr(f"simlab.{where}", full)
    done = in_process(*SMALL, "seeds=1", "hydra.run.dir=./x/../sweep", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "simlab: error: No space left on device"
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after.pop(folder / ".hydra" / "config.yaml", None) is None  # Hydra wrote it anew
    before.pop(folder / ".hydra" / "config.yaml")
    assert after == before


def test_a_text_through_a_transformers_checkpoint(tmp_path, no_figures):
    write_olmo(tmp_path / "olmo", vocab_size=256, shards="100KB")
    readme = Path(__file__).parents[1] / "README.md"
    done = in_process(
        "source=checkpoint", "source.path=olmo", "inputs=text", f"inputs.path={readme}", "seeds=2",
        "inputs.length=64", "device=cpu", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = only_run(tmp_path)
    frame = pd.read_csv(out / "curve.csv")
    assert frame.groupby("curve")["seed"].nunique().to_dict() == {"checkpoint": 1, "random": 2}
    assert np.isfinite(frame["mean_square"]).all()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["config"]["model"]["norm"]["eps"] == 3e-4
    assert len(summary["weight_hash"]) == 32


def test_a_wheel_runs_outside_the_source_tree(tmp_path):
    """Built, unpacked and run with the checkout out of reach: conf/ must be inside.

    As a user types it, in a terminal without Unicode, with a name that looks like markup.
    """
    root = Path(__file__).parents[1]
    source, site, work = (tmp_path / name for name in ("source", "site", "work"))
    for part in ("simlab", "conf", "hydra_plugins"):
        shutil.copytree(root / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / file, source)
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path / "dist"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, *build, source], check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    demo = {p.relative_to(source) for p in (source / "simlab" / "demo").rglob("*") if p.is_file()}
    assert len(demo) == 10  # four checkpoints of two files, their provenance and licence
    assert all((site / path).is_file() for path in demo)
    assert (site / "simlab" / "py.typed").is_file()  # its type hints are for users too
    shutil.rmtree(source)
    work.mkdir()
    env = os.environ | {"PYTHONPATH": str(site), "PYTHONIOENCODING": "ascii"}
    done = simlab(*SMALL, "seeds=1", "norm=peri", "model.name='a[red]b[/bold]'", cwd=work, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "a[red]b[/bold]: depth 3" in done.stdout
    out = only_run(work)
    assert sorted(p.name for p in out.iterdir()) == [".hydra", *FILES]
    assert f"path: {site / 'simlab' / 'conf'}\n" in (out / ".hydra/hydra.yaml").read_text()


def test_sweep_names_equal_checkpoints(tmp_path, checkpoint, no_figures):
    """Two folders, one set of weights; a third that differs in one number."""
    for name in ("copy", "other"):
        shutil.copytree(checkpoint, checkpoint.parent / name)
    file = checkpoint.parent / "other" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] += 1
    save_file(tensors, file, {"format": "pt"})
    paths = ",".join(str(checkpoint.parent / name) for name in (checkpoint.name, "other", "copy"))
    done = in_process("-m", "source=checkpoint", f"source.path={paths}", "seeds=0", "inputs.length=8",
                  cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "have the same" in line)
    assert line.startswith("Jobs 0, 2 have the same embedding and blocks (")


def test_unknown_command(monkeypatch, capsys):
    """``python -m simlab runn``: one line with the commands, exit status 2."""
    import simlab.__main__

    monkeypatch.setattr(sys, "argv", ["simlab", "runn"])
    with pytest.raises(SystemExit) as ended:
        simlab.__main__.main()
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert all(name in line for name in ("runn", "run", "sweep", "regress"))
