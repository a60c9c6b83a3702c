"""A stranger's tokenizer.json, parsed and used in a process of its own, whose limits are low.

The tokenizers library is Rust: a file can make it panic, abort, allocate without an end or work for
ever, and none of these is an exception that a program can rely on. Here each ends a child, and is one
line.

Linux holds all three limits: memory, processor time, and time on the clock. macOS doesn't hold
the first, Windows neither of the first two.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simlab.checkpoints.untrusted.files import read_bytes
from simlab.checkpoints.untrusted.tokenizer_files import (
    ADDED,
    CONFIG,
    TOKENIZER,
    Beside,
    read_beside,
)
from simlab.config import ConfigError, printable
from simlab.config.fields import brief

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE_LIMIT = 64 << 20  # bytes; the largest of a known model, Gemma 3's, has 33 MB
# Memory and seconds that a child may take, in all, per byte of the file and per byte of the text.
# Measured with tokenizers 0.23: a vocabulary of 262,000 takes 13 bytes and 75 ns per byte of its file
# (three times the bytes where the JSON has no spaces), random words 110 bytes and 2 µs per byte.
MEMORY, MEMORY_OF_FILE, MEMORY_OF_TEXT, MOST_OF_FILE = 128 << 20, 40, 400, 1 << 30
SECONDS, SECONDS_OF_FILE, SECONDS_OF_TEXT = 1.5, 3e-7, 10e-6
BUSY = 20  # seconds on the clock for one of work, where others keep the machine busy
# Rust's libraries: no threads of their own, whose stacks would count as memory.
ENVIRONMENT = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1"}


def vocabulary_size(path: Path) -> int | None:
    """How many tokens a tokenizer.json knows; None of another file. Raises ConfigError."""
    return _ask(path, "", 0, Beside())[0] if path.name == TOKENIZER else None


@dataclass(frozen=True)
class Encoded:
    """A text's token ids, and the special ones that the tokenizer's post-processor puts around them.

    after: empty where the ids end before the text does. names: what the tokenizer calls those before
    and after, in one list.
    """

    ids: list[int]
    before: list[int]
    after: list[int]
    names: list[str]


def encode(path: Path, text: str, most: int, special: bool | None = None) -> Encoded:
    """The first ``most`` token ids of a text. Raises ConfigError.

    The same text gives the same ids, neither cut nor padded, whatever the file says: a BPE model's
    dropout, which is for training, is off. special: the user's choice about the tokens around a text;
    None: the tokenizer.json's, which the files beside it must then agree with.
    """
    if path.name != TOKENIZER:
        given = f", gguf_file={path.name!r}" if path.suffix == ".gguf" else ""
        raise ConfigError(
            f"{path}: a text needs the tokenizer, and simlab reads it from a {TOKENIZER} only; "
            f"transformers makes one: AutoTokenizer.from_pretrained(DIR{given}).save_pretrained(DIR); "
            "or inputs=random measures on random tokens"
        )
    beside = read_beside(path)
    _, encoded, does = _ask(path, text, most, beside)
    beside.check(path, does, special is None)
    return encoded


def _ask(path: Path, text: str, most: int, beside: Beside) -> tuple[int, Encoded, dict[str, bool]]:
    """The size of the vocabulary, the encoded text, and what is done to a text, from a child.

    Raises ConfigError.
    """
    file, data = read_bytes(path, FILE_LIMIT, "a tokenizer"), text.encode()
    memory = MEMORY + min(MEMORY_OF_FILE * len(file), MOST_OF_FILE) + MEMORY_OF_TEXT * len(data)
    seconds = SECONDS + SECONDS_OF_FILE * len(file) + SECONDS_OF_TEXT * len(data)
    about = {"file": len(file), "most": most, "memory": memory, "seconds": seconds}
    line = json.dumps(about | {"tokens": beside.tokens}).encode()
    search = os.pathsep.join(filter(None, sys.path))
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__],
            input=b"".join([line, b"\n", file, data]),
            capture_output=True,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": search},
            timeout=BUSY * (1 + seconds),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"{path}: the tokenizer takes longer than {error.timeout:.0f} s"
        ) from None
    lines = done.stdout.splitlines()
    complaints = done.stderr.decode(errors="replace").strip().splitlines()
    if not lines:  # the child's imports have failed: not the file's fault
        last = complaints[-1] if complaints else f"status {done.returncode}"
        raise ConfigError(f"the tokenizers library can't be used: {printable(last)[:200]}")
    if done.returncode:
        why = _reason(done.returncode, complaints, memory, seconds)
        what = "can't encode the text" if len(lines) > 1 else "not a readable tokenizer.json"
        raise ConfigError(f"{path}: {what} ({why})")
    size = int(lines[1])
    if size < 1:
        raise ConfigError(f"{path}: the tokenizer has no vocabulary")
    ids, before, after, names, does, moved = json.loads(lines[2])
    for content, index, own in moved:
        raise ConfigError(
            f"{path.parent}: {CONFIG} or {ADDED} says that {brief(content)} has the id {index}, but by "
            f"{path.name} it has {'none' if own is None else own}"
        )
    return size, Encoded(ids, before, after, [printable(name)[:30] for name in names]), does


def _reason(status: int, complaints: list[str], memory: int, seconds: float) -> str:
    """Why a child failed, from its exit status and what it wrote to stderr."""
    if any("memory allocation of" in line or "MemoryError" in line for line in complaints):
        return f"it needs more than {memory >> 20} MiB of memory"
    if sys.platform != "win32" and -status in (signal.SIGXCPU, signal.SIGKILL):
        return f"it takes longer than {seconds:.1f} s, or more memory than there is"
    if status < 0:
        return f"the tokenizers library crashes: signal {-status}"
    return printable(complaints[-1].partition(": ")[2])[:200] if complaints else f"status {status}"


def _limit(memory: int, seconds: float) -> None:
    """Set the limits of this process: further bytes of memory, further seconds of processor time.

    macOS has no limit on memory, Windows has neither.
    """
    if sys.platform == "win32":
        return
    import resource

    most = [(resource.RLIMIT_CORE, 0)]
    used = resource.getrusage(resource.RUSAGE_SELF)
    most.append((resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + seconds)))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most.append((resource.RLIMIT_AS, pages * resource.getpagesize() + memory))
    for which, limit in most:
        soft, hard = resource.getrlimit(which)
        low = [limit, *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY)]
        resource.setrlimit(which, (min(low), hard))


def main() -> None:
    """The child: a line of JSON, the file and the text come in; a line for each step done goes out.

    No exception is caught: the parent reads the last line of its traceback.
    """
    from tokenizers import Tokenizer, models

    about = json.loads(sys.stdin.buffer.readline())
    file = sys.stdin.buffer.read(about["file"])
    text = sys.stdin.buffer.read().decode()
    print("ready", flush=True)
    _limit(about["memory"], about["seconds"])
    tokenizer = Tokenizer.from_buffer(file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None
    print(tokenizer.get_vocab_size(), flush=True)
    moved = add_tokens(tokenizer, about["tokens"])
    plain = tokenizer.encode(text, add_special_tokens=False)
    ids, whole = plain.ids, tokenizer.post_process(plain).ids
    added = len(whole) - len(ids)
    before = next(n for n in range(added + 1) if whole[n : n + len(ids)] == ids)
    cut = len(ids) > about["most"]
    after = [] if cut else whole[before + len(ids) :]
    names = [tokenizer.id_to_token(i) or str(i) for i in [*whole[:before], *after]]
    does = {"add_bos_token": before > 0, "add_eos_token": added > before}
    does["add_prefix_space"] = first_letter(tokenizer) in ("Ġ", "▁", " ")
    print(json.dumps([ids[: about["most"]], whole[:before], after, names, does, moved]))


def add_tokens(
    tokenizer: Tokenizer, tokens: list[dict[str, Any]]
) -> list[tuple[str, int, int | None]]:
    """Add tokens as transformers does; return those that have another id than they should.

    One that the tokenizer has is replaced where its flags differ, unless it counts by its content.
    """
    from tokenizers import AddedToken

    have = tokenizer.get_added_tokens_decoder().values()
    contents, flags = {token.content for token in have}, {repr(token) for token in have}
    ids, more = {}, []
    for about in tokens:
        index, named = about.pop("id", None), about.pop("named", False)
        token = AddedToken(**about)
        if index is not None:
            ids[token.content] = index
        if token.content not in contents if named else repr(token) not in flags:
            more.append(token)
            contents.add(token.content)
    tokenizer.add_tokens(more)
    own = {content: tokenizer.token_to_id(content) for content in ids}
    return [
        (content, index, own[content]) for content, index in ids.items() if own[content] != index
    ]


def first_letter(tokenizer: Tokenizer) -> str:
    """The first character of ``a`` after normalizer and pre-tokenizer: ``Ġ`` of a prefix space."""
    text = tokenizer.normalizer.normalize_str("a") if tokenizer.normalizer else "a"
    if tokenizer.pre_tokenizer:
        text = "".join(piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return text[:1]


if __name__ == "__main__":
    main()
