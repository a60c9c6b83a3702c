"""Give simlab hostile files, thousands of them, and see how it ends.

    python scripts/try_hostile.py --count 200 > outputs/hostile.md

It needs simlab[test]. Each class of inputs has a process of its own, which measures one small file
after another as ``python -m simlab.run`` would, without writing results. An input is answered well if

- the run ends with exit status 0, or with 2 and one line on stderr: no traceback, no signal
- it makes no file beside the checkpoint, and executes nothing of it
- it takes at most 20 s of work

The classes: mutations of a checkpoint in each layout (bytes, JSON, YAML, zips, pickles, names, links,
pipes), pickles that mean harm, tokenizers, texts, and files that are cut, grown, overwritten or
replaced while they are read. ``largest`` are the small files that cost most among those that are let in
(``tests/checkpoints/largest.py``), and longer ones: these must end within 2 s and 300 MiB (a
distributed checkpoint's .metadata within 10 s and 350 MiB: OLMo 32B's real one takes 5 s and 250).
Prints a table; exit status 0 where all were answered well, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

TESTS = Path(__file__).parents[1] / "tests"
LAYOUTS = ("hugging_face", "sharded", "olmo_core", "legacy_pt", "legacy_safetensors", "gguf")
CLASSES = (*LAYOUTS, "pickle", "tokenizer", "text", "changing", "largest")
PATIENCE = 20.0  # seconds of work
MOST = {"largest": (2.0, 300), ".metadata": (10.0, 350)}  # seconds, MiB
WORDS = "The capital of France is Paris. Größe: 3 µm.\n" * 20
Input = tuple[str, list[str], Callable[[], Any]]  # what it is, overrides, what happens meanwhile


def nothing() -> None:
    """What happens during most runs."""


def originals(top: Path, layouts: Iterable[str]) -> None:
    """A small checkpoint in each of these layouts, and one that knows all bytes."""
    from conftest import write_olmo
    from test_strangers import write

    if "olmo_core" in layouts:
        from write_olmo_core import write as write_olmo_core

        (top / "written" / "olmo3").mkdir(parents=True)
        write_olmo_core(top / "written" / "olmo3", "olmo3")
    for kind in layouts:
        write(kind, top / kind, top / f"scratch-{kind}", top / "written")
    write_olmo(top / "bytes", vocab_size=300)


def tokenizers() -> list[dict[str, Any]]:
    """A tokenizer.json of each model, as transformers' tokenizers have them."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = sorted(set(WORDS.split()) | set(WORDS))
    vocab = {word: i for i, word in enumerate(["<unk>", *words])}
    made = [
        Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], byte_fallback=True)),
        Tokenizer(models.Unigram([("<unk>", 0.0), *((w, -1.0) for w in words)], 0)),
        Tokenizer(models.WordPiece(vocab, unk_token="<unk>")),
        Tokenizer(models.WordLevel(vocab, unk_token="<unk>")),
    ]
    for tokenizer in made:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("▁", "isolated"), pre_tokenizers.Digits()]
        )
        tokenizer.post_processor = processors.ByteLevel()
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<s>"])
    return [json.loads(tokenizer.to_str()) for tokenizer in made]


def inputs(kind: str, start: int, count: int, folder: Path, original: Path) -> Iterator[Input]:
    """The inputs of a class from number ``start`` on, each in ``folder``, a copy of a checkpoint."""
    import strangers
    from evil_pickles import evil

    marker = folder.parent / "marker"
    if kind == "pickle":
        whole = pickles(folder, evil(marker))
        yield from itertools.islice(whole, start, None)
        return
    if kind == "largest":
        yield from itertools.islice(large(folder), start, None)
        return
    bases = tokenizers() if kind == "tokenizer" else []
    for i in range(start, count):
        fresh(folder, original)
        rng = random.Random(f"{kind} {i}")
        overrides: list[str] = []
        during = nothing
        if kind in LAYOUTS:
            strangers.mutate(folder, rng, marker)
        elif kind == "tokenizer":
            hostile_tokenizer(folder / "tokenizer.json", bases, rng)
            (folder.parent / "text").write_text(WORDS)
            overrides = ["inputs=text", f"inputs.path={folder.parent / 'text'}"]
        elif kind == "text":
            (folder.parent / "text").write_bytes(hostile_text(rng))
            overrides = ["inputs=text", f"inputs.path={folder.parent / 'text'}"]
        else:
            during = change(folder / "model.safetensors", rng)
        yield f"{kind} {i}", overrides, during


