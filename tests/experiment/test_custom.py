"""``norm=custom``: placements that there are, written as formulas, give the same curves."""

import numpy as np
import pandas as pd
import pytest
from conftest import PARITY, in_process, tiny

from simlab.experiment import run

AS_FORMULAS = {  # of three blocks
    "reordered": "x + N(F(x))",
    "pre": "x + F(N(x))",
    "post": "N(x + F(x))",
    "peri": "x + N(F(N(x)))",
    "lns": "x + F(N(x)/sqrt(l))",
    "none": "x + F(x)",
    "residual_scale": "sqrt(1 - 1/L)*x + sqrt(1/L)*F(N(x))",
    "rezero": "x + 0*F(N(x))",
    "layerscale": "x + 0.1*F(N(x))",
    "complete_p": "x + 2/L*F(N(x))",
    "granite": "0.22*F(N(x)) + x",
    "minimax": "3.5565588200778455*N(x) + F(N(x))",
    "scaled norm.start_scale=0.3 norm.stream_scale=0.9 norm.branch_scale=0.7": (
        "0.7*F(N(x)) + 0.9*x + 0.3*x0"
    ),
    "scaled norm.start_scale=[0.3,-0.1]": "x + F(N(x)) + (0.3 - 0.4*(l - 1)/(L - 1))*x0",
    "nanochat norm.branch_scale=1 norm.start_normed=false norm.stream_scale=[1.1,1.1]"
    " norm.start_scale=[0.2,0.2] norm.subtract_middle=null": (
        "1.1*x + 0.2*x0 + F(N(1.1*x + 0.2*x0))", "x + F(N(x))",
    ),
    "pre_post": ("x + F(N(x))", "N(x + F(x))"),
}  # fmt: skip


def custom(update, mlp_update=None):
    more = [f'norm.mlp_update="{mlp_update}"'] if mlp_update else []
    return ["norm=custom", f'norm.update="{update}"', *more]


def curve(*overrides, engine):
    options = ["gradients=true", "init.std=0.1", "norm.eps=1e-3", f"engine={engine}"]
    return run(tiny(*overrides, *options)).curve


@pytest.mark.parametrize("engine", ["dense", "weightless", "theory"])
@pytest.mark.parametrize("placement", AS_FORMULAS)
def test_placements_as_formulas(placement, engine):
    texts = AS_FORMULAS[placement]
    name, *keys = placement.split()
    ours = curve(*custom(*([texts] if isinstance(texts, str) else texts)), engine=engine)
    built_in = curve(f"norm={name}", *keys, engine=engine)
    pd.testing.assert_frame_equal(ours, built_in, **PARITY)
    exact = "/" not in placement + str(texts) and "x0" not in str(texts) and name != "minimax"
    if exact:  # the same operations
        pd.testing.assert_frame_equal(ours, built_in, check_exact=True)


def test_another_formula_is_another_curve():
    one, other = (
        curve(*custom(f"N({factor}*x + F(N(x)))"), engine="dense") for factor in (2, 2.01)
    )
    assert not np.allclose(one["token_cosine"], other["token_cosine"], **PARITY)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("0.5*(x + F(N(x)))", "0.5*x + 0.5*F(N(x))"),
        ("x + F(N(x)) + 0.1*x0", "0.1*x0 + F(N(x)) + x"),
        ("-(-x - F(x)/2)", "x + 0.5*F(x)"),
        ("x - 0.5*x + F(N(x))", "x/2 + F(N(x))"),
    ],
)
def test_however_it_is_written(text, same):
    one, other = (curve(*custom(each), engine="weightless") for each in (text, same))
    pd.testing.assert_frame_equal(one, other, **PARITY)


@pytest.mark.parametrize(
    "text", ["N(2*x + F(N(x))) + 0.5*x", "x + F(N(x)) + 0.1*x0", "x + N(x + N(F(N(x0))))/L"]
)
def test_three_ways_to_one_curve(text):
    """Of formulas that no placement has: dense, weightless and theory agree, gradients too."""
    options = ["width=128", "heads=4", "kv_heads=4", "d_ff=256", "init=fan_in"]
    means = []
    for engine in ("dense", "weightless"):
        found = run(
            tiny(*custom(text), *options, f"engine={engine}", "seeds=16", "gradients=true")
        ).curve
        rows = found.groupby("sublayer")[["mean_square", "gradient_rms"]]
        means.append((rows.mean(), rows.sem()))
        predicted = found[found["seed"] == 0].set_index("sublayer")["law_mean_field"]
        off = (means[-1][0]["mean_square"] - predicted).abs()
        # 1 %: theory's stated accuracy at width 128; 5 standard errors, of 16 seeds.
        assert (off <= 5 * means[-1][1]["mean_square"] + 0.01 * predicted).all()
    (a, sem_a), (b, sem_b) = means
    # Of 16 seeds each: by chance one row in 10⁵.
    assert ((a - b).abs() <= 5 * np.hypot(sem_a, sem_b) + 1e-12).all(axis=None)


def test_as_typed(tmp_path):
    """As docs/sweeps.md has it, once the shell has taken its quotes."""
    typed = 'norm.update="N(2*x + F(N(x)))"'
    size = ["depth=2", "width=32", "heads=2", "vocab_size=50", "engine=theory"]
    done = in_process("norm=custom", typed, *size, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "norm custom update N(2*x + F(N(x)))" in " ".join(done.stdout.split())
    for bare in ("N(2*x + F(N(x)))", "x+F(N(x))", "N(x)", "x + F(x)"):
        done = in_process("norm=custom", f"norm.update={bare}", *size, cwd=tmp_path)
        assert done.returncode == 2
        assert f"""write 'norm.update="{bare}"'""" in done.stderr, done.stderr
