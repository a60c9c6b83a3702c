"""Memory and time of a predicted curve (``engine=theory``), by constants measured on one busy core."""

from __future__ import annotations

from simlab.analysis.numbers import gigabytes
from simlab.budget.machine import MIB, available
from simlab.config import ConfigError, RunConfig

# Seconds of a sublayer: one part whatever the N tokens, one per entry of a kernel (N, N), one per N³.
# Of five curves of 16 to 256 tokens, 16 to 64 blocks, 0.7 to 1.4 of the time, 1.0 to 1.2 of the peak.
STEP, ENTRY, CUBE = 4e-3, 7e-7, 3.2e-9
GRADIENTS = 2.0  # times the time
KERNELS = 22  # float64 arrays (N, N) that a sublayer leaves for the band
WITHOUT_TORCH = 140 * MIB  # resident once pandas and matplotlib are imported


def prediction_cost(config: RunConfig) -> tuple[int, float]:
    """Peak bytes of the process, and seconds, of a predicted curve; its inputs must be known."""
    tokens = (config.inputs.batch or 1) * (config.inputs.length or 1)
    steps = 2 * config.shape.depth
    seconds = steps * (STEP + ENTRY * tokens**2 + CUBE * tokens**3)
    size = WITHOUT_TORCH + 8 * KERNELS * steps * tokens**2
    return size, seconds * (GRADIENTS if config.gradients else 1)


def refuse_prediction(config: RunConfig) -> None:
    """Raise ConfigError for a predicted curve that needs more memory than there is."""
    free, (size, _) = available("cpu"), prediction_cost(config)
    if free is not None and size > free:
        tokens = f"inputs.batch={config.inputs.batch} inputs.length={config.inputs.length}"
        raise ConfigError(
            f"engine=theory depth={config.shape.depth} {tokens}: needs about {gigabytes(size)}, "
            f"{gigabytes(free)} are free; it grows with the square of the tokens"
        )
