"""The init that a checkpoint's own config names: the default for the random inits beside it.

Sources: transformers 5.23 (``PreTrainedModel._init_weights``), ai2-olmo-core 3.0.0
(nn/transformer/init.py), allenai/OLMo (olmo/model.py, ``reset_parameters``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from simlab.config import InitConfig
from simlab.config.fields import Fields, as_typed

_STD = 0.02  # of transformers, OLMo-core and OLMo where their configs name none
# OLMo's trainers cut at 3 standard deviations (of OLMoE: arXiv 2409.02060); transformers, where it
# draws weights itself, doesn't.
_TRUNCATE = {"olmo2": 3.0, "olmo3": 3.0, "olmoe": 3.0}
_RULES = {"gpt2": "gpt2"}  # of transformers' families whose normals don't all have one σ


@dataclass(frozen=True)
class OwnInit:
    """A checkpoint's init. origin: what in its config says so; of a guess, why it is one."""

    config: InitConfig
    origin: str
    guess: bool = False


def transformers_init(fields: Fields, kind: str) -> OwnInit:
    """From a Hugging Face config.json. kind: the model type. Raises ConfigError for a malformed std."""
    std = fields.number("initializer_range", 0.0, default=None)
    if kind == "olmo":  # initializer_range is then transformers' default, not the trainer's
        why = "OLMo 1's rule; config.json doesn't say how its trainer drew weights"
        return OwnInit(InitConfig("mitchell", None, 3.0), why, guess=True)
    init = InitConfig(_RULES.get(kind, "normal"), std or _STD, _TRUNCATE.get(kind))
    if not std:  # transformers takes 0 for missing, too
        why = "config.json has " + (
            "no initializer_range" if std is None else "initializer_range=0"
        )
        return OwnInit(init, why, guess=True)
    said = f"initializer_range={std:g} in config.json"
    if kind == "gpt_neox":  # its trainer's rule, by default gpt2, isn't in its conversion
        return OwnInit(init, f"{said}, which doesn't name the trainer's rule", guess=True)
    return OwnInit(init, said)


def gguf_init(kind: str) -> OwnInit:
    """Of a GGUF file, which says nothing of it: a guess by its architecture."""
    why = "a GGUF file doesn't say how its weights were drawn"
    if kind == "olmo":
        return OwnInit(InitConfig("mitchell", None, 3.0), why, guess=True)
    return OwnInit(InitConfig("normal", _STD, _TRUNCATE.get(kind)), why, guess=True)


def olmo_core_init(model: Fields) -> OwnInit:
    """From the model's section of OLMo-core's config.json. Raises ConfigError for malformed numbers."""
    std = model.number("init_std", 1e-12, above=True, default=_STD)
    embedding = model.number("embedding_init_std", 1e-12, above=True, default=None)
    method = model.take("init_method", "normal")
    if method in ("normal", "llama", "llama_depth"):
        # Only the first draws the embedding by a std.
        init = InitConfig(str(method), std, 3.0, embedding if method == "normal" else None)
    elif method == "fan_in":
        init = InitConfig("fan_in", None, 3.0)
    else:
        return _unknown("init_method", method)
    named = "init_method" in model.values
    said = f"init_method={method} in config.json" if named else "OLMo-core's default"
    return OwnInit(init, said)


def legacy_olmo_init(fields: Fields) -> OwnInit:
    """From the model's section of OLMo's config.yaml. Raises ConfigError for malformed numbers."""
    std = fields.number("init_std", 1e-12, above=True, default=_STD)
    embedding = fields.number("emb_init_std", 0.0, default=None) or None
    cut = fields.number("init_cutoff_factor", 0.0, default=None) or None
    rule = fields.take("init_fn", "normal")
    inits = {
        "normal": InitConfig("normal", std, cut),
        "mitchell": InitConfig("mitchell", None, cut or 3.0),
        "full_megatron": InitConfig("megatron", std, cut or 3.0),
    }
    if not isinstance(rule, str) or rule not in inits:
        return _unknown("init_fn", rule)
    said = f"init_fn={rule} in config.yaml" if "init_fn" in fields.values else "OLMo's default"
    return OwnInit(replace(inits[rule], embedding_std=embedding), said)


def _unknown(key: str, value: object) -> OwnInit:
    why = f"simlab doesn't draw {key}={as_typed(value)}"
    return OwnInit(InitConfig("normal", _STD, 3.0), why, guess=True)
