"""How each parameter is drawn: one pure table of standard deviations, and a name's row in it.

σ is the parameter of the rule, L the depth, l the layer counted from 0, d = width. Sources: the
trainers' code (OLMo-core ``nn/transformer/init.py``, OLMo ``olmo/initialization.py``), GPT-2
(Radford et al. 2019, §2.3), Megatron-LM (arXiv 1909.08053), GPT-NeoX
(``megatron/model/init_functions.py``: small_init, and wang_init on residual outputs) and transformers
5.23 (``_init_weights`` of ``PreTrainedModel``, whose normals are whole: the choice's ``truncate`` is
null).

| rule         | embedding | q, k, v | o            | gate   | up      | down              | head  |
|--------------|-----------|---------|--------------|--------|---------|-------------------|-------|
| normal       | σ         | σ       | σ            | σ      | σ       | σ                 | σ     |
| transformers | σ         | σ       | σ            | σ      | σ       | σ                 | σ     |
| mitchell     | 1/√d      | 1/√d    | 1/√(2d(l+1)) | 1/√d   | 1/√d    | 1/√(2·d_ff·(l+1)) | 1/√d  |
| llama        | 1, whole  | σ       | σ/√(2L)      | σ      | σ/√(2L) | σ/√(2L)           | 1/√d  |
| llama_depth  | 1, whole  | σ       | σ/√(2(l+1))  | σ      | as o    | as o              | 1/√d  |
| fan_in       | 1, whole  | 1/√d    | 1/√(heads·C) | 1/√d   | 1/√d    | 1/√d_ff           | 1/√d  |
| gpt2         | σ         | σ       | σ/√(2L)      | σ      | σ       | σ/√(2L)           | σ     |
| megatron     | σ         | σ       | σ/√(2L)      | σ      | σ       | σ/√(2L)           | 1/√d  |
| small_wang   | s         | s       | 2/(L√d)      | s      | s       | 2/(L√d)           | s     |
| ngpt         | 1         | 1/√d    | 1/√d         | 1/√d   | 1/√d    | 1/√d              | 1/d   |
| nanochat     | 0.8       | 1/√d    | 0            | 0.4/√d | 0.4/√d  | 0                 | 0.001 |

s = √(2/(5d)). nGPT's (arXiv 2410.01131; NVIDIA/ngpt) are normals that are normed to unit length along
d: the rows of the embedding, the head, q, k, v, gate and up, the columns of o and down. Their entries
have the std 1/√d. Here they aren't normed: a length varies by 1/√(2d) of it, which moves a layer's
output by the order of 1/d. The stream of rms 1 (``norm=ngpt``) is nGPT's times √d, so the embedding's
std is 1 and the head's 1/d.

nanochat's (karpathy/nanochat, gpt.py, 92d63d4) q, k, v and c_fc, here up, are uniform; here they are
normals of the same std, as they are by every other rule. Its residual outputs are 0. Its MLP has no
gate; here a gate is drawn as up is.

"whole": not truncated, as in OLMo-core. Everything else is cut at ± ``init.truncate`` times its σ.
``init.embedding_std``, where given, stands in place of the embedding's σ. Learned positions are drawn
as the embedding is.

A value embedding (``model.value_embeddings``) is drawn as v is, but without DeepNorm's β: in nanochat
both are uniform of std 1/√d. So it has the size of a weight, and values of an input of rms 1 have d
times its mean square. Here both are normals.

The gate of attention's output (``g_proj``) is drawn as q is: in Qwen3-Next it is half of q's matrix.
An MLP without a gate has the columns up and down. A router of experts is drawn as gate is, but as up
by llama and llama_depth, which then draw the experts' gates so too (OLMo-core's
``init_feed_forward_moe``). Of a low-rank part, left and right are drawn as q is, but right by fan_in
with 1/√rank; so are AltUp's matrices, but that which gives its coefficients by fan_in with 1/√4. The
matrices of ``mhc``'s coefficients have the std ``norm.mix_std`` by every rule, whole.
Biases are 0 and norms' gains 1 (``norm.gain`` where a sublayer's norm has it), as in all of these
trainers; where a gain is 1 + its parameter, that is 0. α and s of an element-wise norm are those of
the config.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from simlab.config import InitConfig, ModelConfig
from simlab.schemes.gemma3n import ALTUP_STREAMS
from simlab.schemes.placement import at

_ATTENTION_MATRICES = ("q_proj", "k_proj", "v_proj", "g_proj", "value_embedding", "o_proj")
INPUTS = ("q_proj", "k_proj", "v_proj", "g_proj", "gate_proj", "up_proj", "router")
PART_ROLES = ("left_proj", "right_proj", "side_proj", "mode_proj", "coef_proj")  # of parts
ROLES = ("embedding", *INPUTS, "value_embedding", "o_proj", "down_proj", *PART_ROLES, "head")
_OTHER_NORMS = ("norm", "q_norm", "k_norm", "v_norm")  # a step's begin with norm_


@dataclass(frozen=True)
class Gaussian:
    """N(0, sigma²) cut at ± ``truncate`` · sigma (None: whole)."""

    sigma: float
    truncate: float | None

    @property
    def std(self) -> float:
        """The standard deviation of what is drawn: σ·√(1 − 2cφ(c)/(2Φ(c) − 1)), 0.986578·σ at c = 3."""
        c = self.truncate
        if c is None:
            return self.sigma
        density = math.exp(-c * c / 2) / math.sqrt(2 * math.pi)
        return self.sigma * math.sqrt(1 - 2 * c * density / math.erf(c / math.sqrt(2)))


@dataclass(frozen=True)
class Constant:
    """Every entry the same: a norm's gain, a bias."""

    value: float


