"""Checks of a batch for ``simlab.probe``: no padding, and streams of (batch, length, width)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from simlab.config import ConfigError
from simlab.measurement.statistics import wide

NEVER = -1e4  # what is added to a logit to hide a key is below this: float16's lowest is −65504
RELATED = (
    0.1  # cosine of a stream with the embedding from which it began: tiny, where they're unrelated
)
SAME = 0.99  # likewise, of one among several streams that is the embedding, up to a factor
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
    longer: whether a sequence may have more tokens in the stream than it has ids. axis: along which
    several streams lie in what the first block gets, as (n, B, T, D) or (B, T, n, D); None for one.
    """

    def __init__(self, inputs: Mapping[str, Any], longer: bool) -> None:
        self.longer = longer
        self.ids = token_ids(inputs)
        self.embedded: list[Tensor] = []  # of the ids (B, T, D), by each table
        given = inputs.get("inputs_embeds")
        if self.ids is None and isinstance(given, Tensor):
            self.embedded.append(given.detach().clone())
        self.began = False
        self.axis: int | None = None

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Keep what the model's embedding gives until its blocks begin: a shape doesn't tell all."""
        ids, handles = self.ids, list[RemovableHandle]()

        def keep(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if not args or not isinstance(args[0], Tensor) or args[0].ndim != 2 or ids is None:
                return
            if not isinstance(out, Tensor):
                return
            for given, embedded in ((args[0], out), (args[0].mT, out.transpose(0, 1))):
                if given.shape == ids.shape and torch.equal(given, ids):
                    self.embedded.append(embedded.detach().clone())
                    return

        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                handles.append(module.register_forward_pre_hook(partial(refuse_rows, name)))
                if ids is not None:
                    handles.append(module.register_forward_hook(keep))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, x: Tensor) -> None:
        """The first block gets x. Raises ConfigError for its second call, and if that isn't (B, T, D).

        Several streams, of four dimensions, must be told from sequences and tokens.
        """
        if self.began:
            raise ConfigError(
                "probe: the first block is called again within one forward call: its rows would be of"
                " both calls"
            )
        self.began = True
        embedded, self.embedded = self.embedded, []
        tokens = next(iter(embedded), None) if self.ids is None else self.ids
        e = next((e for e in embedded if e.shape[-1] == x.shape[-1]), None)
        if tokens is None and x.ndim == 3:
            return
        if tokens is None:
            raise ConfigError(
                f"probe: the first block gets {tuple(x.shape)}: without token ids it must be (batch,"
                " length, width)"
            )
        length = x.shape[1] if self.longer else tokens.shape[1]
        if x.ndim == 4:
            self.axis, other = streams_axis(x, tokens.shape[:2], e)
        else:
            other = x.shape[:2] != (tokens.shape[0], length)
        if not other and e is not None and e.shape == x.shape and x.shape[0] == x.shape[1] > 1:
            turned = cosine(x, e.transpose(0, 1))
            other = turned > max(cosine(x, e), RELATED)
        if other:
            raise ConfigError(
                f"probe: the first block gets {tuple(x.shape)} for token ids {tuple(tokens.shape[:2])}:"
                " must be (batch, length, width), a token for each id"
            )


def refuse_rows(name: str, table: nn.Module, args: tuple[Any, ...]) -> None:
    """Raise ConfigError for a row that an embedding doesn't have: of torch it is an error of its own.

    A class of its own may get what are no rows, such as ids for positions that it counts itself. The
    tables of a streamed model, one zero expanded, are refused where their rows are read.
    """
    plain = type(table).forward is nn.Embedding.forward or "WordEmbedding" in type(table).__name__
    if not isinstance(table, nn.Embedding) or not plain or not args:
        return
    rows, streamed = args[0], not any(table.weight.stride())
    if isinstance(rows, Tensor) and rows.numel() and not streamed:
        least, most = (int(row) for row in rows.aminmax())
        if least < 0 or most >= table.num_embeddings:
            raise ConfigError(
                f"probe: {name} has {table.num_embeddings} rows, and row {least if least < 0 else most}"
                " is asked for: pass other token ids, or for positions shorter sequences"
            )


def streams_axis(
    x: Tensor, tokens: tuple[int, ...], embedded: Tensor | None
) -> tuple[int | None, bool]:
    """Along which axis of x, as (n, B, T, D), its streams lie; whether its tokens are in another order.

    tokens: B, T. Where the shape allows several answers, one of the streams must be the embedding
    (B, T, D). Raises ConfigError where that doesn't tell, either.
    """
    found = [
        (axis, turned)
        for axis in range(3)
        for turned in (False, True)
        if (*x.shape[:axis], *x.shape[axis + 1 : 3]) == (tokens[::-1] if turned else tokens)
    ]
    if len(found) > 1:
        ways = () if embedded is None else (embedded, embedded.transpose(0, 1))
        found = [
            (axis, turned)
            for axis, turned in found
            if ways and any(cosine(one, ways[turned]) > SAME for one in x.unbind(axis))
        ]
        if len(found) != 1:
            raise ConfigError(
                f"probe: the first block gets {tuple(x.shape)} for token ids {tuple(tokens)}: can't"
                " tell its streams from sequences and tokens: pass another number of these"
            )
    return found[0] if found else (None, True)


def cosine(x: Tensor, y: Tensor) -> float:
    """The cosine of all entries."""
    return torch.cosine_similarity(wide(x).flatten(), wide(y).flatten(), dim=0).item()


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
