"""Other families' whole models, made of simlab's parts, against those of transformers."""

import pytest
import torch
import transformers
from conftest import assert_parity, tiny
from torch import nn

from simlab import build_model
from simlab.config import ConfigError
from simlab.experiment import prepare
from simlab.model.transformer import parameter_count

IDS = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(0))


def randomised(model):
    """All parameters away from their init, so large that attention and activation matter."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        is_gain = name.endswith("weight") and parameter.dim() == 1
        nn.init.uniform_(parameter, 0.5, 1.5) if is_gain else nn.init.normal_(parameter, std=0.3)
    return model.eval()


def assert_same(run, theirs, state):
    """Every block's state, the logits and the number of parameters."""
    ours = build_model(run)
    ours.load_state_dict(state, strict=True)
    hidden = theirs(IDS, output_hidden_states=True).hidden_states
    x = ours.embed(IDS)
    for i, block in enumerate(ours.blocks):
        assert_parity(x, hidden[i], f"before block {i}")
        x = block(x)
    assert_parity(ours(IDS), theirs(IDS).logits, "logits")
    assert parameter_count(run.shape) == sum(p.numel() for p in theirs.parameters())


GEMMA = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4,
    "query_pre_attn_scalar": 3, "rms_norm_eps": 1e-4, "attn_implementation": "eager",
    "pad_token_id": None,
}  # fmt: skip
GEMMA_NAMES = {
    "model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head",
    "model.layers": "blocks", "self_attn": "attention.sublayer", "mlp.": "mlp.sublayer.",
    "input_layernorm": "attention.norm_in", "post_attention_layernorm": "attention.norm_out",
    "pre_feedforward_layernorm": "mlp.norm_in", "post_feedforward_layernorm": "mlp.norm_out",
}  # fmt: skip
GEMMA_KEYS = [
    "norm=peri", "norm.type=rms_plus_one", "norm.eps=1e-4", "model.head_dim=16", "model.mlp=geglu",
    "model.tied=true", f"model.embedding_scale={48**0.5}", "model.query_pre_attn_scalar=3",
    "model.window=4", "model.full_last=false",
]  # fmt: skip


def renamed(tensors, names):
    """Their tensors, each part of a name as in ours."""
    for key, value in tensors:
        for old, new in names.items():
            key = key.replace(old, new)
        yield key, value


def test_gpt2():
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=16, n_embd=48, n_layer=3, n_head=6, n_inner=80,
        attn_implementation="eager", bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = randomised(transformers.GPT2LMHeadModel(config))
    names = {
        "transformer.wte": "embedding", "transformer.wpe": "position", "transformer.ln_f": "norm",
        "lm_head": "head", "transformer.h": "blocks", "ln_1": "attention.norm_in",
        "ln_2": "mlp.norm_in", "attn.c_proj": "attention.sublayer.o_proj",
        "mlp.c_fc": "mlp.sublayer.up_proj", "mlp.c_proj": "mlp.sublayer.down_proj",
    }  # fmt: skip
    state = {}
    turned = (  # their Conv1D's weight is (d_in, d_out)
        (key, value.T if ".c_" in key and value.dim() == 2 else value)
        for key, value in theirs.state_dict().items()
    )
    for key, value in renamed(turned, names):
        if "c_attn" in key:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                state[key.replace("attn.c_attn", f"attention.sublayer.{part}_proj")] = rows
        else:
            state[key] = value
    run = tiny(
        "norm=pre", "norm.type=layer_bias", "norm.eps=1e-5", "kv_heads=6", "model.qk_norm=none",
        "model.rotary=0", "model.positions=16", "model.mlp=gelu", "model.bias=true",
        "model.tied=true",
    )  # fmt: skip
    assert_same(run, theirs, state)


def test_gpt_neox():
    config = transformers.GPTNeoXConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=6, rotary_pct=0.5, rotary_emb_base=900, attn_implementation="eager",
    )  # fmt: skip
    theirs = randomised(transformers.GPTNeoXForCausalLM(config))
    names = {
        "gpt_neox.embed_in": "embedding", "gpt_neox.final_layer_norm": "norm", "embed_out": "head",
        "lm_head": "head", "gpt_neox.layers": "blocks", "attention.dense": "attention.sublayer.o_proj",
        "input_layernorm": "attention.norm_in", "post_attention_layernorm": "mlp.norm_in",
        "mlp.dense_h_to_4h": "mlp.sublayer.up_proj", "mlp.dense_4h_to_h": "mlp.sublayer.down_proj",
    }  # fmt: skip
    state = {}
    for key, value in renamed(theirs.state_dict().items(), names):
        if "query_key_value" in key:  # head by head
            for part, rows in zip("qkv", value.unflatten(0, (6, 3, 8)).unbind(1), strict=True):
                name = key.replace("attention.query_key_value", f"attention.sublayer.{part}_proj")
                state[name] = rows.flatten(0, 1)
        else:
            state[key] = value
    run = tiny(
        "norm=parallel", "norm.type=layer_bias", "norm.eps=1e-5", "kv_heads=6",
        "model.qk_norm=none", "model.rotary=0.5", "model.rope_theta=900", "model.mlp=gelu_exact",
        "model.bias=true",
    )  # fmt: skip
    assert_same(run, theirs, state)


def test_gemma2():
    """Caps so low that they bend attention's and the head's logits."""
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    config = transformers.Gemma2Config(**GEMMA, **caps)
    theirs = randomised(transformers.Gemma2ForCausalLM(config))
    run = tiny(
        *GEMMA_KEYS, "model.qk_norm=none", "model.rope_theta=10000", "model.full_every=2",
        "model.attention_softcap=2", "model.logit_softcap=3",
    )  # fmt: skip
    assert_same(run, theirs, dict(renamed(theirs.state_dict().items(), GEMMA_NAMES)))


def test_gemma3():
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
    }
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(**GEMMA, layer_types=kinds, rope_parameters=rope)
    theirs = randomised(transformers.Gemma3ForCausalLM(config))
    run = tiny(
        *GEMMA_KEYS, "model.qk_norm=per_head", "model.rope_theta=900", "model.full_every=2",
        "model.rope_local_theta=30", "model.rope_linear=8",
    )  # fmt: skip
    assert_same(run, theirs, dict(renamed(theirs.state_dict().items(), GEMMA_NAMES)))


def test_more_tokens_than_positions():
    with pytest.raises(ConfigError, match=r"inputs.length=9: the model has 8 learned positions"):
        prepare(tiny("model.positions=8", "inputs.length=9"))
