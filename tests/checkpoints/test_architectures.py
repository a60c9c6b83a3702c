"""transformers' models through simlab's blocks: every sublayer's state in order, and the logits."""

import json

import pytest
import torch
import transformers
from conftest import PARITY, assert_parity, edit_json, keys_of, refused, write_olmo

from simlab import build_model, compose
from simlab.checkpoints.checkpoint import Checkpoint
from simlab.checkpoints.formats.hugging_face import ARCHITECTURES, read_config
from simlab.checkpoints.formats.hugging_face_gpt import READERS
from simlab.measurement.engine import measure_curves
from simlab.measurement.statistics import STATISTICS
from simlab.schemes.rope import inverse_frequencies

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 900.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 40,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16,
    "beta_fast": 4.0, "beta_slow": 1.0, "rope_theta": 900.0,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 900.0}
LAYERS = ["full_attention", *["sliding_attention"] * 3, "full_attention"]
CASES = {
    "olmo": ("Olmo", {"num_key_value_heads": 6}),
    "olmo-grouped": ("Olmo", {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}}),
    "olmo2": ("Olmo2", {}),
    "olmo2-theta": ("Olmo2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.5}}),
    "olmo2-ungrouped": ("Olmo2", {"num_key_value_heads": 6}),
    "olmo2-one-kv-head": ("Olmo2", {"num_key_value_heads": 1, "num_attention_heads": 4}),
    "olmo2-tied": ("Olmo2", {"tie_word_embeddings": True}),
    "olmo2-sharded": ("Olmo2", {"shards": "40KB"}),
    "olmo3": ("Olmo3", {"sliding_window": 4}),
    "olmo3-yarn": (
        "Olmo3",
        {
            "sliding_window": 7,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN},
        },
    ),
    "olmo3-layers": ("Olmo3", {"sliding_window": 3, "shards": "40KB", "layer_types": LAYERS}),
    "llama": ("Llama", {}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3, "shards": "40KB"}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", {"head_dim": 12, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "shards": "40KB"}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral-whole": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "phi3": ("Phi3", {"sliding_window": 5, "shards": "40KB"}),
    "phi3-partial": ("Phi3", {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.75}}),
    "stablelm": ("StableLm", {"use_qkv_bias": True, "rope_parameters": PLAIN}),
    "stablelm-llama3": ("StableLm", {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}),
    "gpt2": ("GPT2", {}),
    "gpt2-exact": (
        "GPT2",
        {"activation_function": "gelu", "n_inner": None, "tie_word_embeddings": False},
    ),
    "gpt_neox": ("GPTNeoX", {"hidden_act": "gelu_fast"}),
    "gpt_neox-sequential": (
        "GPTNeoX",
        {
            "use_parallel_residual": False,
            "tie_word_embeddings": True,
            "shards": "40KB",
            "rope_parameters": PLAIN | {"partial_rotary_factor": 0.5},
        },
    ),
    "gpt_neox-yarn": ("GPTNeoX", {"rope_parameters": YARN | {"partial_rotary_factor": 1.0}}),
    "qwen3-tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
}
IDS = torch.randint(61, (2, 23), generator=torch.Generator().manual_seed(0))


