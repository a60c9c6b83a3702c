"""The catalogue: mistakes in the mean-field recursion (simlab.theory.mean_field).

``setting`` names the test that catches it, of tests/theory/test_mean_field_parts.py, and its case.
"""

from __future__ import annotations

import inspect
from typing import Any

from simlab.theory.mean_field import recursion
from simlab.theory.mean_field.attention import AttentionBranch, AttentionKernel
from simlab.theory.mean_field.averages import saturation
from simlab.theory.mean_field.band import Pullback, band, pull_correlation
from simlab.theory.mean_field.drawing import Context
from simlab.theory.mean_field.gradient import _norms, loss_gradient, pull_gradient
from simlab.theory.mean_field.kernels import KernelStep
from simlab.theory.mean_field.mlp import MLPBranch, MLPKernel

from .record import Mutation, edit

PREDICT = inspect.unwrap(recursion.predict)  # under np.errstate


def getter(owner: type, name: str) -> Any:
    """The function behind a property."""
    return vars(owner)[name].fget


ATTENTION = (
    Mutation(
        "scale_of_kv_heads",
        "K·C for H·C in attention's scale",
        edit(getter(AttentionKernel, "scale"), "model.heads * ", "model.kv_heads * "),
        "uniform_heads",
    ),
    Mutation(
        "window_one_longer",
        "a window of w sees w + 1 tokens",
        edit(Context.mask, "-window)", "-window - 1)"),
        "uniform_heads",
    ),
    Mutation(
        "control_variate_added",
        "ā(mean Ĥ − H)āᵀ is added instead of taken away",
        edit(AttentionKernel.__call__, "- sandwich(mean, excess)", "+ sandwich(mean, excess)"),
        "uniform_heads",
    ),
    Mutation(
        "pull_without_transpose",
        "ā·A·āᵀ for āᵀ·A·ā",
        edit(AttentionBranch.pull, "self.mean.swapaxes(-1, -2)", "self.mean"),
        "uniform_heads",
    ),
    Mutation(
        "qk_norm_without_own_part",
        "the norm over all heads knows nothing of the head that it divides",
        edit(AttentionKernel.projected, "(own[role] + rest)", "rest * heads / (heads - 1 or 1)"),
        "qk_norm_of_one_head",
    ),
    Mutation(
        "qk_norm_by_mean_square",
        "q is divided by its mean square, not by the root",
        edit(AttentionKernel.projected, "np.sqrt(variance / moment)", "variance / moment"),
        "sublayer:normed",
    ),
    Mutation(
        "rope_forgotten",
        "q and k aren't turned",
        edit(AttentionKernel.heads, "context.sequences(turned)", "context.sequences(normed)"),
        "sublayer:alike",
    ),
    Mutation(
        "yarn_factor_forgotten",
        "cos and sin without YaRN's 0.1·ln(factor) + 1",
        edit(Context.rope, "(factor * np.cos(turns))", "(np.cos(turns))"),
        "sublayer:yarn",
    ),
    Mutation(
        "one_gram_matrix",
        "all heads see H: no Wishart groups",
        edit(
            AttentionKernel.lowers,
            "cholesky(kernel) @ a / math.sqrt(freedom)",
            "np.stack([cholesky(kernel)] * groups)",
        ),
        "first_attention_of_distinct_tokens",
    ),
    Mutation(
        "values_of_all_heads",
        "H·C values for K·C: the band forgets that heads share them",
        edit(getter(AttentionBranch, "units"), "model.kv_heads", "model.heads"),
        "sublayer:normed",
    ),
    Mutation(
        "gradient_past_qk_norm",
        "dq and dk without QK-norm's root",
        edit(
            AttentionBranch._through_norm,
            "gradient * (drawn.factor[role, 0] / (math.sqrt(model.width) * std))[:, None]",
            "gradient",
        ),
        "sublayer:alike",
    ),
    Mutation(
        "softmax_without_row_sums",
        "dl = a∘da without −a·(row sum of a∘da)",
        edit(
            AttentionBranch.pull_gradient,
            "(weight - (a * weight).sum(-1, keepdims=True))",
            "weight",
        ),
        "sublayer:alike",
    ),
)

