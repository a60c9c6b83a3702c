"""Mistakes in attention and the MLP."""

from __future__ import annotations

from simlab.model.attention import Attend, Attention, rotate
from simlab.model.mlp import GatedMLP
from simlab.schemes.rope import inverse_frequencies

from .record import Edit, Mutation, edit

PROJECT = "self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)"
QK_NORM = "q, k = self.q_norm(q), self.k_norm(k)"
ROTATE = "rotate(q_BHTC, cos_TC, sin_TC), rotate(k_BKTC, cos_TC, sin_TC)"
REPEAT = "p.repeat_interleave(shared, dim=1)"
SPLIT = "p.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)"
MERGE = "o_BTHC = o_BHTC.transpose(1, 2)"
SDPA = "nn.functional.scaled_dot_product_attention("
SCALE = "scale=scale"
MASK = f"attn_mask=mask, is_causal=mask is None, {SCALE}"
GATED = "self.activate(self.gate_proj(x_BTD)) * self.up_proj(x_BTD)"

ATTENTION = (
    Mutation(
        "k_v_swapped",
        "k and v take each other's projection",
        edit(
            Attention.forward, PROJECT, "self.q_proj(x_BTD), self.v_proj(x_BTD), self.k_proj(x_BTD)"
        ),
        same="both matrices are i.i.d. of one law",
    ),
    Mutation(
        "q_k_swapped",
        "q and k take each other's projection",
        edit(
            Attention.forward, PROJECT, "self.k_proj(x_BTD), self.q_proj(x_BTD), self.v_proj(x_BTD)"
        ),
        "ungrouped",
        same="both matrices are i.i.d. of one law",
    ),
    Mutation("qk_norm_forgotten", "no QK-norm", edit(Attention.forward, QK_NORM, "pass")),
    Mutation(
        "k_norm_forgotten",
        "QK-norm on q alone",
        edit(Attention.forward, QK_NORM, "q = self.q_norm(q)"),
    ),
    Mutation(
        "qk_norm_per_head",
        "QK-norm over each head instead of all of them",
        edit(
            Attention.forward,
            QK_NORM,
            "q, k = (n.weight * nn.functional.rms_norm(p.unflatten(-1, (-1, self.head_dim)),"
            " (self.head_dim,), None, n.eps).flatten(-2)"
            " for n, p in ((self.q_norm, q), (self.k_norm, k)))",
        ),
    ),
    Mutation(
        "qk_norm_after_rope",
        "QK-norm after RoPE",
        (
            Edit(Attention.forward, QK_NORM, "pass"),
            Edit(
                Attention.forward,
                ROTATE,
                "(n(rotate(p, cos_TC, sin_TC).transpose(1, 2).flatten(2))"
                ".unflatten(-1, (-1, self.head_dim)).transpose(1, 2)"
                " for n, p in ((self.q_norm, q_BHTC), (self.k_norm, k_BKTC)))",
            ),
        ),
        same="a rotation keeps the root mean square, and gains are 1",
    ),
    Mutation(
        "v_normed",
        "QK-norm on v too",
        edit(
            Attention.forward, QK_NORM, "q, k, v = self.q_norm(q), self.k_norm(k), self.k_norm(v)"
        ),
    ),
    Mutation(
        "rope_forgotten",
        "no RoPE",
        edit(rotate, "x_BHTC.float() * cos_TC + turned * sin_TC", "x_BHTC.float()"),
        "rope",
    ),
    Mutation(
        "rope_on_q_alone",
        "keys aren't turned",
        edit(Attention.forward, ROTATE, "rotate(q_BHTC, cos_TC, sin_TC), k_BKTC"),
        "rope",
    ),
    Mutation(
        "rope_on_v",
        "values are turned too",
        edit(Attention.forward, ROTATE, ROTATE + "; v_BKTC = rotate(v_BKTC, cos_TC, sin_TC)"),
        "rope",
    ),
    Mutation(
        "rope_key_off_by_one",
        "keys turn by the next position's angle",
        edit(
            Attention.forward,
            ROTATE,
            "rotate(q_BHTC, cos_TC, sin_TC), rotate(k_BKTC, *(a[1:] for a in"
            " self._angles(x_BTD.shape[1] + 1, x_BTD.device)))",
        ),
        "rope_whole",
        same="one rotation of all keys, whose rows are Gaussian, uncut: it leaves their law",
    ),
    Mutation(
        "rope_backwards",
        "RoPE turns the other way",
        edit(rotate, "(-second, first)", "(second, -first)"),
        "rope",
        same="as if half of q's and k's rows had changed sign, and they are symmetric",
    ),
    Mutation(
        "rope_interleaved",
        "RoPE on pairs (2i, 2i + 1) instead of halves",
        (
            Edit(
                rotate,
                "torch.cat((-second, first), dim=-1)",
                "torch.stack((-x_BHTC[..., 1::2], x_BHTC[..., ::2]), -1).flatten(-2)",
            ),
            Edit(Attention._angles, ".repeat(1, 2)", ".repeat_interleave(2, 1)"),
        ),
        "rope",
        same="another order of q's and k's rows, which are i.i.d.",
    ),
    Mutation(
        "rope_pairs_mixed",
        "RoPE on pairs (2i, 2i + 1), but with the angles of halves",
        edit(
            rotate,
            "torch.cat((-second, first), dim=-1)",
            "torch.stack((-x_BHTC[..., 1::2], x_BHTC[..., ::2]), -1).flatten(-2)",
        ),
        "rope",
    ),
    Mutation(
        "rope_frequency_off_by_one",
        "RoPE's pairs counted from 1",
        edit(inverse_frequencies, "(2 * pairs / head_dim)", "(2 * (pairs + 1) / head_dim)"),
        "rope",
    ),
    Mutation(
        "rope_theta_default",
        "theta 10 000, whatever the config says",
        edit(inverse_frequencies, "1.0 / theta **", "1.0 / 10_000.0 **"),
        "rope",
    ),
    Mutation(
        "gqa_order",
        "key/value heads repeated as 0 1 0 1 instead of 0 0 1 1",
        edit(Attention.forward, REPEAT, "p.repeat(1, shared, 1, 1)"),
        same="query heads in another order: q's rows and o's columns are i.i.d.",
    ),
    Mutation(
        "heads_merged_without_transpose",
        "heads and tokens mixed up after attention",
        edit(
            Attention.forward,
            MERGE,
            "o_BTHC = o_BHTC.reshape(*x_BTD.shape[:2], -1, self.head_dim)",
        ),
    ),
    Mutation(
        "heads_split_without_transpose",
        "heads and tokens mixed up before attention",
        edit(Attention.forward, SPLIT, "p.reshape(len(p), -1, p.shape[1], self.head_dim)"),
    ),
    Mutation(
        "causal_mask_missing",
        "every token sees every other",
        edit(Attend.forward, "is_causal=mask is None", "is_causal=False"),
    ),
    Mutation(
        "mask_strict",
        "a token doesn't see itself",
        edit(Attend.forward, MASK, "torch.ones(2 * q.shape[2:3]).tril(-1).bool()"),
    ),
    Mutation(
        "mask_next_seen",
        "a token sees the next one",
        edit(Attend.forward, MASK, "torch.ones(2 * q.shape[2:3]).tril(1).bool()"),
        "active",
    ),
    Mutation(
        "mask_added",
        "ones and zeros as a float mask: added to the logits, nothing is hidden",
        edit(Attend.forward, MASK, "torch.ones(2 * q.shape[2:3]).tril()"),
    ),
    Mutation(
        "softmax_over_queries",
        "softmax over the wrong axis",
        edit(
            Attend.forward,
            SDPA,
            "(lambda q, k, v, attn_mask, is_causal, scale: (q @ k.mT / q.shape[-1] ** 0.5)"
            ".masked_fill(torch.ones(2 * q.shape[2:3]).triu(1).bool(), -torch.inf)"
            ".softmax(-2) @ v)(",
        ),
    ),
    Mutation(
        "scale_forgotten",
        "logits without 1/√head_dim",
        edit(Attend.forward, SCALE, "scale=1.0"),
    ),
    Mutation(
        "scale_twice",
        "logits times 1/√head_dim twice",
        edit(Attend.forward, SCALE, "scale=1 / q.shape[-1]"),
    ),
    Mutation(
        "scale_by_width",
        "logits times 1/√d_model",
        edit(Attend.forward, SCALE, "scale=(q.shape[1] * q.shape[-1]) ** -0.5"),
    ),
    Mutation(
        "dropout_left_on",
        "attention dropout of 10 %, as if training",
        edit(Attend.forward, MASK, MASK + ", dropout_p=0.1"),
        "active",
    ),
    Mutation(
        "window_off_by_one",
        "a window of 3 sees 4 tokens",
        edit(Attention._window_mask, "back < self.window", "back <= self.window"),
        "window",
    ),
)

MLP = (
    Mutation(
        "gate_up_swapped",
        "silu on up instead of gate",
        edit(
            GatedMLP.forward,
            GATED,
            "self.gate_proj(x_BTD) * self.activate(self.up_proj(x_BTD))",
        ),
        same="both matrices are i.i.d. of one law",
    ),
    Mutation(
        "gelu",
        "GELU for SiLU",
        edit(GatedMLP.forward, "self.activate", "nn.functional.gelu"),
        "active",
    ),
    Mutation("gate_without_silu", "no activation", edit(GatedMLP.forward, "self.activate", "")),
    Mutation(
        "silu_on_product",
        "silu(gate · up)",
        edit(
            GatedMLP.forward,
            GATED,
            "self.activate(self.gate_proj(x_BTD) * self.up_proj(x_BTD))",
        ),
        "active",
    ),
)

NO_MISTAKE = Mutation(
    "rope_from_1",
    "RoPE's positions counted from 1",
    edit(Attention._angles, "torch.arange(length,", "1 + torch.arange(length,"),
    "rope",
    same="only differences of positions enter",
)
