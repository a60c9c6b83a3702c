"""The old OLMo trainer's fused layout, written here from transformers' models, state by state."""

import json
from functools import partial

import pytest
import torch
import yaml
from conftest import refused, write_olmo
from safetensors.torch import save_file
from test_architectures import IDS, assert_same, sublayer_states
from test_olmo_core import write_grid

from simlab import compose
from simlab.checkpoints import streamed
from simlab.checkpoints.checkpoint import Checkpoint
from simlab.experiment import run

OLMO2 = {
    "d_model": 48, "n_heads": 6, "n_kv_heads": 2, "n_layers": 5, "mlp_hidden_size": 160,
    "vocab_size": 55, "embedding_size": 61, "rope": True, "rope_theta": 900,
    "layer_norm_type": "rms", "layer_norm_eps": 3e-4, "layer_norm_with_affine": True,
    "attention_layer_norm": True, "norm_after": True, "weight_tying": False,
    "include_bias": False, "bias_for_layer_norm": False, "block_type": "sequential",
    "activation_type": "swiglu", "flash_attention": True, "init_device": "meta",
}  # fmt: skip
OLMO1 = {
    "d_model": 48, "n_heads": 6, "n_layers": 5, "mlp_ratio": 4, "mlp_hidden_size": None,
    "vocab_size": 61, "embedding_size": None, "rope": True, "layer_norm_type": "default",
    "layer_norm_with_affine": False, "include_bias": False, "multi_query_attention": True,
}  # fmt: skip


def fused(model):
    """transformers' OLMo as the old trainer named and stacked it."""
    out = {"transformer.wte.weight": model.model.embed_tokens.weight}
    for i, layer in enumerate(model.model.layers):
        attention, mlp, to = layer.self_attn, layer.mlp, f"transformer.blocks.{i}."
        qkv = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        out[to + "att_proj.weight"] = torch.cat(qkv)
        out[to + "attn_out.weight"] = attention.o_proj.weight
        out[to + "ff_proj.weight"] = torch.cat((mlp.up_proj.weight, mlp.gate_proj.weight))
        out[to + "ff_out.weight"] = mlp.down_proj.weight
        if hasattr(attention, "q_norm"):
            out[to + "q_norm.weight"] = attention.q_norm.weight
            out[to + "k_norm.weight"] = attention.k_norm.weight
            out[to + "attn_norm.weight"] = layer.post_attention_layernorm.weight
            out[to + "ff_norm.weight"] = layer.post_feedforward_layernorm.weight
    if hasattr(model.model.norm, "weight"):
        out["transformer.ln_f.weight"] = model.model.norm.weight
    if not model.config.tie_word_embeddings:
        out["transformer.ff_out.weight"] = model.lm_head.weight
    return {name: value.detach().clone() for name, value in out.items()}


def write_legacy(folder, tensors, config, kind):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 1, "model": config, "run": [1]}))
    if kind == "pt":
        torch.save(tensors, folder / "model.pt")
    else:
        save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module")
def olmo2(tmp_path_factory):
    rope = {"rope_type": "default", "rope_theta": 900.0}
    return write_olmo(tmp_path_factory.mktemp("hf"), rope_parameters=rope)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_every_hidden_state_of_olmo2(tmp_path, olmo2, kind):
    write_legacy(tmp_path / "m", fused(olmo2), OLMO2, kind)
    assert_same(tmp_path / "m", *sublayer_states(olmo2, IDS))


@pytest.mark.parametrize("tied", [True, False])
def test_every_hidden_state_of_olmo1(tmp_path, tied):
    changes = {"num_key_value_heads": 1, "intermediate_size": 96, "tie_word_embeddings": tied}
    model = write_olmo(tmp_path / "hf", kind="Olmo", **changes)
    write_legacy(tmp_path / "m", fused(model), OLMO1 | {"weight_tying": tied}, "pt")
    assert_same(tmp_path / "m", *sublayer_states(model, IDS, norms_out=False))


