"""The catalogue: mistakes in theory's gradient of mixed streams (simlab.theory.mean_field).

``setting`` names what of tests/theory/test_mixing.py, held to autograd, catches it:
step, sum (a step behind which the streams have the same gradient) or head.
"""

from __future__ import annotations

from simlab.theory.mean_field.mixing_gradient import pull_mixed, pull_read, through_coefficients

from .record import Mutation, edit

MIXING = (
    Mutation(
        "own_without_writes",
        "nothing comes through the gates of what is written",
        edit(through_coefficients, "(written + mixed)", "mixed"),
        "step",
    ),
    Mutation(
        "own_without_mixing",
        "nothing comes through the gates of what is read and the streams' mixing",
        edit(through_coefficients, "(written + mixed)", "written"),
        "step",
    ),
    Mutation(
        "own_without_kept",
        "nothing comes through the streams' mixing: κ's slope is left out",
        edit(through_coefficients, "(n - 1) * by.kept_slope * apart * by.apart + ", ""),
        "step",
    ),
    Mutation(
        "own_of_the_sum_alone",
        "a write's gate feels the streams' sum alone",
        edit(through_coefficients, "(total / n**2 + (1 - 1 / n) * apart)", "total / n**2"),
        "step",
    ),
    Mutation(
        "own_of_n_means",
        "the sum's gradient isn't shared among n streams",
        edit(through_coefficients, "total / n**2", "total"),
        "step",
    ),
    Mutation(
        "own_of_a_stream",
        "the logits' fan-in is one stream's, not n",
        edit(through_coefficients, "(n * np.sqrt(", "(np.sqrt("),
        "step",
    ),
    Mutation(
        "streams_not_mixed_back",
        "what sets gradients apart isn't averaged by κ",
        edit(pull_mixed, "by.kept * after.apart", "after.apart"),
        "step",
    ),
    Mutation(
        "read_alike",
        "every stream gets the same of a read: R is left out",
        edit(pull_mixed, " + by.read * heard / (by.n - 1)", ""),
        "sum",
    ),
    Mutation(
        "written_alike",
        "the sublayer gets nothing of what sets gradients apart",
        edit(pull_mixed, "(by.n - 1) * by.write * after.apart", "0 * after.apart"),
        "step",
    ),
    Mutation(
        "head_without_own",
        "nothing comes through the head's gates",
        edit(
            pull_read,
            "own = through_coefficients(by, nothing, nothing, nothing, heard)",
            "own = nothing",
        ),
        "head",
    ),
    Mutation(
        "head_reads_alike",
        "every stream gets the same of the head: R is left out",
        edit(pull_read, "by.read * heard / (by.n - 1) + own", "own"),
        "head",
    ),
    Mutation(
        "head_own_in_the_sum_alone",
        "what comes through the head's gates is the same in every stream",
        edit(pull_read, "by.read * heard / (by.n - 1) + own", "by.read * heard / (by.n - 1)"),
        "head",
    ),
)