def pickles(folder: Path, evil: dict[str, bytes]) -> Iterator[Input]:
    """Pickles that mean harm, in each place of a checkpoint that has one."""
    from strangers import put_pickle

    for layout in ("olmo_core", "legacy_pt"):
        fresh(folder, folder.parent / layout)
        for name, data in evil.items():
            for where in put_pickle(folder, data):
                yield f"{name} in {where}", [], nothing


def hostile_tokenizer(path: Path, bases: list[dict[str, Any]], rng: random.Random) -> None:
    """A mutated tokenizer.json, or one with rules that multiply the text."""
    import strangers

    path.write_text(json.dumps(rng.choice(bases)))
    if rng.random() < 0.1:
        values = json.loads(path.read_text())
        rule = {
            "type": "Replace",
            "pattern": {"String": "a"},
            "content": "a" * rng.choice([2, 100]),
        }
        values["normalizer"] = {"type": "Sequence", "normalizers": [rule] * rng.choice([6, 300])}
        path.write_text(json.dumps(values))
    elif rng.random() < 0.85:
        strangers.mutate_json(path, rng)
    else:
        strangers.mutate_bytes(path, rng)


def hostile_text(rng: random.Random) -> bytes:
    """Text in some encoding, cut or not; or any bytes."""
    encodings = [
        "utf-8",
        "utf-8-sig",
        "utf-16",
        "utf-16-be",
        "utf-32",
        "latin-1",
        "utf-7",
        "cp1140",
    ]
    data = WORDS.encode(rng.choice(encodings), errors="replace")
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randbytes(rng.choice([0, 1, 100, 5000]))
    if kind == 1:
        at = rng.randrange(len(data))
        data = data[:at] + rng.randbytes(rng.randrange(4)) + data[at:]
    return data[: rng.randrange(len(data))] if kind == 2 else data


