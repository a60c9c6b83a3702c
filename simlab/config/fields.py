"""Checked fields of a mapping: a composed config, a case's YAML, a stranger's checkpoint config.

A mistake is a ConfigError of one line, ``key=value: what is allowed``. Nothing is assumed of a value:
it may be a list without an end, an integer of a million digits, NaN, or a text with control codes.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from simlab.config.errors import ConfigError, NotComputed
from simlab.config.names import nearest

Default = TypeVar("Default")
REQUIRED: Any = object()  # no default: the field must be there
LARGEST_INTEGER = 10**9  # of an integer
SHOWN = 60  # characters of a value in a line


class _Brief(reprlib.Repr):
    """repr that stays short, and quick, for any value."""

    def repr_int(self, value: int, level: int) -> str:
        return "a huge integer" if abs(value) >= 10**SHOWN else repr(value)

    def repr_instance(self, value: object, level: int) -> str:
        plain = isinstance(value, bool | float | None)
        return repr(value) if plain else f"a {type(value).__name__}"


_BRIEF = _Brief()
_BRIEF.maxstring = _BRIEF.maxlist = _BRIEF.maxdict = 100


def brief(value: object) -> str:
    """A value as Python writes it, at most 60 characters of it."""
    text = _BRIEF.repr(value)
    return text if len(text) < SHOWN else text[:SHOWN] + "…"


def as_typed(value: object) -> str:
    """A value as a command line has it, at most 60 characters of it."""
    if isinstance(value, str):
        return value if len(value) < SHOWN else value[:SHOWN] + "…"
    return {"None": "null", "True": "true", "False": "false"}.get(text := brief(value), text)


class Fields:
    """Takes the fields of one mapping by name and checks each.

    prefix: text before the field's name in an error: its nodes (``norm.``) or its file. shown: the
    function that writes a value in an error. hint: the words after it, by the name and those allowed:
    a user mistypes; in a stranger's file another name is another thing, and the nearest leads astray.
    Every method raises ConfigError for a value that isn't allowed. A missing or null field takes the
    method's ``default``; without one it is an error.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        prefix: str = "",
        shown: Callable[[object], str] = as_typed,
        hint: Callable[[str, Iterable[str]], str] = nearest,
    ) -> None:
        self.values, self.prefix, self.shown, self.hint = dict(values), prefix, shown, hint
        self.taken: list[str] = []

    def fail(self, key: str, value: object, why: str) -> ConfigError:
        """The error to raise: ``key=value: why``."""
        return ConfigError(f"{self.prefix}{key}={self.shown(value)}: {why}")

    def take(self, key: str, default: Any = REQUIRED) -> Any:
        """The field's value, unchecked; None if it is missing. ``done`` then allows its name."""
        self.taken.append(key)
        value = self.values.get(key)
        return default if value is None and default is not REQUIRED else value

    def number(
        self,
        key: str,
        low: float,
        high: float = 1e30,
        *,
        above: bool = False,
        default: Default = REQUIRED,
    ) -> float | Default:
        """A number from low, or above it, to high."""
        value = self.take(key, default)
        if value is None and default is None:
            return default
        bound = "above" if above else "at least"
        allowed = f"allowed: a number, {bound} {low:g}, at most {high:g}"
        allowed += ", or null" if default is None else ""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, value, f"not a number; {allowed}")
        if not low <= value <= high or (above and value == low):  # the former is true of NaN
            raise self.fail(key, value, allowed)
        return float(value)

    def ends(self, key: str) -> tuple[float, float]:
        """Two numbers, of a list of them or of one number that is both."""
        value = self.take(key)
        both = value if isinstance(value, list) else [value, value]
        numbers = [x for x in both if isinstance(x, int | float) and not isinstance(x, bool)]
        if len(both) != 2 or len(numbers) != 2 or not all(abs(x) <= 1e6 for x in numbers):
            allowed = "allowed: a number, or two as [first,last], between -1e6 and 1e6"
            raise self.fail(key, value, allowed)
        return float(both[0]), float(both[1])

    def integer(
        self, key: str, low: int = 1, high: int = LARGEST_INTEGER, *, default: Default = REQUIRED
    ) -> int | Default:
        """An integer from low to high."""
        value = self.take(key, default)
        if value is None and default is None:
            return default
        allowed = f"allowed: an integer, at least {low}, at most {high}"
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, value, f"not an integer; {allowed}")
        if not low <= value <= high:
            raise self.fail(key, value, allowed)
        return value

    def text(self, key: str) -> str | None:
        """A text, or None."""
        value = self.take(key)
        if value is None:
            return None
        if isinstance(value, Mapping | list | bool):
            raise self.fail(key, value, "not a text")
        text = value if isinstance(value, str) else brief(value)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.fail(key, repr(value), "not UTF-8 text") from error
        return text

    def choice(self, key: str, allowed: Iterable[str], default: str = REQUIRED) -> str:
        """One of the allowed texts."""
        value, names = self.take(key, default), list(allowed)
        text = value if isinstance(value, str) else brief(value)
        if text not in names:
            hint = self.hint(text[:SHOWN], names)
            raise self.fail(key, value, f"allowed: {', '.join(names)}{hint}")
        return text

    def boolean(self, key: str, default: Default = REQUIRED) -> bool | Default:
        """True or false."""
        value = self.take(key, default)
        if value is None and default is None:
            return default
        if not isinstance(value, bool):
            allowed = "true, false" + (", null" if default is None else "")
            raise self.fail(key, value, f"allowed: {allowed}")
        return value

    def node(self, key: str, default: Mapping[str, Any] = REQUIRED) -> Fields:
        """The fields of a mapping below."""
        value = self.take(key, default)
        if not isinstance(value, Mapping):
            raise self.fail(key, value, "must be a group of keys (an object)")
        return Fields(value, f"{self.prefix}{key}.", self.shown, self.hint)

    def only(self, owner: str, allowed: Sequence[str]) -> None:
        """Refuse fields that this owner (a placement, a rule) has no use for."""
        for key, value in self.values.items():
            if key not in allowed:
                hint = self.hint(key, allowed)
                raise self.fail(
                    key, value, f"{owner} has no such key; it has {', '.join(allowed)}{hint}"
                )

    def must_be(self, **wanted: object) -> None:
        """Refuse a field with another value than the one given here.

        That value is the one for which simlab computes the model as its authors do. Null stands for it
        too, except for true: null counts as false where a library asks if the field is set. Raises
        NotComputed.
        """
        for key, allowed in wanted.items():
            value = self.values.get(key)
            if value is None and (allowed is not True or key not in self.values):
                continue
            if isinstance(value, bool) != isinstance(allowed, bool) or value != allowed:
                why = f"not supported; allowed: {as_typed(allowed)}"
                raise NotComputed(str(self.fail(key, value, why)))

    def computed(self, key: str, allowed: Iterable[str], default: str = REQUIRED) -> str:
        """One of the texts that simlab computes; another text is NotComputed."""
        try:
            return self.choice(key, allowed, default)
        except ConfigError as error:
            if isinstance(self.values.get(key), str):
                raise NotComputed(str(error)) from None
            raise

    def done(self) -> None:
        """Refuse the fields that nobody has taken."""
        for key, value in self.values.items():
            if key not in self.taken:
                hint = self.hint(key, self.taken)
                allowed = ", ".join(sorted(self.taken))
                raise self.fail(key, value, f"no such key; allowed: {allowed}{hint}")
