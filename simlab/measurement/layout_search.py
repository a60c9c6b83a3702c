"""Finds a block's residual steps by trying: which submodules' outputs add up to what others get.

A block's first forward call is recorded. A step is then some outputs that, added to the residual
stream, give the input of a later submodule, or the block's output; a layout is a chain of steps from
the block's input to its output. The names of submodules only give a step its kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor, nn

from simlab.measurement.layout import Sublayer
from simlab.measurement.statistics import wide

ROUNDINGS = 4  # of the terms' magnitudes: casts, a product, and sums of up to four terms
ADDED_AT_ONCE = 4  # outputs that are added at once, at most
DEEPEST = 3  # dots in the path of a submodule that is tried
# A branch with a fitted multiplier must exceed VISIBLE roundings of the stream in ENTRIES entries or
# more. Each entry shows the branch with an error of 4/64 at most, so no other branch fits all of them.
VISIBLE, ENTRIES = 64, 32
KIND_NAMES = {  # by the path of a submodule, then by its class
    "attention": (re.compile(r"attn|attention", re.IGNORECASE), re.compile("Attention")),
    "mlp": (
        re.compile(
            r"mlp|ffn|feed_?forward|moe|expert|^(ff|fc|linear)\d?\b|^output\b", re.IGNORECASE
        ),
        re.compile("(MLP|MoE)$"),
    ),
}


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a submodule: when it began and ended, what it got and what it gave (B, T, D).

    x and y are None where they aren't like the stream. name: of the submodule's class. light: as
    ``is_light`` says. attends: it gave attention's weights too.
    """

    path: str
    name: str
    began: int
    ended: int
    x: Tensor | None
    y: Tensor | None
    light: bool
    attends: bool

    @property
    def out(self) -> Tensor:
        """y of a call that gave a tensor like the stream."""
        assert self.y is not None
        return self.y

    @property
    def changes(self) -> bool:
        """True for a norm, a scale or an activation that gets and gives a tensor like the stream."""
        return self.light and self.x is not None and self.y is not None and not same(self.x, self.y)


class CallRecord:
    """The calls of a block's submodules during one forward call; x is what the block got (B, T, D)."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.clock = x, 0
        self.calls: list[Call] = []
        self.begun: dict[str, list[tuple[int, Tensor | None]]] = {}

    def begin(self, path: str, x: Tensor | None) -> None:
        """A submodule begins, and gets x."""
        self.clock += 1
        kept = None if x is None else x.detach().clone()  # the model may change it in place
        self.begun.setdefault(path, []).append((self.clock, kept))

    def around(self, path: str, y: Tensor) -> str | None:
        """The light submodule that gets and gives what the one around it does, which gives y."""
        began, x = self.begun[path][-1]
        within = (call for call in self.calls if call.began > began and call.light)
        return next((c.path for c in within if same(c.x, x) and same(c.y, y)), None)

    def end(self, path: str, name: str, y: Tensor | None, light: bool, attends: bool) -> None:
        """The submodule that began last under this path gives y."""
        self.clock += 1
        began, x = self.begun[path][-1]
        kept = None if y is None else y.detach().clone()
        self.calls.append(Call(path, name, began, self.clock, x, kept, light, attends))

    def once(self) -> list[Call]:
        """The calls of the submodules that are called once."""
        return [call for call in self.calls if len(self.begun[call.path]) == 1]


@dataclass(frozen=True)
class FoundStep:
    """A step: ``branches``, times ``multiplier``, are added to the stream.

    total: the submodule that gets the sum, None if the block gives it. normed: the stream after the
    step is what ``total`` gives. raws: what gave the branches before any norm. norm_in: the norm on
    the way in. attends: what gave attention's weights, if it's not a raw. beside: False where the
    raws got different tensors, one of them neither the stream nor a norm's of it: they may be one
    after the other, with a norm that is a function or called twice.
    """

    raws: tuple[Call, ...]
    branches: tuple[Call, ...]
    multiplier: float
    total: Call | None
    normed: bool
    norm_in: Call | None
    attends: Call | None
    beside: bool


def add_up(terms: list[Tensor]) -> Tensor:
    """The sum of the terms."""
    return reduce(torch.add, terms)


def first_output(out: Any) -> Any:
    """A module's output, or the first of several."""
    return out[0] if isinstance(out, (tuple, list)) and out else out


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A module's first argument: by position, as ``hidden_states``, else the first by name."""
    return args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))


def attention_weights(out: Any) -> dict[str, Tensor] | None:
    """Statistics (B, T) of the weights (B, H, T, T), if they are an attention's second output.

    As in ``statistics.attention_statistics``, but ``max_logit`` is NaN: the logits aren't returned.
    """
    if not isinstance(out, (tuple, list)) or len(out) < 2 or not isinstance(out[1], Tensor):
        return None
    length = out[0].shape[1]
    if out[1].ndim != 4 or out[1].shape[2:] != (length, length):
        return None
    a = out[1].detach().float()
    entropy = torch.special.entr(a).sum(-1).mean(1)
    nan = torch.full_like(entropy, torch.nan)
    return {"entropy": entropy, "max_logit": nan, "first": a[..., 0].mean(1)}


