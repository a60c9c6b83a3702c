import math

import pytest
import torch
from conftest import PARITY, tiny, write_olmo

from simlab import build_model, compose
from simlab.config import YarnConfig
from simlab.model.attention import Attention, inverse_frequencies, rotate
from simlab.model.transformer import dense_linear


def attention(*overrides, layer=0):
    torch.manual_seed(0)
    return Attention(tiny(*overrides).shape, layer, dense_linear)


def test_causal_and_position_dependent():
    module, x = attention(), torch.randn(1, 9, 48)
    changed = x.clone()
    changed[0, 5] += 1
    before, after = module(x), module(changed)
    assert torch.equal(before[0, :5], after[0, :5])
    assert (before[0, 5:] != after[0, 5:]).any(-1).all()
    same = module(torch.ones(1, 1, 48).repeat(1, 9, 1) * x[0, 0])
    torch.testing.assert_close(
        same[0, 8], same[0, 0], **PARITY
    )  # all values equal: no position left


@pytest.mark.parametrize("window", [1, 3, 8, 9, 50])
def test_window_against_loops(window):
    """A query sees itself and window − 1 tokens back; with plain loops over heads and positions."""
    module = attention(f"model.window={window}", "model.qk_norm=none")
    x = torch.randn(1, 9, 48)
    q, k, v = (p(x)[0].view(9, -1, 8) for p in (module.q_proj, module.k_proj, module.v_proj))
    cos, sin = module._angles(9, x.device)
    out = torch.zeros(9, 6, 8)
    for h in range(6):
        for t in range(9):
            seen = range(max(0, t - window + 1), t + 1)
            turned = rotate(q[t, h][None], cos[t], sin[t])[0]
            keys = [rotate(k[s, h // 3][None], cos[s], sin[s])[0] for s in seen]
            weights = torch.stack([turned @ key for key in keys]).div(math.sqrt(8)).softmax(0)
            out[t, h] = sum(w * v[s, h // 3] for w, s in zip(weights, seen, strict=True))
    torch.testing.assert_close(module(x)[0], module.o_proj(out.view(9, 48)), **PARITY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rope_rounds_once(dtype):
    """In half precision: angles and rotation in float64 here, rounded to the dtype at the end.

    A bfloat16 position is a multiple of 2 beyond 256, and a product of 8 digits that is rounded before
    the sum is off by a step in every third number. Of float32's ties 1 in 1000 may fall elsewhere.
    """
    module = attention("model.qk_norm=none").to(dtype)
    x, seen = torch.randn(1, 600, 48).to(dtype), []
    module.attend.register_forward_pre_hook(lambda m, arguments: seen.extend(arguments[:2]))
    module(x)
    rates = 500_000.0 ** -(torch.arange(4).double() / 4)
    turn = torch.polar(
        torch.ones(600, 4).double(), torch.outer(torch.arange(600.0).double(), rates)
    )
    for found, project, heads in zip(seen, (module.q_proj, module.k_proj), (6, 2), strict=True):
        plain = project(x).view(1, 600, heads, 8).transpose(1, 2).double()
        turned = torch.complex(plain[..., :4], plain[..., 4:]) * turn
        expected = torch.cat([turned.real, turned.imag], -1).to(dtype)
        expected = expected.repeat_interleave(6 // heads, 1)
        assert (found != expected).float().mean() < 1e-3


def test_rope_is_relative():
    """⟨R_t q, R_s k⟩ depends on t − s alone."""
    module = attention()
    cos, sin = module._angles(40, torch.device("cpu"))
    q, k = torch.randn(2, 1, 8)
    dots = [
        (rotate(q, cos[t], sin[t]) * rotate(k, cos[t - 7], sin[t - 7])).sum() for t in (7, 20, 39)
    ]
    torch.testing.assert_close(dots[0], dots[1], **PARITY)
    torch.testing.assert_close(dots[0], dots[2], **PARITY)


@pytest.mark.parametrize("factor", [None, 1.3])
def test_yarn_against_transformers(factor):
    """The released OLMo-3 values, head_dim 128."""
    from transformers import Olmo3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "yarn", "rope_theta": 500_000.0, "factor": 8.0, "beta_fast": 32.0,
        "beta_slow": 1.0, "original_max_position_embeddings": 8192, "attention_factor": factor,
    }  # fmt: skip
    plain = {"rope_type": "default", "rope_theta": 500_000.0}
    config = Olmo3Config(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=65536,
        rope_parameters={"full_attention": scaling, "sliding_attention": plain},
    )  # fmt: skip
    angles, scale = ROPE_INIT_FUNCTIONS["yarn"](config, layer_type="full_attention")
    ours = inverse_frequencies(
        128, 500_000.0, YarnConfig(8.0, 8192, 32.0, 1.0, factor), torch.device("cpu")
    )
    torch.testing.assert_close(ours[0], angles, rtol=1e-6, atol=0)
    assert ours[1] == pytest.approx(scale, rel=1e-12)
    preset = compose(["model=olmo3_7b"]).shape
    assert preset.yarn == YarnConfig(8.0, 8192, 32.0, 1.0, None)


def test_per_head_qk_norm_against_qwen3():
    """Qwen 3's attention norms each head by itself."""
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

    config = Qwen3Config(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
        rms_norm_eps=1e-3, attention_bias=False, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = Qwen3Attention(config, 0).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.2)
    ours = attention("model.qk_norm=per_head", "norm.eps=1e-3")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 48)
    angles = Qwen3RotaryEmbedding(config)(x, torch.arange(9)[None])
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    torch.testing.assert_close(ours(x), theirs(x, angles, mask)[0], **PARITY)


def test_full_qk_norm_is_not_per_head():
    """Negative control: the two agree only where every head has the same norm."""
    full, per_head = attention("model.qk_norm=full"), attention("model.qk_norm=per_head")
    per_head.load_state_dict(
        full.state_dict()
        | per_head.q_norm.state_dict(prefix="q_norm.")
        | per_head.k_norm.state_dict(prefix="k_norm.")
    )
    x = torch.randn(1, 9, 48)
    assert (full(x) - per_head(x)).abs().max() > 1e-3 * full(x).abs().max()


def test_attention_output_mean_square_at_init():
    """Block-0 attention before its norm: m = (dσ²)²·σ_e²·(e/n + 1/d) at position n.

    FACTS-style closed form for embeddings that all differ; the e/n is n·Σa² ≈ e of a softmax over
    n unit-variance logits. 10 %: e^{1−ρ} is an n → ∞ formula, n is 100 to 128 here, and the head
    count (64 dims each) makes the logits' variance fluctuate.
    """
    config = compose(["width=1024", "heads=16", "kv_heads=16", "depth=1", "vocab_size=512"])
    seeds, m = 4, []
    for seed in range(seeds):
        model = build_model(config, "cpu", seed=seed)
        ids = torch.randperm(512, generator=torch.Generator().manual_seed(seed)).view(4, 128)
        with torch.no_grad():
            raw = model.blocks[0].attention.sublayer(model.embedding(ids))
        m.append(raw.pow(2).mean(-1)[:, 99:].mean().item())
    s2 = (0.02 * 0.986578) ** 2
    n = torch.arange(100, 129).double()
    expected = ((1024 * s2) ** 2 * s2 * (math.e / n + 1 / 1024)).mean().item()
    assert sum(m) / seeds == pytest.approx(expected, rel=0.1)


def test_checkpoint_window_is_used(tmp_path):
    """Negative control for the parity tests: without the window OLMo-3's states differ."""
    write_olmo(tmp_path / "m", kind="Olmo3", sliding_window=4)
    model = build_model(compose(["source=checkpoint", f"source.path={tmp_path / 'm'}"]))
    ids = torch.arange(23)[None]
    before = model(ids)
    for block in model.blocks:
        block.attention.sublayer.window = None
    assert (model(ids) - before).abs().max() > 1e-2
