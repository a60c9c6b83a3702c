"""Tensors that a file has in another order: rows as they are in the model, and their bytes."""

import pytest
import torch
from safetensors.torch import save_file

from simlab.checkpoints import arranged
from simlab.checkpoints.storage import check_pieces
from simlab.checkpoints.untrusted.safetensors import read_header


def stored(folder, tensor):
    save_file({"w": tensor.contiguous()}, folder / "w.safetensors")
    return read_header(folder / "w.safetensors")["w"]


def assert_rows(tensor, whole, start, stop, dtype):
    """The rows in the run's dtype, and the bytes seen in the file's."""
    seen = []
    out = torch.empty((stop - start, *whole.shape[1:]), dtype=dtype)
    tensor.rows(start, stop, out, lambda view: seen.append(bytes(view)))
    assert torch.equal(out, whole[start:stop].to(dtype))
    expected = whole[start:stop].contiguous().view(torch.uint8).numpy().tobytes()
    assert b"".join(seen) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most", [1 << 20, 64])  # bytes at once: all, or a few columns' or rows'
@pytest.mark.parametrize("whole", [1 << 20, 0])  # bytes of a row that is read whole
def test_turned(tmp_path, monkeypatch, dtype, most, whole):
    monkeypatch.setattr(arranged, "READ_BYTES", most)
    monkeypatch.setattr(arranged, "TURNED_BYTES", most * 4)
    monkeypatch.setattr(arranged, "WHOLE_BYTES", whole)
    whole = torch.randn(14, 9).bfloat16()
    tensor = arranged.turned(stored(tmp_path, whole.T))
    check_pieces([tensor])
    assert tensor.shape == (14, 9)
    for start, stop in ((0, 14), (3, 11), (13, 14)):
        assert_rows(tensor, whole, start, stop, dtype)


@pytest.mark.parametrize("shape", [(24, 5), (24,)])
def test_by_head(tmp_path, shape):
    whole = torch.randn(shape)
    parts = arranged.by_head(stored(tmp_path, whole), heads=4, parts=3)
    check_pieces(parts)  # together: they don't overlap
    for tensor, own in zip(parts, whole.unflatten(0, (4, 3, 2)).unbind(1), strict=True):
        for start, stop in ((0, 8), (3, 4), (1, 7)):
            assert_rows(tensor, own.flatten(0, 1), start, stop, torch.float64)
