"""Writes tiny checkpoints with ai2-olmo-core itself, and what its own forward pass gives for them."""

import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

IDS = torch.randint(61, (2, 23), generator=torch.Generator().manual_seed(0))
CASES = ("olmo2", "olmo3", "first_full", "llama", "qwen3", "layer_norm", "peri")
SHAPE = {
    "d_model": 16, "vocab_size": 61, "n_layers": 2, "n_heads": 4, "hidden_size_multiple_of": 8,
    "rope_theta": 900, "layer_norm_eps": 3e-4,
}  # fmt: skip


def configs():
    """A TransformerConfig per case."""
    from olmo_core.nn.attention import SlidingWindowAttentionConfig
    from olmo_core.nn.layer_norm import LayerNormType
    from olmo_core.nn.rope import (
        ABFRoPEScalingConfig,
        StepwiseRoPEScalingConfig,
        YaRNRoPEScalingConfig,
    )
    from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig

    def like(**changes):
        return TransformerConfig.llama_like(**SHAPE | changes)

    reordered = {"block_name": TransformerBlockType.reordered_norm, "qk_norm": True}
    window = SlidingWindowAttentionConfig(
        pattern=[4, 4, 4, -1], force_full_attention_on_first_layer=False
    )
    first = SlidingWindowAttentionConfig(pattern=[3, -1])
    yarn = YaRNRoPEScalingConfig(factor=8.0, old_context_len=16, beta_fast=4, beta_slow=1)
    stepwise = StepwiseRoPEScalingConfig(factor=8.0, old_context_len=40)
    return {
        "olmo2": like(**reordered, n_kv_heads=2),
        "olmo3": like(**reordered, n_layers=4, sliding_window=window).with_rope_scaling(yarn),
        "first_full": like(**reordered, n_layers=5, sliding_window=first),
        "llama": like(n_kv_heads=1, rope_scaling=stepwise),
        "qwen3": like(qk_norm=True, use_head_qk_norm=True, head_dim=6, tie_word_embeddings=True),
        "layer_norm": like(
            layer_norm_name=LayerNormType.default, rope_scaling=ABFRoPEScalingConfig(new_theta=77)
        ),
        "peri": like(block_name=TransformerBlockType.peri_norm, qk_norm=True),
    }


def write(folder: Path, case: str) -> None:
    """config.json, model_and_optim/ and states.safetensors, with nothing at its default."""
    from olmo_core.distributed.checkpoint import save_model_and_optim_state

    config = configs()[case]
    model = config.build(init_device="cpu").eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.3)
    states = []
    for module in (model.embeddings, *(
        stream
        for block in model.blocks.values()
        for stream in (block.attention_residual_stream, block.feed_forward_residual_stream)
    )):  # fmt: skip
        module.register_forward_hook(
            lambda module, arguments, output: states.append(output.clone())
        )
    with torch.no_grad():
        logits = model(IDS)
    optim = torch.optim.AdamW(model.parameters()) if case == "olmo2" else None
    with warnings.catch_warnings():  # that there is one process only
        warnings.simplefilter("ignore")
        save_model_and_optim_state(folder / "model_and_optim", model, optim, thread_count=2)
    (folder / "config.json").write_text(json.dumps({"model": config.as_config_dict()}, indent=1))
    expected = {f"state.{i:02}": state for i, state in enumerate(states)}
    save_file(expected | {"logits": logits}, folder / "states.safetensors")
