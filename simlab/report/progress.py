"""The one progress bar of a run or a sweep; where stderr is no terminal, a line now and then."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

# An environment variable: how a process asks another for more lines, or for none.
_EVERY = "SIMLAB_PROGRESS_EVERY"
EVERY = float(os.environ.get(_EVERY, 30))  # seconds between two lines where there is no terminal
DELAY = 1.0  # seconds until a notebook shows a run's bar: a short run needs none
_JOBS_DONE = re.compile(r"simlab: (\d+) of (\d+) jobs done")
_LOOK_SECONDS = 0.5  # seconds between two looks at what other processes have finished


@contextmanager
def block_bar(total: int) -> Iterator[Callable[[], None]]:
    """A bar over a run's blocks on stderr, gone when done; yields what to call after each block.

    Where stderr is no terminal, a line now and then; a notebook has a bar.
    """
    console = Console(stderr=True)
    if console.is_jupyter:
        with _notebook_bar("blocks", total, DELAY) as shown:
            yield lambda: shown.update()
        return
    if not sys.stderr.isatty():  # rich's is_terminal goes by FORCE_COLOR, which Jupyter sets
        yield _now_and_then(total)
        return
    columns = (TextColumn("blocks"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("blocks", total=total)
        yield lambda: bar.advance(task)


def _notebook_bar(what: str, total: int, delay: float = 0) -> Any:
    """tqdm's: a widget where ipywidgets is installed, and else a line of text, as in a terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its advice to install ipywidgets
        from tqdm.auto import tqdm
    return tqdm(total=total, desc=what, leave=False, delay=delay)


@contextmanager
def of_process() -> Iterator[tuple[dict[str, str], Callable[[str], bool]]]:
    """For a sweep in a process of its own: its environment, and what shows a line that it says.

    That gives False for a line that is not about progress. In a terminal and in a notebook it draws
    a bar of jobs.
    """
    drawn = sys.stderr.isatty() or Console(stderr=True).is_jupyter
    bar = None

    def show(line: str) -> bool:
        nonlocal bar
        said = _JOBS_DONE.fullmatch(line)
        if said is None:
            return False
        if drawn:
            bar = bar or _notebook_bar("jobs", int(said[2]))
            bar.n = int(said[1])
            bar.refresh()
        else:
            print(line, file=sys.stderr, flush=True)
        return True

    try:
        yield {**os.environ, **({_EVERY: "0.5"} if drawn else {})}, show
    finally:
        if bar is not None:
            bar.close()


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
        self.reached(self.ended, self.done + 1)

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
