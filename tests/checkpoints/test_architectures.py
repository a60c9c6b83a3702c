"""transformers' pre-norm models through the same blocks: every sublayer's state, and the logits."""

import json

import pytest
import torch
import transformers
from conftest import assert_parity, edit_json, refused, write_olmo

from simlab import build_model, compose
from simlab.checkpoints.formats.hugging_face import ARCHITECTURES
from simlab.model.attention import inverse_frequencies

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 900.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 40,
}  # fmt: skip
CASES = {
    "olmo": ("Olmo", {"num_key_value_heads": 6}),
    "olmo-grouped": ("Olmo", {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}}),
    "llama": ("Llama", {}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3, "shards": "40KB"}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", {"head_dim": 12, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
}
IDS = torch.randint(61, (2, 23), generator=torch.Generator().manual_seed(0))


def pre_norm_states(reference, ids):
    """The residual stream after the embedding and each sublayer, whose output is added as it comes."""
    branches = []

    def keep(module, arguments, output):
        branches.append(output[0] if isinstance(output, tuple) else output)

    handles = [
        module.register_forward_hook(keep)
        for layer in reference.model.layers
        for module in (layer.self_attn, layer.mlp)
    ]
    with torch.no_grad():
        out = reference(ids, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    states = [out.hidden_states[0]]
    for branch in branches:
        states.append(states[-1] + branch)
    for block, hidden in enumerate(out.hidden_states[1:-1], start=1):
        assert_parity(states[2 * block], hidden)
    return states, out.logits


def our_states(folder, ids):
    model = build_model(compose(["source=checkpoint", f"source.path={folder}", "device=cpu"]))
    with torch.no_grad():
        states = [model.embedding(ids)]
        for block in model.blocks:
            for _, step in block.steps():
                states.append(step(states[-1]))
        return states, model(ids)


def assert_same(folder, states, logits, ids=IDS):
    ours, our_logits = our_states(folder, ids)
    for sublayer, (a, b) in enumerate(zip(ours, states, strict=True)):
        assert_parity(a, b, f"sublayer {sublayer}")
    assert_parity(our_logits, logits, "logits")


@pytest.mark.parametrize("case", CASES)
def test_every_hidden_state(tmp_path, case):
    kind, changes = CASES[case]
    reference = write_olmo(tmp_path / "m", **{"kind": kind, **changes})
    assert_same(tmp_path / "m", *pre_norm_states(reference, IDS))


def test_missing_llama3_scaling_is_detected(tmp_path):
    """Negative control: the same weights without Llama 3's scaling are beyond the tolerance."""
    reference = write_olmo(tmp_path / "m", kind="Llama", rope_parameters=LLAMA3)
    states, logits = pre_norm_states(reference, IDS)
    edit_json(tmp_path / "m" / "config.json", rope_parameters={"rope_theta": 900.0})
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "m", states, logits)


@pytest.mark.parametrize(
    ("factor", "high", "length"), [(8.0, 4.0, 8192), (32.0, 4.0, 8192), (2.0, 9.0, 64)]
)
def test_llama3_angles_are_transformers(factor, high, length):
    rope = LLAMA3 | {"factor": factor, "high_freq_factor": high, "rope_theta": 500_000.0}
    rope["original_max_position_embeddings"] = length
    config = transformers.LlamaConfig(head_dim=128, rope_parameters=rope)
    theirs, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config)
    from simlab.config import Llama3RopeConfig

    ours, scale = inverse_frequencies(
        128, 500_000.0, None, torch.device("cpu"), Llama3RopeConfig(factor, 1.0, high, length)
    )
    assert scale == 1.0
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


SHAPE = {
    "vocab_size": 61, "hidden_size": 256, "intermediate_size": 80, "num_hidden_layers": 8,
    "num_attention_heads": 64,
}  # fmt: skip


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_config_defaults_match_transformers(tmp_path, kind):
    from simlab.checkpoints.formats.hugging_face import read_config

    theirs = transformers.AutoConfig.for_model(kind, **SHAPE)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **SHAPE}))
    ours, _ = read_config(tmp_path / "config.json", 100)
    rope = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
    assert ours.norm.eps == getattr(theirs, "rms_norm_eps", 1e-5)
    assert ours.rope_theta == rope["rope_theta"]
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 256 // 64)
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.window == (theirs.sliding_window if kind == "olmo3" else None)
    kinds = getattr(theirs, "layer_types", None) or ["full_attention"] * 8
    assert [ours.window_of(i) is None for i in range(8)] == [k == "full_attention" for k in kinds]


REFUSED = [
    ("Llama", {"attention_bias": True}, "attention_bias=True", "false"),
    ("Llama", {"mlp_bias": True}, "mlp_bias=True", "false"),
    ("Llama", {"rope_parameters": LLAMA3 | {"rope_type": "linear"}}, "'linear'", "llama3"),
    ("Llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor=4", "below"),
    ("Llama", {"rope_parameters": LLAMA3 | {"factor": float("nan")}}, "factor=nan", "number"),
    ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5", "1.0"),
    ("Llama", {"quantization_config": {"bits": 4}}, "quantization_config", "null"),
    ("Llama", {"model_type": "gemma2"}, "model_type='gemma2'", "olmo, olmo2, olmo3, llama, qwen3"),
    ("Llama", {"model_type": "qwen2"}, "model_type='qwen2'", "did you mean qwen3"),
    ("Llama", {"model_type": "olmoe"}, "model_type='olmoe'", "did you mean olmo"),
    ("Olmo", {"clip_qkv": 8.0}, "clip_qkv=8.0", "null"),
    ("Qwen3", {"use_sliding_window": True}, "use_sliding_window=True", "false"),
    ("Qwen3", {"layer_types": ["sliding_attention"] * 5}, "layer_types", "full_attention"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "value", "allowed"), REFUSED)
def test_unsupported_configs_are_refused(tmp_path, kind, changes, value, allowed):
    write_olmo(tmp_path / "m", kind=kind)
    edit_json(tmp_path / "m" / "config.json", **changes)
    refused(tmp_path / "m", value, allowed)