def change(path: Path, rng: random.Random) -> Callable[[], None]:
    """What changes a file some time after it was opened."""
    kind, size = rng.randrange(5), path.stat().st_size

    def now() -> None:
        if kind < 2:
            os.truncate(path, rng.choice([0, 8, size // 2, size - 1, size + 1, 2 * size]))
        elif kind == 2:
            with path.open("r+b") as file:
                file.seek(rng.randrange(size))
                file.write(rng.randbytes(100))
        elif kind == 3:
            path.with_name("new").write_bytes(rng.randbytes(rng.choice([0, 8, size])))
            os.replace(path.with_name("new"), path)
        else:
            path.unlink()

    return now


def large(folder: Path) -> Iterator[Input]:
    """The small files that cost most among those that are let in, and longer ones."""
    from largest import largest

    for layout, name, what, data in largest(folder.parent):
        fresh(folder, folder.parent / layout)
        (folder / name).write_bytes(data)
        label = f"{name}: {what}, {len(data) / 1e6:.1f} MB"
        del data
        yield label, [], nothing


def fresh(folder: Path, original: Path) -> None:
    """A copy of a checkpoint in place of the last one."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)


def attempt(folder: Path, overrides: list[str], during: Callable[[], Any], moment: int) -> str:
    """Measure a checkpoint; how it ended: "0", "2", or what is wrong.

    during: called before the read of that number, which no run may see as anything but a line.
    """
    from strangers import path_of

    from simlab import compose, experiment
    from simlab.checkpoints.storage import StoredFile
    from simlab.config.cli_errors import in_one_line

    given = ["source=checkpoint", f"source.path={path_of(folder)}", "seeds=0", "device=cpu"]
    given += overrides or ["inputs.batch=1", "inputs.length=4"]
    out, reads, original = io.StringIO(), 0, StoredFile.read_into

    def read_into(file: StoredFile, view: memoryview, offset: int) -> None:
        nonlocal reads
        reads += 1
        if reads == moment:
            during()
        original(file, view, offset)

    before = sorted(path.name for path in folder.rglob("*"))
    try:
        with (
            mock.patch.object(StoredFile, "read_into", read_into),
            contextlib.redirect_stderr(out),
            contextlib.redirect_stdout(out),
            in_one_line(),
        ):
            experiment.run(compose(given))
        ended = "0"
    except SystemExit as error:
        ended = str(error.code)
    except BaseException as error:  # any, a Rust panic too, is what the script looks for
        return f"{type(error).__name__}: {error}"[:300]
    lines = out.getvalue().splitlines()
    if ended == "2" and not (len(lines) == 1 and lines[0].startswith("simlab: ")):
        return f"not one line: {out.getvalue()[:300]!r}"
    if during is nothing and sorted(path.name for path in folder.rglob("*")) != before:
        return "files were made"
    return ended


def work() -> float:
    """Seconds that this process and its children have computed."""
    return sum(os.times()[:4])


def reset_memory() -> None:
    """Forget the most memory that this process has had, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory() -> float:
    """The most memory that this process has had since the last reset, in MiB; 0 if unknown."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    return 0.0


def child(kind: str, start: int, count: int, top: Path) -> None:
    """Try a class's inputs from ``start`` on, and print a line of JSON after each."""
    others = {"pickle": "olmo_core", "tokenizer": "bytes", "text": "bytes"}
    layout = kind if kind in LAYOUTS else others.get(kind, "hugging_face")
    folder = top / "m"
    fresh(folder, top / layout)
    attempt(folder, [], nothing, 0)  # imports aren't an input's time and memory
    reset_memory()
    imports = memory()  # not what there is before each input: what the last one left counts too
    numbers = random.Random(f"{kind} {start}")
    for what, overrides, during in inputs(kind, start, count, folder, top / layout):
        reset_memory()
        at = work()
        ended = attempt(folder, overrides, during, numbers.randrange(2, 30))
        if (top / "marker").exists():
            ended = "code of the file was executed"
        taken, grown = work() - at, memory() - imports
        print(json.dumps([what, ended, taken, grown]), flush=True)


def tried(kind: str, count: int, top: Path) -> list[tuple[str, str, float, float]]:
    """All inputs of a class: what, how it ended, seconds of work, MiB more than before."""
    rows: list[tuple[str, str, float, float]] = []
    while True:
        command = [sys.executable, __file__, "--child", kind, str(len(rows)), str(count), str(top)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        rows += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
        if not done.returncode:
            return [(w, judged(w, kind, end, t, size), t, size) for w, end, t, size in rows]
        rows.append(
            (f"{kind} {len(rows)}", f"died: {done.returncode} {done.stderr[-300:]}", 0.0, 0.0)
        )


def judged(what: str, kind: str, ended: str, seconds: float, grown: float) -> str:
    """How an input ended, or that it took too much."""
    limit = MOST[".metadata"] if ".metadata" in what else MOST.get(kind, (PATIENCE, 1e9))
    if ended in ("0", "2") and (seconds > limit[0] or grown > limit[1]):
        return f"it took {seconds:.1f} s and {grown:.0f} MiB"
    return ended


def main(args: list[str] | None = None) -> int:
    """Parse the command line, try, print a table; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, help="inputs per class")
    parser.add_argument("--only", nargs="*", choices=CLASSES, default=CLASSES)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args(args)
    sys.path[:0] = [str(TESTS), str(TESTS / "checkpoints")]
    if given.child:
        kind, start, count, top = given.child
        child(kind, int(start), int(count), Path(top))
        return 0
    wrong: list[str] = []
    print("| class | inputs | answered well | ended with 0 | most work | most memory |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        top = Path(name).resolve()
        with contextlib.redirect_stdout(io.StringIO()):
            few = {"tokenizer", "text", "changing", *LAYOUTS[:2]}.issuperset(given.only)
            originals(top, LAYOUTS[:2] if few else LAYOUTS)
        for kind in given.only:
            rows = tried(kind, given.count, top)
            bad = [(what, ended) for what, ended, *_ in rows if ended not in ("0", "2")]
            zero = sum(ended == "0" for _, ended, *_ in rows)
            seconds, most = (max((row[i] for row in rows), default=0.0) for i in (2, 3))
            print(
                f"| {kind} | {len(rows)} | {len(rows) - len(bad)} | {zero} "
                f"| {seconds:.1f} s | {most:.0f} MiB |", flush=True,
            )  # fmt: skip
            wrong += [f"{what}: {ended}" for what, ended in bad]
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
