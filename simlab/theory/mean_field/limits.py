"""Where theory has no prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simlab.config import FamilyConfig, ModelConfig
from simlab.schemes.placement import at, placement_of, renorm_after
from simlab.schemes.scheme import vectors
from simlab.theory.mean_field.mlp import UNITS

# Of a batch. OLMo-2-32B's curve with its band takes 47 s of CPU and 4.1 GiB at 512 tokens, 11 s and
# 1.1 GiB at 256 (measured).
MOST_TOKENS = 512


def unpredictable(model: ModelConfig, ids: NDArray[np.int64]) -> str | None:
    """Why there is no prediction for these tokens (B, T), or None where there is."""
    if isinstance(model, FamilyConfig):
        return f"theory has no formula for transformers' {model.family}"
    if model.mlp not in UNITS:
        return f"theory has no hidden unit for model.mlp={model.mlp}; it has {', '.join(UNITS)}"
    layers = range(model.depth)
    if model.experts and any("norm_in" not in at(model, i, "mlp").norms for i in layers):
        return "theory has experts (model.experts) only behind a norm, as norm=pre places them"
    if model.v_norm and model.value_embeddings != "none":
        return "theory has no value embeddings (model.value_embeddings) where a norm acts on values"
    if ids.size > MOST_TOKENS:
        return (
            f"theory takes batches of at most {MOST_TOKENS} tokens; this one has {ids.size} "
            "(inputs.batch and inputs.length make it smaller)"
        )
    return _beyond(model)


@dataclass(frozen=True)
class _Traced:
    """A vector of which is known whether a norm's output is in it."""

    normed: bool

    def __add__(self, other: _Traced) -> _Traced:
        return _Traced(self.normed or other.normed)

    def __rmul__(self, scale: float) -> _Traced:
        return self

    def __truediv__(self, scale: float) -> _Traced:
        return self


def _beyond(model: ModelConfig) -> str | None:
    """Why theory has no prediction for tied blocks or for element-wise norms; None where it has."""
    if model.norm.loops not in (None, 1):
        return (
            f"theory takes each matrix for fresh, and norm.loops={model.norm.loops} meets it again"
        )
    if not model.norm.elementwise:
        return None
    if model.norm.shift:
        return f"theory has norm.shift=0 alone; this model's is {model.norm.shift:g}"
    if model.experts:
        return f"theory has experts (model.experts) behind no norm.type={model.norm.type}"
    placement = placement_of(model)
    parts = {*placement.start_parts, *placement.finish_parts}
    parts.update(*(at(model, 0, kind).parts for kind in ("attention", "mlp")))
    if parts - {"laurel"}:  # that takes several vectors, or gives other things
        return f"theory has norm.type={model.norm.type} in no norm.placement={model.norm.placement}"
    state: Any = placement.start(_Traced(False), lambda x: x, model)
    for layer in range(model.depth):
        for kind in ("attention", "mlp"):
            scheme = at(model, layer, kind)
            maps: dict[str, Any] = dict.fromkeys(scheme.norms, lambda x: _Traced(True))
            maps |= dict.fromkeys(scheme.parts, lambda x: _Traced(False))
            state = scheme.step(
                state, lambda x: _Traced(False), lambda skip, branch: skip + branch, **maps
            )
        if any(one.normed for one in vectors(state)) or renorm_after(model, layer):
            name = f"norm.type={model.norm.type}"
            return (
                f"theory has {name} only where sublayers alone get what norms give, as norm=pre; "
                "here it is added to the stream, whose entries then aren't Gaussian"
            )
    return None
