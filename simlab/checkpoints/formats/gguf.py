"""GGUF, llama.cpp's format: one file with the config, the tokenizer and the weights, often quantised.

After llama.cpp (src/llama-model.cpp, src/llama-hparams.cpp and its conversion scripts) and gguf 0.19,
whose ``dequantize`` makes numbers of the quantised blocks. For llama and olmo llama.cpp turns pairs of
neighbouring channels by RoPE, and its converter reorders the rows of q and k to suit; here they are put
back into the order of transformers, whose pairs are half a head apart.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simlab.checkpoints.formats.gguf_gemma import GEMMA_KEYS, gemma_model
from simlab.checkpoints.formats.hugging_face import ARCHITECTURES, same_but_rounded
from simlab.checkpoints.formats.keys import Keys
from simlab.checkpoints.formats.opened import Opened, layers, read_heads
from simlab.checkpoints.formats.own_init import gguf_init
from simlab.checkpoints.packed import PackedTensor, Packing
from simlab.checkpoints.storage import Piece, StoredFile, StoredTensor, check_pieces, in_one_piece
from simlab.checkpoints.untrusted.files import fields_of
from simlab.checkpoints.untrusted.gguf import TensorPlace, read_gguf
from simlab.config import ConfigError, Llama3RopeConfig, ModelConfig, NormConfig, YarnConfig
from simlab.config.fields import Fields, brief
from simlab.schemes.rope import inverse_frequencies

# Ours to theirs; {} is the block.
_SHARED = {
    "embedding.weight": "token_embd.weight",
    "head.weight": "output.weight",
    "blocks.{}.attention.sublayer.q_proj.weight": "blk.{}.attn_q.weight",
    "blocks.{}.attention.sublayer.k_proj.weight": "blk.{}.attn_k.weight",
    "blocks.{}.attention.sublayer.v_proj.weight": "blk.{}.attn_v.weight",
    "blocks.{}.attention.sublayer.o_proj.weight": "blk.{}.attn_output.weight",
    "blocks.{}.mlp.sublayer.gate_proj.weight": "blk.{}.ffn_gate.weight",
    "blocks.{}.mlp.sublayer.up_proj.weight": "blk.{}.ffn_up.weight",
    "blocks.{}.mlp.sublayer.down_proj.weight": "blk.{}.ffn_down.weight",
}
_NORMS_IN = {
    "norm.weight": "output_norm.weight",
    "blocks.{}.attention.norm_in.weight": "blk.{}.attn_norm.weight",
    "blocks.{}.mlp.norm_in.weight": "blk.{}.ffn_norm.weight",
}
_NORMS_OUT = {
    "norm.weight": "output_norm.weight",
    "blocks.{}.attention.norm_out.weight": "blk.{}.post_attention_norm.weight",
    "blocks.{}.mlp.norm_out.weight": "blk.{}.post_ffw_norm.weight",
}
_QK_NORM = {
    "blocks.{}.attention.sublayer.q_norm.weight": "blk.{}.attn_q_norm.weight",
    "blocks.{}.attention.sublayer.k_norm.weight": "blk.{}.attn_k_norm.weight",
}
_QKV_BIAS = {
    f"blocks.{{}}.attention.sublayer.{name}_proj.bias": f"blk.{{}}.attn_{name}.bias"
    for name in "qkv"
}
_NAMES = {  # OLMo 3 is olmo2 with a window; Mistral is a llama
    "llama": _SHARED | _NORMS_IN,
    "olmo": _SHARED,
    "olmo2": _SHARED | _NORMS_OUT | _QK_NORM,
    "qwen2": _SHARED | _NORMS_IN | _QKV_BIAS,
    "qwen3": _SHARED | _NORMS_IN | _QK_NORM,
    "gemma2": _SHARED | _NORMS_IN | _NORMS_OUT,
    "gemma3": _SHARED | _NORMS_IN | _NORMS_OUT | _QK_NORM,
}
_INTERLEAVED = ("llama", "olmo")  # LLAMA_ROPE_TYPE_NORM in llama.cpp; the others are NEOX
_ROPE = "rope.scaling."
# Keys that begin with the architecture's name; llama.cpp takes nothing else into a forward pass.
_KEYS = Keys(
    "block_count embedding_length feed_forward_length vocab_size attention.head_count "
    "attention.head_count_kv attention.key_length attention.value_length rope.dimension_count "
    "rope.freq_base rope.scaling.type rope.scaling.factor rope.scaling.original_context_length "
    "rope.scaling.attn_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow context_length",
    "rope.scaling.finetuned tensor_data_layout",
    {
        "attention.causal": True,
        "use_parallel_residual": False,
        "expert_count": 0,
        "expert_used_count": 0,
        "rope.scale_linear": 1.0,
        "rope.scaling.yarn_ext_factor": 1.0,
        "rope.scaling.yarn_attn_factor": 1.0,
    },
)
_RMS = Keys("attention.layer_norm_rms_epsilon")
_KEYS_OF = {
    "llama": _KEYS | _RMS,
    "olmo": _KEYS | Keys("attention.layer_norm_epsilon", fixed={"attention.clamp_kqv": None}),
    "olmo2": _KEYS | _RMS | Keys("attention.sliding_window attention.sliding_window_pattern"),
    "qwen2": _KEYS | _RMS,
    "qwen3": _KEYS | _RMS,
    **{kind: _KEYS | _RMS | own for kind, own in GEMMA_KEYS.items()},
}
_FREQUENCIES = "rope_freqs.weight"  # Llama 3.1's scaling: what each pair's frequency is divided by
# What its converter makes them of, but for the factor, in every Llama that Meta has released since 3.1.
_LLAMA3: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 8192}
# ggml's numbers of types that are torch's; the gguf library knows the others.
_PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}


def matches(path: Path) -> bool:
    """True of what isn't a folder, as every other format is."""
    return not path.is_dir()


