"""Token batches: uniformly random ids, Zipf-distributed ids, or text."""

from __future__ import annotations

import codecs
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simlab.checkpoints.untrusted.tokenizer import encode, vocabulary_size
from simlab.config import ConfigError, InputsConfig, nearest

TEXT_BATCH, TEXT_LENGTH = 4, 256  # of inputs=text where the user gives none
_MARKS = {  # the first that fits: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
BYTES_PER_TOKEN = 64  # bytes of a file that are read per token asked for: tokens are shorter

Ids = NDArray[np.int64]  # (batch, length)


@dataclass(frozen=True)
class Tokens:
    """A token batch, and which special tokens are put around a text: ``<bos> first``, or nothing.

    unit: what an id is, ``tokens``, or ``bytes`` for text without a tokenizer.
    """

    ids: Ids
    special: str = ""
    unit: str = "tokens"


def make_tokens(inputs: InputsConfig, vocab_size: int, seed: int, tokenizer: Path | None) -> Ids:
    """The ids of ``token_batch``, (batch, length) int64."""
    return token_batch(inputs, vocab_size, seed, tokenizer).ids


def token_batch(inputs: InputsConfig, vocab_size: int, seed: int, tokenizer: Path | None) -> Tokens:
    """The token batch, (batch, length) int64, the same for every curve of a run.

    vocab_size: ids are below it. seed: draws random and Zipf ids. tokenizer: a tokenizer.json,
    whose vocabulary also bounds random ids (embedding matrices often have unused rows at their end), or
    another tokenizer's file. Raises ConfigError for a text that is missing or doesn't fill the batch,
    and for one with a tokenizer that simlab doesn't read.
    """
    if inputs.kind == "text":
        return _text(inputs, vocab_size, tokenizer)
    assert inputs.batch is not None
    assert inputs.length is not None
    if tokenizer is not None:
        vocab_size = min(vocab_size, vocabulary_size(tokenizer) or vocab_size)
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    shape = (inputs.batch, inputs.length)
    if inputs.kind == "random":
        return Tokens(generator.integers(vocab_size, size=shape))
    assert inputs.exponent is not None
    weights = np.arange(1, vocab_size + 1, dtype=np.float64) ** -inputs.exponent
    return Tokens(generator.choice(vocab_size, size=shape, p=weights / weights.sum()))


def _text(inputs: InputsConfig, vocab_size: int, tokenizer: Path | None) -> Tokens:
    batch, length = inputs.batch or TEXT_BATCH, inputs.length or TEXT_LENGTH
    data = _bytes(inputs, BYTES_PER_TOKEN * batch * length)
    before, after, names = list[int](), list[int](), list[str]()
    if tokenizer is None:
        ids, unit = list(data[: batch * length]), "bytes"
    else:
        text = codecs.getincrementaldecoder("utf-8")().decode(data)  # the last letter may be cut
        encoded = encode(tokenizer, text, batch * length, inputs.special_tokens)
        unit = "tokens"
        ids = encoded.ids
        if inputs.special_tokens is not False:
            before, after, names = encoded.before, encoded.after, encoded.names
            ids = ids + after
    if inputs.special_tokens and not before:
        why = f"{tokenizer} puts none before a text" if tokenizer else "there is no tokenizer.json"
        raise ConfigError(f"inputs.special_tokens=true: {why}")
    if not ids:
        why = f"{tokenizer}: the tokenizer makes no tokens of it" if data else "the text is empty"
        raise ConfigError(f"inputs=text: {why}")
    # Every sequence is a text of its own to the model: each begins as the tokenizer begins a text.
    if length <= len(before):
        raise ConfigError(
            f"inputs.length={length}: the tokenizer's own {len(before)} tokens before a text "
            "leave no room; inputs.special_tokens=false leaves them out"
        )
    size = length - len(before)
    if inputs.length is None:
        size = min(size, len(ids) // (inputs.batch or 1))
    if inputs.batch is None:
        batch = min(batch, len(ids) // max(size, 1))
    if not 0 < batch * size <= len(ids):
        asked = {"inputs.batch": inputs.batch, "inputs.length": inputs.length}
        given = " ".join(f"{key}={value}" for key, value in asked.items() if value is not None)
        raise ConfigError(f"{given}: the text has only {len(ids)} {unit}")
    ends = after if batch * size == len(ids) else []  # else the text is cut before its end
    ids = ids[: batch * size]
    if max(ids + before) >= vocab_size:
        raise ConfigError(
            f"vocab_size={vocab_size}: the text has the id {max(ids + before)}; ids must be below "
            "vocab_size"
        )
    sequences = np.array(ids, np.int64).reshape(batch, size)
    whole = np.hstack([np.tile(np.array(before, np.int64), (batch, 1)), sequences])
    first, last = names[: len(before)], names[len(before) :] if ends else []
    told = [
        f"{' '.join(part)} {where}" for part, where in ((first, "first"), (last, "last")) if part
    ]
    return Tokens(whole, " and ".join(told), unit)


def _bytes(inputs: InputsConfig, most: int) -> bytes:
    """The prompt's or the file's first bytes, which are UTF-8 but for a letter that is cut at the end.

    A byte order mark is left out. Raises ConfigError for text in another encoding.
    """
    if inputs.prompt is not None:
        return inputs.prompt.encode()
    assert inputs.path is not None
    path = Path(os.path.expanduser(inputs.path))
    if path.exists() and not path.is_file():
        raise ConfigError(f"inputs.path={inputs.path}: not a file")
    try:
        with path.open("rb") as file:
            data = file.read(most)
            whole = not file.read(1)
    except OSError as error:
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        hint = nearest(path.name, (entry.name for entry in beside if entry.is_file()))
        raise ConfigError(f"inputs.path={inputs.path}: {error.strerror}{hint}") from error
    save = "not UTF-8 text; convert it to UTF-8, or give another file"
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            raise ConfigError(f"inputs.path={inputs.path}: {encoding}, {save}")
    if 0 in data:
        raise ConfigError(f"inputs.path={inputs.path}: byte {data.index(0)} is 0: {save}")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data, whole)
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is 0x{data[error.start]:02x}"
        raise ConfigError(f"inputs.path={inputs.path}: {where}: {save}") from error
    return data