@pytest.mark.parametrize("norm_after", [True, False])
def test_layer_norm_is_qk_norms_too(tmp_path, norm_after):
    """``layer_norm_type: default`` with ``attention_layer_norm``: every norm subtracts the mean.

    transformers has no such model: here its OLMo-2, each norm another, or its norms moved to the front.
    """
    rope = {"rope_type": "default", "rope_theta": 900.0}
    model = write_olmo(tmp_path / "hf", rope_parameters=rope)
    config = OLMO2 | {"layer_norm_type": "default", "norm_after": norm_after}
    write_legacy(tmp_path / "m", fused(model), config, "pt")
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if name.endswith("norm"):
                layer = torch.nn.LayerNorm(len(norm.weight), eps=3e-4, bias=False)
                layer.weight = norm.weight
                setattr(parent, name, layer)
    if norm_after:
        return assert_same(tmp_path / "m", *sublayer_states(model, IDS))
    for layer in model.model.layers:
        layer.forward = partial(pre_norm_layer, layer)
    return assert_same(tmp_path / "m", *sublayer_states(model, IDS, norms_out=False))


def pre_norm_layer(layer, x, **options):
    """An OLMo-2 layer whose norms are in front of attention and MLP."""
    x = x + layer.self_attn(hidden_states=layer.post_attention_layernorm(x), **options)[0]
    return x + layer.mlp(layer.post_feedforward_layernorm(x))


def test_shared_storage_and_parameters(tmp_path, olmo2):
    """Parameters instead of tensors; views of one storage; and two tensors that are one."""
    tensors = fused(olmo2)
    whole = torch.cat([value.flatten() for value in tensors.values()])
    views, at = {}, 0
    for name, value in tensors.items():
        views[name] = whole[at : at + value.numel()].view(value.shape)
        at += value.numel()
    write_legacy(tmp_path / "m", views, OLMO2, "pt")
    assert_same(tmp_path / "m", *sublayer_states(olmo2, IDS))
    parameters = {name: torch.nn.Parameter(value) for name, value in tensors.items()}
    write_legacy(tmp_path / "m", parameters, OLMO2, "pt")
    assert_same(tmp_path / "m", *sublayer_states(olmo2, IDS))
    tensors["transformer.ff_out.weight"] = tensors["transformer.wte.weight"]
    write_legacy(tmp_path / "m", tensors, OLMO2, "pt")
    refused(tmp_path / "m", "overlap")
    write_legacy(tmp_path / "m", tensors, OLMO2 | {"weight_tying": True}, "pt")
    Checkpoint(str(tmp_path / "m"))  # with tying the head is not read


def test_a_negated_view_is_refused(tmp_path, olmo2):
    """torch keeps the sign as a bit of the tensor: the file's bytes are the negative of its values."""
    name = "transformer.blocks.2.ff_proj.weight"
    tensors = fused(olmo2)
    tensors[name] = torch._neg_view(-tensors[name])
    write_legacy(tmp_path / "m", tensors, OLMO2, "pt")
    refused(tmp_path / "m", name, "negation")
    tensors[name] = tensors[name].resolve_neg()
    write_legacy(tmp_path / "m", tensors, OLMO2, "pt")
    assert_same(tmp_path / "m", *sublayer_states(olmo2, IDS))


class WithState:
    """A tensor that is pickled with the state of another, which torch's ``__setstate__`` puts in."""

    def __init__(self, tensor, other):
        self.tensor, self.other = tensor, other

    def __reduce__(self):
        storage = self.other.untyped_storage()
        typed = torch.storage.TypedStorage(
            wrap_storage=storage, dtype=torch.float32, _internal=True
        )
        build, args = self.tensor.__reduce_ex__(2)
        return build, args, (typed, 0, tuple(self.other.shape), self.other.stride())


