"""A model of transformers as a GGUF file, by llama.cpp's own library: its names, keys and blocks."""

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

# Where the two bytes of a block's scales are, of types that the library can't quantise to.
SCALES = {"Q4_K": (0, 2), "Q6_K": (208,)}


def random_blocks(shape, kind, seed):
    """Random bytes for a matrix, whose scales are numbers of a weight's size."""
    rng = np.random.default_rng(seed)
    entries, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(256, size=(shape[0] * shape[1] // entries, size), dtype=np.uint8)
    for at in SCALES[kind.name]:
        scales = rng.uniform(1e-4, 1e-3, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    return blocks.reshape(shape[0], -1)


def interleaved(weight, heads):
    """q's or k's rows as llama.cpp's converter orders them (LlamaModel.permute)."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def ordered(weight, heads):
    """The reverse."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model, kind: str = "F32", keys=None, rope=None, names=None) -> None:
    """Write a model, its matrices of type ``kind``; the model then has the dequantised weights.

    keys: more metadata, by key without the architecture's name, or with it where it has a general one.
    rope: divisors of RoPE's frequencies. names: the architecture, where it isn't the model's type.
    """
    config = model.config
    arch = names or config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    rope_of = {**config.rope_parameters.get("full_attention", {}), **config.rope_parameters}
    writer.add_rope_freq_base(float(rope_of.get("rope_theta", 10_000.0)))
    if arch == "olmo":
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_token_list([f"token {i}" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    for key, value in (keys or {}).items():
        full = key if key.split(".")[0] in ("general", "split", "mradermacher") else f"{arch}.{key}"
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
               str: writer.add_string, list: writer.add_array}[type(value)]  # fmt: skip
        add(full, value)
    number = {name: n for n, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    mapped = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    if rope is not None:
        writer.add_tensor("rope_freqs.weight", np.array(rope, np.float32))
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        theirs = mapped.get_name(name, try_suffixes=(".weight", ".bias"))
        heads = None
        if arch in ("llama", "olmo") and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_" in name else config.num_key_value_heads
        values = parameter.detach().numpy()
        values = interleaved(values, heads) if heads else values
        shift = arch.startswith("gemma") and name.endswith("norm.weight")
        values = values + np.float32(1) if shift else values  # Gemma2Model.modify_tensors
        its = Type[kind] if values.ndim == 2 else Type.F32
        if kind in SCALES and values.ndim == 2:
            data = random_blocks(values.shape, its, seed)
        else:
            data = gguf.quants.quantize(np.ascontiguousarray(values), its)
        writer.add_tensor(theirs, data, raw_dtype=its)
        values = gguf.quants.dequantize(data, its)
        values = ordered(values, heads) if heads else values
        values = values - np.float32(1) if shift else values
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(values.copy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
