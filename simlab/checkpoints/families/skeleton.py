"""A transformers model without weights: its modules on the meta device, filled a block at a time.

A block's weights are put in place before its forward call, and go when the next block's come: memory
holds one block, the embedding rows of the tokens, and what isn't in a block (norms, positions).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode

from simlab.config import ConfigError

INSTALL = "pip install transformers"
# Bytes of all of a model's buffers together, which follow from its config alone: GPT-2 has 1 MiB of
# causal masks a block, GPT-J 0.5 of positions.
BUFFER_BYTES = 512 << 20
MODULES = 200_000  # DeepSeek V3 as its first code had it, with a module for each expert, has 60,000


class Source(Protocol):
    """Where a skeleton's weights come from. Names are the model's."""

    def fill(self, path: str) -> None:
        """Put the weights of a unit in their places, of "" those outside of units and embeddings."""

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows of an embedding by id: (*ids.shape, columns)."""

    def head(self, start: int, stop: int) -> dict[str, Tensor]:
        """The rows from start to stop of the head's weight, and of its bias if it has one, by name."""


def transformers_of(path: Path) -> Any:
    """The package transformers. Raises ConfigError where it isn't installed; path: what needs it."""
    try:
        import transformers
        import transformers.conversion_mapping
        import transformers.core_model_loading
    except ImportError as error:
        raise ConfigError(
            f"{path}: simlab reads this model type through transformers 5.23 or later: {INSTALL}"
        ) from error
    return transformers


