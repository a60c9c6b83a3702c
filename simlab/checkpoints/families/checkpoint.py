"""A checkpoint of any model type that transformers knows, opened for streaming block by block."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash

from simlab.checkpoints.families.config import (
    CONFIG_ERRORS,
    beyond_own,
    one_line,
    read_family_config,
)
from simlab.checkpoints.families.conversion import Conversion
from simlab.checkpoints.families.skeleton import Skeleton, transformers_of
from simlab.checkpoints.families.sources import (
    DrawnWeights,
    StoredWeights,
    entries,
    one_dimension,
    take_in,
)
from simlab.checkpoints.fingerprint import Fingerprints
from simlab.checkpoints.formats.hugging_face_keys import MODEL_TYPES, TEXT_PARTS
from simlab.checkpoints.formats.layouts import INDEX, refuse_beside, unread, unwrapped
from simlab.checkpoints.formats.own_init import OwnInit
from simlab.checkpoints.formats.weight_files import tensors, weight_files
from simlab.checkpoints.storage import READ, StoredTensor, check_pieces, main_kind
from simlab.checkpoints.streamed import row_runs
from simlab.checkpoints.untrusted.files import read_json
from simlab.checkpoints.untrusted.safetensors import WHOLE_DTYPES
from simlab.checkpoints.untrusted.tokenizer_files import find_tokenizer
from simlab.config import ConfigError, FamilyConfig, InitConfig, NormConfig
from simlab.config.fields import brief

_MOST_TENSORS = 100_000  # of a checkpoint that isn't here
# Buffers of older files, which transformers makes anew from the config.
_BUFFERS = r"rotary_emb\.inv_freq$|(^|\.)position_ids$|(attn|attention)\.(masked_)?bias$"


def build(config: Any, path: Path, dtype: torch.dtype, device: torch.device) -> Skeleton:
    """The skeleton of a config. Raises ConfigError, also where transformers can't build it."""
    try:
        return Skeleton(config, str(path), dtype, device)
    except ConfigError:
        raise
    except CONFIG_ERRORS as error:
        raise ConfigError(
            f"{path}: transformers can't build this model: {one_line(error)}"
        ) from error


def describe_family(folder: Path) -> tuple[FamilyConfig, OwnInit]:
    """The shape and the init of a checkpoint whose weights may be missing. Raises ConfigError."""
    path = folder / "config.json"
    config, _ = read_family_config(path, _MOST_TENSORS)
    skeleton = build(config, path, torch.float32, torch.device("cpu"))
    return _shape(config, skeleton, folder), _own_init(config)


