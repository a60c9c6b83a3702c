"""GGUF files that llama.cpp's library writes, against transformers' models with the same weights."""

import dataclasses
import struct
import sys
import tracemalloc
from unittest import mock

import gguf
import pytest
import torch
from conftest import refused, write_olmo
from test_architectures import IDS, LAYERS, NORMS_OUT, YARN, assert_same, sublayer_states
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from write_gguf import write_gguf

from simlab import compose
from simlab.checkpoints.checkpoint import Checkpoint
from simlab.checkpoints.packed import PackedTensor
from simlab.config import ConfigError
from simlab.experiment import prepare

# Rows are blocks of 32 numbers, of the types with a K 256.
SMALL = {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2}
LARGE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
}
PLAIN = {"rope_type": "default", "rope_theta": 900.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
OLMO3 = {
    "sliding_window": 7, "layer_types": LAYERS, "num_hidden_layers": 5,
    "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN},
}  # fmt: skip
SLIDING = {"attention.sliding_window": 5}
GEMMA = SMALL | {"head_dim": 32, "sliding_window": 5, "query_pre_attn_scalar": 32}
LAYERED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
}
CASES = {  # family, changes, type of the matrices, what write_gguf is told
    **{
        f"llama-{kind}": ("Llama", SMALL, kind, {})
        for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0")
    },
    **{f"llama-{kind}": ("Llama", SMALL, kind, {}) for kind in ("Q4_1", "Q5_0", "Q5_1")},
    **{f"llama-{kind}": ("Llama", LARGE, kind, {}) for kind in ("Q4_K", "Q6_K")},
    "llama-tied": ("Llama", SMALL | {"tie_word_embeddings": True}, "Q8_0", {}),
    "llama-head-dim": ("Llama", SMALL | {"head_dim": 32, "num_key_value_heads": 3}, "Q4_1", {}),
    "olmo": ("Olmo", SMALL, "Q8_0", {}),
    "olmo2": ("Olmo2", SMALL, "Q8_0", {}),
    "mistral": (
        "Mistral",
        SMALL | {"sliding_window": None, "head_dim": 16},
        "Q8_0",
        {"names": "llama"},
    ),
    "qwen2": ("Qwen2", SMALL, "Q8_0", {}),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 32}, "Q8_0", {}),
    "gemma2": (
        "Gemma2",
        GEMMA | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0},
        "Q8_0",
        {"keys": SLIDING | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0}},
    ),
    "gemma3": (
        "Gemma3Text",
        GEMMA | {"num_hidden_layers": 6},
        "Q8_0",
        {"names": "gemma3", "keys": SLIDING},
    ),
    "gemma3-linear": (
        "Gemma3Text",
        GEMMA | {"num_hidden_layers": 6, "rope_parameters": LAYERED},
        "F16",
        {
            "names": "gemma3",
            "keys": SLIDING
            | {
                "rope.scaling.type": "linear",
                "rope.scaling.factor": 8.0,
                "rope.freq_base_swa": 30.0,
            },
        },
    ),
}


def factors(config):
    """What llama.cpp's converter writes for Llama 3.1's scaling (LlamaModel.generate_extra_tensors)."""
    its, dim = config.rope_parameters, config.head_dim
    length = its["original_max_position_embeddings"]
    long, short = length / its["low_freq_factor"], length / its["high_freq_factor"]
    out = []
    for i in range(0, dim, 2):
        wavelength = 2 * torch.pi * its["rope_theta"] ** (i / dim)
        smooth = (length / wavelength - its["low_freq_factor"]) / (
            its["high_freq_factor"] - its["low_freq_factor"]
        )
        between = 1 / ((1 - smooth) / its["factor"] + smooth)
        out.append(1 if wavelength < short else its["factor"] if wavelength > long else between)
    return out


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A quantised Llama."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "m.gguf", write_olmo(folder / "m", "Llama", **SMALL), "Q4_1")
    return folder / "m.gguf"


@pytest.mark.parametrize("case", CASES)
def test_every_state(tmp_path, case):
    family, changes, kind, told = CASES[case]
    model = write_olmo(tmp_path / "m", family, **changes)
    write_gguf(tmp_path / "m.gguf", model, kind, **told)
    assert_same(tmp_path / "m.gguf", *sublayer_states(model, IDS, family in NORMS_OUT))


