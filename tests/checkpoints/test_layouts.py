"""Files that are the same model under other names, and what is said of those that aren't."""

import json
import shutil

import pytest
import torch
import transformers
from conftest import edit_json, in_process, refused, write_olmo
from safetensors.torch import load_file, save_file
from test_architectures import IDS, PLAIN, assert_same, sublayer_states
from test_legacy_olmo import OLMO2, fused, write_legacy

from simlab import build_model, compose
from simlab.checkpoints.checkpoint import Checkpoint
from simlab.config import ConfigError
from simlab.experiment import run

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def rewrite(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def source(folder):
    return ["source=checkpoint", f"source.path={folder}", "seeds=0", "inputs.length=8"]


def curve(folder):
    """What is measured of a checkpoint without gradients, as numbers; its weights' hash."""
    result = run(compose(source(folder)))
    return result.curve.mean_square.tolist(), result.summary["weight_hash"]


@pytest.mark.parametrize(("kind", "tied"), [("Olmo2", False), ("Qwen3", True)])
def test_a_base_models_files(tmp_path, kind, tied):
    """``AutoModel.save_pretrained`` leaves out ``model.`` and the head, which gradients need."""
    model = write_olmo(tmp_path / "m", kind, head_dim=8, tie_word_embeddings=tied, **TINY)
    model.model.save_pretrained(tmp_path / "base")
    assert curve(tmp_path / "base") == curve(tmp_path / "m")
    if tied:
        norms_out = kind == "Olmo2"
        return assert_same(tmp_path / "base", *sublayer_states(model, IDS, norms_out))
    for use in (run, build_model):
        with pytest.raises(ConfigError, match=r"holds no lm_head\.weight"):
            use(compose([*source(tmp_path / "base"), "gradients=true"]))
    return None


@pytest.mark.parametrize(
    "before", ["_orig_mod.", "module.", "_fsdp_wrapped_module.module.", "_forward_module."]
)
def test_a_wrapped_models_names(tmp_path, before):
    model = write_olmo(tmp_path / "m", "Llama", **TINY)
    rewrite(tmp_path / "m", lambda t: {before + name: value for name, value in t.items()})
    assert_same(tmp_path / "m", *sublayer_states(model, IDS, norms_out=False))


def test_wrapped_layers_names(tmp_path):
    """Also where each layer is wrapped, and in the old trainer's files."""
    model = write_olmo(tmp_path / "hf", rope_parameters=PLAIN)
    tensors = {
        name.replace("blocks.1.", "blocks.1._orig_mod."): value
        for name, value in fused(model).items()
    }
    write_legacy(tmp_path / "m", tensors, OLMO2, "pt")
    assert_same(tmp_path / "m", *sublayer_states(model, IDS))
    name = "transformer.blocks.1.attn_norm.weight"
    write_legacy(tmp_path / "m", tensors | {name: torch.ones(48)}, OLMO2, "pt")
    refused(tmp_path / "m", "blocks.1.attn_norm.weight", "are one in a model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_frequencies(tmp_path, dtype):
    """Files of before 2023 hold RoPE's frequencies: they must be the config's."""
    write_olmo(tmp_path / "m", "Llama", rope_parameters=PLAIN, **TINY)
    rope = 900.0 ** -(torch.arange(0, 8, 2) / 8)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path / "m", lambda t: t | {name: rope.to(dtype)})
    Checkpoint(str(tmp_path / "m"))
    off = 1 + 3 * max(torch.finfo(dtype).eps, 1e-5)  # three roundings
    rewrite(tmp_path / "m", lambda t: t | {name: (rope * off).to(dtype)})
    refused(tmp_path / "m", name, "RoPE")


@pytest.mark.parametrize("kind", ["GPT2", "GPTNeoX"])
def test_older_gpt_files(tmp_path, kind):
    """Masks and frequencies beside the weights, and GPT-2's first files, of the base model alone."""
    model = write_olmo(tmp_path / "m", kind, tie_word_embeddings=True, **TINY)
    before = curve(tmp_path / "m")
    model.base_model.save_pretrained(tmp_path / "base")
    assert curve(tmp_path / "base") == before
    block = "h.1.attn." if kind == "GPT2" else "layers.1.attention."
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
    old = {f"{block}bias": mask, f"{block}masked_bias": torch.tensor(-1e4)}
    if kind == "GPTNeoX":
        old[f"{block}rotary_emb.inv_freq"] = 10_000.0 ** -torch.arange(0, 1.0)
    rewrite(tmp_path / "base", lambda t: t | old)
    assert curve(tmp_path / "base") == before
    assert not Checkpoint(str(tmp_path / "base")).unread
    assert_same(tmp_path / "base", *sublayer_states(model, IDS % 61, norms_out=False), ids=IDS % 61)
    if kind == "GPTNeoX":
        name = f"{block}rotary_emb.inv_freq"
        rewrite(tmp_path / "base", lambda t: t | {name: torch.tensor([0.5])})
        refused(tmp_path / "base", name, "RoPE")


@pytest.mark.parametrize("kind", ["GPT2", "GPTNeoX", "Llama"])
@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_weights(tmp_path, kind, shards):
    """As ``torch.save`` writes a state dict: tied tensors under both names, and masks."""
    model = write_olmo(tmp_path / "m", kind, tie_word_embeddings=True, **TINY)
    before, folder = curve(tmp_path / "m"), tmp_path / "m"
    (folder / "model.safetensors").unlink()
    state = model.state_dict()
    if kind == "GPT2":
        state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8).tril()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        files = [f"pytorch_model-0000{i + 1}-of-00002.bin" for i in range(2)]
        at = {name: files[i % 2] for i, name in enumerate(state)}
        if kind != "GPTNeoX":  # one storage isn't split over files
            del state["lm_head.weight"], at["lm_head.weight"]
        else:
            at["lm_head.weight"] = at["gpt_neox.embed_in.weight"]
        for file in files:
            torch.save({n: t for n, t in state.items() if at[n] == file}, folder / file)
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": at}))
    assert curve(folder) == before
    assert not Checkpoint(str(folder)).unread


