"""Norm placements: each residual scheme's formula, its norms and its constants, written once.

To add a placement, write a class here and its entry in ``PLACEMENTS``; CONTRIBUTING.md has the rest.
"""

from __future__ import annotations

import math
from typing import Any

from simlab.config import ModelConfig
from simlab.schemes.attn_res import AttnRes
from simlab.schemes.custom import Custom
from simlab.schemes.gemma3n import AltUp, Gemma3n
from simlab.schemes.ngpt import NGPT
from simlab.schemes.plain import NoNorm, Peri, Post, Pre, Reordered
from simlab.schemes.pre_and_post import ResiDual, SiameseNorm
from simlab.schemes.scheme import Add, Map, Scheme, V, vectors
from simlab.schemes.streams import GatedHead, HyperConnections, ManifoldHyperConnections


class SwinRenorm(Reordered):
    """``reordered``, and x ← N(x) after every ``norm.every`` blocks (Swin V2, arXiv 2111.09883)."""

    @staticmethod
    def renorm_after(config: ModelConfig, layer: int) -> bool:
        """After blocks every, 2·every, … (counted from 1)."""
        every = config.norm.every or 6
        return (layer + 1) % every == 0


class LNS(Pre):
    """x + F(N(x)/√l), l the block counted from 1: LayerNorm Scaling (arXiv 2502.05795)."""

    def step(self, x: V, F: Map[V], add: Add[V], norm_in: Map[V]) -> V:
        return add(x, F(norm_in(x) / math.sqrt(self.layer + 1)))


DEEPNORM_SCALED = ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class DeepNorm(Scheme):
    """N(αx + F(x)), α = (2L)^¼, and β = (8L)^−¼ on the init (arXiv 2203.00555, decoder-only)."""

    norms, normalises = ("norm_out",), "stream"

    def step(self, x: V, F: Map[V], add: Add[V], norm_out: Map[V]) -> V:
        return norm_out(add(self.alpha * x, F(x)))

    @staticmethod
    def alpha_of(config: ModelConfig) -> float:
        """α."""
        return (2 * config.depth) ** 0.25

    @staticmethod
    def init_scale(role: str, depth: int) -> float:
        """β on the value and output projections and on the MLP's matrices, 1 on q and k."""
        return (8 * depth) ** -0.25 if role in DEEPNORM_SCALED else 1.0


class ResidualScale(Pre):
    """λx + βF(N(x)), λ² = 1 − 2/sublayers, λ² + β² = 1: DeepScaleLM (arXiv 2403.09635)."""

    def step(self, x: V, F: Map[V], add: Add[V], norm_in: Map[V]) -> V:
        branch = F(norm_in(x))
        return add(math.sqrt(1 - self.alpha) * x, math.sqrt(self.alpha) * branch)

    @staticmethod
    def alpha_of(config: ModelConfig) -> float:
        """β²: 2/sublayers, and a block has two."""
        return 1 / config.depth


class LayerScale(Pre):
    """x + αF(N(x)), α small and smaller for deep models (arXiv 2103.17239, §2)."""

    def step(self, x: V, F: Map[V], add: Add[V], norm_in: Map[V]) -> V:
        return add(x, self.alpha * F(norm_in(x)))

    @staticmethod
    def alpha_of(config: ModelConfig) -> float:
        """α: as given, else by depth."""
        if config.norm.alpha is not None:
            return config.norm.alpha
        return 0.1 if config.depth <= 18 else 1e-5 if config.depth <= 24 else 1e-6


class ReZero(LayerScale):
    """x + αF(N(x)), α = 0 at init: the identity (arXiv 2003.04887)."""

    @staticmethod
    def alpha_of(config: ModelConfig) -> float:
        """α: as given, else 0."""
        return config.norm.alpha or 0.0


class CompleteP(LayerScale):
    """x + αF(N(x)), α = L_base/L, L_base ``norm.base_depth``: CompleteP (arXiv 2505.01618, Table 1).

    Its init's stds don't depend on the depth (as in EleutherAI/nanoGPT-mup, branch completep), so that
    a rule that divides by √(2L), such as ``llama`` or ``gpt2``, isn't CompleteP's.
    """

    @staticmethod
    def alpha_of(config: ModelConfig) -> float:
        """α."""
        return (config.norm.base_depth or 2) / config.depth


class SandwichedPost(Scheme):
    """N(αx + F(N(x)))."""

    norms, normalises = ("norm_in", "norm_out"), "stream"

    def step(self, x: V, F: Map[V], add: Add[V], norm_in: Map[V], norm_out: Map[V]) -> V:
        return norm_out(add(self.alpha * x, F(norm_in(x))))


