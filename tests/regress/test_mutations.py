"""Plausible mistakes (scripts/mutations): each is caught by a gate of simlab.regress, or by parity.

Those that change the law of the curves by the statistical gate: curves of other seeds against 32
right ones, all statistics at all steps. 4 show most mistakes, 12 or 32 the others. What a record says
of itself, ``shifts`` or not, is held against that too.
"""

import pytest
import torch
from mutation_table import SEEDS, judged, outcomes, parity
from mutations import MUTATIONS, NO_MISTAKE, SETTINGS, Edit, Mutation, applied
from mutations.attention import ATTENTION, MLP
from mutations.norms import NORM

from simlab.model.placement import ResidualAdd

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SOME = 12  # seeds; the law's gate takes no fewer than 11
# Where mistakes are: the blame must name it, maybe beside what the curve can't tell from it.
IN = dict.fromkeys((m.name for m in ATTENTION), "attention")
IN |= dict.fromkeys((m.name for m in MLP), "mlp") | dict.fromkeys((m.name for m in NORM), "norm")
IN |= dict.fromkeys(
    ("norm_before", "norm_before_and_after", "norm_of_stream", "norm_forgotten",
     "norm_forgotten_on_mlp", "norm_twice", "lns_without_root", "lns_from_0", "peri_without_norm_in"),
    "norm",
) | dict.fromkeys(
    ("residual_missing", "branch_twice", "deepnorm_alpha", "residual_scale_beta",
     "stream_before_the_add"),
    "residual add",
) | dict.fromkeys(
    ("renorm_every_7", "renorm_counted_from_0", "renorm_first", "mlp_first", "last_block_skipped"),
    "structure",
) | {
    "std_forgotten_on_down": "mlp", "std_forgotten_on_k": "attention", "embedding_scaled": "embedding",
    "weightless_sigma_forgotten": "mlp", "weightless_q_is_k": "attention",
    "weightless_gate_is_up": "mlp", "loss_over_all_tokens": "loss",
}  # fmt: skip
BY_SETTING = sorted(MUTATIONS, key=lambda mutation: [*SETTINGS].index(mutation.setting))


@pytest.mark.parametrize("mutation", BY_SETTING, ids=lambda mutation: mutation.name)
def test_every_mistake_is_caught(mutation):
    if mutation.shifts:
        gate = ["statistical"]
        tries = (judged(mutation, seeds, gate)["statistical"] for seeds in (4, SOME, SEEDS))
        caught = next((outcome for outcome in tries if not outcome.passed), None)
        assert caught
        assert IN.get(mutation.name, "") in caught.finding.blame
    else:
        for outcome in judged(mutation, SOME, ["statistical", "law"]).values():
            assert outcome.passed, outcome
        assert parity(mutation)


@pytest.mark.parametrize("setting", SETTINGS)
def test_other_seeds_are_no_mistake(setting):
    """Negative control: a false alarm in 1 of 1000 runs a setting, and seeds are fixed."""
    for gate, outcome in outcomes(setting, first=100, seeds=SOME).items():
        assert outcome.passed, (gate, outcome)


def test_the_right_model_agrees_with_transformers():
    assert not parity(None)


def test_equivalent_edit_passes():
    """RoPE's positions counted from 1."""
    assert judged(NO_MISTAKE, SOME, ["statistical"])["statistical"].passed
    assert not parity(NO_MISTAKE)


def test_the_catalogue():
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names) > 25
    assert {mutation.setting for mutation in MUTATIONS} <= set(SETTINGS)
    assert sum(not mutation.shifts for mutation in MUTATIONS) > 5


def test_mutation_is_undone():
    add, x = ResidualAdd(), torch.ones(3)
    twice = Mutation("", "", (Edit(ResidualAdd.forward, "skip + branch", "skip + 2 * branch"),))

    def fails():
        with applied(twice):
            assert torch.equal(add(x, x), 3 * x)
            raise KeyError

    before = ResidualAdd.forward.__code__
    with pytest.raises(KeyError):
        fails()
    assert ResidualAdd.forward.__code__ is before
    assert torch.equal(add(x, x), 2 * x)


def test_stale_edits_are_errors():
    for words in ("skip * branch", "branch"):  # not at all, and more than once
        stale = Mutation("", "", (Edit(ResidualAdd.forward, words, ""),))
        with pytest.raises(ValueError, match="not once"), applied(stale):
            pass