@pytest.mark.parametrize(("depth", "scalar"), [(45, 32), (46, 16)])
def test_gemma_27b_is_known_by_its_depth(tmp_path, depth, scalar):
    """As in llama.cpp: of 46 blocks of Gemma 2 logits are q·k over √(width/heads)."""
    model = write_olmo(tmp_path / "m", "Gemma2", **GEMMA | {"num_hidden_layers": depth})
    write_gguf(tmp_path / "m.gguf", model, keys=SLIDING)
    shape = Checkpoint(str(tmp_path / "m.gguf")).model
    assert shape.query_pre_attn_scalar == scalar
    assert (shape.attention_softcap, shape.logit_softcap) == (50.0, 30.0)


GEMMA_REFUSED = {
    "gemma3.rope.scaling.type='yarn'": {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0},
    "gemma3.final_logit_softcapping=30.0": {"final_logit_softcapping": 30.0},
    "gemma3.attention.sliding_window=None": {"attention.sliding_window": None},
}


@pytest.mark.parametrize("said", GEMMA_REFUSED)
def test_gemmas_that_are_refused(tmp_path, said):
    model = write_olmo(tmp_path / "m", "Gemma3Text", **GEMMA)
    keys = {k: v for k, v in (SLIDING | GEMMA_REFUSED[said]).items() if v is not None}
    write_gguf(tmp_path / "m.gguf", model, keys=keys, names="gemma3")
    refused(tmp_path / "m.gguf", f"{tmp_path / 'm.gguf'}: {said}: ")


def test_llama3_rope(tmp_path):
    """The scaling is a tensor of divisors; 64 numbers a head, so that pairs lie on all three pieces."""
    changes = SMALL | {"head_dim": 64, "num_attention_heads": 2, "rope_parameters": LLAMA3}
    model = write_olmo(tmp_path / "m", "Llama", **changes)
    divisors = factors(model.config)
    assert 1 in divisors
    assert 8 in divisors
    assert {1, 8} != {*divisors}
    write_gguf(tmp_path / "m.gguf", model, rope=divisors)
    far = IDS.repeat(1, 60)  # the slow pairs turn only there
    assert_same(tmp_path / "m.gguf", *sublayer_states(model, far, False), far)
    for wrong in ([d + (d == 8) for d in divisors], [2.5] * 32, [0.0] * 32, [float("nan")] * 32):
        write_gguf(tmp_path / "m.gguf", model, rope=wrong)
        refused(tmp_path / "m.gguf", "rope_freqs.weight", "Llama 3.1's scaling")
    write_gguf(tmp_path / "m.gguf", model, rope=divisors[1:])
    refused(tmp_path / "m.gguf", "rope_freqs.weight", "shape")


def test_olmo3_is_olmo2_with_a_window(tmp_path):
    model = write_olmo(tmp_path / "m", "Olmo3", **SMALL | OLMO3)
    sliding = [kind == "sliding_attention" for kind in LAYERS]
    keys = {
        "attention.sliding_window": 7, "attention.sliding_window_pattern": sliding,
        "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0,
        "rope.scaling.original_context_length": 16, "rope.scaling.yarn_beta_fast": 4.0,
        "rope.scaling.attn_factor": 1.2079441541679836, "rope.freq_base": 900.0,
    }  # fmt: skip
    with mock.patch.dict(model.config.rope_parameters, {"rope_theta": 900.0}):
        del keys["rope.freq_base"]
        write_gguf(tmp_path / "m.gguf", model, "F16", keys, names="olmo2")
    assert_same(tmp_path / "m.gguf", *sublayer_states(model, IDS))
    keys["rope.scaling.attn_factor"] = 1.5
    write_gguf(tmp_path / "m.gguf", model, "F16", keys, names="olmo2")
    refused(tmp_path / "m.gguf", "olmo2.rope.scaling.attn_factor=1.5")
    del keys["attention.sliding_window_pattern"], keys["rope.scaling.attn_factor"]
    write_gguf(tmp_path / "m.gguf", model, "F16", keys, names="olmo2")
    assert Checkpoint(str(tmp_path / "m.gguf")).model.full_attention == (3,)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_the_weights_are_those_that_transformers_reads(tmp_path, family):
    """Of the families that its own reader of GGUF files knows; its order of q's and k's rows too."""
    model = write_olmo(tmp_path / "m", family, **SMALL | {"head_dim": 32, "rms_norm_eps": 2**-12})
    write_gguf(tmp_path / "m.gguf", model, "Q4_1")
    theirs = load_gguf_checkpoint(tmp_path / "m.gguf", True, model)["tensors"]
    model.load_state_dict({name: torch.as_tensor(value) for name, value in theirs.items()})
    model.save_pretrained(tmp_path / "theirs")
    ours, its = Checkpoint(str(tmp_path / "m.gguf")), Checkpoint(str(tmp_path / "theirs"))
    for name in ours.names():
        shape = ours.stored(name)[0].shape
        read = [c.tensor(name, shape, torch.device("cpu"), torch.float32) for c in (ours, its)]
        assert torch.equal(*read), name
    assert ours.identity() == its.identity()
    assert dataclasses.replace(ours.model, name="theirs") == its.model


