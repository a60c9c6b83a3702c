"""Opens mutations of valid checkpoints under a memory limit; run by test_strangers.

    python strangers.py ORIGINALS WORK COUNT

ORIGINALS holds a checkpoint of each format, named after it. Prints JSON: for each format, how many
opened, how many were refused, and what went wrong otherwise.
"""

import copy
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
import zipfile
from pathlib import Path

import torch
from evil_pickles import evil

from simlab.checkpoints.checkpoint import Checkpoint
from simlab.config import ConfigError

MEMORY = 256 << 20  # more than the interpreter with torch in it has mapped
# Seconds that opening may take: of work, and of waiting (on a pipe, say), which a busy machine adds to.
LIMITS = {signal.ITIMER_PROF: 8, signal.ITIMER_REAL: 60}

NASTY = [
    0, 1, -1, 2, 3, 7, 10**9, 10**18, 2**63, 10**400, -(10**30), 0.5, -1.5, 1e308, 1e-320, True, False,
    None, "", "x", "5", "../../etc/passwd", "/etc/passwd", "a" * 5000, "\x1b[31m\n", "\0", [], {},
    [None], [[]] * 50, {"a": {"b": 1}}, float("nan"), float("inf"), [1, 2, 3], [-1], ["full_attention"],
    "default", "null", "rms", "__import__('os')", 10**4299, "\ud800.safetensors",
    "a" * 300 + ".safetensors", "\x1b[0m.safetensors",
]  # fmt: skip


def nodes(values, path=()):
    """Every place in nested objects and lists."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in list(items):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from nodes(value, (*path, key))


def mutate_object(values, rng):
    """Replace, remove, copy or add at a random place."""
    places = list(nodes(values))
    if not places:
        return
    path, nasty = rng.choice(places), copy.deepcopy(rng.choice(NASTY))
    parent = values
    for key in path[:-1]:
        parent = parent[key]
    kind, key = rng.randrange(8), path[-1]
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice([f"{key}x", str(key).upper(), "bias", "clip_qkv"])] = nasty
    elif kind == 2:
        parent[key] = copy.deepcopy(values)
    else:
        parent[key] = nasty


def mutate_json(path, rng):
    values = json.loads(path.read_text())
    for _ in range(rng.choice([1, 1, 1, 3])):
        mutate_object(values, rng)
    try:
        path.write_text(json.dumps(values))
    except (ValueError, RecursionError):  # a circle, or digits without end
        path.write_text("[" * rng.choice([10, 100_000]))


def mutate_text(path, rng):
    """Lines of a config swapped for what a YAML or JSON parser might choke on."""
    lines = path.read_text(errors="replace").splitlines() or [""]
    line = rng.randrange(len(lines))
    key = lines[line].split(":")[0]
    lines[line] = rng.choice([
        f"{key}: {rng.choice(NASTY)}", f"{key}: !!python/object/apply:os.system ['touch x']",
        f"{key}: &a [*a, *a]",
        f"{key}: *b", "<<: [*a, *a]", f"{key}: {'[' * 500}", f"{key}: {'1:' * 99}1",
        f"{key}: 2001-99-99", "%YAML 9.9", "---", "...", "\t\t", f"? {key}", f"{key}: |", f"{key}: 'x",
        f"{key}: {'9' * 5000}", f"{key}: 0x{'f' * 5000}", f"{key}: .inf", "? [a, b]\n: c",
        f"{lines[line]}\n{lines[line]}", "", f"{key}: 1e-6", f"{key}: {{a: {{b: c}}}}",
    ])  # fmt: skip
    path.write_text("\n".join(lines), errors="replace")


def mutate_bytes(path, rng):
    """Flipped bits, numbers overwritten, cuts, insertions; often where headers are."""
    data = bytearray(path.read_bytes())
    start = rng.choice([0, max(len(data) - 6000, 0), rng.randrange(len(data) + 1)])
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        if not data:
            break
        at, kind = min(start + rng.randrange(3000), len(data) - 1), rng.randrange(6)
        if kind < 3:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            number, width = (
                rng.choice([0, 1, 2**31 - 1, 2**40, 2**63 - 1, -1]),
                rng.choice([2, 4, 8]),
            )
            data[at : at + width] = (number % 256**width).to_bytes(width, "little")
        elif kind == 4:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            del data[at : at + rng.choice([1, 2, 8, 1000, len(data)])]
    path.write_bytes(data)


LIES = {  # of a safetensors header about a tensor
    "dtype": ["F32", "F16", "I64", "BOOL", "F8_E4M3", "X", 3, None],
    "shape": [[], [0], [1 << 62, 4], [-1], [1] * 60, [16, 48], "x"],
    "data_offsets": [[0, 0], [5, 1], [0, 1 << 62], [-8, 0], [0], "x", [0.5, 2]],
}


def mutate_safetensors(path, rng):
    """A header that lies, of the right length."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = rng.choice([n for n in header if n != "__metadata__"])
    what = rng.choice([*LIES, "name", "copy", "any", "any", "any"])
    if what in LIES:
        header[name][what] = rng.choice(LIES[what])
    elif what == "name":
        new = rng.choice(["x", "../x", "\x1b[0m", "", "a" * 3000, name + ".bias"])
        header[new] = header.pop(name)
    elif what == "copy":
        header[name + "2"] = dict(header[name])
    else:
        mutate_object(header, rng)
    text = json.dumps(header).encode()
    length = struct.pack("<Q", len(text) + rng.choice([0, 0, 0, 1, -1]))
    path.write_bytes(length + text + data[8 + size :])