def open_file(path: Path) -> Opened:
    """Raises ConfigError for what is missing, malformed or not supported."""
    header = read_gguf(path)
    values = header.values
    general = fields_of(values, path)
    kind = general.take("general.architecture")
    if not isinstance(kind, str) or kind not in _NAMES:
        raise general.fail("general.architecture", kind, f"allowed: {', '.join(_NAMES)}")
    general.must_be(**{"general.type": "model"})
    if values.get("split.count") not in (None, 0, 1):
        why = "a part of a model; llama.cpp's llama-gguf-split --merge joins them"
        raise general.fail("split.count", values["split.count"], why)
    prefix = f"{kind}."
    its = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    fields = Fields(its, f"{path}: {prefix}", brief, lambda name, allowed: "")
    _KEYS_OF[kind].check(fields)
    tensors = {name: _stored(name, place, header.file) for name, place in header.tensors.items()}
    model = _model(kind, fields, tensors)
    if kind in _INTERLEAVED:
        for name in ("attn_q", "attn_k"):
            for layer in range(model.depth):
                _reorder(tensors, f"blk.{layer}.{name}.weight", model.head_dim)
    kinds = Counter(tensor.kind for tensor in tensors.values()).most_common()
    stored = ", ".join(f"{count} in {name}" for name, count in kinds)
    return Opened(
        "gguf", model, _NAMES[kind], tensors, path, gguf_init(kind),
        stored_as=f"GGUF: of {len(tensors)} tensors {stored}", model_type=kind,
    )  # fmt: skip


