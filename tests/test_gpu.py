"""What only a CUDA device can show."""

import json

import numpy as np
import pytest
import torch
from conftest import STANDARD_ERRORS, ids_of, tiny
from safetensors.torch import save_file

import simlab
from simlab import build_model, compose
from simlab.budget.machine import available, calibrate
from simlab.checkpoints.checkpoint import Checkpoint
from simlab.config import ELEMENTWISE
from simlab.experiment import prepare, run
from simlab.model.norms import NORMS
from simlab.schemes.init import Gaussian, distribution
from simlab.weights.dense import RandomWeights

pytestmark = [
    pytest.mark.gpu,
    # torch says these once on a machine where all is well; every other warning fails.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]
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
            assert values.mean().abs() < STANDARD_ERRORS * law.std / n**0.5
            assert values.std().item() == pytest.approx(
                law.std, rel=STANDARD_ERRORS / (2 * n) ** 0.5
            )
            assert values.abs().max() <= 3 * law.sigma * (1 + 1e-6)


@pytest.mark.parametrize("vocabulary", [97, 200_000])
def test_streamed_equals_resident_on_the_gpu(vocabulary):
    """With one piece to draw and with many."""
    config = tiny("device=cuda", f"vocab_size={vocabulary}")
    model, weights = build_model(config), RandomWeights(config.shape, config.init, 0)
    block = weights.block(2, CUDA, torch.float32)
    for name, value in block.state_dict().items():
        assert torch.equal(value, model.blocks[2].state_dict()[name])
    ids = torch.tensor([[3, vocabulary - 1, 3]])
    for name in ("embedding", "head"):
        rows = weights.rows(f"{name}.weight", (vocabulary, 48), ids, CUDA, torch.float32)
        assert torch.equal(rows, model.get_submodule(name).weight[ids.cuda()])


def test_the_same_weights_give_the_cpus_curve():
    config = tiny("init.std=0.1")
    model, ids = build_model(config, "cpu"), torch.arange(22).view(2, 11)
    there = model(ids)
    here = model.cuda()(ids.cuda()).cpu()
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(set(NORMS) - set(ELEMENTWISE)))
def test_norms_of_huge_numbers_are_the_cpus(kind):
    """There float32 can't hold the squares; the CPU's are held against formulas (test_norms)."""
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([1.0, 1e10, 1e20, 1e37])[:, None]
    out = []
    for device in ("cpu", "cuda"):
        norm, inputs = NORMS[kind](48, 1e-6).to(device), x.to(device).requires_grad_()
        y = norm(inputs)
        (gradient,) = torch.autograd.grad(y.pow(3).sum(), inputs)
        out.append((y.detach().cpu(), gradient.cpu() * x.abs().amax(-1, keepdim=True)))
    for here, there in zip(*out, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)


def test_cuda_and_cpu_curves_agree_in_distribution():
    """Other numbers, the same law: means of 32 seeds within five joint standard errors."""
    means = {}
    for device in ("cpu", "cuda"):
        frame = run(tiny(f"device={device}", "seeds=32", "norm.eps=1e-12")).curve
        means[device] = frame.groupby("sublayer")["mean_square"].agg(["mean", "sem"])
    gap = (means["cpu"]["mean"] - means["cuda"]["mean"]).abs()
    error = np.hypot(means["cpu"]["sem"], means["cuda"]["sem"])
    assert (gap < STANDARD_ERRORS * error + 1e-6).all()


WEIGHTLESS = [
    ["norm=reordered"], ["norm=pre"], ["norm=swin_renorm"], ["norm=peri"], ["model.tied=true"],
    ["model.window=4"], ["seeds=3"], ["model.qk_norm=none", "norm.type=layer"], ["inputs.length=64"],
]  # fmt: skip