def sublayer_states(reference, ids, norms_out=True):
    """The residual stream after the embedding and each sublayer, from transformers' own modules.

    norms_out: a norm's output is what is added (OLMo 2 and 3), else the sublayer's own.
    """
    branches = []

    def keep(module, arguments, output):
        branches.append(output[0] if isinstance(output, tuple) else output)

    names = ("post_attention_layernorm", "post_feedforward_layernorm")
    base = reference.base_model
    handles = [
        next(one for name, one in layer.named_children() if name in either).register_forward_hook(
            keep
        )
        for layer in (base.h if hasattr(base, "h") else base.layers)
        for either in (
            [[name] for name in names]
            if norms_out
            else [["self_attn", "attn", "attention"], ["mlp"]]
        )
    ]
    with torch.no_grad():
        out = reference(ids, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    states = [out.hidden_states[0]]
    for branch in branches:
        states.append(states[-1] + branch)
    # Each block's end is also what transformers reports (its last entry is after the final norm).
    for block, hidden in enumerate(out.hidden_states[1:-1], start=1):
        assert_parity(states[2 * block], hidden)
    return states, out.logits


def our_states(folder, ids):
    model = build_model(compose(["source=checkpoint", f"source.path={folder}", "device=cpu"]))
    with torch.no_grad():
        states = [model.embed(ids)]
        for block in model.blocks:
            start = states[-1]
            for _, step in block.steps():
                states.append(step(states[-1], start))
        return states, model(ids)


def assert_same(folder, states, logits, ids=IDS):
    ours, our_logits = our_states(folder, ids)
    for sublayer, (a, b) in enumerate(zip(ours, states, strict=True)):
        assert_parity(a, b, f"sublayer {sublayer}")
    assert_parity(our_logits, logits, "logits")


@pytest.mark.parametrize("case", CASES)
def test_every_hidden_state(tmp_path, case):
    kind, changes = CASES[case]
    reference = write_olmo(tmp_path / "m", kind, **changes)
    assert_same(tmp_path / "m", *sublayer_states(reference, IDS, kind in ("Olmo2", "Olmo3")))


@pytest.mark.parametrize("case", ["olmo2-sharded", "olmo3-yarn", "gpt2", "gpt_neox"])
def test_engine_measures_every_state(tmp_path, case):
    kind, changes = CASES[case]
    reference = write_olmo(tmp_path / "m", kind, **changes)
    states, _ = sublayer_states(reference, IDS, kind in ("Olmo2", "Olmo3"))
    checkpoint = Checkpoint(str(tmp_path / "m"))
    rows = measure_curves(checkpoint, IDS, torch.device("cpu"), torch.float32)[0].rows
    assert [row.sublayer for row in rows] == list(range(len(states)))
    for row, state in zip(rows, states, strict=True):
        x, measured = state.double(), dict(zip(STATISTICS, row.values.tolist(), strict=True))
        expected = x.norm(dim=-1).mean(), x.pow(2).mean(), x.abs().max()
        for name, value in zip(("norm", "mean_square", "max_abs"), expected, strict=True):
            torch.testing.assert_close(measured[name], value.item(), **PARITY)


def test_missing_llama3_scaling_is_detected(tmp_path):
    """Negative control: the same weights without Llama 3's scaling are beyond the tolerance."""
    reference = write_olmo(tmp_path / "m", kind="Llama", rope_parameters=LLAMA3)
    states, logits = sublayer_states(reference, IDS, norms_out=False)
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

    llama3 = Llama3RopeConfig(factor, 1.0, high, length)
    ours, scale = inverse_frequencies(torch.arange(64.0), 128, 500_000.0, None, llama3)
    assert scale == 1.0
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


SHAPE = {
    "vocab_size": 61, "hidden_size": 256, "intermediate_size": 80, "num_hidden_layers": 8,
    "num_attention_heads": 64,
}  # fmt: skip


@pytest.mark.parametrize("kind", READERS)
def test_gpt_defaults_match_transformers(tmp_path, kind):
    shape = keys_of(
        {"gpt2": "GPT2", "gpt_neox": "GPTNeoX"}[kind], SHAPE | {"num_attention_heads": 4}
    )
    theirs = transformers.AutoConfig.for_model(kind, **shape)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **shape}))
    ours, *_ = read_config(tmp_path / "config.json", 100)
    assert ours.tied == theirs.tie_word_embeddings
    if kind == "gpt2":
        assert ours.norm.eps == theirs.layer_norm_epsilon
        assert (ours.positions, ours.mlp) == (theirs.n_positions, "gelu")
    else:
        assert ours.norm.eps == theirs.layer_norm_eps
        assert (ours.norm.placement, ours.mlp) == ("parallel", "gelu_exact")
        rope = theirs.rope_parameters
        assert (ours.rope_theta, ours.rotary) == (rope["rope_theta"], rope["partial_rotary_factor"])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_config_defaults_match_transformers(tmp_path, kind):
    shape = SHAPE | ({"num_attention_heads": 32} if kind == "stablelm" else {})
    theirs = transformers.AutoConfig.for_model(kind, **shape)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **shape}))
    ours, *_ = read_config(tmp_path / "config.json", 100)
    rope = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
    assert ours.norm.eps == getattr(theirs, "rms_norm_eps", getattr(theirs, "layer_norm_eps", 1e-5))
    assert ours.rotary == rope.get("partial_rotary_factor", 1.0)
    assert ours.qkv_bias == getattr(theirs, "use_qkv_bias", kind == "qwen2")
    assert ours.rope_theta == rope["rope_theta"]
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 256 // theirs.num_attention_heads)
    assert ours.tied == theirs.tie_word_embeddings
    windowed = kind in ("olmo3", "mistral", "phi3")
    assert ours.window == (theirs.sliding_window if windowed else None)
    kinds = (
        getattr(theirs, "layer_types", None) or ["sliding" if ours.window else "full_attention"] * 8
    )
    assert [ours.window_of(i) is None for i in range(8)] == [k == "full_attention" for k in kinds]


