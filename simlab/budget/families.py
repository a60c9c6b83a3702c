"""Memory and time of a curve that transformers computes, from its sizes: rougher than of others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simlab.budget.machine import MIB, Rates
from simlab.config import FamilyConfig

if TYPE_CHECKING:
    from simlab.budget.cost import Curve

CODE = 160 * MIB  # transformers' modules and the model's, once imported, measured
DRAWN = 4.0  # Rates.number of a number that torch's own generator draws, on one thread
STREAM_BYTES = 100  # of an entry of the stream: a block's activations, copies in float64


def family_peak(curve: Curve, model: FamilyConfig) -> int:
    """Peak bytes beyond INTERPRETER: two blocks, the tokens' rows, the stream, attention's matrices.

    Measured beyond CODE, for 64 tokens: 1.45 blocks of a Mistral (64 MiB each), 1.9 of a Mixtral, whose
    experts are fused as they are read; drawn 1.5 and 1.6.
    """
    numbers = 4 if not curve.stored else curve.size  # random inits are drawn in float32
    blocks = model.block_parameters * (curve.size + numbers)
    rows = min(curve.tokens, model.vocab_size) * model.width * (curve.size + 4)
    hidden = 4 * curve.tokens * model.d_ff * curve.size
    attention = 3 * curve.batch * model.heads * curve.length**2 * (curve.size + 4)
    return CODE + blocks + rows + hidden + attention + STREAM_BYTES * curve.tokens * model.width


def family_seconds(curve: Curve, model: FamilyConfig, rates: Rates) -> float:
    """Seconds of measuring all seeds: each weight is read or drawn once, and multiplied as if dense."""
    made = 2 * rates.entry if curve.stored else DRAWN * rates.number
    products = 2 * curve.tokens * rates.product
    return curve.seeds * model.parameters * (made + products)
