"""Memory and time of a predicted curve, by constants measured on one busy core."""

from __future__ import annotations

from simlab.analysis.numbers import gigabytes
from simlab.budget.machine import MIB, available
from simlab.config import ConfigError, RunConfig
from simlab.schemes.placement import PLACEMENTS
from simlab.schemes.scheme import Scheme

# Seconds of a sublayer: one part whatever the N tokens, one per entry of a kernel (N, N), one per N³.
# Of ten curves of 16 to 512 tokens, 4 to 32 blocks, most with gradients, 0.6 to 1.3 of the time.
STEP, ENTRY, CUBE = 4e-3, 7e-7, 3.2e-9
GRADIENT_STEP, GRADIENT_ENTRY = 0.03, 2e-6  # further seconds, with gradients
# Float64 arrays (N, N) that a sublayer leaves for the band: eight are attention's 16 drawn heads, in
# float32, shared by its two sublayers. The first two blocks draw 128 heads.
KERNELS, FIRST_HEADS = 17, 56
ROUTED = 5  # more of them with experts: nine of every second sublayer, counted
CARRIED = 15  # more of a sublayer where the state is more than the stream
PASSING, PASSING_GRADIENT = 40, 30  # those that a step of the way back makes and frees
FIXED = 24 * MIB  # drawn numbers, and a piece of the heads in float64
WITHOUT_TORCH = 140 * MIB  # resident once pandas and matplotlib are imported


def prediction_cost(config: RunConfig) -> tuple[int, float]:
    """Bytes of a predicted curve's arrays, and its seconds; its inputs must be known.

    Of five processes of 128 to 512 tokens, 2 to 16 blocks, two with gradients, two with several
    vectors, the bytes were 0.91 to 1.03 of the peak beyond the imports.
    """
    tokens = (config.inputs.batch or 1) * (config.inputs.length or 1)
    steps = 2 * config.shape.depth
    seconds = STEP + ENTRY * tokens**2 + CUBE * tokens**3
    if config.gradients:
        seconds += GRADIENT_STEP + GRADIENT_ENTRY * tokens**2
    kernels = KERNELS + ROUTED * bool(config.shape.experts)
    # A family that transformers computes has a placement of its own.
    if PLACEMENTS.get(config.shape.norm.placement, Scheme).finish is not Scheme.finish:
        kernels += CARRIED
    kernels = steps * kernels + FIRST_HEADS * min(2, config.shape.depth)
    kernels += PASSING + PASSING_GRADIENT * config.gradients
    return FIXED + 8 * kernels * tokens**2, steps * seconds


def refuse_prediction(config: RunConfig) -> None:
    """Raise ConfigError for a predicted curve that needs more memory than there is."""
    free, size = available("cpu"), WITHOUT_TORCH + prediction_cost(config)[0]
    if free is not None and size > free:
        tokens = f"inputs.batch={config.inputs.batch} inputs.length={config.inputs.length}"
        raise ConfigError(
            f"engine=theory depth={config.shape.depth} {tokens}: needs about {gigabytes(size)}, "
            f"{gigabytes(free)} are free; it grows with the square of the tokens"
        )
