"""The one progress bar of a run or a sweep; where stderr is no terminal, a line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

EVERY = 30.0  # seconds between two lines where there is no terminal
_LOOK_SECONDS = 0.5  # seconds between two looks at what other processes have finished


@contextmanager
def block_bar(total: int) -> Iterator[Callable[[], None]]:
    """A bar over a run's blocks on stderr, gone when done; yields what to call after each block.

    Where stderr is no terminal, a line now and then.
    """
    console = Console(stderr=True)
    if not sys.stderr.isatty():  # rich's is_terminal goes by FORCE_COLOR, which Jupyter sets
        yield _now_and_then(total)
        return
    columns = (TextColumn("blocks"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("blocks", total=total)
        yield lambda: bar.advance(task)


def _now_and_then(total: int) -> Callable[[], None]:
    """Where there is no terminal: a line after every EVERY seconds, none of a short run."""
    done, printed = 0, time.monotonic()

    def advance() -> None:
        nonlocal done, printed
        done += 1
        if time.monotonic() - printed > EVERY:
            printed = time.monotonic()
            print(f"simlab: {done} of {total} blocks", file=sys.stderr, flush=True)

    return advance


class SweepBar:
    """A sweep's bar: how many jobs have ended, and by their blocks how far it is."""

    def __init__(self, jobs: int, total: int, bar: Progress | None) -> None:
        self.jobs, self.total, self.bar = jobs, total, bar
        self.ended = self.done = 0
        self.printed = time.monotonic()
        self.task: TaskID | None = bar.add_task(self._text(), total=total) if bar else None

    def _text(self) -> str:
        return f"{self.ended} of {self.jobs} jobs"

    def block(self) -> None:
        """A block is done."""
        self.done += 1
        if self.bar and self.task is not None:
            self.bar.advance(self.task)

    def reached(self, ended: int, blocks: int) -> None:
        """Show that ``ended`` jobs have ended, which together have ``blocks`` blocks."""
        self.ended, self.done = ended, max(self.done, blocks)
        if self.bar and self.task is not None:
            self.bar.update(self.task, description=self._text(), completed=self.done)
        elif not self.bar and time.monotonic() - self.printed > EVERY:
            self.printed = time.monotonic()
            print(f"simlab: {self._text()} done", file=sys.stderr, flush=True)


@contextmanager
def sweep(
    jobs: int, blocks: int, look: Callable[[], list[int]] | None = None
) -> Iterator[SweepBar]:
    """A bar over a sweep's jobs, gone when done.

    look: for jobs in other processes, the blocks of those that have ended; asked now and then.
    """
    console = Console(stderr=True)
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with (
            Progress(*columns, console=console, transient=True) as bar,
            _watched(SweepBar(jobs, blocks, bar), look) as shown,
        ):
            yield shown
        return
    with _watched(SweepBar(jobs, blocks, None), look) as shown:
        yield shown


@contextmanager
def _watched(shown: SweepBar, look: Callable[[], list[int]] | None) -> Iterator[SweepBar]:
    if look is None:
        yield shown
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_SECONDS):
            ended = look()
            shown.reached(len(ended), sum(ended))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield shown
    finally:
        over.set()
        thread.join()
