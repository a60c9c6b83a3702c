"""The map from a checkpoint's tensors to a model's, as transformers loads them.

Relied on, of transformers 5.23: ``conversion_mapping.get_model_conversion_mapping``, a model's list of
renamings and conversions, and of ``core_model_loading`` ``rename_source_key`` (a file's name to the
model's), ``WeightConverter`` (``add_tensor`` and ``convert``, as for fused experts) and the order of
``dot_natural_key`` (expert 2 before expert 10). All are names without an underscore; from_pretrained
itself calls them so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from simlab.checkpoints.storage import StoredTensor
from simlab.config import ConfigError

# What a conversion of transformers may raise on shapes that aren't its model's.
CONVERSION_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    AttributeError,
)


@dataclass
class Group:
    """Stored tensors that become one tensor of the model, or several that are made together.

    converter: transformers' WeightConverter, None where a tensor only has another name. sources: by the
    converter's patterns, in the order in which it takes them. targets: the model's names, first known
    once ``check`` has converted shapes.
    """

    name: str
    converter: Any = None
    sources: list[tuple[str | None, str]] = field(default_factory=list)
    targets: tuple[str, ...] = ()


class Conversion:
    """The groups of a checkpoint's tensors, checked by shape before a byte of them is read.

    Args:
        model: A PreTrainedModel on the meta device.
        tensors: The files' names and where their bytes are; ``check_pieces`` has passed them.
        where: The folder, for messages.

    ``unused``: the files' names that the model has no place for. ``missing``: the model's names that no
    file fills. Raises ConfigError for a shape that isn't the model's.
    """

    def __init__(self, model: Any, tensors: Mapping[str, StoredTensor], where: str) -> None:
        self.model, self.tensors, self.where = model, tensors, where
        wanted = model.state_dict()
        self.unused: list[str] = []
        self.groups: dict[str, Group] = {}
        self._assign(wanted)
        self.by_target: dict[str, Group] = {}
        for group in self.groups.values():
            self._check(group, wanted)
        self.missing = sorted(wanted.keys() - self.by_target.keys())

    def _assign(self, wanted: Mapping[str, Tensor]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        transforms = get_model_conversion_mapping(self.model)
        renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        base = self.model.base_model_prefix
        for key in sorted(self.tensors, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, base, wanted)
            if name not in wanted and key in wanted:
                name, pattern = rename_source_key(key, [], [], base, wanted)
            if name not in wanted:
                self.unused.append(key)
                continue
            group = self.groups.setdefault(name, Group(name, by_pattern.get(pattern)))
            if group.sources and (group.converter is None or pattern is None):
                raise ConfigError(
                    f"{self.where}: tensors {group.sources[0][1]} and {key} are one in a model"
                )
            group.sources.append((pattern, key))

    def _check(self, group: Group, wanted: Mapping[str, Tensor]) -> None:
        def shape_of(key: str) -> Tensor:
            stored = self.tensors[key]
            return torch.empty(stored.shape, dtype=stored.dtype, device="meta")

        names = ", ".join(key for _, key in group.sources[:2])
        try:
            made = self.convert(group, shape_of)
        except CONVERSION_ERRORS as error:
            raise ConfigError(
                f"{self.where}: transformers can't make {group.name} of {names}: {_first_line(error)}"
            ) from error
        for name, tensor in made.items():
            if name not in wanted:
                raise ConfigError(
                    f"{self.where}: {names} gives {name}, which the model doesn't have"
                )
            if (has := tuple(tensor.shape)) != (implied := tuple(wanted[name].shape)):
                raise ConfigError(
                    f"{self.where}: tensor {names} has shape {has}, but config.json implies {implied}"
                )
            if name in self.by_target:
                raise ConfigError(f"{self.where}: {names} gives {name}, which another tensor gives")
            self.by_target[name] = group
        group.targets = tuple(made)

    def convert(self, group: Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """A group's tensors by the model's names, converted as transformers does it.

        read: gives a file's tensor by name; it is asked for one after another.
        """
        if group.converter is None:
            return {group.name: read(group.sources[0][1])}
        converter = copy.deepcopy(group.converter)
        for pattern, key in group.sources:
            converter.add_tensor(group.name, key, pattern, partial(read, key))
        made = converter.convert(group.name, model=self.model, config=self.model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}

    def groups_of(self, names: Iterable[str]) -> list[Group]:
        """The groups that fill some of the model's tensors, each once."""
        return list({self.by_target[name].name: self.by_target[name] for name in names}.values())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
