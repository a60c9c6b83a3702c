"""transformers' models through simlab's blocks: every sublayer's state in order, and the logits."""

import json

import pytest
import torch
import transformers
from conftest import CHECKPOINT, PARITY, assert_parity, edit_json, keys_of, refused, write_olmo
from safetensors.torch import load_file, save_file

from simlab import build_model, compose
from simlab.checkpoints.checkpoint import Checkpoint
from simlab.checkpoints.formats.hugging_face import ARCHITECTURES, read_config
from simlab.checkpoints.formats.hugging_face_gpt import READERS
from simlab.measurement.engine import measure_curves
from simlab.measurement.statistics import STATISTICS
from simlab.model.placement import start
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
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16,
            "sliding_window": 4,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 5,
        },
    ),
    "gemma2-uncapped": (
        "Gemma2",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window": 7,
            "layer_types": LAYERS,
            "shards": "40KB",
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 4,
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 40,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3-linear": (
        "Gemma3Text",
        {
            "sliding_window": 5,
            "layer_types": LAYERS,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
        },
    ),
    "qwen3-tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "olmoe": ("Olmoe", {"num_experts": 5, "num_experts_per_tok": 3}),
    "olmoe-renormalised": ("Olmoe", {"num_experts": 11, "norm_topk_prob": True, "shards": "40KB"}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "mixtral-window": ("Mixtral", {"num_local_experts": 3, "sliding_window": 5, "head_dim": 12}),
}
NORMS_OUT = ("Olmo2", "Olmo3", "Gemma2", "Gemma3Text")  # families that norm what they add
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
        state = start(model.embed(ids), model.config)
        states = [state]
        for block in model.blocks:
            for _, step in block.steps():
                state = step(state)
                states.append(block.placement.watch(state))
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
    assert_same(tmp_path / "m", *sublayer_states(reference, IDS, kind in NORMS_OUT))


def test_older_gemma3_config(tmp_path):
    """As versions before 5 wrote it: θs and scaling beside each other, a number for the pattern."""
    scaling = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
               "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}}  # fmt: skip
    kinds = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    own = {"sliding_window": 5, "layer_types": kinds, "rope_parameters": scaling}
    reference = write_olmo(tmp_path / "m", "Gemma3Text", **own)
    states = sublayer_states(reference, IDS)
    older = {"sliding_window_pattern": 2, "rope_theta": 900.0, "rope_local_base_freq": 30.0,
             "rope_scaling": {"type": "linear", "factor": 8.0}, "rope_parameters": None,
             "layer_types": None}  # fmt: skip
    edit_json(tmp_path / "m" / "config.json", **older)
    assert_same(tmp_path / "m", *states)
    for wrong in ({"rope_local_base_freq": 900.0}, {"rope_scaling": None}, {"rope_theta": 30.0}):
        edit_json(tmp_path / "m" / "config.json", **older | wrong)  # negative controls
        with pytest.raises(AssertionError):
            assert_same(tmp_path / "m", *states)


