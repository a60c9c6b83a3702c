"""Memory and time of a curve that transformers computes, from its sizes: rougher than of others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simlab.budget.machine import MIB, Rates
from simlab.config import FamilyConfig

if TYPE_CHECKING:
    from simlab.budget.cost import Curve

CODE = 160 * MIB  # transformers' modules and the model's, once imported, measured
_AUTOGRAD = 20 * MIB  # what torch imports for its first gradient
_PIECE = 16 * MIB  # rows of the head that are in memory at a time, in float32
# Rates.number of a number that torch's generator draws, with what is written for it: measured, 1.15. A
# family that cuts its normals takes five times as long.
DRAWN = 1.2
_READ = 3  # passes over a weight that is read
_STEP_PASSES = 24  # of a block's statistics, over the stream
_ATTENTION_PASSES = 5  # of the attention matrices' statistics
STREAM_BYTES = 100  # of an entry of the stream: a block's activations, copies in float64


def family_peak(curve: Curve, model: FamilyConfig) -> int:
    """Peak bytes beyond INTERPRETER: two blocks, the tokens' rows, the stream, attention's matrices.

    Of the sequences that pass together. Measured beyond CODE, for 64 tokens: 1.45 blocks of a Mistral
    (64 MiB each), 1.9 of a Mixtral, whose experts are fused as they are read; drawn 1.5 and 1.6. On
    five runs of four model types of width 1024 (64 or 1024 tokens, three with gradients) it was 0.97 to
    1.22 of the peak beyond INTERPRETER, 286 to 657 MB.
    """
    tokens = curve.together * curve.length
    numbers = 4 if not curve.stored else curve.size  # random inits are drawn in float32
    blocks = model.block_parameters * (curve.size + numbers)
    rows = min(tokens, model.vocab_size) * model.width * (curve.size + 4)
    hidden = 4 * tokens * model.d_ff * curve.size
    attention = 3 * curve.together * model.heads * curve.length**2 * (curve.size + 4)
    stream = STREAM_BYTES * tokens * model.width
    if curve.gradients:  # logits of a piece of the head, and every stream
        columns = min(model.vocab_size, _PIECE // (4 * model.width))
        stream += _AUTOGRAD + 3 * _PIECE + 12 * tokens * columns
        stream += (model.depth + 3) * tokens * model.width * curve.size
    return CODE + blocks + rows + hidden + attention + stream


def family_seconds(curve: Curve, model: FamilyConfig, rates: Rates) -> float:
    """Seconds of measuring all seeds: blocks are read or drawn once for each group of sequences, with
    gradients twice, and the head twice. Products are counted as if dense, with all experts.
    On the same runs it was 0.85 to 1.30 of the processor's time, 2.4 to 10.8 s. Random inits of a
    family that cuts its normals (``trunc_normal_``) take up to five times as long as this says.
    """
    groups, back = -(-curve.batch // curve.together), int(curve.gradients)
    blocks, table = model.depth * model.block_parameters, model.vocab_size * model.width
    weights = groups * (1 + back) * blocks + (1 + 2 * back * groups) * table
    made = _READ * rates.entry if curve.stored else DRAWN * rates.number
    products = 2 * curve.tokens * ((1 + 2 * back) * blocks + 3 * back * table)
    entries = _STEP_PASSES * model.width + _ATTENTION_PASSES * model.heads * curve.length
    entries *= model.depth * curve.tokens * (1 + back)
    one = weights * made + products * rates.product + entries * rates.entry
    return curve.seeds * one
