"""Headers of safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from simlab.checkpoints.storage import StoredTensor, in_one_piece
from simlab.checkpoints.untrusted.files import checked_name, refuse_pointer_file
from simlab.config import ConfigError
from simlab.config.fields import brief

_DTYPE_BY_CODE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file: 8 bytes of length, a JSON header, the tensors' bytes.

    The safetensors library checks the header first: its size, its JSON, that the tensors fill the
    file without a gap or an overlap, and that each has as many bytes as its shape and dtype need.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    refuse_pointer_file(path)
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        reason = brief(str(error))[1:-1] if str(error) else type(error).__name__
        raise ConfigError(f"{path}: not a readable safetensors file ({reason})") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, about in header.items():
        checked_name(name, path)
        if about["dtype"] not in _DTYPE_BY_CODE:
            raise ConfigError(
                f"{path}: tensor {name} is {about['dtype']}; allowed: {', '.join(_DTYPE_BY_CODE)}"
            )
        offset = 8 + size + about["data_offsets"][0]
        tensors[name] = in_one_piece(
            name, tuple(about["shape"]), _DTYPE_BY_CODE[about["dtype"]], path, offset
        )
    return tensors
