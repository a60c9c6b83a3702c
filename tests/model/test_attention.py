import math

import pytest
import torch
from conftest import PARITY, tiny

from simlab import compose
from simlab.config import YarnConfig
from simlab.model.attention import Attention, rotate
from simlab.model.transformer import dense_linear
from simlab.schemes.rope import inverse_frequencies


def attention(*overrides, layer=0):
    torch.manual_seed(0)
    return Attention(tiny(*overrides).shape, layer, dense_linear)


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
    for ours, project, heads in zip(seen, (module.q_proj, module.k_proj), (6, 2), strict=True):
        plain = project(x).view(1, 600, heads, 8).transpose(1, 2).double()
        turned = torch.complex(plain[..., :4], plain[..., 4:]) * turn
        expected = torch.cat([turned.real, turned.imag], -1).to(dtype)
        expected = expected.repeat_interleave(6 // heads, 1)
        assert (ours != expected).float().mean() < 1e-3


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
    yarn = YarnConfig(8.0, 8192, 32.0, 1.0, factor)
    ours = inverse_frequencies(torch.arange(64.0), 128, 500_000.0, yarn)
    torch.testing.assert_close(ours[0], angles, rtol=1e-6, atol=0)
    assert ours[1] == pytest.approx(scale, rel=1e-12)
    preset = compose(["model=olmo3_7b"]).shape
    assert preset.yarn == YarnConfig(8.0, 8192, 32.0, 1.0, None)
