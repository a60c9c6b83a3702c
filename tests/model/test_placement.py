"""Each placement against its formula written out, with norms and sublayers from scratch."""

import dataclasses
import math

import pytest
import torch
from conftest import placed, tiny
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention, silu

from simlab import build_model
from simlab.config.validate import options
from simlab.model.parts import PARTS
from simlab.model.placement import ResidualAdd, finished, start, tensors_of
from simlab.model.transformer import parameter_count
from simlab.schemes.init import table
from simlab.schemes.placement import PLACEMENTS, at, placement_of
from simlab.schemes.rope import inverse_frequencies
from simlab.schemes.scheme import Scheme
from simlab.theory.mean_field.parts import PART_KERNELS
from simlab.theory.size import parameters_on_paper

EPS = 1e-3


NORMS = {
    "rms": lambda x, weight: rms_norm(x, x.shape[-1:], weight, EPS),
    "layer": lambda x, weight: layer_norm(x, x.shape[-1:], weight, None, EPS),
}


def sublayers(block, norm, heads=6, kv_heads=2):
    """The block's attention and MLP, from its weights alone; norm is QK-norm's too."""
    w = {name.split("sublayer.")[-1]: p for name, p in block.named_parameters()}

    def turn(x):
        angles, _ = inverse_frequencies(torch.arange(4.0), 8, 500_000.0)
        z = torch.polar(torch.ones(x.shape[2], 4), torch.outer(torch.arange(x.shape[2]), angles))
        y = torch.complex(x[..., :4], x[..., 4:]) * z
        return torch.cat([y.real, y.imag], -1)

    def attention(x):
        q, k, v = (x @ w[f"{name}_proj.weight"].T for name in "qkv")
        per_head = len(w["q_norm.weight"]) == 8
        if not per_head:
            q, k = norm(q, w["q_norm.weight"]), norm(k, w["k_norm.weight"])
        q, k, v = (p.view(*x.shape[:2], -1, 8).transpose(1, 2) for p in (q, k, v))
        if per_head:
            q, k, v = (
                norm(p, w[f"{n}_norm.weight"]) if f"{n}_norm.weight" in w else p
                for p, n in zip((q, k, v), "qkv", strict=True)
            )
        q, k = turn(q), turn(k)
        k, v = (p.repeat_interleave(heads // kv_heads, 1) for p in (k, v))
        o = scaled_dot_product_attention(q, k, v, is_causal=True)
        return o.transpose(1, 2).reshape(x.shape) @ w["o_proj.weight"].T

    def mlp(x):
        hidden = silu(x @ w["gate_proj.weight"].T) * (x @ w["up_proj.weight"].T)
        return hidden @ w["down_proj.weight"].T

    return attention, mlp


def linear(first, last, n, L):
    return first + (last - first) * (n - 1) / (L - 1)


def nanochat(x, F, i, o, n, L, z):
    if F.__name__ == "attention":
        x = linear(1.15, 1.05, n, L) * x + linear(0.2, 0.05, n, L) * z
    return x + 0.7 * F(i(x))


def scaled(x, F, i, o, n, L, z):
    skip = linear(0.9, 1.2, n, L) * x + linear(0.3, -0.1, n, L) * z
    return skip + linear(0.5, 0.8, n, L) * F(i(x))


def gemma3n(x, F, i, o, n, L, z):
    if F.__name__ == "mlp":
        return x + o(F(i(x)))
    h, step = i(x), F.step
    low = h @ step.laurel.left_proj.weight.T @ step.laurel.right_proj.weight.T
    laurel = h + NORMS["rms"](low, step.norm_laurel.weight)
    return (x + o(F(h)) + laurel) / math.sqrt(2)


def altup(state, F, i, o, n, L, z):
    def routed(part, x):
        modes = torch.tanh(NORMS["rms"](x, None) / 48 @ part.mode_proj.weight.T)
        return modes @ part.coef_proj.weight.T

    if F.__name__ == "attention":
        streams = torch.stack(state, 2)
        streams = streams + routed(F.step.predict, state[0]).unflatten(-1, (4, 4)) @ streams
        predicted = streams.unbind(2)
        return gemma3n(predicted[0], F, i, o, n, L, z), *predicted
    y, *predicted = state
    after = gemma3n(y, F, i, o, n, L, z)
    shares = 1 + routed(F.step.correct, after)
    changes = shares[..., None] * (after - predicted[0])[..., None, :]
    return tuple(p + change for p, change in zip(predicted, changes.unbind(2), strict=True))


def residual_dual(state, F, i, o, n, L, z):
    r, x = state if isinstance(state, tuple) else (state, state)
    b = F(x)
    return r + b, o(x + b)


# Element-wise norms, in place of ``pre``'s.
SQUASHES = {
    "dyt": lambda x, n: torch.tanh(n.alpha * x) * n.weight + n.bias,
    "derf": lambda x, n: torch.erf(n.alpha * x + n.shift) * n.weight + n.bias,
}


def siamese_norm(state, F, i, o, n, L, z):
    y, x = state if isinstance(state, tuple) else (state, state)
    x = o(x)
    b = F(i(x + NORMS["rms"](y, F.step.norm_stream.weight)))
    return y + b, x + b / (2 * n) ** 0.5


def attn_res(size):
    def update(state, F, i, o, n, L, z):
        x, part = state if isinstance(state, tuple) else (state, None)
        k = 2 * n - 2 + (F.__name__ == "mlp")
        b = F(i(x / (1 + -(-k // size))))
        return x + b, b if k % size == 0 else part + b

    return update


# update(x, F, N_in, N_out, n: block from 1, L: depth, z: embedding): the placement's formula.
# x is the embedding at first, then what the formula gave, which may be several vectors.
FORMULAS = {
    "reordered": lambda x, F, i, o, n, L, z: x + o(F(x)),
    "swin_renorm": lambda x, F, i, o, n, L, z: x + o(F(x)),
    "pre": lambda x, F, i, o, n, L, z: x + F(i(x)),
    "post": lambda x, F, i, o, n, L, z: o(x + F(x)),
    "peri": lambda x, F, i, o, n, L, z: x + o(F(i(x))),
    "lns": lambda x, F, i, o, n, L, z: x + F(i(x) / n**0.5),
    "deepnorm": lambda x, F, i, o, n, L, z: o((2 * L) ** 0.25 * x + F(x)),
    "none": lambda x, F, i, o, n, L, z: x + F(x),
    "residual_scale": lambda x, F, i, o, n, L, z: (
        math.sqrt(1 - 2 / (2 * L)) * x + math.sqrt(2 / (2 * L)) * F(i(x))
    ),
    "rezero": lambda x, F, i, o, n, L, z: x + 0.0 * F(i(x)),
    "layerscale": lambda x, F, i, o, n, L, z: x + 0.1 * F(i(x)),
    "mix_ln": lambda x, F, i, o, n, L, z: o(x + F(x)) if n <= 0.4 * L else x + F(i(x)),
    "pre_post": lambda x, F, i, o, n, L, z: (
        x + F(i(x)) if F.__name__ == "attention" else o(x + F(x))
    ),
    "parallel": lambda x, F, i, o, n, L, z: x + F(i(x)),  # i of the block's start
    # With logits of 0: 4 gates of ½ or of ¼, streams mixed alike or not, writes of 1.
    "mhc": lambda x, F, i, o, n, L, z: x + F(i(2 * x)),
    "mhc_paper": lambda x, F, i, o, n, L, z: x + F(i(2 * x)),
    "deepseek_v4": lambda x, F, i, o, n, L, z: x + F(i(2 * x)),
    "hy_v4": lambda x, F, i, o, n, L, z: x + F(i(x)),
    "hyper_connections": lambda x, F, i, o, n, L, z: x + F(i(x)),
    "complete_p": lambda x, F, i, o, n, L, z: x + 2 / L * F(i(x)),
    "deep_loop": lambda x, F, i, o, n, L, z: o((2 * L) ** 0.5 * x + F(i(x))),
    "keel": lambda x, F, i, o, n, L, z: (
        o(2 * L * x + F(i(x)))
        if n > 1
        else x + F(i(x))
        if F.__name__ == "attention"
        else o(x + F(i(x)))
    ),
    "hybrid_norm": lambda x, F, i, o, n, L, z: (
        x + F(x) if F.__name__ == "attention" else i(x) + F(i(x))
    ),
    "custom": lambda x, F, i, o, n, L, z: o(2 * x + F(i(x) / n**0.5) - 3 / L * z),
    "scaled": scaled,
    "residual_dual": residual_dual,
    "siamese_norm": siamese_norm,
    "attn_res": attn_res(3),
    "attn_res_block": attn_res(6),
    "kimi_k3": attn_res(24),
    "nanochat": nanochat,
    "modded_nanogpt": lambda x, F, i, o, n, L, z: (
        1.1**0.5 * x + (F(i(x)) if F.__name__ == "attention" else 0)
    ),
    "gemma3n": gemma3n,
    "gemma3n_altup": altup,
    "ngpt": lambda x, F, i, o, n, L, z: o(
        x + 0.05 * (NORMS["rms"](F(x), F.step.norm_branch.weight) - x)
    ),
    "minimax": lambda x, F, i, o, n, L, z: 160**0.25 * i(x) + F(i(x)),
    "granite": lambda x, F, i, o, n, L, z: x + 0.22 * F(i(x)),
    "prores": lambda x, F, i, o, n, L, z: x + min(0.5 / (n / L), 1) * F(i(x)),
    "dyt": lambda x, F, i, o, n, L, z: x + F(i(x)),
    "derf": lambda x, F, i, o, n, L, z: x + F(i(x)),
    "laurel_rw": lambda x, F, i, o, n, L, z: 0.8 * x + 1.3 * F(i(x)),
    "hybrid_norm_star": lambda x, F, i, o, n, L, z: FORMULAS["pre" if n == 1 else "hybrid_norm"](
        x, F, i, o, n, L, z
    ),
}


def with_random_gains(model):
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.mark.parametrize(
    ("placement", "kind"),
    [*((p, "rms") for p in FORMULAS), ("reordered", "layer"), ("pre", "layer")],
)
def test_formula(placement, kind):
    own_type = [] if placement in SQUASHES else [f"norm.type={kind}"]
    constant = ["norm.mix_scale=0"] * (placement in ("mhc", "mhc_paper", "hy_v4", "deepseek_v4"))
    config = tiny(
        "depth=5", *placed(placement), *own_type, f"norm.eps={EPS}", "init.std=0.2", *constant
    )
    model, norm = with_random_gains(build_model(config)), NORMS[kind]
    ids = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(0))
    state = start(model.embedding(ids), config.shape, model.start_parts)
    z = expected = placement_of(config.shape).watch(state)
    if config.shape.norm.start_normed or placement == "ngpt":
        torch.testing.assert_close(z, rms_norm(model.embedding(ids), (48,), None, EPS))
    if placement == "gemma3n_altup":
        expected = state
    with torch.no_grad():
        for n, block in enumerate(model.blocks, start=1):
            state, before = block(state), expected
            x = placement_of(config.shape).watch(state)
            for step, F in zip((block.attention, block.mlp), sublayers(block, norm), strict=True):
                F.step = step

                def i(y, step=step, before=before):
                    if placement in SQUASHES:
                        return SQUASHES[placement](y, step.norm_in)
                    return norm(before if placement == "parallel" else y, step.norm_in.weight)

                def o(y, step=step):
                    return norm(y, step.norm_out.weight)

                expected = FORMULAS[placement](expected, F, i, o, n, 5, z)
            if placement == "swin_renorm" and n in (2, 4):
                expected = norm(expected, block.renorm.norm_out.weight)
            pairs = [(x, expected)]
            if isinstance(expected, tuple):
                pairs = zip(state, expected, strict=True)
            for x, y in pairs:
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * float(x.abs().max()))


def gated_head(state, norm, parts):
    """DeepSeek-V4's, without its eps in the gates."""
    flat = torch.cat(state, -1)
    gates = (rms_norm(flat, flat.shape[-1:], None, EPS) @ parts.gates.mix_proj.weight.T).sigmoid()
    return torch.einsum("btn,nbtd->btd", gates, torch.stack(state))


def unembedded(state, norm, parts):
    """AltUp's mean: the active stream and the others' projections, with its rms."""
    active, *others = state
    made = [
        y @ side.side_proj.weight.T
        for y, side in zip(others, parts.unembed_sides.children(), strict=True)
    ]
    rms = [x.pow(2).mean(-1, keepdim=True).sqrt() for x in (active, *made)]
    return (active + sum(x * rms[0] / r for x, r in zip(made, rms[1:], strict=True))) / 4


# finish(state, N without a gain, the parts): what the final norm gets.
FINISHES = {
    "scaled": lambda state, norm, parts: state[0] - 0.6 * state[2],
    "residual_dual": lambda state, norm, parts: state[1] + norm(state[0]),
    "hyper_connections": lambda state, norm, parts: sum(state),
    "mhc": lambda state, norm, parts: sum(state) / len(state),
    "deepseek_v4": gated_head,
    "gemma3n_altup": unembedded,
    "siamese_norm": lambda state, norm, parts: norm(state[0]) + norm(state[1]),
    "attn_res": lambda state, norm, parts: state[0] / 3,  # of 6 sublayers in blocks of 3
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_the_final_norm_gets(placement, kind):
    model = build_model(tiny(*placed(placement), f"norm.type={kind}", f"norm.eps={EPS}"))
    config = model.config
    x = torch.randn(2, 11, 48, generator=torch.Generator().manual_seed(0))
    made = start(x, config, model.start_parts)
    state = tuple((i + 1) * y for i, y in enumerate(tensors_of(made)))
    expected = FINISHES.get(placement, lambda state, norm, parts: state[0])(
        state, lambda y: NORMS[kind](y, None), model.finish_parts
    )
    out = finished(state if isinstance(made, tuple) else state[0], config, model.finish_parts)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("start_scale", ["0", "0.3"])
def test_middle_is_subtracted(depth, start_scale):
    """nanochat's x − 0.2·x_mid, x_mid after the block with the number ⌊L/2⌋ (from 0), in the logits."""
    asked = [f"depth={depth}", "norm=scaled", f"norm.start_scale={start_scale}", "init.std=0.2"]
    model, plain = (
        build_model(tiny(*asked, f"norm.subtract_middle={value}")) for value in (0.2, "null")
    )
    plain.load_state_dict(model.state_dict(), strict=True)
    after, ids = [], torch.arange(22).view(2, 11)
    for block in plain.blocks:
        block.register_forward_hook(lambda m, args, out: after.append(tensors_of(out)[0]))
    plain(ids)
    expected = plain.head(plain.norm(after[-1] - 0.2 * after[depth // 2]))
    torch.testing.assert_close(model(ids), expected)


def test_every_placement_has_a_formula_here():
    assert set(FORMULAS) == {*options("norm")} - {"from_checkpoint"} >= set(PLACEMENTS)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_residual_add_is_exact(placement):
    """At every add, bit for bit; and no parameter is left out of what the placement computes."""
    model = with_random_gains(build_model(tiny(*placed(placement), "init.std=0.1")))
    seen = []
    for module in model.modules():
        if isinstance(module, ResidualAdd):
            module.register_forward_hook(lambda m, args, out: seen.append((*args, out)))
    model(torch.arange(22).view(2, 11))
    assert len(seen) == 2 * 3
    for skip, branch, after in seen:
        assert torch.equal(after, skip + branch)
        assert branch.abs().max() > 0 or placement == "rezero"


def test_layerscale_alpha_by_depth():
    for depth, alpha in ((18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6)):
        config = tiny(f"depth={depth}", "norm=layerscale")
        assert at(config.shape, 0, "mlp").alpha == alpha
    assert at(tiny("norm=layerscale", "norm.alpha=0.3").shape, 0, "mlp").alpha == 0.3


def test_mix_ln_post_norm_blocks():
    def count(depth, fraction):
        config = tiny("norm=mix_ln", f"norm.fraction={fraction}", f"depth={depth}").shape
        return sum(at(config, layer, "mlp").normalises == "stream" for layer in range(depth))

    # The paper's models: 3 of 12 and 6 of 24.
    assert [count(depth, 0.25) for depth in (3, 4, 7, 12, 24)] == [0, 1, 1, 3, 6]
    assert (count(100, 0.29), count(5, 0), count(5, 1)) == (29, 0, 5)
    assert tiny("norm=mix_ln").shape.norm.fraction == 0.25


@pytest.mark.parametrize("placement", [*PLACEMENTS, "uneven"])
def test_parameter_count_is_the_models(placement, monkeypatch):
    """Gains too, where blocks have more norms than others."""

    class Uneven(Scheme):
        """Two norms in the first block's attention, one elsewhere."""

        @classmethod
        def select(cls, config, layer, kind):
            return PLACEMENTS["peri" if (layer, kind) == (0, "attention") else "pre"]

    monkeypatch.setitem(PLACEMENTS, "uneven", Uneven)
    config = tiny(*placed("pre" if placement == "uneven" else placement))
    norm = dataclasses.replace(config.shape.norm, placement=placement)
    config = dataclasses.replace(config, model=dataclasses.replace(config.shape, norm=norm))
    counted = sum(p.numel() for p in build_model(config).parameters())
    assert parameter_count(config.shape) == parameters_on_paper(config.shape) == counted


def test_deepnorm_scales_its_init():
    config = tiny("depth=4", "norm=deepnorm")
    stds = table(config.shape, config.init)
    beta = (8 * 4) ** -0.25
    for role in ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert stds[role].sigma == pytest.approx(0.02 * beta, rel=1e-12)
    for role in ("q_proj", "k_proj", "embedding", "head"):
        assert stds[role].sigma == 0.02


def test_swin_gain_zero_is_the_identity():
    """SwinV2's public code starts its gains at 0; a re-norm then still acts on the stream."""
    model = build_model(tiny("norm=swin_renorm", "norm.gain=0", "depth=3"))
    ids = torch.arange(11)[None]
    x = model.embedding(ids)
    for block in model.blocks:
        assert torch.equal(block(x), x)


def test_scheme_state():
    """Equal schemes compute the same: the layers that models share are found by comparing them."""
    for placement in PLACEMENTS.values():
        assert placement.__init__ is Scheme.__init__


def test_every_part_has_its_kernel():
    assert set(PARTS) == set(PART_KERNELS)