REFUSED = [
    ("Llama", {"attention_bias": True}, "attention_bias=True", "false"),
    ("Llama", {"mlp_bias": True}, "mlp_bias=True", "false"),
    ("Llama", {"rope_parameters": LLAMA3 | {"rope_type": "linear"}}, "'linear'", "llama3"),
    ("Llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor=4", "below"),
    ("Llama", {"rope_parameters": LLAMA3 | {"factor": float("nan")}}, "factor=nan", "number"),
    ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5", "1.0"),
    ("Llama", {"quantization_config": {"bits": 4}}, "quantization_config", "null"),
    ("Llama", {"model_type": "gemma2"}, "model_type='gemma2'", "olmo, olmo2, olmo3, llama, qwen3, "),
    ("Olmo", {"clip_qkv": 8.0}, "clip_qkv=8.0", "null"),
    ("Qwen3", {"use_sliding_window": True}, "use_sliding_window=True", "false"),
    ("Qwen2", {"use_sliding_window": True}, "use_sliding_window=True", "false"),
    ("Mistral", {"rope_parameters": YARN, "sliding_window": 4}, "sliding_window=4", "scaled RoPE"),
    ("Mistral", {"layer_types": ["full_attention"] * 5}, "layer_types", "null"),
    ("Phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "'longrope'", "default"),
    ("Phi3", {"rope_parameters": YARN}, "scaled RoPE", "phi3"),
    ("StableLm", {"qk_layernorm": True}, "qk_layernorm=True", "false"),
    ("StableLm", {"use_parallel_residual": True}, "use_parallel_residual=True", "false"),
    ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx=True", "false"),
    ("GPT2", {"activation_function": "relu"}, "activation_function='relu'", "gelu_new"),
    ("GPTNeoX", {"attention_bias": False}, "attention_bias=False", "true"),
    ("GPTNeoX", {"rotary_pct": 0.5}, "rotary_pct differs", ""),
    ("GPTNeoX", {"rotary_emb_base": 99.0}, "rotary_emb_base differs", ""),
    ("GPTNeoX", {"rope_parameters": {"partial_rotary_factor": 0.2}}, "rotary_pct=0.2", "even"),
    ("Qwen3", {"layer_types": ["sliding_attention"] * 5}, "layer_types", "full_attention"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "value", "allowed"), REFUSED)
def test_unsupported_configs_are_refused(tmp_path, kind, changes, value, allowed):
    write_olmo(tmp_path / "m", kind=kind)
    edit_json(tmp_path / "m" / "config.json", **changes)
    refused(tmp_path / "m", value, allowed)
