"""Mistakes in the norms, and in where they sit."""

from __future__ import annotations

from simlab.model.norms import RMSNorm
from simlab.model.placement import ResidualAdd
from simlab.model.transformer import Block, Transformer
from simlab.schemes.placement import LNS, DeepNorm, ResidualScale, SwinRenorm
from simlab.schemes.plain import Peri, Reordered

from .record import Mutation, edit

ROOT = "x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)"
STEP = "add(x, norm_out(F(x)))"
YIELD = 'yield "attention", self.attention\n        yield "mlp", self.mlp'
RENORM = """
        if self.renorm is not None:
            yield "renorm", self.renorm"""

NORM = (
    Mutation(
        "eps_outside_root",
        "x / (√mean(x²) + eps)",
        edit(RMSNorm.forward, ROOT, "x32 / (x32.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)"),
        "quiet",
    ),
    Mutation(
        "eps_twice",
        "eps added to the mean and again under the root",
        edit(RMSNorm.forward, "+ self.eps", "+ self.eps + self.eps"),
        "quiet",
    ),
    Mutation("eps_forgotten", "no eps", edit(RMSNorm.forward, " + self.eps", ""), "quiet"),
    Mutation(
        "eps_of_llama",
        "eps 1e-5 where 1e-6 is asked for",
        edit(RMSNorm.__init__, "self.eps = eps", "self.eps = 1e-5"),
        "quiet",
    ),
    Mutation(
        "mean_in_float16",
        "the norm's squares are summed in float16",
        edit(RMSNorm.forward, "(x32.pow(2).mean", "(x.half().pow(2).mean"),
        "loud",
    ),
    Mutation(
        "norm_by_sum",
        "sum of squares instead of their mean",
        edit(RMSNorm.forward, ".mean(", ".sum("),
    ),
    Mutation(
        "norm_over_tokens",
        "one mean square for all tokens of a sequence",
        edit(RMSNorm.forward, ".mean(-1,", ".mean((-2, -1),"),
    ),
    Mutation(
        "layer_norm",
        "LayerNorm for RMSNorm",
        edit(
            RMSNorm.forward,
            "squarable(x.float())",
            "squarable(x.float()) - x.float().mean(-1, keepdim=True)",
        ),
    ),
    Mutation(
        "gain_forgotten",
        "gains are not applied",
        edit(RMSNorm.forward, "self.gain * y", "y"),
        same="gains are 1",
    ),
    Mutation(
        "gain_plus_one",
        "times 1 + gain, as Gemma has it",
        edit(RMSNorm.forward, "self.gain * y", "(1 + self.gain) * y"),
    ),
    Mutation(
        "gain_squared",
        "gains are applied twice",
        edit(RMSNorm.forward, "self.gain * y", "self.gain ** 2 * y"),
        "gain",
    ),
    Mutation(
        "final_norm_forgotten",
        "no norm before the head",
        edit(Transformer.forward, "self.head(self.norm(", "self.head(("),
        same="the curve ends before it",
    ),
)

PLACEMENT = (
    Mutation(
        "norm_before",
        "norm before the sublayer instead of after",
        edit(Reordered.step, STEP, "add(x, F(norm_out(x)))"),
    ),
    Mutation(
        "norm_before_and_after",
        "the sublayer reads a normed stream",
        edit(Reordered.step, "F(x)", "F(norm_out(x))"),
    ),
    Mutation(
        "norm_of_stream",
        "norm after the add: of the stream instead of the branch",
        edit(Reordered.step, STEP, "norm_out(add(x, F(x)))"),
    ),
    Mutation("norm_forgotten", "no norm", edit(Reordered.step, STEP, "add(x, F(x))")),
    Mutation(
        "norm_forgotten_on_mlp",
        "a norm on attention alone",
        edit(
            Reordered.step,
            "norm_out(F(x))",
            "norm_out(F(x)) if hasattr(F, 'q_proj') else F(x)",
        ),
    ),
    Mutation(
        "norm_twice",
        "the branch is normed twice",
        edit(
            Reordered.step,
            "norm_out(F(x))",
            "norm_out(norm_out(F(x)))",
        ),
        "quiet",
    ),
    Mutation(
        "residual_missing",
        "the branch replaces the stream",
        edit(ResidualAdd.forward, "skip + branch", "branch"),
    ),
    Mutation(
        "branch_twice",
        "the branch is added twice",
        edit(ResidualAdd.forward, "skip + branch", "skip + branch + branch"),
    ),
    Mutation(
        "branch_subtracted",
        "the branch is subtracted",
        edit(ResidualAdd.forward, "skip + branch", "skip - branch"),
        same="the branch's last matrix is symmetric about 0",
    ),
    Mutation(
        "stream_in_float16",
        "the residual stream is accumulated in float16",
        edit(ResidualAdd.forward, "skip + branch", "(skip.half() + branch.half()).to(skip.dtype)"),
        same="rounding to nearest has no bias, and adds some 1e-7 to a mean square",
    ),
    Mutation(
        "stream_in_bfloat16",
        "the residual stream is accumulated in bfloat16",
        edit(
            ResidualAdd.forward,
            "skip + branch",
            "(skip.bfloat16() + branch.bfloat16()).to(skip.dtype)",
        ),
        same="rounding to nearest has no bias, and adds some 1e-5 to a mean square",
    ),
    Mutation(
        "renorm_every_7",
        "a re-norm every 7 blocks instead of 6",
        edit(SwinRenorm.renorm_after, "% every", "% (every + 1)"),
        "swin",
    ),
    Mutation(
        "renorm_counted_from_0",
        "a re-norm after blocks 0, 6, … counted from 0",
        edit(SwinRenorm.renorm_after, "(layer + 1) % every", "layer % every"),
        "swin",
    ),
    Mutation(
        "renorm_first",
        "the re-norm before its block instead of after",
        edit(Block.steps, YIELD + RENORM, RENORM.lstrip() + "\n        " + YIELD),
        "swin",
    ),
    Mutation(
        "mlp_first",
        "the MLP before attention",
        edit(
            Block.steps, YIELD, 'yield "mlp", self.mlp\n        yield "attention", self.attention'
        ),
    ),
    Mutation(
        "lns_without_root",
        "LayerNorm Scaling by 1/l instead of 1/√l",
        edit(LNS.step, "math.sqrt(self.layer + 1)", "(self.layer + 1)"),
        "lns",
    ),
    Mutation(
        "lns_from_0",
        "LayerNorm Scaling with the block counted from 0",
        edit(LNS.step, "self.layer + 1", "max(self.layer, 1)"),
        "lns",
    ),
    Mutation(
        "deepnorm_alpha",
        "DeepNorm's α of L instead of 2L",
        edit(DeepNorm.alpha_of, "(2 * config.depth)", "config.depth"),
        "deepnorm",
    ),
    Mutation(
        "residual_scale_beta",
        "β² = 2/L: sublayers taken for blocks",
        edit(ResidualScale.alpha_of, "1 / config.depth", "2 / config.depth"),
        "residual_scale",
    ),
    Mutation(
        "peri_without_norm_in",
        "a sandwich without its first slice",
        edit(Peri.step, "F(norm_in(x))", "F(x)"),
        "peri",
    ),
)