def _model(kind: str, fields: Fields, tensors: dict[str, StoredTensor]) -> ModelConfig:
    """The architecture. Takes a scaling of RoPE that is a tensor. Raises ConfigError."""
    names = (
        "embedding_length", "attention.head_count", "attention.head_count_kv", "attention.key_length",
    )  # fmt: skip
    heads = read_heads(fields, names)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(key, default=heads["head_dim"]) != heads["head_dim"]:
            why = f"not supported; allowed: the head's size, {heads['head_dim']}"
            raise fields.fail(key, fields.values[key], why)
    depth = layers(fields, "block_count", len(tensors))
    embedding = tensors.get(_SHARED["embedding.weight"])
    rows = embedding.shape[0] if embedding else 1
    name = Path(fields.prefix.partition(": ")[0]).stem
    tied = _SHARED["head.weight"] not in tensors
    if kind in GEMMA_KEYS:
        return gemma_model(kind, fields, name, heads, depth, rows, tied)
    its = ARCHITECTURES[kind]
    window = fields.integer("attention.sliding_window", 0, default=0) or None
    theta = fields.number("rope.freq_base", 1.0, above=True, default=10_000.0)
    yarn, llama3 = _yarn(fields), None
    if (divisors := tensors.pop(_FREQUENCIES, None)) is not None:
        if yarn is not None:
            raise ConfigError(f"{fields.prefix}{_ROPE}type=yarn, and the file holds {_FREQUENCIES}")
        llama3 = _llama3(divisors, heads["head_dim"], theta)
    eps = "attention.layer_norm_epsilon" if kind == "olmo" else "attention.layer_norm_rms_epsilon"
    return ModelConfig(
        name=name,
        depth=depth,
        **heads,
        d_ff=fields.integer("feed_forward_length"),
        vocab_size=fields.integer("vocab_size", default=rows),
        norm=NormConfig(its.placement, type=its.norm_type, eps=fields.number(eps, 0.0)),
        qk_norm=its.qk_norm,
        rope_theta=theta,
        yarn=yarn,
        llama3=llama3,
        window=window,
        full_attention=_full_layers(fields, depth) if window else (),
        tied=tied,
        qkv_bias=its.qkv_bias,
    )


def _full_layers(fields: Fields, depth: int) -> tuple[int, ...]:
    """The layers that see every token, of a model with a window. Raises ConfigError."""
    key = "attention.sliding_window_pattern"
    pattern = fields.take(key)
    if pattern is None:  # llama.cpp's rule for OLMo 3: every fourth layer sees everything
        return tuple(range(3, depth, 4))
    if not isinstance(pattern, list) or len(pattern) != depth or {*map(type, pattern)} != {bool}:
        raise fields.fail(key, pattern, f"must be {depth} of true, false")
    return tuple(i for i, slides in enumerate(pattern) if not slides)


def _yarn(fields: Fields) -> YarnConfig | None:
    """YaRN's scaling of RoPE, if the file asks for it. Raises ConfigError for another scaling."""
    kind = fields.choice(f"{_ROPE}type", ("none", "linear", "yarn"), "linear")
    factor = fields.number(f"{_ROPE}factor", 0.0, default=1.0) or 1.0
    if kind != "yarn":
        if factor != 1:
            why = f"with {_ROPE}type={kind} not supported; allowed: 1, or {_ROPE}type=yarn"
            raise fields.fail(f"{_ROPE}factor", factor, why)
        return None
    yarn = YarnConfig(
        factor=fields.number(f"{_ROPE}factor", 1.0),
        original_length=fields.integer(
            f"{_ROPE}original_context_length", default=fields.take("context_length")
        ),
        beta_fast=fields.number(f"{_ROPE}yarn_beta_fast", 1e-6, default=32.0),
        beta_slow=fields.number(f"{_ROPE}yarn_beta_slow", 1e-6, default=1.0),
    )
    # llama.cpp multiplies by it, but the converter of OLMo 3 writes YaRN's own factor there.
    stated = fields.number(f"{_ROPE}attn_factor", 0.0, default=1.0)
    own = 1 + 0.1 * np.log(factor)
    if min(abs(stated - 1), abs(stated - own)) > 1e-5:  # it is stored in float32
        raise fields.fail(f"{_ROPE}attn_factor", stated, f"not supported; allowed: 1, or {own:g}")
    return yarn


