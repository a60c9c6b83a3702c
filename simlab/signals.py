"""Handlers of SIGINT, SIGTERM and closed pipes for the commands. No signal is lost, wherever it comes.

Python raises an exception wherever the main thread is, and what runs there may swallow it: packages
while they are imported, ``__del__``, callbacks of C code. So a signal is also noted, ``raise_noted``
raises it again, and the exit status is the first signal's: 130 after SIGINT, 143 after SIGTERM.

Imports nothing that takes time: the handlers must be there before anything else is imported.
"""

from __future__ import annotations

import io
import signal
import sys
import time

TYPE_CHECKING = False  # as in simlab/__init__.py
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

RECEIVED: list[int] = []  # the signals that this process has had
_UNWRITTEN: list[OSError] = []  # why output was lost
_AGAIN = 1.0  # seconds; within them a further signal is the same one (GNU timeout sends each twice)
_last = 0.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_at_once() -> None:
    """Let signals end the process, without a word: where nothing is half-done, as during imports."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _receive(number: int, _: object) -> None:
    global _last
    first = not RECEIVED or time.monotonic() - _last > _AGAIN
    _last = time.monotonic()
    RECEIVED.append(number)
    if first:
        raise KeyboardInterrupt


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """What a callback swallows, as of a weak reference, isn't printed: the signal is noted."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def raise_noted() -> None:
    """Raise KeyboardInterrupt if a signal has come: the first one may have been swallowed."""
    if RECEIVED:
        raise KeyboardInterrupt


def status() -> int:
    """The exit status of a command that a signal has ended."""
    return 128 + (RECEIVED[0] if RECEIVED else signal.SIGINT)


def run_command(work: Callable[[], object], kept: str) -> None:
    """Do a command's work. Raises SystemExit after a signal, whatever the work has made of it.

    kept: what is then said of the work's results.
    """
    RECEIVED.clear()
    _UNWRITTEN.clear()
    for number in _SIGNALS:
        signal.signal(number, _receive)
    hook, sys.unraisablehook = sys.unraisablehook, _unraisable
    for name in ("stdout", "stderr"):
        setattr(sys, name, _until_closed(getattr(sys, name)))
    try:
        work()
        if RECEIVED:
            _end("interrupted when all was done")
    except SystemExit as end:
        if not RECEIVED or end.code == status():  # the work has told it
            raise
        _end(f"interrupted; {kept}")
    except (KeyboardInterrupt, Exception) as error:
        if not isinstance(error, KeyboardInterrupt) and not RECEIVED:
            raise
        _end(f"interrupted; {kept}")
    finally:
        end_at_once()
        sys.unraisablehook = hook
        # A KeyboardInterrupt that passes an exec of a text, as where a dataclass is made, leaves a
        # mark: Python then ends as if by SIGINT, whatever the exit status. Another exec removes it
        # (run_eval_code_obj in CPython's Python/pythonrun.c).
        exec("")
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        if _UNWRITTEN:
            _tell_unwritten(sys.exception())


def _tell_unwritten(end: BaseException | None) -> None:
    """Raise SystemExit where all went well but for the output; end: what else ends the command."""
    status = end.code if isinstance(end, SystemExit) else 0 if end is None else 2
    if status in (None, 0, 1):  # else another line has been written
        why = _UNWRITTEN[0].strerror
        print(f"simlab: the output is incomplete: {why}; results are kept", file=sys.stderr)
        raise SystemExit(status or 2) from None


def _end(line: str) -> None:
    print(f"simlab: {line}", file=sys.stderr)
    raise SystemExit(status()) from None


class _UntilClosed(io.FileIO):
    """Drops what is written once the reader has gone, as ``| head`` does: the run goes on.

    It goes on, too, where the disk of a file is full, which ``run_command`` then tells.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                _UNWRITTEN.append(error)
            return len(memoryview(data).cast("B"))


def _until_closed(stream: Any) -> Any:
    """The process's stdout or stderr, such that no reader and no character is an error.

    A terminal without √ gets a question mark. Any other stream, of a program that calls a command, is
    left as it is.
    """
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    if not isinstance(getattr(stream.buffer, "raw", stream.buffer), io.FileIO):
        stream.reconfigure(errors="replace")
        return stream
    raw = _UntilClosed(stream.fileno(), "w", closefd=False)
    lines = stream.line_buffering or stream.write_through  # PYTHONUNBUFFERED
    return io.TextIOWrapper(
        io.BufferedWriter(raw), stream.encoding, "replace", line_buffering=lines
    )
