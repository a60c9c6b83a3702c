"""The laws against closed forms written out, and against simulation."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from conftest import placed

from simlab import compose
from simlab.analysis.resampling import sign_flip
from simlab.experiment import run
from simlab.theory.laws import LAWS, Rows, additive, sqrt2

KINDS = ["embedding", *["attention", "mlp"] * 3]


def rows(kinds=KINDS, eps_factor=None, gain=1.0, normalises="branch"):
    """Of v_0 = 1/4. gain, normalises: of the sublayers, whose norms are all alike, or of each row."""
    factor = np.ones((1, len(kinds))) if eps_factor is None else np.array([eps_factor], float)
    gains = [1.0 if kind == "renorm" else gain for kind in kinds]
    if isinstance(normalises, str):
        normalises = ["stream" if kind == "renorm" else normalises for kind in kinds]
    return Rows(kinds, np.array([0.25]), factor, gains, normalises)


def test_sqrt2_is_literal():
    np.testing.assert_allclose(np.exp(sqrt2(rows()))[0], 0.25 * 2.0 ** np.arange(7), rtol=1e-12)
    rms = np.exp(sqrt2(rows())[0] / 2)
    np.testing.assert_allclose(rms[1:] / rms[:-1], np.sqrt(2), rtol=1e-12)


def test_additive_by_hand():
    np.testing.assert_allclose(np.exp(additive(rows()))[0], 0.25 + np.arange(7), rtol=1e-12)
    c = [np.nan, 0.2, 0.9, 1, 1, 1, 1]
    expected = [0.25, 0.45, 1.35, 2.35, 3.35, 4.35, 5.35]
    np.testing.assert_allclose(np.exp(additive(rows(eps_factor=c)))[0], expected, rtol=1e-12)
    half = np.exp(additive(rows(gain=0.5)))[0]
    np.testing.assert_allclose(half, 0.25 + np.arange(7) / 4, rtol=1e-12)


def test_renorm_and_stream_norms():
    kinds = ["embedding", "attention", "mlp", "renorm", "attention", "mlp", "renorm"]
    c = [np.nan, 1, 1, 0.99, 1, 1, 0.98]
    expected = [0.25, 1.25, 2.25, 0.99, 1.99, 2.99, 0.98]
    np.testing.assert_allclose(np.exp(additive(rows(kinds, c)))[0], expected, rtol=1e-12)
    doubled = [0.25, 0.5, 1.0, 0.99, 1.98, 3.96, 0.98]
    np.testing.assert_allclose(np.exp(sqrt2(rows(kinds, c)))[0], doubled, rtol=1e-12)
    stream = np.exp(additive(rows(eps_factor=[np.nan, 0.8, *[1] * 5], normalises="stream")))[0]
    np.testing.assert_allclose(stream, [0.25, 0.8, *[1] * 5], rtol=1e-12)


def test_norms_by_row():
    """Post-norm in the first block, pre-norm in the second, a normed branch in the third."""
    norms = [None, "stream", "stream", None, None, "branch", "branch"]
    c = [np.nan, 0.8, 0.9, 0.5, 1, 1, 0.25]
    v = np.exp(additive(rows(eps_factor=c, gain=2.0, normalises=norms)))[0]
    np.testing.assert_allclose(v, [0.25, 3.2, 3.6, 5.6, 9.6, 13.6, 14.6], rtol=1e-12)


def test_issue_797_numbers():
    """64 blocks from v_0 ≈ 0: rms about 11.3, not 2^64; λ of 32 blocks is ln(√32)/32 = 0.054."""
    deep = rows(["embedding", *["attention", "mlp"] * 64])
    v = np.exp(additive(replace(deep, first=np.array([0.0004]))))[0]
    assert np.sqrt(v[-1]) == pytest.approx(11.31, abs=0.01)
    assert np.log(np.sqrt(v[64] / v[2])) / 32 == pytest.approx(0.0542, abs=0.0002)


# 32 seeds of a model whose eps matters early and whose tokens repeat.
MODEL = [
    "depth=4", "width=128", "heads=4", "kv_heads=2", "d_ff=352", "vocab_size=64", "seeds=32",
    "inputs.batch=2", "inputs.length=32", "device=cpu",
]  # fmt: skip


@cache
def measured_with(norm, *overrides):
    return run(compose([*MODEL, *placed(norm), *overrides])).curve


def standardised(norm, law, *overrides):
    """The law's error on the mean curve in the seeds' standard errors, per row; and the p-value."""
    frame = measured_with(norm, *overrides)
    measured, predicted = (
        np.stack([curve[name].to_numpy()[1:] for _, curve in frame.groupby("seed")])
        for name in ("mean_square", f"law_{law}")
    )
    gap = measured - predicted
    # Rounding: where nothing is random (a norm's own output) the error is float32's, not the law's.
    floor = 1e-6 * measured.mean(0)
    error = np.hypot(gap.std(0, ddof=1) / np.sqrt(len(gap)), floor)
    return gap.mean(0) / error, sign_flip(gap, floor)


EXACT = ["reordered", "peri", "swin_renorm", "post", "deepnorm"]


@pytest.mark.parametrize("norm", EXACT)
@pytest.mark.parametrize("extra", [[], ["norm.type=layer", "norm.gain=0.7"]])
def test_additive_law_exact(norm, extra):
    """Within the seeds' standard error at every sublayer: 10 models × 8 to 10 rows, each |t| of
    31 degrees of freedom below 4.5 (1 in 10^4 by chance, Bonferroni over the rows of all: 1 %)."""
    t, p_value = standardised(norm, "additive", *extra)
    assert np.abs(t).max() < 4.5
    assert p_value > 0.001


BREAKS = [
    "pre",
    "none",
    "lns",
    "residual_scale",
    "layerscale",
    "rezero",
    "mix_ln",
    "pre_post",
    "parallel",
]


@pytest.mark.parametrize("norm", BREAKS)
def test_additive_law_does_not_apply(norm):
    """Nothing is claimed where branches aren't normed. The negative control: +1 each would be wrong."""
    frame = measured_with(norm)
    assert frame["law_additive"].isna().all()
    curves = frame.groupby("seed")
    gap = [
        curve["mean_square"].diff().to_numpy()[1:] - curve["eps_factor"].to_numpy()[1:]
        for _, curve in curves
    ]
    error = np.std(gap, axis=0, ddof=1) / np.sqrt(len(gap))
    assert (np.abs(np.mean(gap, axis=0)) / error).max() > 30


