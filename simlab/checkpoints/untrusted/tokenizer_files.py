"""The files beside a tokenizer.json that change a text's ids, and the other files of a tokenizer.

transformers reads tokenizer_config.json with it, and in older folders special_tokens_map.json and
added_tokens.json. They name tokens that the tokenizer.json may lack, and say again what it does to a
text's beginning. Here the former are used and the latter must agree with it. transformers 5 builds some
classes anew from their vocabulary (Llama's and Qwen's pre-tokenizers); simlab follows tokenizer.json.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simlab.checkpoints.untrusted.files import fields_of, read_json
from simlab.config import ConfigError
from simlab.config.fields import Fields, as_typed, brief

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
# A tokenizer in other files; the last has none, but says that there is one.
OTHERS = (
    "tokenizer.model", "spiece.model", "*.spm", "sentencepiece.*", "tiktoken.model", "*.tiktoken",
    "tekken.json", "vocab.json", "merges.txt", "vocab.txt", "vocab.bpe", "encoder.json", CONFIG,
)  # fmt: skip
# Keys of tokenizer_config.json that change ids: used (so is any other that ends in _token), with one
# value only, and those of the classes in transformers 5.23 that change none.
NAMED_TOKENS = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
]
USED_KEYS = [
    *NAMED_TOKENS, "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens",
    "add_bos_token", "add_eos_token", "add_prefix_space", "tokenizer_class",
]  # fmt: skip
FIXED_KEYS = {
    "split_special_tokens": False,
    "fix_mistral_regex": False,
    "fast_tokenizer_files": None,
    "auto_map": None,
}
# legacy is of Llama's class, whose tokenizer.json has what follows from it.
INDIFFERENT_KEYS = [
    "vocab", "merges", "errors", "trim_offsets", "clean_up_tokenization_spaces",
    "use_default_system_prompt", "legacy",
]  # fmt: skip
# What a class does where its config doesn't say, and the class of a config.json's model type. Where the
# config says add_bos_token, transformers 4 follows it, and 5.23 puts no token for GPT-NeoX's class.
_CLASSES: Mapping[str, Mapping[str, bool]] = {
    "GPT2Tokenizer": {"add_prefix_space": False},
    "Qwen2Tokenizer": {"add_prefix_space": False},
    "GPTNeoXTokenizer": {"add_prefix_space": False, "add_bos_token": False, "add_eos_token": False},
}
_FAMILIES = {"olmo": "GPTNeoXTokenizer", "qwen3": "Qwen2Tokenizer", "qwen2": "Qwen2Tokenizer"}
_DOES = {
    "add_bos_token": "a token before a text",
    "add_eos_token": "a token after a text",
    "add_prefix_space": "a space before a text",
}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def find_tokenizer(folder: Path) -> Path | None:
    """A folder's tokenizer.json, else the file of another tokenizer, which simlab doesn't read.

    Of a GGUF file the tokenizer.json beside it, else the file itself, which holds a tokenizer.
    """
    if not folder.is_dir():
        beside = folder.with_name(TOKENIZER)
        return beside if beside.is_file() else folder
    files = tokenizer_files(entry.name for entry in folder.iterdir() if entry.is_file())
    return folder / files[0] if files else None


def tokenizer_files(names: Iterable[str]) -> list[str]:
    """Of a folder's file names the tokenizer's: the one to read or to refuse, and those beside it."""
    there = sorted(name for name in names if "/" not in name)
    for pattern in (TOKENIZER, *OTHERS):
        for name in fnmatch.filter(there, pattern):
            return [name, *(each for each in (CONFIG, MAP, ADDED) if each in {*there} - {name})]
    return []


@dataclass(frozen=True)
class Beside:
    """What the files beside a tokenizer.json say.

    tokens: fields of the tokenizers library's AddedToken, in the order in which transformers adds
    them, with ``id`` where they say one, and ``named`` of those that are added only where no other has
    their content. says: keys of ``_DOES`` with their value, and where that stands.
    """

    tokens: list[dict[str, Any]] = field(default_factory=list)
    says: dict[str, tuple[bool, str]] = field(default_factory=dict)

    def check(self, path: Path, does: Mapping[str, bool], free: bool) -> None:
        """Refuse a tokenizer.json that does another thing. Raises ConfigError.

        does: keys of ``_DOES``, what it does. free: the tokens around a text are left to it.
        """
        for key, (said, where) in self.says.items():
            if said == does[key] or not (free or key == "add_prefix_space"):
                continue
            puts = f"{path.name} puts {_DOES[key] if does[key] else 'no' + _DOES[key][1:]}"
            choose = "make them agree"
            if key != "add_prefix_space":
                choose = "inputs.special_tokens=false leaves such tokens out"
            raise ConfigError(f"{where}, but {puts}; {choose}")


def read_beside(path: Path) -> Beside:
    """The files beside a tokenizer.json. Raises ConfigError for what is malformed or not supported."""
    config = _read(path.with_name(CONFIG))
    fields = fields_of(config, path.with_name(CONFIG))
    fields.must_be(**FIXED_KEYS)
    values, decoder = dict(config), fields.node("added_tokens_decoder", {})
    if config.get("added_tokens_decoder") is None:
        values |= _read(path.with_name(MAP))
    kind, where = _class(config, path.parent)
    says = {}
    for key in _DOES:
        if (said := fields.boolean(key, None)) is not None:
            says[key] = (said, f"{fields.prefix}{key}={str(said).lower()}")
        elif key in (default := _CLASSES.get(kind, {})):
            says[key] = (default[key], f"{where}, the tokenizer's class, without {key}")
    tokens = [
        {"id": _index(index, fields), **_token(token, index, decoder)}
        for index, token in decoder.values.items()
    ]
    named = list(_named(Fields(values, f"{path.parent}: ", brief)))
    if config.get("added_tokens_decoder") is None:
        special = {token["content"] for token in named}
        beside = fields_of(_read(path.with_name(ADDED)), path.with_name(ADDED))
        for content, index in beside.values.items():
            flag = content in special
            token = {"content": content, "special": flag, "normalized": not flag}
            tokens.append({"id": _index(index, beside), **token, "named": True})
    tokens.sort(key=lambda token: token["id"])
    return Beside([*tokens, *({**token, "named": True} for token in named)], says)


def _class(config: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    """The tokenizer's class, and a line on where that stands; empty where nothing says it."""
    model = _read(folder / "config.json")
    for name, its in ((CONFIG, config), ("config.json", model)):
        if isinstance(kind := its.get("tokenizer_class"), str):
            return kind.removesuffix("Fast"), f"{folder / name}: tokenizer_class={as_typed(kind)}"
    kind = _FAMILIES.get(str(model.get("model_type")), "")
    return kind, f"{folder}: {kind}"


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _index(index: object, fields: Fields) -> int:
    if isinstance(index, str) and index.isascii() and index.isdigit() and len(index) < 10:
        return int(index)
    if type(index) is int and 0 <= index < 10**9:
        return index
    raise ConfigError(f"{fields.prefix}{brief(index)}: not a token's id")


