"""A mutation: a plausible mistake, as an edit of simlab's own source, made for a ``with`` block.

Each is a few words of a function replaced by others, as a programmer would have typed them. The
edited source is compiled and its code put into the function itself, so that whoever has imported it
gets the mistake, and after the block the old code is back. An edit whose words the function no
longer has (once, exactly) is an error: the catalogue follows the code.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any


@dataclass(frozen=True)
class Edit:
    """In the source of a function (a method's, a property's ``fget``), ``old`` becomes ``new``."""

    function: Any
    old: str
    new: str


@dataclass(frozen=True)
class Mutation:
    """A mistake, and whether any number of random inits could show it.

    mistake: what the programmer did wrong. setting: where it shows, a key of SETTINGS. same: why the
    law of the curve over random inits stays what it is, where it does: a parity test's to catch.
    """

    name: str
    mistake: str
    edits: tuple[Edit, ...]
    setting: str = "plain"
    same: str = ""

    @property
    def shifts(self) -> bool:
        """True if the curve's distribution over random inits changes."""
        return not self.same


def edit(function: Any, old: str, new: str) -> tuple[Edit]:
    """A single edit."""
    return (Edit(function, old, new),)


@contextmanager
def applied(mutation: Mutation | None) -> Iterator[None]:
    """Make the mistake until the block's end; None makes none."""
    sources: dict[Any, str] = {}
    for edit in mutation.edits if mutation else ():
        source = sources.get(edit.function) or inspect.getsource(edit.function)
        if source.count(edit.old) != 1:
            count = source.count(edit.old)
            name = edit.function.__qualname__
            raise ValueError(f"{name} has {edit.old!r} {count} times, not once")
        sources[edit.function] = source.replace(edit.old, edit.new)
    before = {function: function.__code__ for function in sources}
    after = {function: compiled(function, source) for function, source in sources.items()}
    try:
        for function, code in after.items():
            function.__code__ = code
        yield
    finally:
        for function, code in before.items():
            function.__code__ = code


def compiled(function: Any, source: str) -> CodeType:
    """The code of a function with another source; it closes over the same names."""
    closed = "".join(f"{name} = " for name in function.__code__.co_freevars) + "None\n"
    shell = "def shell():\n" + textwrap.indent(closed + textwrap.dedent(source), "    ")
    code = compile(shell, f"<{function.__qualname__}, edited>", "exec")
    for name in ("shell", function.__name__):
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)
    return code
