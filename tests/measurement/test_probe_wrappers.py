"""Models in what people wrap them: their rows are those of the plain model."""

import multiprocessing

import accelerate
import pandas as pd
import peft
import pytest
import torch
import transformers
from probed import IDS, assert_same, perturbed, refused, theirs
from sharded import assert_rows_of_the_plain_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from simlab import probe

BIOGPT = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("how", ["layers", "model", "checkpointed", "norms", "norms, compiled"])
def test_wrapped_layers_have_the_same_rows(how):
    """Compiled layers too, also where they have run compiled before."""
    model, expected = theirs("Olmo2"), probe(theirs("Olmo2"), IDS).rows()
    layers = model.model.layers
    for i, layer in enumerate(layers):
        if how == "checkpointed":
            layers[i] = checkpoint_wrapper(layer)
        elif how == "layers":
            layers[i] = torch.compile(layer, backend="eager")
        elif how.startswith("norms"):
            norm = layer.post_attention_layernorm
            compiled = how.endswith("compiled")
            layer.post_attention_layernorm = (
                torch.compile(norm, backend="eager") if compiled else checkpoint_wrapper(norm)
            )
    model = torch.compile(model, backend="eager") if how == "model" else model
    with torch.no_grad():
        model(IDS)
    pd.testing.assert_frame_equal(probe(model, IDS).rows(), expected)


@pytest.mark.parametrize("where", ["cpu", "disk", "both"])
@pytest.mark.parametrize("kind", ["Olmo2", "Llama"])
def test_offloaded_models_have_the_same_rows(tmp_path, kind, where):
    """Accelerate loads a module's weights for its forward alone."""
    model, expected = theirs(kind), probe(theirs(kind), IDS).rows()
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif where == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        device_map = {
            "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
            "model.layers.2": "disk", "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu",
        }  # fmt: skip
        accelerate.dispatch_model(
            model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True
        )
    norm = model.model.layers[2].post_attention_layernorm
    assert norm.weight.is_meta
    pd.testing.assert_frame_equal(probe(model, IDS).rows(), expected)
    assert norm.weight.is_meta


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # peft's of norms, and transformers'
@pytest.mark.parametrize("kind", ["Olmo2", "Llama"])
@pytest.mark.parametrize("how", ["lora", "norms", "whole norms"])
def test_adapters_have_the_rows_of_the_merged_model(kind, how):
    """Their norms are wrapped too: what a sublayer gives before its norm is still seen."""
    norms = ["input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"]
    if how == "norms":
        config = peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=norms)
    else:
        config = peft.LoraConfig(
            r=4,
            target_modules=["q_proj", "v_proj", "down_proj"],
            init_lora_weights=False,
            modules_to_save=norms if how == "whole norms" else None,
        )
    torch.manual_seed(3)
    model = peft.get_peft_model(theirs(kind), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "norm" in name:
                parameter.add_(0.3)
    rows = probe(model, IDS).rows()
    merged = probe(model.merge_and_unload(), IDS).rows()
    assert rows["gain_mean_square"].iloc[1:].notna().all()
    assert_same(rows, merged, merged.columns.drop(["curve", "kind"]))


class Packed(nn.Module):
    """A matrix as int8, several numbers in one word as bitsandbytes packs them; it gives bfloat16."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().max().item() / 127
        numbers = (linear.weight / self.scale).round().to(torch.int8)
        self.shape = numbers.shape
        self.weight = nn.Parameter(numbers.flatten().view(torch.int32), requires_grad=False)

    def forward(self, x):
        matrix = self.weight.view(torch.int8).view(self.shape) * self.scale
        return nn.functional.linear(x.float(), matrix).to(torch.bfloat16)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.ao's, in favour of torchao
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("how", ["torch", "packed"])
def test_quantised_matrices(how):
    """Steps and norms as without, and the stream is the quantised model's own."""
    model = perturbed(transformers.BioGptForCausalLM(transformers.BioGptConfig(**BIOGPT)))
    plain = probe(model, IDS)
    if how == "torch":
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    else:
        for layer in model.biogpt.layers:
            layer.fc1, layer.fc2 = Packed(layer.fc1), Packed(layer.fc2)
    found = probe(model, IDS)
    assert found.layout == plain.layout
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True, use_cache=False).hidden_states
    rows, gains = found.rows(), ["gain_mean_square", "gain_max_abs"]
    for x, i in zip(states[:-1], (0, 2, 4), strict=True):
        assert rows["mean_square"][i] == pytest.approx(x.double().square().mean().item())
    pd.testing.assert_frame_equal(rows[gains], plain.rows()[gains])
    assert rows["mean_square"][4] != plain.rows()["mean_square"][4]


def test_norms_whose_weights_are_away():
    model = theirs("Llama")
    norm = model.model.layers[0].input_layernorm
    stay = norm.weight.data.clone()
    norm.forward = lambda x: x / (x.square().mean(-1, keepdim=True) + 0.03).sqrt() * stay
    norm.weight = nn.Parameter(norm.weight.to("meta"))
    assert "LlamaRMSNorm's weight is on the meta device" in refused(model)


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")  # of one process
@pytest.mark.slow  # each process imports torch and transformers
@pytest.mark.parametrize("world", [1, 2])
def test_distributed_wrappers_have_the_same_rows(tmp_path, world):
    """FSDP shards with one process too: gains are read in the norm's own hook."""
    store = str(tmp_path / "store")
    other = multiprocessing.get_context("spawn").Process(
        target=assert_rows_of_the_plain_model, args=(1, world, store)
    )
    if world == 2:
        other.start()
    assert_rows_of_the_plain_model(0, world, store)
    if world == 2:
        other.join()
        assert other.exitcode == 0