def test_a_pickle_that_runs_code(tmp_path):
    write_olmo(tmp_path / "m", "GPT2", **TINY)
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({"wte.weight": print}, tmp_path / "m" / "pytorch_model.bin")
    refused(tmp_path / "m", "pytorch_model.bin", "print")


@pytest.mark.parametrize(
    ("name", "tensor", "parts"),
    [
        ("layers.0.attention.query_key_value.bias", torch.zeros(95), ["(95,)", "(96,)"]),
        ("layers.0.attention.query_key_value.weight", torch.zeros(96, 0), ["(96, 0)", "(96, 32)"]),
        ("layers.0.mlp.dense_h_to_4h.bias", torch.zeros(48, dtype=torch.int64), ["int64"]),
        ("embed_in.weight", torch.zeros(61, 32), ["are one in a model"]),
        ("layers.0.attention.masked_weight", torch.zeros(1), ["not part of this architecture"]),
    ],
)
def test_wrong_gpt_files(tmp_path, name, tensor, parts):
    write_olmo(tmp_path / "m", "GPTNeoX", **TINY)
    own = name if name.startswith("embed") else f"gpt_neox.{name}"
    rewrite(tmp_path / "m", lambda t: t | {own: tensor})
    refused(tmp_path / "m", name, *parts)


