"""Decoder families of transformers: which steps the probe finds, and the stream that it measures."""

from pathlib import Path

import pytest
import transformers
from conftest import PARITY
from families import found_in

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
        x = x.double()
        assert row["mean_square"] == pytest.approx(x.square().mean().item(), rel=PARITY["rtol"])
        assert row["max_abs"] == pytest.approx(x.abs().max().item(), rel=PARITY["rtol"])
        assert row["mean_square_first"] == pytest.approx(
            x[:, 0].square().mean().item(), rel=PARITY["rtol"]
        )
