"""Mixtures of experts in Hugging Face's layout: their keys in a config, their tensors in the files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from simlab.config.fields import Fields

_MLP = "blocks.{}.mlp.sublayer."


@dataclass(frozen=True)
class ExpertsLayout:
    """How a model type writes its experts. count: their number's key in a config.

    experts, per_token: transformers' defaults. renormalises: True or False, or the key that says it,
    which is false by default. router, gate, up, down: the files' names, with {} for the block and
    {expert} for the expert.
    """

    count: str
    experts: int
    per_token: int
    renormalises: bool | str
    router: str
    gate: str
    up: str
    down: str


_LAYER = "model.layers.{}."
EXPERTS = {
    "olmoe": ExpertsLayout(
        "num_experts", 64, 8, "norm_topk_prob", _LAYER + "mlp.gate.weight",
        *(f"{_LAYER}mlp.experts.{{expert}}.{name}_proj.weight" for name in ("gate", "up", "down")),
    ),
    "mixtral": ExpertsLayout(
        "num_local_experts", 8, 2, True, _LAYER + "block_sparse_moe.gate.weight",
        *(f"{_LAYER}block_sparse_moe.experts.{{expert}}.{name}.weight" for name in ("w1", "w3", "w2")),
    ),
}  # fmt: skip


class RoutedFields(TypedDict, total=False):
    """Fields of ModelConfig, none for a model without experts."""

    experts: int
    experts_per_token: int
    renormalise_experts: bool


def read_experts(fields: Fields, kind: str, tensors: int) -> RoutedFields:
    """The experts of a model type from its config. Raises ConfigError.

    tensors: how many the checkpoint holds; more experts than that are refused.
    """
    if kind not in EXPERTS:
        return {}
    its = EXPERTS[kind]
    experts = fields.integer(its.count, default=its.experts)
    if experts > tensors:
        raise fields.fail(its.count, experts, f"the checkpoint holds {tensors} tensors")
    per_token = fields.integer(
        "num_experts_per_tok", high=experts, default=min(its.per_token, experts)
    )
    renormalise = its.renormalises
    if isinstance(renormalise, str):
        renormalise = fields.boolean(renormalise, False)
    return {
        "experts": experts, "experts_per_token": per_token, "renormalise_experts": renormalise,
    }  # fmt: skip


def with_experts(keys: Mapping[str, str], kind: str, routed: RoutedFields) -> dict[str, str]:
    """A key map with experts and their router in place of the one MLP; of other models, itself."""
    if kind not in EXPERTS:
        return dict(keys)
    its = EXPERTS[kind]
    names = {f"{_MLP}router.weight": its.router}
    for number in range(routed["experts"]):
        for role, theirs in (("gate", its.gate), ("up", its.up), ("down", its.down)):
            ours = f"{_MLP}experts.{number}.{role}_proj.weight"
            names[ours] = theirs.replace("{expert}", str(number))
    return {ours: theirs for ours, theirs in keys.items() if ".mlp.sublayer." not in ours} | names