def test_any_rows_of_a_packed_matrix(file):
    """Runs of rows begin within a head, whose rows the file has in another order."""
    opened = Checkpoint(str(file))
    stored = opened.opened.tensors["blk.1.attn_q.weight"]
    assert isinstance(stored, PackedTensor)
    whole, seen = stored.rows(0, 96), bytearray()
    stored.rows(0, 96, None, seen.extend)
    assert bytes(seen) == whole.numpy().tobytes()
    for start in (0, 1, 15, 16, 40, 95):
        for stop in range(start + 1, 97, 7):
            assert torch.equal(stored.rows(start, stop), whole[start:stop])
    out = torch.empty(96, 96, dtype=torch.bfloat16)
    assert torch.equal(stored.rows(0, 96, out), whole.bfloat16())


def test_the_header_names_the_quantisation(file):
    ready = prepare(compose(["source=checkpoint", f"source.path={file}", "seeds=0", "device=cpu"]))
    assert ready.unread == "GGUF: of 21 tensors 16 in Q4_1, 5 in float32"
    table = ready.checkpoint.table()
    kinds = {row["in_file"]: row["dtype"] for row in table}
    assert kinds["blk.0.attn_k.weight"] == "Q4_1"
    assert kinds["output_norm.weight"] == "float32"


def test_a_text_needs_tokenizer_json_beside(file, tmp_path):
    given = ["source=checkpoint", "inputs=text", "inputs.prompt=abc", "seeds=0", "device=cpu"]
    with pytest.raises(ConfigError, match=r"gguf_file='m.gguf'\)"):
        prepare(compose([*given, f"source.path={file}"]))
    copy = tmp_path / "m.gguf"
    copy.write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(
        '{"model": {"type": "WordLevel", "vocab": {"abc": 5, "u": 1}, "unk_token": "u"}}'
    )
    assert prepare(compose([*given, f"source.path={copy}", "inputs.length=1"])).tokens.tolist() == [
        [5]
    ]


def test_without_the_library(file, tmp_path):
    write_gguf(tmp_path / "m.gguf", write_olmo(tmp_path / "m", "Llama", **SMALL), "F16")
    with mock.patch.dict(sys.modules, {"gguf": None}):
        refused(file, "tensor token_embd.weight is quantised", "pip install gguf")
        Checkpoint(str(tmp_path / "m.gguf"))  # float16 needs none


KEYS = {
    "llama.expert_count=8": {"expert_count": 8},
    "llama.attention.causal=False": {"attention.causal": False},
    "llama.attention.scale=0.5": {"attention.scale": 0.5},
    "llama.logit_scale=2.0": {"logit_scale": 2.0},
    "llama.rope.scaling.factor=4.0": {"rope.scaling.factor": 4.0},
    "llama.rope.scaling.type='longrope'": {"rope.scaling.type": "longrope"},
    "llama.rope.dimension_count=8": {"rope.dimension_count": 8},
    "llama.attention.sliding_window=16": {"attention.sliding_window": 16},
    "llama.rope.scale_linear=2.0": {"rope.scale_linear": 2.0},
    "llama.vocab_size='many'": {"vocab_size": "many"},
    "llama.something=[1, 2]": {"something": [1, 2]},
    "general.type='adapter'": {"general.type": "adapter"},
    "split.count=3": {"split.count": 3},
}