def test_a_tied_models_other_head(tmp_path):
    """A stored head that isn't the embedding: refused where the head is needed, as in gradients."""
    write_olmo(tmp_path / "m", **TINY)
    before = curve(tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", tie_word_embeddings=True)
    assert curve(tmp_path / "m") == before
    said = Checkpoint(str(tmp_path / "m")).opened.unread
    assert said == "not used: lm_head.weight, for config.json ties the head to the embedding"
    for use in (run, build_model):
        with pytest.raises(ConfigError, match=r"another lm_head\.weight"):
            use(compose([*source(tmp_path / "m"), "gradients=true"]))
    rewrite(
        tmp_path / "m", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}
    )
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert_same(tmp_path / "m", *sublayer_states(reference, IDS))


def test_a_legacy_models_other_head(tmp_path):
    """Said, unless it is the embedding itself, as a .pt file can have it."""
    tensors = fused(write_olmo(tmp_path / "hf", vocab_size=61))
    write_legacy(tmp_path / "m", tensors, OLMO2 | {"weight_tying": True}, "pt")
    said = Checkpoint(str(tmp_path / "m")).opened.unread
    ties = "config.yaml ties the head to the embedding"
    assert said == f"not used: transformer.ff_out.weight, for {ties}"
    tensors["transformer.ff_out.weight"] = tensors["transformer.wte.weight"]
    write_legacy(tmp_path / "m", tensors, OLMO2 | {"weight_tying": True}, "pt")
    assert not Checkpoint(str(tmp_path / "m")).opened.unread


def test_other_tasks_heads(tmp_path):
    """A classifier's own head is named; gradients and the loss need a language model's."""
    model = write_olmo(tmp_path / "m", "Llama", **TINY)
    before = curve(tmp_path / "m")
    for task, held in [
        ("SequenceClassification", "score.weight"),
        ("TokenClassification", "score.weight score.bias"),
        ("QuestionAnswering", "qa_outputs.weight qa_outputs.bias"),
    ]:
        folder = tmp_path / task
        other = getattr(transformers, f"LlamaFor{task}")(model.config)
        getattr(other, other.base_model_prefix).load_state_dict(model.model.state_dict())
        other.save_pretrained(folder)
        assert curve(folder) == before
        assert Checkpoint(str(folder)).opened.unread == f"not used: {held}, another task's head"
    with pytest.raises(ConfigError, match=r"another task's head; .* need lm_head\.weight"):
        run(compose([*source(folder), "gradients=true"]))


@pytest.mark.parametrize(
    ("before", "advice"),
    [
        ("base_model.model.", "merge_and_unload"),
        ("language_model.", "part of another model"),
        ("model.language_model.", "part of another model"),
    ],
)
def test_a_part_of_another_model(tmp_path, before, advice):
    write_olmo(tmp_path / "m", "Llama", **TINY)
    rewrite(tmp_path / "m", lambda t: {before + name: value for name, value in t.items()})
    refused(tmp_path / "m", f"names begin with {before}: ", advice)


def test_messages_have_the_files_names(tmp_path):
    """Also where simlab reads tensors by longer or shorter ones."""
    model = write_olmo(tmp_path / "m", **TINY)
    rows = torch.ones(3)
    rewrite(tmp_path / "m", lambda t: t | {"embed_tokens.weight": rows})
    refused(tmp_path / "m", "holds embed_tokens.weight", "beside model.embed_tokens.weight")
    model.model.save_pretrained(tmp_path / "base")
    rewrite(tmp_path / "base", lambda t: t | {"extra.weight": rows})
    refused(tmp_path / "base", "tensor extra.weight is not part")


def test_a_tensor_that_the_index_leaves_out(tmp_path):
    write_olmo(tmp_path / "m", shards="20KB", **TINY)
    index = tmp_path / "m" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    del values["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(values))
    refused(tmp_path / "m", "model.norm.weight", "index doesn't put there")


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ("model-00001-of-00002.safetensors", ["model.safetensors.index.json isn't there"]),
        ("adapter_model.safetensors", ["an adapter alone", "merge"]),
        ("pytorch_model-00001-of-00002.bin", ["pytorch_model.bin.index.json isn't there"]),
        ("m.Q4_K_M.gguf", ["llama.cpp"]),
        ("consolidated.00.pth", ["-hf"]),
        ("model.fp16.safetensors", ["under another name"]),
    ],
)
def test_other_weights_are_named(tmp_path, file, parts):
    write_olmo(tmp_path / "m", **TINY)
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / file)
    refused(tmp_path / "m", "holds neither model.safetensors", file, *parts)
    (tmp_path / "m" / "config.json").unlink()
    refused(tmp_path / "m", "holds no checkpoint", file, *parts)


