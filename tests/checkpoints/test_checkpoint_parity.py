"""Every hidden state of transformers' OLMo-2 and OLMo-3, in the order sublayers happen."""

import pytest
import torch
from conftest import PARITY, write_olmo
from test_architectures import assert_same

from simlab.checkpoints.checkpoint import Checkpoint
from simlab.measurement.engine import measure_curves
from simlab.measurement.statistics import STATISTICS

YARN = {
    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16,
    "beta_fast": 4.0, "beta_slow": 1.0, "rope_theta": 900.0,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 900.0}
CASES = {
    "olmo2": {},
    "olmo2-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.5}},
    "olmo2-ungrouped": {"num_key_value_heads": 6},
    "olmo2-one-kv-head": {"num_key_value_heads": 1, "num_attention_heads": 4},
    "olmo2-tied": {"tie_word_embeddings": True},
    "olmo2-sharded": {"shards": "40KB"},
    "olmo3": {"kind": "Olmo3", "sliding_window": 4},
    "olmo3-yarn": {
        "kind": "Olmo3",
        "sliding_window": 7,
        "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN},
    },
    "olmo3-layers": {
        "kind": "Olmo3",
        "sliding_window": 3,
        "shards": "40KB",
        "layer_types": ["full_attention", *["sliding_attention"] * 3, "full_attention"],
    },
}


def sublayer_states(reference, ids):
    """The residual stream after the embedding and each sublayer, from transformers' own modules."""
    states, branches = [], []
    handles = [reference.model.embed_tokens.register_forward_hook(lambda m, a, o: states.append(o))]
    for layer in reference.model.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            handles.append(norm.register_forward_hook(lambda m, a, o: branches.append(o)))
    with torch.no_grad():
        out = reference(ids, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    for branch in branches:
        states.append(states[-1] + branch)
    # Each block's end is also what transformers reports (its last entry is after the final norm).
    for block, hidden in enumerate(out.hidden_states[1:-1], start=1):
        torch.testing.assert_close(states[2 * block], hidden, **PARITY)
    return states, out.logits


@pytest.mark.parametrize("case", CASES)
def test_every_hidden_state(tmp_path, case):
    reference = write_olmo(tmp_path / "m", **{"kind": "Olmo2", **CASES[case]})
    ids = torch.randint(61, (2, 23), generator=torch.Generator().manual_seed(0))
    assert_same(tmp_path / "m", *sublayer_states(reference, ids), ids)


@pytest.mark.parametrize("case", ["olmo2-sharded", "olmo3-yarn"])
def test_engine_measures_every_state(tmp_path, case):
    reference = write_olmo(tmp_path / "m", **{"kind": "Olmo2", **CASES[case]})
    ids = torch.randint(61, (3, 23), generator=torch.Generator().manual_seed(0))
    states, _ = sublayer_states(reference, ids)
    checkpoint = Checkpoint(str(tmp_path / "m"))
    rows = measure_curves(checkpoint, ids, torch.device("cpu"), torch.float32)[0].rows
    assert [row.sublayer for row in rows] == list(range(len(states)))
    for row, state in zip(rows, states, strict=True):
        x, found = state.detach().double(), dict(zip(STATISTICS, row.values.tolist(), strict=True))
        expected = x.norm(dim=-1).mean(), x.pow(2).mean(), x.abs().max()
        for name, value in zip(("norm", "mean_square", "max_abs"), expected, strict=True):
            torch.testing.assert_close(found[name], value.item(), **PARITY)
