"""Causal self-attention with grouped heads, QK-norm, RoPE and an optional sliding window.

Shape suffixes: B batch, T tokens, D d_model, H query heads, K key/value heads, C head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from simlab.config import ModelConfig
from simlab.model.norms import NORMS
from simlab.schemes.rope import inverse_frequencies

HEADS_AT_ONCE = 1 << 24  # entries of attention matrices that the statistics hold at a time
Linear = Callable[[int, int, bool], nn.Module]  # arguments: d_in, d_out, bias


def rotate(x_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864) on halves: pair i is (x_i, x_{i+R/2}); float32, cast back.

    R channels of cos and sin: the first of C. The others stay.
    """
    rest = x_BHTC[..., cos_TC.shape[-1] :]
    x_BHTC = x_BHTC[..., : cos_TC.shape[-1]]
    first, second = x_BHTC.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    out = (x_BHTC.float() * cos_TC + turned * sin_TC).to(x_BHTC.dtype)
    return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out


class Attend(nn.Module):
    """softmax(QKᵀ/s)·V, as a module of its own so that hooks can read attention's inputs.

    divisor: s; None: √C. softcap: c, logits l become c·tanh(l/c) (Gemma 2, arXiv 2408.00118, §2).
    """

    def __init__(self, divisor: float | None = None, softcap: float | None = None) -> None:
        super().__init__()
        self.divisor, self.softcap = divisor, softcap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, T, C) each to the same; mask (T, T), True where a query may look; None: causal."""
        if self.softcap is not None:
            return self._capped(q, k, v, mask, self.softcap)
        scale = None if self.divisor is None else 1 / self.divisor
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
        )

    def _capped(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, c: float) -> Tensor:
        """torch's attention has no cap, so the matrices are made, of some heads at a time."""
        length = q.shape[2]
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        step = max(1, HEADS_AT_ONCE // (len(q) * length * length))
        divisor, out = self.divisor or q.shape[3] ** 0.5, []
        for some in (slice(a, a + step) for a in range(0, q.shape[1], step)):
            logits = torch.tanh(q[:, some] @ k[:, some].mT / (divisor * c)) * c
            weights = logits.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32)
            out.append(weights.to(v.dtype) @ v[:, some])
        return torch.cat(out, 1)


class Attention(nn.Module):
    """softmax(causal(QKᵀ/√C))·V, then the output projection (OLMo 2, arXiv 2501.00656).

    QK-norm: ``full`` normalises the whole projection, all heads together, before the head split
    and RoPE (OLMo 2); ``per_head`` each head by itself (Qwen 3); ``none``. ``v_norm`` normalises each
    head's values (HybridNorm, arXiv 2503.04598).

    Output gate: o ← o·sigmoid(W_g x) before the output projection, x what q, k and v are made of
    (arXiv 2505.06708, §2.3; qiuzh20/gated_attention). ``elementwise`` has a gate for each entry, as in
    Qwen3-Next, where W_g is the other half of a doubled q_proj; ``per_head`` one for each head.

    Value embedding: v ← W_v x + g·E[token], E (vocabulary, K·C) the layer's own, before ``v_norm`` and
    never turned by RoPE (karpathy/nanochat, ``gpt.py``; the idea is modded-nanogpt's). In nanochat
    g = 3·sigmoid(w·x[:12]) of each key/value head with w uniform on (0, 0.02): at init 1.5 ± 2 % for x
    of rms 1. Here g is the constant ``value_embedding_scale``.
    """

    def __init__(self, config: ModelConfig, layer: int, linear: Linear) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.qk_norm, self.turned = config.qk_norm, config.turned
        self.window = config.window_of(layer)
        self.rope = config.rope_of(local=self.window is not None)
        q_dim, kv_dim = self.heads * self.head_dim, self.kv_heads * self.head_dim
        bias = config.bias or config.qkv_bias
        self.q_proj = linear(config.width, q_dim, bias)
        self.k_proj = linear(config.width, kv_dim, bias)
        self.v_proj = linear(config.width, kv_dim, bias)
        self.gates = config.gates
        if self.gates:
            self.g_proj = linear(config.width, self.gates, config.bias)
        self.embeds_values = config.embeds_values(layer)
        if self.embeds_values:
            # Zeros: on meta nn.Embedding's own init makes torch import its compiler, 80 MB.
            rows = torch.zeros(config.vocab_size, kv_dim)
            self.value_embedding = nn.Embedding.from_pretrained(rows, freeze=False)
            self.value_scale = config.value_embedding_scale
        self.o_proj = linear(q_dim, config.width, config.bias)
        divisor = config.query_divisor if config.query_pre_attn_scalar else None
        self.attend = Attend(divisor, config.attention_softcap)
        if self.qk_norm != "none":
            norm = NORMS[config.norm.head_type]
            per_head = self.qk_norm == "per_head"
            self.q_norm = norm(self.head_dim if per_head else q_dim, config.norm.eps)
            self.k_norm = norm(self.head_dim if per_head else kv_dim, config.norm.eps)
        if config.v_norm:
            self.v_norm = NORMS[config.norm.head_type](self.head_dim, config.norm.eps)
        self.norms_values = config.v_norm

    def forward(self, x_BTD: Tensor, ids: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D). ids (B, T): of the tokens, which a value embedding needs."""
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if self.embeds_values:
            if ids is None:
                raise ValueError(
                    "a layer with a value embedding needs token ids: block(state, ids)"
                )
            v = v + self.value_scale * self.value_embedding(ids)
        gate_BTG = torch.sigmoid(self.g_proj(x_BTD)) if self.gates else None
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BHTC, k_BKTC, v_BKTC = (
            p.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (q, k, v)
        )
        if self.qk_norm == "per_head":
            q_BHTC, k_BKTC = self.q_norm(q_BHTC), self.k_norm(k_BKTC)
        if self.norms_values:
            v_BKTC = self.v_norm(v_BKTC)
        cos_TC, sin_TC = self._angles(x_BTD.shape[1], x_BTD.device)
        q_BHTC, k_BKTC = rotate(q_BHTC, cos_TC, sin_TC), rotate(k_BKTC, cos_TC, sin_TC)
        shared = self.heads // self.kv_heads  # query heads h·shared … share key/value head h
        if shared > 1:
            k_BKTC, v_BKTC = (p.repeat_interleave(shared, dim=1) for p in (k_BKTC, v_BKTC))
        mask = self._window_mask(x_BTD.shape[1], x_BTD.device)
        o_BHTC = self.attend(q_BHTC, k_BKTC, v_BKTC, mask)
        o_BTHC = o_BHTC.transpose(1, 2)
        if gate_BTG is not None:
            o_BTHC = o_BTHC * gate_BTG.unflatten(-1, (self.heads, -1))
        out: Tensor = self.o_proj(o_BTHC.flatten(2))
        return out

    def _angles(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        pairs = torch.arange(self.turned // 2, dtype=torch.float32, device=device)
        angles, factor = inverse_frequencies(pairs, self.turned, *self.rope)
        positions = torch.arange(length, dtype=torch.float32, device=device)
        angles_TC = torch.outer(positions, angles).repeat(1, 2)
        return angles_TC.cos() * factor, angles_TC.sin() * factor

    def _window_mask(self, length: int, device: torch.device) -> Tensor | None:
        """True where query t may see key s: t − window < s ≤ t. None: plain causal does."""
        if self.window is None or length <= self.window:
            return None
        t = torch.arange(length, device=device)
        back = t[:, None] - t[None, :]
        return (back >= 0) & (back < self.window)
