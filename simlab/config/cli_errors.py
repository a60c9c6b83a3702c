"""Shows a user's mistakes as one line on stderr, with exit status 2."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from simlab import signals
from simlab.config import CONF_DIR, FROM_CHECKPOINT, ConfigError, nearest, printable
from simlab.config.choices import chosen, keys_of
from simlab.config.command_line import MULTIRUN, OTHER_KEYS, how_to_write, needs_multirun
from simlab.config.keys import known_keys
from simlab.config.names import nearest_key
from simlab.config.validate import options

# What a user, a file (also of -cd DIR) or the machine (a full disk, a folder that can't be made) can
# get wrong.
MISTAKES = (ConfigError, HydraException, OmegaConfBaseException, yaml.YAMLError, OSError)

# What torch, the loader of shared libraries, C++ and threads say, each in a class of its own.
OUT = re.compile(
    r"can.?t allocate memory|bad_alloc|out of memory|failed to map segment|can't start new thread"
    r"|failed to launch worker thread",
    re.I,
)


def fail(message: str) -> NoReturn:
    """One line on stderr, without control codes and not endless, and exit status 2.

    Raises KeyboardInterrupt where a signal has come: it may be what went wrong.
    """
    signals.raise_noted()
    line = printable(" ".join(part.strip() for part in message.splitlines()))
    line = f"simlab: {line if len(line) < 1000 else line[:1000] + '…'}"
    # A terminal would cut words; but what is in quotes may be copied, and must stay whole.
    if sys.stderr.isatty() and not re.search(r"[\"']", line):
        width = shutil.get_terminal_size().columns
        line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
    print(line, file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def in_one_line(overrides: Sequence[str] = ()) -> Iterator[None]:
    """Let a mistake end the process with one line. overrides: the user's Hydra overrides."""
    try:
        yield
    except MISTAKES as error:
        fail(explain(error, overrides))
    # torch, NumPy and pyarrow have classes of their own for want of memory; any other goes on.
    except Exception as error:
        if line := out_of_memory(error):
            fail(line)
        raise


def out_of_memory(error: BaseException | None) -> str | None:
    """A line where an exception, or what it came of, says that there is no memory or thread left."""
    while error is not None:
        if isinstance(error, MemoryError) or OUT.search(str(error)):
            said = next(iter(str(error).strip().splitlines()), "")
            what = f"{type(error).__name__}: {said}" if said else type(error).__name__
            return (
                f"out of memory ({what}); dry_run=true says what a run needs, ulimit -v counts, too"
            )
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def or_exit() -> Iterator[None]:
    """As ``in_one_line``; and any other exception ends the process, with its traceback.

    For Hydra's callbacks, whose exceptions Hydra turns into warnings, and goes on.
    """
    try:
        with in_one_line():
            yield
    except Exception:  # Hydra would make a warning of it, and run the sweep its own way
        signals.raise_noted()
        traceback.print_exc()
        raise SystemExit(1) from None


def explain(error: Exception, overrides: Sequence[str] = ()) -> str:
    """Hydra's and OmegaConf's complaints about an override, in one line, with the nearest name.

    overrides: what the user gave; the line then has the one in question as it was given.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        parts = error.missing_cfg_file.split("/")
        depth = 2 if parts[0] == "hydra" else 1  # of the group; what follows may have slashes
        group, name = "/".join(parts[:depth]), "/".join(parts[depth:])
        if not name:
            return f"--config-name={group}: no such config"
        names = [each for each in error.options or options(group) if each != FROM_CHECKPOINT]
        hint = nearest(name, names)
        if group == "norm" and re.search(r"[(+*]", name):
            return f"{group}={name}: no such choice; a formula is norm.update, of norm=custom"
        if group == "model" and "/" in name:
            hint = f"; a checkpoint is source=checkpoint source.path={name}"
        return f"{group}={name}: allowed: {', '.join(names)}{hint}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'error'}: {error.strerror}"
    if match := re.match(r"Could not override '(?P<key>[^']+)'", str(error)):
        key, keys = match["key"], known_keys()
        override = next((a for a in overrides if a.lstrip("+~").partition("=")[0] == key), key)
        if (CONF_DIR / key).is_dir():
            return f"{override}: did you mean +{override}?"
        group = key.partition(".")[0]
        choice = chosen(group, overrides) if "." in key else None
        owner, own = (f"{group}={choice}", keys_of(group, choice)) if choice else ("", [])
        if key in keys and keys[key].choices:
            of = keys[key]
            only = ", ".join(f"{of.group}={each}" for each in of.choices)
            if any(re.match(rf"{of.group}=.*,", each) for each in overrides):  # a sweep
                has = f"; beside other choices: {of.group}=NAME,… with its keys in"
                has += f" DIR/{of.group}/NAME.yaml, and -cd DIR"
            else:
                has = f"; {owner} has {', '.join(own)}" * bool(own)
            return f"{override}: only with {only}{has}"
        near = nearest_key(key, [*keys, *OTHER_KEYS], owner, own) or "; see --help"
        return f"{override}: no such key{near}"
    if isinstance(error, OverrideParseException):
        return how_to_write(error.override, sweep=bool(MULTIRUN & set(overrides)))
    if match := re.match(r"(Ambiguous value for argument|Sweep parameters) '(.*)'", str(error)):
        return needs_multirun(match[2])
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
