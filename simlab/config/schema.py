"""The config of a run as frozen dataclasses; ``config.validate.read`` makes it from Hydra's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from simlab.config.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
_PACKAGED = _PACKAGE / "conf"
CONF_DIR = _PACKAGED if _PACKAGED.is_dir() else _PACKAGE.parent / "conf"

DEMO_DIR = _PACKAGE / "demo"
DEMO_STEPS = ("0", "100", "1000", "final")

DTYPES = ("float32", "bfloat16", "float16")
ENGINES = ("auto", "dense", "weightless", "theory")
ELEMENTWISE = ("dyt", "derf")  # norm types that squash each entry, and fix no mean square
# The keys of simlab.model.norms.NORMS.
NORM_TYPES = ("rms", "rms_plus_one", "layer", "layer_bias", *ELEMENTWISE)
QK_NORMS = ("none", "full", "per_head")
ATTENTION_GATES = ("none", "elementwise", "per_head")
VALUE_EMBEDDINGS = ("none", "alternate", "all")  # the layers that have one
LOGGERS = (
    "tensorboard",
    "wandb",
    "mlflow",
)  # modules, extras, and the keys of trackers.sinks.TRACKERS
ANSWERS = ("issue797", "families", "norm_zoo")  # the keys of simlab.report.answer.WRITERS
FROM_CHECKPOINT = "from_checkpoint"  # a choice of model, norm and init: read from the checkpoint
MLP_NAMES = ("swiglu", "geglu", "gelu", "gelu_exact", "relu2")  # the keys of model.mlp.MLPS


@dataclass(frozen=True)
class NormConfig:
    """Where the norms sit (``placement``), one of NORM_TYPES (``type``), and a placement's constants.

    every: blocks between re-norms. alpha: the branch's scale. fraction: the share of the blocks that
    are post-norm. base_depth: of CompleteP. qkv_norm: True if attention norms q, k and v of each head;
    qk_norm: q and k. stream_scale … ramp: of ``scaled``; the scales of the first and the last block.
    subtract_middle: γ of x − γ·x_mid at the end. laurel_rank: of a low-rank part. streams: how many a
    placement of several has; mix_std … read_gate: of ``mhc``. update: the formula of ``custom``;
    mlp_update: another of MLPs, or None. attention_alpha … shift: of a type in ELEMENTWISE, α at
    attention, at MLPs, of the final norm, and s. block_size: of attention residuals; None: each
    sublayer is a source. loops: visits of each block. Each is None for a placement whose file in
    conf/norm doesn't have it.
    """

    placement: str
    type: str = "rms"
    eps: float = 1e-6
    gain: float = 1.0
    every: int | None = None
    alpha: float | None = None
    fraction: float | None = None
    base_depth: int | None = None
    qkv_norm: bool | None = None
    qk_norm: bool | None = None
    stream_scale: tuple[float, float] | None = None
    start_scale: tuple[float, float] | None = None
    branch_scale: tuple[float, float] | None = None
    mlp_branch_scale: tuple[float, float] | None = None
    scale_once: bool | None = None
    skip_normed: bool | None = None
    start_normed: bool | None = None
    ramp: float | None = None
    subtract_middle: float | None = None
    laurel_rank: int | None = None
    streams: int | None = None
    mix_std: float | None = None
    mix_scale: float | None = None
    mix_streams: bool | None = None
    read_gate: float | None = None
    update: str | None = None
    mlp_update: str | None = None
    loops: int | None = None
    attention_alpha: float | None = None
    mlp_alpha: float | None = None
    final_alpha: float | None = None
    shift: float | None = None
    block_size: int | None = None

    @property
    def elementwise(self) -> bool:
        """True if norms squash each entry by itself, so that none fixes a mean square."""
        return self.type in ELEMENTWISE

    @property
    def head_type(self) -> str:
        """The type of the norms of q, k and v: beside element-wise norms they stay RMSNorms."""
        return "rms" if self.elementwise else self.type

    def squash_alpha(self, kind: str) -> float:
        """α of an element-wise norm. kind: ``attention``, ``mlp`` or ``final``."""
        alpha: float | None = getattr(self, f"{kind}_alpha")
        assert alpha is not None
        return alpha

    @property
    def centred(self) -> bool:
        """True for a LayerNorm, which takes the mean away."""
        return self.type in ("layer", "layer_bias")

    @property
    def biased(self) -> bool:
        """True if norms have biases, but for those of q, k and v beside element-wise ones."""
        return self.type == "layer_bias" or self.elementwise

    @property
    def plus_one(self) -> bool:
        """True if a gain is 1 + its parameter."""
        return self.type == "rms_plus_one"


@dataclass(frozen=True)
class YarnConfig:
    """YaRN's long-context scaling of RoPE (arXiv 2309.00071)."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True)
