"""A table of the keys of OLMo-core's configs by section: used, indifferent, or fixed.

After ai2-olmo-core 3.0.0's config classes; ``tests/checkpoints/test_config_keys.py`` holds the lists
against them. Of older versions: the model's section said how to train it too.
"""

from __future__ import annotations

from collections.abc import Mapping

from simlab.checkpoints.formats.keys import Keys

# The torch backend of 3.0.0 drops attention weights in inference too, at random, where an attention's
# dropout isn't 0. That is a mistake, which isn't followed.
_ANY = "_CLASS_ dtype init_device dropout"
# Precision, how the backward pass saves memory, and kernels: in float32 these give the same.
_IMPLEMENTATION = "backend use_flash use_recompute_qkv_prep mxfp8_save_qkv_for_backward"
MODEL = Keys(
    "name d_model vocab_size n_layers block block_pattern block_overrides lm_head tie_word_embeddings",
    f"{_ANY} init_method init_seed init_std embedding_init_std freeze_params compile dp_config "
    "tp_config cp_config ep_config pp_config ac_config float8_config",
    {"embedding_norm": None, "embed_scale": 1.0},
)
BLOCK = Keys(
    "name sequence_mixer attention layer_norm feed_forward",
    _ANY,
    {
        "feed_forward_moe": None,
        "attention_residual_alpha": 1.0,
        "feed_forward_residual_alpha": 1.0,
    },
)
ATTENTION = Keys(
    "name type n_heads n_kv_heads head_dim bias rope qk_norm use_head_qk_norm sliding_window",
    f"{_ANY} {_IMPLEMENTATION}",
    {
        "gate": None,
        "clip_qkv": None,
        "scalable_softmax": False,
        "qk_norm_per_head_gains": False,
        "attention_sinks": False,
        "mxfp8_projections": False,
        "mxfp8_qkv_projection": False,
        "mxfp8_out_projection": False,
    },
)
WINDOW = Keys(
    "pattern force_full_attention_on_first_layer force_full_attention_on_last_layer", _ANY
)
NORM = Keys("name eps bias elementwise_affine", f"{_ANY} full_precision")
MLP = Keys("name hidden_size bias activation", _ANY)
HEAD = Keys("name layer_norm bias", f"{_ANY} loss_implementation")
ROPE = Keys(
    "name theta scaling",
    f"{_ANY} full_precision",
    {"no_global_rope": False, "partial_rotary_factor": 1.0},
)
_NO_RESCALE = {"attention_rescale_factor": 1.0}
SCALINGS: Mapping[str, Keys] = {  # by class; _CLASS_ says which one it is
    "YaRNRoPEScalingConfig": Keys("factor beta_fast beta_slow old_context_len", _ANY),
    "StepwiseRoPEScalingConfig": Keys(
        "factor low_freq_proportion high_freq_proportion old_context_len", _ANY, _NO_RESCALE
    ),
    "ABFRoPEScalingConfig": Keys("new_theta", _ANY, _NO_RESCALE),
}