@pytest.mark.parametrize("older", [False, True])
def test_gemma3_with_images(tmp_path, older):
    """Its text part is measured, and what isn't is said."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
             "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}  # fmt: skip
    text = CHECKPOINT | {"head_dim": 8, "sliding_window": 5}
    config = transformers.Gemma3Config(text_config=text, vision_config=sizes, mm_tokens_per_image=4)
    torch.manual_seed(1)
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in whole.model.language_model.parameters():
            parameter.normal_(0, 0.15)
    whole.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    if older:  # as versions before 4.52 named them
        names = {"model.language_model.": "language_model.model.", "model.vision": "vision",
                 "model.multi": "multi"}  # fmt: skip
        for new, old in names.items():
            files = {name.replace(new, old): tensor for name, tensor in files.items()}
        save_file(files, tmp_path / "model.safetensors")
    with torch.no_grad():
        theirs = whole(IDS, output_hidden_states=True)
    ours, logits = our_states(tmp_path, IDS)
    for state, hidden in zip(ours[:-1:2], theirs.hidden_states[:-1], strict=True):
        assert_parity(state, hidden)
    assert_parity(logits, theirs.logits, "logits")
    unread = Checkpoint(str(tmp_path)).unread
    assert f"not used: {sum('vision' in n or 'multi' in n for n in files)} tensors" in unread
    edit_json(tmp_path / "config.json", text_config=text | {"query_scale": 2})
    refused(tmp_path, "query_scale=2")


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


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_gemma_defaults_match_transformers(tmp_path, kind):
    theirs = transformers.AutoConfig.for_model(kind)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    ours, *_ = read_config(tmp_path / "config.json", 100)
    names = {
        "width": "hidden_size", "d_ff": "intermediate_size", "heads": "num_attention_heads",
        "depth": "num_hidden_layers", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
        "vocab_size": "vocab_size", "query_pre_attn_scalar": "query_pre_attn_scalar",
        "window": "sliding_window", "attention_softcap": "attn_logit_softcapping",
        "logit_softcap": "final_logit_softcapping", "tied": "tie_word_embeddings",
    }  # fmt: skip
    for name, their_name in names.items():
        assert getattr(ours, name) == getattr(theirs, their_name), name
    assert ours.norm.eps == theirs.rms_norm_eps
    full = [kind == "full_attention" for kind in theirs.layer_types]
    assert [ours.window_of(i) is None for i in range(ours.depth)] == full
    if kind == "gemma2":
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    else:
        thetas = [
            theirs.rope_parameters[f"{k}_attention"]["rope_theta"] for k in ("full", "sliding")
        ]
        assert [ours.rope_theta, ours.rope_local_theta] == thetas


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
    of_width = 256 // theirs.num_attention_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", of_width) or of_width)
    assert ours.tied == theirs.tie_word_embeddings
    windowed = kind in ("olmo3", "mistral", "phi3")
    assert ours.window == (theirs.sliding_window if windowed else None)
    kinds = (
        getattr(theirs, "layer_types", None) or ["sliding" if ours.window else "full_attention"] * 8
    )
    assert [ours.window_of(i) is None for i in range(8)] == [k == "full_attention" for k in kinds]


REFUSED = [
    ("Olmoe", {"num_experts": 10**6}, "num_experts=1000000", "tensors"),
    ("Olmoe", {"num_experts_per_tok": 65}, "num_experts_per_tok=65", "at most 64"),
    ("Mixtral", {"num_local_experts": 9}, "experts.8.w1.weight", "is missing"),
    ("Llama", {"attention_bias": True}, "attention_bias=True", "false"),
    ("Llama", {"mlp_bias": True}, "mlp_bias=True", "false"),
    ("Llama", {"rope_parameters": LLAMA3 | {"rope_type": "linear"}}, "'linear'", "llama3"),
    ("Llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor=4", "below"),
    ("Llama", {"rope_parameters": LLAMA3 | {"factor": float("nan")}}, "factor=nan", "number"),
    ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5", "1.0"),
    ("Llama", {"quantization_config": {"bits": 4}}, "quantization_config", "null"),
    ("Llama", {"model_type": "cohere2"}, "model_type='cohere2'", "olmo, olmo2, olmo3, llama, qwen3, "),
    ("Gemma2", {"rope_scaling": YARN}, "rope_scaling", "null"),
    ("Gemma2", {"rope_parameters": YARN}, "rope_parameters", "scaled RoPE"),
    ("Gemma2", {"layer_types": ["chunked_attention"] * 5}, "layer_types", "full_attention"),
    ("Gemma2", {"hidden_activation": "silu"}, "hidden_activation='silu'", "gelu_pytorch_tanh"),
    ("Gemma3Text", {"rope_parameters": YARN}, "rope_type", "no such key"),
    ("Gemma3Text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
     "rope_type='linear'", "default"),
    ("Gemma3Text", {"use_bidirectional_attention": True}, "use_bidirectional", "false"),
    ("Gemma3Text", {"attn_logit_softcapping": 9.0}, "attn_logit_softcapping=9.0", "null"),
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
