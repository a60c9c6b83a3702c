"""Layouts: which submodules of a decoder layer make up its residual steps.

A table of Hugging Face transformers' decoder layers, and two records to describe other models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from simlab.config import ConfigError, nearest


@dataclass(frozen=True)
class Sublayer:
    """One residual step of a block, stream + branch, by the names of the block's submodules.

    Args:
        kind: The row's name, such as ``attention`` or ``mlp``.
        raw: The submodule whose output is the sublayer's output before any norm. Outputs of several
            are added up (parallel attention and MLP).
        branch: The submodule whose output is added to the stream; by default ``raw``.
        sum: The submodule whose input is the stream after the add; by default the stream is the
            block's own output.
        norm: The norm that acts last, for ``eps_factor`` and the gains. It is the same as ``branch``
            if the branch is normed, and as ``sum`` if the stream is (post-norm); the stream is then
            that norm's output.
        multiplier: A number by which the branch is multiplied before it is added (Granite).
        weights: The submodule that returns attention's weights (batch, heads, length, length) as its
            second output; by default ``raw``.
    """

    kind: str
    raw: str | tuple[str, ...]
    branch: str | tuple[str, ...] | None = None
    sum: str | None = None
    norm: str | None = None
    multiplier: float = 1.0
    weights: str | None = None

    @property
    def raws(self) -> tuple[str, ...]:
        """``raw`` as a tuple."""
        return (self.raw,) if isinstance(self.raw, str) else self.raw

    @property
    def branches(self) -> tuple[str, ...]:
        """``branch`` as a tuple; ``raw``'s where it isn't named."""
        if self.branch is None:
            return self.raws
        return (self.branch,) if isinstance(self.branch, str) else self.branch

    @property
    def added(self) -> str:
        """What is added to the stream, in words: ``0.22 · (attn + mlp)``."""
        branch = " + ".join(self.branches)
        if self.multiplier == 1:
            return branch
        return f"{self.multiplier:.6g} · {f'({branch})' if len(self.branches) > 1 else branch}"

    def __str__(self) -> str:
        """The step in words: ``attention: x + post_norm(self_attn)``."""
        norm, raw = self.norm, " + ".join(self.raws)
        if self.normalises == "stream":
            return f"{self.kind}: {norm}(x + {self.added})"
        if self.branches != self.raws:
            return f"{self.kind}: x + {self.added}({raw})"
        return f"{self.kind}: x + {self.added}" + (f" (norm {norm})" if norm else "")

    @property
    def normalises(self) -> str | None:
        """What ``norm`` acts on: ``branch``, ``stream``, or None where it's on the way in."""
        if self.norm is None:
            return None
        return {self.branch: "branch", self.sum: "stream"}.get(self.norm)


@dataclass(frozen=True)
class Layout:
    """A model's blocks, by the dotted path of their ModuleList, and the residual steps of each.

    Raises ConfigError for a step without ``sum`` that isn't the last.
    """

    blocks: str
    sublayers: tuple[Sublayer, ...]

    def __post_init__(self) -> None:
        if not self.sublayers:
            raise ConfigError("Layout: sublayers=(): at least one is needed")
        for sublayer in self.sublayers[:-1]:
            if sublayer.sum is None:
                raise ConfigError(
                    f"Layout: sublayer {sublayer.kind} needs sum=NAME, the submodule whose input is"
                    " the stream after it; only the last one's can be the block's output"
                )


# Where torch.compile, activation checkpointing, FSDP and data parallelism keep the module they wrap.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")


def inside(block: nn.Module) -> nn.Module:
    """The block that wrappers hold; a block that no wrapper holds is itself."""
    while len(names := list(block._modules)) == 1 and names[0] in _WRAPPED:
        block = block.get_submodule(names[0])
    return block


def without_wrappers(name: str) -> str:
    """A parameter's name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def submodules(parent: nn.Module) -> dict[str, nn.Module]:
    """The submodules by dotted path, each once: what wrappers hold, by the path without them."""
    paths, found = {"": ""}, {"": parent}
    by_path = dict(parent.named_modules())
    for path, module in list(by_path.items())[1:]:
        above, _, name = path.rpartition(".")
        wraps = name in _WRAPPED and len(by_path[above]._modules) == 1
        paths[path] = paths[above] if wraps else f"{paths[above]}.{name}".lstrip(".")
        found[paths[path]] = module
    return found


def submodule(parent: nn.Module, path: str, where: str) -> nn.Module:
    """The submodule at a dotted path; ``where`` names the parent. Raises ConfigError."""
    try:
        return inside(parent.get_submodule(path))
    except AttributeError:
        within = submodules(parent)
    if path in within:
        return within[path]
    hint = (
        nearest(path, list(within))
        or f"; it has {', '.join(n for n, _ in parent.named_children())}"
    )
    raise ConfigError(f"probe: {where} has no submodule {path}{hint}")


def blocks_at(model: nn.Module, path: str) -> list[nn.Module]:
    """The blocks of the ModuleList (or Sequential) at a path. Raises ConfigError."""
    blocks = submodule(model, path, type(model).__name__)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or not len(blocks):
        raise ConfigError(
            f"probe: blocks={path} is a {type(blocks).__name__}: a ModuleList of blocks is needed"
        )
    return list(blocks)


def stacks(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The lists of blocks that may be a decoder's, by path: outermost, and made of submodules.

    Of a model of several parts, as transformers' multimodal ones, its text decoder's.
    """
    lists: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in lists):
            continue
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module):
            blocks = [inside(block) for block in module]
            if all(block._modules and type(block) is not nn.ModuleList for block in blocks):
                lists[path] = blocks
    text: Any = getattr(model, "get_decoder", lambda: None)() if len(lists) > 1 else None
    inner = set(text.modules()) if isinstance(text, nn.Module) else set()
    of_decoder = {path: blocks for path, blocks in lists.items() if inner.issuperset(blocks)}
    return of_decoder or lists


def no_blocks(model: nn.Module) -> ConfigError:
    """The error for a model in which no list of blocks is found."""
    names = ", ".join(name for name, _ in model.named_children()) or "no submodules"
    return ConfigError(
        f"probe: {type(model).__name__} ({names}) has no ModuleList of blocks, which have submodules;"
        ' name its residual stream with layout=simlab.Layout("…",'
        ' (simlab.Sublayer("attention", raw=…, sum=…), simlab.Sublayer("mlp", raw=…)))'
    )