def as_stream(x: Any, shape: torch.Size) -> Tensor | None:
    """x as a stream of this shape (B, T, D), from (B·T, D) too; None if it is something else."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    if x.shape == shape:
        return x
    return x.reshape(shape) if x.shape == (shape[0] * shape[1], shape[2]) else None


def is_light(module: nn.Module) -> bool:
    """True for a module without submodules and matrices: a norm, a scale, an activation."""
    return next(module.children(), None) is None and not matrices(module)


def matrices(module: nn.Module) -> int:
    """How many matrices a module and its submodules hold, packed ones included."""
    count = 0
    for each in module.modules():
        held = chain(each._parameters.values(), vars(each).values())  # FSDP 1 makes them attributes
        tensors = [value for value in held if isinstance(value, Tensor) and value.ndim]
        # Packed matrices may be of one dimension.
        count += sum(value.ndim > 1 or not value.is_floating_point() for value in tensors)
    return count


def passes_on(module: nn.Module) -> bool:
    """True for a module that gives what it gets: Identity, and dropout that is off."""
    off = isinstance(module, nn.Dropout) and not (module.training and module.p)
    return off or isinstance(module, nn.Identity)


def imbalance(
    skip: Tensor, branches: list[Tensor], multiplier: float, total: Tensor, rounding: float
) -> tuple[Tensor, Tensor]:
    """|skip + multiplier · branches − total|, and what rounding allows, entry by entry; all wide."""
    terms = [skip, *(b if multiplier == 1 else multiplier * b for b in branches)]
    return (add_up(terms) - total).abs(), ROUNDINGS * rounding * add_up([t.abs() for t in terms])


def fit(change: Tensor, branch: Tensor, size: Tensor) -> Tensor:
    """The multiplier of least squares, entries weighed by their rounding, which goes with their size.

    It is as good as the rounding of the stream allows: of 33 tokens of a Granite of width 48 it was off
    by 1e-8 in float32, 3e-5 in float16 and 2e-4 in bfloat16. A number of the block's own that is near
    is taken instead.
    """
    weight = size.clamp(min=0.01 * size.mean().item()).square().reciprocal()
    return (weight * change * branch).sum() / (weight * branch.square()).sum()


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both hold the same numbers; one token mostly settles it."""
    if a is None or b is None or a.dtype != b.dtype:
        return False
    return torch.equal(a[0, 0], b[0, 0]) and torch.equal(a, b)


def find_steps(
    calls: list[Call], x: Tensor, y: Tensor, constants: list[float]
) -> tuple[Sublayer, ...] | None:
    """A block's residual steps, the most that there are; None if no steps lead from x to y (B, T, D).

    calls: of its submodules, each called once. constants: the block's own numbers, of which a
    residual multiplier is probably one.
    """
    for depth in range(DEEPEST + 1):  # the block's own submodules first, then theirs
        level = [call for call in calls if call.path.count(".") <= depth]
        adds = _Search(level, y, constants).chain(x, -1)
        if adds:
            return tuple(_sublayer(add) for add in adds)
    return None