class Skeleton:
    """A causal language model's decoder, and its blocks.

    Args:
        config: transformers' config.
        dtype, device: Of the run.
        where: The config's path, for messages.

    Attributes:
        model: The whole model on the meta device.
        decoder: The part that maps token ids to the last stream.
        parameters: Of the whole model.
        units: Its blocks, and whatever else lies in a list of modules, by the path in the model.

    Raises ConfigError for a model whose size isn't plausible, or that has no blocks.
    """

    def __init__(self, config: Any, where: str, dtype: torch.dtype, device: torch.device) -> None:
        transformers = transformers_of(Path(where))
        self.where, self.dtype, self.device = where, dtype, device
        with torch.device("meta"), _few_modules(where):
            self.model = auto_class(config).from_config(
                config, dtype=dtype, attn_implementation="eager", trust_remote_code=False
            )
        self.model.eval().requires_grad_(False)
        self.decoder = _decoder(self.model, transformers.PreTrainedModel)
        names = {module: name for name, module in self.model.named_modules()}
        self.path = names[self.decoder]
        self.units = dict(_units(self.decoder, self.path))
        if not self.units:
            raise ConfigError(f"{where}: {type(self.model).__name__} has no list of blocks")
        self.dtypes = {name: one.dtype for name, one in self.model.state_dict().items()}
        self.parameters = sum(one.numel() for one in self.model.parameters())  # tied ones once
        self.tables = self._tables()
        self.empty = dict(self.model.named_parameters(remove_duplicate=False))
        self._owned = {
            path: [n for n in self.empty if n.startswith(f"{path}.")] for path in self.units
        }
        inside = {name for names in self._owned.values() for name in names} | {*self.tables}
        start = f"{self.path}." if self.path else ""
        outside = [n for n in self.empty if n.startswith(start) and n not in inside]
        self._owned[""] = outside
        self._fill_buffers()

    def names(self, path: str) -> list[str]:
        """The parameters of a unit; of "" the decoder's outside of units and embeddings."""
        return self._owned[path]

    def blocks(self) -> list[str]:
        """The units of the longest list: the model's blocks."""
        lists: dict[str, list[str]] = {}
        for path in self.units:
            lists.setdefault(path.rpartition(".")[0], []).append(path)
        return max(lists.values(), key=len)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which a run has a tensor: models keep a few, as routers, in float32."""
        kept = list(getattr(self.model, "_keep_in_fp32_modules_strict", None) or ())
        if self.dtype == torch.float16:
            kept += list(getattr(self.model, "_keep_in_fp32_modules", None) or ())
        keeps = any(re.search(rf"(^|\.){part}(\.|$)", name) for part in kept)
        return torch.float32 if keeps else self.dtypes[name]

    @property
    def head(self) -> str:
        """The path of the module that maps the last stream to logits. Raises ConfigError."""
        found = self.model.get_output_embeddings()
        if type(found) is not nn.Linear or not self.path:
            raise ConfigError(
                f"{self.where}: transformers' {self.model.config.model_type} has no head that "
                "simlab can read by rows: gradients and the loss need it"
            )
        return next(name for name, module in self.model.named_modules() if module is found)

    @property
    def tied(self) -> dict[str, str]:
        """The parameters that have another one's weights, as a tied head."""
        return dict(getattr(self.model, "all_tied_weights_keys", None) or {})

    def logits(self, source: Source, out: Any, start: int, stop: int) -> Tensor:
        """Logits of some columns (B, T, stop − start), by the model's own code after its decoder.

        out: what the decoder gave, or (B, T, D) in place of its last stream.
        """
        head = self.model.get_submodule(self.head)
        before = dict(head._parameters)
        decoder: Any = self.decoder
        decoder.forward = lambda *args, **kwargs: out
        try:
            for name, rows in source.head(start, stop).items():
                head._parameters[name] = nn.Parameter(rows, requires_grad=False)
            ids = torch.zeros(out[0].shape[:2], dtype=torch.long, device=self.device)
            given = self.model(input_ids=ids, use_cache=False)
        finally:
            del decoder.forward
            head._parameters.update(before)
        logits: Tensor = given.logits
        return logits

    def _tables(self) -> dict[str, nn.Embedding]:
        """The embeddings outside of blocks, whose rows are read by id, by their weight's name.

        A table gets one number that stands for all: models ask a table for its device and dtype.
        """
        start = f"{self.path}." if self.path else ""
        tables = {
            f"{start}{name}.weight": module
            for name, module in self.decoder.named_modules()
            if isinstance(module, nn.Embedding)
            and not any(f"{start}{name}.".startswith(f"{path}.") for path in self.units)
        }
        for module in tables.values():
            like = module.weight
            one = torch.zeros((), dtype=like.dtype, device=self.device).expand(like.shape)
            module.weight = nn.Parameter(one, requires_grad=False)
        return tables

    def _fill_buffers(self) -> None:
        """Give buffers, such as RoPE's frequencies, their values: transformers' init computes them."""
        buffers = list(self.decoder.named_buffers())
        if (size := sum(buffer.nbytes for _, buffer in buffers)) > BUFFER_BYTES:
            raise ConfigError(
                f"{self.where}: its buffers take {size / 1e9:.1f} GB; at most "
                f"{BUFFER_BYTES / 1e9:.1f} are plausible"
            )
        for name, buffer in buffers:
            module, last = _parent(self.decoder, name)
            module._buffers[last] = torch.empty_like(buffer, device="cpu")
        for parameter in self.model.parameters():
            parameter._is_hf_initialized = True
        initialize(self.model, self.decoder)
        for name, buffer in list(self.decoder.named_buffers()):
            module, last = _parent(self.decoder, name)
            module._buffers[last] = buffer.to(self.device)

    def place(self, weights: Mapping[str, Tensor]) -> None:
        """Put tensors in the place of parameters and buffers, by the model's names."""
        for name, tensor in weights.items():
            module, last = _parent(self.model, name)
            if last in module._buffers:
                module._buffers[last] = tensor
            else:
                module._parameters[last] = nn.Parameter(tensor, requires_grad=False)

    def empty_again(self, names: list[str]) -> None:
        """Drop the tensors of parameters."""
        for name in names:
            module, last = _parent(self.model, name)
            module._parameters[last] = self.empty[name]

    @contextmanager
    def filled(
        self, source: Source, on_unit: Callable[[str], None] = lambda path: None
    ) -> Iterator[nn.Module]:
        """The decoder, whose forward calls are filled from a source; meta again at the end.

        on_unit: called with a unit's path before it is filled.
        """
        held: list[str] = []

        def before(path: str) -> None:
            on_unit(path)
            if held and held == self._owned[path]:
                return  # as where a backward pass begins
            # Not after its own forward: hooks on the block may still look at its norms' gains.
            self.empty_again(held)
            held.clear()
            source.fill(path)
            held.extend(self._owned[path])

        with ExitStack() as stack:
            stack.callback(self.empty_again, self._owned[""])
            stack.callback(self.empty_again, held)
            source.fill("")
            for path, unit in self.units.items():
                if not self._owned[path]:
                    continue
                hook = unit.register_forward_pre_hook(lambda *_, path=path: before(path))
                stack.callback(hook.remove)
            rows = {id(self.empty[name]): name for name in self.tables}
            stack.enter_context(_Rows(rows, source))
            yield self.decoder


