"""Theory of value embeddings against random ones: a closed form, and whole curves of both engines."""

import dataclasses

import numpy as np
import pytest
from conftest import STANDARD_ERRORS, ids_of, tiny

from simlab.experiment import run
from simlab.theory.mean_field.attention import AttentionKernel
from simlab.theory.mean_field.drawing import Context
from simlab.theory.mean_field.kernels import Input
from simlab.theory.mean_field.recursion import predict

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = ["depth=3", "heads=4", "kv_heads=2", "d_ff=160", "vocab_size=300", "inputs.length=8"]


def test_uniform_heads():
    """Without queries a head averages: the kernel gets H·C·σ_o²·g²·σ_e²·ā[same token]āᵀ."""
    model = tiny("width=128", "heads=8", "kv_heads=4", "model.value_embeddings=all").shape
    stds = {"q_proj": 0.0, "k_proj": 0.1, "v_proj": 0.1, "o_proj": 0.2, "value_embedding": 0.7}
    ids = np.array([[5, 5, 2, 9, 2, 5], [1, 5, 0, 1, 2, 2]])
    same = (ids.reshape(-1, 1) == ids.reshape(1, -1)).astype(float)
    kernel, nothing = 0.6 * np.eye(12) + 0.4, np.zeros((12, 12))
    context = Context(model, 2, 6, ids)
    branch = AttentionKernel(context, 0, stds)(Input(kernel, nothing, nothing, True))
    mean = np.kron(np.eye(2), np.tri(6) / np.arange(1, 7)[:, None])
    values = 128 * 0.1**2 * kernel + (1.5 * 0.7) ** 2 * same
    np.testing.assert_allclose(branch.kernel, 128 * 0.2**2 * mean @ values @ mean.T, rtol=1e-4)


CURVES = [
    ("alternate", 64, "norm=pre"),
    ("all", 192, "norm=pre"),
    ("all", 64, "norm=none"),
    ("alternate", 192, "norm=none"),
]
OWN = {"mean_square": 0.02, "token_cosine": 0.06, "gradient_rms": 0.06}


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "width", "norm"), CURVES)
def test_whole_curve(layers, width, norm):
    """Both engines: every row's mean square, cosine and gradient within OWN and the seeds' noise, and
    the band. Rows are as large as values.
    """
    size = 0.06 if norm == "norm=none" else 1.2 / width**0.5
    scale = f"model.value_embedding_scale={width**0.5}"
    asked = [*SHAPE, norm, f"width={width}", f"init.std={size}", scale]
    asked += [f"model.value_embeddings={layers}", "seeds=48", "gradients=true"]
    config = tiny(*asked)
    ids = ids_of(config).numpy()
    found, without = (  # of rows of zeros too
        predict(
            dataclasses.replace(config.shape, **changes), config.init, ids, gradients=not changes
        )
        for changes in ({}, {"value_embedding_scale": 0.0})
    )
    assert found.ends is None
    for engine in ("dense", "weightless"):
        by_row = run(tiny(*asked, f"engine={engine}")).curve.groupby("sublayer")
        mean, sem, std = (getattr(by_row, of)(numeric_only=True) for of in ("mean", "sem", "std"))

        def departure(rows, name, mean=mean, sem=sem):
            values = np.array([getattr(row, name) for row in rows])
            bound = OWN[name] * np.abs(mean[name]) + STANDARD_ERRORS * sem[name]
            return float(np.max(np.abs(values - mean[name])[1:] / bound[1:]))

        for name in OWN:
            assert departure(found.rows, name) < 1, (engine, name)  # of NaN it is false
        assert departure(without.rows, "mean_square") > 1.5
        ratio = np.array([row.band for row in found.rows]) / std["mean_square"]
        assert ((ratio > 0.67) & (ratio < 1.5)).all()  # a std of 48 draws is off by 10 % itself
