"""Every key of a config is used, without effect, or refused: the lists against the libraries' own."""

import json
from dataclasses import fields

import pytest
import torch
import transformers
from conftest import assert_parity, edit_json, keys_of, refused, write_olmo
from test_architectures import IDS, YARN, assert_same, sublayer_states

from simlab.checkpoints.formats import olmo_core_keys
from simlab.checkpoints.formats.hugging_face import read_config
from simlab.checkpoints.formats.hugging_face_keys import MODEL_TYPES
from simlab.config import ConfigError

CLASSES = {
    "olmo": "Olmo", "olmo2": "Olmo2", "olmo3": "Olmo3", "llama": "Llama", "qwen3": "Qwen3",
    "qwen2": "Qwen2", "mistral": "Mistral", "gpt2": "GPT2", "gpt_neox": "GPTNeoX",
    "phi3": "Phi3", "stablelm": "StableLm", "mixtral": "Mixtral", "olmoe": "Olmoe",
    "gemma2": "Gemma2", "gemma3_text": "Gemma3Text",
}  # fmt: skip
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4,
}  # fmt: skip
UNSCALED = {"phi3"}  # a scaled RoPE is refused
# A window and scaled RoPE together are refused; transformers' YaRN needs Mixtral's head_dim.
WHOLE = {"mistral": {"sliding_window": None}, "mixtral": {"head_dim": 8}}
# Values that the config classes take, of a key without effect, and that aren't its default.
OTHER_VALUES = {
    "problem_type": "regression", "id2label": {"0": "a"}, "label2id": {"a": 0}, "num_labels": 1,
    "pad_token_id": 3, "bos_token_id": 4, "eos_token_id": 5, "use_cache": False,
    "output_hidden_states": True, "output_attentions": True, "attention_dropout": 0.9,
    "initializer_range": 0.5, "attn_implementation": "eager", "_attn_implementation": "eager",
    "transformers_version": "4.0.0", "_name_or_path": "a/b", "name_or_path": "a/b",
    "return_dict": True, "sliding_window": 2, "cache_implementation": "static",
    "is_decoder": True, "summary_type": "last", "summary_use_proj": False, "summary_activation": "tanh",
    "summary_proj_to_labels": False, "reorder_and_upcast_attn": True,
    "output_router_logits": True, "router_aux_loss_coef": 0.5, "router_jitter_noise": 0.5,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
}  # fmt: skip
LINEAR = ("gemma3_text",)  # which scales RoPE in this way alone
DTYPES = ("dtype", "torch_dtype", "use_bfloat16")  # a run's dtype is its own key


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_every_key_of_transformers_is_listed(kind):
    """A key that a new transformers adds fails here by its name."""
    config = getattr(transformers, f"{CLASSES[kind]}Config")
    theirs = {field.name for field in fields(config)} | set(config().to_dict())
    theirs |= set(transformers.GenerationConfig._get_default_generation_params())
    assert theirs - MODEL_TYPES[kind].names == set()


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_keys_without_effect_have_none(tmp_path, kind):
    """transformers' own logits are the same with every such key at another value."""
    head_dim = {"head_dim": 8} if kind == "qwen3" else {}
    model = write_olmo(tmp_path / "m", CLASSES[kind], **TINY | head_dim)
    keys = set(MODEL_TYPES[kind].indifferent.split()) - set(DTYPES)
    edit_json(tmp_path / "m" / "config.json", **{key: OTHER_VALUES.get(key, 1) for key in keys})
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        assert_parity(other(IDS).logits, model(IDS).logits)
    read_config(tmp_path / "m" / "config.json", 100)


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_used_keys_are_used(tmp_path, kind):
    """A wrong value in any of them is an error, so that each is read."""
    config = {"model_type": kind, "vocab_size": 61} | WHOLE.get(kind, {})
    config |= keys_of(CLASSES[kind], TINY)
    if "rope_scaling" in MODEL_TYPES[kind].used and kind not in UNSCALED:
        scaling = {"type": "linear" if kind in LINEAR else "yarn", "factor": 2.0}
        config |= {"rope_scaling": scaling, "max_position_embeddings": 64}
    path = tmp_path / "config.json"
    for key in MODEL_TYPES[kind].used.split():
        path.write_text(json.dumps(config))
        read_config(path, 100)
        edit_json(path, **{key: "x"})
        with pytest.raises(ConfigError, match=key):
            read_config(path, 100)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        # transformers' StableLM takes no notice of it.
        *((kind, {"is_causal": False}) for kind in MODEL_TYPES if kind != "stablelm"),
        ("olmo", {"clip_qkv": 0.1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 0}),
    ],
)
def test_fixed_keys_matter(tmp_path, kind, changes):
    """Negative control: with another value transformers computes another model, and simlab none."""
    model = write_olmo(tmp_path / "m", CLASSES[kind], **TINY)
    path = tmp_path / "m" / "config.json"
    edit_json(path, **changes)
    values = {
        key: value for key, value in json.loads(path.read_text()).items() if key != "layer_types"
    }
    path.write_text(json.dumps(values if kind == "qwen3" else json.loads(path.read_text())))
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad(), pytest.raises(AssertionError):
        assert_parity(other(IDS).logits, model(IDS).logits)
    refused(tmp_path / "m", next(iter(changes)), "not supported")


