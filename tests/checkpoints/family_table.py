"""A tiny config of each model type that transformers' code computes: what the tests and the list read.

Half of them are of the shape COMMON, with what they call otherwise or have besides.
"""

# fmt: off
COMMON = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}
GPT = {
    "vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
    "bos_token_id": None, "eos_token_id": None,
}
SMALL_HEADS = COMMON | {"head_dim": 8}
WINDOW = SMALL_HEADS | {"sliding_window": 8}
UNGROUPED = {key: value for key, value in COMMON.items() if key != "num_key_value_heads"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1,
}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}

# Multimodal: the text decoder is measured, beside a tiny vision tower.
SEEING = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}
QWEN_SEEING = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
    "patch_size": 14,
}
QWEN_TEXT = SMALL_HEADS | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}

FAMILIES: dict[str, dict] = {
    "apertus": COMMON,
    "arcee": COMMON,
    "bamba": COMMON | {
        "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4,
    },
    "biogpt": UNGROUPED,
    "bloom": {
        "vocab_size": 97, "hidden_size": 32, "n_layer": 3, "n_head": 4, "pad_token_id": None,
        "bos_token_id": None, "eos_token_id": None,
    },
    "codegen": GPT | {"rotary_dim": 4},
    "cohere": COMMON,
    "cohere2": COMMON | {"sliding_window": 8},
    "deepseek_v3": COMMON | ROUTED | {
        "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8,
    },
    "deepseek_v4": COMMON | {
        "num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 8, "o_lora_rank": 8, "o_groups": 2,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "index_n_heads": 2, "index_head_dim": 8, "num_hash_layers": 1, "sliding_window": 8,
        "compress_ratios": [0, 4, 128],
    },
    "diffllama": COMMON,
    "doge": COMMON,
    "ernie4_5": SMALL_HEADS,
    "ernie4_5_moe": COMMON | {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
    },
    "exaone4": COMMON | {"sliding_window": 8},
    "falcon": {key: value for key, value in UNGROUPED.items() if key != "intermediate_size"},
    "flex_olmo": COMMON | {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": SMALL_HEADS,
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "gemma3": {"text_config": WINDOW, "vision_config": SEEING, "mm_tokens_per_image": 4},
    "gemma3n_text": WINDOW | {
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "laurel_rank": 8,
        "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.5, 0.0, 0.0],
    },
    "gemma4_text": WINDOW | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97},
    "glm": SMALL_HEADS,
    "glm4": SMALL_HEADS,
    "glm4_moe": SMALL_HEADS | ROUTED,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {
        "vocab_size": 97, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "window_size": 8,
        "attention_types": [[["global", "local", "global"], 1]], "max_position_embeddings": 64,
        "bos_token_id": None, "eos_token_id": None,
    },
    "gpt_neox": UNGROUPED,
    "gpt_neox_japanese": UNGROUPED,
    "gpt_oss": WINDOW | LOCAL,
    "gptj": GPT | {"rotary_dim": 4},
    "granite": COMMON | {"residual_multiplier": 0.22, "embedding_multiplier": 12.0},
    "granitemoe": COMMON | LOCAL,
    "helium": SMALL_HEADS,
    "hunyuan_v1_dense": SMALL_HEADS,
    "hunyuan_v1_moe": SMALL_HEADS | {"num_experts": 4, "moe_topk": 2},
    "jamba": COMMON | {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 4,
        "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "jetmoe": COMMON | {"kv_channels": 8, "num_local_experts": 4},
    "lfm2": COMMON | {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4": {
        "text_config": SMALL_HEADS | {
            "num_local_experts": 4, "intermediate_size_mlp": 48, "attention_chunk_size": 16,
        },
        "vision_config": SEEING | {
            "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
        },
    },
    "llama4_text": SMALL_HEADS | {
        "num_local_experts": 4, "intermediate_size_mlp": 48, "attention_chunk_size": 16,
    },
    "llava": {"text_config": COMMON | {"model_type": "llama"}, "vision_config": SEEING | {
        "model_type": "clip_vision_model",
    }, "image_token_index": 96, "image_token_id": 96},
    "mamba": {"vocab_size": 97, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 3},
    "minimax": SMALL_HEADS | {"num_local_experts": 4, "block_size": 8},
    "mistral": COMMON,
    "mistral3": {
        "text_config": COMMON | {"model_type": "mistral", "head_dim": 8},
        "vision_config": SEEING | {"model_type": "pixtral", "head_dim": 8}, "image_token_id": 96,
    },
    "mixtral": COMMON | {"num_local_experts": 4},
    "mpt": {"vocab_size": 97, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
    "nanochat": COMMON,
    "nemotron": COMMON,
    "olmoe": COMMON | {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {
        "vocab_size": 97, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 16,
        "pad_token_id": 1, "bos_token_id": None, "eos_token_id": None,
    },
    "persimmon": UNGROUPED,
    "phi": COMMON,
    "phi3": COMMON,
    "phimoe": COMMON | {"num_local_experts": 4},
    "qwen2": COMMON,
    "qwen2_5_vl": {"text_config": QWEN_TEXT, "vision_config": QWEN_SEEING | {
        "fullatt_block_indexes": [0],
    }},
    "qwen2_moe": COMMON | EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3_vl": {"text_config": QWEN_TEXT, "vision_config": QWEN_SEEING | {
        "deepstack_visual_indexes": [0], "num_position_embeddings": 4,
    }},
    "qwen3_moe": SMALL_HEADS | EXPERTS,
    "seed_oss": SMALL_HEADS,
    "smollm3": COMMON,
    "stablelm": COMMON,
    "starcoder2": COMMON,
    "vaultgemma": SMALL_HEADS,
    "xglm": {
        "vocab_size": 97, "d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48,
        "max_position_embeddings": 64,
    },
}
# fmt: on


def new_family(kind: str):
    """A model type's tiny model, as transformers draws it."""
    import torch
    import transformers

    from simlab.checkpoints.families.skeleton import auto_class

    torch.manual_seed(1)
    config = transformers.CONFIG_MAPPING[kind](**FAMILIES.get(kind, COMMON))
    config.architectures = None
    return auto_class(config).from_config(config, attn_implementation="eager")


def write_family(folder, kind: str, model=None):
    """A random checkpoint of a model type, written by transformers, with nothing at its init.

    model: What ``new_family`` has just given, or None.
    """
    import torch

    model = new_family(kind) if model is None else model
    with torch.no_grad():
        for parameter in model.parameters():  # gains away from 1, biases from 0
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.eval().save_pretrained(folder)
    return model
