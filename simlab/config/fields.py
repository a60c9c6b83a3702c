"""Takes the keys of a config node one by one, and says in one line what is wrong with a value."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from simlab.config import ConfigError, nearest


class Reader:
    """Takes the keys of one config node one by one, checks each, and refuses what is left."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values, self.prefix = dict(values), prefix
        self.known: list[str] = []

    def fail(self, key: str, value: object, why: str) -> ConfigError:
        """The error to raise: ``key=value: why``."""
        if isinstance(value, Mapping | list):  # a stranger's may be endless
            value = reprlib.repr(value)
        typed = {"None": "null", "True": "true", "False": "false"}.get(str(value), value)
        return ConfigError(f"{self.prefix}{key}={typed}: {why}")

    def take(self, key: str) -> Any:
        """The key's value, None where it isn't there; it is then known."""
        self.known.append(key)
        return self.values.pop(key, None)

    def number(
        self, key: str, allowed: str, low: float, high: float = 1e30, *, null: bool = False
    ) -> float | None:
        """A number from low to high (above low, where ``allowed`` says "above")."""
        value = self.take(key)
        if value is None and null:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, value, f"not a number; allowed: {allowed}")
        below = value <= low if allowed.startswith("above") else value < low
        if below or not value <= high:  # the latter is also true of NaN
            raise self.fail(key, value, f"allowed: {allowed}, at most {high:g}")
        return float(value)

    def integer(
        self, key: str, low: int = 1, high: int = 10**9, *, null: bool = False
    ) -> int | None:
        """An integer from low to high."""
        value = self.take(key)
        if value is None and null:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, value, f"not an integer; allowed: an integer, at least {low}")
        if value < low:
            raise self.fail(key, value, f"allowed: an integer, at least {low}")
        if value > high:
            raise self.fail(key, value, f"allowed: an integer, at most {high}")
        return value

    def positive(self, key: str, high: int = 10**9) -> int:
        """An integer of at least 1."""
        value = self.integer(key, high=high)
        assert value is not None
        return value

    def finite(self, key: str, allowed: str, low: float) -> float:
        """A number that must be there."""
        value = self.number(key, allowed, low)
        assert value is not None
        return value

    def text(self, key: str) -> str | None:
        """A text, or None."""
        value = self.take(key)
        if value is None:
            return None
        if isinstance(value, Mapping | list | bool):
            raise self.fail(key, value, "not a text")
        try:
            str(value).encode()
        except UnicodeEncodeError as error:
            raise self.fail(key, repr(value), "not UTF-8 text") from error
        return str(value)

    def choice(self, key: str, allowed: Sequence[str]) -> str:
        """One of the allowed texts."""
        value = self.take(key)
        if str(value) not in allowed:
            hint = nearest(str(value), allowed)
            raise self.fail(key, value, f"allowed: {', '.join(allowed)}{hint}")
        return str(value)

    def boolean(self, key: str) -> bool:
        """True or false."""
        value = self.take(key)
        if not isinstance(value, bool):
            raise self.fail(key, value, "allowed: true, false")
        return value

    def node(self, key: str) -> Reader:
        """A reader of the keys below."""
        value = self.take(key)
        if not isinstance(value, Mapping):
            raise self.fail(key, value, "not a group of keys")
        return Reader(value, f"{self.prefix}{key}.")

    def only(self, owner: str, allowed: Iterable[str]) -> None:
        """Refuse keys that this owner (a placement, a rule) has no use for."""
        allowed = list(allowed)
        for key, value in self.values.items():
            if key not in allowed:
                hint = nearest(key, allowed)
                raise self.fail(
                    key, value, f"{owner} has no such key; it has {', '.join(allowed)}{hint}"
                )

    def done(self) -> None:
        """Refuse the keys that nobody has taken."""
        for key, value in self.values.items():
            raise self.fail(
                key,
                value,
                f"no such key; allowed: {', '.join(sorted(self.known))}{nearest(key, self.known)}",
            )