SCALED = [k for k, keys in MODEL_TYPES.items() if "rope_scaling" in keys.used]
SCALED = [k for k in SCALED if k not in (*UNSCALED, *LINEAR)]


@pytest.mark.parametrize("kind", SCALED)
def test_scaling_beside_rope_parameters(tmp_path, kind):
    """A user's ``rope_scaling`` in a config that transformers 5 wrote, as model cards advise."""
    write_olmo(tmp_path / "m", CLASSES[kind], **TINY | WHOLE.get(kind, {}))
    path = tmp_path / "m" / "config.json"
    # Another θ than the default one: transformers mixes them up.
    theta = {"olmo3": 500_000.0, "mixtral": 1_000_000.0}.get(kind, 10_000.0)
    edit_json(path, rope_scaling=YARN | {"rope_theta": theta})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert_same(tmp_path / "m", *sublayer_states(model, IDS, kind in ("olmo2", "olmo3")))
    # Of a θ that is in rope_parameters alone: transformers forgets it.
    scaling = {key: value for key, value in YARN.items() if key != "rope_theta"}
    if kind != "olmo3":
        edit_json(path, rope_parameters={"rope_theta": 77.0}, rope_scaling=scaling)
        read, *_ = read_config(path, 100)
        assert (read.rope_theta, read.yarn.factor) == (77.0, 8.0)


def test_every_key_of_olmo_core_is_listed():
    from olmo_core.nn import attention, feed_forward, layer_norm, lm_head, rope, transformer

    sections = {
        transformer.TransformerConfig: olmo_core_keys.MODEL,
        transformer.TransformerBlockConfig: olmo_core_keys.BLOCK,
        attention.AttentionConfig: olmo_core_keys.ATTENTION,
        attention.SlidingWindowAttentionConfig: olmo_core_keys.WINDOW,
        layer_norm.LayerNormConfig: olmo_core_keys.NORM,
        feed_forward.FeedForwardConfig: olmo_core_keys.MLP,
        lm_head.LMHeadConfig: olmo_core_keys.HEAD,
        rope.RoPEConfig: olmo_core_keys.ROPE,
    } | {getattr(rope, name): keys for name, keys in olmo_core_keys.SCALINGS.items()}
    for config, keys in sections.items():
        theirs = {field.name for field in fields(config)} | {"_CLASS_"}
        assert (config, theirs - keys.names) == (config, set())


def test_olmo_cores_keys_without_effect_have_none():
    """ai2-olmo-core's own logits are the same with these keys at another value."""
    from olmo_core.nn.transformer import InitMethod
    from write_olmo_core import configs

    config = configs()["olmo2"]
    model = config.build(init_device="cpu").eval()
    model.init_weights(device=torch.device("cpu"), max_seq_len=23)
    changed = config.copy()
    changed.init_method, changed.init_seed, changed.init_std = InitMethod.fan_in, 5, 0.5
    changed.embedding_init_std, changed.freeze_params = 0.5, ["embeddings.*"]
    block, mixer = changed.block, changed.block.sequence_mixer
    block.dropout = 0.9  # not the mixer's, which 3.0.0 makes use of in inference too
    mixer.use_recompute_qkv_prep = True
    mixer.rope.full_precision = block.layer_norm.full_precision = False
    other = changed.build(init_device="cpu").eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_parity(other(IDS), model(IDS))