@pytest.mark.parametrize("file", ["adapter_config.json", "quantize_config.json"])
def test_files_that_change_the_model(tmp_path, file):
    write_olmo(tmp_path / "m", **TINY)
    (tmp_path / "m" / file).write_text("{}")
    refused(tmp_path / "m", file)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4\n"


def test_git_lfs_pointers_are_named(tmp_path, written):
    write_olmo(tmp_path / "hf", **TINY)
    write_legacy(tmp_path / "pt", fused(write_olmo(tmp_path / "x")), OLMO2, "pt")
    shutil.copytree(written / "olmo2", tmp_path / "core")
    for file in ("hf/model.safetensors", "hf/config.json", "pt/config.yaml"):
        (tmp_path / file).write_text(POINTER)
        refused((tmp_path / file).parent, file, "git lfs pull")
    write_legacy(tmp_path / "pt", {}, OLMO2, "pt")
    (tmp_path / "pt" / "model.pt").write_text(POINTER)
    refused(tmp_path / "pt", "model.pt", "git lfs pull")
    for file in ("__0_0.distcp", ".metadata"):
        (tmp_path / "core" / "model_and_optim" / file).write_text(POINTER)
        refused(tmp_path / "core", file, "git lfs pull")


def test_a_shard_that_the_index_does_not_mention(tmp_path):
    """Of the same save it is refused; another save's, and a second layout, are named in a line."""
    folder = tmp_path / "m"
    write_olmo(folder, shards="9KB", **TINY)
    first = min(folder.glob("model-*"))
    beside = folder / "model-00001-of-09999.safetensors"
    shutil.copy(first, beside)
    assert Checkpoint(str(folder)).opened.unread.startswith(f"not read: {beside.name}, which")
    same = folder / first.name.replace("00001-of", "09999-of")
    beside.rename(same)
    refused(folder, same.name, "doesn't mention it")
    same.unlink()
    assert not Checkpoint(str(folder)).opened.unread
    write_olmo(tmp_path / "whole", **TINY)
    shutil.copy(tmp_path / "whole" / "model.safetensors", folder)
    assert "not read: model-00001-of" in Checkpoint(str(folder)).opened.unread


def test_both_configs(tmp_path):
    """The weights say whose the folder is; where both have some, a line says how to choose."""
    tensors = fused(write_olmo(tmp_path / "hugging_face"))
    write_legacy(tmp_path / "legacy", tensors, OLMO2, "pt")
    both = {"legacy": "config.json", "hugging_face": "config.yaml"}
    for name, config in both.items():
        other = next(folder for folder in both if folder != name)
        shutil.copy(tmp_path / other / config, tmp_path / name)
        opened = Checkpoint(str(tmp_path / name)).opened
        assert opened.config.name == both[other]
        assert opened.unread == f"read as {both[other]} says; not read: {config}"
    shutil.copy(tmp_path / "legacy" / "model.pt", tmp_path / "hugging_face")
    refused(tmp_path / "hugging_face", "config.yaml", "config.json", "move one config away")


def test_the_header_says_what_is_not_read(tmp_path):
    write_olmo(tmp_path / "m", **TINY)
    (tmp_path / "m" / "config.yaml").write_text("model: another program's")
    done = in_process(*source(tmp_path / "m"), cwd=tmp_path)
    assert "read as config.json says; not read: config.yaml" in done.stdout
