"""Weights that stay in their files: the same products, hashes and statistics as whole ones."""

import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import PARITY, write_olmo
from safetensors.torch import load_file

from simlab.checkpoints import streamed
from simlab.checkpoints.checkpoint import Checkpoint
from simlab.checkpoints.fingerprint import Fingerprints
from simlab.checkpoints.storage import Piece, StoredFile, StoredTensor, check_pieces, in_one_piece
from simlab.checkpoints.streamed import StreamedLinear, StreamedMatrix, pool
from simlab.config import ConfigError
from simlab.measurement.engine import measure_curves

CPU = torch.device("cpu")


def write(path, tensor, before=0):
    """A tensor's bytes in a file, after some others."""
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    path.write_bytes(bytes(before) + data + b"end")
    return in_one_piece("w", tuple(tensor.shape), tensor.dtype, StoredFile(path), before)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(stored, start, stop):
    return StreamedMatrix("w", stored, start, stop, pool(), Fingerprints(True))


@pytest.fixture
def small_shares(monkeypatch):
    """Many runs of rows also in a small matrix."""
    monkeypatch.setattr(streamed, "RUN_BYTES", 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("before", [0, 3])
def test_products_forward_and_back(tmp_path, small_shares, dtype, before):
    """Against nn.functional.linear with the whole weight, on files where nothing is aligned too."""
    weight = random(67, 45).to(dtype)
    stored = write(tmp_path / "w", weight, before)
    layer = StreamedLinear(45, 67)
    layer.bind(matrix(stored, 0, 67))
    x, g = random(2, 9, 45, seed=1).requires_grad_(), random(2, 9, 67, seed=2)
    y = layer(x)
    y.backward(g)
    torch.testing.assert_close(y, x @ weight.float().T, **PARITY)
    torch.testing.assert_close(
        x.grad, g @ weight.float(), rtol=1e-5, atol=1e-4
    )  # sums of 67, not 45
    again = x.detach().clone().requires_grad_()
    layer(again).backward(g)
    assert torch.equal(again.grad, x.grad)


def test_bias(tmp_path):
    weight, bias = random(67, 45), random(67, seed=3)
    layer = StreamedLinear(45, 67, bias=True)
    layer.bind(matrix(write(tmp_path / "w", weight), 0, 67))
    layer.load_state_dict({"bias": bias})
    x = random(2, 9, 45, seed=1)
    torch.testing.assert_close(layer(x), x @ weight.T + bias, **PARITY)


def test_some_rows_of_a_stacked_tensor(tmp_path, small_shares):
    weight = random(90, 31)
    stored = write(tmp_path / "w", weight)
    part = matrix(stored, 20, 55)
    x = random(4, 31, seed=1)
    torch.testing.assert_close(part.times(x), x @ weight[20:55].T, **PARITY)
    g = random(4, 35, seed=2)
    torch.testing.assert_close(part.back(g), g @ weight[20:55], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("grid", [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_shards(tmp_path, grid):
    """A tensor cut along rows and columns, each part in a file of its own."""
    weight = random(30, 8)
    pieces = []
    for i, rows in enumerate(weight.chunk(grid[0])):
        for j, part in enumerate(rows.chunk(grid[1], 1)):
            write(path := tmp_path / f"{i}-{j}", part, before=4 * i)
            start = (i * len(rows), j * part.shape[1])
            pieces.append(Piece(StoredFile(path), 4 * i, start, tuple(part.shape)))
    stored = StoredTensor("w", (30, 8), torch.float32, tuple(reversed(pieces)))
    check_pieces([stored])
    for start, stop in ((0, 30), (5, 6), (9, 21), (3, 3)):
        assert torch.equal(stored.rows(start, stop), weight[start:stop])


def test_incomplete_pieces_are_refused(tmp_path):
    (tmp_path / "w").write_bytes(bytes(400))
    path = StoredFile(tmp_path / "w")

    def refused(match, *pieces, shape=(10, 5)):
        with pytest.raises(ConfigError, match=match):
            check_pieces([StoredTensor("w", shape, torch.float32, tuple(pieces))])

    a, b = Piece(path, 0, (0, 0), (4, 5)), Piece(path, 80, (4, 0), (6, 5))
    check_pieces([StoredTensor("w", (10, 5), torch.float32, (a, b))])
    refused("whole", a)
    refused("whole", a, a)
    refused("whole", a, b, b)
    refused("whole")
    refused("whole", a, Piece(path, 80, (5, 0), (6, 5)))
    refused("whole", a, Piece(path, 80, (4, 0), (6, 4)))
    refused("whole", a, Piece(path, 80, (4,), (6,)))
    refused("beyond the end", a, Piece(path, 300, (4, 0), (6, 5)))
    refused("beyond the end", Piece(path, -8, (0, 0), (4, 5)), b)
    refused("overlap", a, Piece(path, 40, (4, 0), (6, 5)))
    refused("whole", Piece(path, 0, (0, 0), (-4, 5)), b)


def test_hash_sees_bits_and_order():
    """One flipped bit, swapped rows, swapped columns; not the order in which runs come in."""
    weight = random(13, 22).bfloat16()

    def digest(tensor, firsts=(0, 5, 10)):
        fingerprints = Fingerprints(False)
        for first in firsts:
            hashed, rows = fingerprints.started("w", first), tensor[first : first + 5].contiguous()
            if hashed is not None:
                hashed.update(rows.view(torch.uint8).numpy().data)
            fingerprints.add("w", first, hashed, rows, torch.bfloat16)
        return fingerprints.digest("w")

    right = digest(weight)
    assert len(right) == 16
    assert digest(weight.clone(), (10, 0, 5, 0)) == right
    for i in range(13 * 22):
        other = weight.clone()
        other.view(torch.int16).view(-1)[i] ^= 1  # the least bit
        assert digest(other) != right
    rows = [1, 0, *range(2, 13)], [5, *range(1, 5), 0, *range(6, 13)]  # of one run, of two
    for other in (*(weight[order] for order in rows), weight.flip(1)):
        assert digest(other) != right


def test_std_of_gains_near_one():
    """1 ± 1e-4: the mean's square is 10^8 times the variance."""
    gains = 1 + 1e-4 * random(4096)
    fingerprints = Fingerprints(True)
    fingerprints.add("g", 0, fingerprints.started("g", 0), gains, torch.float32)
    assert fingerprints.statistics("g")["std"] == pytest.approx(
        gains.double().std().item(), rel=1e-3
    )


def test_checkpoint_table(tmp_path):
    """Every tensor of the file, once, with torch's own statistics of it."""
    write_olmo(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    rows = Checkpoint(str(tmp_path / "m"), statistics=True).table()
    assert sorted(row["in_file"] for row in rows) == sorted(tensors)
    for row in rows:
        w = tensors[row["in_file"]].double()
        assert row["entries"] == w.numel()
        assert row["shape"] == "×".join(map(str, w.shape))
        assert row["mean"] == pytest.approx(w.mean().item(), abs=1e-6)
        assert row["mean_abs"] == pytest.approx(w.abs().mean().item(), rel=1e-5)
        kurtosis = w.pow(4).mean() / w.pow(2).mean() ** 2
        assert row["kurtosis"] == pytest.approx(kurtosis.item(), rel=1e-5)
        assert row["std"] == pytest.approx(w.std(correction=0).item(), rel=1e-5, abs=1e-6)
        assert (row["min"], row["max"]) == (w.min().item(), w.max().item())


def test_reads_only_needed_rows(tmp_path, monkeypatch):
    """Embedding rows by id, no head without gradients."""
    write_olmo(tmp_path / "m")
    opened = Checkpoint(str(tmp_path / "m"))
    asked = []
    original = StoredTensor.rows

    def rows(tensor, start, stop, *rest):
        asked.append((tensor.name, start, stop))
        return original(tensor, start, stop, *rest)

    monkeypatch.setattr(StoredTensor, "rows", rows)
    ids = torch.tensor([[3, 60, 3]])
    measure_curves(opened, ids, CPU, torch.float32)
    embedding = [a for a in asked if a[0] == "model.embed_tokens.weight"]
    assert embedding == [("model.embed_tokens.weight", i, i + 1) for i in (3, 60)]
    assert not [a for a in asked if a[0].startswith(("lm_head", "model.norm"))]


PEAK = """
import resource, sys, torch
from simlab.measurement.engine import measure_curves
from simlab.checkpoints.checkpoint import Checkpoint
opened = Checkpoint(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
measure_curves(opened, torch.zeros(1, 4, dtype=torch.int64), torch.device("cpu"), torch.float32)
opened.identity()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in KiB, and madvise, are Linux's")
def test_streamed_memory_by_depth(tmp_path):
    """12 blocks of 12 MB each pass through less than five of them."""
    write_olmo(
        tmp_path / "m", num_hidden_layers=12, hidden_size=384, intermediate_size=2048,
        num_attention_heads=6, num_key_value_heads=6,
    )  # fmt: skip
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert size > 125e6
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "m"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 60e6


def cut(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def grow(path):
    with path.open("ab") as file:
        file.write(b"more")


def overwrite(path):
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(1000))
    os.utime(path, ns=(0, time.time_ns() + 1_000_000))  # the system's clock may tick slowly


def replace(path):
    path.with_name("other").write_bytes(bytes(path.stat().st_size))
    os.replace(path.with_name("other"), path)


@pytest.mark.parametrize("change", [cut, grow, overwrite])
@pytest.mark.parametrize("early", [True, False])
def test_a_file_that_changes_after_it_was_opened(tmp_path, change, early):
    """One line; a mapped file that is cut ends the process with SIGBUS."""
    write_olmo(tmp_path / "m")
    opened = Checkpoint(str(tmp_path / "m"))
    ids = torch.tensor([[3, 60, 3]])
    if not early:
        measure_curves(opened, ids, CPU, torch.float32)
    change(tmp_path / "m" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.safetensors: the file was changed after"):
        measure_curves(opened, ids, CPU, torch.float32)


def test_a_file_that_is_replaced_is_read_on(tmp_path):
    """The one that was opened, whose header is known, not the one that took its name."""
    write_olmo(tmp_path / "m")
    opened = Checkpoint(str(tmp_path / "m"))
    before = opened.identity()
    again = Checkpoint(str(tmp_path / "m"))
    replace(tmp_path / "m" / "model.safetensors")
    assert again.identity() == before


MANY = """
import resource, sys
from pathlib import Path
from simlab.checkpoints.storage import StoredFile
from simlab.config import ConfigError

resource.setrlimit(resource.RLIMIT_NOFILE, (40, 80))
files = []
try:
    for _ in range(100):
        files.append(StoredFile(Path(sys.argv[1])))
except ConfigError as error:
    print(error, file=sys.stderr)
print(len(files))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_more_shards_than_files_may_be_open(tmp_path):
    """The soft limit, often 1024, is raised; at the hard one a line says what to do."""
    (tmp_path / "x").write_bytes(b"x")
    done = subprocess.run(
        [sys.executable, "-c", MANY, tmp_path / "x"], capture_output=True, text=True, check=True
    )
    assert 60 < int(done.stdout) < 80
    assert done.stderr == f"{tmp_path / 'x'}: Too many open files: raise the limit (ulimit -n)\n"


def test_no_pipe_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "w")
    with pytest.raises(ConfigError, match="not a file"):
        StoredFile(tmp_path / "w")
