"""Checkpoints from strangers: 250 mutations in each format, and pickles that mean harm.

Each opens, or is refused in one line; nothing is executed, no file is made, no time or memory lost.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_olmo
from evil_pickles import evil
from test_legacy_olmo import OLMO2, fused, write_legacy

HERE = Path(__file__).parent
TINY = {
    "hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16,
    "num_hidden_layers": 2, "vocab_size": 19,
}  # fmt: skip
CONFIG = OLMO2 | {
    "d_model": 12, "n_heads": 2, "n_kv_heads": 1, "mlp_hidden_size": 32, "n_layers": 2,
    "embedding_size": 19, "vocab_size": 17,
}  # fmt: skip
FORMATS = ("hugging_face", "sharded", "olmo_core", "legacy_pt", "legacy_safetensors")
COUNT = 250


def write(kind, folder, scratch, written):
    if kind == "olmo_core":
        shutil.copytree(written / "olmo3", folder)
        (folder / "states.safetensors").unlink()
    elif kind.startswith("legacy"):
        write_legacy(
            folder, fused(write_olmo(scratch, **TINY)), CONFIG, kind.removeprefix("legacy_")
        )
    else:
        write_olmo(folder, kind="Olmo3", shards="3KB" if kind == "sharded" else "5GB", **TINY)
        (folder / "generation_config.json").unlink()


@pytest.mark.slow
def test_mutations(tmp_path, written):
    """All formats in one process, with a limit on its memory."""
    for folder in ("originals", "work"):
        (tmp_path / folder).mkdir()
    for kind in FORMATS:
        write(kind, tmp_path / "originals" / kind, tmp_path / f"scratch-{kind}", written)
    done = subprocess.run(
        [sys.executable, HERE / "strangers.py", tmp_path / "originals", tmp_path / "work", str(COUNT)],
        capture_output=True, text=True, timeout=480, check=False, cwd=tmp_path / "work",
        env=os.environ | {"MALLOC_ARENA_MAX": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert set(results) == set(FORMATS)
    for kind, result in results.items():
        print(kind, result)
        assert not result["failures"], "\n".join(result["failures"][:5])
        # Mutations matter, and aren't all of one kind: some change what isn't read, or a weight.
        assert result["refused"] > COUNT // 2
        assert result["opened"] > 0
        assert result["pickled"] == (len(evil("x")) if kind in ("olmo_core", "legacy_pt") else 0)


@pytest.mark.parametrize("name", [name for name in evil("x") if name.startswith("runs")])
def test_evil_pickles_run_in_plain_pickle(tmp_path, name):
    """Negative control: plain pickle executes what our reader refuses."""
    marker = tmp_path / "marker"
    pickle.loads(evil(marker)[name])
    assert marker.exists()


def test_harness_reports_failures(tmp_path, monkeypatch):
    """Negative control: another exception, a message of two lines and a new file are failures."""
    import strangers

    from simlab.config import ConfigError

    def fails(error):
        def read(folder):
            if error is None:
                (folder / "made").touch()
            else:
                raise error

        failures = []
        monkeypatch.setattr(strangers, "read_all", read)
        strangers.attempt(tmp_path, "x", failures)
        return len(failures)

    assert fails(ConfigError("one line")) == 0
    assert [fails(e) for e in (ConfigError("two\nlines"), MemoryError(), KeyError("x"), None)] == [
        1
    ] * 4
