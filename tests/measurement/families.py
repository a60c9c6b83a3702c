"""A tiny model of each of transformers' decoder families, built from its config class alone.

``python tests/measurement/families.py MODEL_TYPE…`` prints the table of docs/probe.md.
"""

import inspect
import re
import sys

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import simlab

# What configs call their sizes; a config gets those that it knows.
SIZES = {
    "vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_seq_len": 64,
    "max_position_embeddings": 64, "n_positions": 64, "vocab_size_per_layer_input": 61,
    "hidden_size": 48, "n_embd": 48, "d_model": 48, "dim": 48, "embed_dim": 48,
    "word_embed_proj_dim": 48, "hidden_size_per_layer_input": 8,
    "intermediate_size": 80, "n_inner": 80, "ffn_dim": 80, "decoder_ffn_dim": 80,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "decoder_layers": 4,
    "num_attention_heads": 6, "n_head": 6, "n_heads": 6, "num_heads": 6,
    "decoder_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8,
    "rotary_dim": 4,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "qk_head_dim": 16,
    "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_ssm": 96,
    "mamba_n_groups": 1, "mamba_num_heads": 6, "mamba_head_dim": 16, "mamba_headdim": 16,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
OWN_KEYS = {  # by family: where the sizes above don't fit, and what shows more than the defaults do
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"n_head": 4},
    "deepseek_v2": {"num_key_value_heads": 6},
    "deepseek_v3": {"num_key_value_heads": 6},
    "falcon_h1": {"attention_out_multiplier": 0.5},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm4_moe_lite": {"num_key_value_heads": 6},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite": {"residual_multiplier": 0.22},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 6, "head_dim": 16, "n_groups": 1},
    "minicpm3": {"num_key_value_heads": 6},
    "nemotron_h": {"n_groups": 1},
    "youtu": {"num_key_value_heads": 6},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny(family, **changes):
    """A random model of a family, its gains away from 1 and its matrices large enough to be seen."""
    of = getattr(transformers, CONFIG_MAPPING_NAMES[family])
    known = {*inspect.signature(of.__init__).parameters, *getattr(of, "__dataclass_fields__", ())}
    keys = {key: size for key, size in SIZES.items() if key in known}
    torch.manual_seed(0)
    config = of(**keys | OWN_KEYS.get(family, {}) | changes)
    config._attn_implementation = "eager"
    model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif "norm" in name.lower() or "ln_" in name:
                parameter.add_(torch.rand_like(parameter) - 0.5)
    return model.eval()


def steps_of(layout):
    """The steps that ``ModelProbe.layout`` names, without the blocks: ``attention: x + attn; …``."""
    steps = [part.split(": ", 1)[1] for part in layout.split("; ")]
    return "; ".join(dict.fromkeys(steps))


def reason(error):
    """A refusal without its shapes."""
    return "refused: " + re.sub(r" \(\d[\d, ]*\)", "", str(error).removeprefix("probe: "))


def found_in(family):
    """The probed model, what its forward call gave, and its layout or why it is refused."""
    model = tiny(family)
    ids = torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), simlab.probe(model) as probed:
            out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    except simlab.ConfigError as error:
        return None, None, reason(error)
    return probed, out, steps_of(probed.layout)


def main():
    """Print the table of docs/probe.md."""
    transformers.logging.set_verbosity_error()
    rows = {}
    for family in sys.argv[1:]:
        rows.setdefault(found_in(family)[2], []).append(family)
    print("| steps | model types |\n|---|---|")
    for steps, families in sorted(rows.items(), key=lambda row: (-len(row[1]), row[0])):
        print(f"| {steps} | {', '.join(sorted(families))} |")


if __name__ == "__main__":
    main()
