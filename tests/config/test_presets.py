"""Presets of released models against their config.json on the hub, and against transformers."""

import json

import pytest
import torch
import transformers

from simlab.checkpoints.formats.hugging_face import read_config
from simlab.config.validate import compose
from simlab.model.transformer import parameter_count
from simlab.schemes.init import table

# What decides the computation in the repositories' config.json, spelled as transformers 4 did.
LLAMA3 = {
    "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "vocab_size": 128256,
    "num_key_value_heads": 8,
}  # fmt: skip
CONFIGS = {
    "llama3_8b": LLAMA3 | {  # meta-llama/Meta-Llama-3-8B
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "max_position_embeddings": 8192,
    },
    "llama3_70b": LLAMA3 | {  # meta-llama/Meta-Llama-3-70B
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "max_position_embeddings": 8192,
    },
    "llama3_405b": LLAMA3 | {  # meta-llama/Llama-3.1-405B
        "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
        "num_attention_heads": 128, "max_position_embeddings": 131072,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
    },
    "qwen3_32b": {  # Qwen/Qwen3-32B
        "model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
        "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 5120,
        "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
        "max_position_embeddings": 40960, "max_window_layers": 64, "use_sliding_window": False,
    },
    "qwen2_5_72b": {  # Qwen/Qwen2.5-72B-Instruct
        "model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
        "vocab_size": 152064, "num_key_value_heads": 8, "hidden_size": 8192,
        "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
        "max_position_embeddings": 32768, "max_window_layers": 70, "use_sliding_window": False,
        "sliding_window": 131072,
    },
    "gpt2_xl": {  # openai-community/gpt2-xl
        "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "n_ctx": 1024, "n_embd": 1600, "n_head": 25, "n_layer": 48, "n_positions": 1024,
        "output_past": True, "summary_type": "cls_index", "vocab_size": 50257,
        "tie_word_embeddings": True,
    },
    "pythia_12b": {  # EleutherAI/pythia-12b
        "model_type": "gpt_neox", "vocab_size": 50688, "hidden_size": 5120, "hidden_act": "gelu",
        "intermediate_size": 20480, "num_attention_heads": 40, "num_hidden_layers": 36,
        "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "rotary_emb_base": 10000,
        "rotary_pct": 0.25, "use_parallel_residual": True,
    },
    "gemma2_27b": {  # google/gemma-2-27b
        "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 4608,
        "intermediate_size": 36864, "num_hidden_layers": 46, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 144,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096,
        "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "gemma3_27b": {  # the text_config of google/gemma-3-27b-pt
        "model_type": "gemma3_text", "hidden_size": 5376, "intermediate_size": 21504,
        "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16,
        "head_dim": 128, "query_pre_attn_scalar": 168, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "tie_word_embeddings": True,
    },
    "phi4_14b": {  # microsoft/phi-4
        "model_type": "phi3", "vocab_size": 100352, "hidden_size": 5120, "rope_theta": 250000,
        "intermediate_size": 17920, "num_attention_heads": 40, "num_hidden_layers": 40,
        "num_key_value_heads": 10, "rms_norm_eps": 1e-5, "max_position_embeddings": 16384,
        "original_max_position_embeddings": 16384, "sliding_window": None, "pad_token_id": 100257,
    },
    "stablelm_3b": {  # stabilityai/stablelm-3b-4e1t
        "model_type": "stablelm", "vocab_size": 50304, "hidden_size": 2560, "rope_theta": 10000,
        "intermediate_size": 6912, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "layer_norm_eps": 1e-5, "max_position_embeddings": 4096,
        "partial_rotary_factor": 0.25, "use_qkv_bias": False,
    },
    "mistral_7b": {  # mistralai/Mistral-7B-v0.1
        "model_type": "mistral", "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
        "vocab_size": 32000, "num_key_value_heads": 8, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "max_position_embeddings": 32768, "sliding_window": 4096,
    },
    "mixtral_8x7b": {  # mistralai/Mixtral-8x7B-v0.1
        "model_type": "mixtral", "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0,
        "vocab_size": 32000, "num_key_value_heads": 8, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "max_position_embeddings": 32768, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "olmoe_7b": {  # allenai/OLMoE-1B-7B-0924
        "model_type": "olmoe", "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "vocab_size": 50304,
        "num_key_value_heads": 16, "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "max_position_embeddings": 4096,
        "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("preset", CONFIGS)
def test_presets_are_their_config_json(tmp_path, preset):
    path = tmp_path / preset / "config.json"
    path.parent.mkdir()
    common = {"initializer_range": 0.02, "tie_word_embeddings": False}
    if preset != "gpt2_xl":
        common["hidden_act"] = "silu"
    path.write_text(json.dumps(common | CONFIGS[preset]))
    model, _, init = read_config(path, 1000)
    run = compose([f"model={preset}"])
    assert run.shape == model
    for layer in (0, model.depth - 1):
        assert table(run.shape, run.init, layer) == table(model, init.config, layer)


@pytest.mark.parametrize("preset", CONFIGS)
def test_presets_have_transformers_parameters(preset):
    """Of two blocks, on meta; every further block has as many as the second."""
    values = CONFIGS[preset]
    config = transformers.AutoConfig.for_model(**values | {"num_hidden_layers": 2})
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    ours = compose([f"model={preset}", "depth=2"]).shape
    assert parameter_count(ours) == sum(p.numel() for p in theirs.parameters())


def test_a_choice_on_the_command_line_wins():
    """A model picks its norm and init; the command line's hold, and eps is the model's."""
    run = compose(["init=mitchell", "norm=swin_renorm", "model=llama3_8b"])
    assert (run.init.rule, run.init.truncate) == ("mitchell", 3.0)
    assert (run.shape.norm.placement, run.shape.norm.eps) == ("swin_renorm", 1e-5)
    assert compose(["model=olmo2_7b"]).shape.norm.placement == "reordered"


def test_llama3_rope_is_one_of_two():
    from simlab.config import ConfigError

    scaling = "{factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_length: 64}"
    assert compose([f"model.llama3={scaling}"]).shape.llama3.factor == 8
    for wrong, part in (
        (["model=olmo3_7b", f"model.llama3={scaling}"], "model.yarn"),
        (["model=olmo3_7b", "model.rope_linear=8"], "rope_linear=8.0: model.yarn scales RoPE too"),
        ([f"model.llama3={scaling.replace(' 4', ' 1')}"], "low_freq_factor=1.0: must be below"),
        ([f"model.llama3={scaling.replace('factor: 8,', 'factor: 8, beta: 1,')}"], "beta=1"),
    ):
        with pytest.raises(ConfigError, match=part):
            compose(wrong)