def test_a_tensor_set_to_another_is_refused(tmp_path, olmo2):
    name = "transformer.blocks.2.attn_norm.weight"
    tensors = fused(olmo2)
    original = tensors[name]
    tensors[name] = WithState(original, original + 5)
    write_legacy(tmp_path / "m", tensors, OLMO2, "pt")
    read = torch.load(tmp_path / "m" / "model.pt", weights_only=False)[name]
    assert torch.equal(read, original + 5)  # negative control: torch's values are the state's
    refused(tmp_path / "m", name, "state")


def test_swapped_gate_is_detected(tmp_path, olmo2):
    """Negative control: (gate, up) instead of (up, gate) is beyond the tolerance."""
    tensors = fused(olmo2)
    name = "transformer.blocks.2.ff_proj.weight"
    tensors[name] = tensors[name].roll(80, 0)
    write_legacy(tmp_path / "m", tensors, OLMO2, "pt")
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "m", *sublayer_states(olmo2, IDS))


THEIRS = {
    "model.embed_tokens": "embeddings", "self_attn.q_proj": "attention.w_q",
    "self_attn.k_proj": "attention.w_k", "self_attn.v_proj": "attention.w_v",
    "self_attn.o_proj": "attention.w_out", "self_attn.": "attention.", "mlp.gate": "feed_forward.w1",
    "mlp.up": "feed_forward.w3", "mlp.down": "feed_forward.w2", "model.layers": "blocks", "_proj": "",
    "post_attention_layernorm": "attention_norm", "post_feedforward_layernorm": "feed_forward_norm",
    "model.norm": "lm_head.norm", "lm_head.weight": "lm_head.w_out.weight",
}  # fmt: skip


@pytest.mark.parametrize("run_bytes", [streamed.RUN_BYTES, 1000])
def test_one_hash_in_three_formats(tmp_path, olmo2, monkeypatch, run_bytes):
    monkeypatch.setattr(streamed, "RUN_BYTES", run_bytes)
    olmo2.save_pretrained(tmp_path / "hf")
    write_legacy(tmp_path / "legacy", fused(olmo2), OLMO2, "pt")
    tensors = {}
    for name, value in olmo2.state_dict().items():
        for old, new in THEIRS.items():
            name = name.replace(old, new)
        tensors["model." + name] = value
    (tmp_path / "core").mkdir()
    write_grid(tmp_path / "core", tensors, 20)
    norm = {"name": "rms", "eps": 3e-4, "bias": False}
    heads = {"n_heads": 6, "n_kv_heads": 2, "bias": False}
    attention = {**heads, "rope": {"theta": 900}, "qk_norm": norm}
    mlp = {"hidden_size": 80, "bias": False}
    block = {"attention": attention, "layer_norm": norm, "feed_forward": mlp}
    block["name"] = "reordered_norm"
    head = {"layer_norm": norm, "bias": False}
    model = {"d_model": 48, "vocab_size": 61, "n_layers": 5, "block": block, "lm_head": head}
    (tmp_path / "core" / "config.json").write_text(json.dumps({"model": model}))
    hashes = set()
    for name in ("hf", "legacy", "core"):
        source = ["source=checkpoint", f"source.path={tmp_path / name}"]
        hashes.add(run(compose([*source, "seeds=0", "inputs.length=8"])).summary["weight_hash"])
    assert len(hashes) == 1


REFUSED = [
    ({"block_type": "llama"}, "block_type='llama'", "sequential"),
    ({"activation_type": "gelu"}, "activation_type='gelu'", "swiglu"),
    ({"layer_norm_type": "amd"}, "layer_norm_type='amd'", "rms, default, low_precision"),
    ({"clip_qkv": 8.0}, "clip_qkv=8.0", "null"),
    ({"include_bias": True}, "include_bias=True", "false"),
    ({"include_bias": None}, "include_bias", "false"),
    ({"bias_for_layer_norm": True}, "bias_for_layer_norm=True", "false"),
    ({"rope": False}, "rope=False", "true"),
    ({"alibi": True}, "alibi=True", "false"),
    ({"scale_logits": True}, "scale_logits=True", "false"),
    ({"embedding_layer_norm": True}, "embedding_layer_norm=True", "false"),
    ({"block_group_size": 4}, "block_group_size=4", "1"),
    ({"multi_query_attention": True}, "multi_query_attention=true", "1 or null"),
    ({"mlp_hidden_size": 161}, "mlp_hidden_size=161", "even"),
    ({"n_layers": 10**9}, "n_layers=1000000000", "holds"),
    ({"embedding_size": None}, "shape (61, 48)", "(55, 48)"),
    ({"complex_rope": True}, "complex_rope=True", "doesn't know this key"),
    ({"rope": None}, "rope=None", "true"),
]


