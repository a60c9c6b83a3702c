"""``simlab.probe``: the rows of curve.csv for any PyTorch decoder, from hooks on its blocks."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from simlab.config import ConfigError
from simlab.measurement.block_probe import BlockProbe, Probe, Reducer
from simlab.measurement.engine import Measured, rows_of
from simlab.measurement.frame import to_frame
from simlab.measurement.layout import Layout, blocks_at, inside, known_sublayers, unknown_layout
from simlab.measurement.layout_probe import LayoutProbe, first_argument
from simlab.measurement.statistics import STATISTICS, Step, wide
from simlab.model.transformer import Block

# In the rows' ``attrs``, where a curve was cut: its first sublayer that isn't finite. pandas keeps it
# in the rows of several seeds that end at the same sublayer.
NOT_FINITE_FROM = "not_finite_from"
NEVER = -1e4  # what is added to a logit to hide a key is below this: float16's lowest is −65504
Batch = Tensor | Mapping[str, Any] | tuple[Any, ...]


def probe(
    model: nn.Module,
    batch: Batch | None = None,
    *,
    layout: Layout | None = None,
    curve: str = "model",
    seed: int = 0,
) -> ModelProbe:
    """Measure the residual stream of a decoder after its embedding and after every sublayer.

    Example:

        rows = simlab.probe(model, ids).rows()

        with simlab.probe(model) as result:      # or any forward calls of your own
            model(ids)
        rows = result.rows()

    Your own calls run in the mode the model is in. They are batches of one curve, of sequences of one
    length and without padding. No output and no gradient changes. What torch.compile has compiled runs
    uncompiled meanwhile: it would pass the hooks by.

    Args:
        model: Any decoder whose blocks pass a stream of shape (batch, length, width).
        batch: Token ids (batch, length), or a mapping (``model(**batch)``), or a tuple
            (``model(*batch)``). It is passed through the model at once, without gradients and in eval
            mode; every submodule's mode is put back.
        layout: Describes the residual stream of a model that ``layout.KNOWN`` lacks.
        curve: The name in the rows' column ``curve``.
        seed: The number in the rows' column ``seed``.

    Raises ConfigError for a model without known decoder layers, or a batch that is none of these.
    """
    result = ModelProbe(model, layout, curve, seed)
    if batch is not None:
        args, kwargs = arguments(batch)
        with evaluated(model), torch.no_grad(), result:
            model(*args, **kwargs)
    return result


class ModelProbe:
    """The result of ``probe``: a context manager that measures forward calls, and their rows.

    The blocks' hooks exist only during a forward call of the model, so a block that gradient
    checkpointing runs again in the backward is not counted twice.
    """

    def __init__(self, model: nn.Module, layout: Layout | None, curve: str, seed: int) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"probe: model is a {type(model).__name__}: must be an nn.Module")
        self.model, self.curve, self.seed = model, curve, seed
        self.probes = block_probes(model, layout)
        self.embedding = Reducer(STATISTICS)
        self.size: tuple[int, int] | None = None  # T, D
        self.outer, self.inner = ExitStack(), ExitStack()  # hooks of the with block, of a call

    def __enter__(self) -> ModelProbe:
        begin = self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        end = self.model.register_forward_hook(self._end, always_call=True)
        self.outer.callback(begin.remove)
        self.outer.callback(end.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self.inner.close()
        self.outer.close()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_padding(model, args, kwargs)
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it is slow to import
            self.inner.enter_context(torch.compiler.set_stance("force_eager"))
        embedded = self.probes[0].block.register_forward_pre_hook(self._embedded, with_kwargs=True)
        self.inner.callback(embedded.remove)
        for probe in self.probes:
            self.inner.enter_context(probe)

    def _end(self, model: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self.inner.close()

    def _embedded(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_argument(args, kwargs)
        if x.ndim != 3:
            raise ConfigError(
                f"probe: the first block gets a tensor of shape {tuple(x.shape)}: must be"
                " (batch, length, width)"
            )
        length, width = x.shape[1:]
        if self.size not in (None, (length, width)):
            raise ConfigError(
                f"probe: a batch of length {length} after one of {self.size[0]}: batches of a curve"
                " have sequences of one length"
            )
        self.size = length, width
        self.embedding.add(Step(after=wide(x)))

    def rows(self) -> pd.DataFrame:
        """One row per step, with curve.csv's columns; NaN in those that the model doesn't show.

        A curve that overflows ends before its first non-finite value, with a warning that says where;
        the rows' ``attrs["not_finite_from"]`` is then that sublayer.
        Raises ConfigError where no forward call was seen, or one that didn't pass every step.
        """
        measured = self.measured()
        assert self.size is not None  # measured
        frame, _, cuts = to_frame(
            [(self.curve, self.seed, measured)], self.embedding.tokens * self.size[1]
        )
        for row in cuts.overflow:
            place = f"sublayer {row['sublayer']} ({row['kind']})"
            warnings.warn(f"probe: curve {self.curve} isn't finite from {place} on", stacklevel=2)
            frame.attrs[NOT_FINITE_FROM] = int(row["sublayer"])
        return frame

    def measured(self) -> Measured:
        """The curve, as ``measure_curves`` gives it. Raises ConfigError as ``rows`` does."""
        if self.size is None:
            raise ConfigError(
                f"probe: no forward call of {type(self.model).__name__} was seen: call the model"
                " itself within the with block, or give a batch"
            )
        tokens = self.embedding.tokens
        for i, probe in enumerate(self.probes):
            for kind, reducer in zip(probe.kinds, probe.reducers, strict=True):
                if reducer.tokens != tokens:
                    raise ConfigError(
                        f"probe: {kind} of block {i} saw {reducer.tokens} of {tokens} tokens: a"
                        " forward call failed or went around it, or the layout isn't this model's"
                    )
        blocks = [
            [step._replace(values=step.values[0].cpu()) for step in probe.results()]
            for probe in self.probes
        ]
        return Measured(rows_of(self.embedding.result()[0].cpu(), blocks))


def block_probes(model: nn.Module, layout: Layout | None) -> list[BlockProbe]:
    """A probe for each of the model's blocks, in their order. Raises ConfigError."""
    if layout is not None:
        path, blocks = layout.blocks, blocks_at(model, layout.blocks)
    else:
        lists = {
            path: [inside(block) for block in module]
            for path, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) and all(map(is_known, module))
        }
        if not lists:
            raise unknown_layout(model)
        if len(lists) > 1:
            raise ConfigError(
                f"probe: {type(model).__name__} has decoder layers at {', '.join(lists)}: probe one"
                " of the models it is made of, or pass a layout"
            )
        path, blocks = lists.popitem()
    if len(set(blocks)) < len(blocks):
        raise ConfigError(f"probe: {path} holds a block more than once: can't tell its calls apart")
    probes: list[BlockProbe] = []
    for i, block in enumerate(blocks):
        if layout is None and isinstance(block, Block):
            probes.append(Probe(block))
        else:
            sublayers = layout.sublayers if layout else known_sublayers(block)
            assert sublayers is not None  # is_known
            probes.append(LayoutProbe(block, f"{path}.{i}", sublayers))
    return probes


def is_known(block: nn.Module) -> bool:
    """True for simlab's own block and for a decoder layer of a known class, in a wrapper too."""
    return isinstance(block, Block) or known_sublayers(inside(block)) is not None


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


def refuse_padding(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ConfigError if an attention_mask hides tokens, which the statistics would count.

    A mask may be (B, T), or by query and key (B, heads, T, T), true or 0 where a query looks, or a
    mapping of such masks by layer type. A token that no query looks at is hidden, its own included.
    """
    inputs = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
    given = inputs.get("attention_mask")
    for mask in given.values() if isinstance(given, Mapping) else [given]:
        if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
            continue
        seen = mask != 0
        if mask.ndim == 4:
            seen = (mask if mask.dtype == torch.bool else mask > NEVER).any(2).any(1)
        if not seen.all():
            raise ConfigError(
                f"probe: attention_mask hides {int((~seen).sum())} of {seen.numel()} tokens, which"
                " the statistics would count: pass sequences of one length, without padding"
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
