"""The choices of a config group: the keys that their files in conf/ have, and which one was made."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from simlab.config.schema import CONF_DIR

# The key by which a group's config names its choice; a model's name is also a user's own.
NAMED_BY = {
    "model": "name", "norm": "placement", "init": "rule", "inputs": "kind", "source": "kind",
}  # fmt: skip


@functools.cache
def file_of(group: str, name: str) -> dict[str, Any]:
    """The content of conf/GROUP/NAME.yaml. The caller must not change it."""
    text = (CONF_DIR / group / f"{name}.yaml").read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # faster, where libyaml is there
    return {str(key): value for key, value in yaml.load(text, loader).items()}


def keys_of(group: str, name: str) -> list[str]:
    """The keys that a choice's file sets: those that its placement, rule or input uses."""
    return list(file_of(group, name))


@functools.cache
def namesakes(placement: str) -> list[str]:
    """The other choices of norm that are this placement, with its own numbers or its own norm type.

    ``minimax`` of ``scaled``. From the files' texts: to parse them all would take a tenth of a second.
    """
    line = f"\nplacement: {placement}\n"
    files = sorted((CONF_DIR / "norm").glob("*.yaml"))
    found = [path.stem for path in files if line in path.read_text(encoding="utf-8")]
    return [name for name in found if name != placement]


def chosen(group: str, overrides: Sequence[str]) -> str | None:
    """The one choice of a group that overrides make, by itself or by a model; None for several or none.

    None too where a choice can't be told from the overrides alone, as with a recipe.
    """
    said = {key.lstrip("+"): value for key, _, value in (o.partition("=") for o in overrides)}
    if group in said:
        name: str | None = said[group]
    elif {"experiment", "recipe"} & set(said):
        return None
    else:
        first = file_of("", "config")["defaults"]
        model = said.get("model", "")
        if model and not is_choice("model", model):
            return None
        brought = file_of("model", model).get("defaults", []) if model else []
        names = {k.removeprefix("override /"): v for d in brought for k, v in d.items()}
        names = {k: v for d in first if isinstance(d, dict) for k, v in d.items()} | names
        name = names.get(group)
    return name if name and is_choice(group, name) else None


def is_choice(group: str, name: str) -> bool:
    """True if conf/ has the file of such a choice."""
    return bool(re.fullmatch(r"\w+", name)) and (CONF_DIR / group / f"{name}.yaml").is_file()


def as_choices(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a run, in which ``norm={"placement": "mhc", …}`` is ``norm="mhc"`` and the others."""
    given: dict[str, Any] = {}
    for group, value in keys.items():
        by = NAMED_BY.get(group, "")
        name = value.get(by) if isinstance(value, Mapping) else None
        if isinstance(name, str) and (group != "model" or is_choice("model", name)):
            given[group] = name
            given |= {f"{group}.{key}": each for key, each in value.items() if key != by}
        else:
            given[group] = value
    return given
