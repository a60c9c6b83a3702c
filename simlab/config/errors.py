"""A user's mistake as an exception, and the words that its line is made of."""

from __future__ import annotations


class ConfigError(ValueError):
    """A user's mistake, in one line: the key, its value, and the allowed values."""


class NotComputed(ConfigError):
    """A value that means something, but not to simlab's own model."""


def printable(text: str) -> str:
    """A text without control codes: it may be a stranger's, and goes to a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def divides(part_name: str, part: int, whole_name: str, whole: int) -> None:
    """Refuse a part that doesn't divide the whole, naming the nearest one that does."""
    if whole % part == 0:
        return
    # Outward from the part, and not far: the numbers may be a stranger's.
    near = (n for step in range(1, 10_000) for n in (part - step, part + step) if n > 0)
    best = next((n for n in near if whole % n == 0), None)
    hint = f"; the nearest that does is {best}" if best else ""
    raise ConfigError(f"{part_name}={part}: must divide {whole_name}={whole}{hint}")
