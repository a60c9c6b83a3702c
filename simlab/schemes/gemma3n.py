"""Gemma 3n's residual scheme: sandwich norms, and LAuReL beside attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from simlab.config import ModelConfig
from simlab.schemes.plain import Peri
from simlab.schemes.scheme import Add, Map, Scheme, V
from simlab.schemes.streams import total

ALTUP_STREAMS = 4  # transformers' altup_num_inputs
LEAST_SQUARE = 1e-5  # transformers' least mean square of what is scaled to the active stream's


class Laurel(Scheme):
    """(x + h + N(RLh) + N(F(h)))/√2, h = N(x), RL of low rank: LAuReL-LR beside attention."""

    norms, parts = ("norm_in", "norm_laurel", "norm_out"), ("laurel",)

    def step(
        self, x: V, F: Map[V], add: Add[V], norm_in: Map[V], norm_laurel: Map[V], norm_out: Map[V],
        laurel: Map[V],
    ) -> V:  # fmt: skip
        read = norm_in(x)
        skip = x + read + norm_laurel(laurel(read))
        return add(skip / math.sqrt(2), norm_out(F(read)) / math.sqrt(2))


class Gemma3n(Scheme):
    """y = (x + h + N(RLh) + N(A(h)))/√2, h = N(x), then x' = y + N(M(N(y))): Gemma 3n's active stream.

    From transformers' ``gemma3n/modeling_gemma3n.py``. Behind norms of gain 1, m_y = ((√m + 1)² + 2)/2
    and m' = m_y + 1, which rests at m = (1 + √6)² = 11.90. The other streams are left out; ``AltUp``
    has them. At transformers' init they move this stream's mean squares by less than 3·10⁻⁵, and by the
    mean at the end its gradient by 1 % (measured at width 512, 12 blocks).
    """

    @classmethod
    def select(cls, config: ModelConfig, layer: int, kind: str) -> type[Scheme]:
        """LAuReL beside attention, the MLP between two norms."""
        return Laurel if kind == "attention" else Peri


class PredictedLaurel(Scheme):
    """(y, P_0 … P_3), P the predictions and y ``Laurel``'s step of P_0."""

    norms, parts = Laurel.norms, (*Laurel.parts, "predict")

    def step(
        self, state: tuple[Any, ...], F: Map[Any], add: Add[Any], *, laurel: Map[Any], predict: Any,
        **norms: Map[Any],
    ) -> tuple[Any, ...]:  # fmt: skip
        predicted = predict(state)
        inner = Laurel(self.layer, self.alpha, self.scales)
        return (inner.step(predicted[0], F, add, laurel=laurel, **norms), *predicted)


class CorrectedMLP(Scheme):
    """P_i + (1 + c_i)·(x' − P_0) of (y, P_0 … P_3), x' = y + N(M(N(y))) and c of x'."""

    norms, parts, normalises = ("norm_in", "norm_out"), ("correct",), "branch"

    def step(
        self, state: tuple[Any, ...], F: Map[Any], add: Add[Any], norm_in: Map[Any],
        norm_out: Map[Any], correct: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        y, active, *others = state
        branch = norm_out(F(norm_in(y)))
        after = y + branch
        first, *corrections = correct(after)
        skip = (1 + first) * y + (-first) * active  # to be measured: x' + c_0·(x' − P_0) is a sum
        innovation = after + -1.0 * active
        pairs = zip(others, corrections, strict=True)
        return add(skip, (1 + first) * branch), *(p + (1 + c) * innovation for p, c in pairs)


class AltUp(Scheme):
    """``Gemma3n`` with its three side streams: AltUp (arXiv 2301.13310) as Gemma 3n has it.

    From transformers' ``gemma3n/modeling_gemma3n.py``. Side streams start as projections of the
    embedding, scaled to its rms. Before a block each stream x_j is predicted, P_j = x_j + Σ_i a_ji·x_i;
    the block makes x' of P_0 as ``Gemma3n`` does, and x_j' = P_j + (1 + c_j)·(x' − P_0). The final norm
    gets the mean of the active stream and of the side streams' projections, scaled to its rms.

    a and c are matrices times tanh(W·N(x)/d), about 2·10⁻⁵ at width 2048 and std 0.02, so that the
    active stream is ``Gemma3n``'s and side streams get its changes. Theory takes them for 0. In
    transformers prediction and correction share W; here each has its own, which changes the law of a
    and c by nothing, as the matrices before W·N are independent. The per-layer embeddings are left
    out: at init they are multiplied by 0, and so is their gradient.

    A row's gradient is that of a write, which after the MLP moves all streams; of the embedding's row
    that of a shift of all.
    """

    start_parts, finish_parts = ("embed_sides",), ("unembed_sides",)

    @classmethod
    def select(cls, config: ModelConfig, layer: int, kind: str) -> type[Scheme]:
        """Prediction and LAuReL with attention, correction with the MLP."""
        return PredictedLaurel if kind == "attention" else CorrectedMLP

    @staticmethod
    def start(x: Any, norm: Map[Any], config: ModelConfig, embed_sides: Any = None) -> Any:
        """The embedding, and its projections."""
        return (x, *embed_sides((x,) * ALTUP_STREAMS))

    @staticmethod
    def pull(gradients: Sequence[V], layer: int | None) -> V:
        """The sum over all streams, which an MLP's write moves alike; after attention y's alone.

        After attention the state is (y, P_0 … P_3), an odd number of vectors; in theory, which keeps
        one side stream, too: (y, P_0, P_1).
        """
        return gradients[0] if len(gradients) % 2 else total(gradients)

    @staticmethod
    def finish(state: Any, norm: Map[Any], config: ModelConfig, unembed_sides: Any = None) -> Any:
        """(x_0 + s_1 + s_2 + s_3)/4: x_0 is the active stream, s_k the projection of side stream k."""
        return total((state[0], *unembed_sides(state))) / ALTUP_STREAMS