MLP = (
    Mutation(
        "mlp_by_width",
        "d for F in the MLP's scale",
        edit(getter(MLPKernel, "scale"), "self.model.d_ff *", "self.model.width *"),
        "mlp_on_a_fixed_input",
    ),
    Mutation(
        "curvature_forgotten",
        "no ½·D″·Var ρ̂, the 1/d term of an MLP",
        edit(MLPKernel.__call__, "(value + 0.5 * curvature * v.correlation_variance)", "value"),
        "mlp_at_a_finite_width",
    ),
    Mutation(
        "lean_forgotten",
        "an MLP's mean square doesn't follow its input's",
        edit(MLPKernel.__call__, "lean = (above - below) / (2 * step)", "lean = 0 * h"),
        "sublayer:swiglu",
    ),
    Mutation(
        "own_share_forgotten",
        "no −½ρ·δH_ii/H_ii in the response of a correlation",
        edit(pull_correlation, "diagonal = -np.einsum", "diagonal = 0 * np.einsum"),
        "linear_response_of_an_mlp",
    ),
    Mutation(
        "unit_kurtosis",
        "gate's and up's squares are independent of each other's: no 1 + 2ρ²",
        edit(MLPKernel._noise, "1 + 2 * rho**2 if self.unit.gated else 1.0", "1.0"),
        "sublayer:swiglu",
    ),
    Mutation(
        "gradient_of_up_by_gate",
        "σ_gate² for σ_up² in an MLP's gradient",
        edit(MLPBranch.pull_gradient, 'stds["up_proj"] ** 2 * up', 'stds["gate_proj"] ** 2 * up'),
        "sublayer:swiglu",
    ),
)

STREAM = (
    Mutation(
        "eps_forgotten_in_theory",
        "m/m for m/(m + eps)",
        edit(saturation, "m / (m + eps)", "m / m"),
        "norm_of_gaussian_vectors:rms",
    ),
    Mutation(
        "layer_norm_keeps_its_mean",
        "LayerNorm's m isn't smaller by 1/d",
        edit(KernelStep.norm, "m = self.moment * mean_square", "m = mean_square"),
        "norm_of_gaussian_vectors:layer",
    ),
    Mutation(
        "norm_pulls_nothing",
        "the band's functional passes a norm by its factors alone",
        edit(Pullback._norm, "-0.5 * self.step.moment", "-0.0 * self.step.moment"),
        "norm_of_gaussian_vectors:rms",
    ),
    Mutation(
        "cross_term_halved",
        "2·tr(ABAᵀK)/d for 4 in the band",
        edit(Pullback._branch, "4 / width", "2 / width"),
        "band_of_a_sum",
    ),
    Mutation(
        "one_base_taken_as_two",
        "x and N(x) are added as if uncorrelated",
        edit(KernelStep.total, "self.between(one.base, other.base)", "None"),
        "adding_the_stream_twice",
    ),
    Mutation(
        "kurtosis_of_a_whole_normal",
        "3 for a normal that is cut at 3σ",
        edit(recursion.kurtosis, "if c is None:", "if True:"),
        "band_of_the_embedding",
    ),
    Mutation(
        "fourth_moment_per_token",
        "the embedding's fourth moment per token, not per id",
        edit(band, "for token in np.unique(each)", "for token in each"),
        "band_of_the_embedding",
    ),
    Mutation(
        "mean_of_inverse_forgotten",
        "1/E m for E 1/m in a norm's gradient",
        edit(_norms, "*= 1 + spread", "*= 1 + 0 * spread"),
        "gradient_of_a_norm",
    ),
    Mutation(
        "gradient_along_the_output",
        "a norm's gradient keeps the part along its output, 1/d of it",
        edit(_norms, "gradient * np.outer(root, root)", "gradient.copy()"),
        "gradient_of_a_norm",
    ),
    Mutation(
        "gradient_removed_twice",
        "each norm takes out 1/d of the gradient, whatever those behind it have taken out",
        edit(_norms, "gone * _cosine", "0 * _cosine"),
        "gradient_of_two_norms",
    ),
    Mutation(
        "gradient_isotropic_before_a_step",
        "a step forgets which part of the gradient norms have taken out",
        edit(pull_gradient, "np.clip(np.concatenate(share), 0, 1)", "0 * np.concatenate(share)"),
        "gradient_of_two_norms",
    ),
    Mutation(
        "targets_forgotten",
        "no [y_i = y_j] of the targets in the loss's gradient",
        edit(loss_gradient, "- 2 / vocab + same", "- 2 / vocab + np.eye(len(same))"),
        "gradient_of_the_loss",
    ),
    Mutation(
        "head_not_tied",
        "a tied model's head by the head's own std",
        edit(PREDICT, 'laws["embedding" if model.tied else "head"]', 'laws["head"]'),
        "tied_head",
    ),
)

RECURSION = (*ATTENTION, *MLP, *STREAM)