class _Search:
    """Depth-first: the earliest sum first, and back if no chain leads on to the block's output."""

    def __init__(self, calls: list[Call], y: Tensor, constants: list[float]) -> None:
        self.calls, self.y, self.constants = (
            sorted(calls, key=lambda call: call.began),
            y,
            constants,
        )
        self.end = max((call.ended for call in calls), default=0) + 1

    def chain(self, stream: Tensor, since: int) -> list[FoundStep] | None:
        """The steps from the stream at a time to the block's output; None if there are none."""
        sums = [(c.began, c.x, c) for c in self.calls if c.began > since and c.x is not None]
        for at, total, call in [*sums, (self.end, self.y, None)]:
            for add in self._adds(stream, since, at, total, call):
                if call is None:
                    return [add]
                for normed in (False, True):
                    if normed and not call.changes:
                        continue
                    rest = self.chain(call.out, call.ended) if normed else self.chain(total, at)
                    if rest is not None:
                        return [replace(add, normed=normed), *rest]
        return [] if since >= 0 and same(stream, self.y) else None

    def _adds(
        self, stream: Tensor, since: int, at: int, total: Tensor, call: Call | None
    ) -> Iterator[FoundStep]:
        """The ways in which outputs since a time add up to a total."""
        before = [c for c in self.calls if c.began >= since and c.ended < at]
        free = [c for c in before if c.y is not None and not self._used(c, before, call)]
        if not free:
            return
        norm_in = next((c for c in before if c.changes and same(c.x, stream)), None)
        for branches, multiplier in self._sums(free, stream, total):
            raws = tuple(_raw(branch, before) for branch in branches)
            if not any(raw.light for raw in raws):  # else what the sublayer gave isn't known
                attends = _attends(raws, before)
                got = [raw.x for raw in raws if raw.x is not None]
                known = [stream, *(c.out for c in before if c.changes and same(c.x, stream))]
                beside = all(same(x, got[0]) for x in got) or all(
                    any(same(x, each) for each in known) for x in got
                )
                yield FoundStep(raws, branches, multiplier, call, False, norm_in, attends, beside)

    def _used(self, call: Call, before: list[Call], total: Call | None) -> bool:
        """True for an output that a later submodule got, or that is its parent's output too."""
        later = [*before, total] if total else before
        got = any(c.began > call.ended and same(c.x, call.y) for c in later)
        parents = (c for c in before if c.began < call.began and c.ended > call.ended)
        return got or any(same(c.y, call.y) for c in parents)

    def _sums(
        self, free: list[Call], stream: Tensor, total: Tensor
    ) -> Iterator[tuple[tuple[Call, ...], float]]:
        """Which of the outputs add up to total − stream, and by which multiplier: all, then fewer.

        All first: where one of them is 0, as with a matrix that starts at 0, fewer add up too.
        """
        groups = [tuple(free)] if len(free) <= ADDED_AT_ONCE else []
        groups += [g for n in (2, 1) if n < len(free) for g in combinations(free, n)]
        moved = not torch.equal(stream, total)
        skip, whole = wide(stream), wide(total)
        rounding = torch.finfo(total.dtype).eps
        for group in groups:
            if (moved or not any(c.out.any() for c in group)) and self._fits(
                skip, [c.out for c in group], 1.0, whole, rounding
            ):
                yield group, 1.0
        for group in groups if moved else []:
            outputs = [c.out for c in group]
            coarse = max(rounding, *(torch.finfo(y.dtype).eps for y in outputs))
            branch = add_up([wide(y) for y in outputs])
            fitted = fit(whole - skip, branch, skip.abs() + whole.abs())
            visible = (fitted * branch).abs() > VISIBLE * coarse * skip.abs()
            if not fitted.isfinite() or visible.sum() < ENTRIES:
                continue
            named = [c for c in self.constants if abs(c - fitted.item()) < 0.01 * abs(c)]
            for multiplier in [*named, fitted.item()]:
                if self._fits(skip, outputs, multiplier, whole, coarse):
                    yield group, multiplier
                    break

    @staticmethod
    def _fits(
        skip: Tensor, outputs: list[Tensor], multiplier: float, total: Tensor, rounding: float
    ) -> bool:
        """Whether the sum is right, on the first token and then on all."""
        for part in (slice(0, 1), slice(None)):
            branches = [wide(y[part, part]) for y in outputs]
            off, allowed = imbalance(
                skip[part, part], branches, multiplier, total[part, part], rounding
            )
            if not (off <= allowed).all():
                return False
        return True


def _raw(branch: Call, before: list[Call]) -> Call:
    """The call whose output a branch is, before norms and scales; one of these if it isn't known."""
    while branch.light:
        made = [c for c in before if c.ended < branch.began and same(c.y, branch.x)]
        if not made:
            break
        branch = made[-1]
    return branch


def _attends(raws: tuple[Call, ...], before: list[Call]) -> Call | None:
    """The call around or beside the raws, none of which gave attention's weights, that did."""
    if any(raw.attends for raw in raws):
        return None
    within = {raw.path.split(".")[0] for raw in raws}
    return next((c for c in before if c.attends and c.path.split(".")[0] in within), None)


def _sublayer(add: FoundStep) -> Sublayer:
    """A step's submodules by name."""
    branches = tuple(branch.path for branch in add.branches)
    raws = tuple(raw.path for raw in add.raws)
    total = add.total.path if add.total else None
    if add.normed:
        norm = total
    elif branches != raws:  # of several branches' norms none acts on them all
        norm = branches[0] if len(branches) == 1 else None
    else:
        norm = add.norm_in.path if add.norm_in else None
    return Sublayer(
        kind=_kind(add.raws, add.beside),
        raw=raws[0] if len(raws) == 1 else raws,
        branch=None if branches == raws else branches[0] if len(branches) == 1 else branches,
        sum=total,
        norm=norm,
        multiplier=add.multiplier,
        weights=add.attends.path if add.attends else None,
    )


def _kind(raws: tuple[Call, ...], beside: bool) -> str:
    """``attention``, ``mlp``, else the submodule's name; ``parallel`` for several kinds.

    ``attention+mlp`` where they may be one after the other.
    """
    kinds = [
        next(
            (
                kind
                for i, of in enumerate((raw.path, raw.name))
                for kind, patterns in KIND_NAMES.items()
                if patterns[i].search(of)
            ),
            raw.path.split(".")[0],
        )
        for raw in raws
    ]
    kinds = list(dict.fromkeys(kinds))
    return kinds[0] if len(kinds) == 1 else "parallel" if beside else "+".join(kinds)
