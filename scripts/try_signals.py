"""Send SIGINT and SIGTERM to simlab's commands at random moments, and see how they end.

    python scripts/try_signals.py --kills 40 > outputs/signals.md

Each command is first timed undisturbed, then started anew in an empty folder for every signal, which
comes at a moment drawn uniformly over that time. What must hold after each:

- the exit status is 130 or 143 (or, during the first imports and after the last line of output, the
  signal itself, which a shell shows as the same numbers); 0 is a lost signal
- at most one line on stderr, and no traceback
- a run's folder is whole or gone; every result that a sweep has kept is whole; no half-written file

A process that has ended before its signal is sent doesn't count, nor does one in which Python itself is
still starting: there it prints a traceback of its own. Exit status 0 where all held, else 1.
"""

from __future__ import annotations

import argparse
import functools
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from simlab.store import PARTIAL, SUMMARY, verified

BASELINES = Path(__file__).parents[1] / "tests" / "baselines"
SMALL = ["model=small", "depth=4", "width=64", "heads=4", "d_ff=128", "device=cpu", "seeds=2"]
SWEEP = ["-m", *SMALL, "norm=pre,post", "hydra.sweep.dir=sweep"]
COMMANDS = {
    "run": ["simlab.run", *SMALL],
    "run, theory": ["simlab.run", *SMALL, "engine=theory"],
    "sweep": ["simlab.run", *SWEEP],
    "sweep, joblib": ["simlab.run", *SWEEP, "hydra/launcher=joblib"],
    "report": ["simlab.sweep", "sweep"],
    "regress": ["simlab.regress", "--list", "--baselines", str(BASELINES)],
}
SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 120.0  # seconds until a process that doesn't end is a fault


def start(name: str, folder: Path) -> subprocess.Popen[str]:
    """Start a command in a folder. Its processes are a group of their own."""
    command = [sys.executable, "-m", *COMMANDS[name]]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def prepare(name: str, folder: Path) -> None:
    """What a command needs: for a report, a sweep. Raises CalledProcessError."""
    if name == "report":
        shutil.copytree(swept().name, folder, dirs_exist_ok=True)


@functools.cache
def swept() -> tempfile.TemporaryDirectory[str]:
    """A folder with a finished sweep. Raises CalledProcessError."""
    place = tempfile.TemporaryDirectory()
    command = [sys.executable, "-m", "simlab.run", *SWEEP, "engine=theory"]
    subprocess.run(command, cwd=place.name, check=True, capture_output=True)
    return place


def half_done(folder: Path) -> Iterator[str]:
    """What a command that has ended may not leave."""
    yield from (str(path.relative_to(folder)) for path in folder.rglob(f"{PARTIAL}*"))
    for curve in [*folder.glob("outputs/2*/*/curve.csv"), *folder.glob("sweep/*/curve.csv")]:
        if not (curve.parent / SUMMARY).exists():
            yield f"{curve.relative_to(folder)} without {SUMMARY}"
    for result in folder.glob("outputs/results/*"):
        try:
            verified(result)
        except (OSError, ValueError) as error:
            yield f"{result.relative_to(folder)}: {error}"


def starting() -> float:
    """Seconds until Python has imported simlab's first lines."""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", "import simlab.signals"], check=True)
    return time.monotonic() - begun


def disturb(name: str, number: int, after: float, early: float) -> tuple[str, list[str]]:
    """Start a command, send the signal after this many seconds; its status in words, and faults.

    early: from ``starting``.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(name, folder)
        process = start(name, folder)
        time.sleep(after)
        if process.poll() is not None:
            process.communicate()
            return "had ended", []
        process.send_signal(number)
        try:
            _, said = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return "hangs", [f"hangs for {PATIENCE:g} s"]
        status = process.returncode
        faults = [f"left {what}" for what in half_done(folder)]
        if status not in (128 + number, -number):
            faults.append(f"exit status {status}")
        if after < early and "Traceback" in said:
            return "Python started", []
        if "Traceback" in said or len(said.splitlines()) > 1:
            faults.append(f"said {said!r}")
        return str(status), faults


def try_command(name: str, kills: int, rng: random.Random) -> tuple[Counter[str], list[str]]:
    """Disturb a command ``kills`` times; how often it ended how, and the faults."""
    with tempfile.TemporaryDirectory() as place:
        prepare(name, Path(place))
        begun = time.monotonic()
        process = start(name, Path(place))
        _, said = process.communicate()
        whole = time.monotonic() - begun
    if process.returncode:
        raise SystemExit(f"{name}: fails undisturbed: {said}")
    ends: Counter[str] = Counter()
    faults = []
    early = max(starting() for _ in range(3))
    for i in range(kills):
        number, after = SIGNALS[i % 2], rng.uniform(0, whole)
        end, wrong = disturb(name, number, after, early)
        ends[end] += 1
        faults += [f"{name}: {signal.Signals(number).name} after {after:.3f} s: {w}" for w in wrong]
    return ends, faults


def main(argv: Sequence[str] | None = None) -> int:
    """Try the commands, and print a table of how they ended; exit status 1 where a fault was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=40, help="signals for each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    args = parser.parse_args(argv)
    # A shell's background job begins with SIGINT ignored, and so would the commands.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rng = random.Random(args.seed)
    print("| command | signals | ended by them | exit statuses | faults |", flush=True)
    print("|---|---|---|---|---|")
    everything = []
    for name in args.only:
        ends, faults = try_command(name, args.kills, rng)
        everything += faults
        sent = args.kills - ends.pop("had ended", 0) - ends.pop("Python started", 0)
        how = ", ".join(f"{end}: {n}" for end, n in sorted(ends.items()))
        by = sum(ends[str(s)] for n in SIGNALS for s in (128 + n, -n))
        print(f"| {name} | {sent} | {by} | {how} | {len(faults)} |", flush=True)
    for fault in everything:
        print(fault, file=sys.stderr)
    return 1 if everything else 0


if __name__ == "__main__":
    sys.exit(main())
