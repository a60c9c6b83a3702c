"""Start simlab's commands under limits of every size, and see how they end. Linux only.

    python scripts/try_limits.py > outputs/limits.md

Each limit is tried at values from far too little to more than enough, then at the middle of every two
neighbours between which the exit status changes, some times over. A command ends well if

- its exit status is 0 and what it writes is there, or 2 (of a sweep whose jobs fail, 1)
- with 2 there is one line on stderr, and there is never a traceback or another's message
- no half-written file is left, and no run's or job's folder without its summary

Where Python itself doesn't start (``python -c "import simlab.signals"`` fails), a value doesn't count.
Limits that this machine or user can't set are left out, with a line on stderr: a full disk needs root,
which may mount a small tmpfs, a control group root and a writable /sys/fs/cgroup, ulimit -u anyone but
root. Exit status 0 where all ended well, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from try_signals import BASELINES, SMALL, SWEEP, half_done, prepare

PATIENCE = 300.0  # seconds until a process that doesn't end is a fault
COMMANDS = {
    "run": ["simlab.run", *SMALL],
    "run, theory": ["simlab.run", *SMALL, "engine=theory"],
    "sweep": ["simlab.run", *SWEEP],
    "report": ["simlab.sweep", "sweep"],
    "regress": ["simlab.regress", "--baselines", str(BASELINES), "theory_pre"],
}
MB, KB = 10**6, 10**3
VALUES = {
    "ulimit -v": [round(100 * MB * 80 ** (i / 11)) for i in range(12)],
    "ulimit -d": [round(20 * MB * 150 ** (i / 7)) for i in range(8)],
    "ulimit -u": [1, 2, 3, 4, 6, 8, 16],
    "ulimit -f": [0, 100, KB, 10 * KB, 100 * KB, MB],
    "ulimit -n": [3, 4, 6, 8, 16, 64],
    "full disk": [4 * KB, 16 * KB, 64 * KB, 256 * KB, 512 * KB, MB, 4 * MB],
    "pids group": [1, 4, 6, 8, 12, 32],
    "memory group": [round(20 * MB * 50 ** (i / 6)) for i in range(7)],
}
RLIMITS = {
    "ulimit -v": resource.RLIMIT_AS,
    "ulimit -d": resource.RLIMIT_DATA,
    "ulimit -u": resource.RLIMIT_NPROC,
    "ulimit -f": resource.RLIMIT_FSIZE,
    "ulimit -n": resource.RLIMIT_NOFILE,
}
CGROUP = Path("/sys/fs/cgroup")
GROUPS = {  # controller, its file in version 1 and 2
    "memory group": ("memory", "memory.limit_in_bytes", "memory.max"),
    "pids group": ("pids", "pids.max", "pids.max"),
}


@contextlib.contextmanager
def limited(limit: str, value: int, folder: Path) -> Iterator[Callable[[], None]]:
    """What a process does before it starts, to be under this limit. Raises OSError if it can't be."""
    if limit == "full disk":
        command = ["mount", "-t", "tmpfs", "-o", f"size={value}", "tmpfs", str(folder)]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            raise OSError("mount: not allowed")
        try:
            yield lambda: os.chdir(folder)
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    elif limit in GROUPS:
        controller, v1, v2 = GROUPS[limit]
        one = (CGROUP / "cgroup.controllers").exists()  # version 2 has one tree
        group = (CGROUP if one else CGROUP / controller) / f"simlab-{os.getpid()}"
        group.mkdir()
        try:
            (group / (v2 if one else v1)).write_text(str(value))

            def enter() -> None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

            yield enter
        finally:
            group.rmdir()
    elif limit == "ulimit -u" and os.getuid() == 0:
        raise OSError("doesn't bind root")
    else:
        yield lambda: resource.setrlimit(RLIMITS[limit], (value, value))


def starts(before: Callable[[], None]) -> bool:
    """True if Python itself starts under this limit."""
    command = [sys.executable, "-c", "import simlab.signals"]
    with contextlib.suppress(subprocess.SubprocessError, OSError):
        return not subprocess.run(
            command, preexec_fn=before, check=False, capture_output=True, timeout=PATIENCE
        ).returncode
    return False


def try_once(name: str, limit: str, value: int) -> tuple[int | None, str]:
    """A command's exit status under a limit (None: Python doesn't start), and what is wrong with it."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        folder.chmod(0o777)
        with limited(limit, value, folder) as before:
            if not starts(before):
                return None, ""
            if limit != "full disk":
                prepare(name, folder)
            command = [sys.executable, "-m", *COMMANDS[name]]
            try:
                done = subprocess.run(
                    command, cwd=folder, preexec_fn=before, check=False, capture_output=True,
                    text=True, timeout=PATIENCE,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return -1, f"hangs for {PATIENCE:g} s"
            wrong = [f"left {what}" for what in half_done(folder)]
    lines = done.stderr.splitlines()
    if done.returncode not in (0, 2) and not (done.returncode == 1 and name == "sweep"):
        wrong.append(f"exit status {done.returncode}")
    if (len(lines) != 1) if done.returncode == 2 else bool(lines):
        wrong.append(f"said {done.stderr[-600:]!r}")
    return done.returncode, "; ".join(wrong)


def try_limit(name: str, limit: str, halvings: int) -> tuple[Counter[str], list[str]]:
    """Try a command at all values of a limit; how often it ended how, and the faults."""
    found: dict[int, int | None] = {}
    ends: Counter[str] = Counter()
    faults = []
    todo = list(VALUES[limit])
    for _ in range(halvings + 1):
        for value in todo:
            found[value], wrong = try_once(name, limit, value)
            ends[str(found[value])] += 1
            print(f"{name}, {limit} {value}: {found[value]} {wrong}", file=sys.stderr, flush=True)
            if wrong:
                faults.append(f"{name}: {limit} {value}: {wrong}")
        tried = sorted(found)
        pairs = itertools.pairwise(tried)
        todo = [(a + b) // 2 for a, b in pairs if found[a] != found[b] and b - a > 1]
    return ends, faults


def main(argv: Sequence[str] | None = None) -> int:
    """Try the commands, and print a table of how they ended; exit status 1 where one ended badly."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--halvings", type=int, default=3, help="between values that end otherwise")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--limits", nargs="+", choices=VALUES, default=list(VALUES))
    args = parser.parse_args(argv)
    print("| limit | command | tried | ended well | exit statuses |", flush=True)
    print("|---|---|---|---|---|")
    everything = []
    for limit in args.limits:
        for name in args.only:
            try:
                ends, faults = try_limit(name, limit, args.halvings)
            except OSError as error:
                print(f"{limit}: {error}", file=sys.stderr)
                break
            everything += faults
            count = sum(ends.values()) - ends.pop("None", 0)
            how = ", ".join(f"{end}: {n}" for end, n in sorted(ends.items()))
            print(f"| {limit} | {name} | {count} | {count - len(faults)} | {how} |", flush=True)
    return 1 if everything else 0


if __name__ == "__main__":
    sys.exit(main())
