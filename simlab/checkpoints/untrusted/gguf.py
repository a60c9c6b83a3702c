"""Headers of GGUF files, llama.cpp's format: the model's metadata, and where its tensors lie.

The layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): ``GGUF``, a version, the counts
of tensors and of keys; then each key with the type of its value and the value; then each tensor's name,
sizes (the last dimension first), type and place in the data, which begins after the next multiple of
``general.alignment``. All numbers are little-endian.

Read here and not by the gguf library: its GGUFReader maps the file, which ends the process where
another program cuts that file, and makes a numpy array of every number and text in it, before any check
and nested as deep as the file says. Here no more than LIMIT bytes are read, and of long values only
their lengths.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from simlab.checkpoints.storage import StoredFile
from simlab.checkpoints.untrusted.files import checked_name, refuse_pointer
from simlab.config import ConfigError
from simlab.config.fields import brief

LIMIT = 64 << 20  # bytes of a header: the tokenizer is in it, for which simlab allows as many alone
# Real files have some 50 keys and 1,000 tensors; a vocabulary and its merges are 700,000 texts at most.
MOST_KEYS, MOST_TENSORS, MOST_TEXTS = 1_000, 100_000, 2_000_000
MOST_KEPT = 1_000  # bytes of a text, and numbers of a list, that are kept
_WINDOW = 1 << 20
_TEXT, _LIST = 8, 9
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))


@dataclass(frozen=True)
class TensorPlace:
    """A tensor in a GGUF file: its shape, ggml's number of its type, and its first byte."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """A file's metadata by key, and its tensors by name.

    Of a text of more than MOST_KEPT bytes, of a list of texts, and of one of more than MOST_KEPT
    numbers, ``values`` has a few words.
    """

    file: StoredFile
    values: dict[str, object]
    tensors: dict[str, TensorPlace]


class _Reader:
    """A header's bytes in their order. Raises ConfigError at the end of the file, or of LIMIT."""

    def __init__(self, file: StoredFile) -> None:
        self.file, self.at, self.start, self.window, self.texts = file, 0, 0, b"", 0
        self.end = min(file.size, LIMIT)

    def bad(self, why: str) -> ConfigError:
        return ConfigError(f"{self.file.path}: not a readable GGUF file ({why})")

    def skip(self, count: int) -> int:
        """Where some bytes begin that aren't read."""
        start, self.at = self.at, self.at + count
        if self.at > self.end:
            cut = f"its header is larger than {LIMIT >> 20} MiB"
            raise self.bad(cut if self.end < self.file.size else "it ends within its header")
        return start

    def take(self, count: int) -> bytes:
        """The next bytes."""
        start = self.skip(count) - self.start
        if start + count > len(self.window):
            self.start, start = self.at - count, 0
            self.window = self.file.read(self.start, max(count, _WINDOW))
        return self.window[start : start + count]

    def number(self, code: str) -> int | float | bool:
        """A number by its code in ``struct``."""
        value: int | float | bool = struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]
        return value

    def integer(self, code: str) -> int:
        """An unsigned integer."""
        return int(self.number(code))

    def text(self) -> str:
        """A text, or some words on a long one."""
        count = self.integer("Q")
        if count > MOST_KEPT:
            self.skip(count)
            return f"a text of {count} bytes"
        return self.take(count).decode("utf-8", "replace")

    def name(self) -> str:
        """A key or a tensor's name."""
        return checked_name(self.text(), self.file.path)

    def value(self, kind: int) -> object:
        """A value of one of GGUF's types."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            raise self.bad(f"a value of type {kind}")
        kind, count = self.integer("I"), self.integer("Q")
        if kind == _TEXT:
            self.texts += count
            if self.texts > MOST_TEXTS:
                raise self.bad(f"lists of {self.texts} texts; allowed: {MOST_TEXTS}")
            for _ in range(count):
                self.skip(self.integer("Q"))
            return f"a list of {count} texts"
        if kind not in _NUMBERS:
            raise self.bad(f"a list of type {kind}")
        code = _NUMBERS[kind]
        if count > MOST_KEPT:
            self.skip(count * struct.calcsize(code))
            return f"a list of {count} numbers"
        return [self.number(code) for _ in range(count)]


def read_gguf(path: Path) -> Header:
    """The header of a GGUF file. That tensors lie within the file isn't checked here.

    Raises ConfigError.
    """
    file = StoredFile(path)
    reader = _Reader(file)
    refuse_pointer(file.read(0, 64), path)
    if file.read(0, 4) != b"GGUF":
        raise reader.bad("it doesn't begin with GGUF")
    reader.skip(4)
    version = reader.integer("I")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
        raise reader.bad("big-endian" if swapped else f"version {version}; allowed: 2, 3")
    tensors, keys = reader.integer("Q"), reader.integer("Q")
    if keys > MOST_KEYS or tensors > MOST_TENSORS:
        raise reader.bad(
            f"{keys} keys and {tensors} tensors; allowed: {MOST_KEYS} and {MOST_TENSORS}"
        )
    values: dict[str, object] = {}
    for _ in range(keys):
        name = reader.name()
        if name in values:
            raise reader.bad(f"the key {brief(name)} is there twice")
        values[name] = reader.value(reader.integer("I"))
    places: dict[str, TensorPlace] = {}
    for _ in range(tensors):
        name = reader.name()
        if name in places:
            raise reader.bad(f"tensor {name} is there twice")
        dimensions = reader.integer("I")
        if not 1 <= dimensions <= 4:
            raise reader.bad(f"tensor {name} of {dimensions} dimensions")
        sizes = [reader.integer("Q") for _ in range(dimensions)]
        kind, offset = reader.integer("I"), reader.integer("Q")
        places[name] = TensorPlace(tuple(reversed(sizes)), kind, offset)
    step = values.get("general.alignment", 32)
    if type(step) is not int or not 1 <= step <= _WINDOW or step & (step - 1):
        raise reader.bad(f"general.alignment={brief(step)}; allowed: a power of 2")
    start = -(-reader.at // step) * step
    return Header(
        file, values, {n: TensorPlace(p.shape, p.kind, start + p.offset) for n, p in places.items()}
    )
