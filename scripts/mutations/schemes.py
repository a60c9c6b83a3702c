"""Mistakes in gates, value embeddings and element-wise norms, and in schemes of parts and streams.

A mistake in how mHC mixes its streams isn't here: their mean, which the curve is of, hardly feels it.
Nor is one in the bias and the gradient of a head's gates, or in the scale of AltUp's side streams:
``tests/model/test_streams.py`` and ``test_gemma3n.py`` hold each stream to transformers' instead.
"""

from __future__ import annotations

from simlab.config import ModelConfig
from simlab.model.altup import Predict
from simlab.model.attention import Attention
from simlab.model.mix import Gates, Mix
from simlab.model.norms import DynamicErf, DynamicTanh
from simlab.schemes import attn_res
from simlab.schemes.attn_res import AttnRes
from simlab.schemes.custom import Custom
from simlab.schemes.gemma3n import AltUp, CorrectedMLP, Laurel
from simlab.schemes.ngpt import NGPT
from simlab.schemes.pre_and_post import SiameseNorm
from simlab.schemes.streams import GatedHead, HyperConnections, Streams

from .record import Mutation, edit

VALUES = "v = v + self.value_scale * self.value_embedding(ids)"
SIGMOID = "torch.sigmoid(self.g_proj(x_BTD))"
WRITTEN = "*(x + branch for x in others)"
SELECT = vars(Custom)["select"].__func__  # under classmethod
NGPT_STEP = "(1 - self.alpha) * x, self.alpha * norm_branch(F(x))"

