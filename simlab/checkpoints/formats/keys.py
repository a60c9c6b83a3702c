"""A config's keys, every one of them: used, without effect, or with the one value that is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from simlab.config.fields import Fields, brief


@dataclass(frozen=True)
class Keys:
    """The keys that a section of a config may have. Any other may change what the model computes.

    used: read for the architecture. indifferent: without effect on a forward pass in inference. fixed:
    keys that may have one value only, which the family's code takes for granted.
    """

    used: str
    indifferent: str = ""
    fixed: Mapping[str, object] = field(default_factory=dict)

    def __or__(self, more: Keys) -> Keys:
        """The keys of both."""
        return Keys(
            f"{self.used} {more.used}",
            f"{self.indifferent} {more.indifferent}",
            {**self.fixed, **more.fixed},
        )

    @property
    def names(self) -> frozenset[str]:
        """All of them."""
        return frozenset([*self.used.split(), *self.indifferent.split(), *self.fixed])

    def check(self, fields: Fields) -> None:
        """Refuse a key that isn't listed, unless it is null, and another value of a fixed one.

        Raises ConfigError, which names the key.
        """
        fields.must_be(**self.fixed)
        for key, value in fields.values.items():
            if value is not None and key not in self.names:
                why = "not supported: simlab doesn't know this key, and it may change the model"
                raise fields.fail(brief(key)[1:-1], value, why)
