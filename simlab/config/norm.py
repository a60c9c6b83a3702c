"""Checks the keys of norm placements that have their own."""

from __future__ import annotations

from typing import Any

from simlab.config.fields import Fields

MOST_STREAMS = 16


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
    }


def read_parts(reader: Fields) -> dict[str, Any]:
    """The keys of attention's norms and of residual steps' parts, of a config that has them."""
    taken: dict[str, Any] = {
        key: reader.boolean(key) for key in ("qkv_norm", "qk_norm") if key in reader.values
    }
    ranks = {key: reader.integer(key) for key in ("laurel_rank",) if key in reader.values}
    return taken | ranks


def read_streams(reader: Fields) -> dict[str, Any]:
    """The keys of placements of several streams, of a config that has them."""
    if "streams" not in reader.values:
        return {}
    return {"streams": reader.integer("streams", 2, MOST_STREAMS)}
