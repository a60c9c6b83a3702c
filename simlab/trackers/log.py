"""Logs finished runs to the trackers that ``logger`` names. None of them can cost a run its results."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from simlab import signals
from simlab.report import style
from simlab.results import Result
from simlab.store import write_text
from simlab.trackers.record import record_of
from simlab.trackers.sinks import TRACKERS


def log_runs(
    loggers: Sequence[str],
    runs: Iterable[tuple[str, Result, Path]],
    folder: Path,
    sweep: bool = False,
) -> bool:
    """Log runs, each with its name and its folder, and say where they are, in a line per tracker.

    folder: of the run, or of the sweep whose jobs they are. A tracker that fails is told in one line on
    stderr, and gets no further run. Gives True if none has failed.
    """
    left = list(loggers)
    for name, run, place in runs:
        if not left:
            break
        with tempfile.TemporaryDirectory() as aside:
            files = _files(run, place, Path(aside))
            entry = record_of(name, run, place, folder if sweep else None, *files)
            for logger in list(left):
                try:
                    TRACKERS[logger].write(entry)
                except Exception as error:  # of whatever class: each library has its own
                    signals.raise_noted()
                    left.remove(logger)
                    why = " ".join(str(error).split())
                    print(
                        f"simlab: logger={logger}: {type(error).__name__}: {why[:300]}; the results "
                        f"are kept in {place}",
                        file=sys.stderr,
                    )
    for logger in left:
        print(TRACKERS[logger].found(folder))
    return len(left) == len(loggers)


def _files(run: Result, place: Path, aside: Path) -> tuple[Path, Path]:
    """growth.png and report.html: the run's own, or made in ``aside``, as for a sweep's job."""
    figure, page = place / "growth.png", place / "report.html"
    if not figure.is_file():
        figure = style.save(run.figure(), aside, "growth")[0]
    if not page.is_file():
        page = aside / "report.html"
        write_text(page, run.page())
    return figure, page