class FamilyCheckpoint:
    """An opened checkpoint of a model type that transformers computes.

    It is checked from headers alone: the files must fill every tensor of the decoder, in its shape; a
    tensor of a block that the model has no place for is refused, others are told in ``unread``.

    Args: as ``Checkpoint``. Raises ConfigError.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        *,
        statistics: bool = False,
        keep: bool = True,
    ) -> None:
        from simlab.checkpoints.hub import find

        found = find(path, revision)
        self.commit = found.commit
        if found.missing:
            describe_family(found.folder)  # refused before gigabytes come
        self.folder, self.removal = found.fetch_for(self, keep)
        self.path = self.folder / "config.json"
        refuse_beside(self.folder)
        files = weight_files(self.folder)
        held = _singly(unwrapped(tensors(files, WHOLE_DTYPES), self.folder))
        check_pieces(held.values())
        self.config, unknown = read_family_config(self.path, len(held))
        self.skeleton = build(self.config, self.path, torch.float32, torch.device("cpu"))
        self.conversion = Conversion(self.skeleton.model, held, str(self.folder))
        self.same = dict(self._tied())
        self.wanted = list(self._wanted())
        index = [] if None in files.values() else [INDEX]
        native = self.config.model_type in {*MODEL_TYPES, *TEXT_PARTS}
        own = beyond_own(self.path) if native else ""
        why = (
            f"transformers computes it, since simlab's own model doesn't have {own}" if own else ""
        )
        beside = unread(self.folder, [*index, *(file.name for file in files)])
        unnamed = _unnamed(unknown, self.skeleton.model)
        code = "not used: auto_map in config.json, code of the repository's own"
        code = code if read_json(self.path).get("auto_map") else ""
        self.unread = "; ".join(filter(None, [why, beside, *self._unused(), *unnamed, code]))
        self.model = _shape(self.config, self.skeleton, self.folder)
        self.reader = ThreadPoolExecutor(1)
        self.fingerprints = Fingerprints(statistics)

    def release(self) -> None:
        """Close the files, and remove those that were downloaded for this object alone."""
        self.reader.shutdown()
        held = self.conversion.tensors.values()
        for file in {piece.file for tensor in held for piece in tensor.pieces}:
            file.close()
        self.removal()

    @property
    def about(self) -> dict[str, str]:
        """As of ``Checkpoint``."""
        return {
            "model_type": self.config.model_type,
            "format": "hugging_face",
            "stored_in": main_kind(self.conversion.tensors.values()),
            "computed_by": "transformers",
            "init": "a guess" if self.init.guess else "its own",
        }

    @property
    def init(self) -> OwnInit:
        """The family's own init, which its code in transformers draws."""
        return _own_init(self.config)

    @property
    def head_name(self) -> str:
        """The parameter that the head is, which gradients need. Raises ConfigError if it is missing."""
        name = f"{self.skeleton.head}.weight"
        if self.same.get(name, name) not in self.conversion.by_target:
            raise ConfigError(
                f"{self.folder}: holds no {name}: gradients and the loss need the head"
            )
        return self.same.get(name, name)

    @property
    def tokenizer(self) -> Path | None:
        """The checkpoint's tokenizer.json, another tokenizer's file, or None where it has neither."""
        return find_tokenizer(self.folder)

    def skeleton_for(self, dtype: torch.dtype, device: torch.device) -> Skeleton:
        """The skeleton in a run's dtype on its device."""
        if (dtype, device) != (self.skeleton.dtype, self.skeleton.device):
            self.skeleton = build(self.config, self.path, dtype, device)
        return self.skeleton

    def stored(self, skeleton: Skeleton) -> StoredWeights:
        """The files' weights for a skeleton."""
        return StoredWeights(skeleton, self.conversion, self.fingerprints, self.same)

    def drawn(self, skeleton: Skeleton, seed: int) -> DrawnWeights:
        """A random init's weights for a skeleton."""
        return DrawnWeights(skeleton, seed)

    def prefetch(self, path: str) -> None:
        """Let the system begin to read the unit that follows one, in the background."""
        paths = [*self.skeleton.units]
        for follows in paths[paths.index(path) + 1 :][:1]:
            for group in self.conversion.groups_of(self._sources(self.skeleton.names(follows))):
                for _, key in group.sources:
                    self.reader.submit(self.conversion.tensors[key].prefetch)

    def _sources(self, names: list[str]) -> list[str]:
        return [self.same.get(name, name) for name in names]

    def _tied(self) -> Iterator[tuple[str, str]]:
        """Of tied tensors, those that no file fills, with the one whose weights they have."""
        missing = {*self.conversion.missing}
        for name, other in getattr(self.skeleton.model, "all_tied_weights_keys", {}).items():
            if name in missing and other not in missing:
                yield name, other
            elif other in missing and name not in missing:
                yield other, name

    def _wanted(self) -> Iterator[str]:
        """The files' names of all that the decoder needs, in the model's order. Raises ConfigError."""
        skeleton, by_target = self.skeleton, self.conversion.by_target
        start = f"{skeleton.path}." if skeleton.path else ""
        seen: dict[str, None] = {}
        for name in skeleton.model.state_dict():
            if not name.startswith(start):
                continue
            if (group := by_target.get(self.same.get(name, name))) is None:
                raise ConfigError(
                    f"{self.folder}: tensor {name} is missing, of which transformers' "
                    f"{self.config.model_type} is made"
                )
            seen |= dict.fromkeys(key for _, key in group.sources)
        return iter(seen)

    def _unused(self) -> Iterator[str]:
        """Lines on tensors that aren't measured. Raises ConfigError for one of a block."""
        model, kind = self.skeleton.model, self.config.model_type
        ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), _BUFFERS]
        unused = [k for k in self.conversion.unused if not re.search("|".join(ignored), k)]
        lists = {path.rpartition(".")[0] for path in self.skeleton.units}
        lists |= {path.removeprefix(f"{model.base_model_prefix}.") for path in lists}
        for key in unused:
            if key.startswith(tuple(f"{path}." for path in lists)):
                raise ConfigError(
                    f"{self.folder}: tensor {key} is not part of transformers' {kind} as its config "
                    "describes it"
                )
        yield from _line(unused, f"for which transformers' {kind} has no place")
        start, wanted = self.skeleton.path, {*self.wanted}
        head = model.get_output_embeddings()
        heads = {name for name, one in model.named_modules() if one is head}
        others = [
            key
            for name, group in self.conversion.by_target.items()
            for _, key in group.sources
            if key not in wanted and name.rpartition(".")[0] not in heads
        ]
        yield from _line(list(dict.fromkeys(others)), f"outside of the decoder ({start})")

    def identity(self) -> dict[str, str]:
        """``weight_hash``: over name, dtype, shape and bytes of the decoder's tensors in the files."""
        digest = xxhash.xxh3_128()
        for key in sorted(self.wanted):
            stored = self.conversion.tensors[key]
            self._fingerprint(key)
            digest.update(f"{key} {stored.dtype} {tuple(stored.shape)} ".encode())
            digest.update(self.fingerprints.digest(key))
        return {"weight_hash": digest.hexdigest()}

    def table(self) -> list[dict[str, Any]]:
        """A row per tensor that the decoder has, as ``Checkpoint.table``; its name is the file's."""
        rows = []
        for key in self.wanted:
            stored = self.conversion.tensors[key]
            if not entries(stored):
                continue
            self._fingerprint(key)
            about = {
                "tensor": key,
                "in_file": stored.name,
                "shape": "×".join(map(str, stored.shape)),
                "dtype": str(stored.dtype).removeprefix("torch."),
                "entries": entries(stored),
            }
            rows.append(about | self.fingerprints.statistics(key))
        return rows

    def _fingerprint(self, key: str) -> None:
        """Read a tensor for its fingerprint, unless its rows were read."""
        if self.fingerprints.has(key):
            return
        stored = one_dimension(self.conversion.tensors[key])
        for start, stop in row_runs(stored, 0, stored.shape[0]):
            rows = READ.empty((stop - start, *stored.shape[1:]), stored.dtype)
            take_in(self.fingerprints, key, stored, start, rows)


