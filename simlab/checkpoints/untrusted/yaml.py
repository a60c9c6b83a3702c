"""One section of a YAML file, with scalars read by our own rules: 1e-6 is a number, yes is text."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from simlab.checkpoints.untrusted.files import YAML_LIMIT, read_text
from simlab.config import ConfigError
from simlab.config.fields import brief

_INTEGER = re.compile(r"[-+]?\d{1,20}")
_OCTAL = re.compile(r"[-+]?0\d+")  # 064 is 52 in YAML 1.1, and 64 in YAML 1.2
_NUMBER = re.compile(r"[-+]?(\d{1,20}\.?\d{0,30}|\.\d{1,30})([eE][-+]?\d{1,4})?")
EVENTS = 10_000  # a key or a value is one; those up to the end of an official model section are 150
SECTION_WITHIN = 1 << 18  # characters; the section that is read is at the start of official files
_TAGS = [f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")]
_CONSTANTS: dict[str, bool | None] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip


class _Loader(yaml.BaseLoader):  # type: ignore[misc]  # yaml has no types
    """A loader that reads scalars as text and refuses aliases, which can describe exponential sizes.

    It is the pure-Python loader: Python doesn't bound libyaml's recursion. It takes 35 µs for an event.
    """

    left = EVENTS

    def get_event(self) -> Any:
        self.left -= 1
        if self.left < 0:
            raise yaml.YAMLError(f"more than {EVENTS // 2} keys and values")
        return super().get_event()

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)


def _value(node: Any, name: str = "") -> Any:
    """A node as a plain value: dict, list, None, bool, int, float or str. Raises YAMLError.

    name: the key that it is under, for an error.
    """
    if node.tag not in _TAGS:
        raise yaml.YAMLError(f"the tag {node.tag[:60]} is not allowed")
    if isinstance(node, yaml.MappingNode):
        if not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
            raise yaml.YAMLError("a key is not a word")
        (most,) = Counter(key.value for key, _ in node.value).most_common(1) or [("", 0)]
        if most[1] > 1:
            raise _twice(most[0])
        return {key.value: _value(value, key.value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_value(value, name) for value in node.value]
    text = node.value
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _OCTAL.fullmatch(text) and node.style is None:
        raise yaml.YAMLError(
            f"{brief(name)}: {text[:20]} is octal to some readers; leave out the 0"
        )
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):  # 1e-6 too, which YAML 1.1 takes for text
        return float(text)
    return text


def _twice(key: str) -> yaml.YAMLError:
    """Of several values readers take the first, or the last, without a word."""
    return yaml.YAMLError(f"the key {brief(key)} is there twice")


def read_mapping(path: Path) -> dict[str, Any]:
    """All of a small YAML file, which is a mapping. Raises ConfigError."""
    text = read_text(path, SECTION_WITHIN).removeprefix("\ufeff")
    try:
        node = _Loader(text).get_single_node()
        values = _value(node) if node is not None else None
    except (yaml.YAMLError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a group of keys")
    return values


def _unreadable(path: Path, error: Exception) -> ConfigError:
    line = " ".join(str(error).split())[:120]
    return ConfigError(f"{path}: not YAML that simlab reads ({line})")


def read_section(path: Path, name: str) -> dict[str, Any]:
    """The mapping under a top-level key; later keys aren't read. Raises ConfigError."""
    whole = read_text(path, YAML_LIMIT)
    try:
        loader = _Loader(whole[:SECTION_WITHIN])
        loader.get_event()  # the stream's start
        loader.get_event()  # the document's
        if not loader.check_event(yaml.MappingStartEvent):
            raise ConfigError(f"{path}: not a YAML mapping")
        loader.get_event()
        while loader.check_event(yaml.ScalarEvent):
            key = loader.get_event()
            value = loader.compose_node(None, None)
            if key.value == name:
                # The rest may be long, and isn't parsed.
                line = rf"^ {{{key.start_mark.column}}}([\"']?){re.escape(name)}\1[ \t]*:"
                if len(re.findall(line, whole, flags=re.MULTILINE)) > 1:
                    raise _twice(name)
                section = _value(value)
                if not isinstance(section, dict):
                    raise ConfigError(f"{path}: {name}: must be a mapping")
                return section
    except (yaml.YAMLError, RecursionError) as error:
        raise _unreadable(path, error) from error
    raise ConfigError(f"{path}: has no {name}")
