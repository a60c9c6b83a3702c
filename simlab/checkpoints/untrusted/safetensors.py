"""Headers of safetensors files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

import torch

from simlab.checkpoints.storage import StoredFile, StoredTensor, in_one_piece
from simlab.checkpoints.untrusted.files import (
    JSON_LIMIT,
    checked_name,
    parse_object,
    refuse_pointer,
)
from simlab.checkpoints.untrusted.pickle import MAX_DIMENSIONS
from simlab.config import ConfigError
from simlab.config.fields import brief

_DTYPE_BY_CODE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
# Of buffers, as causal masks and position ids, which older files hold beside the weights.
WHOLE_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64,
}  # fmt: skip


def read_header(
    path: Path, more: Mapping[str, torch.dtype] | None = None
) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file: 8 bytes of length, a JSON header, the tensors' bytes.

    more: dtypes by code that are allowed besides those of weights.

    The tensors must fill the file without a gap or an overlap, each with as many bytes as its shape and
    dtype need. The safetensors library checks the same, but maps the file, parses a header of 100 MB
    (29 s and 2.9 GB), and can't be given a file that is open. Raises ConfigError.
    """
    file, bad = StoredFile(path), f"{path}: not a readable safetensors file"
    refuse_pointer(file.read(0, 64), path)
    size = int.from_bytes(file.read(0, 8), "little")
    if size > JSON_LIMIT:
        raise ConfigError(f"{bad} (a header of {size} bytes; allowed: {JSON_LIMIT})")
    header = parse_object(file.read(8, size), path, "not a readable safetensors file: its header")
    header.pop("__metadata__", None)
    dtypes = _DTYPE_BY_CODE | dict(more or {})
    tensors = {
        checked_name(name, path): _entry(about, name, path, dtypes)
        for name, about in header.items()
    }
    end = 0
    for start, stop, name in sorted((about[2], about[3], name) for name, about in tensors.items()):
        if start != end:
            raise ConfigError(f"{bad} (tensor {name} leaves a gap, or overlaps another)")
        end = stop
    if 8 + size + end != file.size:
        raise ConfigError(f"{bad} (its header tells of {8 + size + end} bytes, it has {file.size})")
    return {
        name: in_one_piece(name, shape, dtype, file, 8 + size + start)
        for name, (shape, dtype, start, _) in tensors.items()
    }


def _sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _entry(
    about: object, name: str, path: Path, dtypes: Mapping[str, torch.dtype]
) -> tuple[tuple[int, ...], torch.dtype, int, int]:
    """A tensor's shape, its dtype, and its first byte and the one after its last in the data."""
    what = f"{path}: tensor {name}"
    values = about if isinstance(about, dict) else {}
    code, shape, ends = (values.get(key) for key in ("dtype", "shape", "data_offsets"))
    dtype = dtypes.get(code) if isinstance(code, str) else None
    if dtype is None:
        kind = brief(code).strip("'")
        raise ConfigError(f"{what} is {kind}; allowed: {', '.join(dtypes)}")
    if not _sizes(shape) or not _sizes(ends) or len(ends) != 2 or len(shape) > MAX_DIMENSIONS:
        raise ConfigError(f"{what}: its shape or its data_offsets are none")
    if ends[1] - ends[0] != math.prod(shape) * dtype.itemsize:
        raise ConfigError(f"{what}: its bytes are more or fewer than its shape needs")
    return tuple(shape), dtype, ends[0], ends[1]
