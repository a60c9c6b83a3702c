"""The config.json of a model type that transformers knows and simlab doesn't read itself.

The file is a stranger's: transformers' config class gets what is left of it after these checks, and no
code of a repository is ever run.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from simlab.checkpoints.families.skeleton import transformers_of
from simlab.checkpoints.formats import olmo_core
from simlab.checkpoints.formats.hugging_face import read_config
from simlab.checkpoints.formats.hugging_face_keys import (
    ELSEWHERE,
    IGNORED,
    MODEL_TYPES,
    TEXT_PARTS,
)
from simlab.checkpoints.untrusted.files import fields_of, read_json
from simlab.config import ConfigError
from simlab.config.errors import NotComputed
from simlab.config.fields import Fields, brief

# A key with one of these parts counts layers, blocks or experts: transformers makes as many modules.
_COUNTED, _MOST_COUNTED = ("layer", "block", "expert", "_depth"), 100_000
_MOST_LISTED = 10**7  # of a number in a list: a token id, or a count (GPT-Neo's attention_types)
# Keys that would have transformers fetch, run or compute something else than the model type says.
_DROPPED = (
    "auto_map", "attn_implementation", "experts_implementation", "transformers_weights",
    "num_labels", "id2label", "label2id",  # a table of as many labels, of another task's head
)  # fmt: skip
_REFUSED = {
    "quantization_config": "the weights are quantised: use the repository that isn't",
    "pruned_heads": "heads were pruned, which simlab doesn't compute",
    "fusion_config": "simlab computes the model without fused modules",
    "kernel_config": "simlab computes the model without kernels of the hub",
    "distributed_config": "simlab computes the model in one process",
}
# What a config class or the model that is built from it may raise on a stranger's values.
CONFIG_ERRORS = (
    ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, AssertionError,
    ImportError, OSError,
)  # fmt: skip


def is_family(folder: Path) -> bool:
    """True for a folder in Hugging Face's layout of a model type that transformers reads for simlab.

    False for simlab's own formats and model types, unless ``beyond_own`` says why not, and for what
    nobody reads, which they refuse.
    Raises ConfigError where transformers would be needed and isn't there, and for a model type of a
    repository's own code.
    """
    path = folder / "config.json"
    if not path.is_file() or (folder / "config.yaml").is_file() or olmo_core.matches(folder):
        return False
    values = read_json(path)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind in ELSEWHERE:
        return False
    if kind in {*MODEL_TYPES, *TEXT_PARTS}:
        return bool(beyond_own(path))
    transformers = transformers_of(path)
    if kind in transformers.CONFIG_MAPPING:
        return True
    if values.get("auto_map"):
        raise fields_of(values, path).fail(
            "auto_map",
            values["auto_map"],
            f"transformers {transformers.__version__} doesn't know model_type={brief(kind)}, which the "
            "repository computes with its own code; simlab doesn't run that",
        )
    return False


def beyond_own(path: Path) -> str:
    """The value in a config of a native model type that simlab's own model lacks, as a sentence.

    "" where it lacks none, where the config is refused for another reason, and where transformers
    isn't installed: simlab's own reader then says what is wrong.
    """
    try:
        read_config(path, _MOST_COUNTED)
    except NotComputed as error:
        if find_spec("transformers"):
            return str(error).removeprefix(fields_of({}, path).prefix)
    except ConfigError:
        pass
    return ""


def read_family_config(path: Path, tensors: int) -> tuple[Any, list[str]]:
    """transformers' config of a config.json, and the keys in it that its class doesn't have.

    tensors: how many the checkpoint holds. Raises ConfigError.
    """
    transformers = transformers_of(path)
    values = read_json(path)
    fields = fields_of(values, path)
    for key, why in _REFUSED.items():
        if values.get(key):
            raise fields.fail(key, values[key], why)
    for key, value, listed in _numbers(values):
        counts = any(part in key for part in _COUNTED) and "vocab" not in key
        most = _MOST_COUNTED if counts else _MOST_LISTED if listed else value
        if value > (tensors if key == "num_hidden_layers" else most):
            raise ConfigError(f"{path}: {brief(key)}={value}: more than is plausible")
    kind = values["model_type"]
    if kind == "mistral" and "layer_types" in values:
        kind = "ministral"  # as transformers' AutoConfig does
    plain = {k: v for k, v in values.items() if not k.startswith("_") and k not in _DROPPED}
    errors = (*CONFIG_ERRORS, _strict_error())
    try:
        config = transformers.CONFIG_MAPPING[kind].from_dict(_with_floats(plain))
    except errors as error:
        raise ConfigError(f"{path}: transformers refuses it: {one_line(error)}") from error
    if values.get("auto_map"):
        _refuse_their_code(values["auto_map"], config, fields)
    _refuse_encoders(config, transformers, fields)
    return config, sorted(_unknown(config, plain))


def _refuse_their_code(auto_map: object, config: Any, fields: Fields) -> None:
    """Refuse a repository's own classes, but for those that transformers has under their names.

    Many repositories are older than their model type in transformers. Raises ConfigError.
    """
    package = sys.modules[type(config).__module__.rpartition(".")[0]]
    known = {name.lower() for name in dir(package)}
    given = auto_map if isinstance(auto_map, dict) else {"AutoModel": auto_map}
    for key, name in given.items():
        last = str(name).rpartition(".")[2]
        if key.startswith(("AutoConfig", "AutoModel")) and last.lower() not in known:
            raise fields.fail(
                "auto_map",
                auto_map,
                f"transformers' {config.model_type} has no {brief(last)}, and simlab doesn't run the "
                "repository's own code",
            )


def _refuse_encoders(config: Any, transformers: Any, fields: Fields) -> None:
    """Refuse models that predict no next tokens, and those whose tokens see later ones.

    Raises ConfigError.
    """
    kinds = (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )
    if not any(type(config) in kind for kind in kinds):
        why = "transformers has no model of it that predicts next tokens, and simlab measures decoders"
        raise fields.fail("model_type", config.model_type, why)
    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    if masked and getattr(config, "is_decoder", True) is False:  # GPT-NeoX's is False, too
        why = "with is_decoder=false tokens see later ones, and simlab measures decoders"
        raise fields.fail("model_type", config.model_type, why)


def _unknown(config: Any, values: dict[str, Any]) -> Iterator[str]:
    """The keys that the config's class doesn't have: it keeps them as attributes all the same."""
    known = {field.name for field in dataclasses.fields(type(config))} | {*config.attribute_map}
    try:
        known |= {*vars(type(config)())}
    except CONFIG_ERRORS:  # a class that needs arguments
        return
    for key in values.keys() - known - IGNORED - {"model_type", "architectures"}:
        if values[key] is not None and not hasattr(type(config), key):
            yield key


def one_line(error: Exception) -> str:
    """The last line of an error that says something, or its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]


def _with_floats(value: Any) -> Any:
    """A config's value, with the floats that JSON can't write as transformers writes them."""
    if isinstance(value, dict):
        special = value.get("__float__") if len(value) == 1 else None
        if special in ("Infinity", "-Infinity", "NaN"):
            return float(special)
        return {key: _with_floats(one) for key, one in value.items()}
    return [_with_floats(one) for one in value] if isinstance(value, list) else value


def _strict_error() -> type[Exception]:
    """The error that transformers' config classes raise for a field of a wrong type."""
    from huggingface_hub.errors import StrictDataclassError

    error: type[Exception] = StrictDataclassError
    return error


def _numbers(value: Any, key: str = "", listed: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Every whole number in a config, with its key, and if it is in a list."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _numbers(one, name, listed)
    elif isinstance(value, list):
        for one in value:
            yield from _numbers(one, key, True)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value, listed