@pytest.mark.parametrize("overrides", WEIGHTLESS)
def test_weightless_curves_are_the_cpus(overrides):
    """Drawn on the CPU wherever they run: equal to rounding, forward and backward."""
    common = ["engine=weightless", "gradients=true", "init.std=0.1", *overrides]
    here, there = (run(tiny(f"device={d}", *common)) for d in ("cuda", "cpu"))
    for column in there.curve.select_dtypes("float"):  # not max_token: near ties fall either way
        np.testing.assert_allclose(
            here.curve[column], there.curve[column], rtol=1e-3, atol=1e-5, err_msg=column
        )


def test_dense_gradients_match_autograd_on_the_gpu():
    config = tiny("device=cuda", "gradients=true", "init.std=0.1")
    model, ids = build_model(config), ids_of(config).cuda()
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


def test_gpu_bytes_repeat():
    first, second = (run(tiny("device=cuda", "seeds=2")).curve for _ in range(2))
    assert first.equals(second)


def write_checkpoint(folder, dtype):
    """A checkpoint of a tiny model in transformers' layout, without transformers."""
    from write_random import hugging_face_config, shards

    config = tiny("init.std=0.1")
    weights = RandomWeights(config.shape, config.init, 0)
    folder.mkdir()
    values = hugging_face_config(config.shape, dtype)
    (folder / "config.json").write_text(json.dumps(values))
    tensors = {name: w for part in shards(weights, dtype) for name, w in part.items()}
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoints_curve_is_the_cpus(tmp_path, dtype):
    """Files in either dtype, read in float32: the same weights, hash and curve, gradients too."""
    write_checkpoint(tmp_path / "m", getattr(torch, dtype))
    source = ["source=checkpoint", f"source.path={tmp_path / 'm'}", "seeds=0", "gradients=true"]
    inputs = ["inputs=random", "inputs.batch=2", "inputs.length=11"]
    here, there = (run(compose([*source, *inputs, f"device={d}"])) for d in ("cuda", "cpu"))
    assert here.summary["weight_hash"] == there.summary["weight_hash"]
    for column in there.curve.select_dtypes("float"):  # not max_token: near ties fall either way
        np.testing.assert_allclose(
            here.curve[column], there.curve[column], rtol=1e-3, atol=1e-5, err_msg=column
        )


def test_gpu_checkpoint_weights(tmp_path):
    write_checkpoint(tmp_path / "m", torch.bfloat16)
    opened, name = Checkpoint(str(tmp_path / "m")), "blocks.1.mlp.sublayer.down_proj.weight"
    there = opened.tensor(name, (48, 80), torch.device("cpu"), torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        here = opened.tensor(name, (48, 80), CUDA, dtype)
        assert (here.device.type, here.dtype) == ("cuda", dtype)
        assert torch.equal(here.cpu(), there.to(dtype))


def test_the_probe_of_a_model_on_the_gpu():
    """The rows that the engine gives for the same weights, block by block."""
    config = tiny("device=cuda", "init.std=0.1")
    rows = simlab.probe(build_model(config), ids_of(config).cuda()).rows()
    expected = run(config).curve
    for column in ("mean_square", "branch_mean_square", "cosine", "attention_entropy", "kurtosis"):
        np.testing.assert_allclose(rows[column], expected[column], rtol=1e-4, err_msg=column)


def test_memory_that_is_free_and_rates():
    """What torch has cached counts as free; what a tensor takes doesn't."""
    total = torch.cuda.get_device_properties(0).total_memory
    before = available(CUDA)
    assert 0 < before <= total
    held = torch.empty(1 << 28, dtype=torch.uint8, device=CUDA)
    assert available(CUDA) <= before - (1 << 27)
    del held
    assert available("cuda:0") >= before - (1 << 27)
    rates = calibrate("bfloat16", "cuda")
    assert all(0 < rate < 1 for rate in vars(rates).values())


def test_auto_takes_the_gpu():
    ready = prepare(tiny("device=auto", "engine=auto"))
    assert ready.config.device.startswith("cuda")
    assert all(np.isfinite(ready.estimate))
