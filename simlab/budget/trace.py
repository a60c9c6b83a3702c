"""The memory and the operations that a block's activations take, read off a run of the block.

The block runs on a few tokens, its matrices give zeros, and a dispatch mode sees every operation. The
results are per token; ``memory`` adds the products' workspace and the statistics. A new shape takes a
few milliseconds.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from simlab.config import ModelConfig
from simlab.model.attention import Attend
from simlab.model.describe import PaperLinear, first_block, paper_block
from simlab.model.placement import (
    ENDS,
    Carried,
    ResidualStep,
    end_parts,
    finished,
    start,
    tensors_of,
)
from simlab.model.transformer import Block

TOKENS = 8  # so that a token's share of a norm's float32 gain, which no token adds to, is small


class Counter(TorchDispatchMode):
    """Counts, in its ``with`` block, the bytes of the new tensors that still live, and operations.

    now: the bytes at present. peak: their largest number. written: the entries of all new tensors; a
    view is no new tensor, and writes in place aren't counted. operations: of matrix products, with
    multiply-adds counted as two, by torch's own formulas (those of FlopCounterMode).
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.written = self.operations = 0
        self.sizes: dict[int, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing here is compiled, and skipping it would import the compiler, for 0.8 s."""
        return False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function.overloadpacket)
        if formula is not None:
            self.operations += formula(*args, **(kwargs or {}), out_val=out)
        old = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and id(tensor.untyped_storage()) not in old:
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        self.written += tensor.numel()
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@dataclass(frozen=True)
class Trace:
    """The memory and the operations of one token in a block. Bytes don't count the block's input.

    forward: peak bytes. matrices: bytes when a matrix gets its input, by its layer's name; of experts
    those that tokens reached, and all tokens reach the same ones. attention: bytes when attention
    returns. step: bytes at the end of a residual step, with what it was given and what a probe holds.
    backward: peak bytes with gradients, those that autograd keeps included; 0 in a run without
    gradients. written: entries that the forward writes, without the matrices' products. pair:
    operations of attention's products for one query and one key, forward. state: tensors of the size of
    the stream in a state; first: in the state before the first block; fresh: those that a block makes,
    not hands on. start: peak bytes of the placement's start. finish: of its finish and the gradient
    through it; 0 in a run without gradients. parts: whether a step has parts.
    """

    forward: float
    matrices: Mapping[str, float]
    attention: float
    step: float
    backward: float
    written: float
    pair: float
    state: int
    first: int
    fresh: int
    start: float
    finish: float
    parts: bool


def trace(model: ModelConfig, dtype: str, gradients: bool) -> Trace:
    """The trace of a block, the same in every layer."""
    return _trace(first_block(model), getattr(torch, dtype), gradients)


@functools.lru_cache(1024)
def _trace(model: ModelConfig, dtype: torch.dtype, gradients: bool) -> Trace:
    block, one = paper_block(model, dtype)
    tokens = torch.zeros(TOKENS, 1, dtype=torch.int64)
    with torch.device(one.device):
        parts = {end: end_parts(end, model, PaperLinear).to(dtype) for end in ENDS}
    embedded = one.repeat(TOKENS, 1, 1)  # sequences of one token: none beyond a window
    with Counter() as starting:
        x = start(embedded, model, parts["start"])
    backward = _backward(block, x) if gradients else 0
    after = x
    moments: dict[str, list[int]] = {"attention": [], "step": []}
    matrices: dict[str, float] = {}
    linears = {n: m for n, m in block.named_modules() if isinstance(m, PaperLinear)}
    held: list[Any] = []  # as the probe holds a step's tensors until its end
    with torch.no_grad(), Counter() as count:

        def note(kind: str) -> Callable[..., None]:
            return lambda *args: moments[kind].append(count.now)

        def reached(name: str) -> None:
            matrices[name] = count.now / TOKENS

        def hold(module: nn.Module, args: Any, out: Carried) -> None:
            held.append((args, out))

        for name, linear in linears.items():
            linear.register_forward_pre_hook(lambda *_, name=name: reached(name))
        for module in block.modules():
            if isinstance(module, Attend):
                module.register_forward_hook(note("attention"))
            elif isinstance(module, ResidualStep):
                module.sublayer.register_forward_hook(hold)
                module.add.register_forward_hook(hold)
        for _, step in block.steps():
            step.register_forward_hook(note("step"))  # where the probe computes its statistics
        for _, step in block.steps():
            after = step(after, tokens)
            held.clear()
    products = sum(len(linears[name].weight) for name in matrices)
    return Trace(
        forward=count.peak / TOKENS,
        matrices=matrices,
        attention=max(moments["attention"], default=0) / TOKENS,
        step=max(moments["step"]) / TOKENS,
        backward=backward / TOKENS,
        written=count.written / TOKENS - products,
        pair=_operations(block, start(one.repeat(1, TOKENS, 1), model, parts["start"])) / TOKENS**2,
        state=max(len(storages(state)) for state in (x, after)),  # it may start as copies
        first=len(storages(x)),
        fresh=len(storages(after) - storages(x)),
        start=starting.peak / TOKENS,
        finish=_finish(model, parts["finish"], after) / TOKENS if gradients else 0.0,
        parts=any(
            isinstance(step, ResidualStep) and step.scheme.parts for _, step in block.steps()
        ),
    )


@torch.no_grad()
def _operations(block: Block, x: Carried) -> int:
    """Operations of attention on one sequence: its products as plain ones, which torch can count."""
    with sdpa_kernel(SDPBackend.MATH), Counter() as count:
        block(x, torch.zeros(tensors_of(x)[0].shape[:2], dtype=torch.int64))
    return count.operations


@torch.enable_grad()
def _backward(block: Block, x: Carried) -> int:
    """The most bytes at a time while the gradient goes through a block, as the engine takes it."""
    leaves = tuple(each.clone().requires_grad_() for each in tensors_of(x))
    passed: list[Carried] = [leaves if isinstance(x, tuple) else leaves[0]]
    gradient = tuple(torch.zeros_like(each) for each in leaves)
    ids = torch.zeros(leaves[0].shape[:2], dtype=torch.int64)
    with Counter() as count:
        for _, step in block.steps():
            passed.append(step(passed[-1], ids))
        *before, out = passed
        wanted = [each for state in before for each in tensors_of(state)]
        torch.autograd.grad(tensors_of(out), wanted, gradient, allow_unused=True)
    return count.peak


@torch.enable_grad()
def _finish(model: ModelConfig, parts: nn.ModuleDict, state: Carried) -> int:
    """The most bytes at a time while the gradient goes through ``finish``, as the engine takes it."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in tensors_of(state))
    with Counter() as count:
        out = finished(leaves if isinstance(state, tuple) else leaves[0], model, parts)
        torch.autograd.grad(out, leaves, torch.zeros_like(out), allow_unused=True)
    return count.peak


def storages(state: Carried) -> set[int]:
    """The places of a state's tensors in memory."""
    return {each.untyped_storage().data_ptr() for each in tensors_of(state)}
