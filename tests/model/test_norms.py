import pytest
import torch
from conftest import PARITY

from simlab.config import ELEMENTWISE
from simlab.model.norms import NORMS


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


def test_a_norms_bias():
    torch.manual_seed(0)
    norm, theirs = NORMS["layer_bias"](24, 1e-3), torch.nn.LayerNorm(24, 1e-3)
    torch.nn.init.uniform_(theirs.weight, 0.5, 2)
    torch.nn.init.normal_(theirs.bias)
    norm.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 5, 24) + 0.3
    torch.testing.assert_close(norm(x), theirs(x), **PARITY)


def test_a_gain_of_one_plus_its_parameter():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    torch.manual_seed(0)
    norm, theirs = NORMS["rms_plus_one"](24, 1e-3), Gemma3RMSNorm(24, 1e-3)
    assert torch.equal(norm.weight, theirs.weight)  # both begin with the gain 1
    torch.nn.init.normal_(theirs.weight)
    norm.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(norm(x), theirs(x), **PARITY)
    assert torch.equal(norm.gain, 1 + theirs.weight)


@pytest.mark.parametrize(("kind", "formula"), [("rms", rms), ("layer", layer)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(kind, formula, dtype):
    """The result is the exact one, rounded: the gain multiplies before the cast.

    1000² overflows float16; a second rounding, of the normed x before its gain, moves every third
    number or so by a step. float32 may round to the other side of a tie: 1 in 1000 is allowed.
    """
    torch.manual_seed(0)
    norm = NORMS[kind](512, 1e-6)
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    norm, x = norm.to(dtype), (1000 * torch.randn(40, 512)).to(dtype)
    exact = formula(x.double(), norm.weight.double(), 1e-6).to(dtype)
    assert norm(x).dtype is dtype
    assert (norm(x) != exact).float().mean() < 1e-3
    torch.testing.assert_close(norm(x), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(("kind", "formula"), [("rms", rms), ("layer", layer)])
@pytest.mark.parametrize("scale", [1e3, 1e16, 1e19, 1e37])
def test_large_inputs(kind, formula, scale):
    """Output and gradient, also where float32 can't hold the squares (from 1.8e19 on)."""
    torch.manual_seed(0)
    norm = NORMS[kind](24, 1e-3)
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    x = (scale * (torch.randn(2, 5, 24) + 0.3)).requires_grad_()
    g = torch.randn_like(x)
    y = norm(x)
    exact = x.detach().double().requires_grad_()
    truth = formula(exact, norm.weight.detach().double(), 1e-3)
    torch.testing.assert_close(y.double(), truth, **PARITY)
    (gradient,) = torch.autograd.grad(y, x, g)
    (true_gradient,) = torch.autograd.grad(truth, exact, g.double())
    torch.testing.assert_close(scale * gradient.double(), scale * true_gradient, **PARITY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_element_wise_norms(dtype):
    """DyT and Derf written out, in float64; in bfloat16 rounded once."""
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 5, 24)).to(dtype)
    for kind, function in (("dyt", torch.tanh), ("derf", torch.erf)):
        norm = NORMS[kind](24, 1e-3).to(dtype)
        shapes = {name: tuple(value.shape) for name, value in norm.named_parameters()}
        numbers = {"alpha": (1,), "shift": (1,)} if kind == "derf" else {"alpha": (1,)}
        assert shapes == {"weight": (24,), "bias": (24,), **numbers}
        for value in norm.parameters():
            torch.nn.init.uniform_(value, 0.3, 0.9)
        p = {name: value.detach().double() for name, value in norm.named_parameters()}
        inner = p["alpha"] * x.double() + p.get("shift", 0.0)
        exact = (p["weight"] * function(inner) + p["bias"]).to(dtype)
        tolerance = PARITY if dtype is torch.float32 else {"rtol": 2**-7, "atol": 0.0}
        torch.testing.assert_close(norm(x), exact, **tolerance)


@pytest.mark.parametrize("kind", sorted(set(NORMS) - set(ELEMENTWISE)))
def test_a_large_token_changes_no_other(kind):
    """To the bit; and a token with an infinite entry stays one that isn't finite."""
    torch.manual_seed(0)
    norm, x = NORMS[kind](24, 1e-3), torch.randn(5, 24)
    alone = norm(x)
    x[2] *= 1e30
    x[3, 5] = torch.inf
    beside = norm(x)
    assert torch.equal(beside[[0, 1, 4]], alone[[0, 1, 4]])
    torch.testing.assert_close(beside[2], alone[2], rtol=1e-2, atol=1e-2)  # 1e-3 of it was eps
    assert not beside[3].isfinite().all()
