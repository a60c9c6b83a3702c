"""The schemes' formulas run without tensors: on sums of uncorrelated branches, by mean squares."""

import math

import pytest
from conftest import placed, tiny

from simlab.schemes.attn_res import AttnRes
from simlab.schemes.placement import PLACEMENTS, at, placement_of, renorm_after
from simlab.schemes.streams import Coefficients

V0, B = 0.25, 0.3  # the embedding's mean square; a branch's, of an input of mean square 1


class Kernel:
    """Σ_k c_k·b_k over uncorrelated b_k, kept as {k: (c_k, mean square of b_k)}."""

    def __init__(self, terms):
        self.terms = terms

    def __rmul__(self, scale):
        return Kernel({k: (scale * c, b) for k, (c, b) in self.terms.items()})

    def __truediv__(self, scale):
        return (1 / scale) * self

    def __add__(self, other):
        both = {
            k: (self.terms[k][0] + other.terms[k][0], self.terms[k][1])
            for k in self.terms.keys() & other.terms.keys()
        }
        return Kernel(self.terms | other.terms | both)

    @property
    def mean_square(self):
        return sum(c * c * b for c, b in self.terms.values())


def norm(x):
    return x / math.sqrt(x.mean_square)


def sublayer(x):
    """Its last matrix is fresh: a branch that is uncorrelated with all before it."""
    return Kernel({object(): (1.0, B * x.mean_square)})


def coefficients(state):
    """mHC's where its logits are 0: gates of ½, writes of 1, streams mixed alike."""
    n = len(state)
    return Coefficients((0.5,) * n, (1.0,) * n, ((1 / n,) * n,) * n)


def projections(state):
    """Of AltUp: a fresh vector with the mean square of the active stream, for each of the others."""
    return tuple(Kernel({object(): (1.0, state[0].mean_square)}) for _ in state[1:])


PARTS = {  # other parts are matrices, as a sublayer is
    "mix": coefficients,
    "embed_sides": projections,
    "predict": lambda state: state,
    "correct": lambda x: (0.0,) * 4,
}


def mean_squares(*overrides):
    """v at the embedding and after every step of the config's model, from its schemes alone."""
    config = tiny(*overrides).shape
    placement = placement_of(config)
    parts = {name: PARTS.get(name, sublayer) for name in placement.start_parts}
    x = placement.start(Kernel({object(): (1.0, V0)}), norm, config, **parts)
    v = [placement.watch(x).mean_square]
    for layer in range(config.depth):
        for kind in ("attention", "mlp"):
            scheme = at(config, layer, kind)
            maps = dict.fromkeys(scheme.norms, norm)
            maps |= {name: PARTS.get(name, sublayer) for name in scheme.parts}
            x = scheme.step(x, sublayer, lambda skip, branch: skip + branch, **maps)
            v.append(placement.watch(x).mean_square)
        if renorm_after(config, layer):
            x = norm(x)
            v.append(x.mean_square)
    return v


