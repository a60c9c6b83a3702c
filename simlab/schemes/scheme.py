"""What a residual scheme is: a step, as a formula over anything that can be added and scaled.

``model/placement.py`` runs it on tensors, and theory runs the same code on what it keeps of a vector.
No torch is needed. The schemes that there are stand in ``placement``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, TypeVar

from simlab.config import ModelConfig


class Vector(Protocol):
    """A residual stream as formulas use it: a number can scale it, and two can be mixed."""

    def __add__(self, other: Self, /) -> Self: ...
    def __rmul__(self, scale: float, /) -> Self: ...
    def __truediv__(self, scale: float, /) -> Self: ...


V = TypeVar("V", bound=Vector)

Map = Callable[[V], V]  # a sublayer, or a norm
Add = Callable[[V, V], V]  # add(skip, branch)


def vectors(state: Any) -> tuple[Any, ...]:
    """A state's vectors: between two steps there is the stream, or a tuple of it and others."""
    return state if isinstance(state, tuple) else (state,)


@dataclass(frozen=True)
class Scheme:
    """One residual step: ``step(x, F, add, **norms, **parts)`` is the stream after it.

    Subclasses write ``step`` and name the norms that it takes. Two equal schemes compute the same.
    A placement may carry more than the stream from step to step: x is then a state, a tuple of vectors,
    which ``start`` makes of the embedding. ``watch`` says which vector is the stream, the one that
    ``add`` writes to, and ``finish`` what the final norm gets.

    layer: the block that the step is in, counted from 0. alpha: the scheme's constant, as
    ``alpha_of`` computes it. scales: numbers that differ from step to step, by ``scales_of``.
    norms: names of ``step``'s norms, which begin with ``norm_``; ``norm_in`` gives what F gets.
    parts: names of ``step``'s further maps, such as a low-rank product: keys of ``model.parts.PARTS``.
    Every block has the same ones. start_parts, finish_parts: likewise those that ``start`` and
    ``finish`` take, once in a model.
    normalises: what the step's last norm acts on: the ``branch`` before it is added, the whole
    ``stream`` after, or None where the branch is added as it comes. The additive law needs it. Where
    the branch is added to a normed stream it is ``skip``: such a stream can't grow by a fixed rate.
    """

    layer: int
    alpha: float
    scales: tuple[float, ...] = ()

    norms: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[tuple[str, ...]] = ()
    start_parts: ClassVar[tuple[str, ...]] = ()
    finish_parts: ClassVar[tuple[str, ...]] = ()
    normalises: ClassVar[str | None] = None

    def step(self, *args: Any, **maps: Any) -> Any:
        """The formula. Every placement writes its own; ``Scheme`` is none, so it raises."""
        raise NotImplementedError

    @staticmethod
    def start(x: Any, norm: Map[Any], config: ModelConfig) -> Any:
        """The state before the first block, of the embedding. norm: to rms 1, without a gain."""
        return x

    @staticmethod
    def watch(state: Any) -> Any:
        """The residual stream: a sum of the state's vectors, by numbers."""
        return vectors(state)[0]

    @staticmethod
    def pull(gradients: Sequence[V], layer: int | None) -> V:
        """The gradient with respect to what a step adds, of those of the state's vectors after it.

        Of a stream that is the vectors' mean or sum, and of a write to all, it is their sum.
        layer: the step's block; None of ``start``.
        """
        return gradients[0]

    @staticmethod
    def finish(state: Any, norm: Map[Any], config: ModelConfig) -> Any:
        """The final norm's input. norm: as ``norm.type`` has it, without a gain."""
        return vectors(state)[0]

    @classmethod
    def select(cls, config: ModelConfig, layer: int, kind: str) -> type[Scheme]:
        """The scheme of a sublayer, where a placement differs by layer or by sublayer.

        kind: ``attention`` or ``mlp``.
        """
        return cls

    @staticmethod
    def alpha_of(config: ModelConfig) -> float:
        """``alpha``: all that ``step`` knows of the depth and of the placement's own keys."""
        return 1.0

    @staticmethod
    def scales_of(config: ModelConfig, layer: int, kind: str) -> tuple[float, ...]:
        """``scales``: what ``step`` knows of its layer, and of attention or MLP, besides."""
        return ()

    @staticmethod
    def init_scale(role: str, depth: int) -> float:
        """A factor on the init's std of a sublayer's matrix ``role`` (``q_proj`` … ``down_proj``)."""
        return 1.0

    @staticmethod
    def renorm_after(config: ModelConfig, layer: int) -> bool:
        """True if the residual stream itself is normed, x ← N(x), after this block."""
        return False
