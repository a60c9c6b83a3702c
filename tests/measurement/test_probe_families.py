"""Decoder families of transformers: which steps the probe finds, and the stream that it measures."""

from pathlib import Path

import pytest
import torch
import transformers
from conftest import PARITY
from families import found_in, tiny

import simlab

PAGE = Path(__file__).parents[2] / "docs" / "probe.md"
TABLE = {  # what must be found, by family
    family: steps
    for line in PAGE.read_text(encoding="utf-8")
    .split("| steps | model types |\n")[1]
    .splitlines()[1:]
    if line.startswith("| ")
    for steps, families in [line.strip("| ").split(" | ")]
    for family in families.split(", ")
}
# Their ``hidden_states`` begin with the first block's output.
WITHOUT_EMBEDDING = {"falcon_mamba", "mamba", "mamba2", "rwkv"}

STREAMS = {"gemma3n_text": 0, "deepseek_v4": 2}  # of several: along which axis


@pytest.mark.parametrize("family", TABLE)
def test_families(family):
    transformers.logging.set_verbosity_error()
    probed, out, found = found_in(family)
    assert found == TABLE[family]
    if probed is None:
        return
    states = probed.rows().drop_duplicates("block", keep="last")
    hidden = out.hidden_states[: len(states) - 1]  # the one after the last block is after a norm
    states = states.iloc[int(family in WITHOUT_EMBEDDING) :]
    assert len(hidden) >= 3
    for x, (_, row) in zip(hidden, states.iterrows(), strict=False):
        x = (
            x.double()
            if family not in STREAMS
            else x.double().movedim(STREAMS[family], 1).flatten(0, 1)
        )
        assert row["mean_square"] == pytest.approx(x.square().mean().item(), rel=PARITY["rtol"])
        assert row["max_abs"] == pytest.approx(x.abs().max().item(), rel=PARITY["rtol"])
        assert row["mean_square_first"] == pytest.approx(
            x[:, 0].square().mean().item(), rel=PARITY["rtol"]
        )


@pytest.mark.parametrize("family", ["bert", "bloom"])
def test_attention_weights_of_another_submodule(family):
    """Given beside or around the one whose output is added; on the first batch and on later ones."""
    model, ids = tiny(family), torch.arange(3, 36).view(3, 11)
    with torch.no_grad(), simlab.probe(model) as probed:
        weights = [
            model(ids[i:], output_attentions=True, use_cache=False).attentions for i in (0, 2)
        ]
    rows = probed.rows()
    rows = rows[rows["attention_entropy"].notna()]
    assert set(rows["kind"]) == {"attention"}
    for of, (_, row) in zip(zip(*weights, strict=True), rows.iterrows(), strict=True):
        weight = torch.cat(of).double()
        entropy = torch.special.entr(weight).sum(-1).mean().item()
        assert row["attention_entropy"] == pytest.approx(entropy, rel=PARITY["rtol"])
        first = weight[:, :, 1:, 0].mean().item()
        assert row["attention_first"] == pytest.approx(first, rel=PARITY["rtol"])
