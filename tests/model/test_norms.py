import pytest
import torch
from conftest import PARITY

from simlab.model.norms import NORMS, LayerNorm, RMSNorm


def rms(x, g, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * g


def layer(x, g, eps):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * g


@pytest.mark.parametrize(("kind", "formula"), [("rms", rms), ("layer", layer)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_formula(kind, formula, scale):
    torch.manual_seed(0)
    norm = NORMS[kind](24, 1e-3)
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    x = scale * torch.randn(2, 5, 24) + 0.3 * scale
    torch.testing.assert_close(
        norm(x).double(), formula(x.double(), norm.weight.double(), 1e-3), **PARITY
    )


@pytest.mark.parametrize("norm", [RMSNorm(64, 0.02), LayerNorm(64, 0.02)])
def test_moment_gives_the_output_mean_square(norm):
    """With gain 1 the output's mean square (variance, for LayerNorm) is m / (m + eps)."""
    torch.manual_seed(0)
    x = 0.1 * torch.randn(50, 64).double()
    m = norm.moment(x)
    torch.testing.assert_close(norm(x.float()).pow(2).mean(-1).double(), m / (m + 0.02), **PARITY)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arithmetic_is_float32(kind, dtype):
    """1000² overflows float16, and its bfloat16 sum would lose three digits."""
    norm = NORMS[kind](512, 1e-6).to(dtype)
    x = (1000 * torch.randn(4, 512, generator=torch.Generator().manual_seed(0))).to(dtype)
    exact = NORMS[kind](512, 1e-6).double()(x.double())
    assert norm(x).dtype is dtype
    assert torch.equal(norm(x), NORMS[kind](512, 1e-6)(x.float()).to(dtype))
    torch.testing.assert_close(norm(x).double(), exact.double(), rtol=2**-7, atol=1e-5)