def rezip(data, change):
    """A torch.save archive with its pickle, or its records, changed; everything else consistent."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        records = [(info.filename, old.read(info)) for info in old.filelist]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as new:
        for name, content in change(records):
            new.writestr(name, content)
    return out.getvalue()


OPCODES = b"().0NRbcdeghijlopqrstu]}\x80\x81\x85\x86\x87\x93\x94\x95QKMJX\x8c"
NAMES = [
    (b"FloatStorage", b"LongStorage\n"), (b"_rebuild_tensor_v2", b"_rebuild_tensor_v3"),
    (b"__0_0.distcp", b"../0_.distcp"), (b"__0_0.distcp", b"/etc/.distcp"),
    (b"__0_1.distcp", b"__0_0.distcp"), (b"float32", b"float64"), (b"Size", b"load"),
    (b"transformer", b"transformex"), (b"model.", b"modeX."), (b"storage", b"storagX"),
]  # fmt: skip


def mutate_pickle(data, rng, marker):
    """A byte, an opcode or a name of a pickle; or another pickle altogether."""
    if rng.random() < 0.3:  # the long ones, which take long, come once, in put_pickle
        return rng.choice([p for p in evil(marker).values() if len(p) < 50_000])
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        if not data:
            break
        at, kind = rng.randrange(len(data)), rng.randrange(5)
        if kind == 0:
            data[at] = rng.choice(OPCODES)
        elif kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data = data.replace(*rng.choice(NAMES), rng.choice([1, -1]))
        elif kind == 3:
            number = rng.choice([0, 1, 255, 0x7FFFFFFF, 0xFFFFFFFF]).to_bytes(4, "little")
            data[at : at + 4] = b"J" + number[: rng.choice([3, 4])]
        else:
            del data[at : at + rng.choice([1, 3, 200])]
    return bytes(data)


def mutate_archive(data, rng, marker):
    """The records of an archive: its pickle, a record's size, name, number or compression."""
    kind = rng.randrange(8)

    def change(records):
        index = rng.randrange(len(records))
        for i, (name, content) in enumerate(records):
            if kind < 4 and name.endswith("data.pkl"):
                content = mutate_pickle(content, rng, marker)
            elif kind == 4 and i == index:
                content = content[: rng.randrange(len(content) + 1)]
            elif kind == 5 and i == index:
                continue
            elif kind == 6 and i == index:
                name = rng.choice(["../../x", "/etc/passwd", "x", name + "\0", name.upper()])
            yield name, content
            if kind == 7 and i == index:
                yield name + "x", content

    return rezip(data, change)


def mutate_distcp(path, state, rng, marker):
    """One chunk's archive rewritten in place where it fits, else at its place with all moved."""
    data = path.read_bytes()
    starts = [
        m.start() for m in re.finditer(rb"PK\x03\x04.{26}[^/]{1,20}/data\.pkl", data, re.DOTALL)
    ]
    at = rng.randrange(len(starts))
    start, stop = starts[at], (*starts, len(data))[at + 1]
    new = mutate_archive(data[start:stop], rng, marker)
    path.write_bytes(data[:start] + new.ljust(stop - start, b"\0") + data[stop:])