def _token(token: object, key: str, fields: Fields) -> dict[str, Any]:
    """A token's fields, of its text or of a mapping with these fields. Raises ConfigError."""
    if isinstance(token, str):
        return {"content": token, "special": True, "normalized": False}
    key = brief(key)[1:-1]
    its = Fields(token if isinstance(token, Mapping) else {}, f"{fields.prefix}{key}.", brief)
    if not isinstance(its.values.get("content"), str):
        raise fields.fail(key, token, "not a token")
    flags = {flag: its.boolean(flag, None) for flag in _FLAGS}
    return {"content": its.values["content"], **{k: v for k, v in flags.items() if v is not None}}


def _named(fields: Fields) -> Iterator[dict[str, Any]]:
    """The special tokens that a config names, in transformers' order. Raises ConfigError."""
    values = fields.values
    others = [key for key in values if key.endswith("_token") and key not in NAMED_TOKENS]
    for key in (*NAMED_TOKENS, *others):
        if values.get(key) is not None and not isinstance(values[key], bool):
            yield _token(values[key], key, fields)
    extra = "extra_special_tokens"
    if not values.get(extra):
        extra = "additional_special_tokens"
    more = values.get(extra) or []
    if isinstance(more, Mapping):
        more = list(more.values())
    for token in more if isinstance(more, list) else [more]:
        yield _token(token, extra, fields)
