"""Massive activations: which token, where, by how much. Planted in a checkpoint, and rows by hand."""

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_olmo

from simlab.analysis.massive import JUMP, massive, massive_sentences, token_changes
from simlab.checkpoints.checkpoint import Checkpoint
from simlab.measurement.engine import measure_curves
from simlab.measurement.frame import to_frame
from simlab.report.page.build import warnings

NOTHING_LOST = {"overflow": [], "gradient_overflow": []}
SPECIAL = 7  # the token that is made massive


@cache
def planted(folder: Path, size: float, erase: bool):
    """A Llama in which the MLP of block 2 adds ``size`` to one entry of token SPECIAL; and its module.

    SPECIAL's embedding alone has an entry 0, and no branch writes it. A hidden unit of block 2's MLP
    answers entry 0 by writing entry 1; if ``erase``, one of block 4's answers entry 1 by the negative.
    """
    model = write_olmo(folder, "Llama")
    blocks, embedding = model.model.layers, model.model.embed_tokens.weight
    with torch.no_grad():
        embedding[:, :2] = 0
        embedding[SPECIAL] = torch.eye(1, 48)
        for block in blocks:
            block.input_layernorm.weight.fill_(1)
            block.post_attention_layernorm.weight.fill_(1)
            block.self_attn.o_proj.weight[:2] = 0
            block.mlp.down_proj.weight[:2] = 0
        for block, entry, sign in ((blocks[1], 0, 1), (blocks[3], 1, -int(erase))):
            hidden = []
            for matrix in (block.mlp.gate_proj, block.mlp.up_proj):
                matrix.weight[0] = torch.eye(48)[entry]
            read = block.mlp.down_proj.register_forward_pre_hook(
                lambda _, args, hidden=hidden: hidden.append(args[0][0, 0, 0].item())
            )
            model(torch.tensor([[SPECIAL, 1]]))
            read.remove()
            block.mlp.down_proj.weight[1, 0] = sign * size / hidden[0]
    model.save_pretrained(folder)
    return model