@pytest.mark.parametrize("said", KEYS)
def test_keys_that_change_the_model_are_refused(tmp_path, said):
    keys = dict(KEYS[said])
    model = write_olmo(tmp_path / "m", "Llama", **SMALL)
    with (
        mock.patch.object(gguf.GGUFWriter, "add_type")
        if "general.type" in keys
        else mock.MagicMock()
    ):
        write_gguf(tmp_path / "m.gguf", model, keys=keys)
    refused(tmp_path / "m.gguf", f"{tmp_path / 'm.gguf'}: {said}: ")


def test_keys_that_llama_cpp_does_not_read(tmp_path):
    model = write_olmo(tmp_path / "m", "Llama", **SMALL)
    keys = {"mradermacher.convert_type": "hf", "general.name": "x" * 5000, "vocab_size": 61}
    write_gguf(tmp_path / "m.gguf", model, keys=keys | {"rope.scaling.type": "none"})
    assert Checkpoint(str(tmp_path / "m.gguf")).model.vocab_size == 61


def test_another_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3n")
    writer.add_block_count(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused(
        tmp_path / "m.gguf",
        "general.architecture='gemma3n': allowed: llama, olmo, olmo2, qwen2, qwen3, gemma2, gemma3",
    )


def test_a_file_that_is_cut(file, tmp_path):
    """Anywhere: each is refused in one line, within little memory."""
    data, path = file.read_bytes(), tmp_path / "m.gguf"
    tracemalloc.start()
    # At the end are up to 31 bytes that nobody reads.
    for size in [*range(0, 4000, 37), *range(4000, len(data) - 32, 4001), len(data) - 32]:
        path.write_bytes(data[:size])
        refused(path, str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(data) + (
        2 << 20
    )  # the file here, a cut copy of it, and a reader's window


def lying(data, at, *values):
    """A file with other bytes at a place."""
    new = struct.pack(*values)
    return data[:at] + new + data[at + len(new) :]


def test_files_that_lie(file, tmp_path):
    data, path = file.read_bytes(), tmp_path / "m.gguf"
    key = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens")
    tensor = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight")
    other = data.index(b"blk.0.attn_k.weight") + len(b"blk.0.attn_k.weight")
    scores = data.index(b"tokenizer.ggml.scores") + len(b"tokenizer.ggml.scores")
    name = data.index(b"general.architecture") - 8
    offset = data[other + 24 : other + 32]
    lies = {
        "it doesn't begin with GGUF": lying(data, 0, "<4s", b"GGML"),
        "version 1; allowed: 2, 3": lying(data, 4, "<I", 1),
        "big-endian": lying(data, 4, ">I", 3),
        f"{2**40} tensors": lying(data, 8, "<Q", 2**40),
        f"{2**63} keys": lying(data, 16, "<Q", 2**63),
        "it ends within its header": lying(data, key + 8, "<Q", 2**21 - 2**19),
        "texts; allowed": lying(data, key + 8, "<Q", 2**40),
        "a list of type 9": lying(data, key + 4, "<I", 9),
        "a value of type 77": lying(data, key, "<I", 77),
        "ends within": lying(data, scores + 8, "<Q", 2**62),
        "header": lying(data, name, "<Q", 2**61),
        "not a tensor's name": lying(data, name + 8, "<B", 27),
        "of 5 dimensions": lying(data, tensor, "<I", 5),
        "of 0 dimensions": lying(data, tensor, "<I", 0),
        "its rows must be blocks of 32": lying(data, tensor + 4, "<Q", 97),
        "has shape": lying(data, tensor + 4, "<QQ", 2**40 * 32, 2**40),
        "of ggml's type 77": lying(data, tensor + 20, "<I", 77),
        "of ggml's type 26": lying(data, tensor + 20, "<I", 26),  # int32
        "reaches beyond the end": lying(data, tensor + 24, "<Q", 2**63),
        "overlap": lying(data, tensor + 24, "<8s", offset),
        "tensor blk.0.attn_k.weight is there twice": data.replace(
            b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"
        ),
        "the key 'tokenizer.ggml.scores' is there twice": data.replace(
            b"tokenizer.ggml.tokens", b"tokenizer.ggml.scores"
        ),
        "blk.0.attn_q.weight is missing": data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"),
    }  # fmt: skip
    tracemalloc.start()
    for said, bad in lies.items():
        path.write_bytes(bad)
        refused(path, said)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(data) + (2 << 20)