HF_OLMO = "-hf"
REFUSED = [
    ("olmo2", {"is_causal": None}, "is_causal=None", "true"),
    ("olmo2", {"residual_multiplier": 0.5}, "residual_multiplier=0.5", "doesn't know this key"),
    ("olmo2", {"residual_multiplier": False}, "residual_multiplier=False", "doesn't know this key"),
    ("llama", {"original_max_position_embeddings": 9}, "original_max_position_embeddings=9", "know"),
    ("llama", {"auto_map": {"AutoModel": "m.M"}}, "auto_map", "own code"),
    ("llama", {"architectures": ["LlamaBiModel"]}, "architectures", "LlamaForCausalLM"),
    ("olmo", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05", "doesn't know this key"),
    ("olmo", {"model_type": "hf_olmo"}, "model_type='hf_olmo'", HF_OLMO),
    ("olmo", {"d_model": 32, "hidden_size": ...}, "d_model=32", HF_OLMO),
    ("olmo2", {"model_type": "olmo_1124"}, "model_type='olmo_1124'", "today (olmo2)"),
    ("olmo2", {"model_type": "OLMo-2"}, "model_type='OLMo-2'", "did you mean olmo2?"),
    ("olmo2", {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2.0}}, "leave one"),
    ("olmo2", {"rope_theta": 9.0, "rope_parameters": {"rope_theta": 8.0}}, "rope_theta differs"),
    ("olmo2", {"rope_scaling": {"type": "llama3", "rope_type": "yarn"}}, "type='llama3'", "yarn"),
    ("olmo2", {"rope_scaling": YARN | {"truncate": None}}, "truncate=None", "true"),
    ("olmo2", {"rope_scaling": {"type": "default", "factor": 4.0}}, "factor=4.0", "no such key"),
    ("olmo2", {"rope_parameters": {"full_attention": YARN}}, "full_attention", "no such key"),
    ("olmo3", {"rope_parameters": {"full_attention": YARN, "truncate": False}}, "truncate", "no such"),
    ("olmo3", {"rope_parameters": {"full_attention": YARN}}, "rope_theta differs between"),
    ("olmo3", {"sliding_window": None}, "sliding_window=None", "integer"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "parts"), [(k, c, p) for k, c, *p in REFUSED])
def test_refused_by_name(tmp_path, kind, changes, parts):
    config = {"model_type": kind, "vocab_size": 61, **TINY, **changes}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    with pytest.raises(ConfigError) as caught:
        read_config(path, 100)
    for part in parts:
        assert part in str(caught.value)


NO_HINTS = [
    ("olmo2", {"hidden_act": "silu2"}),
    ("llama", {"hidden_act": "selu"}),
    ("llama", {"rope_scaling": {"rope_type": "llama4"}}),
    ("olmo3", {"rope_scaling": {"rope_type": "yarns"}}),
]


@pytest.mark.parametrize(("kind", "changes"), NO_HINTS)
def test_a_files_values_get_no_hint(tmp_path, kind, changes):
    """Names that are written alike are other functions; nobody has mistyped them."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": kind, "vocab_size": 61, **TINY, **changes}))
    with pytest.raises(ConfigError) as caught:
        read_config(path, 100)
    assert "did you mean" not in str(caught.value)


def test_no_model_type(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config\.json: has no model_type; allowed: olmo"):
        read_config(tmp_path / "config.json", 100)


@pytest.mark.parametrize("kind", ["qwen2_moe", "mamba", "gemma", "qwen3_moe", "phimoe"])
def test_no_hint_leads_to_another_architecture(tmp_path, kind):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ConfigError, match=f"allowed: {', '.join(MODEL_TYPES)}$"):
        read_config(path, 100)