class Keel(SandwichedPost):
    """N(αx + F(N(x))), α the number of sublayers: Keel (arXiv 2601.19895v2, eq. 8 and §3.1).

    The first block differs: attention x + F(N(x)), then the MLP N(x + F(N(x))). "We remove the Post-LN
    for the very first attention layer as well as the scaling factor α for both the very first attention
    and FFN layers" (v2; by v1's text both are pre-norm, but its Fig. 2 already has that norm).
    """

    @classmethod
    def select(cls, config: ModelConfig, layer: int, kind: str) -> type[Scheme]:
        """The first block's own, else this one."""
        return cls if layer else Pre if kind == "attention" else SandwichedPost

    @staticmethod
    def alpha_of(config: ModelConfig) -> float:
        """α."""
        return 2.0 * config.depth


class DeepLoop(SandwichedPost):
    """N(αx + F(N(x))), α = (2N)^½, and β = (8N)^−½ on the init: DeepLoop (arXiv 2607.13491).

    N = ``depth`` counts visits of blocks: block l has the weights of block l mod N/``norm.loops``. β is
    on the matrices that DeepNorm scales, at init alone. (By three readers' notes on the whole paper;
    its own text couldn't be read. Two of them, on its sandwich block, say that F's input is normed.)
    """

    @staticmethod
    def alpha_of(config: ModelConfig) -> float:
        """α."""
        return (2 * config.depth) ** 0.5

    @staticmethod
    def init_scale(role: str, depth: int) -> float:
        """β on DeepNorm's matrices, 1 on q and k."""
        return (8 * depth) ** -0.5 if role in DEEPNORM_SCALED else 1.0


class MixLN(Scheme):
    """Post-norm in the first blocks, pre-norm in the rest: Mix-LN (arXiv 2412.13795).

    Of L blocks, ⌊norm.fraction · L⌋ are post-norm: 8 of 32 and 1 of 7 by a quarter.
    """

    @classmethod
    def select(cls, config: ModelConfig, layer: int, kind: str) -> type[Scheme]:
        """Post or pre, by layer."""
        fraction = 0.25 if config.norm.fraction is None else config.norm.fraction
        count = math.floor(fraction * config.depth + 1e-9)  # 0.29 · 100 is 28.999… in float64
        return Post if layer < count else Pre


class PrePost(Scheme):
    """Attention x + F(N(x)), then the MLP N(x + F(x)): pre-norm and post-norm in every block."""

    @classmethod
    def select(cls, config: ModelConfig, layer: int, kind: str) -> type[Scheme]:
        """Pre or post, by sublayer."""
        return Pre if kind == "attention" else Post


class NormedSkip(Scheme):
    """n + F(n), n = N(x)."""

    norms, normalises = ("norm_in",), "skip"

    def step(self, x: V, F: Map[V], add: Add[V], norm_in: Map[V]) -> V:
        normed = norm_in(x)
        return add(normed, F(normed))


class HybridNorm(Scheme):
    """y = x + F(x), F attention with q, k and v normed; n = N(y), x' = n + G(n), G the MLP.

    HybridNorm (arXiv 2503.04598; BryceZhuo/HybridNorm, MoE_model/olmo/model.py).
    """

    @classmethod
    def select(cls, config: ModelConfig, layer: int, kind: str) -> type[Scheme]:
        """By sublayer."""
        return NoNorm if kind == "attention" else NormedSkip


class HybridNormStar(HybridNorm):
    """HybridNorm with a first block x + F(N(x)): HybridNorm* (its README's norm_pos_special_config)."""

    @classmethod
    def select(cls, config: ModelConfig, layer: int, kind: str) -> type[Scheme]:
        """Pre in the first block."""
        return super().select(config, layer, kind) if layer else Pre


class Starting(Scheme):
    """(x + F(N(x)), x)."""

    norms = ("norm_in",)

    def step(self, x: V, F: Map[V], add: Add[V], norm_in: Map[V]) -> tuple[V, V]:
        return add(x, F(norm_in(x))), x


class FromStart(Scheme):
    """x + F(N(x₀)) of (x, x₀), x₀ the stream before the block."""

    norms = ("norm_in",)

    def step(self, state: tuple[V, V], F: Map[V], add: Add[V], norm_in: Map[V]) -> V:
        x, start = state
        return add(x, F(norm_in(start)))


class Parallel(Scheme):
    """x + F(N(x)) + G(N(x)), F attention and G the MLP: GPT-NeoX (arXiv 2204.06745, §2.1), Pythia."""

    @classmethod
    def select(cls, config: ModelConfig, layer: int, kind: str) -> type[Scheme]:
        """Attention is pre-norm, and the MLP reads what attention does."""
        return Starting if kind == "attention" else FromStart