class Llama3RopeConfig:
    """Llama 3.1's long-context scaling of RoPE, by how often a pair turns (arXiv 2407.21783)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclass(frozen=True)
class ModelConfig:
    """The architecture: with the weights and the tokens it decides every number of a forward pass."""

    name: str
    depth: int
    width: int
    heads: int
    kv_heads: int
    d_ff: int
    vocab_size: int
    head_dim: int
    norm: NormConfig
    qk_norm: str = "full"
    rope_theta: float = 500_000.0
    yarn: YarnConfig | None = None
    window: int | None = None
    full_attention: tuple[int, ...] = ()  # with a window: the layers that see everything
    tied: bool = False
    llama3: Llama3RopeConfig | None = None  # or yarn, not both
    mlp: str = "swiglu"
    bias: bool = False  # on the linear layers of attention and MLP, not on the head
    qkv_bias: bool = False  # on those of queries, keys and values
    rotary: float = 1.0  # the share of a head's channels that RoPE turns; 0: there is no RoPE
    positions: int | None = None  # of the learned embedding of positions; None: there is none
    embedding_scale: float = 1.0  # what the embedding's rows are multiplied by
    query_pre_attn_scalar: float | None = None  # logits are q·k over its root; None: head_dim
    attention_softcap: float | None = None  # c: attention's logits l become c·tanh(l/c)
    logit_softcap: float | None = None  # the same of the head's
    rope_local_theta: float | None = None  # of layers with a window; None: rope_theta
    rope_linear: float | None = None  # what RoPE's angles are divided by where there is no window
    v_norm: bool = False  # True: values are normed too, each head's by itself
    experts: int | None = None  # MLPs of width d_ff that a router picks from; None: one, no router
    experts_per_token: int | None = None
    renormalise_experts: bool = False  # the picked ones' shares are scaled to sum to 1
    attention_gate: str = "none"  # one of ATTENTION_GATES: heads' outputs times sigmoid(W_g x)
    value_embeddings: str = "none"  # one of VALUE_EMBEDDINGS: v = W_v x + g * (the token's row)
    value_embedding_scale: float = 1.5  # g

    @property
    def turned(self) -> int:
        """Channels of a head that RoPE turns, the first ones."""
        return int(self.head_dim * self.rotary)

    def rope_of(
        self, local: bool
    ) -> tuple[float, YarnConfig | None, Llama3RopeConfig | None, float | None]:
        """θ, yarn, llama3 and linear of a layer with a window (``local``) or without.

        Scaling stretches what must reach far: a layer with a window keeps plain RoPE (OLMo 3, Gemma 3).
        """
        if local:
            return self.rope_local_theta or self.rope_theta, None, None, None
        return self.rope_theta, self.yarn, self.llama3, self.rope_linear

    @property
    def query_divisor(self) -> float:
        """Attention's logits are q·k over this."""
        return math.sqrt(self.query_pre_attn_scalar or self.head_dim)

    @property
    def distinct(self) -> int:
        """Blocks with weights of their own; block l has those of block l mod this number."""
        return self.depth // (self.norm.loops or 1)

    @property
    def expert_share(self) -> float:
        """The share of the tokens that an expert gets, on average over experts; 1 without a router."""
        return (self.experts_per_token or 1) / (self.experts or 1)

    @property
    def gates(self) -> int:
        """Rows of W_g: the numbers that gate a token's heads, one for each entry or for each head."""
        per_gate = {"none": 0, "elementwise": self.head_dim, "per_head": 1}
        return self.heads * per_gate[self.attention_gate]

    def embeds_values(self, layer: int) -> bool:
        """True if a layer, counted from 0, has a value embedding; of ``alternate`` the last one has.

        Of blocks that are visited again, the last one of a visit.
        """
        distinct = max(1, self.distinct)
        back = distinct - 1 - layer % distinct
        return self.value_embeddings == "all" or (
            self.value_embeddings == "alternate" and back % 2 == 0
        )

    def window_of(self, layer: int) -> int | None:
        """The attention window of a layer, counted from 0; None where it sees every token."""
        return None if layer in self.full_attention else self.window


