"""scripts/gpu_check.py on a machine without a GPU: its parts on small models, and its mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest
import torch


@pytest.mark.parametrize("name", gpu_check.PARTS)
def test_every_part_measures_on_a_cpu(name):
    numbers = gpu_check.PARTS[name](gpu_check.Bench("cpu", small=True))
    assert {"seconds", "peak_gib", "tokens", "ceiling_tflops"} <= numbers.keys()
    assert all(value > 0 for value in numbers.values() if not isinstance(value, str))


def test_failed_part_and_results(tmp_path, monkeypatch, capsys):
    failing = [sys.executable, "-c", "raise SystemExit('no such kernel')"]
    run = subprocess.run

    def of(command, **kwargs):
        return run(failing if "dense_1b_float32" in command else command, **kwargs)

    monkeypatch.setattr(subprocess, "run", of)
    args = ["--device", "cpu", "--small", "--output", str(tmp_path), "--only"]
    assert gpu_check.main([*args, "dense_1b_float32", "dense_32b_bfloat16"]) == 1
    results = json.loads((tmp_path / "gpu.json").read_text())
    failed, passed = results["parts"]
    assert (failed["status"], failed["why"]) == ("failed", "no such kernel")
    assert passed["status"] == "passed"
    assert passed["seconds"] > 0
    table = (tmp_path / "gpu.md").read_text()
    assert table in capsys.readouterr().out
    assert "| dense_1b_float32 |" in table


def test_without_time_parts_are_skipped(tmp_path, capsys):
    args = ["--device", "cpu", "--small", "--output", str(tmp_path), "--budget", "1"]
    assert gpu_check.main(args) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["status"] for row in results["parts"]} == {"skipped"}
    assert [row["part"] for row in results["parts"]] == ["tests", *gpu_check.PARTS]
    assert "tests: skipped" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(capsys):
    assert gpu_check.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert "no CUDA device" in said.err


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setitem(gpu_check.MODULES, "no_such_module", "no-such-package")
    assert gpu_check.main([]) == 2
    assert "lacks no-such-package" in capsys.readouterr().err


def test_a_part_that_hangs_is_ended():
    row = gpu_check.part("probe", [sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert (row["status"], row["why"]) == ("failed", "not done after 1 s")


def test_the_makefile_has_it():
    assert "scripts/gpu_check.py" in (Path(__file__).parents[1] / "Makefile").read_text()
