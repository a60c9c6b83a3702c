"""A verdict's claims against the rows that they are about, by scripts/check_sentences.py."""

import pytest
from check_sentences import false_claims
from conftest import tiny

from simlab.experiment import run

PLACEMENTS = {
    "reordered": [], "swin_renorm": ["norm.every=3"], "pre": ["gradients=true"], "post": [], "lns": [],
    "pre_post": [], "residual_scale": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def verdicts():
    """Sentence and rows of each placement."""
    base = ["depth=8", "seeds=8", "engine=weightless", "init=fan_in"]
    runs = {norm: run(tiny(f"norm={norm}", *own, *base)) for norm, own in PLACEMENTS.items()}
    return {norm: (each.verdicts["random"].sentence, each.curve) for norm, each in runs.items()}


@pytest.mark.parametrize("norm", PLACEMENTS)
def test_claims(norm, verdicts):
    """True of its own curve; and the negative control: false of every other placement's."""
    sentence = verdicts[norm][0]
    for other, (_, curve) in verdicts.items():
        assert bool(list(false_claims(sentence, curve))) == (other != norm), other
