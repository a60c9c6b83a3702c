"""Checks of a batch for ``simlab.probe``: no padding, and a stream of (batch, length, width)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from simlab.config import ConfigError
from simlab.measurement.statistics import wide

NEVER = -1e4  # what is added to a logit to hide a key is below this: float16's lowest is −65504
RELATED = (
    0.1  # cosine of a stream with the embedding from which it began: tiny, where they're unrelated
)
# Parts of the names of what has a number for each token, too. Training scripts pass it in any order.
NO_IDS = ("mask", "position", "type", "segment", "label", "target")
Batch = Tensor | Mapping[str, Any] | tuple[Any, ...]


def arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of the model's forward call. Raises ConfigError."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, tuple):
        return batch, {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    raise ConfigError(
        f"probe: batch is a {type(batch).__name__}: must be a tensor of token ids, a mapping of"
        " keyword arguments or a tuple of positional ones"
    )


def named_arguments(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a forward call by name, in the order of its signature."""
    names = inspect.signature(model.forward).parameters
    given = dict(zip(names, args, strict=False)) | kwargs
    return {name: given[name] for name in names if name in given} | given


def token_ids(inputs: Mapping[str, Any]) -> Tensor | None:
    """The token ids (B, T) among what a model gets, by name; None where it gets none."""
    found = [
        x
        for name, x in inputs.items()
        if isinstance(x, Tensor) and x.ndim == 2 and not any(part in name for part in NO_IDS)
        if not x.is_floating_point() and x.dtype != torch.bool
    ]
    ids = inputs.get("input_ids")
    return ids if any(x is ids for x in found) else next(iter(found), None)


def refuse_cache(inputs: Mapping[str, Any]) -> None:
    """Raise ConfigError if a model of transformers gets a cache of earlier tokens, as in generation.

    They would be missing in the rows, and the first token that it gets isn't the sequence's first.
    """
    for name in ("past_key_values", "cache_params"):
        given = inputs.get(name)
        cache = getattr(given, "self_attention_cache", given)  # of an encoder and a decoder
        for layer in getattr(cache, "layers", cache if isinstance(cache, tuple) else ()):
            length = getattr(layer, "get_seq_length", lambda layer=layer: isinstance(layer, tuple))
            state = getattr(layer, "has_previous_state", {})
            if length() or any(state.values() if isinstance(state, dict) else [state]):
                raise ConfigError(
                    f"probe: {name} holds earlier tokens, which the statistics would miss: pass whole"
                    " sequences, without a cache"
                )


def refuse_padding(inputs: Mapping[str, Any]) -> None:
    """Raise ConfigError if a mask hides tokens, which the statistics would count.

    inputs: what a model or a block gets, by name. A mask may be (B, T), or by query and key
    (B, heads, T, T) or (B, T, T), as ``looks`` reads it, or a mapping of such masks by layer type. A
    token that no query looks at is hidden, its own included. A key padding mask is true or not 0 where
    it hides, as in torch.nn.
    """
    for name, given in inputs.items():
        if "mask" not in name or any(
            other in name for other in ("loss", "head", "encoder", "cross")
        ):
            continue
        for mask in given.values() if isinstance(given, Mapping) else [given]:
            if not isinstance(mask, Tensor) or mask.ndim not in (2, 3, 4):
                continue
            hidden = mask != 0 if "padding" in name else mask == 0
            if mask.ndim > 2:
                seen = looks(mask).any(-2)
                hidden = ~(seen.any(1) if mask.ndim == 4 else seen)
            elif any(
                torch.equal(causal, torch.ones_like(hidden).triu(1)) for causal in (hidden, ~hidden)
            ):
                continue  # (T, T), for all sequences
            if hidden.any():
                raise ConfigError(
                    f"probe: {name} hides {int(hidden.sum())} of {hidden.numel()} tokens, which"
                    " the statistics would count: pass sequences of one length, without padding"
                )


def looks(mask: Tensor) -> Tensor:
    """True where a query looks at a key, of a mask (…, T, T).

    It is added to the logits, or it is boolean, or 0 and 1: for looks or for doesn't, which the later
    keys tell apart. Padded queries may not look at themselves either.
    """
    if mask.is_floating_point() and ((mask != 0) & (mask != 1)).any():
        return mask > NEVER
    mask = mask != 0
    at_all_later = (mask | torch.ones_like(mask).tril()).all() and not mask.all()
    at_itself = mask.diagonal(dim1=-2, dim2=-1).any()
    return ~mask if at_all_later or not at_itself else mask


class Stream:
    """The stream of one forward call against its token ids (B, T): the order of dimensions, and once.

    inputs: what the model gets, by name; ids are looked for there, else ``inputs_embeds`` (B, T, D).
    longer: whether a sequence may have more tokens in the stream than it has ids.
    """

    def __init__(self, inputs: Mapping[str, Any], longer: bool) -> None:
        self.longer = longer
        self.ids = token_ids(inputs)
        self.embedded: Tensor | None = None  # of the ids (B, T, D)
        given = inputs.get("inputs_embeds")
        if self.ids is None and isinstance(given, Tensor):
            self.embedded = given.detach().clone()
        self.began = False

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Keep what the model's embedding gives, where the shape can't tell: if B = T."""
        ids, handles = self.ids, []

        def keep(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            if not args or not isinstance(args[0], Tensor) or ids is None:
                return
            for given, embedded in ((args[0], out), (args[0].mT, out.transpose(0, 1))):
                if given.shape == ids.shape and torch.equal(given, ids):
                    self.embedded = embedded.detach().clone()
                    return

        if ids is not None and ids.shape[0] == ids.shape[1] > 1:
            of = (module for module in model.modules() if isinstance(module, nn.Embedding))
            handles = [module.register_forward_hook(keep) for module in of]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, x: Tensor) -> None:
        """The first block gets x. Raises ConfigError if that isn't (B, T, D), or its second call."""
        if self.began:
            raise ConfigError(
                "probe: the first block is called again within one forward call: its rows would be of"
                " both calls"
            )
        self.began = True
        tokens = self.embedded if self.ids is None else self.ids
        if tokens is None:
            return
        other = x.shape[0] != tokens.shape[0] or (x.shape[1] != tokens.shape[1] and not self.longer)
        if self.embedded is not None and self.embedded.shape == x.shape:
            e = self.embedded
            as_is, turned = (
                torch.cosine_similarity(wide(x).flatten(), wide(y).flatten(), dim=0).item()
                for y in (e, e.transpose(0, 1))
            )
            other = turned > max(as_is, RELATED)
        if other:
            raise ConfigError(
                f"probe: the first block gets {tuple(x.shape)} for token ids {tuple(tokens.shape[:2])}:"
                " must be (batch, length, width), a token for each id"
            )


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode, then every submodule's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