def _llama3(divisors: StoredTensor, head_dim: int, theta: float) -> Llama3RopeConfig | None:
    """The scaling whose frequencies are the plain ones over these, each above 0. Raises ConfigError."""
    check_pieces([divisors])
    where = f"{divisors.pieces[0].file.path}: tensor {divisors.name}"
    if divisors.shape != (head_dim // 2,):
        raise ConfigError(
            f"{where} has shape {divisors.shape}, a head of {head_dim} implies another"
        )
    theirs = divisors.rows(0, *divisors.shape).double()
    factor = theirs.max().item()
    if factor == theirs.min().item() == 1:
        return None
    pairs = torch.arange(head_dim / 2, dtype=torch.float64)
    plain, _ = inverse_frequencies(pairs, head_dim, theta)
    if 1 < factor < 1e6:
        llama3 = Llama3RopeConfig(factor, **_LLAMA3)
        scaled, _ = inverse_frequencies(pairs, head_dim, theta, llama3=llama3)
        if same_but_rounded(theirs.float(), plain / scaled):
            return llama3
    raise ConfigError(f"{where}: not Llama 3.1's scaling of RoPE, and simlab knows no other")


def _stored(name: str, place: TensorPlace, file: StoredFile) -> StoredTensor:
    """A tensor of the file, its rows in the file's order. Raises ConfigError."""
    if place.kind in _PLAIN:
        return in_one_piece(name, place.shape, _PLAIN[place.kind], file, place.offset)
    packing = _packing(place.kind, f"{file.path}: tensor {name}")
    if len(place.shape) != 2 or place.shape[1] % packing.entries:
        shape = " × ".join(map(str, place.shape))
        raise ConfigError(
            f"{file.path}: tensor {name} is {packing.name} of shape {shape}; its rows must be "
            f"blocks of {packing.entries}"
        )
    piece = Piece(file, place.offset, (0, 0), place.shape)
    return PackedTensor(name, place.shape, torch.float32, (piece,), packing)


def _packing(kind: int, what: str) -> Packing:
    """How one of ggml's quantised types is unpacked. Raises ConfigError."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
    except ImportError:
        raise ConfigError(f"{what} is quantised: pip install gguf reads it") from None
    try:
        quantised = GGMLQuantizationType(kind)
        entries, size = GGML_QUANT_SIZES[quantised]
        quants.dequantize(np.zeros((1, size), np.uint8), quantised)
    # The enum raises ValueError of a number that it lacks, the table of sizes KeyError, and dequantize
    # NotImplementedError of a type that the library knows but can't unpack.
    except (ValueError, KeyError, NotImplementedError):
        raise ConfigError(
            f"{what} is of ggml's type {kind}, which the installed gguf library can't dequantise"
        ) from None

    def unpack(raw: Tensor) -> Tensor:
        with np.errstate(all="ignore"):  # a stranger's scales: NaN and infinity are values
            numbers: Any = quants.dequantize(raw.numpy(), quantised)
        return torch.from_numpy(numbers)

    return Packing(quantised.name, entries, size, unpack)


def _reorder(tensors: dict[str, StoredTensor], name: str, head_dim: int) -> None:
    """Put the rows of a q or k back into transformers' order, if its shape allows."""
    tensor = tensors.get(name)
    if tensor is None or len(tensor.shape) != 2 or tensor.shape[0] % head_dim:
        return  # Checkpoint names the mistake
    if isinstance(tensor, PackedTensor):
        packing = tensor.packing
    else:
        dtype = tensor.dtype
        packing = Packing(tensor.kind, 1, dtype.itemsize, lambda raw: raw.view(dtype))
    tensors[name] = PackedTensor(name, tensor.shape, tensor.dtype, tensor.pieces, packing, head_dim)