class _Rows(TorchFunctionMode):
    """Within it an embedding's rows come from a source, by id; the table is never whole in memory."""

    def __init__(self, tables: Mapping[int, str], source: Source) -> None:
        super().__init__()
        self.tables, self.source = tables, source

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.embedding:
            ids, weight = [*args, *(kwargs or {}).values()][:2]
            if (name := self.tables.get(id(weight))) is not None:
                if (last := int(ids.max())) >= len(weight):
                    raise ConfigError(
                        f"{name} has {len(weight)} rows, and row {last} is asked for: a smaller "
                        "inputs.length stays within its positions"
                    )
                return self.source.rows(name, ids)
        return func(*args, **(kwargs or {}))


def auto_class(config: Any) -> Any:
    """The class of transformers that builds a config's model with a head for next tokens."""
    import transformers

    images = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if config.get_text_config() is not config and type(config) in images:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def initialize(model: Any, module: nn.Module) -> None:
    """Draw a module's parameters, and fill its buffers, by its family's own ``_init_weights``.

    As ``PreTrainedModel.initialize_weights`` does it, children first; a sub-model has its own rule.
    Parameters with ``_is_hf_initialized`` are left as they are.
    """
    from transformers import PreTrainedModel
    from transformers.initialization import guard_torch_init_functions

    def visit(part: nn.Module, owner: Any) -> None:
        for child in part.children():
            visit(child, child if isinstance(child, PreTrainedModel) else owner)
        owner._init_weights(part)

    with torch.no_grad(), guard_torch_init_functions():
        visit(module, module if isinstance(module, PreTrainedModel) else model)


def _decoder(model: Any, kind: type) -> nn.Module:
    """The part of a causal language model below its head; of a multimodal model its text decoder."""
    found: nn.Module = model.get_decoder()
    if found is model:  # it doesn't know its part
        found = next((child for child in model.children() if isinstance(child, kind)), model)
    elif getattr(found, "lm_head", None) is not None:  # Llama 4's is a causal language model itself
        return _decoder(found, kind)
    return found


def _units(decoder: nn.Module, start: str) -> Iterator[tuple[str, nn.Module]]:
    """The members of the decoder's outermost lists of modules, by path."""
    for name, child in decoder.named_children():
        path = f"{start}.{name}" if start else name
        if isinstance(child, nn.ModuleList):
            yield from ((f"{path}.{i}", unit) for i, unit in enumerate(child))
        else:
            yield from _units(child, path)


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


@contextmanager
def _few_modules(where: str) -> Iterator[None]:
    """Within it a model of too many modules is refused while it is built."""
    count = 0

    def registered(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MODULES:
            raise ConfigError(
                f"{where}: implies more than {MODULES} modules, which isn't plausible"
            )

    hook = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()
