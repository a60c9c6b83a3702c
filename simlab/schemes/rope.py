"""RoPE's angle per position and pair of channels, with the long-context scalings; without torch."""

from __future__ import annotations

import math
from typing import Any

from simlab.config import Llama3RopeConfig, YarnConfig


def inverse_frequencies(
    pairs: Any,
    head_dim: int,
    theta: float,
    yarn: YarnConfig | None = None,
    llama3: Llama3RopeConfig | None = None,
    linear: float | None = None,
) -> tuple[Any, float]:
    """RoPE's angle per position, θ^(−2i/C) for each of the C/2 pairs, and a factor on cos and sin.

    With YaRN (arXiv 2309.00071, §3.2–3.4) pairs that turn fewer than ``beta_slow`` times within the
    original length are slowed down by ``factor``, those above ``beta_fast`` are kept, with a linear
    ramp over the pair's index between; cos and sin are scaled by 0.1·ln(factor) + 1.

    With Llama 3.1's scaling (arXiv 2407.21783) pairs that turn fewer than ``low_freq_factor`` times
    within the original length are slowed down by ``factor``, those above ``high_freq_factor`` are
    kept, with a linear ramp over the turns between. With ``linear`` every angle is divided by it
    (arXiv 2306.15595).

    pairs: 0 … C/2 − 1 as a float tensor or array (C/2,), and so is the result, in radians per position.
    """
    angles = 1.0 / theta ** (2 * pairs / head_dim)
    if linear is not None:
        return angles / linear, 1.0
    if llama3 is not None:
        turns = llama3.original_length * angles / (2 * math.pi)
        low, high = llama3.low_freq_factor, llama3.high_freq_factor
        faster = ((turns - low) / (high - low)).clip(0, 1)
        return angles * faster + angles / llama3.factor * (1 - faster), 1.0
    if yarn is None:
        return angles, 1.0

    def pair_turning(times: float) -> float:
        """The (real-valued) index of the pair that turns ``times`` times within the original length."""
        ratio = yarn.original_length / (times * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(theta))

    first = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    last = min(math.ceil(pair_turning(yarn.beta_slow)), head_dim - 1)
    slowed = ((pairs - first) / max(last - first, 1e-3)).clip(0, 1)
    stated = yarn.attention_factor
    factor = 0.1 * math.log(yarn.factor) + 1.0 if stated is None else stated
    return angles / yarn.factor * slowed + angles * (1 - slowed), factor
