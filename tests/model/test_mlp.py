"""Each MLP, and biases, against transformers' modules with the same weights."""

import math

import pytest
import torch
from conftest import PARITY, assert_parity, tiny
from torch import nn

from simlab import build_model
from simlab.model.mlp import MLPS, gelu_tanh
from simlab.model.transformer import dense_linear, parameter_count

# Of each MLP: transformers' config and module, and theirs to our names.
GATED = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
REFERENCES = {
    "swiglu": ("LlamaConfig", "llama.modeling_llama.LlamaMLP", {}, GATED),
    "geglu": ("GemmaConfig", "gemma.modeling_gemma.GemmaMLP", {}, GATED),
    "gelu": (
        "Starcoder2Config",
        "starcoder2.modeling_starcoder2.Starcoder2MLP",
        {"residual_dropout": 0.0},
        {"c_fc": "up_proj", "c_proj": "down_proj"},
    ),
    "gelu_exact": (
        "GPTNeoXConfig",
        "gpt_neox.modeling_gpt_neox.GPTNeoXMLP",
        {},
        {"dense_h_to_4h": "up_proj", "dense_4h_to_h": "down_proj"},
    ),
    "relu2": (
        "NemotronConfig",
        "nemotron.modeling_nemotron.NemotronMLP",
        {},
        {"up_proj": "up_proj", "down_proj": "down_proj"},
    ),
}


def reference(name, bias):
    """The module of transformers that computes this MLP, and theirs to our names."""
    import importlib

    import transformers

    config, path, more, names = REFERENCES[name]
    module, _, kind = path.rpartition(".")
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    made = getattr(transformers, config)(hidden_size=48, intermediate_size=80, **heads, **more)
    made.mlp_bias = made.use_bias = bias
    return getattr(importlib.import_module(f"transformers.models.{module}"), kind)(made), names


@pytest.mark.parametrize(
    ("name", "bias"), [("swiglu", False), ("swiglu", True), ("geglu", False), ("gelu", False),
                       ("gelu", True), ("gelu_exact", True), ("relu2", False)]
)  # fmt: skip
def test_mlps_are_those_of_transformers(name, bias):
    torch.manual_seed(0)
    ours = MLPS[name](tiny(f"model.mlp={name}", f"model.bias={bias}").shape, dense_linear)
    theirs, names = reference(name, bias)
    for parameter in theirs.parameters():  # so large that the activation isn't linear
        nn.init.normal_(parameter, std=0.3)
    state = {}
    for key, value in theirs.state_dict().items():
        module, _, kind = key.rpartition(".")
        state[f"{names[module]}.{kind}"] = value
    ours.load_state_dict(state, strict=True)
    x = torch.randn(2, 7, 48)
    assert_parity(ours(x), theirs(x))


def test_gelu_formula():
    x = torch.linspace(-6, 6, 1001)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    torch.testing.assert_close(gelu_tanh(x), 0.5 * x * (1 + inner.tanh()), **PARITY)
    assert 1e-4 < (gelu_tanh(x) - nn.functional.gelu(x)).abs().max() < 5e-4


def test_biases_are_those_of_transformers():
    """Every hidden state of a Llama with biases on attention and MLP, and its parameter count."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, attention_bias=True, mlp_bias=True,
        rms_norm_eps=1e-6, rope_theta=500_000.0, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    run = tiny("norm=pre", "model.qk_norm=none", "model.bias=true")
    ours = build_model(run)
    renamed = {
        "model.embed_tokens": "embedding",
        "model.norm": "norm",
        "lm_head": "head",
        "model.layers": "blocks",
        "self_attn": "attention.sublayer",
        "post_attention_layernorm": "mlp.norm_in",
        ".mlp.": ".mlp.sublayer.",
        "input_layernorm": "attention.norm_in",
    }
    state = {}
    for key, value in theirs.state_dict().items():
        name = key
        for old, new in renamed.items():
            if not (old == ".mlp." and "norm_in" in name):
                name = name.replace(old, new)
        state[name] = value
    ours.load_state_dict(state, strict=True)
    ids = torch.randint(97, (2, 11))
    hidden = theirs(ids, output_hidden_states=True).hidden_states
    x = ours.embedding(ids)
    for i, block in enumerate(ours.blocks):
        assert_parity(x, hidden[i], f"before block {i}")
        x = block(x)
    assert_parity(ours(ids), theirs(ids).logits, "logits")
    assert parameter_count(run.shape) == sum(p.numel() for p in theirs.parameters())
