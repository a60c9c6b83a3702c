"""A residual step by the user's own formula, which ``simlab/config/formula.py`` reads."""

from __future__ import annotations

from functools import cache, reduce
from operator import add as plus
from typing import Any, ClassVar

from simlab.config import ModelConfig
from simlab.config.formula import Formula, Sum, Summand, formula_of
from simlab.schemes.scheme import Add, Map, Scheme, vectors

_KINDS = ("attention", "mlp")


class Custom(Scheme):
    """``norm.update``, and ``norm.mlp_update`` of MLPs: formulas of x, x₀, F and N.

    Each N of a formula is a norm of its own. Products are multiplied out, so that 0.5(x + F(x)) is
    0.5x + 0.5F(x), and ``add`` gets F's part and the sum of the others beside it.
    """

    formula: ClassVar[Formula]

    @classmethod
    def select(cls, config: ModelConfig, layer: int, kind: str) -> type[Scheme]:
        """The class of this sublayer's formula."""
        return _class_of(_text(config, kind))

    @staticmethod
    def scales_of(config: ModelConfig, layer: int, kind: str) -> tuple[float, ...]:
        """The formula's numbers, for this depth and block."""
        return formula_of(_text(config, kind)).factors(config.depth, layer + 1)

    @staticmethod
    def start(x: Any, norm: Map[Any], config: ModelConfig) -> Any:
        """(x₀, x₀), or the embedding alone where no formula has x0."""
        return (x, x) if any(formula_of(_text(config, kind)).starts for kind in _KINDS) else x

    def step(self, state: Any, F: Map[Any], add: Add[Any], **norms: Map[Any]) -> Any:
        """The formula."""
        x, *start = vectors(state)
        scales = iter(self.scales)  # in the order in which the parts are computed

        def value(part: Summand) -> Any:
            inner = total(part.inner) if part.inner else None
            scale = next(scales)
            if part.of in ("x", "x0"):
                out = x if part.of == "x" else start[0]
            else:
                out = F(inner) if part.of == "F" else norms[part.norm](inner)
            return out if scale == 1 else scale * out

        def total(parts: Sum) -> Any:
            *skip, branch = map(value, parts)
            if parts is self.formula.joined:
                return add(reduce(plus, skip), branch)
            return reduce(plus, [*skip, branch])

        out = total(self.formula.parts)
        return (out, *start) if start else out


def _text(config: ModelConfig, kind: str) -> str:
    norm = config.norm
    return (norm.mlp_update if kind == "mlp" else None) or norm.update or "x + F(N(x))"


@cache
def _class_of(text: str) -> type[Scheme]:
    class Written(Custom):
        """One formula."""

        formula = formula_of(text)
        norms, normalises = formula.norms, formula.normalises

    return Written