@dataclass(frozen=True)
class FamilyConfig(ModelConfig):
    """The sizes of a model that transformers computes. What isn't a size, as ``norm``, is its family's.

    family: transformers' model type. parameters: of the whole model; block_parameters: of its largest
    block. A size that its config doesn't have is 0. transformers: the version that computes it.
    """

    family: str = ""
    parameters: int = 0
    block_parameters: int = 0
    transformers: str = ""


@dataclass(frozen=True)
class InitConfig:
    """The rule that draws random weights; ``std`` only for the rules that have one.

    rule: FROM_CHECKPOINT until the checkpoint's own has been read; fields that aren't None are then
    kept. truncate: in standard deviations, None for whole normals. embedding_std: in place of the
    rule's own.
    """

    rule: str
    std: float | None
    truncate: float | None
    embedding_std: float | None = None


@dataclass(frozen=True)
class SourceConfig:
    """Where the measured weights come from: ``random``, ``checkpoint`` with its path, or ``demo``.

    The latter two are stored: a checkpoint is measured, beside random inits of its shape.
    weights: True to write a table with every tensor's statistics. keep: False to remove weights that a
    run has downloaded once they are measured; it decides no number, and no result's key has it.
    """

    kind: str
    path: str | None = None
    revision: str | None = None
    weights: bool = False
    keep: bool = True
    step: str | None = None  # of the demo's training, one of DEMO_STEPS

    @property
    def stored(self) -> bool:
        """True if there is a checkpoint."""
        return self.kind != "random"

    @property
    def location(self) -> str:
        """The checkpoint's folder or hub id; the demo's checkpoints are inside the package."""
        if self.kind == "demo":
            return str(DEMO_DIR / (f"step-{self.step}" if self.step != "final" else "final"))
        return str(self.path)


@dataclass(frozen=True)
class InputsConfig:
    """The token batch: ``batch`` sequences of ``length`` tokens; None for text: as long as the text.

    special_tokens: of text, the ones that the checkpoint's tokenizer puts around it, such as BOS. None:
    where it does. True: it must put some before it. False: none.
    """

    kind: str
    batch: int | None
    length: int | None
    exponent: float | None = None
    prompt: str | None = None
    path: str | None = None
    special_tokens: bool | None = None


@dataclass(frozen=True)
class RunConfig:
    """One run, checked. ``model`` is None until a checkpoint's own shape has been read."""

    model: ModelConfig | None
    init: InitConfig
    source: SourceConfig
    inputs: InputsConfig
    seeds: tuple[int, ...]
    seed: int
    engine: str
    device: str
    dtype: str
    gradients: bool = False

    @property
    def shape(self) -> ModelConfig:
        """The model's shape, once it is known."""
        if self.model is None:
            raise ConfigError("the checkpoint's shape has not been read yet")
        return self.model

    @property
    def measures(self) -> bool:
        """True if the run measures anything: ``engine=theory`` of random inits alone doesn't."""
        return self.source.stored or self.engine != "theory"


@dataclass(frozen=True)
class KeepConfig:
    """How a run keeps and reuses results.

    results: folder in which a sweep keeps each result under its hash. resume: reuse results that are
    kept there. dry_run: print the time and memory that the run would take, and run nothing. answer:
    one of ANSWERS, the text with which a sweep ends, or None. svg: write each figure as .svg, too.
    verbose: a run prints λ's too. logger: those of LOGGERS that finished runs are logged to.
    """

    results: str = "outputs/results"
    resume: bool = True
    dry_run: bool = False
    answer: str | None = None
    svg: bool = False
    verbose: bool = False
    logger: tuple[str, ...] = ()


def full_layers(depth: int, every: int | None, last: bool = True) -> tuple[int, ...]:
    """The full-attention layers of a sliding-window model: each ``every``-th, and the last if asked."""
    if every is None:
        return ()
    return tuple(i for i in range(depth) if (i + 1) % every == 0 or (last and i == depth - 1))