# What a step makes of the mean square v; n: the block counted from 1, of 4.
LAWS = {
    "reordered": lambda v, n, kind: v + 1,
    "swin_renorm": lambda v, n, kind: v + 1,
    "pre": lambda v, n, kind: v + B,
    "post": lambda v, n, kind: 1,
    "peri": lambda v, n, kind: v + 1,
    "lns": lambda v, n, kind: v + B / n,
    "deepnorm": lambda v, n, kind: 1,
    "none": lambda v, n, kind: v + B * v,
    "residual_scale": lambda v, n, kind: 3 / 4 * v + 1 / 4 * B,
    "rezero": lambda v, n, kind: v,
    "layerscale": lambda v, n, kind: v + 0.01 * B,
    "mix_ln": lambda v, n, kind: 1 if n == 1 else v + B,
    "parallel": lambda v, n, kind: v + B,
    "hyper_connections": lambda v, n, kind: v + B,
    "mhc": lambda v, n, kind: v + B,
    "deepseek_v4": lambda v, n, kind: v + B,
    "complete_p": lambda v, n, kind: v + (2 / 4) ** 2 * B,
    "deep_loop": lambda v, n, kind: 1,
    "keel": lambda v, n, kind: v + B if (n, kind) == (1, "attention") else 1,
    "ngpt": lambda v, n, kind: 1,
    "custom": lambda v, n, kind: 1,
    # Its values aren't normed here.
    "hybrid_norm": lambda v, n, kind: v + B * v if kind == "attention" else 1 + B,
    "hybrid_norm_star": lambda v, n, kind: (
        v + B if n == 1 else v + B * v if kind == "attention" else 1 + B
    ),
    "gemma3n": lambda v, n, kind: (
        ((math.sqrt(v) + 1) ** 2 + 2) / 2 if kind == "attention" else v + 1
    ),
    "gemma3n_altup": lambda v, n, kind: LAWS["gemma3n"](v, n, kind),
    "siamese_norm": lambda v, n, kind: v + B,
    "attn_res": lambda v, n, kind: v + B,
    "residual_dual": lambda v, n, kind: v + B * (V0 if v == V0 else 1),  # reads the embedding first
    "pre_post": lambda v, n, kind: v + B if kind == "attention" else 1,
}


def scaled(v, n, kind):
    """λ²v + 2λμc + μ² + β²B, c = ⟨x, x₀⟩/d: branches are uncorrelated with x₀, of mean square 1."""

    def at(n):
        return [a + (b - a) * (n - 1) / 3 for a, b in ((0.9, 1.2), (0.3, -0.1), (0.5, 0.8))]

    c = 1.0
    for step in range(2 * (n - 1) + (kind == "mlp")):
        stream, start, _ = at(step // 2 + 1)
        c = stream * c + start
    stream, start, branch = at(n)
    return stream**2 * v + 2 * stream * start * c + start**2 + branch**2 * B


LAWS["scaled"] = scaled


@pytest.mark.parametrize("placement", LAWS)
def test_the_formula_gives_its_law(placement):
    expected = [1.0 if placement in ("scaled", "ngpt") else V0]  # their start is normed
    for block in (1, 2, 3, 4):
        for kind in ("attention", "mlp"):
            expected.append(LAWS[placement](expected[-1], block, kind))
        if placement == "swin_renorm" and block % 2 == 0:
            expected.append(1)
    v = mean_squares("depth=4", *placed(placement))
    assert v == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [None, 1, 3, 4])
def test_attn_res_reads_and_sums(size):
    """The read's mean square is v/n² of n sources; the open sum's goes up to B·size again and again."""
    reads, sums, v = [], [], []

    def reading(x):
        reads.append(x.mean_square)
        return norm(x)

    config = tiny("norm=attn_res", f"norm.block_size={size or 'null'}", "depth=4").shape
    state = AttnRes.start(Kernel({object(): (1.0, V0)}), norm, config)
    for k in range(8):
        scheme = at(config, k // 2, ("attention", "mlp")[k % 2])
        v.append(AttnRes.watch(state).mean_square)
        state = scheme.step(state, sublayer, lambda skip, b: skip + b, norm_in=reading)
        sums.append(state[1].mean_square if size else None)
    sources = {
        None: [1, 2, 3, 4, 5, 6, 7, 8], 1: [1, 2, 3, 4, 5, 6, 7, 8], 3: [1, 2, 2, 2, 3, 3, 3, 4],
        4: [1, 2, 2, 2, 2, 3, 3, 3],
    }[size]  # fmt: skip
    assert v == pytest.approx([V0 + k * B for k in range(8)])
    assert reads == pytest.approx([m / n**2 for m, n in zip(v, sources, strict=True)])
    if size:
        assert sums == pytest.approx([B * (k % size + 1) for k in range(8)])


def test_every_placement_has_a_law_here():
    assert set(LAWS) == set(PLACEMENTS)