@pytest.mark.parametrize("norm", ["reordered", "peri", "swin_renorm", "pre", "none"])
def test_sqrt2_is_rejected_everywhere(norm):
    """Wherever sublayers add to the stream; where norms set it, the law says nothing."""
    t, p_value = standardised(norm, "sqrt2")
    assert np.abs(t).max() > 30
    assert p_value < 0.001
    assert measured_with("post")["law_sqrt2"].isna().all()


def test_eps_at_small_width():
    """d = 128, 512 tokens: the first block's mean square against a calculation from the init alone.

    Attention at position n: m_n = (dσ²)²σ_e²(E Σa² + r·Σ_{s≠t} g(s − t)/(n²d)), a the softmax of n
    normals of variance r (sampled), r what QK-norm's eps leaves of the logits' variance, and
    g(Δ) = mean over pairs of cos(θ_i Δ): two keys' logits correlate by their tokens' correlation,
    damped by RoPE, which couples weights and tokens. SwiGLU: d_ff·σ²·s²·E silu(s·z)², s² = dσ²v (by
    quadrature). Each adds m/(m + eps). 10 %: these are d → ∞ formulas. Then + 2 per block, within
    five standard errors.
    """
    config = compose(
        ["depth=4", "width=128", "heads=4", "kv_heads=4", "d_ff=512", "seeds=8", "vocab_size=50000",
         "inputs.batch=1", "inputs.length=512", "device=cpu"]
    )  # fmt: skip
    frame = run(config).curve
    ends = frame[frame["kind"] == "mlp"].pivot(
        index="seed", columns="sublayer", values="mean_square"
    )
    s2 = (0.02 * 0.986578) ** 2
    r = (128 * s2 * s2 / (128 * s2 * s2 + 1e-6)) ** 2
    g = np.cos(np.outer(np.arange(512), 500_000.0 ** (-np.arange(0, 32, 2) / 32))).mean(1)
    generator, m = np.random.default_rng(0), []
    for n in range(1, 513):
        a = np.exp(np.sqrt(r) * generator.standard_normal((100, n)))
        squares = ((a / a.sum(1, keepdims=True)) ** 2).sum(1).mean()
        pairs = 2 * ((n - np.arange(1, n)) * g[1:n]).sum() / n**2
        m.append((128 * s2) ** 2 * s2 * (squares + r * pairs / 128))
    m = np.array(m)
    v = s2 + m / (m + 1e-6)
    attention = frame.loc[frame["sublayer"] == 1, "mean_square"].mean()
    assert attention == pytest.approx(v.mean(), rel=0.1)
    z = np.linspace(-8, 8, 2001)
    s = np.sqrt(128 * s2 * v)[:, None]
    silu = s * z / (1 + np.exp(-s * z))
    density = np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    m = 512 * s2 * 128 * s2 * v * np.trapezoid(silu**2 * density, z)
    v = v + m / (m + 1e-6)
    first = ends.to_numpy()[:, 0]
    assert first.mean() == pytest.approx(v.mean(), rel=0.1)
    assert v.mean() < 0.15  # an eps outside the root, or none, would give 2
    later = np.diff(ends.to_numpy(), axis=1)[:, 1:]
    assert (np.abs(later.mean(0) - 2) < 5 * later.std(0, ddof=1) / np.sqrt(8)).all()


def test_a_normed_skip_has_neither_law():
    """Branches added to N(x) make no sum of branches, and no √2: n + F(n) stays near 1 + B."""
    for normalises, has in (("skip", [False, False]), ("branch", [True, True])):
        given = rows(normalises=normalises)
        assert [LAWS[name].applies(given) for name in ("additive", "sqrt2")] == has
    assert not np.isfinite(LAWS["sqrt2"].log_of(rows(normalises="skip"))).any()