def _singly(held: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors, of several with the same bytes the first: a pickle has tied ones twice."""
    first: dict[object, str] = {}
    for name, tensor in held.items():
        first.setdefault(tensor.pieces if entries(tensor) else name, name)
    return {name: held[name] for name in first.values()}


def _line(names: list[str], why: str) -> Iterator[str]:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"not used: {names[0]}{more}, {why}"


def _unnamed(keys: list[str], model: Any) -> Iterator[str]:
    """A line on the keys of a config that the model's code doesn't name, either."""
    code = inspect.getsource(sys.modules[type(model).__module__])
    keys = [key for key in keys if not re.search(rf"\b{re.escape(key)}\b", code)]
    if keys:
        some = ", ".join(brief(key)[1:-1] for key in keys[:3]) + " …" * (len(keys) > 3)
        kind = model.config.model_type
        yield f"not used: {some} in config.json, which transformers' {kind} doesn't know"


def _own_init(config: Any) -> OwnInit:
    rule = config.model_type
    return OwnInit(InitConfig(rule, None, None), f"{rule}'s own, as transformers draws it")


def _shape(config: Any, skeleton: Skeleton, folder: Path) -> FamilyConfig:
    """The sizes of a model, 0 for one that its config doesn't say. Raises ConfigError."""
    from transformers.integrations.heterogeneity import configuration_utils

    text = config.get_text_config()

    def one(name: str) -> Any:
        try:
            return getattr(text, name, None)
        except configuration_utils.AmbiguousGlobalPerLayerAttributeError:  # differs between layers
            return None

    def size(*names: str) -> int:
        found = map(one, names)
        return next((n for n in found if isinstance(n, int) and not isinstance(n, bool)), 0)

    blocks = [
        sum(skeleton.empty[name].numel() for name in skeleton.names(path))
        for path in skeleton.units
    ]
    heads = size("num_attention_heads")
    width, vocabulary, depth = size("hidden_size"), size("vocab_size"), size("num_hidden_layers")
    if min(width, vocabulary, depth) < 1:
        raise ConfigError(
            f"{folder / 'config.json'}: {config.model_type} has no hidden_size, vocab_size or "
            "num_hidden_layers: simlab can't tell its sizes"
        )
    return FamilyConfig(
        name=folder.name,
        depth=depth,
        width=width,
        heads=heads,
        kv_heads=size("num_key_value_heads") or heads,
        d_ff=size("intermediate_size"),
        vocab_size=vocabulary,
        head_dim=size("head_dim") or (width // heads if heads else 0),
        norm=NormConfig(config.model_type),
        family=config.model_type,
        parameters=skeleton.parameters,
        block_parameters=max(blocks),
        transformers=transformers_of(folder).__version__,
    )