def measured(folder: Path, size: float, erase: bool, *where: tuple[int, int]):
    """curve.csv's rows for three sequences with SPECIAL at some places.

    Also the mean square of the token at the first place, after every step, by transformers.
    """
    model = planted(folder, size, erase)
    ids = torch.randint(10, 61, (3, 11), generator=torch.Generator().manual_seed(0))
    for place in where:
        ids[place] = SPECIAL
    (curve,) = measure_curves(Checkpoint(str(folder)), ids, torch.device("cpu"), torch.float32)
    frame, *_ = to_frame([("checkpoint", 0, curve)], ids.numel() * 48)
    states = []  # what the norms read: the stream after every step
    norms = [n for b in model.model.layers for n in (b.input_layernorm, b.post_attention_layernorm)]
    hooks = [
        norm.register_forward_pre_hook(lambda _, args: states.append(args[0][where[0]]))
        for norm in (*norms, model.model.norm)
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return frame, [state.double().pow(2).mean().item() for state in states]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("massive")


def test_a_planted_token(base):
    frame, truth = measured(base / "erased", 3000.0, True, (1, 4))
    assert frame["max_token"].dtype == np.int64
    jump, fall = token_changes(frame, 3, 11)
    assert (jump.sublayer, jump.block, jump.kind, jump.massive) == (4, 1, "mlp", True)
    assert (fall.sublayer, fall.block, fall.kind, fall.massive) == (8, 3, "mlp", False)
    for change in (jump, fall):
        assert (change.sequence, change.position, change.every) == (1, 4, False)
    assert jump.bound == (frame["max_token"][3] != 15)
    assert 0.2 * truth[4] / truth[3] < jump.factor <= truth[4] / truth[3]
    assert fall.factor == pytest.approx(truth[8] / truth[7], rel=1e-3)
    _, text = massive_sentences(frame, 3, 11, whole=True)
    assert text == (
        f"The token at position 4 of sequence 2 (of 3) jumps {jump.size} at sublayer 4 (the MLP of"
        f" block 2), where the median token's factor is {jump.median:.3g}, and is erased at sublayer 8"
        f" (the MLP of block 4), where it falls {truth[7] / truth[8]:.0f}-fold."
    )


def test_position_0_of_every_sequence(base):
    """Its factor is known although another token was the largest before; and nothing erases it."""
    frame, truth = measured(base / "kept", 3000.0, False, (0, 0), (1, 0), (2, 0))
    (jump,) = token_changes(frame, 3, 11)
    assert (jump.position, jump.every, jump.bound) == (0, True, False)
    assert jump.factor == pytest.approx(truth[4] / truth[3], rel=1e-3)
    text = massive_sentences(frame, 3, 11, whole=True)[1]
    assert text.startswith("Position 0 of every sequence jumps ")
    assert text.endswith(", and stays the largest to the end, sublayer 10.")
    text = massive_sentences(frame, 3, 11, whole=False)[1]
    assert text.endswith(", and stays the largest until the curve ends at sublayer 10.")
    frame, _ = measured(base / "kept", 3000.0, False, (0, 0), (2, 0))  # not of the second
    assert massive_sentences(frame, 3, 11, whole=True)[1].startswith(
        "The token at position 0 of sequence 1 (of 3) jumps at least "
    )


def test_no_jump_without_massive_activations(base):
    """Negative control: the same token grows as suddenly, but to less."""
    frame, truth = measured(base / "small", 80.0, True, (1, 4))
    assert truth[4] / truth[3] > 2 * JUMP
    assert token_changes(frame, 3, 11) == []
    (text,) = massive_sentences(frame, 3, 11, whole=True)
    assert text.startswith("No massive activations (max |x| = ")


def by_hand(largest, token, massive, median=None, first=None):
    """Rows of a curve of blocks of two sublayers: two sequences of five tokens."""
    count = len(largest)
    return pd.DataFrame(
        {
            "sublayer": range(count), "kind": ["embedding", *["attention", "mlp"] * count][:count],
            "block": pd.array([None, *[i // 2 for i in range(count - 1)]], dtype="Int64"),
            "mean_square_max": np.asarray(largest, float), "max_token": token, "massive": massive,
            "mean_square_median": 1.0 if median is None else median,
            "mean_square_first": 1.0 if first is None else first,
            "max_abs": np.asarray(largest, float), "median_abs": 0.5,
        }
    )  # fmt: skip


def story(*rows):
    return massive_sentences(by_hand(*rows), 2, 5, whole=True)[1:]


def test_other_stories():
    assert story([1, 1, 1e4, 1e4, 1e4], [3, 3, 3, 3, 3], [0, 0, 1, 1, 0]) == [
        "The token at position 3 of sequence 1 (of 2) jumps 1.0e4-fold at sublayer 2 (the MLP of block"
        " 1), where the median token's factor is 1; after sublayer 3 no activation is massive any more."
    ]
    jumps = story([1, 50, 5e4, 5e2, 1], [3, 3, 3, 3, 3], [0, 0, 1, 1, 0], [1, 1, 0.5, 1, 1])
    assert jumps == [
        "The token at position 3 of sequence 1 (of 2) jumps 50-fold at sublayer 1 (the attention of"
        " block 1), jumps 1000-fold at sublayer 2 (the MLP of block 1), where the median token's"
        " factor is 0.5, falls 100-fold at sublayer 3 (the attention of block 2), and is erased at"
        " sublayer 4 (the MLP of block 2), where it falls 500-fold."
    ]
    other = story([1, 1e4, 1e6, 1e6, 1e6], [3, 3, 8, 8, 8], [0, 1, 1, 1, 1])
    assert len(other) == 2
    assert other[0].endswith("where the median token's factor is 1.")
    assert other[1].startswith(
        "The token at position 3 of sequence 2 (of 2) jumps at least 100-fold"
    )
    assert other[1].endswith(", and stays the largest to the end, sublayer 4.")
    assert story([1e5, 1e5, 10.0], [9, 9, 2], [1, 1, 0]) == [
        "At the embedding, the first step with them, the token at position 4 of sequence 2 (of 2) is"
        " the largest, its mean square 1.0e5 times the median token's.",
        "The token at position 4 of sequence 2 (of 2) is erased at sublayer 2 (the MLP of block 1),"
        " where it falls at least 1.0e4-fold.",
    ]
    assert story([1, 20, 300, 3000], [3, 3, 3, 3], [0, 0, 1, 1]) == [
        "At sublayer 2 (the MLP of block 1), the first step with them, the token at position 3 of"
        " sequence 1 (of 2) is the largest, its mean square 300 times the median token's; it stays the"
        " largest to the end, sublayer 3.",
        "No token jumps at one step: the largest grows at most 20 times as much as the median token, at"
        " sublayer 1 (the attention of block 1).",
    ]
    assert story([1, 1, 1], [0, 0, 0], [1, 1, 1], None, [1, 1, 1]) == [
        "At the embedding, the first step with them, position 0 of every sequence is the largest, its"
        " mean square 1 times the median token's; it stays the largest to the end, sublayer 2.",
        "No token jumps at one step.",
    ]
    many = [10.0**i for i in (0, 4, 0, 4, 0, 4, 0, 4, 0, 4)]
    assert story(many, [3] * 10, [1] * 10)[5:] == ["1 more such changes follow."]


def test_a_jump_is_beside_the_median_token():
    """All tokens grow alike: no jump; and a token of the only sequence."""
    rows = by_hand([1, 1e4, 1e4], [3, 3, 3], [0, 1, 1], median=[1.0, 1e4, 1e4])
    assert token_changes(rows, 2, 5) == []
    (jump,) = token_changes(by_hand([1, 1e4], [3, 3], [0, 1]), 1, 5)
    assert (jump.factor, jump.median, jump.every) == (1e4, 1.0, False)
    alone = massive_sentences(by_hand([1, 1e4], [3, 3], [0, 1]), 1, 5, whole=True)[1]
    assert alone.startswith("The token at position 3 jumps 1.0e4-fold")


def test_a_token_that_keeps_its_size_does_not_fall():
    """The median token grows 1000-fold beside it, or falls; a token that falls itself is told."""
    steady = by_hand([1e4, 0.99e4, 1e4], [3, 3, 3], [1, 1, 1], median=[1e-3, 1.0, 1e-3])
    assert token_changes(steady, 2, 5) == []
    text = massive_sentences(steady, 2, 5, whole=True)
    assert not any("fold" in line for line in text)
    (fall,) = token_changes(by_hand([1e4, 100], [3, 3], [1, 1], median=[1e-3, 1.0]), 2, 5)
    assert (fall.falls, fall.factor) == (True, 0.01)


def test_largest_of_massive_steps():
    """A later |x| is larger, but not 1000 medians: it isn't called massive; without any it is told."""
    rows = by_hand([1, 1, 1], [3, 3, 3], [1, 0, 0])
    rows["max_abs"], rows["median_abs"] = [240.0, 241.0, 200.0], [0.01, 0.7, 1.0]
    first = massive_sentences(rows, 1, 15, whole=True)[0]
    assert first == (
        "Massive activations at 1 of 3 steps (the largest: |x| = 240, 2.4e4× the median |x|, at"
        " sublayer 0)."
    )
    (warning,) = warnings(
        rows.assign(curve="checkpoint", law_additive=np.nan, eps_factor=np.nan), NOTHING_LOST
    )
    assert "the largest |x| is 240 at sublayer 0, where the median |x| is 0.01." in warning
    none = massive_sentences(rows.assign(massive=0), 1, 15, whole=True)
    assert none == ["No massive activations (max |x| = 241, 344× the median |x|, at sublayer 1)."]


def test_massive_needs_both_conditions():
    """Sun et al. 2024: above 100, and a thousand times the median."""
    frame = pd.DataFrame(
        {"max_abs": [2000.0, 150.0, 90.0, 100.5], "median_abs": [0.2, 1.0, 0.01, 0.1005]}
    )
    assert massive(frame).tolist() == [1, 0, 0, 1]
