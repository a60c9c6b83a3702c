"""Memory and time of a predicted curve, by constants measured on one busy core."""

from __future__ import annotations

from simlab.analysis.numbers import gigabytes
from simlab.budget.machine import MIB, available
from simlab.config import ConfigError, RunConfig

# Seconds of a sublayer: one part whatever the N tokens, one per entry of a kernel (N, N), one per N³.
# Of ten curves of 16 to 512 tokens, 4 to 32 blocks, most with gradients, 0.6 to 1.3 of the time; of
# five of 16 to 256 tokens 1.0 to 1.2 of the peak.
STEP, ENTRY, CUBE = 4e-3, 7e-7, 3.2e-9
GRADIENT_STEP, GRADIENT_ENTRY = 0.03, 2e-6  # further seconds, with gradients
KERNELS = 22  # float64 arrays (N, N) that a sublayer leaves for the band
ROUTED = 5  # more of them with experts: nine of every second sublayer, counted
WITHOUT_TORCH = 140 * MIB  # resident once pandas and matplotlib are imported


def prediction_cost(config: RunConfig) -> tuple[int, float]:
    """Bytes of a predicted curve's arrays, and its seconds; its inputs must be known."""
    tokens = (config.inputs.batch or 1) * (config.inputs.length or 1)
    steps = 2 * config.shape.depth
    seconds = STEP + ENTRY * tokens**2 + CUBE * tokens**3
    if config.gradients:
        seconds += GRADIENT_STEP + GRADIENT_ENTRY * tokens**2
    kernels = KERNELS + ROUTED * bool(config.shape.experts)
    return 8 * kernels * steps * tokens**2, steps * seconds


def refuse_prediction(config: RunConfig) -> None:
    """Raise ConfigError for a predicted curve that needs more memory than there is."""
    free, size = available("cpu"), WITHOUT_TORCH + prediction_cost(config)[0]
    if free is not None and size > free:
        tokens = f"inputs.batch={config.inputs.batch} inputs.length={config.inputs.length}"
        raise ConfigError(
            f"engine=theory depth={config.shape.depth} {tokens}: needs about {gigabytes(size)}, "
            f"{gigabytes(free)} are free; it grows with the square of the tokens"
        )
