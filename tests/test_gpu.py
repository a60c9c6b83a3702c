"""What only a CUDA device can show."""

import numpy as np
import pytest
import torch
from conftest import tiny

from simlab import build_model
from simlab.experiment import run
from simlab.schemes.init import Gaussian, distribution
from simlab.weights.dense import RandomWeights

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def test_blocks_are_built_and_drawn_on_the_gpu(monkeypatch):
    """No host memory is filled with weights: the CPU's drawing is never called."""
    import simlab.weights.dense as module

    monkeypatch.setattr(module, "draw_on_cpu", None)
    config = tiny("device=cuda")
    weights = RandomWeights(config.shape, config.init, 0)
    block = weights.block(0, CUDA, torch.float32)
    assert all(p.device.type == "cuda" for p in block.parameters())
    assert run(config).summary["device"].startswith("cuda")


def test_moments_on_the_gpu():
    config = tiny("vocab_size=20000")
    for name, parameter in build_model(config, "cuda").named_parameters():
        law = distribution(config.shape, config.init, name)
        if isinstance(law, Gaussian):
            values, n = parameter.detach().double(), parameter.numel()
            assert values.mean().abs() < 5 * law.std / n**0.5
            assert values.std().item() == pytest.approx(law.std, rel=5 / (2 * n) ** 0.5)
            assert values.abs().max() <= 3 * law.sigma * (1 + 1e-6)


def test_streamed_equals_resident_on_the_gpu():
    config = tiny("device=cuda")
    model, weights = build_model(config), RandomWeights(config.shape, config.init, 0)
    block = weights.block(2, CUDA, torch.float32)
    for name, value in block.state_dict().items():
        assert torch.equal(value, model.blocks[2].state_dict()[name])
    ids = torch.tensor([[3, 96, 3]])
    for name in ("embedding", "head"):
        rows = weights.rows(f"{name}.weight", (97, 48), ids, CUDA, torch.float32)
        assert torch.equal(rows, model.get_submodule(name).weight[ids.cuda()])


def test_the_same_weights_give_the_cpus_curve():
    config = tiny("init.std=0.1")
    model, ids = build_model(config, "cpu"), torch.arange(22).view(2, 11)
    there = model(ids)
    here = model.cuda()(ids.cuda()).cpu()
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


def test_cuda_and_cpu_curves_agree_in_distribution():
    """Other numbers, the same law: means of 32 seeds within five joint standard errors."""
    means = {}
    for device in ("cpu", "cuda"):
        frame = run(tiny(f"device={device}", "seeds=32", "norm.eps=1e-12")).curve
        means[device] = frame.groupby("sublayer")["mean_square"].agg(["mean", "sem"])
    gap = (means["cpu"]["mean"] - means["cuda"]["mean"]).abs()
    error = np.hypot(means["cpu"]["sem"], means["cuda"]["sem"])
    assert (gap < 5 * error + 1e-6).all()


@pytest.mark.parametrize("norm", ["reordered", "pre"])
def test_weightless_curves_are_the_cpus(norm):
    """Drawn on the CPU wherever they run: equal to rounding, forward and backward."""
    here, there = (
        run(
            tiny(
                f"device={d}", "engine=weightless", "gradients=true", f"norm={norm}", "init.std=0.1"
            )
        )
        for d in ("cuda", "cpu")
    )
    for column in there.curve.select_dtypes("number"):
        np.testing.assert_allclose(
            here.curve[column], there.curve[column], rtol=1e-3, atol=1e-5, err_msg=column
        )


def test_dense_gradients_are_autograds_on_the_gpu():
    from simlab.experiment import prepare

    config = tiny("device=cuda", "gradients=true", "init.std=0.1")
    model, ids = build_model(config), prepare(config).tokens.cuda()
    x = model.embedding(ids).detach().requires_grad_()
    out = x
    for block in model.blocks:
        out = block(out)
    logits = model.head(model.norm(out))[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    rms = x.grad.double().pow(2).mean().sqrt().item()
    assert run(config).curve["gradient_rms"].iloc[0] == pytest.approx(rms, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_run(dtype):
    frame = run(tiny("device=cuda", f"dtype={dtype}")).curve
    assert np.isfinite(frame["mean_square"]).all()


def test_one_synchronisation_per_run():
    """Between the first block and the last nothing waits for the device."""
    from simlab.measurement.engine import measure_curves

    config = tiny()
    weights, ids = RandomWeights(config.shape, config.init, 0), torch.arange(22).view(2, 11)
    embedded = []

    def strict():
        embedded.append(None)
        torch.cuda.set_sync_debug_mode("error")

    try:  # on_block is first called after block 0; from there on, a synchronisation raises
        measure_curves(weights, ids, CUDA, torch.float32, on_block=strict)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(embedded) == 3
