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
        edit(through_coefficients, "(of_write + of_others)", "of_others"),
        "step",
    ),
    Mutation(
        "own_without_mixing",
        "nothing comes through the gates of what is read and the streams' mixing",
        edit(through_coefficients, "(of_write + of_others)", "of_write"),
        "step",
    ),
    Mutation(
        "own_without_kept",
        "nothing comes through the streams' mixing: κ's slope is left out",
        edit(through_coefficients, "(n - 1) * mixed.kept_slope", "0 * mixed.kept_slope"),
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
        edit(pull_mixed, "mixed.kept * after.apart", "after.apart"),
        "step",
    ),
    Mutation(
        "read_alike",
        "every stream gets the same of a read: R is left out",
        edit(pull_mixed, " + mixed.read * read / (mixed.n - 1)", ""),
        "sum",
    ),
    Mutation(
        "written_alike",
        "the sublayer gets nothing of what sets gradients apart",
        edit(pull_mixed, "(mixed.n - 1) * mixed.write * after.apart", "0 * after.apart"),
        "step",
    ),
    Mutation(
        "head_without_own",
        "nothing comes through the head's gates",
        edit(
            pull_read,
            "through_coefficients(mixed, nothing, nothing, nothing, read)",
            "nothing.copy()",
        ),
        "head",
    ),
    Mutation(
        "head_reads_alike",
        "every stream gets the same of the head: R is left out",
        edit(pull_read, "mixed.read * read / (mixed.n - 1) + logits", "logits"),
        "head",
    ),
    Mutation(
        "head_own_in_the_sum_alone",
        "what comes through the head's gates is the same in every stream",
        edit(pull_read, " / (mixed.n - 1) + logits", " / (mixed.n - 1)"),
        "head",
    ),
)
