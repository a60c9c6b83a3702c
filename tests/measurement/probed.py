"""Tiny models that are probed, somebody's own among them, and what a row is by definition."""

import pytest
import torch
import transformers
from conftest import CHECKPOINT, PARITY
from torch import nn

from simlab import ConfigError, Sublayer, probe

IDS = torch.randint(1, 61, (3, 11), generator=torch.Generator().manual_seed(0))
KINDS = ["Olmo2", "Olmo3", "Llama", "Qwen3", "Gemma2", "Gemma3"]
SAME = ["Olmo", "Mistral", "Qwen2", "Gemma"]  # which are laid out as some of these
SHAPE = CHECKPOINT | {"num_hidden_layers": 3, "head_dim": 8}


def perturbed(model):
    """Gains away from 1, weights large enough for attention to matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.15)
    return model.eval()


def theirs(kind, head="ForCausalLM", **changes):
    """A tiny model of transformers, its norms' eps large enough to be seen."""
    config = {"Gemma3": "Gemma3TextConfig"}.get(kind, f"{kind}Config")
    config = getattr(transformers, config)(**SHAPE | {"rms_norm_eps": 0.03} | changes)
    return perturbed(getattr(transformers, kind + head)(config))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def values(row):
    """One row's statistics, each by its definition."""
    x = row["after"].double()
    numbers = {
        "norm": x.norm(dim=-1).mean(),
        "mean_square": x.pow(2).mean(),
        "variance": x.var(),
        "mean": x.mean(),
        "mean_abs": x.abs().mean(),
        "max_abs": x.abs().max(),
    }
    if "skip" in row:
        a, b, raw = (row[name].double() for name in ("skip", "branch", "raw"))
        norm = row["norm"]
        numbers |= {
            "branch_mean_square": b.pow(2).mean(),
            "branch_raw_mean_square": raw.pow(2).mean(),
            "cosine": torch.cosine_similarity(a, b, dim=-1).mean(),
            "delta_branch": b.pow(2).sum(-1).mean(),
            "delta_cross": 2 * (a * b).sum(-1).mean(),
        }
        if hasattr(norm, "weight"):
            moment = raw.pow(2).mean(-1)
            eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
            gain = norm.weight.double() + ("Gemma" in type(norm).__name__)
            numbers |= {
                "eps_factor": (moment / (moment + eps)).mean(),
                "gain_mean_square": gain.pow(2).mean(),
                "gain_max_abs": gain.abs().max(),
            }
    if row.get("weights") is not None:
        a = row["weights"].double()
        numbers["attention_entropy"] = -(a * a.clamp(min=1e-30).log()).sum(-1).mean()
        numbers["attention_first"] = a[:, :, 1:, 0].mean()
    return {"kind": row["kind"]} | {name: value.item() for name, value in numbers.items()}


def assert_same(frame, expected, columns):
    """PARITY, with atol in units of each column's largest value (≥ 1)."""
    assert frame["kind"].tolist() == expected["kind"].tolist()
    for column in columns:
        a, b = (torch.tensor(f[column].to_numpy(float)) for f in (frame, expected))
        atol = PARITY["atol"] * max(1.0, b.abs().nan_to_num().max().item())
        close = {"rtol": PARITY["rtol"], "atol": atol, "equal_nan": True}
        torch.testing.assert_close(a, b, **close, msg=lambda m, c=column: f"{c}: {m}")


def refused(model, batch=IDS, **options):
    with pytest.raises(ConfigError) as error:
        probe(model, batch, **options).rows()
    assert "\n" not in str(error.value)
    assert hooks(model) == 0
    return str(error.value)


class OwnBlock(nn.Module):
    """One of the ways to add up attention and MLP."""

    def __init__(self, how, width=32):
        super().__init__()
        self.how = how
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=0.03), nn.LayerNorm(width, eps=0.03)
        self.attn = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def attend(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.attn(x, x, x, attn_mask=mask, average_attn_weights=False)[0]

    def forward(self, x):
        if self.how == "parallel":
            return x + self.attend(self.ln_1(x)) + self.mlp(self.ln_2(x))
        if self.how == "post":
            x = self.ln_1(x + self.attend(x))
            return self.ln_2(x + self.mlp(x))
        if self.how == "in place":
            x += self.attend(self.ln_1(x))
            x += self.mlp(self.ln_2(x))
            return x
        x = x + self.attend(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Own(nn.Module):
    """Embedding and blocks in ``h``, as GPT-2 names them."""

    def __init__(self, how="pre"):
        super().__init__()
        self.wte = nn.Embedding(61, 32)
        self.h = nn.ModuleList(OwnBlock(how) for _ in range(3))

    def forward(self, ids):
        x = self.wte(ids)
        for block in self.h:
            x = block(x)
        return x


GPT2 = (
    Sublayer("attention", raw="attn", sum="ln_2", norm="ln_1"),
    Sublayer("mlp", raw="mlp", norm="ln_2"),
)
POST = (
    Sublayer("attention", raw="attn", sum="ln_1", norm="ln_1"),
    Sublayer("mlp", raw="mlp", sum="ln_2", norm="ln_2"),
)
PARALLEL = (Sublayer("parallel", raw=("attn", "mlp"), norm="ln_1"),)
OWN = {"pre": GPT2, "in place": GPT2, "post": POST, "parallel": PARALLEL}

ATTENTION, FEED_FORWARD = "post_attention_layernorm", "post_feedforward_layernorm"
REORDERED = (
    Sublayer("attention", "self_attn", branch=ATTENTION, sum="mlp", norm=ATTENTION),
    Sublayer("mlp", "mlp", branch=FEED_FORWARD, norm=FEED_FORWARD),
)
PRE = (
    Sublayer("attention", "self_attn", sum=ATTENTION, norm="input_layernorm"),
    Sublayer("mlp", "mlp", norm=ATTENTION),
)
PERI = (
    Sublayer("attention", "self_attn", ATTENTION, "pre_feedforward_layernorm", ATTENTION),
    REORDERED[1],
)
LAYOUTS = {"Olmo2": REORDERED, "Olmo3": REORDERED, "Llama": PRE, "Qwen3": PRE} | {
    "Gemma2": PERI, "Gemma3": PERI,
}  # fmt: skip