class Scaled(Scheme):
    """λx + μx₀ + βF(N(x)), x₀ the embedding.

    With ``norm.scale_once`` x ← λx + μx₀ before each block, then x + βF(N(x)); with
    ``norm.skip_normed`` λn + μx₀ + βF(n), n = N(x). λ, μ and β are numbers, or linear over the blocks.
    With ``norm.subtract_middle`` the final norm gets x − γ·x_mid, x_mid the stream after the middle
    block, which is the one before block ⌊L/2⌋ + 1 (from 0).
    The files nanochat, modded_nanogpt, minimax, granite, prores and laurel_rw of conf/norm have those
    of their sources.
    """

    norms = ("norm_in",)

    @classmethod
    def select(cls, config: ModelConfig, layer: int, kind: str) -> type[Scheme]:
        """By ``norm.skip_normed``."""
        return ScaledNormed if config.norm.skip_normed else cls

    @staticmethod
    def start(x: Any, norm: Map[Any], config: ModelConfig) -> Any:
        """(x, x₀, x_mid), without the vectors that nothing adds or subtracts. All are the embedding."""
        x = norm(x) if config.norm.start_normed else x
        more = any(config.norm.start_scale or ()) + bool(config.norm.subtract_middle)
        return (x,) * (1 + more) if more else x

    def step(self, state: Any, F: Map[Any], add: Add[Any], norm_in: Map[Any]) -> Any:
        x, *others = vectors(state)
        stream, of_start, branch, before, of_normed, behind_middle = self.scales
        if behind_middle:
            others[-1] = x

        def mixed(y: Any) -> Any:
            return stream * y + of_start * others[0] if of_start else stream * y

        x = mixed(x) if before else x
        normed = norm_in(x)
        skip = x if before else mixed(normed if of_normed else x)
        out = add(skip, branch * F(normed))
        return (out, *others) if others else out

    @staticmethod
    def finish(state: Any, norm: Map[Any], config: ModelConfig) -> Any:
        """x − γ·x_mid. Of two blocks or one, the middle one is the last."""
        x, *others = vectors(state)
        if not config.norm.subtract_middle:
            return x
        return x + -config.norm.subtract_middle * (others[-1] if config.depth > 2 else x)

    @staticmethod
    def scales_of(config: ModelConfig, layer: int, kind: str) -> tuple[float, ...]:
        """λ, μ, β; 1.0 where λ and μ act before the block; where the skip is normed; after x_mid."""
        norm, at_mlp = config.norm, kind == "mlp"
        share = layer / max(config.depth - 1, 1)

        def linear(ends: tuple[float, float] | None) -> float:
            first, last = ends or (1.0, 1.0)
            return first + (last - first) * share

        branch = linear(norm.mlp_branch_scale if at_mlp else norm.branch_scale)
        if norm.ramp is not None:  # the block's T_l is its share of the last one's T
            branch *= min(norm.ramp * config.depth / (layer + 1), 1.0)
        stream, start = linear(norm.stream_scale), linear(norm.start_scale)
        if norm.scale_once and at_mlp:
            stream, start = 1.0, 0.0
        behind_middle = norm.subtract_middle and not at_mlp and layer == config.depth // 2 + 1
        marks = norm.scale_once, norm.skip_normed, behind_middle
        return stream, start, branch, *(float(bool(mark)) for mark in marks)


class ScaledNormed(Scaled):
    """``Scaled`` with ``norm.skip_normed``."""

    normalises = "skip"


PLACEMENTS: dict[str, type[Scheme]] = {
    "reordered": Reordered,
    "swin_renorm": SwinRenorm,
    "pre": Pre,
    "post": Post,
    "peri": Peri,
    "lns": LNS,
    "deepnorm": DeepNorm,
    "none": NoNorm,
    "residual_scale": ResidualScale,
    "rezero": ReZero,
    "layerscale": LayerScale,
    "complete_p": CompleteP,
    "keel": Keel,
    "deep_loop": DeepLoop,
    "mix_ln": MixLN,
    "pre_post": PrePost,
    "hybrid_norm": HybridNorm,
    "hybrid_norm_star": HybridNormStar,
    "scaled": Scaled,
    "gemma3n": Gemma3n,
    "gemma3n_altup": AltUp,
    "ngpt": NGPT,
    "residual_dual": ResiDual,
    "siamese_norm": SiameseNorm,
    "attn_res": AttnRes,
    "parallel": Parallel,
    "hyper_connections": HyperConnections,
    "custom": Custom,
    "mhc": ManifoldHyperConnections,
    "deepseek_v4": GatedHead,
}


def at(config: ModelConfig, layer: int, kind: str) -> Scheme:
    """The scheme of one sublayer: of block ``layer`` (from 0), its ``attention`` or ``mlp``."""
    scheme = PLACEMENTS[config.norm.placement].select(config, layer, kind)
    return scheme(layer, scheme.alpha_of(config), scheme.scales_of(config, layer, kind))


def placement_of(config: ModelConfig) -> type[Scheme]:
    """The placement's class, which has ``start``, ``watch`` and ``finish``."""
    return PLACEMENTS[config.norm.placement]


def renorm_after(config: ModelConfig, layer: int) -> bool:
    """True if the residual stream itself is normed after block ``layer`` (from 0)."""
    return PLACEMENTS[config.norm.placement].renorm_after(config, layer)
