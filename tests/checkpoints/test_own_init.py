"""The random inits beside a checkpoint are drawn as its trainer, or its library, draws weights."""

import json
import warnings

import pytest
import torch
from conftest import CHECKPOINT, STANDARD_ERRORS, edit_json, in_process, keys_of, write_olmo
from test_legacy_olmo import OLMO1, fused, write_legacy

from simlab import build_model, compose
from simlab.config import ConfigError, InitConfig
from simlab.experiment import prepare
from simlab.schemes.init import Gaussian, distribution


def prepared(folder, *overrides):
    return prepare(
        compose(["source=checkpoint", f"source.path={folder}", "seeds=1", "device=cpu", *overrides])
    )


def departures(folder, *overrides):
    """Every stored matrix: its std's distance from that of the inits beside it, in standard errors."""
    ready = prepared(folder, *overrides)
    stored = build_model(ready.config).state_dict()
    found = {}
    for name, tensor in stored.items():
        law = distribution(ready.config.shape, ready.config.init, name)
        if isinstance(law, Gaussian):
            error = law.std / (2 * tensor.numel()) ** 0.5
            found[name] = abs(tensor.double().std().item() - law.std) / error
        else:
            assert (tensor == law.value).all(), name
    return found


@pytest.mark.parametrize(
    "kind",
    [
        "Llama",
        "Qwen3",
        "Qwen2",
        "Mistral",
        "StableLm",
        "GPT2",
        "GPTNeoX",
        "Gemma3Text",
        "Mixtral",
    ],
)
def test_as_transformers_draws(tmp_path, kind):
    """Some 30 matrices a kind: 5 standard errors are passed by chance in 1 of 10^5 runs."""
    import transformers

    keys = keys_of(kind, CHECKPOINT | {"initializer_range": 0.05})
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**keys)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert max(departures(tmp_path).values()) < STANDARD_ERRORS
    assert max(departures(tmp_path, "init=normal").values()) > 20, "negative control"
    if kind == "GPT2":  # also of c_proj's own σ
        assert max(departures(tmp_path, "init=transformers", "init.std=0.05").values()) > 20


@pytest.mark.parametrize("method", ["normal", "llama", "llama_depth", "fan_in"])
def test_as_olmo_core_draws(tmp_path, method):
    """23 matrices a method: 5 standard errors are passed by chance in 1 of 10^5 runs."""
    from olmo_core.distributed.checkpoint import save_model_and_optim_state
    from olmo_core.nn.transformer import InitMethod, TransformerConfig

    shape = {"d_model": 48, "vocab_size": 301, "n_layers": 3, "n_heads": 4}
    config = TransformerConfig.llama_like(**shape, hidden_size_multiple_of=8)
    config.init_method, config.init_std, config.embedding_init_std = InitMethod(method), 0.05, 0.7
    model = config.build(init_device="cpu")
    model.init_weights(device=torch.device("cpu"))
    with warnings.catch_warnings():  # that there is one process only
        warnings.simplefilter("ignore")
        save_model_and_optim_state(tmp_path / "model_and_optim", model, thread_count=2)
    (tmp_path / "config.json").write_text(json.dumps({"model": config.as_config_dict()}))
    assert max(departures(tmp_path).values()) < STANDARD_ERRORS
    assert max(departures(tmp_path, "init=normal").values()) > 20, "negative control"


LEGACY = {  # after olmo/model.py: rule, std, cut, the embedding's std
    "init_fn: normal, init_std: 0.03": InitConfig("normal", 0.03, None),
    "init_std: 0.03, init_cutoff_factor: 2": InitConfig("normal", 0.03, 2.0),
    "init_fn: mitchell, emb_init_std: 1": InitConfig("mitchell", None, 3.0, 1.0),
    "init_fn: full_megatron, init_std: 0.006": InitConfig("megatron", 0.006, 3.0),
}


@pytest.mark.parametrize("text", LEGACY)
def test_legacy_configs(tmp_path, text):
    import yaml

    model = write_olmo(tmp_path / "hf", "Olmo", num_key_value_heads=1, intermediate_size=96)
    config = OLMO1 | {"weight_tying": False} | yaml.safe_load(f"{{{text}}}")
    write_legacy(tmp_path / "m", fused(model), config, "safetensors")
    ready = prepared(tmp_path / "m")
    assert ready.config.init == LEGACY[text]
    key = text.split(":")[0] if text.startswith("init_fn") else "OLMo's default"
    assert ready.init_origin.startswith(f"the checkpoint's own init: {key}")


@pytest.mark.parametrize(
    ("kind", "changes", "init", "origin"),
    [
        ("Olmo2", {"initializer_range": 0.04}, InitConfig("normal", 0.04, 3.0), "range=0.04 in config"),
        ("Llama", {"initializer_range": 0.0}, InitConfig("normal", 0.02, None), "initializer_range=0"),
        ("GPTNeoX", {"initializer_range": 0.04}, InitConfig("normal", 0.04, None), "is a guess: init"),
        ("GPT2", {"initializer_range": 0.04}, InitConfig("gpt2", 0.04, None), "own init: init"),
        ("Olmo", {}, InitConfig("mitchell", None, 3.0), "is a guess: OLMo 1's rule"),
    ],
)  # fmt: skip
def test_families(tmp_path, kind, changes, init, origin):
    write_olmo(tmp_path, kind, **changes)
    ready = prepared(tmp_path)
    assert ready.config.init == init
    assert origin in ready.init_origin


def test_what_the_user_asks_for_is_kept(tmp_path):
    write_olmo(tmp_path / "m", "Llama", initializer_range=0.04)
    assert prepared(tmp_path / "m", "init.std=0.01").config.init == InitConfig("normal", 0.01, None)
    ready = prepared(tmp_path / "m", "init=mitchell")
    assert (ready.config.init.rule, ready.init_origin) == ("mitchell", None)
    edit_json(tmp_path / "m" / "config.json", initializer_range="wide")
    with pytest.raises(ConfigError, match="initializer_range='wide': not a number"):
        prepared(tmp_path / "m")
    write_olmo(tmp_path / "o", "Olmo")
    with pytest.raises(ConfigError, match="the checkpoint's init is mitchell, which has no std"):
        prepared(tmp_path / "o", "init.std=0.01")


def test_the_header_and_the_summary_say_it(tmp_path, no_figures):
    write_olmo(tmp_path / "m", initializer_range=0.04)
    run = ["source=checkpoint", "source.path=m", "inputs.length=8", "hydra.run.dir=out"]
    done = in_process(*run, "seeds=2", "init.truncate=2", cwd=tmp_path)
    assert "random init normal(0.04, ±2σ)" in done.stdout
    said = "the checkpoint's own init: initializer_range=0.04 in config.json, truncate 2 as asked"
    assert said in " ".join(done.stdout.split())
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["init_origin"] == said
    assert (summary["config"]["init"]["std"], summary["config"]["init"]["truncate"]) == (0.04, 2.0)
