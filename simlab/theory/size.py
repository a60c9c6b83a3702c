"""How many parameters a model has, on paper: without building its blocks, which takes torch."""

from __future__ import annotations

from simlab.config import ModelConfig
from simlab.schemes.placement import at, renorm_after
from simlab.theory.mean_field.mlp import UNITS
from simlab.theory.mean_field.parts import PART_KERNELS, end_parameters


def parameters_on_paper(model: ModelConfig) -> int:
    """Parameters of the whole model, as ``simlab.model.transformer.parameter_count`` has them.

    Raises KeyError for an MLP that theory doesn't know.
    """
    d, q, kv = model.width, model.heads * model.head_dim, model.kv_heads * model.head_dim
    hidden = (1 + UNITS[model.mlp].gated) * model.d_ff  # rows of an MLP's input matrices
    experts, inputs = model.experts or 1, q + 2 * kv + model.gates
    block = d * (inputs + q) + experts * d * (hidden + model.d_ff) + d * (model.experts or 0)
    block += model.bias * (inputs + d + experts * (hidden + d))
    block += (model.qkv_bias and not model.bias) * (q + 2 * kv)
    norm = model.norm
    each, numbers = 1 + norm.biased, norm.elementwise + (norm.type == "derf")  # of a norm
    of_heads = 1 + (norm.biased and not norm.elementwise)
    block += of_heads * {"none": 0, "full": q + kv, "per_head": 2 * model.head_dim}[model.qk_norm]
    block += of_heads * model.v_norm * model.head_dim
    layers = range(model.distinct)
    norms = sum(renorm_after(model, layer) for layer in layers)
    steps = [at(model, i, kind) for i in layers for kind in ("attention", "mlp")]
    norms += sum(len(step.norms) for step in steps)
    parts = sum(PART_KERNELS[name].parameters(model) for step in steps for name in step.parts)
    of_values = kv * sum(model.embeds_values(layer) for layer in layers)
    ends = (2 - model.tied) * model.vocab_size + (model.positions or 0)
    return (
        model.distinct * block
        + parts
        + end_parameters(model)
        + (each * d + numbers) * (norms + 1)
        + d * ends
        + model.vocab_size * of_values
    )
