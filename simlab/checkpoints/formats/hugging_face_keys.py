"""A table of the keys of transformers' configs by model family: used, indifferent, or fixed.

After transformers 5.23's config classes and models, and the keys that older versions and other tools
write into a config.json. ``tests/checkpoints/test_config_keys.py`` holds the lists against the classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from simlab.checkpoints.formats.keys import Keys
from simlab.checkpoints.untrusted.files import fields_of, read_json
from simlab.config import ConfigError
from simlab.config.fields import Fields

# Parameters of generation, which older versions kept in config.json.
_GENERATION = (
    "assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens "
    "diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
    "encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty "
    "forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens min_length "
    "no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups "
    "num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty "
    "return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p typical_p "
    "use_cache cache_implementation"
)
_OUTPUTS = (
    "output_attentions output_hidden_states return_dict tie_last_hidden_states "
    "id2label label2id num_labels problem_type finetuning_task task_specific_params prefix"
)
_TOKENS = (
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class "
    "model_max_length max_sequence_length"
)
# dtype: a run has its own. The rest is about training, about who wrote the file, or about how (and not
# what) is computed: pretraining_tp and chunk_size_feed_forward cut a product into parts.
_OTHER = (
    "dtype torch_dtype torchscript use_bfloat16 tf_legacy_loss is_decoder attention_dropout "
    "initializer_range gradient_checkpointing pretraining_tp chunk_size_feed_forward "
    "attn_implementation _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled "
    "_name_or_path name_or_path _commit_hash transformers_version transformers.js_config "
    "unsloth_fixed unsloth_version unsloth_training_dtype is_llama_config"
)
# original_max_position_embeddings isn't here, though transformers takes it from here for YaRN and
# Llama 3: it belongs to RoPE's section.
_EVERYONES = Keys(
    "model_type architectures vocab_size tie_word_embeddings",
    f"{_GENERATION} {_OUTPUTS} {_TOKENS} {_OTHER}",
    {
        "is_causal": True,
        "quantization_config": None,
        "pruned_heads": {},
        "is_encoder_decoder": False,
        "add_cross_attention": False,
        "tie_encoder_decoder": False,
    },
)
_NAMED = Keys(
    "hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act rope_parameters "
    "rope_scaling",
    fixed={"rope_interleaved": False},
)
_SHARED = (
    _EVERYONES
    | _NAMED
    | Keys(
        "num_key_value_heads head_dim layer_types rope_theta max_position_embeddings",
        fixed={"attention_bias": False, "partial_rotary_factor": 1.0},
    )
)
# The keys that no model type's computation depends on.
IGNORED = frozenset(f"{_GENERATION} {_OUTPUTS} {_TOKENS} {_OTHER}".split())
_RMS = Keys("rms_norm_eps")
# transformers drops the window, and the layers that would have it, unless use_sliding_window.
_NO_WINDOW = Keys("", "sliding_window max_window_layers", {"use_sliding_window": False})
# hidden_act: Gemma's class has another key for it.
_GEMMA = (
    _EVERYONES
    | _RMS
    | Keys(
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim hidden_activation layer_types rope_parameters rope_theta query_pre_attn_scalar "
        "sliding_window final_logit_softcapping",
        "hidden_act max_position_embeddings _sliding_window_pattern",
        {
            "attention_bias": False,
            "partial_rotary_factor": 1.0,
            "rope_interleaved": False,
            "use_bidirectional_attention": False,
        },
    )
)
MODEL_TYPES: Mapping[str, Keys] = {
    "olmo": _SHARED | Keys("", fixed={"clip_qkv": None}),
    "olmo2": _SHARED | _RMS,
    "olmo3": _SHARED | _RMS | Keys("sliding_window"),
    # Falcon 3 is a Llama that says what its activation is once more.
    "llama": _SHARED | _RMS | Keys("", fixed={"mlp_bias": False, "activation": "swiglu"}),
    "qwen3": _SHARED | _RMS | _NO_WINDOW,
    "qwen2": _SHARED | _RMS | _NO_WINDOW | Keys("", fixed={"use_mrope": False}),
    # The window is every layer's, whatever layer_types says.
    "mistral": _SHARED | _RMS | Keys("sliding_window", fixed={"layer_types": None}),
    # What is about training: jitter, and the loss that balances experts.
    "mixtral": _SHARED
    | _RMS
    | Keys(
        "sliding_window num_local_experts num_experts_per_tok",
        "output_router_logits router_aux_loss_coef router_jitter_noise",
        {"layer_types": None},
    ),
    "olmoe": _SHARED
    | _RMS
    | Keys(
        "num_experts num_experts_per_tok norm_topk_prob",
        "output_router_logits router_aux_loss_coef",
        {"clip_qkv": None},
    ),
    # auto_map: transformers and the repositories' own code compute the same. The lengths are for scaled
    # RoPE, which is refused.
    "phi3": _EVERYONES
    | _NAMED
    | _RMS
    | Keys(
        "num_key_value_heads rope_theta partial_rotary_factor sliding_window",
        "auto_map resid_pdrop embd_pdrop max_position_embeddings original_max_position_embeddings",
        {"attention_bias": False},
    ),
    "stablelm": _EVERYONES
    | _NAMED
    | Keys(
        "num_key_value_heads rope_theta partial_rotary_factor max_position_embeddings layer_norm_eps "
        "use_qkv_bias",
        "hidden_dropout",
        {"qk_layernorm": False, "use_parallel_residual": False},
    ),
    # reorder_and_upcast_attn: in which dtype; summary_…: of a head for multiple choice.
    "gpt2": _EVERYONES
    | Keys(
        "n_positions n_embd n_layer n_head n_inner activation_function layer_norm_epsilon",
        "n_ctx resid_pdrop embd_pdrop attn_pdrop reorder_and_upcast_attn output_past summary_type "
        "summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout",
        {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    ),
    "gpt_neox": _EVERYONES
    | _NAMED
    | Keys(
        "layer_norm_eps rotary_pct rotary_emb_base use_parallel_residual max_position_embeddings",
        "hidden_dropout classifier_dropout",
        {"attention_bias": True},
    ),
    "gemma2": _GEMMA | Keys("attn_logit_softcapping", fixed={"rope_scaling": None}),
    # transformers' Gemma 3 doesn't use attn_logit_softcapping, Google's does.
    "gemma3_text": _GEMMA
    | Keys(
        "rope_scaling rope_local_base_freq sliding_window_pattern",
        fixed={"attn_logit_softcapping": None},
    ),
}
# Models with an image encoder, and the model type of their text part.
TEXT_PARTS = {"gemma3": "gemma3_text"}
_WITH_IMAGES = Keys(
    "model_type architectures text_config",
    f"{_GENERATION} {_OUTPUTS} {_TOKENS} {_OTHER} vision_config mm_tokens_per_image boi_token_index "
    "eoi_token_index image_token_index boi_token_id eoi_token_id image_token_id",
    {"tie_word_embeddings": True, "quantization_config": None},
)
_CLASSES = {
    "olmo": "Olmo", "olmo2": "Olmo2", "olmo3": "Olmo3", "llama": "Llama", "qwen3": "Qwen3",
    "qwen2": "Qwen2", "mistral": "Mistral", "gpt2": "GPT2", "gpt_neox": "GPTNeoX",
    "phi3": "Phi3", "stablelm": "StableLm", "mixtral": "Mixtral", "olmoe": "Olmoe",
    "gemma2": "Gemma2", "gemma3_text": "Gemma3", "gemma3": "Gemma3",
}  # fmt: skip
_HEADS = (
    "ForCausalLM", "LMHeadModel", "Model", "ForSequenceClassification", "ForTokenClassification",
    "ForQuestionAnswering", "TextModel", "ForConditionalGeneration",
)  # fmt: skip
_HF_OLMO = (
    "the first OLMo repositories' own layout, which needs their code: use the repository whose name "
    "ends in -hf"
)
ELSEWHERE = {
    "hf_olmo": _HF_OLMO,
    "olmo_1124": "OLMo 2's name before transformers had it: use the repository as it is today (olmo2)",
}


def read_values(path: Path) -> dict[str, object]:
    """The keys of a config.json; of a model with an image encoder those of its text part.

    Raises ConfigError.
    """
    values = read_json(path)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        return values
    fields = fields_of(values, path)
    _WITH_IMAGES.check(fields)
    _check_classes(values.get("architectures") or [], kind, fields)
    text = fields.node("text_config", {})
    text.choice("model_type", (TEXT_PARTS[kind],), TEXT_PARTS[kind])
    text.must_be(tie_word_embeddings=True)
    return {**text.values, "model_type": TEXT_PARTS[kind]}


def read_family(values: dict[str, object], fields: Fields) -> str:
    """The model type, after a check of every key. Raises ConfigError.

    Names of architectures that are written alike compute different things: only another spelling of a
    name that simlab reads is a hint.
    """
    kind = values.get("model_type")
    if kind is None:
        raise ConfigError(f"{fields.prefix}has no model_type; allowed: {', '.join(MODEL_TYPES)}")
    if isinstance(kind, str) and kind in ELSEWHERE:
        raise fields.fail("model_type", kind, ELSEWHERE[kind])
    if kind not in list(MODEL_TYPES):
        plain = "".join(filter(str.isalnum, kind[:60])).lower() if isinstance(kind, str) else ""
        hint = f"; did you mean {plain}?" if plain in MODEL_TYPES else ""
        raise fields.fail("model_type", kind, f"allowed: {', '.join(MODEL_TYPES)}{hint}")
    assert isinstance(kind, str)
    if kind == "olmo" and "hidden_size" not in values and "d_model" in values:
        raise fields.fail("d_model", values["d_model"], _HF_OLMO)
    if values.get("auto_map") and "auto_map" not in MODEL_TYPES[kind].names:
        why = "the repository computes this model with its own code, which simlab doesn't run"
        raise fields.fail("auto_map", values["auto_map"], why)
    MODEL_TYPES[kind].check(fields)
    _check_classes(values.get("architectures") or [], kind, fields)
    return kind


def _check_classes(names: object, kind: str, fields: Fields) -> None:
    allowed = [f"{_CLASSES[kind]}{head}" for head in _HEADS]
    known = [name.lower() for name in allowed]
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or name.lower() not in known:  # "LLaMAForCausalLM" is of 2023
            raise fields.fail("architectures", names, f"allowed for {kind}: {', '.join(allowed)}")
