"""Checkpoints from strangers: 250 mutations in each format, and pickles that mean harm.

Each opens, or is refused in one line; nothing is executed, no file is made, no time or memory lost.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import refused, write_olmo
from evil_pickles import evil
from strangers import rezip
from test_legacy_olmo import OLMO2, fused, write_legacy
from write_gguf import write_gguf

from simlab.checkpoints.storage import StoredFile
from simlab.checkpoints.untrusted.dcp import CHUNK_LIMITS
from simlab.checkpoints.untrusted.files import JSON_LIMIT
from simlab.checkpoints.untrusted.torch_zip import open_archive
from simlab.config import ConfigError

HERE = Path(__file__).parent
TINY = {
    "hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16,
    "num_hidden_layers": 2, "vocab_size": 19,
}  # fmt: skip
CONFIG = OLMO2 | {
    "d_model": 12, "n_heads": 2, "n_kv_heads": 1, "mlp_hidden_size": 32, "n_layers": 2,
    "embedding_size": 19, "vocab_size": 17,
}  # fmt: skip
FORMATS = (
    "hugging_face", "sharded", "gpt2", "pickled", "olmo_core", "legacy_pt", "legacy_safetensors",
    "gguf",
)  # fmt: skip
COUNT = 60


def write(kind, folder, scratch, written):
    if kind == "olmo_core":
        shutil.copytree(written / "olmo3", folder)
        (folder / "states.safetensors").unlink()
    elif kind == "gguf":
        folder.mkdir()
        model = write_olmo(scratch, "Llama", **TINY | {"hidden_size": 32, "intermediate_size": 32})
        write_gguf(folder / "model.gguf", model, "Q4_1")
    elif kind.startswith("legacy"):
        write_legacy(
            folder, fused(write_olmo(scratch, **TINY)), CONFIG, kind.removeprefix("legacy_")
        )
    elif kind in ("gpt2", "pickled"):
        rope = {"rope_type": "default", "partial_rotary_factor": 0.4}  # a pair of 6 channels
        own = {} if kind == "gpt2" else {"rope_parameters": rope}
        model = write_olmo(folder, "GPTNeoX" if own else "GPT2", **TINY, **own)
        (folder / "generation_config.json").unlink()
        if kind == "pickled":
            (folder / "model.safetensors").unlink()
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
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
        pickles = kind in ("olmo_core", "legacy_pt", "pickled")
        assert result["pickled"] == (len(evil("x")) if pickles else 0)


@pytest.mark.parametrize("name", [name for name in evil("x") if name.startswith("runs")])
def test_evil_pickles_run_in_plain_pickle(tmp_path, name):
    """Negative control: plain pickle executes what our reader refuses."""
    marker = tmp_path / "marker"
    pickle.loads(evil(marker)[name])
    assert marker.exists()


def largest(unit, size):
    return b'{"a":[' + unit * (size // len(unit) - 10) + unit[:-1] + b"]}"


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        (
            "model.safetensors",
            (92 << 20).to_bytes(8, "little") + b"{",
            "a header of 96468992 bytes",
        ),
        ("config.json", b"{" + b" " * JSON_LIMIT + b"}", "larger than 2 MiB"),
        ("model.safetensors.index.json", largest(b"[],", JSON_LIMIT), "has no weight_map"),
        ("config.json", b'{"a": [1], "a": [1], "b": 1, "b": 2}', "the key 'b' is there twice"),
        ("config.yaml", b"a: b\n" * 200_000, "more than 5000 keys and values"),
        ("config.yaml", b"model: [" + b"1," * 500_000 + b"]", "more than 5000 keys and values"),
        ("config.yaml", b"#" * (2 << 20), "larger than 1 MiB"),
    ],
    ids=["header", "config", "index", "twice", "keys", "list", "yaml"],
)
def test_small_files_have_bounds(tmp_path, name, data, match):
    """What a real one needs, ten times; the worst that is let in takes a second of work."""
    write_olmo(tmp_path / "m", **TINY)
    if "index" in name:
        (tmp_path / "m" / "model.safetensors").unlink()
    if name == "config.yaml":  # is not read beside a config.json
        (tmp_path / "m" / "config.json").unlink()
    (tmp_path / "m" / name).write_bytes(data)
    start = time.process_time()
    refused(tmp_path / "m", match)
    # Measured at most 1.3 on a slow core; without bounds 9 to 29.
    assert time.process_time() - start < 4


def test_a_chunk_with_a_long_directory(tmp_path, written):
    """There may be many of them: one that takes long would be an hour."""
    path = next((written / "olmo3" / "model_and_optim").glob("*.distcp"))
    data = path.read_bytes()
    first = data[: data.index(b"PK\5\6") + 22]
    archive = rezip(first, lambda r: [*r, *((f"x/{i}", b"") for i in range(900))])
    (tmp_path / "long").write_bytes(archive)
    file = StoredFile(tmp_path / "long")
    with pytest.raises(ConfigError, match="a zip directory of"):
        open_archive(file, 0, file.size, *CHUNK_LIMITS)
    open_archive(file, 0, file.size)  # a whole state's may be as long


def test_harness_reports_failures(tmp_path, monkeypatch):
    """Negative control: another exception, a message of two lines and a new file are failures."""
    import strangers

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