def mutate_files(folder, rng):
    """A file missing, renamed, doubled, empty, a folder, a link or a pipe."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path, kind = rng.choice(files), rng.randrange(9)
    whole, other = path.read_bytes(), rng.choice(files).read_bytes()
    if kind < 4:
        path.write_bytes([b"", other, whole * 2, whole[:-1]][kind])
    elif kind == 4:
        name = rng.choice(["model.safetensors", "model.pt", "config.json", "config.yaml"])
        path.with_name(name).write_bytes(whole)
    else:
        path.unlink()
        if kind == 5:
            path.mkdir()
        elif kind == 6:
            path.symlink_to(rng.choice([path.name, "/nowhere", ".", "/dev/null"]))
        elif kind == 7:
            os.mkfifo(path)
        else:
            path.with_name("other" + path.suffix).write_bytes(whole)


def mutate(folder, rng, marker):
    """One mutation of a checkpoint folder, whatever its format."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    path = rng.choice(
        [*files, *(p for p in files if p.suffix in (".json", ".yaml") or p.name[0] == ".")]
    )
    if rng.random() < 0.12:
        return mutate_files(folder, rng)
    if path.suffix == ".json" and rng.random() < 0.85:
        return mutate_json(path, rng)
    if path.suffix == ".yaml":
        return mutate_text(path, rng)
    if path.suffix == ".safetensors" and rng.random() < 0.6:
        return mutate_safetensors(path, rng)
    if path.name == ".metadata" and rng.random() < 0.7:
        return path.write_bytes(mutate_pickle(path.read_bytes(), rng, marker)) and None
    if path.suffix in (".pt", ".bin") and rng.random() < 0.6:
        return path.write_bytes(mutate_archive(path.read_bytes(), rng, marker)) and None
    if path.suffix == ".distcp" and rng.random() < 0.5:
        return mutate_distcp(path, folder, rng, marker)
    return mutate_bytes(path, rng)


def path_of(folder):
    """What source.path is: the folder, or the GGUF file in it."""
    return str(next(folder.glob("*.gguf"), folder))


def read_all(folder):
    """Opens a checkpoint and reads every tensor in it, as stored and by our names."""
    opened = Checkpoint(path_of(folder))
    for stored in opened.opened.tensors.values():
        stored.rows(0, stored.shape[0])
    for name in opened.parts:
        for layer in range(opened.model.depth) if "{}" in name else (0,):
            ours = name.format(layer)
            stored, start, stop = opened.stored(ours)
            shape = (stop - start, *stored.shape[1:])
            value = opened.tensor(ours, shape, torch.device("cpu"), torch.float32)
            assert tuple(value.shape) == shape


def attempt(folder, what, failures):
    """True if a checkpoint opened. Failures: an error but a ConfigError of one line, a new file."""
    before = sorted(path.name for path in folder.rglob("*"))
    for timer, seconds in LIMITS.items():
        signal.setitimer(timer, seconds)
    opened = False
    try:
        read_all(folder)
        opened = True
    except ConfigError as error:
        message = str(error)
        if not message.isprintable() or len(message) > 1000:
            failures.append(f"{what}: message {message[:300]!r}")
    except BaseException:
        failures.append(f"{what}: {traceback.format_exc()[-1500:]}")
    finally:
        for timer in LIMITS:
            signal.setitimer(timer, 0)
    if sorted(path.name for path in folder.rglob("*")) != before:
        failures.append(f"{what}: files were made")
    return opened


def put_pickle(folder, data):
    """A pickle in each place of a format that has one; yields after each."""
    for path in sorted(folder.rglob("*")):
        whole = path.read_bytes() if path.is_file() else b""
        if path.name == ".metadata":
            path.write_bytes(data)
            yield path.name
        elif path.suffix in (".pt", ".bin"):
            path.write_bytes(
                rezip(whole, lambda r: ((n, data if n.endswith("data.pkl") else c) for n, c in r))
            )
            yield path.name
        path.write_bytes(whole) if path.is_file() else None


def late(signum, frame):
    raise TimeoutError("too long")


def check(kind, original, work, count):
    """Open ``count`` mutations of a checkpoint, and every evil pickle in it; what came of it."""
    marker, folder = work / "marker", work / "m"
    failures, opened = [], 0
    if not attempt(original, "the original", failures):
        failures.append("the original doesn't open")
    started, slowest = time.monotonic(), (0.0, "")
    for i in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        mutate(folder, random.Random(f"{kind} {i}"), marker)
        at = time.monotonic()
        opened += attempt(folder, f"{kind} {i}", failures)
        slowest = max(slowest, (time.monotonic() - at, f"{kind} {i}"))
    pickled = 0
    for name, data in evil(marker).items():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        for where in put_pickle(folder, data):
            pickled += 1
            if attempt(folder, f"{name} in {where}", failures):
                failures.append(f"{name} in {where}: opened")
    if marker.exists():
        failures.append("a pickle was executed")
    return {
        "opened": opened, "refused": count - opened, "pickled": pickled, "failures": failures,
        "seconds": time.monotonic() - started, "slowest": slowest,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }  # fmt: skip


def main():
    originals, work, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    for folder in originals.iterdir():
        attempt(
            folder, "the original", []
        )  # what opening imports is mapped before the limit is set
    for name in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(name, late)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    kinds = sorted(folder.name for folder in originals.iterdir())
    print(json.dumps({kind: check(kind, originals / kind, work, count) for kind in kinds}))


if __name__ == "__main__":
    main()