SCHEMES = (
    Mutation(
        "gate_forgotten",
        "no output gate",
        edit(
            Attention.forward, "o_BTHC = o_BTHC * gate_BTG.unflatten(-1, (self.heads, -1))", "pass"
        ),
        "gated",
    ),
    Mutation(
        "gate_by_silu",
        "SiLU for the gate's sigmoid",
        edit(Attention.forward, SIGMOID, "nn.functional.silu(self.g_proj(x_BTD))"),
        "gated",
    ),
    Mutation(
        "value_embedding_on_keys",
        "value embeddings are added to the keys",
        edit(Attention.forward, VALUES, VALUES.replace("v = v", "k = k")),
        "gated",
    ),
    Mutation(
        "value_embedding_unscaled",
        "value embeddings without their scale",
        edit(Attention.forward, "self.value_scale * ", ""),
        "gated",
    ),
    Mutation(
        "value_embedding_of_other_layers",
        "every other layer has one, but not the last",
        edit(ModelConfig.embeds_values, "back % 2 == 0", "back % 2 == 1"),
        "gated",
    ),
    Mutation(
        "streams_written_once",
        "a sublayer writes to the first of n streams alone",
        edit(HyperConnections.step, WRITTEN, "*others"),
        "hyper_connections",
    ),
    Mutation(
        "streams_pull_the_first",
        "a write's gradient is the first stream's, not the sum of all",
        edit(Streams.pull, "total(gradients)", "gradients[0]"),
        "hyper_connections",
    ),
    Mutation(
        "mhc_write_halved",
        "σ(u) for 2σ(u) in what a stream is written",
        edit(Mix.forward, "2 * torch.sigmoid(", "torch.sigmoid("),
        "mhc",
    ),
    Mutation(
        "mhc_streams_not_normed",
        "coefficients of the streams as they are",
        edit(Gates.logits, "self.mix_proj(normed.to(x.dtype))", "self.mix_proj(x)"),
        "mhc",
    ),
    Mutation(
        "attn_res_sum_for_mean",
        "a sublayer reads its sources' sum, not their mean",
        edit(AttnRes.step, "x / sources", "x"),
        "attn_res",
    ),
    Mutation(
        "attn_res_a_source_less",
        "the embedding isn't counted among the sources",
        edit(
            attn_res._sources,
            "1.0 + math.ceil(sublayer / (config.norm.block_size or 1))",
            "max(1.0, math.ceil(sublayer / (config.norm.block_size or 1)))",
        ),
        "attn_res",
    ),
    Mutation(
        "laurel_forgotten",
        "no low-rank product beside attention",
        edit(Laurel.step, "x + read + norm_laurel(laurel(read))", "x + read"),
        "gemma3n",
    ),
    Mutation(
        "laurel_read_forgotten",
        "the low-rank product without the identity beside it",
        edit(Laurel.step, "x + read + norm_laurel", "x + norm_laurel"),
        "gemma3n",
    ),
    Mutation(
        "laurel_of_the_stream",
        "what is added to the stream isn't divided by √2",
        edit(Laurel.step, "norm_out(F(read)) / math.sqrt(2)", "norm_out(F(read))"),
        "gemma3n",
    ),
    Mutation(
        "head_reads_the_mean",
        "the head reads the streams' mean, not each by its gate",
        edit(GatedHead.finish, "gates(state).read(state)", "total(state) / len(state)"),
        "deepseek_v4",
    ),
    Mutation(
        "altup_prediction_forgets",
        "a prediction is the small sum alone, without the stream",
        edit(Predict.forward, "x + sum(", "sum("),
        "gemma3n_altup",
    ),
    Mutation(
        "altup_correction_without_1",
        "c times a block's change, not 1 + c, is added to side streams",
        edit(CorrectedMLP.step, "p + (1 + c) * innovation", "p + c * innovation"),
        "gemma3n_altup",
    ),
    Mutation(
        "altup_change_of_the_mlp",
        "side streams get the change since attention, not since the prediction",
        edit(CorrectedMLP.step, "after + -1.0 * active", "after + -1.0 * y"),
        "gemma3n_altup",
    ),
    Mutation(
        "altup_pull_the_first",
        "a write's gradient is the active stream's, not the sum of all",
        edit(
            AltUp.pull, "gradients[0] if len(gradients) % 2 else total(gradients)", "gradients[0]"
        ),
        "gemma3n_altup",
    ),
    Mutation(
        "altup_ends_with_the_active_stream",
        "the final norm gets the active stream alone",
        edit(AltUp.finish, "total((state[0], *unembed_sides(state)))", "state[0]"),
        "gemma3n_altup",
    ),
    Mutation(
        "siamese_scale_forgotten",
        "the normed stream gets the whole branch",
        edit(SiameseNorm.step, "branch / math.sqrt(2 * (self.layer + 1))", "branch"),
        "siamese_norm",
    ),
    Mutation(
        "siamese_pull_forgets",
        "a write's gradient without the part through the normed stream",
        edit(SiameseNorm.pull, "gradients[0] + gradients[1] / c", "gradients[0]"),
        "siamese_norm",
    ),
    Mutation(
        "custom_block_from_0",
        "a formula's l counts blocks from 0",
        edit(Custom.scales_of, "layer + 1", "layer"),
        "custom",
    ),
    Mutation(
        "custom_formula_of_attention",
        "MLPs take attention's formula",
        edit(SELECT, "_text(config, kind)", '_text(config, "attention")'),
        "custom",
    ),
    Mutation(
        "derf_by_tanh",
        "tanh for erf",
        edit(DynamicTanh.forward, "type(self).squash(", "torch.tanh("),
        "derf",
    ),
    Mutation(
        "derf_alpha_forgotten",
        "erf(x) for erf(αx)",
        edit(DynamicTanh.inner, "self.alpha.float() * x", "x"),
        "derf",
    ),
    Mutation(
        "derf_shift_inside_alpha",
        "erf(α(x + s)) for erf(αx + s)",
        edit(DynamicErf.inner, "self.shift.float()", "self.alpha.float() * self.shift.float()"),
        "derf",
    ),
    Mutation(
        "ngpt_branch_not_normed",
        "a branch is added to the sphere as it comes",
        edit(NGPT.step, "norm_branch(F(x))", "F(x)"),
        "ngpt",
    ),
    Mutation(
        "ngpt_embedding_not_normed",
        "the embedding isn't on the sphere",
        edit(NGPT.start, "norm(x)", "x"),
        "ngpt",
    ),
    Mutation(
        "ngpt_mean_of_squares",
        "√(1 − a)·x + √a·b: weights of squares for those of vectors",
        edit(
            NGPT.step,
            NGPT_STEP,
            "(1 - self.alpha) ** 0.5 * x, self.alpha**0.5 * norm_branch(F(x))",
        ),
        "ngpt",
    ),
)
