"""Every key that a run can have, from the files in conf/: its default, its comment, its choices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from simlab.config.schema import CONF_DIR, FROM_CHECKPOINT
from simlab.config.validate import GROUPS, options

_WHOLE = "# @package _global_"  # of a file whose keys are the config's, not its group's


@dataclass
class Key:
    """A key of the config.

    default: as the default choice's file has it, or the first that has the key. about: the comment on
    the key's line, there or in the next file. group: of the files that have it, empty for config.yaml.
    choices: of this group, those that have the key. others: of a key that the default choice
    hasn't, the values of choices whose own is another than default.
    """

    default: str = ""
    about: str = ""
    group: str = ""
    choices: list[str] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)


def default_choices() -> dict[str, str]:
    """The choice of each group in conf/config.yaml."""
    defaults = yaml.safe_load((CONF_DIR / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    return {k: v for each in defaults if isinstance(each, dict) for k, v in each.items()}


def known_keys() -> dict[str, Key]:
    """Every dotted key that some choice of groups has; a group's name is a key too."""
    keys: dict[str, Key] = {}
    files = [("", CONF_DIR / "config.yaml")]
    for group, default in default_choices().items():
        if group in GROUPS:
            keys[group] = Key(default)
            names = [default, *(name for name in options(group) if name != default)]
            files += [(group, CONF_DIR / group / f"{name}.yaml") for name in names]
    first = default_choices()
    for group, path in files:
        for name, default, about in _read(path, group):
            key = keys.setdefault(name, Key(default, group=group))
            key.about = key.about or about
            if group and path.stem != FROM_CHECKPOINT:
                key.choices.append(path.stem)
                if default != key.default and first[key.group] not in key.choices:
                    key.others[path.stem] = default
    return keys


def _read(path: Path, group: str) -> Iterator[tuple[str, str, str]]:
    """A file's dotted keys, each with its value as it is written, and the comment on its line."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()

    def walk(node: yaml.MappingNode, above: str) -> Iterator[tuple[str, str, str]]:
        for key, value in node.value:
            name, line = f"{above}{key.value}", lines[key.start_mark.line]
            if isinstance(value, yaml.MappingNode) and value.value:
                yield from walk(value, f"{name}.")
            elif name not in ("defaults", "hydra"):
                written = line[value.start_mark.column : value.end_mark.column]
                many = value.start_mark.line != value.end_mark.line
                yield name, "…" if many else written, line.partition(" # ")[2]

    node = yaml.compose(text)
    assert isinstance(node, yaml.MappingNode)
    above = "" if not group or _WHOLE in lines else f"{group}."
    return ((n, d, a) for n, d, a in walk(node, above) if not n.startswith("hydra."))