@pytest.mark.parametrize(("changes", "value", "allowed"), REFUSED)
def test_unsupported_configs_are_refused(tmp_path, olmo2, changes, value, allowed):
    write_legacy(tmp_path / "m", fused(olmo2), OLMO2 | changes, "pt")
    refused(tmp_path / "m", value, allowed)


def test_old_torch_format_is_refused(tmp_path, olmo2):
    write_legacy(tmp_path / "m", fused(olmo2), OLMO2, "pt")
    torch.save(fused(olmo2), tmp_path / "m" / "model.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "m", "from before version 1.6")


def test_yaml_numbers_in_exponent_notation(tmp_path, olmo2):
    """1e-6 is text to YAML 1.1, and a number to the trainer."""
    write_legacy(tmp_path / "m", fused(olmo2), OLMO2, "pt")
    path = tmp_path / "m" / "config.yaml"
    path.write_text(path.read_text().replace("0.0003", "1e-6"))
    assert Checkpoint(str(tmp_path / "m")).model.norm.eps == 1e-6


AMBIGUOUS = {
    "twice": ("  norm_after: true\n", "  norm_after: true\n  norm_after: false\n", "norm_after"),
    "quoted": ("model:\n", "model:\n  'd_model': 48\n", "d_model"),
    "two sections": ("seed: 1\n", "seed: 1\nmodel : {d_model: 64}\n", "model"),
    "octal": ("d_model: 48", "d_model: 060", "d_model"),
}


@pytest.mark.parametrize("which", AMBIGUOUS)
def test_what_readers_of_yaml_disagree_on(tmp_path, olmo2, which):
    """The first of two values, or the last; 060 as 60 (YAML 1.2), or as 48 (1.1)."""
    write_legacy(tmp_path / "m", fused(olmo2), OLMO2, "pt")
    path = tmp_path / "m" / "config.yaml"
    old, new, key = AMBIGUOUS[which]
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    why = "is octal to some readers" if which == "octal" else "is there twice"
    refused(tmp_path / "m", "config.yaml", f"'{key}'", why)


WRAPPED = {
    "model": (lambda tensors: {"epoch": 3, "optimizer": {"lr": 1.0}, "model": tensors},
              "a dictionary of tensors under 'model'", "torch.save(torch.load(path)['model'], path)"),
    "parameters": (lambda tensors: {"state_dict": {k: torch.nn.Parameter(tensors[k]) for k in tensors}},
                   "a dictionary of tensors under 'state_dict'", "save them alone"),
    "number": (lambda tensors: {"epoch": 3} | tensors, "tensor 'epoch': not a tensor, an int", ""),
    "list": (lambda tensors: list(tensors.values()), "model.pt: a list, not a dictionary", ""),
    "transposed": (lambda tensors: {k: v.expand(2, *v.shape).mT for k, v in tensors.items()},
                   "save it again after .contiguous()", ""),
}  # fmt: skip


@pytest.mark.parametrize("which", WRAPPED)
def test_what_a_pt_file_holds_instead_is_said(tmp_path, olmo2, which):
    wrap, *parts = WRAPPED[which]
    write_legacy(tmp_path / "m", wrap(fused(olmo2)), OLMO2, "pt")
    refused(tmp_path / "m", "model.pt", *parts)
