"""The name that a user meant, of a key or a value: by what other libraries call it, or by spelling."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

# What a thing is called here, and elsewhere. Capitals and _ - . don't count.
_CALLED = {
    "depth": "layers n_layer n_layers num_layers num_hidden_layers n_blocks num_blocks",
    "width": "hidden_size hidden_dim d_model model_dim n_embd embed_dim dim",
    "heads": "n_head n_heads num_heads num_attention_heads",
    "kv_heads": "n_kv_heads num_kv_heads num_key_value_heads num_query_groups",
    "d_ff": "d_mlp ffn_dim ffn_size intermediate_size mlp_hidden_size n_inner",
    "vocab_size": "vocab n_vocab vocabulary",
    "seeds": "n_seeds num_seeds",
    "dtype": "precision torch_dtype",
    "gradients": "grad grads backward",
    "dry_run": "plan estimate",
    "model.tied": "tie_word_embeddings weight_tying",
    "model.window": "sliding_window window_size",
    "model.mlp": "activation hidden_act activation_function",
    "norm.eps": "epsilon rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps",
    "norm.type": "norm_type layer_norm_type",
    "init.std": "sigma initializer_range init_std",
    "inputs.batch": "batch_size",
    "inputs.length": "seq_len sequence_length seq_length max_seq_len context_length n_ctx n_tokens",
    "inputs.prompt": "text",
    "inputs.path": "file text_file",
    "inputs.special_tokens": "bos add_bos add_special_tokens",
    "source.path": "file folder dir checkpoint ckpt checkpoint_path model_path hub_id repo",
    "source.revision": "ref branch tag commit",
    "hydra.run.dir": "out output output_dir out_dir",
    "hydra/launcher": "launcher",
    "pre": "pre_norm pre_ln",
    "post": "post_norm post_ln",
    "peri": "peri_ln sandwich sandwich_norm sandwich_ln",
    "none": "no_norm",
    "deepnorm": "deepnet",
    "dyt": "dynamic_tanh",
    "derf": "dynamic_erf",
    "mhc": "deepseek manifold_hyper_connections",
    "hyper_connections": "hc dhc",
    "hy_v4": "hunyuan hunyuan_v4",
    "attn_res": "attn_residual attn_residuals attention_residual attention_residuals",
    "attn_res_block": "block_attn_res block_attention_residuals",
    "kimi_k3": "kimi",
    "lns": "layernorm_scaling",
    "swin_renorm": "swin swin_v2",
    "residual_scale": "deepscale_lm",
    "rms": "rmsnorm",
    "layer": "ln layernorm",
    "cuda": "gpu nvidia",
    "checkpoint": "hf ckpt huggingface pretrained safetensors",
    "tensorboard": "tb",
    "wandb": "wb weights_and_biases",
    "branch_mean_square": "branch",
    "mps": "metal",
    "float32": "float fp32 f32 single full",
    "float16": "fp16 f16 half",
    "bfloat16": "bf16",
}


_MOST_ASKED = 4  # names in a question
_MOST_LISTED = 8  # names in a list


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


_MEANT: dict[str, list[str]] = {}
for _ours, _theirs in _CALLED.items():
    for _name in _theirs.split():
        _MEANT.setdefault(_plain(_name), []).append(_ours)


def _likeness(said: str, name: str) -> float:
    """From 0 to 1, how alike two names are spelled; 0 where they are far from each other.

    Other numbers are other things, so neither name may have digits that the other lacks if both do:
    float64 is no float16, but 7b may be 27b.
    """
    said, name = _plain(said), _plain(name)
    digits, others = set(re.findall(r"\d", said)), set(re.findall(r"\d", name))
    if not (digits <= others or others <= digits):
        return 0.0
    alike = difflib.SequenceMatcher(None, said, name).ratio()
    if sorted(said) == sorted(name) and sum(a != b for a, b in zip(said, name, strict=True)) == 2:
        alike = max(alike, 0.9)  # two letters changed places: mch is mhc
    return alike if alike >= 0.75 else 0.0  # nrom is 0.75 of norm; gpu 0.67 of cpu


def _asked(names: Sequence[str]) -> str:
    *others, last = names or [""]
    whole = " or ".join([", ".join(others), last] if others else [last])
    return f"; did you mean {whole}?" if whole else ""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """``"; did you mean …?"`` where an allowed name means the same or is near, else an empty string."""
    names = list(allowed)
    if _plain(name) in _MEANT:  # and no slip: ln is LayerNorm, not lns
        return _asked([n for n in names if n in _MEANT[_plain(name)]][:1])
    best = max(names, key=lambda n: _likeness(name, n), default="")
    if _likeness(name, best) < 1 and (parts := _with_part(name, names)):
        return _asked(parts)
    return _asked([best] * (_likeness(name, best) > 0))


def _with_part(part: str, names: Sequence[str]) -> list[str]:
    """The names that begin or end with ``part`` as a whole word: of 7b olmo2_7b. Not too many."""
    found = [n for n in names if part and re.search(rf"^{re.escape(part)}_|_{re.escape(part)}$", n)]
    return found if len(found) <= _MOST_ASKED else []


def some(names: Sequence[str]) -> str:
    """Names for a line of text: all, or the first _MOST_LISTED of many."""
    more = len(names) - _MOST_LISTED
    return ", ".join(names[:_MOST_LISTED]) + (f" and {more} others" if more > 0 else "")


def nearest_key(key: str, keys: Iterable[str], owner: str = "", own: Sequence[str] = ()) -> str:
    """As ``nearest`` of dotted keys, by their last parts; else the keys of the group that was named.

    ``model.n_layers`` means depth, and ``norm.gian`` norm.gain; ``init.scale`` is near none of
    init's keys, which the text then names. It is empty where there is no such group either.
    owner, own: the choice of the group, as ``norm=mhc``, and its keys, which are then named alone.
    """
    names = list(keys)
    group, _, last = key.rpartition(".")
    inside = [n for n in names if n.rpartition(".")[0] == group] if group else []
    meant = [n for n in names if n in _MEANT.get(_plain(last), ())]
    if meant:
        return _asked([n for n in meant if n in inside] or meant)

    def likeness(name: str) -> float:
        return _likeness(last, name.rpartition(".")[2])

    most = max(map(likeness, inside or names), default=0.0)
    near = [n for n in inside or names if likeness(n) == most > 0]
    if not near:  # the right name in another group
        near = [n for n in names if likeness(n) == 1]
    if not near and inside:
        listed = own or [n.rpartition(".")[2] for n in inside]
        return f"; {owner or group} has {', '.join(listed)}"
    return _asked(near)
