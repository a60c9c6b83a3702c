"""From a composed Hydra config to a RunConfig: every key checked once, every mistake one line."""

from __future__ import annotations

import functools
import importlib.util
import math
import re
from collections.abc import Sequence
from typing import TypedDict

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from simlab.config import (
    ANSWERS,
    CONF_DIR,
    DEMO_STEPS,
    DTYPES,
    ELEMENTWISE,
    ENGINES,
    FROM_CHECKPOINT,
    LOGGERS,
    MLP_NAMES,
    NORM_TYPES,
    QK_NORMS,
    ConfigError,
    InitConfig,
    InputsConfig,
    KeepConfig,
    ModelConfig,
    NormConfig,
    RunConfig,
    SourceConfig,
    divides,
    full_layers,
    nearest,
)
from simlab.config.attention import read_attention
from simlab.config.choices import file_of, keys_of
from simlab.config.fields import REQUIRED, Fields
from simlab.config.norm import check_depth, read_own, read_squash, refuse_squash
from simlab.config.rope import read_linear, read_llama3, read_yarn

# Arithmetic in config files: d_ff: ${multiply:${width},4}. Wherever a config is read, it is there.
OmegaConf.register_new_resolver("multiply", lambda a, b: a * b, replace=True)
OmegaConf.register_new_resolver("divide", lambda a, b: a // b, replace=True)
OmegaConf.register_new_resolver("root", math.sqrt, replace=True)

GROUPS = ("model", "norm", "init", "source", "inputs")
HYDRA_GROUPS = ("hydra/launcher", "hydra/sweeper")
MORE_GROUPS = ("experiment", "recipe", *HYDRA_GROUPS)  # that no run's config has


def options(group: str) -> list[str]:
    """The names that a config group offers, from the files in conf/."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


# Far beyond use, and small enough that checking them costs nothing.
MOST_BLOCKS, MOST_TOKENS, MOST_SEEDS = 10**6, 10**8, 10**6
MOST_EXPERTS = 4096
LARGEST_ROUTED = 1 << 20  # width and d_ff with experts: what one token gets there is computed


@functools.cache
def _placements() -> list[str]:
    """The placements: choices of norm but those that are another's with numbers of their own."""
    return [n for n in options("norm") if file_of("norm", n)["placement"] == n]


def _norm(reader: Fields) -> NormConfig:
    if reader.values.get("placement", "") is None:
        raise ConfigError("norm=from_checkpoint: only with source=checkpoint")
    name = reader.values.get("placement")
    if name in options("norm") and name not in _placements():
        allowed = ", ".join(_placements())
        raise reader.fail("placement", name, f"allowed: {allowed}; did you mean norm={name}?")
    placement = reader.choice("placement", _placements())
    # norm.placement=NAME without norm=NAME, and configs from before a key existed.
    reader.values = {**file_of("norm", placement), **reader.values}
    kind = reader.choice("type", NORM_TYPES)
    of_type = keys_of("norm", kind) if kind in ELEMENTWISE else []
    refuse_squash(reader, kind)
    owner = f"norm={placement}" + f" norm.type={kind}" * bool(of_type)
    reader.only(owner, list(dict.fromkeys([*keys_of("norm", placement), *of_type])))
    norm = NormConfig(
        placement=placement,
        type=kind,
        eps=reader.number("eps", 0.0),
        gain=reader.number("gain", 0.0, default=1.0),
        **read_own(reader),
        **read_squash(reader, kind, of_type),
    )
    reader.done()
    return norm


def _model(top: Fields, norm: NormConfig) -> ModelConfig:
    depth = top.integer("depth", high=MOST_BLOCKS)
    check_depth(norm, depth)
    width, heads = top.integer("width"), top.integer("heads")
    kv_heads, d_ff, vocab_size = (top.integer(key) for key in ("kv_heads", "d_ff", "vocab_size"))
    node = top.node("model")
    name = node.text("name") or "custom"
    head_dim = node.integer("head_dim", default=None)
    if head_dim is None:
        divides("heads", heads, "width", width)
        head_dim = width // heads
    divides("kv_heads", kv_heads, "heads", heads)
    if head_dim % 2:
        raise ConfigError(f"head_dim={head_dim} (width / heads): must be even, RoPE turns pairs")
    tied, qk_norm = node.boolean("tied"), node.choice("qk_norm", QK_NORMS)
    window, every = node.integer("window", default=None), node.integer("full_every", default=None)
    if window is None and every is not None:
        raise node.fail("full_every", every, "needs a model.window")
    # Configs written before a key existed haven't got it.
    last = node.boolean("full_last") if "full_last" in node.values else True
    local_theta = node.number("rope_local_theta", 1.0, above=True, default=None)
    if window is None and local_theta is not None:
        raise node.fail("rope_local_theta", local_theta, "needs a model.window")
    model = ModelConfig(
        name=name,
        depth=depth,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        d_ff=d_ff,
        vocab_size=vocab_size,
        head_dim=head_dim,
        norm=norm,
        qk_norm="per_head" if norm.qkv_norm or norm.qk_norm else qk_norm,
        v_norm=bool(norm.qkv_norm),
        rope_theta=node.number("rope_theta", 1.0, above=True),
        rotary=node.number("rotary", 0.0, 1.0) if "rotary" in node.values else 1.0,
        positions=node.integer("positions", default=None),
        llama3=read_llama3(node) if "llama3" in node.values else None,
        yarn=read_yarn(node),
        window=window,
        full_attention=full_layers(depth, every, last),
        tied=tied,
        mlp=node.choice("mlp", MLP_NAMES) if "mlp" in node.values else "swiglu",
        bias=node.boolean("bias") if "bias" in node.values else False,
        embedding_scale=node.number("embedding_scale", 0.0, above=True, default=1.0),
        logit_softcap=node.number("logit_softcap", 0.0, above=True, default=None),
        rope_local_theta=local_theta,
        rope_linear=read_linear(node),
        **read_attention(node),
        **_experts(node),
    )
    node.done()
    largest = max(width, d_ff, heads * head_dim)
    if model.experts and largest > LARGEST_ROUTED:
        raise node.fail(
            "experts", model.experts, f"only with width and d_ff of at most {LARGEST_ROUTED}"
        )
    if model.turned % 2:
        raise node.fail(
            "rotary", model.rotary, f"{model.turned} of {head_dim} channels: must be even"
        )
    return model


class _Experts(TypedDict):
    """Fields of ModelConfig."""

    experts: int | None
    experts_per_token: int | None
    renormalise_experts: bool


def _experts(node: Fields) -> _Experts:
    # Configs written before these keys existed haven't got them.
    experts, chosen = (
        node.integer(key, high=MOST_EXPERTS, default=None)
        for key in ("experts", "experts_per_token")
    )
    renormalise = bool(node.boolean("renormalise_experts", None))
    if experts is None:
        for key, value in (("experts_per_token", chosen), ("renormalise_experts", renormalise)):
            if value:
                raise node.fail(key, value, "needs model.experts")
    elif chosen is None or chosen > experts:
        raise node.fail(
            "experts_per_token", chosen, f"with model.experts={experts}: 1 to {experts}"
        )
    return _Experts(experts=experts, experts_per_token=chosen, renormalise_experts=renormalise)


def _init(reader: Fields, stored: bool) -> InitConfig:
    """stored: True if there is a checkpoint, whose own init is then a choice."""
    names = [name for name in options("init") if name != FROM_CHECKPOINT]
    if reader.values.get("rule", "") is None:
        if not stored:
            raise ConfigError("init=from_checkpoint: only with source=checkpoint")
        rule = FROM_CHECKPOINT
        reader.take("rule")
    else:
        rule = reader.choice("rule", names)
    reader.only(f"init={rule}", keys_of("init", rule))
    has_std = "std" in reader.values
    unsaid = None if rule == FROM_CHECKPOINT else REQUIRED
    init = InitConfig(
        rule=rule,
        std=reader.number("std", 1e-12, above=True, default=unsaid) if has_std else None,
        # Numbers beyond the cut are drawn again: nearer than this, most would be.
        truncate=reader.number("truncate", 0.5, 100.0, default=None),
        embedding_std=reader.number("embedding_std", 1e-12, above=True, default=None),
    )
    reader.done()
    return init


def _source(reader: Fields) -> SourceConfig:
    kind = reader.choice("kind", options("source"))
    if kind == "random":
        source = SourceConfig(kind)
    elif kind == "demo":
        source = SourceConfig(
            kind, weights=reader.boolean("weights"), step=reader.choice("step", DEMO_STEPS)
        )
    else:
        source = SourceConfig(
            kind,
            path=reader.text("path"),
            revision=reader.text("revision"),
            weights=reader.boolean("weights"),
            # Configs written before this key existed haven't got it.
            keep=reader.boolean("keep") if "keep" in reader.values else True,
        )
        if not source.path:
            raise ConfigError(
                "source.path is missing: give a checkpoint folder, a GGUF file or a hub id, "
                "for example source.path=allenai/OLMo-2-0425-1B"
            )
    reader.done()
    return source


def _inputs(reader: Fields, default: str | None) -> InputsConfig:
    """default: the text where inputs=text names none."""
    kind = reader.choice("kind", options("inputs"))
    reader.only(f"inputs={kind}", keys_of("inputs", kind))
    text = kind == "text"
    default_size = None if text else REQUIRED
    batch, length = (reader.integer(key, default=default_size) for key in ("batch", "length"))
    if (batch or 1) * (length or 1) > MOST_TOKENS:
        raise ConfigError(
            f"inputs.batch={batch} inputs.length={length}: at most {MOST_TOKENS} tokens together"
        )
    prompt, path = reader.text("prompt"), reader.text("path")
    inputs = InputsConfig(
        kind,
        batch,
        length,
        exponent=reader.number("exponent", 0.0) if kind == "zipf" else None,
        prompt=default if text and prompt is None and path is None else prompt,
        path=path,
        special_tokens=reader.boolean("special_tokens", None),
    )
    reader.done()
    if text and (inputs.prompt is None) == (inputs.path is None):
        raise ConfigError("inputs=text needs one of inputs.prompt=TEXT and inputs.path=FILE")
    return inputs


def _seeds(reader: Fields, first: int, lowest: int) -> tuple[int, ...]:
    value = reader.take("seeds")
    allowed = "a count, or a list of different seeds such as [0,1,2]"
    if isinstance(value, int) and not isinstance(value, bool):
        if not lowest <= value <= MOST_SEEDS:
            limits = f"at least {lowest}, at most {MOST_SEEDS}"
            raise reader.fail("seeds", value, f"{limits}; allowed: {allowed}")
        return tuple(range(first, first + value))
    seeds = value if isinstance(value, list) else [None]
    if not all(isinstance(s, int) and not isinstance(s, bool) and 0 <= s < 2**62 for s in seeds):
        raise reader.fail("seeds", value, f"allowed: {allowed}")
    if len(set(seeds)) != len(seeds) or len(seeds) < lowest:
        raise reader.fail("seeds", value, f"allowed: {allowed}")
    return tuple(seeds)


def _device(reader: Fields) -> str:
    value = str(reader.take("device"))
    kind, _, index = value.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (index and not index.isdigit()):
        hint = nearest(kind.rstrip("0123456789"), ("auto", "cpu", "cuda", "mps"))
        raise reader.fail("device", value, f"allowed: auto, cpu, cuda, cuda:N, mps{hint}")
    return value


KEEP_KEYS = ("results", "resume", "dry_run", "answer", "svg", "verbose", "logger")


def _keep(top: Fields) -> KeepConfig:
    results = top.text("results")
    if not results:
        raise top.fail("results", results, "allowed: a folder")
    # Configs written before these keys existed haven't got them.
    answer = None if top.take("answer") is None else top.choice("answer", ANSWERS)
    svg, verbose = (top.take(key) is not None and top.boolean(key) for key in ("svg", "verbose"))
    return KeepConfig(
        results, top.boolean("resume"), top.boolean("dry_run"), answer, svg, verbose, _loggers(top)
    )


def _loggers(top: Fields) -> tuple[str, ...]:
    """The trackers of the key ``logger``: one, a list of them, or none. Each must be installed."""
    value = top.take("logger")
    names = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        checked = Fields({"logger": name}).choice("logger", LOGGERS)
        found = importlib.util.find_spec(checked)
        # Without an origin it's a folder of that name in this one, such as W&B's own.
        if found is None or found.origin is None:
            raise ConfigError(f"logger={checked}: not installed; pip install {checked}")
    return tuple(dict.fromkeys(names))


def read_keep(config: DictConfig) -> KeepConfig:
    """Check the config's keys about results. Raises ConfigError."""
    found = {key: config.get(key) for key in KEEP_KEYS}
    plain = {
        k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in found.items()
    }
    return _keep(Fields(plain))


def read(config: DictConfig) -> RunConfig:
    """Check a composed config and freeze it.

    Raises ConfigError, one line naming the key, the value, what is allowed and the nearest name.
    """
    try:
        if "hydra" in config:
            config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    assert isinstance(values, dict)
    top = Fields({str(key): value for key, value in values.items()})
    source, init, inputs = (top.node(key) for key in ("source", "init", "inputs"))
    # The demo's, and of +experiment=families.
    text = source.text("text") if source.values.get("kind") in ("demo", "checkpoint") else None
    checked_source = _source(source)
    model: ModelConfig | None = None
    if checked_source.stored:
        _refuse_shape(top, checked_source.kind)
    else:
        if top.values.get("model") is None:
            raise ConfigError("model=from_checkpoint: only with source=checkpoint")
        model = _model(top, _norm(top.node("norm")))
    seed = top.integer("seed", 0)
    run = RunConfig(
        model=model,
        init=_init(init, checked_source.stored),
        source=checked_source,
        inputs=_inputs(inputs, text),
        seeds=_seeds(top, seed, lowest=0 if checked_source.stored else 1),
        seed=seed,
        engine=top.choice("engine", ENGINES),
        device=_device(top),
        dtype=top.choice("dtype", DTYPES),
        gradients=top.boolean("gradients"),
    )
    _keep(top)
    top.done()
    return run


def _refuse_shape(top: Fields, kind: str) -> None:
    """With a checkpoint, nothing that its own config decides may be given."""
    model, norm = top.take("model") or {}, top.take("norm")
    # A preset is named as it was chosen, before the keys that it sets.
    shape = {"model": model.get("name"), "norm": norm.get("placement")}
    shape |= {key: top.take(key) for key in ("depth", "width", "heads", "kv_heads", "d_ff")}
    shape["vocab_size"] = top.take("vocab_size")
    shape |= {f"norm.{key}": value for key, value in norm.items()}
    shape |= {f"model.{key}": value for key, value in model.items()}
    for key, value in shape.items():
        if value is not None:
            raise ConfigError(f"{key}={value}: with source={kind} it is read from the checkpoint")


def refuse_empty_choices(overrides: Sequence[str]) -> None:
    """Raises ConfigError for ``norm=null``, ``norm=true`` or ``norm=3``, on which Hydra fails."""
    for override in overrides:
        group, _, value = override.lstrip("+").partition("=")
        words = re.sub(r"\b(null|true|false)\b", "", value, flags=re.IGNORECASE)
        if not group:
            raise ConfigError(f"{override}: not of the form key=value, without spaces")
        if group in (*GROUPS, *MORE_GROUPS) and not re.search(r"[A-Za-z]", words):
            names = ["basic"] if group in HYDRA_GROUPS else []  # Hydra's own
            names += [name for name in options(group) if name != FROM_CHECKPOINT]
            raise ConfigError(f"{override}: allowed: {', '.join(names)}")


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """A checked config from Hydra overrides, for use as a library: ``compose(["depth=8"])``.

    Raises ConfigError, as ``read`` does, also for a key or a choice that there isn't.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from simlab.config.cli_errors import MISTAKES, explain

    refuse_empty_choices(overrides)
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return read(hydra_compose("config", overrides=list(overrides)))
    except MISTAKES as error:
        raise ConfigError(explain(error, overrides)) from error