def _normal(model: ModelConfig, sigma: float, layer: int) -> dict[str, float]:
    return dict.fromkeys(ROLES, sigma)


def _mitchell(model: ModelConfig, sigma: float, layer: int) -> dict[str, float]:
    return dict.fromkeys(ROLES, model.width**-0.5) | {
        "o_proj": (2 * model.width * (layer + 1)) ** -0.5,
        "down_proj": (2 * model.d_ff * (layer + 1)) ** -0.5,
    }


def _llama(model: ModelConfig, sigma: float, layer: int) -> dict[str, float]:
    return _llama_scaled(model, sigma, sigma * (2 * model.depth) ** -0.5)


def _llama_depth(model: ModelConfig, sigma: float, layer: int) -> dict[str, float]:
    return _llama_scaled(model, sigma, sigma * (2 * (layer + 1)) ** -0.5)


def _llama_scaled(model: ModelConfig, sigma: float, out: float) -> dict[str, float]:
    scaled = ["o_proj", "up_proj", "down_proj", "router", *["gate_proj"] * bool(model.experts)]
    ends = {"embedding": 1.0, "head": model.width**-0.5}
    return dict.fromkeys(ROLES, sigma) | ends | dict.fromkeys(scaled, out)


def _fan_in(model: ModelConfig, sigma: float, layer: int) -> dict[str, float]:
    return dict.fromkeys(ROLES, model.width**-0.5) | {
        "embedding": 1.0,
        "o_proj": (model.heads * model.head_dim) ** -0.5,
        "down_proj": model.d_ff**-0.5,
        "right_proj": (model.norm.laurel_rank or model.width) ** -0.5,
        "coef_proj": ALTUP_STREAMS**-0.5,
    }


def _gpt2(model: ModelConfig, sigma: float, layer: int) -> dict[str, float]:
    out = sigma * (2 * model.depth) ** -0.5
    return dict.fromkeys(ROLES, sigma) | {"o_proj": out, "down_proj": out}


def _megatron(model: ModelConfig, sigma: float, layer: int) -> dict[str, float]:
    return _gpt2(model, sigma, layer) | {"head": model.width**-0.5}


def _small_wang(model: ModelConfig, sigma: float, layer: int) -> dict[str, float]:
    out = 2 / (model.depth * model.width**0.5)
    small = (2 / (5 * model.width)) ** 0.5
    return dict.fromkeys(ROLES, small) | {"o_proj": out, "down_proj": out}


def _ngpt(model: ModelConfig, sigma: float, layer: int) -> dict[str, float]:
    ends = {"embedding": 1.0, "head": 1 / model.width}
    return dict.fromkeys(ROLES, model.width**-0.5) | ends


def _nanochat(model: ModelConfig, sigma: float, layer: int) -> dict[str, float]:
    std = model.width**-0.5
    return dict.fromkeys(ROLES, std) | {
        "embedding": 0.8,
        "gate_proj": 0.4 * std,
        "up_proj": 0.4 * std,
        "o_proj": 0.0,
        "down_proj": 0.0,
        "head": 0.001,
    }


RULES: dict[str, Callable[[ModelConfig, float, int], dict[str, float]]] = {
    "normal": _normal,
    "transformers": _normal,
    "mitchell": _mitchell,
    "llama": _llama,
    "llama_depth": _llama_depth,
    "fan_in": _fan_in,
    "gpt2": _gpt2,
    "megatron": _megatron,
    "small_wang": _small_wang,
    "ngpt": _ngpt,
    "nanochat": _nanochat,
}
WHOLE_EMBEDDING = ("llama", "llama_depth", "fan_in")


def table(model: ModelConfig, init: InitConfig, layer: int = 0) -> dict[str, Gaussian]:
    """The distribution of every matrix in a layer (0-based), and of embedding and head.

    The placement's own factor (DeepNorm's β) is applied. Pure: the same input, the same table.
    """
    sigmas = RULES[init.rule](model, init.std or 0.0, layer)
    sigmas["value_embedding"] = sigmas["v_proj"]
    if init.embedding_std is not None:
        sigmas["embedding"] = init.embedding_std
    attention, mlp = (at(model, layer, kind) for kind in ("attention", "mlp"))

    def scale(role: str) -> float:
        return (attention if role in _ATTENTION_MATRICES else mlp).init_scale(role, model.depth)

    whole = {"embedding", "mix_proj"} if init.rule in WHOLE_EMBEDDING else {"mix_proj"}
    if model.norm.mix_std is not None:
        sigmas["mix_proj"] = model.norm.mix_std
    return {
        role: Gaussian(sigma * scale(role), None if role in whole else init.truncate)
        for role, sigma in sigmas.items()
    }


def distribution(model: ModelConfig, init: InitConfig, name: str) -> Gaussian | Constant:
    """How the parameter ``name`` (as in ``Transformer.state_dict()``) is drawn.

    Raises KeyError for a parameter that the table has no column for.
    """
    parts = name.split(".")
    role = "embedding" if parts[-2] == "position" else parts[-2]
    if parts[-1] == "bias":
        return Constant(0.0)
    if parts[-1] == "alpha":
        return Constant(model.norm.squash_alpha("final" if parts[0] == "norm" else parts[2]))
    if parts[-1] == "shift":
        return Constant(model.norm.shift or 0.0)
    of_step = role.startswith("norm_")
    if of_step or role in _OTHER_NORMS:
        gain = model.norm.gain if of_step and parts[2] != "renorm" else 1.0
        return Constant(gain - 1 if model.norm.plus_one else gain)
    return table(model, init, int(parts[1]) if parts[0] == "blocks" else 0)[role]
