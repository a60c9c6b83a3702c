"""Checks the keys of norm placements and norm types that have their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from simlab.config.errors import ConfigError
from simlab.config.fields import Fields, as_typed
from simlab.config.formula import MOST_CHARACTERS, formula_of, refuse_factors
from simlab.config.schema import ELEMENTWISE, NormConfig

MOST_STREAMS = 16


# Keys of one placement or of a few, each with its check.
OWN_CHECKS: dict[str, Callable[[Fields, str], Any]] = {
    "every": Fields.integer,
    "alpha": lambda reader, key: reader.number(key, 0.0, default=None),
    "fraction": lambda reader, key: reader.number(key, 0.0, 1.0),
    "base_depth": Fields.integer,
    "loops": Fields.integer,
    "qkv_norm": Fields.boolean,
    "qk_norm": Fields.boolean,
    "laurel_rank": Fields.integer,
    "block_size": lambda reader, key: reader.integer(key, default=None),
    "streams": lambda reader, key: reader.integer(key, 2, MOST_STREAMS),
}


def read_own(reader: Fields) -> dict[str, Any]:
    """The fields of NormConfig that some placements alone have, of a config that has them."""
    of = {key: read(reader, key) for key, read in OWN_CHECKS.items() if key in reader.values}
    return of | read_scales(reader) | read_mix(reader, of) | read_formulas(reader)


def read_scales(reader: Fields) -> dict[str, Any]:
    """The keys of ``scaled``, of a config that has them."""
    if "stream_scale" not in reader.values:
        return {}
    branch = reader.ends("branch_scale")
    of_mlp = reader.take("mlp_branch_scale")
    return {
        "stream_scale": reader.ends("stream_scale"),
        "start_scale": reader.ends("start_scale"),
        "branch_scale": branch,
        "mlp_branch_scale": branch if of_mlp is None else reader.ends("mlp_branch_scale"),
        **{key: reader.boolean(key) for key in ("scale_once", "skip_normed", "start_normed")},
        "ramp": reader.number("ramp", 0.0, default=None),
        "subtract_middle": reader.number("subtract_middle", 0.0, default=None),
    }


def read_mix(reader: Fields, own: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``mhc``'s coefficients, of a config that has them. own: other keys, as read."""
    if "mix_std" not in reader.values:
        return {}
    gate = reader.number("read_gate", 0.0, 0.999, above=True, default=None)
    return {
        "mix_std": reader.number("mix_std", 0.0, above=True),
        "mix_scale": reader.number("mix_scale", 0.0),
        "mix_streams": reader.boolean("mix_streams"),
        "read_gate": gate or 1 / own["streams"],
    }


def read_formulas(reader: Fields) -> dict[str, Any]:
    """The keys of ``custom``, of a config that has them."""
    if "update" not in reader.values:
        return {}
    texts = {key: reader.text(key) for key in ("update", "mlp_update")}
    keys = {key: None if text is None else _bare(text) for key, text in texts.items()}
    if keys["update"] is None:
        raise reader.fail("update", None, "allowed: a formula, as in 'norm.update=\"x + F(N(x))\"'")
    for key, text in keys.items():
        if text is not None:
            with _naming(key, text):
                formula_of(text)
    return keys


def _bare(text: str) -> str:
    """A formula with single spaces, and without the quotes around it that the command line needs."""
    text = " ".join(text.split())
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1].strip() if quoted else text


def check_depth(norm: NormConfig, depth: int) -> None:
    """Raises ConfigError where a placement can't be, at this depth."""
    if norm.loops is not None and depth % norm.loops:
        raise ConfigError(
            f"norm.loops={norm.loops}: must divide depth={depth}, the visits of blocks"
        )
    check_formulas(norm, depth)


def check_formulas(norm: NormConfig, depth: int) -> None:
    """Raises ConfigError where the formulas of ``custom`` have factors that can't be, at this depth."""
    for key, text in (("update", norm.update), ("mlp_update", norm.mlp_update)):
        if text is not None:
            with _naming(key, text):
                refuse_factors(text, depth)


@contextmanager
def _naming(key: str, text: str) -> Iterator[None]:
    """Says in a ConfigError which key it is about, and its whole value, which positions count in."""
    try:
        yield
    except ConfigError as error:
        shown = text if len(text) <= MOST_CHARACTERS else as_typed(text)
        raise ConfigError(f"norm.{key}={shown}: {error}") from None


def refuse_squash(reader: Fields, kind: str) -> None:
    """Raises ConfigError where the keys are those of an element-wise norm, and the type isn't one."""
    if kind not in ELEMENTWISE and "attention_alpha" in reader.values:
        raise ConfigError(
            f"norm.type={kind}: not with norm={' or '.join(ELEMENTWISE)}, whose norm.type is their own;"
            f" with this type write norm=pre norm.type={kind}"
        )


def read_squash(reader: Fields, kind: str, keys: Sequence[str]) -> dict[str, Any]:
    """α and s of an element-wise norm. kind: the norm's type. keys: of its file; of others none."""
    names = [key for key in keys if key.endswith("_alpha")]
    missing = [key for key in keys if key not in reader.values]
    if missing:
        keys_of_it = ", ".join(f"norm.{key}" for key in missing)
        raise ConfigError(f"norm.type={kind}: needs {keys_of_it}, which norm={kind} has")
    if keys and reader.values.get("placement") == "swin_renorm":
        raise ConfigError(
            f"norm.type={kind}: not with norm.placement=swin_renorm, which sets the rms"
        )
    out: dict[str, Any] = {key: reader.number(key, 0.0, 1e6, above=True) for key in names}
    if "shift" in keys:
        out["shift"] = reader.number("shift", -1e6, 1e6)
    return out
