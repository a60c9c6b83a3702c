"""Layouts: which submodules of a decoder layer make up its residual steps.

A table of Hugging Face transformers' decoder layers, and two records to describe other models.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    kind: str
    raw: str | tuple[str, ...]
    branch: str | tuple[str, ...] | None = None
    sum: str | None = None
    norm: str | None = None

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


# x + N(F(x))
REORDERED = (
    Sublayer(
        "attention",
        raw="self_attn",
        branch="post_attention_layernorm",
        sum="mlp",
        norm="post_attention_layernorm",
    ),
    Sublayer(
        "mlp", raw="mlp", branch="post_feedforward_layernorm", norm="post_feedforward_layernorm"
    ),
)
# x + F(N(x))
PRE = (
    Sublayer("attention", raw="self_attn", sum="post_attention_layernorm", norm="input_layernorm"),
    Sublayer("mlp", raw="mlp", norm="post_attention_layernorm"),
)
# x + N(F(N(x)))
PERI = (
    Sublayer(
        "attention",
        raw="self_attn",
        branch="post_attention_layernorm",
        sum="pre_feedforward_layernorm",
        norm="post_attention_layernorm",
    ),
    REORDERED[1],
)

KNOWN: dict[str, tuple[Sublayer, ...]] = {  # by the class of transformers' decoder layer
    "Olmo2DecoderLayer": REORDERED,
    "Olmo3DecoderLayer": REORDERED,
    "OlmoDecoderLayer": PRE,
    "LlamaDecoderLayer": PRE,
    "MistralDecoderLayer": PRE,
    "Qwen2DecoderLayer": PRE,
    "Qwen3DecoderLayer": PRE,
    "GemmaDecoderLayer": PRE,
    "Gemma2DecoderLayer": PERI,
    "Gemma3DecoderLayer": PERI,
}


# Where torch.compile, activation checkpointing, FSDP and data parallelism keep the module they wrap.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")


def inside(block: nn.Module) -> nn.Module:
    """The decoder layer of a known class that a wrapper holds; a block that isn't one is itself."""
    layer = block
    while known_sublayers(layer) is None:
        inner = next(
            (m for name in _WRAPPED if (m := getattr(layer, name, None)) is not None), None
        )
        if not isinstance(inner, nn.Module):
            return block
        layer = inner
    return layer


def known_sublayers(block: nn.Module) -> tuple[Sublayer, ...] | None:
    """The residual steps of a decoder layer of a known class, or of one derived from it."""
    names = [kind.__name__ for kind in type(block).__mro__]
    return next((KNOWN[name] for name in names if name in KNOWN), None)


def submodule(parent: nn.Module, path: str, where: str) -> nn.Module:
    """The submodule at a dotted path; ``where`` names the parent. Raises ConfigError."""
    try:
        return parent.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in parent.named_modules() if name]
        hint = (
            nearest(path, names) or f"; it has {', '.join(n for n, _ in parent.named_children())}"
        )
        raise ConfigError(f"probe: {where} has no submodule {path}{hint}") from None


def blocks_at(model: nn.Module, path: str) -> list[nn.Module]:
    """The blocks of the ModuleList (or Sequential) at a path. Raises ConfigError."""
    blocks = submodule(model, path, type(model).__name__)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or not len(blocks):
        raise ConfigError(
            f"probe: blocks={path} is a {type(blocks).__name__}: a ModuleList of blocks is needed"
        )
    return list(blocks)


def unknown_layout(model: nn.Module) -> ConfigError:
    """The error for a model whose decoder layers are of no known class."""
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    path = max(lists, key=lambda name: len(lists[name]), default=None)
    of, example = "", "…"
    if path is not None:
        block = lists[path][0]
        inside = ", ".join(name for name, _ in block.named_children())
        of, example = f": {path} holds {type(block).__name__} ({inside})", path
    return ConfigError(
        f"probe: no decoder layers of a known class in {type(model).__name__}{of}; known are"
        f" {', '.join(KNOWN)}; name its residual stream with layout=simlab.Layout({example!r},"
        ' (simlab.Sublayer("attention", raw=…, sum=…), simlab.Sublayer("mlp", raw=…)))'
    )
